"""Copies a study's numbers and figures to ``reports/<study>/`` and writes the README's tables from them."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pandas as pd

from lib import paths
from lib.params import NOTEBOOKS, ParamsError, studies

KEPT = ("metrics.json", "timings.json", "meta.json", "figures/*.png", "figures/*.csv", "tables/*.csv", "plans/*.json")


def publish(study: str) -> Path:
    """Copy what a study found (numbers, tables, figures, plans; no weights) to its reports folder."""
    if study not in studies():
        raise ParamsError(f"unknown study {study!r}. There are: {', '.join(studies())}.")
    target = paths.REPORTS / study
    shutil.rmtree(target, ignore_errors=True)
    for notebook in NOTEBOOKS:
        source = paths.DATA / study / notebook
        for found in sorted(file for pattern in KEPT for file in source.glob(pattern)):
            copy = target / notebook / found.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, copy)
    return target


def metrics(study: str) -> dict[str, dict[str, float]]:
    """Give the published metrics and timings of each notebook of a study."""
    return {notebook: json.loads((paths.REPORTS / study / notebook / "metrics.json").read_text())
            | json.loads((paths.REPORTS / study / notebook / "timings.json").read_text()) for notebook in NOTEBOOKS}


def results_table(study: str) -> str:
    """Give the study's main table as Markdown: what was sampled, at which cost, how good."""
    table = pd.read_csv(paths.REPORTS / study / "04_schedule_search" / "tables" / "front.csv")
    lines = ["| model and plan | executed MACs, times fewer | score [95 %] | ratio to the best teacher [95 %] | "
             "ratio to DDIM-50 [95 %] |", "|---|---|---|---|---|"]
    for _, row in table.iterrows():
        cells = [row["name"], f"{row['macs_ratio']:.2f}"]
        cells += [f"{row[c]:.3f} [{row[c + '_low']:.3f}, {row[c + '_high']:.3f}]"
                  for c in ("score", "ratio", "ddim_ratio")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Replace what stands between ``<!-- results:STUDY -->`` and ``<!-- end -->`` by that study's table."""
    return re.sub(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)",
                  lambda found: f"{found[1]}{results_table(found[2])}\n{found[3]}", text, flags=re.DOTALL)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.report", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["publish", "readme"])
    parser.add_argument("--study", help="what to publish")
    arguments = parser.parse_args()
    if arguments.command == "publish":
        print(f"published to {publish(arguments.study)}")
    else:
        readme = paths.ROOT / "README.md"
        readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()
