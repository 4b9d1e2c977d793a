"""Copies a study's numbers and figures to ``reports/<study>/``, beside one page, and fills the README's tables."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pandas as pd

from lib import paths
from lib.page import page
from lib.params import NOTEBOOKS, ParamsError, studies
from lib.stage import Stage

KEPT = ("metrics.json", "timings.json", "meta.json", "figures/*.png", "figures/*.csv", "tables/*.csv", "plans/*.json")

PLANNING = ("04_schedule_search", "05_pruner_training")
"""The notebooks whose results are plans."""


def publish(study: str) -> Path:
    """Copy what a study found (numbers, tables, figures, plans; no weights) to its reports folder."""
    if study not in studies():
        raise ParamsError(f"unknown study {study!r}. There are: {', '.join(studies())}.")
    target = paths.REPORTS / study
    for notebook in NOTEBOOKS:
        if not (paths.DATA / study / notebook / "metrics.json").exists():
            raise FileNotFoundError(f"{notebook} of study {study} is not done: nothing is published. Run\n"
                                    f"    make study STUDY={study}")
    shutil.rmtree(target, ignore_errors=True)
    for notebook in NOTEBOOKS:
        source = paths.DATA / study / notebook
        for found in sorted(file for pattern in KEPT for file in source.glob(pattern)):
            copy = target / notebook / found.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, copy)
    return target


def write_page(study: str) -> Path:
    """Write what a study found as one page, beside its published numbers."""
    target = paths.REPORTS / study / "index.html"
    tables = {"Every way to sample": results_table(study), "Beside their controls": controls_table(study)}
    target.write_text(page(study, tables))
    return target


def results_table(study: str) -> str:
    """Give the study's main table as Markdown: each way to sample, its cost, how good; dearest first."""
    reports = paths.REPORTS / study
    controls = pd.read_csv(reports / "01_teacher_analysis" / "tables" / "front.csv")
    own = pd.concat([pd.read_csv(reports / notebook / "tables" / "front.csv") for notebook in PLANNING])
    table = pd.concat([controls, own.query("kind != 'teacher'")]).sort_values(["macs_ratio", "ratio"])
    speeds = {}
    for notebook in ("01_teacher_analysis", *PLANNING):
        speeds |= json.loads((reports / notebook / "timings.json").read_text())
    lines = ["| plan | times fewer executed MACs | times faster | score [95 %] | over the best teacher's "
             "[95 %] | over DDIM's at T steps [95 %] |", "|---|---|---|---|---|---|"]
    for _, row in table.iterrows():
        name = f"**{row['name']}**" if row["kind"] != "control" else row["name"]
        cells = [_interval(row, column) for column in ("score", "ratio", "ddim_ratio")]
        faster = speeds[f"speed_up_{Stage.key(row['name'])}"]
        lines.append("| " + " | ".join([name, f"{row['macs_ratio']:.2f}", f"{faster:.2f}", *cells]) + " |")
    return "\n".join(lines) + f"\n\nn = {table['n'].iloc[0]:,} images a row; features of {table['extractor'].iloc[0]}."


def controls_table(study: str) -> str:
    """Give as Markdown how each method's plans fare against what else their executed MACs would buy."""
    reports = paths.REPORTS / study
    table = pd.concat([pd.read_csv(reports / notebook / "tables" / "controls.csv") for notebook in PLANNING])
    lines = ["| plan | its strongest control | score over that control's [95 %] | controls that it beats | ties with | "
             "loses to |", "|---|---|---|---|---|---|"]
    for plan, rows in table.groupby("plan", sort=False):
        strongest = rows.loc[rows["plan_over_control"].idxmax()]
        ratio = _interval(strongest, "plan_over_control")
        counts = [str((rows["better"] == verdict).sum()) for verdict in ("plan", "tie", "control")]
        lines.append("| " + " | ".join([plan, strongest["name"], ratio, *counts]) + " |")
    return "\n".join(lines)


TABLES = {"results": results_table, "controls": controls_table}


def filled(text: str) -> str:
    """Replace what stands between ``<!-- TABLE:STUDY -->`` and ``<!-- end -->`` by that table of that study."""
    return re.sub(rf"(<!-- ({'|'.join(TABLES)}):(\w+) -->\n).*?(<!-- end -->)",
                  lambda found: f"{found[1]}{TABLES[found[2]](found[3])}\n{found[4]}", text, flags=re.DOTALL)


def _interval(row: pd.Series, column: str) -> str:
    value, low, high = (row[name] for name in (column, f"{column}_low", f"{column}_high"))
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.report", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["publish", "readme"])
    parser.add_argument("--study", help="what to publish")
    arguments = parser.parse_args()
    if arguments.command == "publish":
        try:
            publish(arguments.study)
            print(f"published: {write_page(arguments.study)}")
        except (ParamsError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
    else:
        readme = paths.ROOT / "README.md"
        readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()
