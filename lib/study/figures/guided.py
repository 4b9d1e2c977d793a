"""Figures of guidance: the two passes of the network, and what a scale gives and costs."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib.study.figures import COLOURS, PALETTE, WIDE

PARTS = {"given": PALETTE[0], "null": "0.45", "difference": PALETTE[1]}
"""Colours of the two passes and of their difference."""


def passes(rows: pd.DataFrame) -> Figure:
    """Draw how alike the two passes are over the steps, and how fast each changes.

    Parameters
    ----------
    rows : as `lib.judging.analysis.two_passes` gives it
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.4))
    left.plot(rows["step"], rows["alike"], color="0.2", label="cosine of given and null")
    left.plot(rows["step"], rows["difference"], color=PARTS["difference"], label="|given - null| / |given|")
    left.set(xlabel="step, from noise to image", ylim=(0, None))
    for name, colour in PARTS.items():
        right.plot(rows["step"], rows[f"{name}, held"], color=colour, label=name)
    right.set(xlabel="step, from noise to image", ylabel="change from the step before", yscale="log")
    for axis in (left, right):
        axis.legend()
    return figure


def scales(table: pd.DataFrame) -> Figure:
    """Draw score and prompt score against the scale of guidance, with intervals.

    Parameters
    ----------
    table : columns scale, score, and prompts where there are some; these two with _low and _high
    """
    labels = {"score": "score (less is better)", "prompts": "prompts drawn right"}
    labels = {name: label for name, label in labels.items() if name in table}
    figure, axes = plt.subplots(1, len(labels), figsize=(WIDE, 2.4), squeeze=False)
    for axis, (name, label) in zip(axes[0], labels.items()):
        reach = [table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]]
        axis.errorbar(table["scale"], table[name], reach, color=COLOURS["teacher"], marker="o", capsize=2)
        axis.set(xlabel="scale of guidance (1: none, one pass)", ylabel=label)
    return figure
