"""Copies a study's numbers and figures to ``reports/<study>/``, beside two pages, and fills the README's tables."""

import argparse
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import pandas as pd
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

from lib.grid.plan import Plan
from lib.judging import trainings
from lib.judging.controls import summary
from lib.judging.estimates import WORDS, text
from lib.study import claims, figures, paths
from lib.study.figures import METHODS, PLACED
from lib.study.page import executed, page
from lib.study.params import ParamsError, load, notebooks
from lib.study.stage import Stage

KEPT = ("metrics.json", "timings.json", "meta.json", "figures/*.png", "figures/plans/*.png", "figures/*.csv",
        "tables/*.csv", "plans/*.json")

FREE = ("plan_from_scratch", "08_your_pipeline")
"""The notebooks of no study."""

PLANNING = ("04_schedule_search", "05_pruner_training", "06_comparison")
"""The notebooks whose results are plans on the UNet."""

FULL = f"(DDIM|DPM-Solver[+]{{2}}), |{PLACED}"
"""What the names of all controls of full steps alone begin with."""

REUSED = {"hold": "held", "line": "forecast by a line", "parabola": "forecast by a parabola"}
"""What findings call the ways to reuse a block's output."""

SOLVERS = {1: "DDIM", 2: "DPM-Solver++"}
"""By the order of its steps."""

CHANGES = {"recipe": "the recipe, its plan made by {}", "post-processing": "the recipe, its plan made by {}",
           "untrained": "no training, left-out steps forecast by a {}", "rate": "learning rate {}", "gates": "{}",
           "noise": "noise {}", "backup": "reused cells forecast by a {}"}
"""What the pruner's table calls its rows: by the part of the recipe that a row changes, and how."""

RIVALS = {"schedule": "loss", "choice": "network"}
"""What the rivals' table calls what its rows change."""

JUDGES = ("extractor", "second_extractor")
"""The columns of a table of scores that name the networks in whose features they were taken."""

MISSING = r"^nan\b.*"
"""A cell of a table whose number is none."""

LINK = r"\]\(([^)\s]+)\)"
"""A link in Markdown."""

FASTER = ["times faster", "low", "high"]
"""A measured ratio of times and its interval, as `lib.grid.cost.speed_ups` names them."""


def publish(study: str, so_far: bool = False) -> Path:
    """Copy what a study found (numbers, tables, figures, plans; no weights) to its reports folder.

    Parameters
    ----------
    so_far : whether notebooks that are not done are left out; else, and where none is, they are an error
    """
    target, runs = paths.REPORTS / study, notebooks(study)
    done = [notebook for notebook in runs if (paths.DATA / study / notebook / "metrics.json").exists()]
    if not done or (done != runs and not so_far):
        missing = next(notebook for notebook in runs if notebook not in done)
        raise FileNotFoundError(f"{missing} of study {study} is not done: nothing is published. Run\n"
                                f"    make study STUDY={study}")
    runs = done
    shutil.rmtree(target, ignore_errors=True)
    for notebook in runs:
        source = paths.DATA / study / notebook
        for found in sorted(file for pattern in KEPT for file in source.glob(pattern)):
            copy = target / notebook / found.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, copy)
    return target


def write(study: str, so_far: bool = False) -> Path:
    """Publish a study, and write its page, its README and its notebooks there, and what all studies share.

    Parameters
    ----------
    so_far : as `publish` takes it

    Returns
    -------
    page : Path
    """
    publish(study, so_far)
    written = write_page(study)
    write_readme(study)
    write_notebooks(study)
    write_caching()
    if not so_far:  # what the README tells of this study may be left out
        fill_readme()
    return written


def published(study: str) -> list[str]:
    """Give the notebooks of a study that are in its reports folder."""
    return [notebook for notebook in notebooks(study)
            if (paths.REPORTS / study / notebook / "metrics.json").exists()]


def write_page(study: str) -> Path:
    """Write what a study found as one page, beside its published numbers."""
    target, runs = paths.REPORTS / study / "index.html", published(study)
    target.write_text(page(study, runs, _said(study, runs), _tables(study, runs)))
    return target


def write_readme(study: str) -> None:
    """Write what a study found as ``README.md``, which code hosts show: findings, curves, tables, figures."""
    target, runs = paths.REPORTS / study, published(study)
    missing = [notebook for notebook in notebooks(study) if notebook not in runs]
    meta = json.loads((target / runs[0] / "meta.json").read_text())
    about = ", ".join(f"{name} {value}" for name, value in meta.items() if isinstance(value, str | int | float))
    parts = [f"# The study *{study}*", f"Made by the pipeline: `make study STUDY={study}`. {about}.",
             "That command also writes `index.html` here: the same with all prose, as one page."]
    timings = {run: json.loads((target / run / "timings.json").read_text()) for run in runs}
    if taken := {run: found["minutes"] for run, found in timings.items() if "minutes" in found}:
        parts.append(f"Minutes: {', '.join(f'{run[:2]} {minutes:g}' for run, minutes in taken.items())}; together "
                     f"{sum(taken.values()):.0f}, of notebooks that partly ran side by side.")
    if missing:
        parts.append(f"**Not run to its end**: without {', '.join(missing)}.")
    if said := _said(study, runs):
        parts += ["## Findings", said]
    if "06_comparison" in runs:
        figures.style()
        table = _everything(study)
        figures.save(figures.curves(table), table, target, "curves")
        parts.append("![Score against cost](curves.png)")
    for title, content in _tables(study, runs).items():
        parts += [f"## {title}", content]
    for notebook in runs:
        drawn = [f"![{picture.stem.replace('_', ' ')}]({notebook}/figures/{picture.name})"
                 for picture in sorted((target / notebook / "figures").glob("*.png"))]
        parts += [f"<details><summary>{notebook}: {len(drawn)} figures</summary>", *drawn, "</details>",
                  f"[{notebook} with all outputs]({notebook}.md)"]
    (target / "README.md").write_text("\n\n".join(parts) + "\n")


def write_notebooks(study: str) -> None:
    """Write the executed notebooks as Markdown with all outputs, ``<notebook>.md``, which code hosts show.

    Figures are the published ones; what was only shown goes to ``<notebook>/shown/``.
    """
    runs = published(study)
    for notebook in runs:
        _write_notebook(executed(study, notebook), paths.REPORTS / study, notebook, runs)


def write_free() -> None:
    """Run the notebooks of no study, and write them as Markdown with all outputs to ``reports/notebooks``."""
    target = paths.REPORTS / "notebooks"
    target.mkdir(exist_ok=True)
    for notebook in FREE:
        ran = nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", 4)
        run = ExecutePreprocessor(timeout=600, kernel_name="python3")
        run.preprocess(ran, {"metadata": {"path": str(paths.NOTEBOOKS)}})
        for cell in ran.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress bars
        _write_notebook(ran, target, notebook, FREE)


def _write_notebook(ran: nbformat.NotebookNode, target: Path, notebook: str, beside: Sequence[str]) -> None:
    """Write an executed notebook into a folder that has these notebooks; others' links lead back to the notebooks."""
    for cell in ran.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(LINK, lambda found: f"]({_from_reports(found[1], beside)})", cell.source)
        for output in cell.get("outputs", []):
            if name := output.get("metadata", {}).get("figure"):
                output.data = {"text/markdown": f"![{name.replace('_', ' ')}]({notebook}/figures/{name}.png)"}
            if "text/html" in output.get("data", {}):  # code hosts show the text of a style
                output.data["text/html"] = re.sub(r"<style.*?</style>", "", output.data["text/html"], flags=re.S)
    text, resources = MarkdownExporter().from_notebook_node(ran, {"output_files_dir": f"{notebook}/shown"})
    (target / f"{notebook}.md").write_text(text)
    for name, content in resources["outputs"].items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def _from_reports(link: str, runs: Sequence[str]) -> str:
    """Give a link of a notebook as it is in the reports: to what is written there, else back to the notebooks."""
    if re.match(r"https?://|#", link):
        return link
    stem = link.removesuffix(".ipynb")
    return f"{stem}.md" if stem in runs else f"../../notebooks/{link}"


def _said(study: str, runs: list[str]) -> str:
    """Give what a study found first of all; empty where that is nothing."""
    if "06_comparison" in runs:
        return findings(study)
    return pruner(study) if "05_pruner_training" in runs and load(study)["05_pruner_training"].ablations else ""


def verdict(study: str) -> str:
    """Give as one point how many plans did better than their strongest control, by whom, and which.

    A search may end in full steps alone: its plan then is one of its controls, image for image.
    """
    table = _beside(study)
    equal = (table["plan_over_control_difference_low"] == 0) & (table["plan_over_control_difference_high"] == 0)
    same = table[equal & table["name"].str.match(FULL)].drop_duplicates("plan").set_index("plan")["name"]
    strongest = _strongest(table)
    words, steps = strongest["plan_over_control_word"], strongest["name"].str.match(FULL).sum()
    better = strongest["plan"][words == "better"]
    both = ((words == "better") & (strongest["second_over_control_word"] == "better")).sum()
    agreed = f", by both judges {both}" * bool(len(better))
    others = ", ".join(f"{(words == word).sum()} {word}" for word in WORDS if word != "better" and word in set(words))
    named = ", ".join(f"*{plan}*" + (f", step for step *{same[plan]}*, another control" if plan in same else "")
                      for plan in better)
    alike = f" Plans that are themselves such steps, the same as a control's: {len(same)}." if len(same) else ""
    return (f"* **{len(better)} of {len(strongest)} plans of the methods and our extensions (on the UNet) did better "
            f"than their strongest control**{agreed}{': ' * bool(named)}{named} ({others}). For {steps} of them that "
            f"control is full steps alone.{alike}")


def findings(study: str) -> str:
    """Give a study's findings as Markdown, a sentence and a number each: what the bar is, what won, what holds.

    The cheapest are looked for among all rows, on the report's own noise; the tables set them beside their controls.
    """
    beside, reports = _beside(study), paths.REPORTS / study
    kept, alone = _kept(study)
    steps = kept[alone & ~kept["name"].str.contains("student")]
    found = []

    def cheapest(rows: pd.DataFrame) -> str:
        row = rows.iloc[0]
        name = row["name"].replace(" (teacher)", "")
        worth = ""
        if len(second := beside["second_over_control_word"][(beside["plan"] == name) & beside["strongest"]]):
            worth = f"; {claims.strongest(beside, name)}, its strongest control (second judge: {second.iloc[0]})"
        alone = " (full steps alone)" if row["name"].startswith(METHODS) and _full_steps(study, row["name"]) else ""
        return (f"*{name}*{alone}, {row['macs_ratio']:.1f} times fewer MACs at {text(row, 'ddim_ratio')} of its score"
                f"{worth}")

    even = kept[kept["family"] == "DDIM, uniform"]
    if len(steps) and len(even):
        shortest = even.loc[even["macs_ratio"].idxmax()]
        more = (f" Even *{shortest['name']}* keeps it: a plan that costs more proves nothing by keeping it."
                if shortest["macs_ratio"] > 1 else "")
        found.append(f"**The fewest full steps that keep the full run's score**: {cheapest(steps)}.{more}")
    methods = kept[kept["name"].str.startswith(METHODS)]
    found.append("**The cheapest plan of a method, or of our extensions, that keeps it**: "
                 + (cheapest(methods) if len(methods) else "none") + ".")
    found.append(f"**Do the papers' claims hold?** {claims.tally(_claims(study))}.")
    pays = pd.read_csv(reports / "04_schedule_search" / "tables" / "dividends.csv").dropna(subset="nearness")
    cached = "; ".join(f"under {SOLVERS[order]}, features " + ", ".join(
        f"{REUSED.get(reuse, reuse)} {(of_reuse['nearness_high'] < 1).sum()} of {len(of_reuse)}"
        for reuse, of_reuse in rows.groupby("reuse", sort=False)) for order, rows in pays.groupby("order"))
    found.append("**Does caching pay?** Cases in which it comes surely nearer to the better solver's full run than "
                 f"more steps of the same solver, at the same MACs, do: {cached}.")
    return "\n".join([verdict(study), *(f"* {sentence}" for sentence in found)])


def brief(*studies: str) -> str:
    """Give the same as one table, a study a column: what won, what keeps the score at which price, where reuse pays."""
    return markdown(pd.DataFrame({f"[{study}](reports/{study}/README.md)": _in_brief(study) for study in studies})
                    .rename_axis("finding").reset_index())


def _in_brief(study: str) -> dict[str, str]:
    beside = _strongest(_beside(study)).set_index("plan")
    word, second = beside["plan_over_control_word"], beside["second_over_control_word"]
    better = word == "better"
    found = {"plans of the methods and our extensions that are better than their strongest control, by both judges "
             "(by the first)": f"**{(better & (second == 'better')).sum()}** of {len(beside)} ({better.sum()})"}
    kept, alone = _kept(study)
    for what, rows in {"full steps on the teacher": kept[alone & ~kept["name"].str.contains("student")],
                       "reused cells": kept[~alone & kept["name"].str.startswith(METHODS)]}.items():
        said = "none"
        for name, times in rows[["name", "macs_ratio"]].head(1).to_numpy():
            said = f"**{times:.1f} times** fewer: *{name.replace(' (teacher)', '')}*"
            if name in beside.index:
                said += f"; {word[name]} than its strongest control (second judge: {second[name]})"
        found[f"the fewest MACs that keep the full run's score, by {what}"] = said
    pays = pd.read_csv(paths.REPORTS / study / "04_schedule_search" / "tables" / "dividends.csv")
    for order, sure in (pays.dropna(subset="nearness")["nearness_high"] < 1).groupby(pays["order"]):
        found[f"cases in which reused features come nearer to the full run than more steps of {SOLVERS[order]} for the "
              "same MACs"] = f"**{sure.sum()}** of {len(sure)}"
    return found


def pruner(study: str) -> str:
    """Give as Markdown what DiP-GO's recipe, and changes of one part of it, are worth over steps left out evenly.

    Marked are trainings that ended when most gates were open still: such a change was not tried in earnest.
    """
    rows = pd.read_csv(paths.REPORTS / study / "05_pruner_training" / "tables" / "ablation.csv")
    names = [CHANGES.get(part, f"{part}: {{}}").format(variant) for part, variant in zip(rows["part"], rows["variant"])]
    opened = rows["kept there"] > 0.5
    shown = pd.DataFrame({
        "DiP-GO, one part changed": pd.Series(names).where(~opened, [f"{name} (gates still open)" for name in names]),
        "score over untrained steps [95 %]": _intervals(rows, "ratio"), "that is": rows["ratio_word"],
        "MACs": rows["executed"].map("{:.1%}".format)})
    return (f"{markdown(shown)}\n\n*Untrained steps*: steps left out evenly at the same budget, forecast where the "
            "row's cells are. *No training*: such steps that forecast, over such that hold. *Gates still open*: the "
            "training ended before it had chosen what to reuse.")


def _kept(study: str) -> tuple[pd.DataFrame, pd.Series]:
    """Give what surely keeps the score of DDIM's full run, the cheapest first, and which of it is full steps alone."""
    table = _everything(study)
    kept = table[table["ddim_ratio_holds"] == "yes"].sort_values(["macs_ratio", "ddim_ratio"], ascending=[False, True])
    return kept, kept["family"].str.match(FULL) | kept["name"].map(lambda name: _full_steps(study, name))


def _full_steps(study: str, name: str) -> bool:
    """Say whether a published plan computes all cells."""
    files = (Stage.plan_file(paths.REPORTS / study / notebook, name) for notebook in PLANNING)
    return any(Plan.load(path).computes.all() for path in files if path.exists())


def _everything(study: str) -> pd.DataFrame:
    """Give all ways to sample with the UNet, the most expensive first."""
    table = pd.read_csv(paths.REPORTS / study / "06_comparison" / "tables" / "everything.csv")
    return table.sort_values("macs_ratio", ignore_index=True, kind="stable")


def _beside(study: str) -> pd.DataFrame:
    """Give all plans on the UNet beside their controls: of notebooks that end in plans, and forecasts of notebook 01.

    Forecasts that were better there have stronger controls in notebook 06.
    """
    reports = paths.REPORTS / study
    tables = [pd.read_csv(reports / notebook / "tables" / "controls.csv") for notebook in PLANNING]
    again = pd.read_csv(reports / "06_comparison" / "tables" / "forecasts.csv")
    first = pd.read_csv(reports / "01_teacher_analysis" / "tables" / "forecast_controls.csv")
    first = first[first["plan"].str.startswith("forecast") & ~first["plan"].isin(again["plan"])]
    return pd.concat([*tables, first, again], ignore_index=True)


def _strongest(beside: pd.DataFrame) -> pd.DataFrame:
    """Give each plan beside its strongest control, once."""
    strongest = beside[beside["strongest"]].drop_duplicates("plan")  # two controls may be one plan
    return strongest.drop_duplicates(["plan_macs", "plan_over_control_difference"])  # so may two searches' finds


def write_caching() -> None:
    """Write ``reports/caching.md``, ``.csv`` and ``.png``: where partial steps pay, of all teachers of all studies."""
    found = sorted(path for path in paths.REPORTS.glob("*/0[47]_*/tables/dividends.csv")
                   if not path.parts[-4].startswith("smoke"))
    if not found:
        return
    networks = {"04_schedule_search": "UNet", "07_transformer": "transformer"}
    tables = [pd.read_csv(path).assign(teacher=f"{networks[path.parts[-3]]} ({path.parts[-4]})") for path in found]
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(paths.REPORTS / "caching.csv", index=False, float_format="%.6g")
    figures.style()
    figures.caching(table).savefig(paths.REPORTS / "caching.png")
    (paths.REPORTS / "caching.md").write_text(_caching(table.dropna(subset="nearness")))


def _caching(table: pd.DataFrame) -> str:
    """Say of all teachers' dividends how many surely pay, and what would have foretold it."""
    table = table.assign(pays=table["nearness_high"] < 1, solver=table["order"].map(SOLVERS))

    def share(rows: pd.Series) -> str:
        return f"{rows.sum()} of {len(rows)}"

    counts = table.pivot_table("pays", ["teacher", "solver"], "reuse", share, "-", sort=False).reset_index()
    ranks = table[["share", "alike", "nearness"]].corr("spearman")["nearness"]
    kinds = {"solver": table["solver"], "network": table["teacher"].str.partition(" ")[0],
             "kind of reuse": table["reuse"].map(REUSED)}
    by_kind = [f"The {kind}: " + ", ".join(f"{name} {share(rows)}" for name, rows in table.groupby(of)["pays"]) + ". "
               for kind, of in kinds.items()]
    telling = [name for name in ("share", "alike") if abs(ranks[name]) >= 0.6]
    return "\n\n".join([
        "# Where caching pays",
        "A *case* is a teacher, a solver, some even full steps, a branch and a kind of reuse: half-way after each full "
        "step a partial one reuses features. It pays if its images are surely nearer to the best teacher's than those "
        "of more full steps of the same solver for the same MACs. All cases: [caching.csv](caching.csv).",
        markdown(counts), "![distance over that of more full steps, against what might predict it](caching.png)",
        "## What would predict it on a new teacher?",
        f"{''.join(by_kind)}Over all cases the rank correlation of the distance with a partial step's share of the "
        f"MACs is {ranks['share']:.2f}, with the likeness of what is reused {ranks['alike']:.2f}: "
        f"{' and '.join(telling) or 'neither'} predicts it (0.6 in size would)."]) + "\n"


def results_table(study: str) -> str:
    """Give as Markdown every way to sample with the UNet: its cost, how good, what it took to find; dearest first."""
    return _ways(_everything(study))


def transformer_table(study: str) -> str:
    """Give the same of the transformer."""
    return _ways(pd.read_csv(paths.REPORTS / study / "07_transformer" / "tables" / "front.csv"))


def students_table(study: str) -> str:
    """Give as Markdown what block search gives, beside the teacher that was trained longer."""
    return _scored(*_students(study))


def rivals(study: str) -> str:
    """Give as Markdown what another loss, network or beginning is worth over the student that the method trains."""
    rows = pd.read_csv(paths.REPORTS / study / "03_joint_loss_ablation" / "tables" / "ablation.csv")
    names = [name if ":" in name else f"{RIVALS[part]}: {name}" for part, name in zip(rows["part"], rows["name"])]
    shown = pd.DataFrame({
        "student": names, "training": rows["training"],
        "beside": rows["part"].map({"schedule": "loss: noise only"}).fillna("the method"),
        "ratio of the scores [95 %]": _intervals(rows, "ratio"), "least and greatest of the trainings": _range(rows),
        "that is": [trainings.word(row) for row in rows.to_dict("records")], "second judge": rows["second_ratio_word"]})
    return markdown(shown)


def _students(study: str) -> tuple[pd.DataFrame, dict[str, pd.Series]]:
    """Give the students, and the columns of their table."""
    tables = paths.REPORTS / study / "02_block_search" / "tables"
    seconds = pd.read_csv(tables / "seconds.csv")[["name", *FASTER]]
    table = pd.read_csv(tables / "students.csv").merge(seconds, on="name")
    columns = {"trainings": table["trainings"].astype(str), "training": _optional(table, "training", str),
               "times fewer MACs": table["macs_ratio"].map("{:.2f}".format),
               "times fewer parameters": table["parameters_ratio"].map("{:.2f}".format),
               "times faster [95 %]": _faster(table), **_judged(table),
               "over the teacher's, trained on [95 %]": _intervals(table, "ratio"),
               "least and greatest of the trainings": _range(table)}
    return table, columns


def claims_table(*tested: str) -> str:
    """Give as Markdown what the papers claim, and whether it holds in studies; empty where they test none of it.

    Of several studies the rows are sorted by paper, and say in which study they were tested.
    """
    tables = [_claims(study) for study in tested]
    if len(tested) > 1:
        for study, table in zip(tested, tables):
            table.insert(2, "study", f"[{study}](reports/{study}/README.md)")
    table = pd.concat(tables)
    papers = [*dict.fromkeys(["DiffNAS", "Flexiffusion", "DiP-GO", *table["paper"]])]
    table = table.sort_values("paper", key=lambda names: names.map(papers.index), kind="stable")
    return markdown(table.rename(columns={"measured": "measured here", "holds": "holds?"})) if len(table) else ""


def _claims(study: str) -> pd.DataFrame:
    """Give the claims that a study tests: 06 has all on the UNet, else each method's notebook; 07 the transformer's."""
    def of(notebook: str, name: str = "claims") -> pd.DataFrame:
        path = paths.REPORTS / study / notebook / "tables" / f"{name}.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["name", "claimed"])

    rows = of("06_comparison").to_dict("records")
    if not rows:
        students, front = of("02_block_search", "students"), of("05_pruner_training", "front")
        rows = [claims.network(students)] if len(students) else []
        rows += [claims.joint_loss(row) for row in of("03_joint_loss_ablation").to_dict("records")]
        rows += [claims.schedule(row) for row in of("04_schedule_search").to_dict("records") if row["claimed"] != "-"]
        if len(front):
            steps = load(study)["05_pruner_training"].teacher_steps
            rows += claims.gates(front, of("05_pruner_training", "controls"), steps)
    rows += [claims.transformer(row) for row in of("07_transformer").to_dict("records")]
    table = pd.DataFrame(rows, columns=claims.COLUMNS)
    return table[table["holds"] != "-"]


def _ways(table: pd.DataFrame) -> str:
    plain = "honest_factor" in table and (table["honest_factor"] == table["macs_ratio"]).all()
    honest = "at most {:.2f}" if plain else "{:.2f}"  # plain where no fewer steps surely keep the score
    columns = {"M MACs an image": table["macs"].map(lambda macs: f"{macs / 1e6:.0f}"),
               "times fewer": table["macs_ratio"].map("{:.2f}".format),
               "honest factor": _optional(table, "honest_factor", honest.format),
               "k parameters": _optional(table, "parameters", lambda count: f"{count / 1e3:.0f}"),
               "ms an image": table["ms an image"].map("{:.2f}".format),
               "times faster [95 %]": _faster(table),
               "peak MB": table["peak MB"].map("{:.1f}".format), **_judged(table),
               "over the best teacher's [95 %]": _intervals(table, "ratio"),
               "second judge's [95 %]": _optional_intervals(table, "second_ratio"),
               "over DDIM's at T steps [95 %]": _intervals(table, "ddim_ratio"),
               **{name: _intervals(table, name) if f"{name}_low" in table else table[name].map("{:.2f}".format)
                  for name in ("precision", "recall", "paired")},
               "cost": _optional(table, "cost", "{:.0f}".format), "training": _optional(table, "training", str)}
    return _scored(table, columns)


def _judged(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Give the columns of the score: as it comes, without its bias, as the second judge has it; and of prompts."""
    return {"raw": _optional(table, "raw", "{:.3g}".format), "score [95 %]": _intervals(table, "score"),
            "second score [95 %]": _optional_intervals(table, "second_score"),
            "prompt score [95 %]": _optional_intervals(table, "prompt_score")}


def _optional(table: pd.DataFrame, column: str, write: Callable) -> pd.Series:
    """Give a column as text; nothing where the table has none."""
    return table[column].map(write) if column in table else pd.Series(dtype=str)


def _optional_intervals(table: pd.DataFrame, column: str) -> pd.Series:
    return _intervals(table, column) if column in table else pd.Series(dtype=str)


def _marked(names: pd.Series) -> pd.Series:
    """Set the methods among names in bold."""
    return names.where(~names.str.startswith(METHODS), "**" + names + "**")


def _scored(table: pd.DataFrame, columns: dict[str, pd.Series]) -> str:
    """Write the columns that are not empty as a table; below it on how many images, and by whose features if told."""
    shown = pd.DataFrame({"name": _marked(table["name"]),
                          **{title: cells for title, cells in columns.items() if len(cells)}})
    judges = [str(table[column].iloc[0]) for column in JUDGES if column in table]
    features = f"; features of {' and '.join(judges)}" if judges else ""
    return f"{markdown(shown)}\n\nn = {table['n'].iloc[0]:,} images a row{features}."


def markdown(shown: pd.DataFrame) -> str:
    """Give a table of text as Markdown, a dash for each number that is none."""
    lines = [shown.columns, ["---"] * len(shown.columns), *shown.replace(MISSING, "-", regex=True).to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def controls_table(study: str) -> str:
    """Give as Markdown how each method's plans fare against what else their executed MACs would buy."""
    table = _beside(study)
    shown, over = [], "plan_over_control"
    for plan, rows in table.groupby("plan", sort=False):
        strongest = rows[rows["strongest"]].iloc[0]
        known = pd.notna(strongest["second_over_control_word"])
        second = f"{text(strongest, 'second_over_control')}: {strongest['second_over_control_word']}" if known else "-"
        asked = strongest[f"{over}_word"] == "undecided" and pd.notna(strongest[f"{over}_needs"])
        needs = f", n = {strongest[f'{over}_needs']:,.0f}" if asked else ""
        counts = {f"{word} than" if word in ("better", "worse") else word: str((rows[f"{over}_word"] == word).sum())
                  for word in WORDS}
        shown.append({"plan": plan, "its strongest control": strongest["name"],
                      "score over that control's [95 %]": _intervals(rows, over)[strongest.name],
                      "that is": strongest[f"{over}_word"] + needs, "the second judge": second} | counts)
    return f"{markdown(pd.DataFrame(shown))}\n\n{summary(table)}"


PAGE = {"Every way to sample": (results_table, PLANNING), "Beside their controls": (controls_table, PLANNING),
        "What the papers claim": (claims_table, []),
        "The students": (students_table, ["02_block_search"]),
        "Other losses, networks and beginnings": (rivals, ["03_joint_loss_ablation"]),
        "Every way to sample the transformer": (transformer_table, ["07_transformer"])}
"""The tables at the top of a page, and the notebooks that they need."""

TABLES = {"brief": brief, "claims": claims_table, "controls": controls_table}
"""What the project's README may ask for, of a study or, with commas, of several."""


def _tables(study: str, runs: list[str]) -> dict[str, str]:
    """Give the tables at the top of a study's page that are not empty, by title."""
    found = {title: table(study) for title, (table, needed) in PAGE.items() if set(needed) <= set(runs)}
    return {title: content for title, content in found.items() if content}


def filled(readme: str) -> str:
    """Replace what stands between ``<!-- TABLE:STUDY,STUDY -->`` and ``<!-- end -->`` by that table of the studies."""
    return re.sub(rf"(<!-- ({'|'.join(TABLES)}):([\w,]+) -->\n).*?(<!-- end -->)",
                  lambda found: f"{found[1]}{TABLES[found[2]](*found[3].split(','))}\n{found[4]}", readme,
                  flags=re.DOTALL)


def fill_readme() -> None:
    """Fill the project's README with the tables that it names, as the reports have them now."""
    readme = paths.ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


def _intervals(table: pd.DataFrame, column: str) -> pd.Series:
    return pd.Series([text(row, column) for row in table.to_dict("records")], table.index)


def _range(table: pd.DataFrame) -> list[str]:
    return [f"{row.least:.3g}, {row.greatest:.3g}" for row in table.itertuples()]


def _faster(table: pd.DataFrame) -> pd.Series:
    return _intervals(table.rename(columns=dict(zip(FASTER, ("faster", "faster_low", "faster_high")))), "faster")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.study.report", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["publish", "readme", "notebooks"], help="publish a study; fill the README; "
                        "run the notebooks of no study, and write them with all outputs")
    parser.add_argument("--study", help="what to publish")
    parser.add_argument("--so-far", action="store_true", help="publish what is done of it")
    arguments = parser.parse_args()
    if arguments.command == "publish":
        try:
            print(f"published: {write(arguments.study, arguments.so_far)}")
        except (ParamsError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
    elif arguments.command == "notebooks":
        write_free()
    else:
        fill_readme()


if __name__ == "__main__":
    main()
