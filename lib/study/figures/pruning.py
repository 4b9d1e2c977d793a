"""Figures of the pruner's training (notebook 05)."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.grid.plan import COMPUTE, HOLD
from lib.study.figures import NARROW, PALETTE, STATES, WIDE, edges

TONES = {"DiP-GO": PALETTE[1], "columns": "0.45", "annealed": PALETTE[4], "annealed columns": "0.7",
         "untrained": "0.6"}
"""One colour a pruner; what is untrained is dotted."""
GATES = LinearSegmentedColormap.from_list("gates", [STATES[HOLD][1], STATES[COMPUTE][1]])
"""From a gate of 0, which holds, to one of 1, which computes, in the colours of plans."""


def training(history: pd.DataFrame) -> Figure:
    """Draw both losses and the kept fraction of the MACs over the updates, counted from 1, a line a pruner.

    The consistency loss, which jumps with each update's images, is meaned over a twentieth of the longest training.

    Parameters
    ----------
    history : columns pruner, update (from 0), consistency, sparsity, kept; pruners beside those of `TONES` take
        further colours
    """
    figure, panels = plt.subplots(1, 3, figsize=(WIDE, 2.6))
    labels = {"consistency": "consistency loss", "sparsity": "sparsity term", "kept": "kept MACs (%)"}
    window = max(1, len(history["update"].unique()) // 20)
    for axes, (column, label) in zip(panels, labels.items()):
        for name, rows in history.groupby("pruner", sort=False):
            drawn = rows[column].rolling(window, min_periods=1).mean() if column == "consistency" else rows[column]
            scale = 100 if column == "kept" else 1
            axes.plot(rows["update"] + 1, scale * drawn, lw=1.1, color=TONES.get(name), label=name)
        axes.set(xlabel="update", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=6, ncols=4, loc="outside upper center")
    return figure


def maps(panels: Mapping[str, np.ndarray], rows: list[str], label: str) -> Figure:
    """Draw several maps of one value a cell in [0, 1] above each other, steps across: from what holds to what computes.

    Where all values are 0 or 1, a legend says what these are; else a colour bar does.

    Parameters
    ----------
    panels : title to (T, groups), float or bool
    rows : the groups' names
    label : what the values are, such as "gate"
    """
    figure, drawn = plt.subplots(len(panels), 1, figsize=(WIDE, len(panels) * (0.11 * len(rows) + 0.35) + 0.4),
                                 sharex=True, squeeze=False)
    for axes, (title, values) in zip(drawn[:, 0], panels.items()):
        cells = np.asarray(values, dtype=float).T
        mesh = axes.pcolormesh(*edges(cells), cells, cmap=GATES, vmin=0, vmax=1, edgecolors="white", linewidth=0.2)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=5 if len(rows) > 8 else 6)
        axes.set_title(title, fontsize=7, loc="left", pad=2)
    drawn[-1, 0].set(xlabel="step (noise to image)")
    drawn[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if all(np.isin(values, (0, 1)).all() for values in panels.values()):
        patches = [plt.Rectangle((0, 0), 1, 1, fc=STATES[state][1], ec="0.6") for state in (HOLD, COMPUTE)]
        drawn[0, 0].legend(patches, [f"{label} {i}: {STATES[state][0]}" for i, state in enumerate((HOLD, COMPUTE))],
                           ncols=2, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    else:
        figure.colorbar(mesh, ax=drawn[:, 0], label=label, pad=0.01, aspect=12 * len(panels))
    return figure


def freedom(table: pd.DataFrame) -> Figure:
    """Draw how much of what a plan reuses lies outside wholly reused steps, over the kept fraction.

    Parameters
    ----------
    table : columns pruner, keep, outside_macs (fraction of the reused MACs)
    """
    figure, axes = plt.subplots(figsize=(NARROW, 2.3))
    for name, rows in table[~table["pruner"].str.contains("columns")].groupby("pruner", sort=False):  # those have none
        axes.plot(100 * rows["keep"], 100 * rows["outside_macs"], marker="o", ms=3, lw=1, color=TONES[name], label=name,
                  ls=":" if name == "untrained" else "-")
    axes.set(xlabel="kept MACs (%)", ylabel="reused MACs outside\nwhole steps (%)")
    axes.legend(fontsize=6)
    return figure
