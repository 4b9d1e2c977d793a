"""Search for plans over any genome that decodes to one: evolutionary (NSGA-II) or random, on Optuna.

Two objectives are minimised, an error and the executed MACs. Candidates are asked and told one by one and every trial
goes into a journal, so that a search resumes after a kill.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import NSGAIISampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tqdm import tqdm

from lib.plan import Plan

REDRAWS = 500
"""Genomes over the budget, or known, one after another, at which the search ends."""


class Space(Protocol):
    """A genome of fixed length, and what it means."""

    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Give each gene's range."""

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""


@dataclass(frozen=True)
class Found:
    """An evaluated plan."""

    plan: Plan
    error: float
    macs: int


def search(space: Space, error: Callable[[Plan], float], macs: Callable[[Plan], int], *, trials: int, population: int,
           seed: int, journal: Path, budget: int | None = None, start: Iterable[Mapping] = (), method: str = "nsga2",
           title: str = "search") -> list[Found]:
    """Evaluate `trials` different plans (fewer, if the space has no more) and give them in the order of evaluation.

    Parameters
    ----------
    space : Space
    error, macs : callable(plan), both minimised
    population : int, of NSGA-II
    journal : Path
        File that keeps the trials; if it is there, the search goes on from it.
    budget : int, MACs; dearer genomes are drawn again before they cost an evaluation
    start : genomes to begin with (known schedules)
    method : "nsga2" or "random"

    Raises
    ------
    ValueError
        If the space has next to nothing within the budget.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(storage=storage, study_name=title, load_if_exists=True, directions=["minimize"] * 2)
    study.sampler = _sampler(method, population, seed + len(study.trials))  # a resumed sampler must not repeat itself
    distributions = dict(space.distributions())
    found: dict[str, Found] = {}
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        plan = space.decode(trial.params)
        found.setdefault(plan.key, Found(plan, *trial.values))
    lost = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(states=[TrialState.RUNNING])]
    for genome in [genome for genome in lost if genome] if study.trials else start:
        study.enqueue_trial(dict(genome))
    repeats = 0
    bar = tqdm(total=trials, initial=len(found), desc=title, unit="plan")
    while len(found) < trials:
        trial, plan, cost = _ask(study, space, distributions, macs, budget)
        new = plan.key not in found
        if new:
            found[plan.key] = Found(plan, error(plan), cost)
        study.tell(trial, [found[plan.key].error, cost])
        repeats = 0 if new else repeats + 1
        if repeats == REDRAWS:
            tqdm.write(f"{title}: {REDRAWS} genomes in a row gave plans that were known: the space is searched through")
            break
        if new:
            bar.update()
            best = min(found.values(), key=lambda one: one.error)
            bar.set_postfix(best=f"{best.error:.3g}", macs=f"{best.macs / 1e6:.0f}M", refresh=False)
    bar.close()
    return list(found.values())


def pareto(found: Iterable[Found]) -> list[Found]:
    """Give those that no other beats in both error and MACs, cheapest first."""
    front: list[Found] = []
    for one in sorted(found, key=lambda one: (one.macs, one.error)):
        if not front or one.error < front[-1].error:
            front.append(one)
    return front


def _sampler(method: str, population: int, seed: int) -> optuna.samplers.BaseSampler:
    if method == "random":
        return RandomSampler(seed=seed)
    return NSGAIISampler(population_size=population, seed=seed)


def _ask(study: optuna.Study, space: Space, distributions: dict, macs: Callable[[Plan], int], budget: int | None
         ) -> tuple[optuna.Trial, Plan, int]:
    """Ask for a genome within the budget; dearer ones are told as failed, and the sampler learns nothing of them."""
    for _ in range(REDRAWS):
        trial = study.ask(distributions)
        plan = space.decode(trial.params)
        cost = macs(plan)
        if budget is None or cost <= budget:
            return trial, plan, cost
        study.tell(trial, state=TrialState.FAIL)
    raise ValueError(f"none of {REDRAWS} genomes cost at most {budget} MACs: raise the budget, or widen the space by "
                     "cheaper choices.")
