"""Flexiffusion's claims, each in the setting of its own: parts of a row of notebook 04's table of claims."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from lib.grid.plan import Plan
from lib.judging.banks import Bank
from lib.judging.estimates import Contrast
from lib.judging.evaluate import Measure

CLAIMS = (
    ("DDIM", 2.0, "later version: at least 2 times, FID less than 5 % worse (LDM at 250 DDIM steps, DDPM at 100)"),
    ("DDIM", 2.6, "first version: 2.6 times (LDM, 250 DDIM steps)"),
    ("PLMS", 5.1, "both versions: 5.1 times, CLIP all but equal (SD, 50 PLMS steps)"))
"""The solver, how many times cheaper, and the claim; factors rise."""
LADDER = (3, 5, 8, 10, 15, 20, 30, 50, 100)
"""Numbers of plain DDIM steps that are tried."""


def claimed(solver: str, times: float, guided: bool) -> tuple[str, float]:
    """Give the claim of the greatest factor that a schedule reaches to 1 %; below 2 times the one of 2 times.

    Claims about CLIP are of guided models alone.

    Parameters
    ----------
    solver : "DDIM" or "PLMS", of the run that the schedule was cut from
    times : float, how many times fewer MACs it executes
    guided : bool, whether the study's model is guided, as the papers' are; then only claims of this solver count

    Returns
    -------
    claim, factor : str and how many times cheaper; "-" and NaN where there is none
    """
    reached = max(1.01 * times, 2)
    matching = [(text, factor) for of, factor, text in CLAIMS
                if factor <= reached and (of == solver if guided else "CLIP" not in text)]
    return matching[-1] if matching else ("-", np.nan)


def steps_that_keep(measure: Measure, bank: Bank, target: Plan, ladder: Iterable[int] = LADDER) -> float:
    """Give the fewest plain DDIM steps that surely keep a measure of the target's images, within its margin.

    Parameters
    ----------
    ladder : numbers of steps, rising; those above the target's are not tried

    Returns
    -------
    steps : NaN where none of them do
    """
    for steps in [steps for steps in ladder if steps <= target.steps]:
        plan = Plan.few_steps(steps, "uniform", target)
        if _over(measure, bank, plan, target, f"DDIM, {steps}").holds == "yes":
            return steps
    return np.nan


def kept(measure: Measure, bank: Bank, plan: Plan, target: Plan, name: str, what: str) -> dict:
    """Compare a plan with the run that it was cut from, and say which plain DDIM steps would have kept as much.

    Parameters
    ----------
    name : of the columns of the `Contrast`
    what : is kept; it ends the name of the column of DDIM's steps
    """
    contrast = _over(measure, bank, plan, target, name)
    return contrast.columns(name) | {f"DDIM steps that keep {what}": steps_that_keep(measure, bank, target)}


def kept_prompts(prompts: Measure, bank: Bank, plan: Plan, target: Plan) -> dict:
    """Give the prompt scores of a plan and of the run that it was cut from, and `kept` of the prompts."""
    score, score_there = (1 - prompts.score(bank.features(part, by=prompts.extractor)).estimate.value
                          for part in (plan, target))
    return {"prompt score": score, "prompt score there": score_there,
            **kept(prompts, bank, plan, target, "prompts", "prompts")}


def _over(measure: Measure, bank: Bank, plan: Plan, target: Plan, title: str) -> Contrast:
    """Compare a plan's images with the target's, by what the measure's extractor sees of them."""
    return measure.over(*(bank.features(part, title=title, by=measure.extractor) for part in (plan, target)))


def over_controls(rows: pd.DataFrame) -> dict:
    """Give of a plan's rows of `lib.judging.controls.Table.beside` what its claim is judged by.

    Returns
    -------
    over : the plan's score over that of as many DDIM steps and of DeepCache, each with its word; the word
        of its distance to the best teacher's images over that of as many DDIM steps; and its strongest control, with
        its score over that one's and the word
    """
    rows = rows.set_index("name")
    ddim, caches = rows.loc["DDIM, uniform"], rows.filter(like="DeepCache", axis=0)
    strongest = rows[rows["strongest"]].iloc[0]
    return {"as many DDIM steps": ddim["plan_over_control"], "as many DDIM steps, word": ddim["plan_over_control_word"],
            "nearness over as many DDIM steps, word": ddim["nearness_over_control_word"],
            "DeepCache": (caches["plan_over_control"].tolist() or [np.nan])[0],
            "DeepCache, word": (caches["plan_over_control_word"].tolist() or ["-"])[0],
            "strongest": strongest.name, "over the strongest": strongest["plan_over_control"],
            "over the strongest, word": strongest["plan_over_control_word"]}
