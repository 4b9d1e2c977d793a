"""The third axis: schedules with a choice of the steps at which the null pass runs."""

import numpy as np
import pytest

from lib.grid.plan import COMPUTE, DROP, GIVEN, HOLD, LINE, NULL
from lib.methods.flexiffusion import FreeSpace
from lib.methods.guidance import FixedPlans, GuidedSpace
from lib.methods.search import search


@pytest.fixture
def space(teacher, described):
    return GuidedSpace(FreeSpace(teacher, described, (3, 4, 5), (0, 1), 2), reuses=(HOLD, LINE))


def test_guided_throughout_is_the_plain_schedule_for_both_passes(space):
    for genome in space.inner.known():
        plain, guided = space.inner.decode(genome), space.decode(space.encode(genome))
        assert guided.passes == (NULL, GIVEN) and guided.alone().key == plain.key
        assert (np.array(guided.states[0]) == np.array(guided.states[1])).all()


def test_genes_say_where_the_null_pass_runs(teacher):
    space = GuidedSpace(FixedPlans((teacher,)))
    genome = space.encode({"plan": 0}, begins=0.25, goes=0.5, every=2, holds="difference") | {"null_reuse": LINE}
    plan = space.decode(genome)
    last = teacher.steps - 1
    first = round(0.25 * last)
    until = first + round(0.5 * (last - first))
    wanted = [DROP if not first <= step <= until else LINE if (step - first) % 2 else COMPUTE
              for step in range(teacher.steps)]
    assert list(plan.net[plan.passes.index(NULL)]) == wanted and plan.null_holds == "difference"
    assert plan.alone().key == teacher.key


def test_what_the_null_pass_would_hold_changes_a_plan_only_where_it_holds(teacher):
    space = GuidedSpace(FixedPlans((teacher,)))
    keys = {(every, holds): space.decode(space.encode({"plan": 0}, begins=0.2, every=every, holds=holds)).key
            for every in (1, 2) for holds in ("output", "difference")}
    assert keys[1, "output"] == keys[1, "difference"] and len(set(keys.values())) == 3


def test_every_genome_is_a_plan_and_what_is_known_lies_in_the_space(space):
    genes = space.distributions()
    draw = np.random.default_rng(0)
    for genome in space.known():
        assert set(genome) == set(genes) and all(genes[name]._contains(genes[name].to_internal_repr(value))
                                                 for name, value in genome.items())
        space.decode(genome)
    for _ in range(50):
        chance = {name: draw.uniform(0, 1) for name in ("guidance_begins", "guidance_goes")}
        chance |= {name: draw.choice(genes[name].choices) for name in ("null_every", "null_reuse", "null_holds")}
        assert space.decode(space.inner.known()[0] | chance).steps >= 1


def test_a_search_finds_the_null_steps_that_matter(teacher, tmp_path):
    """Of a teacher whose images hang on the null pass in its middle alone, the search keeps the middle."""
    space = GuidedSpace(FixedPlans((teacher,)), everies=(1,))
    middle = teacher.steps // 2

    def error(plan):
        return float(plan.net[plan.passes.index(NULL)][middle] == DROP)

    error.key = "middle"
    found = search(space, error, lambda plan: sum(state == COMPUTE for net in plan.net for state in net), trials=60,
                   population=10, seed=0, storage=tmp_path / "journal", start=space.known(), title="middle")
    cheapest = min((one for one in found if not one.error), key=lambda one: one.macs)
    assert cheapest.macs <= teacher.steps + 0.4 * teacher.steps
