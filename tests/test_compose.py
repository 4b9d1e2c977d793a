"""Composition: any plan walks any of the models, and the joint space holds what the simpler spaces hold."""

import numpy as np
import pytest
import torch

from lib.grid import cost
from lib.grid.model import Model
from lib.grid.plan import HOLD, LINE, Plan
from lib.judging import controls, evaluate, extractor
from lib.judging.banks import Bank
from lib.methods import compose, diffnas
from lib.methods.compose import Run
from lib.methods.flexiffusion import FreeSpace


@pytest.fixture
def free(teacher, described):
    return FreeSpace(teacher, described, (3, 4, 5), (0, 1), 2, reuses=(HOLD, LINE))


def smaller(unet):
    return diffnas.student(diffnas.supernet(unet, diffnas.FormSpace((1, 3), (1.0,))),
                           {path: diffnas.Form(1, 3, form.width) for path, form in diffnas.forms(unet).items()})


@pytest.fixture
def banks(unet, schedule, tmp_path):
    """Makes banks of a teacher's and a student's images."""
    torch.manual_seed(0)
    looks = [extractor.Extractor("classes", 1, 16, [10]).eval()]
    models = {"teacher": Model(unet, schedule), "student": Model(smaller(unet), schedule)}
    return lambda name, kind=compose.Banks, models=models: kind(name, models, looks, count=6, seed=0, precision="fp32",
                                                                work=tmp_path)


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
    models = {"teacher": unet, "student": smaller(unet)}
    costs = {name: cost.count(model) for name, model in models.items()}

    def macs(run):
        return costs[run.model].executed(run.plan)

    target = 3 * costs["teacher"].call
    plans = [Plan.few_steps(steps, "uniform", teacher) for steps in range(1, 11)]
    one = controls.bracket("few", [Run("student", plan) for plan in plans], target, macs)
    other = compose.on("student", controls.bracket("few", plans, target, lambda plan: macs(Run("student", plan))))
    assert other.name == "few (student)" and other.plans == one.plans
    assert all(run.steps > 3 for run, _ in one.plans), "the student's steps are cheaper"
    assert sum(weight * macs(run) for run, weight in one.plans) == pytest.approx(target)


def test_banks_show_each_way_on_its_own_model(banks, teacher):
    both, plan = banks("search"), Plan.few_steps(2, "uniform", teacher)
    alone = banks("search", Bank, both.of["student"].model)
    assert torch.equal(both.features(Run("student", plan)), alone.features(plan))
    assert not torch.equal(both.features(Run("student", plan)), both.features(Run("teacher", plan)))


def test_a_search_on_a_student_imitates_the_teacher_and_chooses_on_a_second_bank(banks, teacher, described, tmp_path):
    first, second = banks("search"), banks("select")
    wanted = Run("teacher", Plan.few_steps(6, "uniform", teacher, 2))
    space = FreeSpace(teacher, described, (1, 2, 3, 4), (0,), 0)

    def far(seen, plan):
        return evaluate.imitation(seen.features(Run("student", plan)), seen.features(wanted), "rfid, shrunk")

    searches = compose.RunSearch(wanted, first, second, population=4, finalists=3, seed=0, storage=tmp_path / "journal")
    asked = {"number": 0, "budget": 3, "trials": 1, "start": space.known()}
    found = searches.search("steps", "student", space, lambda run: run.steps, **asked)
    assert len(found) == 7 and {one.macs for one in found} <= {1, 2, 3}, "six known within the budget, and one more"
    assert all(one.error == far(first, one.plan) for one in found)
    inside = sorted((one for one in found if 1 < one.macs <= 3), key=lambda one: one.error)[:3]
    best = min((one.plan for one in inside), key=lambda plan: far(second, plan))
    assert searches.winner("student", found, 1, 3) == Run("student", best)
    assert searches.winner("student", found, 3, 4) is None
    again = searches.search("steps", "student", space, lambda run: run.steps, **asked)
    assert [one.plan.key for one in again] == [one.plan.key for one in found], "it goes on from the journal"
