"""What sets one search of several apart, and what a schedule that it found consists of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from lib.grid.plan import LINE, NULL, PARABOLA, Plan
from lib.methods.search import Space


class KnowingSpace(Space, Protocol):
    """A space that knows schedules to begin with."""

    def known(self) -> list[dict]:
        """Give the genomes of these schedules."""


@dataclass(frozen=True)
class Hunt:
    """One search: where it looks, whom it imitates, and how much a schedule may cost.

    Attributes
    ----------
    space : a space that knows schedules to begin with
    target : Plan, full: the teacher's run that candidates are compared with
    budgets : sequence of float, shares of `price`, in (0, 1]
    price : int, executed MACs of the run that budgets are shares of
    guidance : float, scale of classifier-free guidance; 1 is none
    method : "nsga2", "mutation" or "random", as `lib.methods.search.search` takes it
    also : sequence of genomes to begin with, besides those that the space knows
    """

    space: KnowingSpace
    target: Plan
    budgets: Sequence[float]
    price: int
    guidance: float = 1.0
    method: str = "nsga2"
    also: Sequence[dict] = ()

    @property
    def start(self) -> list[dict]:
        """All genomes to begin with."""
        return self.space.known() + list(self.also)

    @cached_property
    def known_keys(self) -> frozenset[str]:
        """The keys of the schedules to begin with: what has another key was found."""
        return frozenset(self.space.decode(genome).key for genome in self.start)


def contents(plan: Plan, guided: bool) -> dict[str, int]:
    """Count what a schedule consists of.

    Parameters
    ----------
    plan : Plan
    guided : bool, whether the model is guided: then a plan of one pass runs the null pass at each of its steps

    Returns
    -------
    contents : order of the solver; full and partial steps; forecast, steps at which some block is forecast; null
        passes, steps at which the network is called without its condition
    """
    full = plan.computes.all(axis=1)
    passes = plan.steps * guided
    if len(plan.passes) > 1:
        passes = sum(int(life.called.sum()) for name, life in zip(plan.passes, plan.life) if name == NULL)
    return {"order": plan.order, "full": int(full.sum()), "partial": int((~full).sum()),
            "forecast": int(np.isin(plan.cells, (LINE, PARABOLA)).any(axis=1).sum()), "null passes": int(passes)}
