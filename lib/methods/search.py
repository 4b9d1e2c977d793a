"""Search for plans over any genome that decodes to one: evolutionary (NSGA-II) or random, on Optuna.

Two objectives are minimised, an error and the executed MACs. Candidates are asked and told one by one and every trial
goes into a storage, a journal file or a database, so that a search resumes after a kill, and that several processes, or
several machines, work on one.
"""

import hashlib
import json
import math
import multiprocessing
import operator
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
from optuna.samplers.nsgaii import PolynomialMutation
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from tqdm import tqdm

from lib.grid.plan import Plan

warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # to be used by Optuna's own loop; see `_alive`

REDRAWS = 500
"""Genomes over the budget, or known, one after another, at which the search ends."""
HEARTBEAT = 30
"""Seconds between two signs of life of a database's workers; a trial without one for twice as long is queued again."""
RETRIES = 2
"""Times that a trial whose worker died is queued again: one that kills each of them must not be tried for ever."""
SAMPLES = 8
"""Genomes that are decoded to know a space by what it means."""
MUTATIONS = 4
"""Genes that a child changes, on average: of a long genome many mean nothing at its number of segments."""


class Space(Protocol):
    """A genome of fixed length, and what it means."""

    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Give each gene's range."""

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""


@dataclass(frozen=True)
class Found:
    """An evaluated plan, its price (`macs`, or what stood for them), and the genome that gave it."""

    plan: Plan
    error: float
    macs: int
    genome: Mapping


def search(space: Space, error: Callable[[Plan], float], macs: Callable[[Plan], int], *, trials: int, population: int,
           seed: int, storage: Path | str, budget: int | None = None, start: Iterable[Mapping] = (),
           method: str = "nsga2", workers: int = 1, title: str = "search") -> list[Found]:
    """Evaluate known plans and `trials` others (fewer, if the space has no more); give them in the order of evaluation.

    Parameters
    ----------
    space : Space
    error, macs : callable(plan), both minimised; what an error hangs on is its `key`, where it has one. Instead of
        MACs any whole number may be the price, such as microseconds
        With several workers they, and the space, are sent to other processes: no lambdas.
    population : int, of NSGA-II; of more start genomes than that the best go on
    storage : Path or str
        A journal file, or the URL of a database (``sqlite:///...``, ``postgresql+psycopg2://...``) that machines share.
        If it holds trials of this title and of what is searched here (space, error, budget, method), the search goes on
        from them. One worker on a journal repeats exactly, interrupted or not; where several workers or machines share
        the work, the order in which they come to the storage is chance. What a dead worker was at is queued again, in a
        database when its signs of life stop.
    budget : int, in what `macs` gives; dearer genomes are drawn again before they cost an evaluation
    start : genomes to begin with (known schedules), which do not count among the trials
    method : "nsga2", "mutation" (NSGA-II without crossing: mutation and selection alone) or "random"
    workers : int
        Processes that share the storage, each with its part of torch's threads.

    Raises
    ------
    ValueError
        If the space has next to nothing within the budget, or the method is unknown.
    RuntimeError
        If a worker failed; what the others found is kept.
    """
    if method not in ("nsga2", "mutation", "random"):
        raise ValueError(f"method {method!r}: must be one of nsga2, mutation, random")
    if isinstance(storage, str):
        seed = secrets.randbelow(2**31)  # two machines that begin together must not draw the same
    start = [dict(genome) for genome in start]
    known = {plan.key for plan in map(space.decode, start) if budget is None or macs(plan) <= budget}
    trials += len(known)
    job = _Job(space, error, macs, trials, population, seed, storage, budget, method, title)
    study = job.open()
    for genome in start:
        study.enqueue_trial(genome, skip_if_exists=True)
    if isinstance(storage, Path):  # what runs there is what a killed search lost; in a database it may be another's
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            study.tell(trial.number, state=TrialState.FAIL)
            if (lost := trial.user_attrs.get("lost", 0)) < RETRIES:
                study.enqueue_trial(trial.system_attrs.get("fixed_params", trial.params), user_attrs={"lost": lost + 1})
    with tqdm(total=trials, initial=len(job.look(study)), desc=title, unit="plan") as bar:
        if workers == 1:
            job.work(study, bar)
        else:
            _share(job, study, workers, bar)
    return list(job.look(study).values())[:trials]


def pareto(found: Iterable[Found]) -> list[Found]:
    """Give those that no other beats in both error and MACs, cheapest first."""
    front: list[Found] = []
    for candidate in sorted(found, key=lambda candidate: (candidate.macs, candidate.error)):
        if not front or candidate.error < front[-1].error:
            front.append(candidate)
    return front


def winner(found: Iterable[Found], error: Callable[[Plan], float], finalists: int, low: int, high: int) -> Plan | None:
    """Give the best by another error of the `finalists` that did best for low < price <= high; None if there is none.

    Parameters
    ----------
    error : callable(plan), measured on noise that the search has not seen
    """
    within = sorted((entry for entry in found if low < entry.macs <= high), key=lambda entry: entry.error)
    return min((entry.plan for entry in within[:finalists]), key=error, default=None)


class _Journal(JournalFileBackend):
    """Optuna's journal without waiting for the disk: a trial is a record a gene, and hundreds of waits took most of it.

    What a killed process has written is kept all the same; a power cut may lose the last trials. A last record that was
    cut off is taken out: it would be read as the beginning of the next one.
    """

    def __init__(self, path: str):
        self._path, self._writing = path, JournalFileOpenLock(path)
        super().__init__(path, self._writing)
        self._writing.acquire()
        try:
            with open(path, "r+b") as file:
                whole = file.read().rfind(b"\n") + 1
                file.truncate(whole)
        finally:
            self._writing.release()

    def append_logs(self, logs: list[dict]) -> None:
        self._writing.acquire()
        try:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(log) + "\n" for log in logs)
        finally:
            self._writing.release()


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to know, and what it has seen of the storage."""

    space: Space
    error: Callable[[Plan], float]
    macs: Callable[[Plan], int]
    trials: int
    population: int
    seed: int
    storage: Path | str
    budget: int | None
    method: str
    title: str
    found: dict[str, Found] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @cached_property
    def name(self) -> str:
        """The study's name in the storage: the title, and a digest of what is searched.

        The space is known by its genes' ranges and by the plans, with their costs, that some fixed genomes mean.
        """
        distributions = dict(self.space.distributions())
        draw = optuna.create_study(sampler=RandomSampler(seed=0))
        plans = [self.space.decode(draw.ask(distributions).params) for _ in range(SAMPLES)]
        about = [{name: distribution_to_json(distribution) for name, distribution in distributions.items()},
                 [(plan.key, operator.index(self.macs(plan))) for plan in plans],
                 getattr(self.error, "key", None), self.budget, self.method]
        return f"{self.title} {hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}"

    @cached_property
    def opened(self) -> BaseStorage:
        """The storage, as Optuna has it."""
        if isinstance(self.storage, Path):
            return JournalStorage(_Journal(str(self.storage)))
        return RDBStorage(self.storage, heartbeat_interval=HEARTBEAT,
                          heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(RETRIES))

    @cached_property
    def study_id(self) -> int:
        """The study's number in the storage."""
        return self.opened.get_study_id_from_name(self.name)

    def open(self) -> optuna.Study:
        """Open the storage."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # signs of life
            return optuna.create_study(storage=self.opened, study_name=self.name, load_if_exists=True,
                                       directions=["minimize"] * 2)

    def sampler(self, study: optuna.Study) -> BaseSampler:
        """Give what draws the next genome: by its number alone, so that a killed search goes on as if it had not been.

        Retries of what was lost do not count: the lost ones do.
        """
        asked = sum(trial.state != TrialState.WAITING and "lost" not in trial.user_attrs
                    for trial in study.get_trials(deepcopy=False))
        seed = int(np.random.SeedSequence((self.seed, asked)).generate_state(1)[0])
        if self.method == "random":
            return RandomSampler(seed=seed)
        crossing = {"crossover_prob": 0.0} if self.method == "mutation" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # PolynomialMutation
            return NSGAIISampler(population_size=self.population, seed=seed, mutation=PolynomialMutation(),
                                 mutation_prob=min(1.0, MUTATIONS / len(self.space.distributions())), **crossing)

    def look(self, study: optuna.Study) -> dict[str, Found]:
        """Take what all workers told the storage: one entry for each different plan."""
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if trial.number not in self.seen:
                self.seen.add(trial.number)
                plan = self.space.decode(trial.params)
                self.found.setdefault(plan.key, Found(plan, trial.values[0], int(trial.values[1]), trial.params))
        return self.found

    def work(self, study: optuna.Study, bar: tqdm | None = None) -> None:
        """Ask, evaluate and tell until there are enough plans."""
        distributions, repeats = dict(self.space.distributions()), 0
        while len(found := self.look(study)) < self.trials:
            trial, plan, cost = self._ask(study, distributions)
            before = len(found)
            if plan.key in found:  # a copy would only crowd the population
                self._tell(study, trial)
                repeats += 1
            elif self._elsewhere(study, trial.number, plan.key) or plan.key in self.look(study):
                # In this order: what ends meanwhile is found by one of the two.
                self._tell(study, trial)
                time.sleep(0.1)
            else:
                with self._alive(trial.number):
                    error = self._error(plan)
                told = self._tell(study, trial, [error, cost])
                if told.state == TrialState.COMPLETE:
                    self.seen.add(trial.number)  # no need to decode it again
                    self.found.setdefault(plan.key, Found(plan, error, cost, trial.params))
                repeats = 0
            if repeats == REDRAWS:
                tqdm.write(f"{self.title}: {REDRAWS} genomes in a row gave plans that were known: the space is "
                           "searched through")
                return
            if bar is not None:
                _show(bar, self.look(study), before)

    def _error(self, plan: Plan) -> float:
        """Give a plan's error: infinite where there is none, as Optuna takes NaN for a failure, and would ask again."""
        try:
            error = self.error(plan)
        except FloatingPointError:  # images that are not numbers
            return math.inf
        return math.inf if math.isnan(error) else error

    @staticmethod
    def _tell(study: optuna.Study, trial: optuna.Trial, values: list[float] | None = None) -> optuna.trial.FrozenTrial:
        """Tell a trial its values, or that it failed: unless another has, given it too or taking this one for dead."""
        try:
            return study.tell(trial, values, None if values else TrialState.FAIL, skip_if_finished=True)
        except UpdateFinishedTrialError:  # between tell's look and its writing
            return study.get_trials(deepcopy=False)[trial.number]

    def _elsewhere(self, study: optuna.Study, number: int, key: str) -> bool:
        """Say whether a worker who asked earlier is at the same plan: of two the later gives way."""
        genes = set(self.space.distributions())
        for _ in range(20):  # what is being asked this very moment has not all its genes yet
            others = [trial for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
                      if trial.number < number]
            asked = datetime.now() - timedelta(seconds=HEARTBEAT)
            if all(set(trial.params) == genes or trial.datetime_start < asked for trial in others):
                break
            time.sleep(0.05)
        return any(self.space.decode(trial.params).key == key for trial in others if set(trial.params) == genes)

    @contextmanager
    def _alive(self, number: int) -> Iterator[None]:
        """Give signs of life of a trial to a database; a journal's trials are looked after when it is opened again."""
        if isinstance(self.storage, Path):
            yield
            return
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT):
                try:
                    self._beat(number)
                except Exception as error:  # of whatever database: it may be back at the next
                    tqdm.write(f"{self.title}: no sign of life could be given: {error}")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _beat(self, number: int) -> None:
        """Give one sign of life of a trial."""
        self.opened.record_heartbeat(self.opened.get_trial_id_from_study_id_trial_number(self.study_id, number))

    def _ask(self, study: optuna.Study, distributions: dict[str, BaseDistribution]) -> tuple[optuna.Trial, Plan, int]:
        """Ask for a genome within the budget; dearer ones are told as failed: the sampler learns nothing of them."""
        if isinstance(self.storage, str):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                fail_stale_trials(study)
        for _ in range(REDRAWS):
            study.sampler = self.sampler(study)
            try:
                trial = study.ask(distributions)
                _ = trial.relative_params  # where all genes were given: else NSGA-II takes it into no population
            except UpdateFinishedTrialError:  # SQLite may give what is queued to two: the other has done with it
                continue
            if isinstance(self.storage, str):
                self._beat(trial.number)
            plan = self.space.decode(trial.params)
            cost = operator.index(self.macs(plan))  # no fraction, which would be lost when a search is resumed
            if self.budget is None or cost <= self.budget:
                return trial, plan, cost
            self._tell(study, trial)
        raise ValueError(f"none of {REDRAWS} genomes cost at most {self.budget}: raise the budget, or widen the "
                         "space by cheaper choices.")


def _share(job: _Job, study: optuna.Study, workers: int, bar: tqdm) -> None:
    """Let several processes work on one storage, and show how they get on."""
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=(replace(job, seed=secrets.randbelow(2**31)), threads), daemon=True)
                 for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            before = len(job.found)
            _show(bar, job.look(study), before)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed and len(job.look(study)) < job.trials:
        raise RuntimeError(f"{job.title}: {len(failed)} of {workers} workers failed (their own errors stand above). "
                           "What they found is kept: run it again to go on.")


def _worker(job: _Job, threads: int) -> None:
    torch.set_num_threads(threads)
    job.work(job.open())


def _show(bar: tqdm, found: Mapping[str, Found], before: int) -> None:
    if len(found) > before:
        best = min(found.values(), key=lambda candidate: candidate.error)
        bar.set_postfix(best=f"{best.error:.3g}", cost=f"{best.macs / 1e6:.3g}M", refresh=False)
        bar.update(len(found) - before)
