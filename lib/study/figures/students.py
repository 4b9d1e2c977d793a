"""Figures of the block search and of retraining (notebooks 02 and 03)."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from lib.study.figures import COLOURS, NARROW, PALETTE, WIDE, plain_logarithm

KERNELS = dict(zip((1, 3, 5, 7), sns.light_palette(COLOURS["DiffNAS"], 5)[1:]))
"""A shade a kernel: the larger the darker."""
CHOICES = {"reference": ("black", "o"), "local": (COLOURS["DiffNAS"], "*"), "global, raw": (PALETTE[3], "x"),
           "global, relative": (PALETTE[0], "+")}
"""Colour and marker of each way to choose."""


def short(path: str) -> str:
    """Shorten a residual block's module path: "up_blocks.2.resnets.1" gives "up2.1"."""
    return path.replace("_blocks.", "").replace("_block", "").replace(".resnets", "")


def curves(history: pd.DataFrame, label: str) -> Figure:
    """Draw training losses over the share of the steps done, a line a training, a colour a name.

    Parameters
    ----------
    history : columns name, training, step, loss
    label : of the losses
    """
    names = list(dict.fromkeys(history["name"]))
    figure, axes = plt.subplots(figsize=(NARROW if len(names) == 1 else WIDE, 2.4))
    for name, colour in zip(names, sns.color_palette("colorblind", len(names))):
        for number, (_, rows) in enumerate(history[history["name"] == name].groupby("training")):
            axes.plot(100 * rows["step"] / rows["step"].max(), rows["loss"], lw=0.8, color=colour,
                      label=None if number else name)
    axes.set(xlabel="training (%)", ylabel=label, yscale="log")
    plain_logarithm(axes.yaxis)
    if len(names) > 1:
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def forms_map(table: pd.DataFrame) -> Figure:
    """Draw the least loss of each residual block in each form.

    Parameters
    ----------
    table : columns block (module path), form (Form), share (of the block's own width), loss
    """
    table = table.assign(kernels=[f"{form.kernel_1}, {form.kernel_2}" for form in table["form"]])
    values = table.pivot_table(index="block", columns=["share", "kernels"], values="loss", sort=False)
    values = values[sorted(values.columns)]
    figure, axes = plt.subplots(figsize=(WIDE, 0.2 * len(values) + 1))
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), norm=LogNorm(), cmap="viridis_r", edgecolors="white", lw=0.3)
    axes.set_yticks(np.arange(len(values)) + 0.5, [short(path) for path in values.index], fontsize=7)
    shares, kernels = zip(*values.columns)
    axes.set_xticks(np.arange(len(kernels)) + 0.5, kernels, fontsize=5, rotation=90)
    axes.tick_params(length=0)
    for share in dict.fromkeys(shares):
        first, count = shares.index(share), shares.count(share)
        axes.text(first + count / 2, len(values) + 0.2, f"width x {share:g}", ha="center", fontsize=7)
        axes.axvline(first, color="white", lw=2)
    axes.set_xlabel("kernels of the two convolutions")
    bar = figure.colorbar(mesh, ax=axes, label="least relative error", pad=0.01)
    plain_logarithm(bar.ax.yaxis)
    return figure


def architectures(table: pd.DataFrame) -> Figure:
    """Draw networks above each other: a box a residual block, as high as wide inside, its halves shaded by kernel.

    Parameters
    ----------
    table : columns name, block (module path), share (of the teacher's width), kernel_1, kernel_2
    """
    names, places = (list(dict.fromkeys(table[column])) for column in ("name", "block"))
    figure, axes = plt.subplots(figsize=(WIDE, 0.42 * len(names) + 0.8))
    tallest = table["share"].max()
    for row in table.itertuples():
        x, y, high = places.index(row.block), names.index(row.name), 0.8 * row.share / tallest
        for half, kernel in enumerate((row.kernel_1, row.kernel_2)):
            axes.add_patch(Rectangle((x + 0.1 + 0.4 * half, y + (1 - high) / 2), 0.4, high, fc=KERNELS[kernel],
                                     ec="white", lw=0.5))
    axes.set(xlim=(0, len(places)), ylim=(len(names), 0))
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    axes.set_xticks(np.arange(len(places)) + 0.5, [short(path) for path in places], fontsize=7)
    axes.tick_params(length=0)
    sns.despine(ax=axes, left=True, bottom=True)
    used = sorted({*table["kernel_1"], *table["kernel_2"]})
    axes.legend([Patch(color=KERNELS[kernel]) for kernel in used], [f"{kernel} x {kernel}" for kernel in used],
                ncols=len(used), fontsize=7, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def trade(tables: Mapping[str, pd.DataFrame], picks: pd.DataFrame, tolerance: float) -> Figure:
    """Draw each level's candidates, price against loss, what was picked, and how much loss the local choice may have.

    Parameters
    ----------
    tables : by level: columns macs, loss
    picks : columns name ("reference" among them), level, macs, loss
    tolerance : s, in times the reference's loss: a dashed line
    """
    wide = 4
    high = -(-(len(tables) + 1) // wide)  # one is for the legend
    figure, panels = plt.subplots(high, wide, figsize=(WIDE, 1.7 * high + 0.3), squeeze=False)
    for axes in panels.flat[len(tables):]:
        axes.set_axis_off()
    limits = tolerance * picks[picks["name"] == "reference"].set_index("level")["loss"]
    for axes, (level, table) in zip(panels.flat, tables.items()):
        axes.axhline(limits[level], color=COLOURS["DiffNAS"], lw=0.8, ls="--",
                     label=f"$s$ x reference ($s$ = {tolerance:.2f})")
        axes.plot(table["macs"] / 1e6, table["loss"], ".", ms=2, color="0.8", rasterized=True, label="candidates")
        for size, row in enumerate(picks[picks["level"] == level].itertuples(), start=2):  # rings, where some agree
            colour, marker = next(CHOICES[kind] for kind in CHOICES if row.name.startswith(kind))
            axes.plot(row.macs / 1e6, row.loss, marker, ms=2 * size, mfc="none", color=colour, label=row.name, mew=1.2)
        axes.set_yscale("log")
        axes.set_title(level, fontsize=7, pad=2)
        axes.tick_params(labelsize=6)
        plain_logarithm(axes.yaxis)
    panels.flat[len(tables)].legend(*panels.flat[0].get_legend_handles_labels(), fontsize=6, loc="center")
    figure.supxlabel("M MACs of the searched parts", fontsize=8)
    figure.supylabel("relative error", fontsize=8)
    return figure


def schedules(table: pd.DataFrame) -> Figure:
    """Draw beta over the way through a training, a panel a schedule (columns schedule, way, beta)."""
    names = list(dict.fromkeys(table["schedule"]))
    figure, panels = plt.subplots(1, len(names), figsize=(WIDE, 1.3), sharey=True)
    for axes, name in zip(panels, names):
        rows = table[table["schedule"] == name]
        axes.fill_between(100 * rows["way"], rows["beta"], color=COLOURS["DiffNAS"], alpha=0.3, lw=0)
        axes.plot(100 * rows["way"], rows["beta"], color=COLOURS["DiffNAS"], lw=1.2)
        axes.set(ylim=(-0.05, 1.05), xticks=(0, 50, 100))
        axes.set_title(name, fontsize=7, pad=3)
        axes.tick_params(labelsize=6)
    panels[0].set_ylabel("beta", fontsize=8)
    figure.supxlabel("training (%)", fontsize=8)
    return figure


def gradient_ways(table: pd.DataFrame) -> Figure:
    """Draw how far each level is from the noise loss, and how alike its gradients of several batches are.

    Parameters
    ----------
    table : columns level, shortest way, longest way (blocks), and "agreement, LOSS" (cosine) of several losses
    """
    figure, (ways, alike) = plt.subplots(1, 2, figsize=(WIDE, 2.5))
    x = np.arange(len(table))
    ways.vlines(x, table["shortest way"], table["longest way"], color="0.8", lw=5)
    ways.plot(x, table["longest way"], "s", ms=6, color="0.6", label="longest way")
    ways.plot(x, table["shortest way"], "o", ms=4, color="0.3", label="shortest way")
    ways.set(ylabel="blocks up to the noise loss")
    columns = [column for column in table if column.startswith("agreement, ")]
    for aside, column, colour, marker in zip((-0.2, 0, 0.2), columns, ("0.45", PALETTE[0], COLOURS["DiffNAS"]), "osD"):
        alike.plot(x + aside, table[column], marker, ms=4, color=colour, label=column.removeprefix("agreement, "))
    alike.set_ylabel("agreement of batches (cosine)", fontsize=8)
    for axes in (ways, alike):
        axes.set_xticks(x, table["level"], fontsize=7)
        axes.legend(fontsize=6, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1)
    return figure


def held_out(history: pd.DataFrame) -> Figure:
    """Draw the held-out loss over the way through a training: the mean of the trainings, and all between them.

    A dot stands where the loss was taken.

    Parameters
    ----------
    history : columns name, training, way, loss
    """
    figure, axes = plt.subplots(figsize=(WIDE, 2.6))
    names = list(dict.fromkeys(history["name"]))
    for name, colour in zip(names, sns.color_palette("colorblind", len(names))):
        rows = history[history["name"] == name].groupby("way")["loss"]
        axes.fill_between(100 * rows.min().index, rows.min(), rows.max(), color=colour, alpha=0.2, lw=0)
        axes.plot(100 * rows.mean().index, rows.mean(), marker=".", ms=4, color=colour, lw=1.2, label=name)
    axes.set(xlabel="training (%)", ylabel="held-out loss (MSE of epsilon)", yscale="log")
    plain_logarithm(axes.yaxis)
    low, high = axes.get_ylim()
    if 1.6 * low < high < 8 * low:
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
