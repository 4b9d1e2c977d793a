"""Composition: any plan walks any of the models, and the joint space holds what the simpler spaces hold."""

import numpy as np
import pytest

from lib.grid import cost
from lib.grid.plan import HOLD, LINE, Plan
from lib.judging import controls
from lib.methods import compose, diffnas
from lib.methods.compose import Way
from lib.methods.flexiffusion import FreeSpace


@pytest.fixture
def free(teacher, described):
    return FreeSpace(teacher, described, (3, 4, 5), (0, 1), 2, reuses=(HOLD, LINE))


def test_the_joint_space_begins_as_the_free_space(free):
    joint = compose.JointSpace(free)
    for genome in free.known():
        assert joint.decode(joint.encode(genome)).key == free.decode(genome).key
    assert set(free.distributions()) < set(joint.distributions()) == set(joint.encode(free.known()[0]))


def test_a_reused_level_reuses_in_one_full_step_alone(free, described):
    joint = compose.JointSpace(free)
    genome = joint.encode(free.encode(4, 2, 1, 1))
    plain = joint.decode(genome)
    changed = joint.decode(genome | {"reuse_2_up0": HOLD, "reuse_2_mid": LINE})
    second_full = np.flatnonzero(plain.computes.all(axis=1))[2]
    steps, blocks = np.nonzero(plain.computes != changed.computes)
    assert set(steps) == {second_full}
    states = {(described.blocks[place].level, changed.cells[step, place]) for step, place in zip(steps, blocks)}
    assert states == {("up0", HOLD), ("mid", LINE)}
    assert (changed.timesteps, changed.order) == (plain.timesteps, plain.order)


def test_a_control_is_put_on_a_model(unet, teacher, described):
    small = diffnas.student(diffnas.supernet(unet, diffnas.FormSpace((1, 3), (1.0,))),
                            {path: diffnas.Form(1, 3, form.width) for path, form in diffnas.forms(unet).items()})
    models = {"teacher": unet, "student": small}
    costs = {name: cost.count(model) for name, model in models.items()}

    def macs(way):
        return costs[way.model].executed(way.plan)

    target = 3 * costs["teacher"].call
    plans = [Plan.few_steps(steps, "uniform", teacher) for steps in range(1, 11)]
    one = controls.bracket("few", [Way("student", plan) for plan in plans], target, macs)
    other = compose.on("student", controls.bracket("few", plans, target, lambda plan: macs(Way("student", plan))))
    assert other.name == "few (student)" and other.plans == one.plans
    assert all(way.steps > 3 for way, _ in one.plans), "the student's steps are cheaper"
    assert sum(weight * macs(way) for way, weight in one.plans) == pytest.approx(target)
