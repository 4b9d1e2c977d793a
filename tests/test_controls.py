"""Controls cost what the plan costs."""

import pytest

from lib import controls, cost
from lib.plan import Plan


@pytest.fixture(scope="module")
def macs(unet):
    costs = cost.count(unet)
    return lambda plan: cost.executed(unet, costs, plan)


@pytest.mark.parametrize("share", [0.2, 0.37, 0.5, 0.83])
def test_every_control_costs_the_target(teacher, described, macs, share):
    target = int(share * macs(teacher))
    found = controls.at_equal_macs(target, teacher, described, macs, seed=0)
    names = {control.name for control in found}
    assert names >= {"DDIM, uniform", "DDIM, quadratic", "DPM-Solver++, uniform", "DPM-Solver++, quadratic",
                     "random cells"}
    assert ("DeepCache, branch 0" in names) == (macs(Plan.deepcache(10, described.branch(0), teacher)) <= target)
    for control in found:
        assert sum(weight for _, weight in control.plans) == pytest.approx(1)
        mean = sum(weight * macs(plan) for plan, weight in control.plans)
        assert mean == pytest.approx(target, abs=1), control.name


def test_a_member_of_the_very_cost_stands_alone(teacher, described, macs):
    target = 4 * macs(teacher) // teacher.steps
    found = {control.name: control for control in controls.at_equal_macs(target, teacher, described, macs, seed=0)}
    (plan, weight), = found["DPM-Solver++, uniform"].plans
    assert (plan.steps, plan.order, weight) == (4, 2, 1.0)


def test_the_bracket_takes_the_nearest_on_each_side(teacher):
    family = [Plan.few_steps(steps, "uniform", teacher) for steps in (2, 4, 7, 9)]
    found = controls.bracket("few", family, 5, lambda plan: plan.steps)
    assert [plan.steps for plan, _ in found.plans] == [4, 7]
    assert [weight for _, weight in found.plans] == pytest.approx([2 / 3, 1 / 3])
    assert controls.bracket("few", family, 1, lambda plan: plan.steps) is None
    assert controls.bracket("few", family, 10, lambda plan: plan.steps) is None
