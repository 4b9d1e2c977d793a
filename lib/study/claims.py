"""Rows of the papers' claims: what a paper says, in which setting it is tested, what was measured, whether it holds.

All columns are text: *control* says how the plan's score compares with what else the same MACs buy. What is measured
comes from tables that other notebooks wrote, whose columns `lib.judging.estimates.Contrast.columns` named.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lib.judging import estimates

COLUMNS = ["paper", "claimed", "setting", "measured", "control", "holds"]
"""Of a row."""

DIPGO = "4.4 times faster (SD, 50 PLMS steps) without loss"
DIPGO_TIMES = 4.4
"""What DiP-GO's abstract and first table claim, in words and as a factor."""


def holds(row: Mapping, value: str) -> str:
    """Say whether a score is kept and, where that is undecided, how many images would decide.

    Parameters
    ----------
    row : with the columns of a `lib.judging.estimates.Contrast` of this name
    value : str, such as "ratio"
    """
    word, needed = row[f"{value}_holds"], row[f"{value}_holds_needs"]
    return f"{word} (n = {needed:,.0f})" if word == "undecided" and pd.notna(needed) else word


def tested(word: str, times: float, claimed: float) -> str:
    """Give the word on a claim: *not tested* of a plan that loses the score, but saves over 5 % more than was claimed.

    Parameters
    ----------
    word : str, of `holds`
    times, claimed : how many times cheaper the plan is, and ought to be; NaN where the claim names no factor
    """
    return "not tested: cheaper than claimed" if word != "yes" and times > (1 + estimates.MARGIN) * claimed else word


def kept(row: Mapping, value: str, of: str = "") -> str:
    """Write out how a score compares: by its ratio or, where a score is at the floor, by the difference.

    Parameters
    ----------
    row, value : as `holds` takes them
    of : str, what it is compared with; left out where that stands elsewhere
    """
    if pd.isna(row[value]):
        return f"a score {estimates.shift(row, f'{value}_difference')}{f' than that of {of}' * bool(of)}"
    return f"{estimates.text(row, value)} times the score{f' of {of}' * bool(of)}"


def over(word: str, ratio: float, name: str) -> str:
    """Say how a plan's score compares with a control's: "worse (1.84) over searched steps"; a ratio may be NaN."""
    return f"{word} ({'at the floor' if pd.isna(ratio) else f'{ratio:.2f}'}) over {name}"


def strongest(rows: pd.DataFrame, plan: str) -> str:
    """Say how a plan compares with its strongest control, from rows of `lib.judging.controls.Table.beside`."""
    row = rows[(rows["plan"] == plan) & rows["strongest"]].iloc[0]
    return over(row["plan_over_control_word"], row["plan_over_control"], row["name"])


def cheaper(paper: str, claimed: str, times: float, setting: str, row: Mapping, value: str, control: str
            ) -> dict[str, str]:
    """Give the row of a claim to be cheaper at no loss.

    Parameters
    ----------
    paper, claimed, setting, control : str, as they are to be read
    times : float, the claimed factor as `tested` takes it
    row : with `macs_ratio` (times fewer executed MACs) and the columns of `value`
    value : str, as `holds` takes it
    """
    measured = f"{row['macs_ratio']:.2f} times fewer MACs at {kept(row, value)}"
    if pd.notna(row.get("prompt_score")):
        measured += f"; prompt score {row['prompt_score']:.3f}"
    return {"paper": paper, "claimed": claimed, "setting": setting, "measured": measured, "control": control,
            "holds": tested(holds(row, value), row["macs_ratio"], times)}


def network(students: pd.DataFrame) -> dict[str, str]:
    """Give the row of DiffNAS's claim about its network, from notebook 02's table of students."""
    row = students[students["name"].str.startswith("DiffNAS")].iloc[0]
    setting = f"DPM-Solver++, {row['steps']} steps" + f", trained {row['trainings']} x" * bool(row["trainings"] > 1)
    return cheaper("DiffNAS", "about half the MACs and parameters, on a par with the teacher", np.nan, setting, row,
                   "ratio", "-")


def gates(front: pd.DataFrame, controls: pd.DataFrame, steps: int) -> list[dict[str, str]]:
    """Give the rows of DiP-GO's claim over a DDIM run, from notebook 05's tables of its plans and of their controls."""
    pruned = front[front["name"].str.fullmatch(r"DiP-GO, [\d.]+%")]
    return [cheaper("DiP-GO", DIPGO, DIPGO_TIMES, f"DDIM, T = {steps}", row, "ddim_ratio",
                    strongest(controls, row["name"])) for row in pruned.to_dict("records")]


def joint_loss(row: Mapping) -> dict[str, str]:
    """Give the row of a claim of DiffNAS about its loss, from notebook 03's table of claims."""
    return {"paper": "DiffNAS", "claimed": row["claimed"], "setting": row["here"], "measured": kept(row, "ratio"),
            "control": "-", "holds": row["holds"]}


def schedule(row: Mapping) -> dict[str, str]:
    """Give the row of a claim of Flexiffusion in its own setting, by its own measure, from notebook 04's table.

    Where images have prompts, a claim that speaks of CLIP is judged by the prompt score, all others by the score. A
    schedule that does not keep it is no test where it is more than 5 % cheaper than claimed.
    """
    alone = " (full steps alone)" if row["full steps alone"] else ""
    measured = f"{row['times']:.2f} times fewer MACs{alone} at {kept(row, 'ratio')}"
    control = "; ".join(over(row[f"{column}, word"], row[column], name) for column, name in (
        ("as many DDIM steps", "as many DDIM steps"), ("DeepCache", "DeepCache"),
        ("over the strongest", row["strongest"])) if row[f"{column}, word"] != "-")  # it met the budget
    prompted = "prompts_holds" in row
    if prompted:
        steps = row["DDIM steps that keep prompts"]
        measured += (f"; prompt score {row['prompt score']:.3f}, the full run's {row['prompt score there']:.3f} "
                     f"(kept: {row['prompts_holds']}; fewest DDIM steps that keep it: "
                     f"{'none tried' if pd.isna(steps) else f'{steps:.0f}'})")
    word = holds(row, "prompts" if prompted and "CLIP" in row["claimed"] else "ratio")
    return {"paper": "Flexiffusion", "claimed": row["claimed"], "setting": row["here"], "measured": measured,
            "control": control, "holds": tested(word, row["times"], row["claimed times"])}


def pruning(rows: pd.DataFrame) -> dict[str, str]:
    """Give the row of DiP-GO's claim in its own setting, by the prompt score where there are prompts.

    Parameters
    ----------
    rows : of one plan over its controls, from notebook 05's table of bases, indexed by the controls' names, one of
        which is "the base": the run that was pruned; told are those of fewer steps, and the strongest
    """
    row, others = rows.loc["the base"], rows.drop("the base")
    others = others[others.index.str.startswith("fewer steps") | others["strongest"]]
    value, prompted = "plan_over_control", "prompts_over_control_holds" in rows
    times = row["macs"] / row["plan_macs"]
    measured = f"{times:.2f} times fewer MACs at {kept(row, value)}"
    control = "; ".join(over(other[f"{value}_word"], other[value], name) for name, other in others.iterrows())
    if prompted:
        measured += f"; prompt score {-row['prompts_over_control_difference']:+.3f}"
    return {"paper": "DiP-GO", "claimed": DIPGO, "setting": row["base"], "measured": measured,
            "control": control,
            "holds": tested(holds(row, "prompts_over_control" if prompted else value), times, DIPGO_TIMES)}


def transformer(row: Mapping) -> dict[str, str]:
    """Give the row of a claim of DiP-GO on a transformer, from notebook 07's table."""
    control = "; ".join(over(row[f"over {column}_word"], row[f"over {column}"], name) for column, name in (
        ("even", "steps left out evenly"), ("as many DDIM steps", "as many DDIM steps")))
    measured = f"{row['times fewer MACs']:.2f} times fewer MACs at {kept(row, 'ratio')}"
    claimed = float(row["claimed"].partition(" times")[0])  # "2.4 times faster at ..."
    return {"paper": "DiP-GO", "claimed": f"{row['claimed']} (DiT)", "setting": row["here"], "measured": measured,
            "control": control, "holds": tested(holds(row, "ratio"), row["times fewer MACs"], claimed)}


def tally(rows: pd.DataFrame) -> str:
    """Count how the tests came out, rows without one ("-") left out: "1 yes, 0 undecided, 3 no, 1 not tested"."""
    words = rows["holds"].str.split(r" \(|:").str[0]
    return ", ".join(f"{(words == word).sum()} {word}" for word in ("yes", "undecided", "no", "not tested"))
