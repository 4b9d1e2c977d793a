"""Controls cost what the plan costs."""

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from lib.grid import cost
from lib.grid.plan import Plan
from lib.judging import controls
from lib.judging.controls import Control
from lib.judging.evaluate import Judge, Prompts, distance


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
    moved = cache(lambda far: drawn + far)  # the same tensor for the same plan, as a bank gives it
    far = {"a classifier": lambda calls: 3 / calls, "another": lambda calls: 0.05 * calls}  # the contrary
    return controls.Table(lambda plan, by="a classifier": moved(far[by](plan.steps * plan.order)),
                          lambda plan: drawn[:500] + 3 / plan.steps / plan.order, lambda plan: plan.steps,
                          Judge(real, "a classifier"), Judge(real, "another"), best, ddim, few(teacher, 8, 2))


def few(teacher, steps, order=1):
    return Plan.few_steps(steps, "uniform", teacher, order)


def test_the_fewest_steps_that_will_do(table, teacher):
    ladder = [few(teacher, steps, 2) for steps in (40, 20, 9, 8)]  # of which the first two are better than the best
    assert controls.fewest(table.judge, table.features, ladder, table.reference).steps == 20
    assert controls.fewest(table.judge, table.features, ladder[2:], table.reference) is table.reference
    assert controls.enough(few(teacher, 8), ladder, few(teacher, 10), 99).startswith("With 8 steps in place of 10 the")
    none = controls.enough(few(teacher, 10), ladder, few(teacher, 10), 99)
    assert "that were tried (8, 9, 20, 40) none" in none and "the best teacher's 10 at n = 99" in none
    row = table.row(Control("one", ((few(teacher, 4), 1.0),)), "control")
    assert row["macs_ratio"] == 10 / 4 and row["honest_factor"] == 8 / 4


def corrected(table, plan, judge=None):
    judge = judge or table.judge
    return judge.score(table.features(plan, by=judge.extractor)).estimate.value


def test_a_row_holds_cost_score_and_ratios_to_both_teachers(table, teacher):
    row = table.rows({"five": few(teacher, 5)}, "control").iloc[0]
    own, best, ddim = (corrected(table, plan) for plan in (few(teacher, 5), table.reference, table.ddim))
    assert (row["name"], row["kind"], row["n"], row["extractor"]) == ("five", "control", 2000, "a classifier")
    assert row["macs"] == 5 and row["macs_ratio"] == 2 and row["second_extractor"] == "another"
    assert row["raw"] == pytest.approx(distance(table.features(few(teacher, 5)), table.judge.real))
    assert row["score"] == pytest.approx(own) and row["score_low"] < own < row["score_high"]
    assert row["second_score"] == pytest.approx(corrected(table, few(teacher, 5), table.second))
    assert row["ratio"] == pytest.approx(own / best) and row["ddim_ratio"] == pytest.approx(own / ddim)
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"] and row["ratio_word"] == "worse"
    other = corrected(table, table.reference, table.second)
    assert row["second_ratio"] == pytest.approx(corrected(table, few(teacher, 5), table.second) / other)
    assert row["second_ratio_word"] == "better"
    assert 0 <= row["precision_low"] <= row["precision"] <= row["precision_high"] <= 1
    assert row["recall_low"] < row["recall"] < row["recall_high"]
    assert row["paired"] == pytest.approx(3 * (3 / 5 - 3 / 20) ** 2), "the same noise, moved alike in three features"


def test_words_say_who_is_better_and_the_strongest_is_chosen_elsewhere(table, teacher):
    others = [Control("worse", ((few(teacher, 2), 1.0),)), Control("same", ((few(teacher, 5), 1.0),)),
              Control("better", ((few(teacher, 5, order=2), 1.0),)),
              Control("between", ((few(teacher, 4), 0.5), (few(teacher, 6), 0.5)))]
    rows = table.beside("mine", few(teacher, 5), others).set_index("name")
    assert rows.loc[["worse", "same", "better"], "plan_over_control_word"].tolist() == ["better", "as good", "worse"]
    assert rows.loc[["worse", "better"], "second_over_control_word"].tolist() == ["worse", "better"], "of the contrary"
    twice = corrected(table, few(teacher, 5), table.second) / corrected(table, few(teacher, 2), table.second)
    assert rows.loc["worse", "second_over_control"] == pytest.approx(twice)
    assert rows.loc["worse", "plan_over_control_high"] < 1 < rows.loc["better", "plan_over_control_low"]
    assert rows.loc["same", "plan_over_control"] == pytest.approx(1)
    assert rows.loc["worse", "nearness_over_control"] == pytest.approx(((3 / 5 - 3 / 20) / (3 / 2 - 3 / 20)) ** 2)
    assert rows.loc[["worse", "better"], "nearness_over_control_word"].tolist() == ["better", "worse"]
    assert rows.loc["between", "macs"] == rows.loc["between", "plan_macs"] == 5
    four, six = (corrected(table, few(teacher, steps)) for steps in (4, 6))
    assert rows.loc["between", "score"] == pytest.approx(np.sqrt(four * six))
    assert rows.index[rows["strongest"]].tolist() == ["better"]
    lucky = replace(table, select=lambda plan: table.features(few(teacher, 2) if plan.order == 2 else plan))
    rows = lucky.beside("mine", few(teacher, 5), others).set_index("name")
    assert rows.index[rows["strongest"]].tolist() == ["same"], "whatever the report's noise says"


def test_to_lose_to_a_dearer_control_says_nothing(table, teacher):
    others = [Control("dearer", ((few(teacher, 6, 2), 1.0),)), Control("as dear", ((few(teacher, 5), 1.0),)),
              Control("cheaper", ((few(teacher, 4), 1.0),))]

    def strongest(of, price=None):
        rows = table.beside("mine", few(teacher, 5), of, price).set_index("name")
        return rows.index[rows["strongest"]].tolist()

    assert strongest(others) == ["as dear"]
    assert strongest(others, lambda plan: 1.0) == ["dearer"], "it is not by this price"
    assert strongest(others, lambda plan: {6: 1.04, 5: 1.0, 4: 0.5}[plan.steps]) == ["dearer"], "4 % are no difference"
    assert strongest(others[:1]) == ["dearer"], "nothing else is known"


def test_a_controls_plans_are_scored_one_by_one(table, teacher):
    pair = ((few(teacher, 4), 0.5), (few(teacher, 6), 0.5))
    rows = table.singles([Control("searched steps", pair), Control("searched steps", pair[:1]),
                          Control("learned steps (teacher), by seconds", pair[:1])])
    assert rows["name"].tolist() == ["searched steps, 4 steps", "searched steps, 6 steps",
                                     "learned steps (teacher), by seconds, 4 steps"]
    assert rows["family"].tolist() == ["searched steps", "searched steps", "learned steps (teacher)"]
    assert rows["macs"].tolist() == [4, 6, 4]
    assert table.singles([]).empty


def test_where_prompts_are_drawn_their_score_stands_in_each_row(table, teacher):
    class Reader:
        """Reads a wrong character in as many of 20 images as the first feature says."""

        name = "a classifier"

        def told(self, features):
            return (torch.arange(2000) % 20 < features[0, 0])[:, None].long()

    seen = {steps: table.features(few(teacher, steps)).clone() for steps in (2, 5, teacher.steps)}
    for steps, wrong in ((teacher.steps, 1), (5, 2), (2, 5)):  # 5, 10 and 25 in 100 images
        seen[steps][0, 0] = wrong
    asking = replace(table, features=lambda plan, by=None: seen[plan.steps], reference=few(teacher, teacher.steps),
                     prompts=Prompts(Reader(), torch.zeros(2000, 1, dtype=torch.long)))
    row = asking.row(Control("between", ((few(teacher, 5), 0.5), (few(teacher, 2), 0.5))), "control")
    assert row["prompt_score"] == pytest.approx(1 - 0.175) and row["prompts_holds"] == "no"
    rows = asking.beside("mine", few(teacher, 5), [Control("fewer", ((few(teacher, 2), 1.0),))])
    assert rows["prompts_over_control_word"].tolist() == ["better"]
    assert {"prompt_score", "prompts_over_control_word"} <= set(controls.shown(rows, beside=True))
    assert "prompt_score" not in table.row(Control("one", ((few(teacher, 4), 1.0),)), "control")


def test_where_no_ratio_is_known_the_difference_is_shown():
    ends = ("", "_low", "_high")
    columns = {f"{name}{end}": [1.0, 2.0] for name in ("ratio", "ratio_difference") for end in ends}
    table = pd.DataFrame({"name": ["a", "b"], "score": [1.0, 2.0], "recall": [np.nan] * 2, **columns})
    assert controls.shown(table) == ["name", "score", *(f"ratio{end}" for end in ends)]
    at_floor = table.assign(**{f"ratio{end}": np.nan for end in ends})
    assert controls.shown(at_floor) == ["name", "score", *(f"ratio_difference{end}" for end in ends)]
    one = at_floor.assign(ratio=[np.nan, 1.0], ratio_low=[np.nan, 1.0], ratio_high=[np.nan, 1.0])
    assert controls.shown(one) == controls.shown(table)


def test_words_are_counted_and_controls_named_by_them():
    rows = pd.DataFrame({"name": ["a", "b", "c"], "plan_over_control_word": ["better", "worse", "better"]})
    assert controls.words(rows) == {"comparisons_better": 2, "comparisons_as_good": 0, "comparisons_undecided": 0,
                                    "comparisons_worse": 1}
    lines = controls.by_word(rows).splitlines()
    assert lines == ["  better    a; c", "  as good   -", "  undecided -", "  worse     b"]


def test_a_summary_counts_and_says_what_would_decide():
    text = controls.summary(pd.DataFrame({"plan_over_control_word": ["better", "undecided", "undecided", "worse"],
                                          "plan_over_control_needs": [1.0, 4000.0, 8000.0, 2.0], "n": 700}))
    assert text == ("4 comparisons at n = 700: 1 better, 0 as good, 2 undecided, 1 worse. Were there no differences at "
                    "all, chance would call 0.2 better or worse. Half of the undecided would be decided by n = 6,000.")


def test_features_in_many_rows_are_judged_once_each(table, teacher, monkeypatch):
    seen = {steps: table.features(few(teacher, steps)) for steps in (4, teacher.steps)}
    judged = []

    def further(_, features):
        judged.append(features)
        return {"recall": float(features[0, 0])}

    monkeypatch.setattr(Judge, "further", further)
    kept = replace(table, features=lambda plan, by=None: seen[plan.steps], select=lambda plan: seen[plan.steps])
    rows = kept.beside("mine", table.ddim, [Control(name, ((few(teacher, 4), 1.0),)) for name in ("one", "two")])
    rows = pd.concat([rows, kept.rows({"mine": table.ddim}, "control")])
    assert rows["recall"].tolist() == [float(seen[steps][0, 0]) for steps in (4, 4, teacher.steps)]
    assert len(judged) == 2


def test_the_best_solver_is_the_one_with_the_lower_score(table):
    assert controls.best_solver(table.judge, table.select, [table.ddim, table.reference]) is table.reference
