"""The rows of the papers' claims."""

import numpy as np
import pandas as pd
import pytest

from lib.study import claims


def compared(name, value, holds="no", needs=np.nan, word="worse"):
    """The columns of a contrast; at the floor there is a difference and no ratio."""
    ratio = {f"{name}{end}": value + step for end, step in (("", 0), ("_low", -0.1), ("_high", 0.1))}
    difference = {f"{name}_difference{end}": step for end, step in (("", 0.5), ("_low", 0.25), ("_high", 0.75))}
    return {**ratio, **difference, f"{name}_word": word, f"{name}_holds": holds, f"{name}_holds_needs": needs}


@pytest.mark.parametrize(("holds", "needs", "said"), [
    ("yes", 90, "yes"), ("no", np.nan, "no"), ("undecided", 10566.4, "undecided (n = 10,566)"),
    ("undecided", np.nan, "undecided")])
def test_only_an_undecided_claim_says_how_many_images_would_decide(holds, needs, said):
    assert claims.holds(compared("ratio", 1.0, holds, needs), "ratio") == said


def test_a_cheaper_way_is_judged_by_its_ratio_or_at_the_floor_by_the_difference():
    row = {"macs_ratio": 2.264, **compared("ratio", 3.6)}
    found = claims.cheaper("DiffNAS", "half", np.nan, "20 steps", row, "ratio", "a control")
    assert found == {"paper": "DiffNAS", "claimed": "half", "setting": "20 steps", "control": "a control",
                     "holds": "no",
                     "measured": "2.26 times fewer MACs at 3.6 [3.5, 3.7] times the score"}
    found = claims.cheaper("DiffNAS", "half", np.nan, "20 steps", row | compared("ratio", np.nan), "ratio", "-")
    assert found["measured"] == "2.26 times fewer MACs at a score higher by 0.5 [0.25, 0.75]"
    turned = {f"ratio_difference{end}": value for end, value in (("", -0.5), ("_low", -0.75), ("_high", 0.25))}
    lower = row | compared("ratio", np.nan) | turned
    found = claims.cheaper("DiffNAS", "half", np.nan, "20 steps", lower, "ratio", "-")
    assert found["measured"] == "2.26 times fewer MACs at a score lower by 0.5 [-0.25, 0.75]"
    prompted = claims.cheaper("DiffNAS", "half", np.nan, "20 steps", row | {"prompt_score": 0.9}, "ratio", "-")
    assert prompted["measured"].endswith("times the score; prompt score 0.900")
    assert claims.cheaper("DiP-GO", "2 times", 2.0, "20 steps", row, "ratio", "-")["holds"].startswith("not tested")


@pytest.mark.parametrize(("claimed", "said"), [("2.4 times faster", "no"),
                                               ("2.3 times faster", "not tested: cheaper than claimed")])
def test_a_transformers_plan_is_judged_at_the_claimed_factor(claimed, said):
    row = {"claimed": claimed, "here": "DDIM", "times fewer MACs": 2.5, **compared("ratio", 1.2),
           **{f"over {name}{end}": value for name in ("even", "as many DDIM steps")
              for end, value in (("", 1.1), ("_word", "worse"))}}
    assert claims.transformer(row)["holds"] == said


def test_a_loss_is_judged_as_notebook_03_did():
    row = {"claimed": "joint helps", "here": "3 trainings", "ratio": 0.763, "ratio_low": 0.659, "ratio_high": 0.883}
    assert claims.joint_loss(row | {"holds": "yes"}) == {
        "paper": "DiffNAS", "claimed": "joint helps", "setting": "3 trainings", "holds": "yes", "control": "-",
        "measured": "0.763 [0.659, 0.883] times the score"}
    at_floor = claims.joint_loss(row | compared("ratio", np.nan) | {"holds": "no"})
    assert at_floor["measured"] == "a score higher by 0.5 [0.25, 0.75]"


SCHEDULE = {"here": "PLMS, T = 50", "times": 5.614, "claimed times": 5.4, "full steps alone": False,
            **compared("ratio", 1.6), "as many DDIM steps": 1.844, "as many DDIM steps, word": "worse",
            "DeepCache": 0.79, "DeepCache, word": "undecided", "strongest": "searched steps",
            "over the strongest": 3.2, "over the strongest, word": "worse"}
PROMPTED = {"prompt score": 0.903, "prompt score there": 0.947, "DDIM steps that keep prompts": 3.0,
            **compared("prompts", np.nan, "undecided", 500)}


def test_a_claim_about_clip_is_judged_by_prompts_where_there_are_some():
    plain = claims.schedule(SCHEDULE | {"claimed": "5.1 times, CLIP all but equal"})
    assert plain["holds"] == "no" and plain["setting"] == "PLMS, T = 50" and plain["paper"] == "Flexiffusion"
    assert plain["measured"] == "5.61 times fewer MACs at 1.6 [1.5, 1.7] times the score"
    assert plain["control"] == ("worse (1.84) over as many DDIM steps; undecided (0.79) over DeepCache; worse (3.20) "
                                "over searched steps")
    alone = claims.schedule(SCHEDULE | {"claimed": "2 times", "DeepCache": np.nan, "DeepCache, word": "-"})
    assert alone["control"] == "worse (1.84) over as many DDIM steps; worse (3.20) over searched steps"
    prompted = claims.schedule(SCHEDULE | PROMPTED | {"claimed": "5.1 times, CLIP all but equal"})
    assert prompted["holds"] == "undecided (n = 500)"
    assert prompted["measured"] == plain["measured"] + ("; prompt score 0.903, the full run's 0.947 (kept: undecided; "
                                                        "fewest DDIM steps that keep it: 3)")
    assert claims.schedule(SCHEDULE | PROMPTED | {"claimed": "2.6 times"})["holds"] == "no", "no word of CLIP"


@pytest.mark.parametrize(("kept", "factor", "said"), [
    ("yes", 2.6, "yes"), ("no", 2.6, "not tested: cheaper than claimed"), ("no", 5.35, "no"),
    ("undecided", 5.3, "not tested: cheaper than claimed")])
def test_a_schedule_much_cheaper_than_claimed_can_only_confirm_a_claim(kept, factor, said):
    row = claims.schedule(SCHEDULE | compared("ratio", 1.6, kept) | {"claimed": "some", "claimed times": factor})
    assert row["holds"] == said
    assert f"1 {said.partition(':')[0]}" in claims.tally(pd.DataFrame([row]))


def test_a_schedule_of_full_steps_alone_is_told():
    row = claims.schedule(SCHEDULE | {"claimed": "some", "full steps alone": True})
    assert row["measured"].startswith("5.61 times fewer MACs (full steps alone) at ")


def test_pruning_is_judged_over_the_run_that_was_pruned():
    rows = pd.DataFrame([{"name": name, "base": "PLMS, T = 50", "macs": macs, "plan_macs": 25.0,
                          "strongest": name == "learned steps",
                          **compared("plan_over_control", value, holds, word=word)}
                         for name, macs, value, holds, word in (("fewer steps", 25.0, 1.2, "no", "worse"),
                                                                ("random cells", 25.0, 0.2, "yes", "better"),
                                                                ("learned steps", 25.0, 1.5, "no", "worse"),
                                                                ("the base", 110.0, 1.0, "yes", "as good"))])
    found = claims.pruning(rows.set_index("name"))
    assert found == {"paper": "DiP-GO", "claimed": claims.DIPGO, "setting": "PLMS, T = 50", "holds": "yes",
                     "measured": "4.40 times fewer MACs at 1 [0.9, 1.1] times the score",
                     "control": "worse (1.20) over fewer steps; worse (1.50) over learned steps"}
    prompted = rows.assign(**compared("prompts_over_control", np.nan, "no"))
    found = claims.pruning(prompted.set_index("name"))
    assert found["holds"] == "no" and found["measured"].endswith("times the score; prompt score -0.500")


def test_a_plan_is_set_beside_its_own_strongest_control():
    rows = pd.DataFrame({"plan": ["A", "A", "B"], "name": ["x", "y", "z"], "strongest": [False, True, True],
                         "plan_over_control": [3.0, 2.0, 1.0], "plan_over_control_word": ["worse", "worse", "as good"]})
    assert claims.strongest(rows, "A") == "worse (2.00) over y"
    at_floor = rows.assign(plan_over_control=np.nan)
    assert claims.strongest(at_floor, "A") == "worse (at the floor) over y"


def test_tests_are_counted_by_how_they_came_out():
    rows = pd.DataFrame({"holds": ["yes", "no", "undecided (n = 9)", "no", "-", "not tested: cheaper than claimed"]})
    assert claims.tally(rows) == "1 yes, 1 undecided, 2 no, 1 not tested"
