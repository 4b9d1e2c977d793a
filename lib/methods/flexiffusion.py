"""Flexiffusion (arXiv 2409.17566): spaces of schedules made of segments.

The teacher's T steps are cut into S equal segments. Each is one *full* step, then *partial* steps that run only the
blocks above a branch and read the cached deep feature, then *null* steps that the solver jumps over. S, and each
segment's branch and number of active steps, are searched without any training. That is the paper's `SegmentSpace`; the
`FreeSpace` beside it makes the solver's order and the timesteps themselves genes too. In both, as extensions, what a
segment's partial steps do with the deep feature may be a gene: hold it, as in the paper, or forecast it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lib.grid.blocks import Blocks
from lib.grid.plan import COMPUTE, HOLD, FlowSchedule, Plan

LENGTHS = 3.0
"""In the free space a segment is at most so many times longer, or shorter, than the middle of the range."""
POWERS = 2.0
"""In the free space the power that bends the spacing lies between 1 / POWERS and POWERS."""


@dataclass(frozen=True)
class SegmentSpace:
    """The space of segment schedules over a teacher's steps.

    A genome has the number of segments and, for each of S_max slots, a branch and an interval in [0, 1] that is scaled
    to the segment's length: one fixed length and range whatever S is, as NSGA-II needs it. Slots beyond S are kept and
    mean nothing.

    Attributes
    ----------
    teacher : Plan, all cells computing
    blocks : Blocks of the network
    counts : tuple of int, choices of S
    branches : tuple of int, choices of a segment's skip connection
    reuses : tuple of 0 (hold, the paper's), 2 (line) and 3 (parabola), choices of what a segment's partial steps reuse
    """

    teacher: Plan
    blocks: Blocks
    counts: tuple[int, ...]
    branches: tuple[int, ...]
    reuses: tuple[int, ...] = (HOLD,)

    def __post_init__(self):
        for count in self.counts:
            length = -(-self.teacher.steps // count)
            if (count - 1) * length >= self.teacher.steps:
                raise ValueError(f"segment_counts: {count} segments of {length} steps do not fit {self.teacher.steps} "
                                 "steps")
        for branch in self.branches:
            self.blocks.branch(branch)  # raises for a branch that the network has not

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range."""
        genes: dict[str, BaseDistribution] = {"segments": CategoricalDistribution(self.counts)}
        for slot in range(max(self.counts)):
            genes[f"branch_{slot}"] = CategoricalDistribution(self.branches)
            genes[f"interval_{slot}"] = FloatDistribution(0.0, 1.0)
            genes |= _reuse_gene(self.reuses, slot)
        return genes

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""
        count = genome["segments"]
        length = -(-self.teacher.steps // count)
        chosen = []
        for slot in range(count):
            active = min(length, 1 + int(genome[f"interval_{slot}"] * length))
            chosen.append((active, genome[f"branch_{slot}"], genome.get(f"reuse_{slot}", self.reuses[0])))
        return Plan.segments([(active, self.blocks.branch(branch)) for active, branch, _ in chosen], self.teacher,
                             [reuse for *_, reuse in chosen], paper="2409.17566",
                             active_branch_reuse=[list(choice) for choice in chosen])

    def encode(self, count: int, branch: int, active: int, reuse: int = HOLD) -> dict:
        """Give the genome whose segments are all alike: active = length is DeepCache, active = 1 is fewer steps."""
        length = -(-self.teacher.steps // count)
        genome = {"segments": count}
        for slot in range(max(self.counts)):
            genome[f"branch_{slot}"] = branch
            genome[f"interval_{slot}"] = (active - 0.5) / length
            genome |= dict.fromkeys(_reuse_gene(self.reuses, slot), reuse)
        return genome

    def known(self) -> list[dict]:
        """Give the known schedules in the space to start from.

        For each S few steps, and caching in all others by its first branch: DeepCache, or a forecast.
        """
        return [genome for count in self.counts for genome in (
            self.encode(count, self.branches[0], 1, self.reuses[0]),
            *(self.encode(count, self.branches[0], -(-self.teacher.steps // count), reuse) for reuse in self.reuses))]

    def size(self) -> int:
        """Count the schedules that hold.

        The sum over S of the product over segments of (branches x (length - 1) + 1).
        """
        total = 0
        for count in self.counts:
            length = -(-self.teacher.steps // count)
            last = self.teacher.steps - (count - 1) * length
            total += math.prod(len(self.branches) * (steps - 1) + 1 for steps in [length] * (count - 1) + [last])
        return total


@dataclass(frozen=True)
class FreeSpace:
    """The extended space: the solver's order, and where every step falls, are genes too.

    Segment k begins with a full step at the timestep N (1 - u_k)^p - 1. N is the number of training timesteps, u_k the
    sum of the relative lengths of the segments before it, p one power for all; equal lengths and p = 1 are uniform
    (trailing) spacing. (Of flow matching (1 - u_k)^p is what is left of the teacher's own way.) The partial steps of a
    segment follow at equal distances within a part of it, its *reach*. With no partial steps this is the space of
    searched few steps (the control that AutoDiffusion, arXiv 2309.10438, stands for).

    Attributes
    ----------
    teacher : Plan, full; its grid, noise schedule and blocks are taken over
    blocks : Blocks of the network
    counts : tuple of int, rising, choices of the number of segments, so of full steps
    branches : tuple of int, choices of a segment's skip connection
    partials : int, the most partial steps of a segment; 0 for searched few steps
    orders : tuple of int, choices of the solver's order
    reuses : tuple of 0, 2 and 3, as `SegmentSpace` takes them
    """

    teacher: Plan
    blocks: Blocks
    counts: tuple[int, ...]
    branches: tuple[int, ...]
    partials: int
    orders: tuple[int, ...] = (1, 2)
    reuses: tuple[int, ...] = (HOLD,)

    def __post_init__(self):
        if list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"full_steps: must rise, got {list(self.counts)}")
        for branch in self.branches:
            self.blocks.branch(branch)  # raises for a branch that the network has not

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range."""
        genes: dict[str, BaseDistribution] = {"segments": IntDistribution(0, len(self.counts) - 1),
                                              "order": CategoricalDistribution(self.orders),
                                              "power": FloatDistribution(0.0, 1.0)}
        for slot in range(max(self.counts)):
            genes[f"length_{slot}"] = FloatDistribution(0.0, 1.0)
            if self.partials:
                genes[f"partials_{slot}"] = CategoricalDistribution(tuple(range(self.partials + 1)))
                genes[f"branch_{slot}"] = CategoricalDistribution(self.branches)
                genes[f"reach_{slot}"] = FloatDistribution(0.0, 1.0)
                genes |= _reuse_gene(self.reuses, slot)
        return genes

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""
        count, train = self.counts[genome["segments"]], self.teacher.schedule.train_timesteps
        lengths = LENGTHS ** (2 * np.array([genome[f"length_{slot}"] for slot in range(count)]) - 1)
        lengths /= lengths.sum()
        begins, places, rows = np.cumsum(lengths) - lengths, [], []
        for slot in range(count):
            partials = genome[f"partials_{slot}"] if self.partials else 0
            places.append(begins[slot])
            rows.append(np.full(len(self.blocks), COMPUTE))
            for step in range(1, partials + 1):
                places.append(begins[slot] + genome[f"reach_{slot}"] * lengths[slot] * step / (partials + 1))
                rows.append(np.where(self.blocks.branch(genome[f"branch_{slot}"]), COMPUTE,
                                     genome.get(f"reuse_{slot}", self.reuses[0])))
        left = (1 - np.array(places)) ** POWERS ** (2 * genome["power"] - 1)
        if isinstance(self.teacher.schedule, FlowSchedule):
            timesteps = np.interp(1 - left, *self.teacher.way).tolist()
        else:
            wanted = [round(train * share) - 1 for share in left]
            for i in range(1, len(wanted)):  # rounding may make neighbours equal
                wanted[i] = min(wanted[i], wanted[i - 1] - 1)
            timesteps = [max(t, len(wanted) - 1 - i) for i, t in enumerate(wanted)]
        full = self.teacher.at(timesteps, solver="dpmsolver++", order=genome["order"], table=None)
        return full.with_cells(np.stack(rows), method="free segments", segments=count)

    def encode(self, count: int, order: int, partials: int = 0, branch: int | None = None, reuse: int = HOLD) -> dict:
        """Give the genome of uniform segments, each with as many partial steps at equal distances."""
        genome = {"segments": self.counts.index(count), "order": order, "power": 0.5}
        for slot in range(max(self.counts)):
            genome[f"length_{slot}"] = 0.5
            if self.partials:
                genome |= {f"partials_{slot}": partials, f"reach_{slot}": 1.0,
                           f"branch_{slot}": self.branches[0] if branch is None else branch}
                genome |= dict.fromkeys(_reuse_gene(self.reuses, slot), reuse)
        return genome

    def encode_steps(self, timesteps: Sequence[float], order: int) -> dict:
        """Give the genome of full steps alone that begin nearest to some timesteps, the first at the noise."""
        if isinstance(self.teacher.schedule, FlowSchedule):
            behind, way = self.teacher.way
            begins = 1 - np.interp(timesteps, way[::-1], behind[::-1])
        else:
            begins = (np.array(timesteps) + 1) / self.teacher.schedule.train_timesteps
        nearest = {}
        for power in np.linspace(0.0, 1.0, 41):
            places = 1 - begins ** (1 / POWERS ** (2 * power - 1))
            logs = np.log(np.diff([0.0, *places[1:], 1.0])) / np.log(LENGTHS)
            genes = np.clip((1 + logs - (logs.min() + logs.max()) / 2) / 2, 0.0, 1.0)
            genome = self.encode(len(timesteps), order) | {"power": float(power)}
            genome |= {f"length_{slot}": float(gene) for slot, gene in enumerate(genes)}
            nearest[np.abs(np.subtract(self.decode(genome).timesteps, timesteps)).max()] = genome
        return nearest[min(nearest)]

    def known(self) -> list[dict]:
        """Give the known schedules to start from.

        Each solver's uniform steps; with caching, one branch and number of partial steps a count, held and forecast.
        """
        known = [self.encode(count, order, reuse=self.reuses[0]) for count in self.counts for order in self.orders]
        for i, count in enumerate(self.counts if self.partials else ()):
            known += [self.encode(count, self.orders[-1], 1 + i // len(self.branches) % self.partials,
                                  self.branches[i % len(self.branches)], reuse) for reuse in self.reuses]
        return known


def _reuse_gene(reuses: tuple[int, ...], slot: int) -> dict[str, BaseDistribution]:
    """Give the gene of what a segment reuses, where there is a choice."""
    return {f"reuse_{slot}": CategoricalDistribution(reuses)} if len(reuses) > 1 else {}
