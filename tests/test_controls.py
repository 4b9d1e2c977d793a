"""Controls cost what the plan costs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.grid import cost
from lib.grid.plan import Plan
from lib.judging import controls
from lib.judging.controls import Control
from lib.judging.evaluate import Judge, distance


@pytest.fixture(scope="module")
def macs(unet):
    costs = cost.count(unet)
    return lambda plan: costs.executed(plan)


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


@pytest.fixture(scope="module")
def table(teacher):
    """A table whose plans' images lie a known way off the real ones: further, the fewer steps."""
    rng = np.random.default_rng(0)
    real, drawn = (torch.from_numpy(rng.standard_normal((2000, 3))) for _ in range(2))
    ddim = Plan.full(teacher.timesteps, teacher.schedule, teacher.blocks, 1)
    best = Plan.full(teacher.timesteps, teacher.schedule, teacher.blocks, 2)
    return controls.Table(lambda plan: drawn + 3 / plan.steps / plan.order, lambda plan: plan.steps,
                          Judge(real, "a classifier"), best, ddim)


def few(teacher, steps, order=1):
    return Plan.few_steps(steps, "uniform", teacher, order)


def test_a_row_holds_cost_score_and_ratios_to_both_teachers(table, teacher):
    row = table.rows({"five": few(teacher, 5)}, "control").iloc[0]
    own, best, ddim = (distance(table.features(plan), table.judge.real) for plan in (few(teacher, 5), table.reference,
                                                                                      table.ddim))
    assert (row["name"], row["kind"], row["n"], row["extractor"]) == ("five", "control", 2000, "a classifier")
    assert row["macs"] == 5 and row["macs_ratio"] == 2
    assert row["score"] == pytest.approx(own) and row["score_low"] < own < row["score_high"]
    assert row["ratio"] == pytest.approx(own / best) and row["ddim_ratio"] == pytest.approx(own / ddim)
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
    assert row["paired"] == pytest.approx(3 * (3 / 5 - 3 / 20) ** 2), "the same noise, moved alike in three features"


def test_verdicts_say_who_is_better(table, teacher):
    others = [Control("worse", ((few(teacher, 2), 1.0),)), Control("same", ((few(teacher, 5), 1.0),)),
              Control("better", ((few(teacher, 5, order=2), 1.0),)),
              Control("between", ((few(teacher, 4), 0.5), (few(teacher, 6), 0.5)))]
    rows = table.beside("mine", few(teacher, 5), others).set_index("name")
    assert rows.loc[["worse", "same", "better"], "better"].tolist() == ["plan", "tie", "control"]
    assert rows.loc["worse", "plan_over_control_high"] < 1 < rows.loc["better", "plan_over_control_low"]
    assert rows.loc["same", "plan_over_control"] == 1
    assert rows.loc["between", "macs"] == rows.loc["between", "plan_macs"] == 5
    four, six = (distance(table.features(few(teacher, steps)), table.judge.real) for steps in (4, 6))
    assert rows.loc["between", "score"] == pytest.approx(np.sqrt(four * six))


def test_features_in_many_rows_are_judged_once_each(table, teacher, monkeypatch):
    seen = {steps: table.features(few(teacher, steps)) for steps in (4, teacher.steps)}
    judged = []

    def further(_, features):
        judged.append(features)
        return {"recall": float(features[0, 0])}

    monkeypatch.setattr(Judge, "further", further)
    kept = replace(table, features=lambda plan: seen[plan.steps])
    rows = kept.beside("mine", table.ddim, [Control(name, ((few(teacher, 4), 1.0),)) for name in ("one", "two")])
    rows = pd.concat([rows, kept.rows({"mine": table.ddim}, "control")])
    assert rows["recall"].tolist() == [float(seen[steps][0, 0]) for steps in (4, 4, teacher.steps)]
    assert len(judged) == 2


def test_the_best_solver_is_the_one_with_the_lower_score(table):
    assert controls.best_solver(table.judge, table.features, [table.ddim, table.reference]) is table.reference
