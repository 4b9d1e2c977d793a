"""Composition: smaller models under plans, and searches over all kinds of choice at once, which no paper has tried.

The one module that knows several methods. What is priced and scored here is a `Run`: one of several models, under a
plan; tables and controls take it where they take a plan.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from torch import Tensor

from lib.grid.model import Model
from lib.grid.plan import COMPUTE, Plan
from lib.judging import evaluate
from lib.judging.banks import Bank
from lib.judging.controls import Control
from lib.judging.extractor import Extractor
from lib.methods.flexiffusion import FreeSpace
from lib.methods.search import Found, Space, search, winner


@dataclass(frozen=True)
class Run:
    """A run of the sampler: a model, by its name, under a plan."""

    model: str
    plan: Plan

    @property
    def steps(self) -> int:
        """The plan's steps."""
        return self.plan.steps


class Banks:
    """One bank of noise for several models: what extractors see of the images of each `Run`.

    Parameters
    ----------
    name : str, of the bank of noise
    models : dict of name to Model
    extractors, about : as `lib.judging.banks.Bank` takes them

    Attributes
    ----------
    of : dict of a model's name to its Bank
    """

    def __init__(self, name: str, models: Mapping[str, Model], extractors: Sequence[Extractor], **about):
        self.of = {which: Bank(name, model, extractors, **about) for which, model in models.items()}

    def features(self, run: Run, title: str | None = None, by: str | None = None) -> Tensor:
        """Give the features, (n, D), of the bank's images under a run; title and `by` as `Bank.features` takes them."""
        return self.of[run.model].features(run.plan, title=title, by=by)


@dataclass(frozen=True)
class RunSearch:
    """Searches, on any of several models, for plans whose images come nearest to those of one run.

    Attributes
    ----------
    wanted : Run, whose images are imitated, on whatever model plans are looked for
    first, second : Banks; candidates are compared on the first, the finalists among them on the second
    population : int, of NSGA-II
    finalists : int, best candidates of the first bank that meet again on the second
    seed : int
    storage : Path, of the journal from which a killed search goes on
    """

    wanted: Run
    first: Banks
    second: Banks
    population: int
    finalists: int
    seed: int
    storage: Path

    def error(self, banks: Banks, model: str) -> Callable[[Plan], float]:
        """Give the error of a plan on a model: the rFID of its images to the wanted ones, on these banks."""
        def error(plan: Plan) -> float:
            return evaluate.imitation(banks.features(Run(model, plan)), banks.features(self.wanted), "rfid, shrunk")

        looked = banks.of[model]
        error.key = f"{looked.key} {banks.of[self.wanted.model].key} {self.wanted.plan.key} {looked.first} rfid, shrunk"
        return error

    def search(self, title: str, model: str, space: Space, price: Callable[[Run], int], *, number: int,
               budget: float, trials: int, start: Iterable[Mapping] = ()) -> list[Found]:
        """Give all that a search on a model finds within a budget, in the order of evaluation.

        Parameters
        ----------
        price : callable(run), what the budget is of, such as MACs or microseconds; it is what `Found.macs` holds
        number : int, of the search: each draws other candidates
        trials, start : as `lib.methods.search.search` takes them
        """
        return search(space, self.error(self.first, model), lambda plan: price(Run(model, plan)), trials=trials,
                      population=self.population, budget=budget, seed=self.seed + 1_000_000 * number,
                      storage=self.storage, start=start, title=title)

    def winner(self, model: str, found: Iterable[Found], low: float, high: float) -> Run | None:
        """Give the best finalist, by the second bank, of those with low < price <= high; None if there is none."""
        plan = winner(found, self.error(self.second, model), self.finalists, low, high)
        return None if plan is None else Run(model, plan)


def on(model: str, control: Control) -> Control:
    """Put a control's plans on a model."""
    return Control(f"{control.name} ({model})", tuple((Run(model, plan), weight) for plan, weight in control.plans))


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
