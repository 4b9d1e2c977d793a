"""The rows of Flexiffusion's claims."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.grid.plan import Plan
from lib.judging.evaluate import Judge, Prompts
from lib.study import settings

TWICE, FIRST, FIVE = (text for _, _, text in settings.CLAIMS)


@pytest.mark.parametrize(("solver", "times", "guided", "claim"), [
    ("DDIM", 1.5, True, TWICE), ("DDIM", 2.58, True, FIRST), ("DDIM", 5.2, True, FIRST), ("PLMS", 5.2, True, FIVE),
    ("PLMS", 2.6, True, "-"), ("DDIM", 5.2, False, FIRST), ("PLMS", 2.6, False, FIRST)])
def test_the_claim_is_the_greatest_that_is_reached_and_of_the_same_solver(solver, times, guided, claim):
    found, factor = settings.claimed(solver, times, guided)
    assert found == claim and (np.isnan(factor) if claim == "-" else f"{factor:g} times" in claim)


@pytest.fixture
def bank():
    """Features of plans of S steps that lie 3 / S off the real ones; `tried` holds the plans that were asked for."""
    drawn, seen = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 3))), {}

    def features(plan, title=None, by=None):
        return seen.setdefault(plan.steps, drawn + 3 / plan.steps)

    return SimpleNamespace(features=features, tried=seen)


def test_it_keeps_a_score_and_stops_at_the_fewest_steps_that_do(teacher, bank):
    judge = Judge(bank.features(SimpleNamespace(steps=10**9)), "a classifier")
    near = judge.over(bank.features(SimpleNamespace(steps=5)), bank.features(teacher))
    assert near.holds == "no", "so five steps do not keep it"
    plan = Plan.few_steps(8, "uniform", teacher)
    row = settings.kept(judge, bank, plan, teacher, "ratio", "it")
    assert row["ratio"] == pytest.approx(judge.over(bank.features(plan), bank.features(teacher)).ratio.value)
    assert row["DDIM steps that keep it"] == 10 and list(row)[-1] == "DDIM steps that keep it"
    assert settings.steps_that_keep(judge, bank, teacher, (5, 10, 20)) == 10 and 20 not in bank.tried
    assert np.isnan(settings.steps_that_keep(judge, bank, teacher, (3, 5, 20)))


def test_it_keeps_prompts(teacher):
    class Reader:
        """Reads a wrong character in the images whose first feature is 1."""

        name = "a classifier"

        def told(self, features):
            return features[:, :1].long()

    wrong = {steps: (torch.arange(2000)[:, None] % 20 < 20 * share).double()
             for steps, share in ((3, 0.25), (5, 0.25), (8, 0.05), (10, 0.05))}
    bank = SimpleNamespace(features=lambda plan, title=None, by=None: wrong[plan.steps])
    prompts = Prompts(Reader(), torch.zeros(2000, 1, dtype=torch.long))
    row = settings.kept_prompts(prompts, bank, Plan.few_steps(5, "uniform", teacher), teacher)
    assert (row["prompt score"], row["prompt score there"]) == (pytest.approx(0.75), pytest.approx(0.95))
    assert row["prompts_holds"] == "no" and row["DDIM steps that keep prompts"] == 8


def test_a_plan_over_its_controls():
    rows = pd.DataFrame({"name": ["DDIM, uniform", "DeepCache, branch 0", "random cells"],
                         "plan_over_control": [0.9, 0.5, 0.1],
                         "plan_over_control_word": ["undecided", "better", "better"],
                         "nearness_over_control_word": ["better", "worse", "worse"], "strongest": [False, True, False]})
    assert settings.over_controls(rows) == {
        "as many DDIM steps": 0.9, "as many DDIM steps, word": "undecided",
        "nearness over as many DDIM steps, word": "better",
        "DeepCache": 0.5, "DeepCache, word": "better", "strongest": "DeepCache, branch 0",
        "over the strongest": 0.5, "over the strongest, word": "better"}
    alone = settings.over_controls(rows.iloc[[0, 2]].assign(strongest=[True, False]))
    assert np.isnan(alone["DeepCache"]) and alone["DeepCache, word"] == "-"
