"""Flexiffusion (arXiv 2409.17566): a space of schedules made of segments.

The teacher's T steps are cut into S equal segments. Each is one *full* step, then *partial* steps that run only the
blocks above a branch and read the cached deep feature, then *null* steps that the solver jumps over. S, and each
segment's branch and number of active steps, are searched without any training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lib.blocks import Blocks
from lib.plan import Plan


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
    """

    teacher: Plan
    blocks: Blocks
    counts: tuple[int, ...]
    branches: tuple[int, ...]

    def __post_init__(self):
        for count in self.counts:
            length = -(-self.teacher.steps // count)
            if (count - 1) * length >= self.teacher.steps:
                raise ValueError(f"segment_counts: {count} segments of {length} steps do not fit {self.teacher.steps} "
                                 "steps")
        for branch in self.branches:
            self.blocks.branch(branch)  # raises for a branch that the network has not

    @cached_property
    def shallow(self) -> dict[int, np.ndarray]:
        """The blocks that a partial step runs, per branch."""
        return {branch: self.blocks.branch(branch) for branch in self.branches}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range."""
        genes: dict[str, BaseDistribution] = {"segments": CategoricalDistribution(self.counts)}
        for slot in range(max(self.counts)):
            genes[f"branch_{slot}"] = IntDistribution(0, len(self.branches) - 1)
            genes[f"interval_{slot}"] = FloatDistribution(0.0, 1.0)
        return genes

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""
        count = genome["segments"]
        length = -(-self.teacher.steps // count)
        chosen = []
        for slot in range(count):
            active = min(length, 1 + int(genome[f"interval_{slot}"] * length))
            chosen.append((active, self.branches[genome[f"branch_{slot}"]]))
        return Plan.segments([(active, self.shallow[branch]) for active, branch in chosen], self.teacher,
                             paper="2409.17566", active_and_branch=[list(pair) for pair in chosen])

    def encode(self, count: int, branch: int, active: int) -> dict:
        """Give the genome whose segments are all alike: active = length is DeepCache, active = 1 is fewer steps."""
        length = -(-self.teacher.steps // count)
        genome = {"segments": count}
        for slot in range(max(self.counts)):
            genome[f"branch_{slot}"] = self.branches.index(branch)
            genome[f"interval_{slot}"] = (active - 0.5) / length
        return genome

    def known(self) -> list[dict]:
        """Give the known schedules in the space to start from: few steps and DeepCache's first branch, for each S."""
        lengths = {count: -(-self.teacher.steps // count) for count in self.counts}
        return [self.encode(count, self.branches[0], active) for count in self.counts for active in (1, lengths[count])]

    def size(self) -> int:
        """Count the schedules: the sum over S of the product over segments of (branches x (length - 1) + 1)."""
        total = 0
        for count in self.counts:
            length = -(-self.teacher.steps // count)
            last = self.teacher.steps - (count - 1) * length
            total += math.prod(len(self.branches) * (steps - 1) + 1 for steps in [length] * (count - 1) + [last])
        return total
