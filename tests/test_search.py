"""The search: finds, respects the budget, evaluates nothing twice, resumes, shares work. And Flexiffusion's spaces."""

import itertools
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from lib.grid import blocks, cost
from lib.grid.plan import COMPUTE, HOLD, LINE, PARABOLA, NoiseSchedule, Plan, trailing
from lib.methods import search as searching
from lib.methods.flexiffusion import FreeSpace, SegmentSpace
from lib.methods.hunts import Hunt, contents
from lib.methods.search import Found, pareto, search, winner
from lib.teachers import networks


class Toy:
    """Two genes choose timesteps; the error is lowest at (7, 3)."""

    def __init__(self, teacher):
        self.teacher = teacher

    def distributions(self):
        return {"a": IntDistribution(0, 30), "b": IntDistribution(0, 30)}

    def decode(self, genome):
        return Plan.full((999, 900 - genome["a"], 100 - genome["b"]), self.teacher.schedule, self.teacher.blocks)


def error(plan):
    a, b = 900 - plan.timesteps[1], 100 - plan.timesteps[2]
    return (a - 7) ** 2 + (b - 3) ** 2


def macs(plan):
    return 900 - plan.timesteps[1]


def run(teacher, journal, trials=60, **options):
    return search(Toy(teacher), error, macs, trials=trials, population=10, seed=2, storage=journal, **options)


def test_it_repeats_and_draws_better_than_random(teacher, tmp_path):
    one, two = (run(teacher, tmp_path / name) for name in ("one", "two"))
    assert [found.plan.key for found in one] == [found.plan.key for found in two]
    assert len({found.plan.key for found in one}) == len(one) == 60
    random = run(teacher, tmp_path / "three", method="random")
    assert np.median([found.error for found in one[30:]]) < np.median([found.error for found in random[30:]])


@pytest.mark.parametrize("queued", [0, 9])
def test_a_trial_that_two_workers_were_given_is_left_to_the_other(teacher, tmp_path, monkeypatch, queued):
    """SQLite may hand what is queued to two at once: asking then ends in an error, or telling finds it told."""
    ask, number = optuna.Study.ask, itertools.count()

    def given_to_another(study, *arguments):
        trial = ask(study, *arguments)
        if study.study_name.startswith("no-name") or (turn := next(number)) % 3:  # those look at the space alone
            return trial
        study.tell(trial.number, state=TrialState.FAIL)
        if turn % 2:
            raise UpdateFinishedTrialError(f"Trial#{trial.number} has already finished and can not be updated.")
        return trial

    monkeypatch.setattr(optuna.Study, "ask", given_to_another)
    found = run(teacher, f"sqlite:///{tmp_path}/search.db", trials=12, start=[{"a": a, "b": 3} for a in range(queued)])
    assert len({one.plan.key for one in found}) == len(found)
    assert 12 <= len(found) <= 12 + queued


def test_a_trial_that_another_tells_while_one_tells_it_is_his(teacher, tmp_path, monkeypatch):
    tell, number = optuna.Study.tell, itertools.count()

    def told_twice(study, trial, *values, **options):
        ended = tell(study, trial, *values, **options)
        if next(number) % 3:
            return ended
        raise UpdateFinishedTrialError(f"Trial#{trial.number} has already finished and can not be updated.")

    monkeypatch.setattr(optuna.Study, "tell", told_twice)
    found = run(teacher, tmp_path / "journal", trials=12)
    assert len({one.plan.key for one in found}) == len(found) == 12


def test_of_more_starts_than_the_population_the_best_are_the_parents(teacher, tmp_path):
    far, near = [{"a": a, "b": 30} for a in range(29, 17, -1)], [{"a": a, "b": 4} for a in range(8)]
    found = search(Toy(teacher), error, macs, trials=30, population=4, seed=0, storage=tmp_path / "journal",
                   start=far + near)
    assert len(found) == len(far + near) + 30
    assert np.mean([one.genome["b"] < 15 for one in found[-20:]]) > 0.8, "not of those that came first"


def test_mutation_alone_crosses_nothing_and_finds_better_than_random(teacher, tmp_path):
    found = run(teacher, tmp_path / "one", method="mutation")
    random = run(teacher, tmp_path / "two", method="random")
    assert np.median([found.error for found in found[30:]]) < np.median([found.error for found in random[30:]])
    alone = job(teacher, tmp_path / "three", method="mutation")
    assert alone.sampler(alone.open())._child_generation_strategy._crossover_prob == 0


def test_no_evaluation_is_spent_over_the_budget(teacher, tmp_path):
    found = run(teacher, tmp_path / "journal", trials=30, budget=10)
    assert max(one.macs for one in found) <= 10
    with pytest.raises(ValueError, match="none of 500 genomes cost at most -1: raise the budget"):
        run(teacher, tmp_path / "other", budget=-1)


def test_it_starts_from_known_genomes(teacher, tmp_path):
    found = run(teacher, tmp_path / "journal", trials=0, start=[{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    assert [one.plan.timesteps[1:] for one in found] == [(899, 98), (897, 96)], "they are no trials"
    more = run(teacher, tmp_path / "more", trials=3, start=[{"a": 1, "b": 2}, {"a": 30, "b": 4}], budget=10)
    assert len(more) == 1 + 3, "nor is one over the budget"


def test_it_resumes_and_loses_only_the_running_trial(teacher, tmp_path):
    calls, broken = [], []

    def breaks(plan):
        if len(calls) == 20:
            broken.append(plan.key)
            raise KeyboardInterrupt
        calls.append(plan.key)
        return error(plan)

    arguments = {"trials": 40, "population": 10, "seed": 0, "storage": tmp_path / "journal"}
    with pytest.raises(KeyboardInterrupt):
        search(Toy(teacher), breaks, macs, **arguments)
    before = list(calls)

    def counts(plan):
        calls.append(plan.key)
        return error(plan)

    found = search(Toy(teacher), counts, macs, **arguments)
    assert [one.plan.key for one in found][:20] == before
    assert len(calls) == len(set(calls)) == len(found) == 40
    assert calls[20:21] == broken, "what was being evaluated is evaluated first"
    whole = search(Toy(teacher), error, macs, **arguments | {"storage": tmp_path / "whole"})
    assert [one.plan.key for one in found] == [one.plan.key for one in whole], "as if it had not been interrupted"


def test_another_space_error_or_budget_under_one_title_is_another_search(teacher, tmp_path):
    class Keyed:
        def __init__(self, key):
            self.key = key

        def __call__(self, plan):
            asked.append(plan.key)
            return error(plan)

    class Elsewhere(Toy):
        def decode(self, genome):
            return super().decode({"a": genome["a"] + 40, "b": genome["b"]})

    asked, journal = [], tmp_path / "journal"
    same = {"trials": 6, "population": 4, "seed": 0, "storage": journal}
    for space, judged, more in ((Toy, "one", {}), (Elsewhere, "one", {}), (Toy, "two", {}),
                                (Toy, "one", {"budget": 20}), (Toy, "one", {"method": "random"})):
        before = len(asked)
        search(space(teacher), Keyed(judged), macs, **same, **more)
        assert len(asked) == before + 6, (space, judged, more)
    search(Toy(teacher), Keyed("one"), macs, **same)
    assert len(asked) == before + 6, "and the same goes on from what it found"


def job(teacher, storage, error=error, **options):
    usual = {"trials": 6, "population": 4, "seed": 0, "budget": None, "method": "nsga2", "title": "search"}
    return searching._Job(Toy(teacher), error, macs, storage=storage, **usual | options)


def test_a_dead_workers_trial_is_queued_again_and_a_living_ones_is_not(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "HEARTBEAT", 1)
    database = f"sqlite:///{tmp_path}/search.db"
    seen, states = [], []

    def dies(plan):
        seen.append(plan.key)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(teacher, database, dies).work(job(teacher, database).open())

    def slow(plan):
        if not seen[1:]:
            time.sleep(3.5)  # longer than a worker may be silent
            other = job(teacher, database).open()
            searching.fail_stale_trials(other)
            states.extend(trial.state.name for trial in other.trials if trial.number > 0)
        seen.append(plan.key)
        return error(plan)

    found = search(Toy(teacher), slow, macs, trials=6, population=4, seed=0, storage=database)
    assert seen[0] in seen[1:] and seen[0] in {one.plan.key for one in found}
    assert "FAIL" not in states and "RUNNING" in states, "the slow one gave signs of life"


def test_what_kills_its_worker_is_not_tried_for_ever(teacher, tmp_path):
    """A journal's: opened again and again, each time the first plan is the end of it."""
    tried = []

    def kills(plan):
        if not tried or plan.key == tried[0]:
            tried.append(plan.key)
            raise MemoryError
        return error(plan)

    for _ in range(searching.RETRIES + 1):
        with pytest.raises(MemoryError):
            search(Toy(teacher), kills, macs, trials=4, population=4, seed=0, storage=tmp_path / "journal")
    found = search(Toy(teacher), kills, macs, trials=4, population=4, seed=0, storage=tmp_path / "journal")
    assert len(found) == 4 and len(tried) == searching.RETRIES + 1


def test_a_plan_that_another_worker_is_at_is_left_to_it(teacher, tmp_path):
    database, genome, asked = f"sqlite:///{tmp_path}/search.db", {"a": 5, "b": 5}, []

    def watched(plan):
        asked.append(plan.key)
        return error(plan)

    first = job(teacher, database)
    study = first.open()
    study.enqueue_trial(genome)
    _, plan, _ = first._ask(study, Toy(teacher).distributions())
    found = search(Toy(teacher), watched, macs, trials=4, population=4, seed=0, storage=database, start=[genome])
    study.enqueue_trial(genome)
    again = search(Toy(teacher), watched, macs, trials=6, population=4, seed=0, storage=database)
    assert len(found) == 4 + 1 and len(again) == 6 and plan.key not in asked


def test_a_worker_that_was_taken_for_dead_goes_on(teacher, tmp_path):
    database, taken = f"sqlite:///{tmp_path}/search.db", []

    def taken_away(plan):
        if not taken:
            taken.append(plan.key)
            other = job(teacher, database).open()
            running, = other.get_trials(states=[TrialState.RUNNING])
            other.tell(running.number, state=TrialState.FAIL)
        return error(plan)

    found = search(Toy(teacher), taken_away, macs, trials=4, population=4, seed=0, storage=database)
    first, *others = job(teacher, database).open().get_trials()
    assert len(found) == 4 and first.state == TrialState.FAIL and first.number == 0
    assert sum(trial.state == TrialState.COMPLETE for trial in others) == 4, "the lost one is nobody's result"


def logged(path, plan):
    """Toy's error, slowly, with a line in a file for each evaluation begun."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {plan.key}\n")
    time.sleep(0.05)
    return error(plan)


@pytest.mark.parametrize("cut", [1, 7, 40, 300, "zeros"])
def test_a_journal_whose_end_was_cut_off_goes_on(teacher, tmp_path, cut):
    journal = tmp_path / "journal"
    run(teacher, journal, trials=12)
    written = journal.read_bytes()
    journal.write_bytes(written + bytes(50) if cut == "zeros" else written[:-cut])
    known = {one.plan.key for one in run(teacher, journal, trials=12)}
    found = run(teacher, journal, trials=20)
    assert len({one.plan.key for one in found}) == 20 and known <= {one.plan.key for one in found}


@pytest.mark.parametrize("storage", ["journal", "database"])
def test_two_workers_share_the_trials(teacher, tmp_path, storage):
    where = tmp_path / "journal" if storage == "journal" else f"sqlite:///{tmp_path}/search.db"
    found = run_logged(teacher, where, tmp_path / "log", trials=24, workers=2)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({one.plan.key for one in found}) == len(found) == 24
    assert len({worker for worker, _ in lines}) == 2
    assert all(one.error == error(one.plan) and one.macs == macs(one.plan) for one in found)
    assert len(lines) == len({key for _, key in lines}) <= 24 + 1, "no plan twice; each may end one too many"


def run_logged(teacher, storage, log, **options):
    return search(Toy(teacher), partial(logged, log), macs, population=10, seed=0, storage=storage, **options)


def test_a_worker_that_fails_is_told(teacher, tmp_path):
    with pytest.raises(RuntimeError, match="2 of 2 workers failed"):
        search(Toy(teacher), fails, macs, trials=4, population=2, seed=0, storage=tmp_path / "journal", workers=2)


def fails(plan):
    raise OSError("no disk")


KILLED = """
from pathlib import Path
import sys
sys.path.insert(0, {tests!r})
from test_search import run_logged
from lib.grid import blocks
from lib.teachers import networks
from lib.grid.plan import NoiseSchedule, Plan, trailing
unet = networks.unet((1, 16, 16), [8, 8, 16], 1, 4)
teacher = Plan.full(trailing(10, 1000), NoiseSchedule.of(networks.noise_schedule()), blocks.describe(unet).names)
run_logged(teacher, Path({journal!r}), {log!r}, trials=40)
"""


def test_kill_9_loses_no_trial_but_the_running_one(teacher, tmp_path):
    log, journal = tmp_path / "log", tmp_path / "journal"
    code = KILLED.format(tests=os.path.dirname(__file__), journal=str(journal), log=str(log))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 12):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line.split()[1] for line in log.read_text().splitlines()]
    found = run_logged(teacher, journal, log, trials=40)
    after = [line.split()[1] for line in log.read_text().splitlines()][len(before):]
    assert len(before) >= 12 and len(found) == 40
    assert not set(before[:-1]) & set(after), "a finished trial was evaluated again"
    assert set(before[:-1]) <= {one.plan.key for one in found}


def test_the_front_holds_what_nothing_beats(teacher):
    plans = [Found(teacher, *pair, {}) for pair in [(3, 1), (2, 2), (2, 3), (1, 4), (5, 5)]]
    assert [(one.error, one.macs) for one in pareto(plans)] == [(3, 1), (2, 2), (1, 4)]


def test_the_winner_does_best_elsewhere_among_the_few_that_did_best_within_the_price(teacher):
    """The best elsewhere was no finalist, the best here is over the price, the cheapest not above the lower bound."""
    plans = [Plan.few_steps(steps, "uniform", teacher) for steps in (1, 2, 3, 4, 5)]
    found = [Found(plan, error, price, {}) for plan, error, price in zip(plans, (1, 2, 3, 9, 0), (11, 10, 9, 8, 5))]
    elsewhere = dict(zip((plan.key for plan in plans), (1, 3, 2, 0, 0)))
    assert winner(found, lambda plan: elsewhere[plan.key], 2, 5, 10) is plans[2]
    assert winner(found, lambda plan: elsewhere[plan.key], 2, 11, 20) is None



@pytest.fixture(scope="module")
def space(teacher, described):
    return SegmentSpace(teacher, described, (2, 5), (0, 1))


def test_the_space_holds_deepcache_and_fewer_steps(space, teacher, described):
    assert space.decode(space.encode(2, 1, 5)).key == Plan.deepcache(5, described.branch(1), teacher).key
    assert space.decode(space.encode(5, 0, 1)).key == Plan.few_steps(5, "uniform", teacher).key
    for genome in space.known():
        assert set(genome) == set(space.distributions())


def test_a_space_that_is_searched_through_ends_the_search(teacher, tmp_path):
    small = Toy(teacher)
    small.distributions = lambda: {"a": IntDistribution(0, 1), "b": IntDistribution(0, 1)}
    found = search(small, error, macs, trials=10, population=4, seed=0, storage=tmp_path / "journal")
    assert len(found) == 4


def test_an_error_that_is_no_number_is_the_worst_there_is(teacher, tmp_path):
    small = Toy(teacher)
    small.distributions = lambda: {"a": IntDistribution(0, 1), "b": IntDistribution(0, 1)}
    found = search(small, lambda plan: float("nan") if plan.timesteps[1] == 900 else error(plan), macs, trials=10,
                   population=4, seed=0, storage=tmp_path / "journal")
    assert sorted(one.error == float("inf") for one in found) == [False, False, True, True]


def test_images_that_are_not_numbers_are_the_worst_there_is_too(teacher, tmp_path):
    def breaks(plan):
        raise FloatingPointError("not numbers")

    found = search(Toy(teacher), breaks, macs, trials=3, population=4, seed=0, storage=tmp_path / "journal")
    assert len(found) == 3 and all(one.error == float("inf") for one in found)


def test_costs_are_whole_numbers_as_a_resumed_search_has_them(teacher, tmp_path):
    with pytest.raises(TypeError, match="integer"):
        search(Toy(teacher), error, lambda plan: 0.5, trials=3, population=4, seed=0, storage=tmp_path / "journal")


def test_a_start_genome_that_was_being_evaluated_is_not_lost(teacher, tmp_path):
    def breaks(plan):
        raise KeyboardInterrupt

    arguments = {"trials": 3, "population": 4, "seed": 0, "storage": tmp_path / "journal",
                 "start": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]}
    with pytest.raises(KeyboardInterrupt):
        search(Toy(teacher), breaks, macs, **arguments)
    found = search(Toy(teacher), error, macs, **arguments)
    assert {(899, 98), (897, 96)} <= {one.plan.timesteps[1:] for one in found}


def test_its_size_is_the_number_of_different_plans(teacher, described):
    seen, space = set(), SegmentSpace(teacher, described, (2, 3, 5), (0, 1))
    for count, length in ((2, 5), (3, 4), (5, 2)):
        genes = [[(branch, (active - 0.5) / length) for branch in (0, 1) for active in range(1, length + 1)]] * count
        for slots in itertools.product(*genes):
            genome = {"segments": count}
            for slot, (branch, interval) in enumerate(slots):
                genome |= {f"branch_{slot}": branch, f"interval_{slot}": interval}
            seen.add((count, space.decode(genome).key))
    assert len(seen) == space.size()


def test_a_schedules_cost_is_the_papers_sum(space, unet, teacher, described):
    costs = cost.count(unet)
    genome = space.encode(2, 0, 1) | {"interval_0": 0.9, "branch_0": 1, "interval_1": 0.3}  # 5 and 2 active of 5
    part = {branch: sum(costs.blocks[name] for name, runs in zip(described.names, described.branch(branch), strict=True)
                        if runs) + costs.rest for branch in (0, 1)}
    assert costs.executed(space.decode(genome)) == 2 * costs.call + 4 * part[1] + 1 * part[0]


@pytest.mark.parametrize("reuse", [HOLD, LINE, PARABOLA])
def test_what_a_segment_reuses_is_a_gene_of_its_own(teacher, described, reuse):
    segments = SegmentSpace(teacher, described, (2, 5), (0, 1), (HOLD, LINE, PARABOLA))
    free = FreeSpace(teacher, described, (2, 4, 5), (0, 1), 2, reuses=(HOLD, LINE, PARABOLA))
    assert segments.decode(segments.encode(2, 1, 5, reuse)).key == Plan.deepcache(5, described.branch(1), teacher,
                                                                                  reuse).key
    assert free.decode(free.encode(5, 1, 1, reuse=reuse)).key == Plan.deepcache(2, described.branch(0), teacher,
                                                                                reuse).key
    for space in (segments, free):
        assert all(set(genome) == set(space.distributions()) for genome in space.known())
        assert {HOLD, LINE, PARABOLA} <= {state for genome in space.known()
                                          for state in space.decode(genome).cells.flat}
    mixed = segments.decode(segments.encode(2, 0, 5, HOLD) | {"reuse_1": reuse}).cells
    assert set(mixed[:5].flat) == {HOLD, COMPUTE} and set(mixed[5:].flat) == {reuse, COMPUTE}


def test_genes_cover_every_interval(space):
    actives = {space.decode(space.encode(2, 0, 1) | {"interval_0": value}).steps - 1 for value in np.linspace(0, 1, 50)}
    assert actives == {1, 2, 3, 4, 5}


def test_what_does_not_fit_is_refused(teacher, described):
    with pytest.raises(ValueError, match="9 segments of 2 steps do not fit 10 steps"):
        SegmentSpace(teacher, described, (9,), (0,))
    with pytest.raises(ValueError, match=r"branch 6: this network has branches 0\.\.5"):
        SegmentSpace(teacher, described, (2,), (0, 6))


@pytest.fixture(scope="module")
def free(teacher, described):
    return FreeSpace(teacher, described, (2, 4, 5), (0, 1), partials=2)


def test_the_free_space_holds_both_solvers_uniform_steps_and_caching(free, teacher, described):
    for order in (1, 2):
        uniform = Plan.few_steps(5, "uniform", teacher, order)
        assert free.decode(free.encode(5, order)).key == uniform.key
    cached = free.decode(free.encode(5, 1, partials=1))
    assert cached.key == Plan.deepcache(2, described.branch(0), teacher).key
    for genome in free.known():
        assert set(genome) == set(free.distributions())


@given(st.data())
def test_every_genome_of_the_free_space_is_a_plan(data):
    unet = networks.unet((1, 16, 16), [8, 8, 16], 1, 4)
    described = blocks.describe(unet)
    fits = NoiseSchedule.of(networks.noise_schedule())
    teacher = Plan.full(trailing(10, 1000), fits, described)
    space = FreeSpace(teacher, described, (2, 40), (0, 1), partials=data.draw(st.integers(0, 3)))
    genome = {}
    for name, gene in space.distributions().items():
        if isinstance(gene, CategoricalDistribution):
            genome[name] = data.draw(st.sampled_from(gene.choices))
        elif isinstance(gene, IntDistribution):
            genome[name] = data.draw(st.integers(gene.low, gene.high))
        else:
            genome[name] = data.draw(st.floats(gene.low, gene.high))
    plan, count = space.decode(genome), space.counts[genome["segments"]]
    extra = sum(genome.get(f"partials_{slot}", 0) for slot in range(count))
    assert plan.steps == count + extra and plan.computes.all(axis=1).sum() == count and plan.order == genome["order"]


@pytest.mark.parametrize("seed", range(20))
def test_steps_that_are_not_too_uneven_have_a_genome(teacher, described, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(1, 6, rng.integers(2, 12))
    wanted = 999 - (1000 * (np.cumsum(lengths) - lengths) / lengths.sum()).astype(int)
    space = FreeSpace(teacher, described, (len(lengths), 20), (0, 1), 2, reuses=(HOLD, LINE))
    genome = space.encode_steps(wanted, 2)
    plan = space.decode(genome)
    assert set(genome) == set(space.distributions()) and plan.order == 2 and plan.computes.all()
    assert np.abs(np.subtract(plan.timesteps, wanted)).max() <= 1


def test_power_and_lengths_move_the_steps(free):
    def steps(**genes):
        return free.decode(free.encode(4, 1) | genes).timesteps

    assert steps() == (999, 749, 499, 249)
    assert steps(power=1.0) == (999, 561, 249, 61)  # 1000 (1 - k/4)^2 - 1
    assert steps(length_0=1.0) == (999, 499, 332, 166)  # the first three times as long as the others
    assert free.decode(free.encode(4, 1) | {"partials_0": 1, "reach_0": 0.5}).timesteps == (999, 937, 749, 499, 249)


def test_a_hunt_knows_what_it_begins_with(teacher, described):
    space = SegmentSpace(teacher, described, (2, 5), (0,))
    found = space.encode(5, 0, 2) | {"interval_0": 0.1}
    hunt = Hunt(space, teacher, [0.5], 100, also=[found])
    assert hunt.start == [*space.known(), found] and (hunt.guidance, hunt.method) == (1.0, "nsga2")
    five = Plan.few_steps(5, "uniform", teacher)
    assert {five.key, space.decode(found).key} < hunt.known_keys
    assert five.key in Hunt(space, teacher, [0.5], 100).known_keys
    assert space.decode(found).key not in Hunt(space, teacher, [0.5], 100).known_keys


def test_what_a_schedule_consists_of(teacher, described):
    plan = Plan.segments([(3, described.branch(0)), (2, described.branch(1))], teacher, (LINE, HOLD))
    assert contents(plan, guided=False) == {"order": 1, "full": 2, "partial": 3, "forecast": 2, "null passes": 0}
    assert contents(plan, guided=True)["null passes"] == 5, "one pass stands for both"
    assert contents(plan.guided((1, 3), every=2), guided=True)["null passes"] == 2
