"""Copies a study's numbers and figures to ``reports/<study>/``, beside one page, and fills the README's tables."""

import argparse
import re
import shutil
from pathlib import Path

import pandas as pd

from lib.study import paths
from lib.study.page import page
from lib.study.params import NOTEBOOKS, ParamsError, studies

KEPT = ("metrics.json", "timings.json", "meta.json", "figures/*.png", "figures/*.csv", "tables/*.csv", "plans/*.json")

PLANNING = ("04_schedule_search", "05_pruner_training", "06_comparison")
"""The notebooks whose results are plans."""

METHODS = ("DiffNAS", "Flexiffusion", "DiP-GO", "student")
"""How the names of what is studied begin; all else is a control."""

FASTER = ["times faster", "low", "high"]
"""A measured ratio of times and its interval, as `lib.grid.cost.speed_ups` names them."""


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
    tables = {"Every way to sample": results_table(study), "Beside their controls": controls_table(study),
              "What the papers claim": claims_table(study), "The students": students_table(study),
              "Every way to sample the transformer": transformer_table(study)}
    target.write_text(page(study, tables))
    return target


def results_table(study: str) -> str:
    """Give as Markdown every way to sample with the UNet: its cost, how good, what it took to find; dearest first."""
    return _ways(pd.read_csv(paths.REPORTS / study / "06_comparison" / "tables" / "everything.csv"))


def transformer_table(study: str) -> str:
    """Give the same of the transformer."""
    return _ways(pd.read_csv(paths.REPORTS / study / "07_transformer" / "tables" / "front.csv"))


def students_table(study: str) -> str:
    """Give as Markdown what block search gives, beside the teacher that was trained on and a thin network."""
    tables = paths.REPORTS / study / "02_block_search" / "tables"
    seconds = pd.read_csv(tables / "seconds.csv")[["name", *FASTER]]
    table = pd.read_csv(tables / "students.csv").merge(seconds, on="name")
    shown = pd.DataFrame({
        "network": _marked(table["name"]),
        "trainings": table["trainings"].astype(str), "times fewer MACs": table["macs_ratio"].map("{:.2f}".format),
        "times fewer parameters": table["parameters_ratio"].map("{:.2f}".format),
        "times faster [95 %]": _intervals(table, *FASTER), "score [95 %]": _intervals(table, "score"),
        "over the teacher's, trained on [95 %]": _intervals(table, "ratio"),
        "least and greatest of the trainings": [f"{row.least:.3g}, {row.greatest:.3g}" for row in table.itertuples()]})
    return _scored(shown, table)


def claims_table(study: str) -> str:
    """Give as Markdown what the papers claim, and whether it holds here."""
    claims = pd.read_csv(paths.REPORTS / study / "06_comparison" / "tables" / "claims.csv")
    return _markdown(claims.rename(columns={"measured": "measured here", "holds": "holds?"}))


def _ways(table: pd.DataFrame) -> str:
    columns = {"M MACs an image": table["macs"].map(lambda macs: f"{macs / 1e6:.0f}"),
               "times fewer": table["macs_ratio"].map("{:.2f}".format),
               "k parameters": table.get("parameters", pd.Series(dtype=float)).map(lambda count: f"{count / 1e3:.0f}"),
               "ms an image": table["ms an image"].map("{:.2f}".format),
               "times faster [95 %]": _intervals(table, *FASTER),
               "peak MB": table["peak MB"].map("{:.1f}".format), "score [95 %]": _intervals(table, "score"),
               "over the best teacher's [95 %]": _intervals(table, "ratio"),
               "over DDIM's at T steps [95 %]": _intervals(table, "ddim_ratio"),
               **{name: table[name].map("{:.2f}".format) for name in ("precision", "recall", "paired")},
               "cost": table.get("cost", pd.Series(dtype=float)).map("{:.0f}".format)}
    shown = pd.DataFrame({"way to sample": _marked(table["name"]),
                          **{title: cells for title, cells in columns.items() if len(cells)}})
    return _scored(shown, table)


def _marked(names: pd.Series) -> pd.Series:
    """Set the methods among names in bold."""
    return names.where(~names.str.startswith(METHODS), "**" + names + "**")


def _scored(shown: pd.DataFrame, table: pd.DataFrame) -> str:
    """Write cells of text as a table, and below it on how many images and by whose features it was scored."""
    text = _markdown(shown.replace(r".*\bnan\b.*", "-", regex=True))
    return f"{text}\n\nn = {table['n'].iloc[0]:,} images a row; features of {table['extractor'].iloc[0]}."


def _markdown(shown: pd.DataFrame) -> str:
    lines = [shown.columns, ["---"] * len(shown.columns), *shown.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def controls_table(study: str) -> str:
    """Give as Markdown how each method's plans fare against what else their executed MACs would buy."""
    reports = paths.REPORTS / study
    table = pd.concat([pd.read_csv(reports / notebook / "tables" / "controls.csv") for notebook in PLANNING],
                      ignore_index=True)
    shown = []
    for plan, rows in table.groupby("plan", sort=False):
        strongest = rows.loc[rows["plan_over_control"].idxmax()]
        ratio = _intervals(rows, "plan_over_control")[strongest.name]
        counts = {title: str((rows["better"] == verdict).sum()) for title, verdict in
                  {"controls that it beats": "plan", "ties with": "tie", "loses to": "control"}.items()}
        shown.append({"plan": plan, "its strongest control": strongest["name"],
                      "score over that control's [95 %]": ratio} | counts)
    return _markdown(pd.DataFrame(shown))


TABLES = {"results": results_table, "controls": controls_table, "transformer": transformer_table,
          "students": students_table, "claims": claims_table}


def filled(text: str) -> str:
    """Replace what stands between ``<!-- TABLE:STUDY -->`` and ``<!-- end -->`` by that table of that study."""
    return re.sub(rf"(<!-- ({'|'.join(TABLES)}):(\w+) -->\n).*?(<!-- end -->)",
                  lambda found: f"{found[1]}{TABLES[found[2]](found[3])}\n{found[4]}", text, flags=re.DOTALL)


def _intervals(table: pd.DataFrame, column: str, low: str = "", high: str = "") -> pd.Series:
    ends = zip(table[column], table[low or f"{column}_low"], table[high or f"{column}_high"])
    return pd.Series([f"{value:.3g} [{least:.3g}, {most:.3g}]" for value, least, most in ends], table.index)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.study.report", description=__doc__.splitlines()[0])
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
