"""Drawings that explain: a schedule and its genome, a cached step, a forecast, a block of the supernet."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from lib.grid.blocks import STEM, Blocks
from lib.grid.plan import COMPUTE, HOLD, LINE, PARABOLA, Plan
from lib.study.figures import COLOURS, NARROW, STATES, WIDE, plan_map


def segments(plan: Plan, count: int, genes: Sequence[str]) -> Figure:
    """Draw a schedule of segments, and below each the genes that made it.

    Parameters
    ----------
    plan : Plan, whose grid is the teacher's steps
    count : int, S segments of equal length, the last one shorter where S does not divide T
    genes : (S,), what to write below each segment
    """
    figure = plan_map(plan)
    axes, length = figure.axes[0], -(-len(plan.grid) // count)
    for slot, gene in enumerate(genes):
        begin, end = slot * length, min((slot + 1) * length, len(plan.grid))
        axes.axvline(begin - 0.5, color="black", lw=1.2)
        axes.annotate(gene, ((begin + end - 1) / 2, -0.34), xycoords=("data", "axes fraction"), ha="center", va="top",
                      fontsize=7, annotation_clip=False)
    axes.axvline(len(plan.grid) - 0.5, color="black", lw=1.2)
    figure.set_figheight(figure.get_figheight() + 0.5)
    return figure


def wiring(blocks: Blocks, states: np.ndarray | None = None, columns: int = 3) -> Figure:
    """Draw some columns of the grid: what each block reads there, and its backup, the same block one step before.

    Parameters
    ----------
    blocks : Blocks
    states : (columns, blocks), int, of `STATES`: colours the cells, and keeps the backups that a computing cell reads,
        as a cache's. None leaves all white, with all backups, as in DiP-GO's SuperNet
    columns : int, drawn where there are no states
    """
    columns = columns if states is None else len(states)
    figure, axes = plt.subplots(figsize=(WIDE, 0.24 * len(blocks) + 0.7))
    read, backup = {"color": "0.55", "lw": 0.8}, {"color": STATES[HOLD][1], "lw": 1.2, "ls": "--"}

    def arrow(start: tuple, end: tuple, bend: float, look: dict) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=6, shrinkA=5, shrinkB=5,
                                       connectionstyle=f"arc3,rad={bend}", **look))

    read_by = [{name for block, state in zip(blocks, column) if state == COMPUTE for name in block.reads}
               for column in ([] if states is None else states)]
    for step in range(columns):
        for place, block in enumerate(blocks):
            computes = states is None or states[step, place] == COMPUTE
            colour = "white" if states is None else STATES[states[step, place]][1]
            axes.plot(step, place, "o", ms=7, color=colour, mec="0.3", zorder=3)
            for name in block.reads if computes else ():
                if name != STEM:
                    reach = place - blocks.index[name]
                    arrow((step, blocks.index[name]), (step, place), 0 if reach == 1 else -0.35 + 0.012 * reach, read)
            if step and (states is None or (not computes and block.name in read_by[step])):
                arrow((step - 1, place), (step, place), 0, backup)
    axes.set_yticks(range(len(blocks)), blocks.names, fontsize=7)
    axes.set_xticks(range(columns), [f"step {step}" for step in range(columns)])
    axes.set_xlim(-0.35, columns - 0.75)
    axes.tick_params(length=0)
    labels = ["reads", "backup" if states is None else "held output (cache)"]
    axes.legend([plt.Line2D([], [], **read), plt.Line2D([], [], **backup)], labels, fontsize=7, ncols=2,
                loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def forecast(places: Sequence[float], values: Sequence[float], computed: Sequence[int]) -> Figure:
    """Draw one number of a block's output over the steps, and what each way to reuse it makes of the computed ones.

    Parameters
    ----------
    places : (T,), float, rising: where the steps lie
    values : (T,), float, the true numbers
    computed : steps at which the block computes, rising; three at least
    """
    figure, axes = plt.subplots(figsize=(NARROW + 1, 2.4))
    axes.plot(places, values, color="0.75", lw=2, label="true")
    known = list(computed)
    axes.plot([places[i] for i in known], [values[i] for i in known], "o", color=STATES[COMPUTE][1], ms=5,
              label="computes")
    for state in (HOLD, LINE, PARABOLA):
        degree = {HOLD: 0, LINE: 1, PARABOLA: 2}[state]
        for after, until in zip(known, [*known[1:], len(places)]):
            kept = known[:known.index(after) + 1][-degree - 1:]  # with fewer outputs, the order that they allow
            curve = np.polyfit([places[i] for i in kept], [values[i] for i in kept], len(kept) - 1)
            stretch = range(after, until)
            axes.plot([places[i] for i in stretch], np.polyval(curve, [places[i] for i in stretch]), ".-", ms=4, lw=1,
                      color=STATES[state][1], label=STATES[state][0] if after == known[0] else None)
    axes.set(xlabel="step (noise to image)", ylabel="one number of the output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=6.5, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=0.8, handlelength=1.2)
    return figure


def elastic_block(kernels: Sequence[int], widths: Sequence[int], chosen: tuple[int, int, int]) -> Figure:
    """Draw a residual block of the supernet: all forms of its two convolutions, and one that is chosen.

    Parameters
    ----------
    kernels : odd, rising
    widths : channels between the convolutions, rising
    chosen : (first kernel, second kernel, channels)
    """
    figure, axes = plt.subplots(figsize=(WIDE, 2.3))
    on, off = COLOURS["DiffNAS"], "0.9"
    for x, title, kernel in ((1.2, "kernel of $W_1$", chosen[0]), (6.6, "kernel of $W_2$", chosen[1])):
        axes.text(x + 0.6, 3.45, title, ha="center", fontsize=8)
        for i, size in enumerate(kernels):
            axes.add_patch(Rectangle((x, 0.3 + i), 1.2, 0.8, fc=on if size == kernel else off, ec="0.5"))
            axes.text(x + 0.6, 0.7 + i, f"{size} x {size}", ha="center", va="center", fontsize=8)
    axes.text(4.5, 3.45, "width (channels)", ha="center", fontsize=8)
    for width in reversed(widths):  # the widest first, so that the nested ones lie on it
        high = 2.8 * width / max(widths)
        axes.add_patch(Rectangle((4.1, 0.3), 0.8, high, fc=on if width <= chosen[2] else off, ec="0.5"))
        axes.text(5.0, 0.3 + high, f"{width}", va="top", fontsize=7)
    for start, end in ((0.2, 1.1), (2.5, 4.0), (5.5, 6.5), (7.9, 9.0)):
        axes.annotate("", (end, 1.7), (start, 1.7), arrowprops={"arrowstyle": "-|>", "color": "0.4"})
    axes.plot([0.05, 0.05, 9.2, 9.2], [1.45, 0, 0, 1.45], color="0.6", ls=":", lw=1)
    axes.text(9.2, 1.7, "+", ha="center", va="center", fontsize=12)
    axes.text(3.25, 1.85, "$+ e(t)$", ha="center", fontsize=8)
    axes.text(0.1, 1.7, "$h$", ha="right", va="center")
    axes.set(xlim=(-0.2, 9.6), ylim=(-0.2, 3.8))
    axes.axis("off")
    return figure
