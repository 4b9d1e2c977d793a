"""The search: finds, respects the budget, evaluates nothing twice, resumes. And Flexiffusion's space."""

import itertools

import numpy as np
import pytest
from optuna.distributions import IntDistribution

from lib import cost
from lib.flexiffusion import SegmentSpace
from lib.plan import Plan
from lib.search import Found, pareto, search


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
    return search(Toy(teacher), error, macs, trials=trials, population=10, seed=0, journal=journal, **options)


def test_it_repeats_and_draws_better_than_random(teacher, tmp_path):
    one, two = (run(teacher, tmp_path / name) for name in ("one", "two"))
    assert [found.plan.key for found in one] == [found.plan.key for found in two]
    assert len({found.plan.key for found in one}) == len(one) == 60
    random = run(teacher, tmp_path / "three", method="random")
    assert np.median([found.error for found in one[30:]]) < np.median([found.error for found in random[30:]])


def test_no_evaluation_is_spent_over_the_budget(teacher, tmp_path):
    found = run(teacher, tmp_path / "journal", trials=30, budget=10)
    assert max(one.macs for one in found) <= 10
    with pytest.raises(ValueError, match="none of 500 genomes cost at most -1 MACs: raise the budget"):
        run(teacher, tmp_path / "other", budget=-1)


def test_it_starts_from_known_genomes(teacher, tmp_path):
    found = run(teacher, tmp_path / "journal", trials=2, start=[{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    assert [one.plan.timesteps[1:] for one in found] == [(899, 98), (897, 96)]


def test_it_resumes_and_loses_only_the_running_trial(teacher, tmp_path):
    calls = []

    def breaks(plan):
        if len(calls) == 20:
            raise KeyboardInterrupt
        calls.append(plan.key)
        return error(plan)

    arguments = {"trials": 40, "population": 10, "seed": 0, "journal": tmp_path / "journal"}
    with pytest.raises(KeyboardInterrupt):
        search(Toy(teacher), breaks, macs, **arguments)
    before = list(calls)

    def counts(plan):
        calls.append(plan.key)
        return error(plan)

    found = search(Toy(teacher), counts, macs, **arguments)
    assert [one.plan.key for one in found][:20] == before
    assert len(calls) == len(set(calls)) == len(found) == 40


def test_the_front_holds_what_nothing_beats(teacher):
    plans = [Found(teacher, *pair) for pair in [(3, 1), (2, 2), (2, 3), (1, 4), (5, 5)]]
    assert [(one.error, one.macs) for one in pareto(plans)] == [(3, 1), (2, 2), (1, 4)]


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
    found = search(small, error, macs, trials=10, population=4, seed=0, journal=tmp_path / "journal")
    assert len(found) == 4


def test_a_start_genome_that_was_being_evaluated_is_not_lost(teacher, tmp_path):
    def breaks(plan):
        raise KeyboardInterrupt

    arguments = {"trials": 3, "population": 4, "seed": 0, "journal": tmp_path / "journal",
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
    assert cost.executed(unet, costs, space.decode(genome)) == 2 * costs.call + 4 * part[1] + 1 * part[0]


def test_genes_cover_every_interval(space):
    actives = {space.decode(space.encode(2, 0, 1) | {"interval_0": value}).steps - 1 for value in np.linspace(0, 1, 50)}
    assert actives == {1, 2, 3, 4, 5}


def test_what_does_not_fit_is_refused(teacher, described):
    with pytest.raises(ValueError, match="9 segments of 2 steps do not fit 10 steps"):
        SegmentSpace(teacher, described, (9,), (0,))
    with pytest.raises(ValueError, match=r"branch 6: this network has branches 0\.\.5"):
        SegmentSpace(teacher, described, (2,), (0, 6))
