"""The front to click through, as HTML that runs no script: each point leads to its plan, images and JSON."""

import base64
import html
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib.grid.plan import GIVEN, Plan
from lib.judging.estimates import text
from lib.study import figures, paths
from lib.study.stage import Stage

STYLE = """
.front { overflow-x: auto; } .front svg { width: 100%; min-width: 40rem; height: auto; }
.front a:hover path, .front a:hover use { stroke: #d55e00; opacity: 1 !important; }
.card { display: none; } .card:target { display: block; position: fixed; inset: auto 0 0 0; max-height: 48vh;
  overflow: auto; background: white; border-top: 2px solid #999; padding: .8rem 1rem; z-index: 1; }
.card img { max-width: min(100%, 54rem); display: block; margin: .4rem auto; }
.card .samples { image-rendering: pixelated; }
.card .close { float: right; font-size: 1.4rem; text-decoration: none; }
@media print { .card { display: none !important; } }
"""
PLANNED = ("01_teacher_analysis", "04_schedule_search", "05_pruner_training", "06_comparison")
"""The notebooks that save the plans of the front."""


def explorer(study: str) -> str:
    """Give the front of notebook 06 with a card for each point that has a plan.

    Raises
    ------
    FileNotFoundError
        If notebook 06 of the study has not run.
    """
    folder = paths.DATA / study
    table = pd.read_csv(folder / "06_comparison" / "tables" / "everything.csv")
    saved = {}
    for name in table["name"]:
        files = (Stage.plan_file(folder / notebook, name) for notebook in PLANNED)
        saved[name] = next((path for path in files if path.exists()), None)
    links = {name: f"#plan-{Stage.key(name)}" for name, path in saved.items() if path}
    figures.style()
    drawn = _svg(figures.front(table, links))
    cards = "".join(_card(row, saved[row["name"]], folder) for row in table.drop_duplicates("name").to_dict("records")
                    if row["name"] in links)
    return f"<style>{STYLE}</style><div class='front' id='front'>{drawn}</div>{cards}"


def _card(row: dict, path: Path, folder: Path) -> str:
    name, key = row["name"], Stage.key(row["name"])
    plan, content = Plan.load(path), path.read_text()
    words = f"{row['macs_ratio']:.2f} times fewer executed MACs than the teacher"
    if pd.notna(row.get("times faster")):
        words += f", {row['times faster']:.2f} times faster"
    if pd.notna(row["ratio"]):
        words += f"; {text(row, 'ratio')} of the best teacher's score"
    samples = folder / "06_comparison" / "figures" / "plans" / f"{key}.png"
    images = f"<img class='samples' alt='images' src='{_data(samples.read_bytes())}'>" if samples.exists() else ""
    maps = "".join(f"<img alt='plan' src='{_data(_png(figures.plan_map(plan, one)))}'>"
                   for one in (plan.passes if len(plan.passes) > 1 else (GIVEN,)))
    packed = base64.b64encode(content.encode()).decode()
    return (f"<section class='card' id='plan-{key}'><a class='close' href='#front' title='close'>&times;</a>"
            f"<h3>{html.escape(name)}</h3><p>{html.escape(words)}. "
            f"<a download='{key}.json' href='data:application/json;base64,{packed}'>plan as JSON</a>, "
            "for <code>python -m lib.apply</code></p>"
            f"{images}{maps}<details><summary>JSON</summary><pre>"
            f"{html.escape(json.dumps(json.loads(content)))}</pre></details></section>")


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(figure: Figure) -> bytes:
    figure.savefig(buffer := io.BytesIO(), dpi=80)
    plt.close(figure)
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    """Give a figure as SVG to stand inside a page: the same bytes each time, text as text."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "front"}):
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
