"""Composition: smaller models under plans, and searches over all kinds of choice at once, which no paper has tried.

The one module that knows several methods. What is priced and scored here is a `Way`: one of several models, under a
plan; tables and controls take it where they take a plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from lib.grid.plan import COMPUTE, Plan
from lib.judging.controls import Control
from lib.methods.flexiffusion import FreeSpace


@dataclass(frozen=True)
class Way:
    """A way to sample: a model, by its name, under a plan."""

    model: str
    plan: Plan

    @property
    def steps(self) -> int:
        """The plan's steps."""
        return self.plan.steps


def on(model: str, control: Control) -> Control:
    """Put a control's plans on a model."""
    return Control(f"{control.name} ({model})", tuple((Way(model, plan), weight) for plan, weight in control.plans))


@dataclass(frozen=True)
class JointSpace:
    """The space of everything: a schedule of `FreeSpace` in whose full steps any level may hold or forecast its output.

    So solver order, timesteps, full, partial and null steps, and cells are chosen together. The first step computes
    all.

    Attributes
    ----------
    free : FreeSpace
    """

    free: FreeSpace

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range."""
        reuse = CategoricalDistribution((COMPUTE, *self.free.reuses))
        return self.free.distributions() | dict.fromkeys(self._reuses(), reuse)

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""
        plan, levels = self.free.decode(genome), self.free.blocks.levels
        cells = plan.cells
        for slot, step in enumerate(np.flatnonzero(plan.computes.all(axis=1))):
            for level, members in levels.items():
                if slot:
                    cells[step, members] = genome[f"reuse_{slot}_{level}"]
        return plan.with_cells(cells, method="joint")

    def encode(self, genome: Mapping) -> dict:
        """Give the genome of a schedule of `FreeSpace` that reuses nothing in its full steps."""
        return dict(genome) | dict.fromkeys(self._reuses(), COMPUTE)

    def _reuses(self) -> list[str]:
        slots, levels = range(1, max(self.free.counts)), self.free.blocks.levels
        return [f"reuse_{slot}_{level}" for slot in slots for level in levels]
