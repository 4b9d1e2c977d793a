"""Every figure, in one style, from numbers that are already there; each PNG has its numbers as CSV beside it."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lib.grid.plan import COMPUTE, DROP, GIVEN, HOLD, LINE, PARABOLA, Plan
from lib.judging import estimates

NARROW, WIDE = 3.3, 6.9  # inches

PALETTE = sns.color_palette("colorblind")
COLOURS = {"teacher": "0.3", "Flexiffusion": PALETTE[0], "DiP-GO": PALETTE[1], "DiffNAS": PALETTE[2],
           "student": PALETTE[4], "forecast": PALETTE[5]}
"""One colour a method in every figure; controls are grey."""
METHODS = ("Flexiffusion", "DiP-GO", "DiffNAS", "student", "forecast")
"""What the names of the methods' plans, and of our extensions, begin with, in the order of the front's panels."""
VARIANTS = "*PXdhp"
"""Markers of a method's variants, in the order in which they come; their names begin with the method's and a comma."""
CONTROLS = {"DDIM, uniform": ("0.45", "o", "-"), "DDIM, quadratic": ("0.6", "s", ":"),
            "DPM-Solver++, uniform": ("0.0", "D", "-"), "DPM-Solver++, quadratic": ("0.25", "P", ":"),
            "DeepCache, branch 0": ("0.4", "^", "--"), "DeepCache, branch 1": ("0.7", "v", "--"),
            "random cells": ("0.75", "x", ":"), "searched steps, DDIM": ("0.45", "<", ""),
            "searched steps": ("0.0", ">", ""), "random search": ("0.7", "1", ""),
            "random search, extended": ("0.7", "2", ""), "mutation alone": ("0.6", "+", ""),
            "learned steps": ("0.0", "*", ""), "learned coefficients": ("0.45", "X", ""),
            "shortest path": ("0.3", "d", ""), "genetic search": ("0.55", "3", ""),
            "genetic search, columns": ("0.35", "4", ""), "columns (one gate a step)": ("0.25", "|", ""),
            "annealed columns (one gate a step)": ("0.5", "_", ""), "thin": ("0.5", "p", ""),
            "random": ("0.7", "x", ""), "global, raw": ("0.4", "2", ""), "global, relative": ("0.6", "1", ""),
            "torch-pruning": ("0.3", "H", ""),
            "first-block caching": ("0.35", "^", "--"), "cache-dit": ("0.6", "v", ":"),
            "cache-dit, line": ("0.6", "<", ":"), "TaylorSeer": ("0.2", "X", ":"), "DeepCache": ("0.55", "^", "")}
OTHER = ("0.6", "v", "--")
"""Grey, marker and line of each control, and of one that has none of its own."""
STUDENT = " (student)"
"""What the names of controls on DiffNAS's student end with; they look like those on the teacher."""
EVEN = ("DDIM, uniform", "DPM-Solver++, uniform")
"""What every panel of the front is read against."""
SCORES = "score (some at the floor;\nlinear below the dotted line)"
"""The label of an axis of `scores` that reaches 0."""
MARKS = 6
"""Most families of a panel of the front, besides `EVEN`."""
KINDS = {"null": "white", "partial": sns.color_palette("pastel")[0], "full": PALETTE[0]}


STATES = {HOLD: ("holds", PALETTE[9]), COMPUTE: ("computes", KINDS["full"]), LINE: ("line", PALETTE[5]),
          PARABOLA: ("parabola", PALETTE[3])}
"""What a cell's states, in their order, are called in figures, and their colours, everywhere."""
REUSE_LOOKS = {"hold": (STATES[HOLD][1], "^"), "line": (STATES[LINE][1], "o"), "parabola": (STATES[PARABOLA][1], "s"),
          "by error": (PALETTE[2], "P")}
"""Colour and marker of whole plans whose cells reuse in one way."""


def style() -> None:
    """Set the one style; call it once a notebook."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind",
                  rc={"figure.dpi": 110, "savefig.dpi": 200, "savefig.bbox": "tight", "axes.spines.top": False,
                      "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True})


def save(figure: Figure, numbers: pd.DataFrame, folder: Path, name: str) -> None:
    """Write ``<name>.png`` and ``<name>.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    numbers.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")


def grid(images: np.ndarray, rows: Sequence[str], columns: Sequence[str] = (), cell: float = 0.42) -> Figure:
    """Show images row by row.

    Parameters
    ----------
    images : (rows, columns, C, H, W), float, in [-1, 1]
    rows, columns : labels
    cell : inches a side
    """
    count, wide, channels, height, width = images.shape
    canvas = np.ones((count, wide, height + 1, width + 1, channels))  # a white line between images
    canvas[:, :, :height, :width] = np.clip((images + 1) / 2, 0, 1).transpose(0, 1, 3, 4, 2)
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(count * (height + 1), wide * (width + 1), channels)
    left = 0.075 * max(len(row) for row in rows)
    figure, axes = plt.subplots(figsize=(wide * cell + left, count * cell + 0.2 * bool(columns)))
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_yticks((np.arange(count) + 0.5) * (height + 1) - 1, rows, fontsize=7)
    axes.set_xticks((np.arange(wide) + 0.5) * (width + 1) - 1 if columns else [], columns, fontsize=7)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    sns.despine(ax=axes, left=True, bottom=True)
    return figure


def by_label(images: np.ndarray, labels: np.ndarray, columns: int = 12) -> Figure:
    """Show the first images of each of the labels 0 to 9, a row a label; a row that lacks some repeats its first.

    Parameters
    ----------
    images : (n, C, H, W), float, in [-1, 1]
    labels : (n,), int, what each was asked to show; a label of no image has no row
    columns : images a row

    Raises
    ------
    ValueError
        If no image has such a label.
    """
    rows = {}
    for label in range(10):
        places = np.flatnonzero(labels == label)[:columns]
        if len(places):
            rows[str(label)] = images[np.pad(places, (0, columns - len(places)), constant_values=places[0])]
    return grid(np.stack(list(rows.values())), list(rows))


def strip(images: np.ndarray) -> np.ndarray:
    """Give images (n, C, H, W), float, in [-1, 1], side by side as pixels, (H, n W, 3), in [0, 1]."""
    count, channels, height, width = images.shape
    pixels = np.clip((images + 1) / 2, 0, 1).transpose(2, 0, 3, 1).reshape(height, count * width, channels)
    return np.broadcast_to(pixels, (height, count * width, 3))


def plain_logarithm(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, more of them where it spans little."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())
    if high < 1.6 * low:
        axis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
        return
    spans = {200: (1,), 50: (1, 3), 8: (1, 2, 5), 3: (1, 1.5, 2, 3, 5, 7), 0: (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)}
    axis.set_major_locator(LogLocator(10, subs=next(subs for span, subs in spans.items() if high > span * low)))


def scores(axis: Axis, rescale: Callable[..., None], table: pd.DataFrame, name: str) -> None:
    """Make an axis logarithmic for a column of scores or ratios; linear about 0, where intervals reach below it.

    A dotted line stands where it begins to be logarithmic.
    """
    if (table[f"{name}_low"] > 0).all():
        rescale("log")
        plain_logarithm(axis)
        return
    linear = max(table[f"{name}_high"].min(), 0.01)
    rescale("symlog", linthresh=linear)
    low, high = axis.get_view_interval()
    places = [digit * 10.0**power for power in range(-2, 5) for digit in ((1, 2, 5) if high < 100 * linear else (1,))]
    axis.set_major_locator(FixedLocator([0, *(place for place in places if linear <= place <= high),
                                         *(-place for place in places if linear <= place <= -low)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    upright = axis is axis.axes.yaxis
    shared = axis.axes.get_shared_y_axes() if upright else axis.axes.get_shared_x_axes()
    for axes in shared.get_siblings(axis.axes):
        (axes.axhline if upright else axes.axvline)(linear, color="0.8", lw=0.8, ls=":", zorder=0)


def at_floor(axes: Axes, place: float, word: str, difference: str) -> None:
    """Write in place of a ratio, where a score is at the floor, what its difference says: on the side of its word."""
    x, side = {"better": (0.02, "left"), "worse": (0.98, "right")}.get(word, (0.5, "center"))
    axes.annotate(f"no ratio (a score is at the floor): {word}, difference {difference}", (x, place),
                  xycoords=("axes fraction", "data"), ha=side, va="center", fontsize=6,
                  bbox={"fc": "w", "ec": "none", "pad": 1})  # no line of the axes through the words


def training_curve(history: pd.DataFrame, label: str = "loss (MSE of epsilon)") -> Figure:
    """Draw the loss over training steps (columns step, loss)."""
    figure, axes = plt.subplots(figsize=(NARROW, 2.2))
    axes.plot(history["step"], history["loss"], color="black", lw=1)
    axes.set(xlabel="training step", ylabel=label, yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    return figure


def macs_and_seconds(table: pd.DataFrame) -> Figure:
    """Draw each block's share of MACs beside its share of the measured time (columns block, macs, seconds)."""
    shares = table.assign(MACs=table["macs"] / table["macs"].sum(), time=table["seconds"] / table["seconds"].sum())
    figure, axes = plt.subplots(figsize=(WIDE, 2.6))
    x = np.arange(len(shares))
    for shift, name, label, colour in ((-0.2, "MACs", "MACs", PALETTE[0]), (0.2, "time", "measured time", "0.7")):
        bars = axes.bar(x + shift, 100 * shares[name], 0.4, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=6, rotation=90, padding=2)
    axes.set_xticks(x, shares["block"], rotation=45, ha="right")
    axes.set(ylabel="share of a network call (%)")
    axes.margins(y=0.2)  # room for the numbers
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def heat_map(values: np.ndarray, blocks: Sequence[str], steps: Sequence[int], label: str) -> Figure:
    """Draw one value a cell, blocks up, steps across, colours by their logarithm.

    Parameters
    ----------
    values : (steps, blocks); NaN stays blank
    label : of the colour bar, with the unit
    """
    figure, axes = plt.subplots(figsize=(WIDE, 0.17 * len(blocks) + 0.8))
    drawn = np.ma.masked_invalid(values.T)
    positive = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(positive.min(), positive.max())
    mesh = axes.pcolormesh(np.arange(len(steps) + 1), np.arange(len(blocks) + 1), drawn, cmap="viridis", norm=norm)
    every = max(1, len(steps) // 12)
    axes.set_xticks(np.arange(0, len(steps), every) + 0.5, [str(step) for step in steps[::every]])
    axes.set_yticks(np.arange(len(blocks)) + 0.5, blocks, fontsize=7)
    axes.set(xlabel="step (noise to image)", ylabel="block")
    figure.colorbar(mesh, ax=axes, label=label, pad=0.01)
    return figure


def forecast_errors(errors: pd.DataFrame, blocks: Sequence[str]) -> Figure:
    """Draw how far held and forecast outputs of some blocks lie from the true ones, over the steps.

    Parameters
    ----------
    errors : columns step, block, hold, line, parabola, as `lib.judging.analysis.forecast_errors` gives them
    """
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDE, 2.4), sharey=True, squeeze=False)
    for axes, block in zip(panels[0], blocks):
        rows = errors[errors["block"] == block]
        for state, name in ((HOLD, "hold"), (LINE, "line"), (PARABOLA, "parabola")):
            axes.plot(rows["step"], 100 * rows[name], color=STATES[state][1], marker=".",
                      lw=0.8, ms=4, label=name)
        axes.set(xlabel="step (noise to image)", title=block, yscale="log")
        plain_logarithm(axes.yaxis)
    panels[0, 0].set(ylabel="error (% of the output's norm)")
    panels[0, -1].legend(fontsize=7)
    return figure


def forecasts(table: pd.DataFrame, ylabel: str) -> Figure:
    """Draw what holding and forecasting are worth at equal executed MACs, a panel a solver, with 95 % intervals.

    Parameters
    ----------
    table : columns family (of `REUSE_LOOKS`, or a control's), order, macs_percent, ratio and score, both with _low and
        _high. Where a row has no ratio (it or the reference is at the floor), scores are drawn
    """
    value = "score" if table["ratio"].isna().any() else "ratio"
    orders = sorted(table["order"].unique(), reverse=True)
    figure, panels = plt.subplots(1, len(orders), figsize=(WIDE, 3), sharey=True, squeeze=False)
    looks = REUSE_LOOKS | {"evenly spaced": ("0.0", "D"), "searched steps": ("0.3", ">"), "shortest path": ("0.5", "d")}
    labels = {"evenly spaced": "evenly spaced (the panel's solver)", "searched steps": "searched steps (DPM-Solver++)",
              "shortest path": "shortest path (the better solver)"}
    for axes, order in zip(panels[0], orders):
        for family, rows in table[table["order"] == order].groupby("family", sort=False):
            rows, (colour, marker) = rows.sort_values("macs_percent"), looks[family]
            bars = [rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]]
            line = "--" if family in labels else "-"
            axes.errorbar(rows["macs_percent"], rows[value], bars, color=colour, marker=marker, ls=line, ms=4, lw=1,
                          elinewidth=0.8, capsize=2, label=labels.get(family, family))
        if value == "ratio":
            axes.axhline(1, color="0.8", lw=0.8, zorder=0)
        axes.set(xscale="log", xlabel="executed MACs (% of the best teacher's)",
                 title={1: "DDIM (order 1)", 2: "DPM-Solver++ (order 2)"}[order])
        plain_logarithm(axes.xaxis)
        scores(axes.yaxis, axes.set_yscale, table, value)
    panels[0, 0].set(ylabel=ylabel if value == "ratio" else SCORES)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=4)
    return figure


def caching(table: pd.DataFrame) -> Figure:
    """Draw over all teachers where partial steps pay, against what might foretell it.

    Parameters
    ----------
    table : columns teacher, order, reuse, share, alike and nearness (below 1 they pay; NaN rows are left out), as
        `lib.judging.analysis.dividends` gives them
    """
    table = table.dropna(subset="nearness").assign(change=lambda rows: 1 - rows["alike"])
    figure, panels = plt.subplots(1, 2, figsize=(WIDE, 3.4), sharey=True)
    labels = {"share": "a partial step's share of a full step's MACs", "change": "1 - likeness of what is reused"}
    markers = dict(zip(table["teacher"].unique(), cycle("osD^v<>PX*")))
    for axes, (column, label) in zip(panels, labels.items()):
        for (teacher, reuse, order), rows in table.groupby(["teacher", "reuse", "order"], sort=False):
            colour = REUSE_LOOKS[reuse][0]
            axes.plot(rows[column], rows["nearness"], markers[teacher], color=colour, ms=4, ls="",
                      mfc="none" if order == 1 else colour)
        ranks = table[[column, "nearness"]].corr("spearman").iloc[0, 1]
        axes.axhline(1, color="0.5", lw=0.8)
        axes.set(xlabel=label, yscale="log", title=f"rank correlation {ranks:.2f}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        plain_logarithm(axes.yaxis)
    panels[0].set(ylabel="distance to the best teacher's images,\nwith partial steps / more full steps\n"
                         "(open: DDIM, filled: DPM-Solver++)")
    keys = [plt.Line2D([], [], marker=marker, color="0.3", ls="", ms=4, label=name) for name, marker in markers.items()]
    keys += [plt.Rectangle((0, 0), 1, 1, fc=REUSE_LOOKS[name][0], label=name) for name in table["reuse"].unique()]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def plan_map(plan: Plan, name: str = GIVEN) -> Figure:
    """Draw a pass of a plan on the teacher's steps: what computes, holds, forecasts; white is left out.

    Cells that nobody reads, computing ones among them, are drawn as held: they do not run.
    """
    life = plan.life[plan.pass_of(name)]
    drawn = np.full((len(plan.grid), len(plan.blocks)), np.nan)
    for row, net, column in zip(life.settled, life.net, _columns(plan)):
        drawn[column] = np.nan if net == DROP else row
    figure, axes = plt.subplots(figsize=(WIDE, 0.17 * len(plan.blocks) + 0.7))
    shown = [state for state in STATES if state in (HOLD, COMPUTE) or (life.settled == state).any()]
    colours = ListedColormap([colour for _, colour in STATES.values()])
    axes.pcolormesh(*edges(drawn.T), drawn.T, cmap=colours, vmin=0, vmax=len(STATES) - 1, edgecolors="0.85",
                    linewidth=0.3)
    axes.set_yticks(np.arange(len(plan.blocks)) + 0.5, plan.blocks, fontsize=7)
    axes.set(xlabel="step (noise to image)", ylabel="block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = {"left out": "white"} if np.isnan(drawn).any() else {}
    legend |= {STATES[state][0]: STATES[state][1] for state in shown}
    axes.legend([plt.Rectangle((0, 0), 1, 1, fc=c, ec="0.6") for c in legend.values()], list(legend),
                ncols=len(legend), loc="lower right", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def step_kinds(plans: Mapping[str, Plan]) -> Figure:
    """Draw one strip a plan: full, partial and null steps over the teacher's steps, others at the nearest of these."""
    figure, axes = plt.subplots(figsize=(WIDE, 0.26 * len(plans) + 0.75))
    colours = list(KINDS)
    steps = len(next(iter(plans.values())).grid)
    strips = np.zeros((len(plans), steps))
    for i, plan in enumerate(plans.values()):
        for row, column in zip(plan.computes, _columns(plan)):
            strips[i, column] = 2 if row.all() else 1 if row.any() else 0
    axes.pcolormesh(*edges(strips), strips, cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=2, edgecolors="0.8",
                    linewidth=0.4)
    axes.set_yticks(np.arange(len(plans)) + 0.5, list(plans), fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="the teacher's step (noise to image; others at the nearest)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend([plt.Rectangle((0, 0), 1, 1, fc=KINDS[kind], ec="0.6") for kind in colours],
                [f"{kind} step" for kind in colours], ncols=3, loc="lower right", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def edges(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the edges of a map's cells, steps across: step k is centred on k."""
    return np.arange(cells.shape[1] + 1) - 0.5, np.arange(cells.shape[0] + 1)


def _columns(plan: Plan) -> list[int]:
    """Give for each of a plan's timesteps the nearest of the teacher's steps."""
    return [int(np.abs(np.array(plan.grid) - t).argmin()) for t in plan.timesteps]


def front(table: pd.DataFrame, links: Mapping[str, str] = MappingProxyType({})) -> Figure:
    """Draw quality against cost with 95 % intervals, a panel for each few families, and a line at 5 % worse.

    Even steps of both solvers (`EVEN`) run through all panels. Other marks of equal cost are drawn side by side.

    Parameters
    ----------
    table : columns name, kind, macs_ratio, honest_factor, ratio and score, both with _low and _high; rows of one
        family share `family`. Where a row has no ratio (it or the reference is at the floor), scores are drawn
    links : dict of a row's name to where a click on it leads, in an SVG
    """
    value = "score" if table["ratio"].isna().any() else "ratio"
    table = table.reset_index(drop=True)
    families = list(dict.fromkeys(table["family"]))
    variants = [family for family in families if family.partition(",")[0] in COLOURS]
    groups = _panels([family for family in families if family not in EVEN])
    across = min(3, len(groups))
    down, most = -(-len(groups) // across), max(map(len, groups))
    figure, panels = plt.subplots(down, across, figsize=(WIDE, down * (2.0 + 0.13 * most) + 0.9), sharex=True,
                                  sharey=True, squeeze=False)
    even = table["macs_ratio"][table["family"].isin(EVEN)]
    for axes, group in zip(panels.flat, groups):
        places = pd.concat([even, _apart(table["macs_ratio"][table["family"].isin(group)])])
        for family in [*(family for family in EVEN if family in families), *group]:
            method = family in variants
            rows = table[table["family"] == family].sort_values("macs_ratio")
            control = CONTROLS.get(family.removesuffix(STUDENT), OTHER)
            colour, marker, line = _look(family, variants) if method else control
            bars = [rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]]
            axes.errorbar(places[rows.index], rows[value], bars, color=colour, marker=marker, ls=line,
                          ms=5 if method else 3 if family in EVEN else 4, mfc=None if family in EVEN else "none", lw=1,
                          elinewidth=0.6, capsize=1.5,
                          label=f"_{family}" if family in EVEN else family, zorder=3 if method else 2)
            linked = rows[rows["name"].isin(links)]
            axes.scatter(places[linked.index], linked[value], s=60, alpha=0, zorder=4,
                         urls=[links[name] for name in linked["name"]])
        if value == "ratio":
            axes.axhline(1.05, color="0.8", lw=0.8, ls="--", zorder=0)
        axes.legend(fontsize=6.5, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
        axes.tick_params(labelbottom=True)
    axes.set(xscale="log")
    plain_logarithm(axes.xaxis)
    scores(axes.yaxis, axes.set_yscale, table, value)
    for axes in panels.flat[len(groups):]:
        axes.remove()
    figure.supylabel({"ratio": "score / the best teacher's score (dashed: 5 % worse)",
                      "score": SCORES}[value], fontsize=9)
    figure.supxlabel("times fewer executed MACs than the best teacher (marks of equal cost stand side by side);\n"
                     "lower axis: the honest factor, over the fewest steps that are surely at most 5 % worse",
                     fontsize=9)
    _honest(panels, groups, (table["honest_factor"] / table["macs_ratio"]).median())
    where = " (in all panels)" * (len(groups) > 1)
    keys = [plt.Line2D([], [], color=CONTROLS[family][0], marker=CONTROLS[family][1], ms=3, lw=1, label=family + where)
            for family in EVEN if family in families]
    figure.legend(handles=keys, loc="outside upper center", ncols=2, fontsize=7)
    return figure


def _apart(places: pd.Series) -> pd.Series:
    """Shift places that are equal to 3 % until they stand 5 % apart, so that no mark hides another."""
    ordered = places.sort_values(kind="stable")
    bunches = ordered.groupby((ordered.pct_change() > 0.03).cumsum())
    return ordered * 1.05 ** (bunches.cumcount() - (bunches.transform("size") - 1) / 2)


def _honest(panels: np.ndarray, groups: Sequence, share: float) -> None:
    """Put the second x axis under the lowest panels: the factor over the fewest steps that would have done."""
    across = panels.shape[1]
    for axes in panels.flat[max(0, len(groups) - across):len(groups)]:
        honest = axes.secondary_xaxis(-0.17, functions=(lambda ratio: ratio * share, lambda factor: factor / share))
        honest.tick_params(labelsize=7)
        plain_logarithm(honest.xaxis)


def _panels(families: Sequence[str]) -> list[list[str]]:
    """Share families out to panels of at most `MARKS`: each method's, placed steps of each model, all else."""
    groups: dict[str, list[str]] = {}
    for family in families:
        method = family.partition(",")[0]
        placed = "placed" if re.search("step|coefficients|path|search", family) else "else"
        placed += STUDENT * family.endswith(STUDENT)
        groups.setdefault(method if method in METHODS else placed, []).append(family)
    panels: list[list[str]] = []
    controls = ("placed", "else")  # share no panel with methods
    for names in (METHODS, controls, tuple(name + STUDENT for name in controls)):
        panels.append([])
        for group in (groups.get(name, []) for name in names):
            for few in (group[i:i + MARKS] for i in range(0, len(group), MARKS)):
                if len(panels[-1]) + len(few) > MARKS:
                    panels.append([])
                panels[-1] += few
    return [panel for panel in panels if panel] or [[]]


PLACED = "(searched|learned) (steps|coefficients)(?!, passes)|shortest path"
"""What the names of controls begin with whose full steps a search or a path placed, or a gradient, with or without the
solver's coefficients; not those that leave out null passes, whose steps are not full."""
CURVES = {"DDIM, fewer even steps": ("DDIM, uniform", "0.5", "o", "-"),
          "DPM-Solver++, fewer even steps": ("DPM-Solver\\+\\+, uniform", "0.0", "D", "-"),
          "placed steps: searched, learned, shortest path": (PLACED, PALETTE[2], "*", "-"),
          "Flexiffusion and DiP-GO, as in their papers": ("(Flexiffusion|DiP-GO)$", PALETTE[1], "s", ""),
          "our extensions of these, forecasts": ("(Flexiffusion|DiP-GO),|forecast", PALETTE[4], "P", "")}
"""Curves that tell a study's story: what their families' names match from the beginning, colour, marker, line."""


def curves(table: pd.DataFrame) -> Figure:
    """Draw curves of quality against cost on the teacher: of each kind the best at each cost, to a tenth.

    Parameters
    ----------
    table : as `front` takes it, with ddim_ratio and its interval: over the score of DDIM's full run
    """
    table = table[~table["family"].str.contains("student")]
    value = "score" if table["ddim_ratio"].isna().any() else "ddim_ratio"
    price = (np.log(table["macs_ratio"]) / np.log(1.1)).round().rename("price")
    figure, axes = plt.subplots(figsize=(WIDE, 3.6))
    for label, (pattern, colour, marker, line) in CURVES.items():
        rows = table[table["family"].str.match(pattern)]
        rows = rows.loc[rows.groupby(price)[value].idxmin()].sort_values("macs_ratio")
        bars = [rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]]
        axes.errorbar(rows["macs_ratio"], rows[value], bars, color=colour, marker=marker, ms=6, ls=line, lw=1.2,
                      elinewidth=0.8, capsize=1.5, label=label)
    if value == "ddim_ratio":
        axes.axhline(1, color="0.6", lw=0.8, ls="--", zorder=0)
    ylabel = {"ddim_ratio": "score / that of DDIM's full run\n(less is better)", "score": SCORES}[value]
    axes.set(xscale="log", xlabel="times fewer executed MACs", ylabel=ylabel)
    plain_logarithm(axes.xaxis)
    axes.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 30, 50]))
    scores(axes.yaxis, axes.set_yscale, table, value)
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def board(rows: pd.DataFrame) -> Figure:
    """Draw a leaderboard: the score of every plan against its cost; named are those that nothing cheaper beats.

    Parameters
    ----------
    rows : columns name, macs_ratio, score, score_low, score_high
    """
    figure, axes = plt.subplots(figsize=(WIDE, 3.8))
    rows = rows.sort_values(["macs_ratio", "score"], ascending=[False, True])
    best = rows["score"] < rows["score"].cummin().shift(fill_value=np.inf)
    for part, colour in ((rows[~best], "0.75"), (rows[best], PALETTE[0])):
        bars = [part["score"] - part["score_low"], part["score_high"] - part["score"]]
        axes.errorbar(part["macs_ratio"], part["score"], bars, color=colour, marker="o", ls="", ms=4, elinewidth=0.8)
    for row in rows[best].itertuples():
        axes.annotate(row.name, (row.macs_ratio, row.score), xytext=(4, -7), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", xlabel="times fewer executed MACs", ylabel="score (less is better)")
    plain_logarithm(axes.xaxis)
    scores(axes.yaxis, axes.set_yscale, rows, "score")
    return figure


def _look(family: str, variants: Sequence[str]) -> tuple:
    """Give colour, marker and line of a method's variant."""
    method = family.partition(",")[0]
    alike = [variant for variant in variants if variant.partition(",")[0] == method]
    return COLOURS[method], VARIANTS[alike.index(family) % len(VARIANTS)], ""


def judges(table: pd.DataFrame) -> Figure:
    """Draw what the second judge says over what the first says, one point a plan, with 95 % intervals.

    Parameters
    ----------
    table : columns family, score, second_score, each with _low and _high
    """
    figure, axes = plt.subplots(figsize=(WIDE, 3.6))
    for family, rows in table.groupby("family", sort=False):
        colour, marker, *_ = REUSE_LOOKS.get(family) or CONTROLS.get(family, OTHER)
        bars = [[rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
                for name in ("score", "second_score")]
        axes.errorbar(rows["score"], rows["second_score"], xerr=bars[0], yerr=bars[1], color=colour, marker=marker,
                      ls="", ms=4, elinewidth=0.6, label=family)
    axes.set(xlabel="score, first judge", ylabel="score, second judge")
    for axis, rescale, name in ((axes.xaxis, axes.set_xscale, "score"), (axes.yaxis, axes.set_yscale, "second_score")):
        scores(axis, rescale, table, name)
    axes.legend(fontsize=6, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


WORDS = {"better": (PALETTE[0], "white"), "as good": ("0.85", "black"), "undecided": ("white", "black"),
         "worse": (PALETTE[3], "white")}
"""What an interval says of a plan over its control, and the colours of such a cell and of the ratio in it."""


def beside_controls(table: pd.DataFrame) -> Figure:
    """Draw each plan's score over its controls' at equal executed MACs as a table: a plan a row, a control a column.

    A cell's colour is what the ratio's interval says, its number the ratio; "floor" where there is none (`estimates`).
    The plan's strongest control is framed.
    """
    cells = table.pivot(index="plan", columns="name", values=["plan_over_control", "plan_over_control_word"])
    plans, names = (list(dict.fromkeys(table[column])) for column in ("plan", "name"))
    ratios, words = (cells[column].loc[plans, names] for column in ("plan_over_control", "plan_over_control_word"))
    texts = ratios.map("{:.3g}".format).where(ratios.notna(), "floor")
    figure, axes = plt.subplots(figsize=(WIDE, 0.22 * len(plans) + 1.6))
    sns.heatmap(words.map(list(WORDS).index, na_action="ignore").astype(float), annot=texts, fmt="", cbar=False,
                cmap=ListedColormap([ground for ground, _ in WORDS.values()]), vmin=0, vmax=len(WORDS), ax=axes,
                linewidths=0.5, linecolor="0.8", annot_kws={"fontsize": min(6.5, 90 / len(names))})
    axes.patch.set(hatch="////", edgecolor="0.8")
    for text in axes.texts:
        place = text.get_position()
        text.set_color(WORDS[words.iloc[int(place[1]), int(place[0])]][1])
    for row in table[table["strongest"]].itertuples():
        corner = names.index(row.name), plans.index(row.plan)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=2, zorder=3, clip_on=False))
    axes.set(xlabel="", ylabel="")
    axes.set_xticklabels(names, rotation=35, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticklabels(plans, rotation=0, fontsize=7)
    keys = [Patch(fc=ground, ec="0.8", label=f"plan {word}") for word, (ground, _) in WORDS.items()]
    keys += [Patch(fc="none", ec="0.8", hatch="////", label="not run"),
             Patch(fc="none", ec="black", lw=2, label="strongest control")]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=7, frameon=False)
    return figure


def ratios(table: pd.DataFrame, label: str, mark: float | None = None) -> Figure:
    """Draw ratios of scores with their intervals, one a row, on a logarithmic axis: left of 1 is better.

    Parameters
    ----------
    table : columns name, and those of a `Contrast` named ratio; optionally part (a gap stands between parts), least and
        greatest (of single trainings: a grey band)
    label : of the axis
    mark : a second line, such as 1.05; None for none
    """
    parts = list(dict.fromkeys(table["part"])) if "part" in table else []
    figure, axes = plt.subplots(figsize=(WIDE, 0.22 * len(table) + 0.7))
    places = []
    for row in table.itertuples():
        places.append(len(places) + 0.6 * (parts.index(row.part) if parts else 0))
        if "least" in table:
            axes.plot([row.least, row.greatest], [places[-1]] * 2, color="0.88", lw=5, solid_capstyle="butt")
        if np.isnan(row.ratio):
            at_floor(axes, places[-1], row.ratio_word, estimates.text(row._asdict(), "ratio_difference"))
        colour = COLOURS.get(row.name.partition(",")[0], "0.3")
        axes.errorbar(row.ratio, places[-1], xerr=[[row.ratio - row.ratio_low], [row.ratio_high - row.ratio]], fmt="o",
                      ms=4, capsize=2, elinewidth=1, color=colour)
    axes.axvline(1, color="0.5", lw=0.8, zorder=0)
    if mark is not None:
        axes.axvline(mark, color="0.5", lw=0.8, ls="--", zorder=0)
    axes.set_yticks(places, table["name"], fontsize=7)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set(xlabel=f"\u2190 better      {label}      worse \u2192", xscale="log")
    plain_logarithm(axes.xaxis)
    if table["ratio"].isna().any():  # room for their words on both sides of 1
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.5), max(high, 2))
    if table["ratio"].isna().all():  # words alone
        axes.xaxis.set(major_locator=NullLocator(), minor_locator=NullLocator())
    return figure
