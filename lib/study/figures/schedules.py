"""Figures of the schedule search (notebook 04)."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.study.figures import COLOURS, CONTROLS, OTHER, PALETTE, REUSE_LOOKS, WIDE, plain_logarithm


def search_progress(found: pd.DataFrame, budgets: Sequence[float], title: str) -> Figure:
    """Draw all plans of one search by cost and error, and the best error so far under each budget.

    A dotted line stands behind the last of the schedules that the search began with.

    Parameters
    ----------
    found : columns trial, macs_fraction, error, partial_steps, start (bool), in the order of evaluation
    budgets : fractions of the teacher's MACs
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.8))
    figure.suptitle(title, fontsize=9)
    kinds = {"no partial steps": found["partial_steps"] == 0, "with partial steps": found["partial_steps"] > 0}
    for (name, rows), colour in zip(kinds.items(), ("0.3", COLOURS["Flexiffusion"])):
        left.scatter(100 * found["macs_fraction"][rows], found["error"][rows], s=10, color=colour, label=name)
    begun = found[found["start"]]
    left.scatter(100 * begun["macs_fraction"], begun["error"], s=40, fc="none", ec="0.5", lw=0.6, label="known before")
    for number, budget in enumerate(budgets):
        left.axvline(100 * budget, color="0.7", lw=0.8, ls="--", zorder=0, label=None if number else "budget")
    left.set(xlabel="executed MACs (% of the teacher's)", ylabel="rFID", yscale="log")
    left.legend(fontsize=6, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), columnspacing=1, handletextpad=0.2)
    for budget, tone in zip(budgets, np.linspace(0, 0.6, len(budgets))):
        best = found["error"].where(found["macs_fraction"] <= budget).cummin()
        right.step(found["trial"], best.ffill(), where="post", color=str(tone), label=f"\u2264 {100 * budget:.3g}%")
    right.axvline(begun["trial"].max() + 0.5, color="0.5", lw=0.8, ls=":", label="left of it: known before")
    right.set(xlabel="candidates tried", ylabel="best rFID so far within\na budget of MACs", yscale="log")
    right.legend(fontsize=6, ncols=len(budgets) + 1, loc="lower right", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        plain_logarithm(axes.yaxis)
    return figure


def searches(found: pd.DataFrame, budget: float) -> Figure:
    """Draw each search's best error so far within a budget, a panel for each teacher that searches imitate.

    Parameters
    ----------
    found : columns as in `search_progress`, search and target
    """
    targets = list(dict.fromkeys(found["target"]))
    figure, panels = plt.subplots(1, len(targets), figsize=(WIDE, 3.4), squeeze=False)
    for axes, target in zip(panels[0], targets):
        lines = {own: cycle(("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))) for own in (True, False)}
        for name, rows in found[found["target"] == target].groupby("search", sort=False):
            best = rows["error"].where(rows["macs_fraction"] <= budget).cummin().ffill()
            own = name.partition(",")[0] in COLOURS
            axes.step(rows["trial"], best, where="post", label=name, ls=next(lines[own]), lw=1.6 if own else 1,
                      color=COLOURS[name.partition(",")[0]] if own else CONTROLS.get(name, OTHER)[0])
        axes.set(xlabel="candidates tried", ylabel=f"best rFID within {100 * budget:.3g}%", yscale="log")
        axes.set_title(f"imitating {target}", fontsize=8)
        plain_logarithm(axes.yaxis)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3 if len(targets) == 1 else 2)
    return figure


def learning(history: pd.DataFrame) -> Figure:
    """Draw the losses of learned steps, a panel for each number of steps.

    Parameters
    ----------
    history : columns name, steps, step (updates done), loss
    """
    counts = sorted(history["steps"].unique())
    figure, panels = plt.subplots(1, len(counts), figsize=(WIDE, 2.4), sharey=True, squeeze=False)
    for axes, count in zip(panels[0], counts):
        for name, rows in history[history["steps"] == count].groupby("name", sort=False):
            axes.plot(rows["step"], rows["loss"], lw=1, label=name, color=CONTROLS.get(name, OTHER)[0])
        axes.set(xlabel="updates", yscale="log")
        axes.set_title(f"{count} steps", fontsize=8)
        plain_logarithm(axes.yaxis)
    panels[0, 0].set(ylabel="mean distance to the\nbest teacher's features")
    panels[0, -1].legend(fontsize=7)
    return figure


def rank_agreement(agreement: pd.DataFrame, many: int) -> Figure:
    """Draw Kendall's tau with the final score against the images behind the cheap measure, one panel a space.

    Kinds stand a little beside each other, so that equal ones are seen; "score" is named "raw", which it is.

    Parameters
    ----------
    agreement : columns space, kind, images, tau, tau_low, tau_high, plans
    many : images behind the final score; a line marks a tenth of them
    """
    spaces = list(dict.fromkeys(agreement["space"]))
    figure, panels = plt.subplots(1, len(spaces), figsize=(WIDE, 2.6), sharey=True, squeeze=False)
    for axes, space in zip(panels[0], spaces):
        rows = agreement[agreement["space"] == space]
        looks = zip(cycle(("-", "--", "-.", ":")), (*PALETTE[:3], "0.5"), (0.955, 0.985, 1.015, 1.045))
        for (kind, line), (dash, colour, aside) in zip(rows.groupby("kind", sort=False), looks):
            images = aside * line["images"]
            axes.plot(images, line["tau"], marker="o", ms=3, lw=1.2, ls=dash, color=colour,
                      label="raw" if kind == "score" else kind)
            axes.fill_between(images, line["tau_low"], line["tau_high"], color=colour, alpha=0.12, lw=0)
        axes.axvline(many / 10, color="0.7", lw=0.8, ls="--")
        axes.axhline(0.7, color="0.85", lw=0.8, ls="--")
        axes.set(xscale="log", xlabel="images", title=f"{space}, {rows['plans'].iloc[0]} candidates")
        plain_logarithm(axes.xaxis)
    panels[0, 0].set(ylabel="Kendall's tau")
    figure.legend(*panels[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def dividends(table: pd.DataFrame) -> Figure:
    """Draw what a partial step after each full one is worth at equal executed MACs: below 1 it pays.

    A line is a branch, numbered above its most expensive point; colours and markers say what is reused.

    Parameters
    ----------
    table : columns order, branch, reuse (of `REUSE_LOOKS`), calls, ratio (of scores) and nearness (of distances to the
        best teacher's images), both with _low and _high. Where a score is at the floor, nearness is drawn
    """
    value = "nearness" if table["ratio"].isna().any() else "ratio"
    solvers = {1: "DDIM (order 1)", 2: "DPM-Solver++ (order 2)"}
    figure, panels = plt.subplots(1, len(solvers), figsize=(WIDE, 3.8), sharey=True)
    for axes, (order, rows) in zip(panels, table.groupby("order")):
        for style, (branch, part) in zip(cycle(("-", "--", ":", "-.")), rows.groupby("branch")):
            for reuse, line in part.groupby("reuse", sort=False):
                (colour, marker), named = REUSE_LOOKS[reuse], reuse not in axes.get_legend_handles_labels()[1]
                bars = [line[value] - line[f"{value}_low"], line[f"{value}_high"] - line[value]]
                axes.errorbar(line["calls"], line[value], bars, marker=marker, ms=4, lw=1, ls=style, elinewidth=0.8,
                              capsize=2, color=colour, label=reuse if named else None)
            axes.annotate(str(branch), (part["calls"].max(), 1), xycoords=("data", "axes fraction"), fontsize=6,
                          color="0.4", ha="center", va="bottom")
        axes.text(0, 1, "branch: ", transform=axes.transAxes, fontsize=6, color="0.4", ha="right", va="bottom")
        axes.axhline(1, color="0.5", lw=0.8)
        axes.set(xscale="log", yscale="log", xlabel="executed MACs (in full steps)")
        axes.set_title(solvers[order], pad=14)
        plain_logarithm(axes.xaxis)
        plain_logarithm(axes.yaxis)
    what = {"ratio": "score", "nearness": "distance to the best teacher's images"}[value]
    panels[0].set(ylabel=f"{what},\nwith partial steps / more full steps")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
