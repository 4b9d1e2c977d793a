"""A study's report as one page: the notebooks' prose, tables and figures, self-contained and offline."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import latex2mathml.converter
import nbformat
import pandas as pd
from nbconvert.filters import markdown2html

from lib.study import paths
from lib.study.explorer import explorer

STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 54rem; margin: 0 auto; padding: 1rem; color: #222; }
h1, h2, h3 { line-height: 1.25; } h2 { border-top: 2px solid #ddd; padding-top: 1.5rem; margin-top: 3rem; }
nav ol { columns: 2 18rem; padding-left: 1.8rem; } nav li { break-inside: avoid; margin-bottom: .5rem; }
nav ul { list-style: none; padding-left: 1.2rem; } nav summary { font-size: 1rem; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { font-size: .85rem; color: #555; text-align: center; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .35rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
pre { background: #f6f6f6; padding: .6rem; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.said { background: #f6f6f6; padding: .1rem .6rem; margin: .5rem 0; }
code { font-size: .9em; background: #f6f6f6; } math[display=block] { overflow-x: auto; overflow-y: hidden; }
details { font-size: .85rem; color: #555; }
@media print { body { max-width: none; font-size: 10pt; } nav, details { display: none; } .wide { overflow: visible; }
  figure, tr { break-inside: avoid; } h2 { break-before: page; border: 0; } table { font-size: 7pt; }
  td { white-space: normal; } }
@media screen and (min-width: 60rem) { .wide { margin-inline: calc(50% - min(50vw - 2rem, 44rem)); }
  table { margin-inline: auto; } }
@media (max-width: 40rem) { body { padding: .6rem; } h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; } }
"""


def page(study: str, notebooks: Sequence[str], summary: str, tables: dict[str, str]) -> str:
    """Give a study's report as HTML.

    Parameters
    ----------
    notebooks : those that the study runs
    summary : Markdown, in words, to stand above notebook 06's front, where the study has it
    tables : dict of title to Markdown, to stand at the top, below that front; the first holds its numbers

    Raises
    ------
    FileNotFoundError
        If a notebook of the study has not run.
    """
    parts = {notebook: _section(study, notebook) for notebook in notebooks}
    found = json.loads((paths.DATA / study / next(iter(parts)) / "meta.json").read_text())
    about = ", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, str | int | float))
    top = "".join(f"<h2 id='{_anchor(title)}'>{title}</h2><div class='wide'>{_prose(text)}</div>"
                  for title, text in tables.items())
    contents = "".join(f"<li><a href='#{_anchor(title)}'>{title}</a></li>" for title in tables)
    for notebook, body in parts.items():
        steps = "".join(f"<li><a href='#{anchor}'>{text}</a></li>"
                        for anchor, text in re.findall(r"<h3 id='([^']+)'>(.*?)</h3>", body))
        contents += (f"<li><details><summary><a href='#{notebook}'>{_title(body)}</a></summary>"
                     f"<ul>{steps}</ul></details></li>")
    front = ""
    if "06_comparison" in parts:
        numbers = next(iter(tables))
        front = (f"{_prose(summary)}{explorer(study)}<p>Score over the best teacher's against executed MACs: down is "
                 "better, right is cheaper. Bars: 95 % intervals. <b>Click a point</b> for its plan, its images and "
                 f"its file. Numbers: <a href='#{_anchor(numbers)}'>{numbers}</a>.</p>")
    body = _grounded("".join(parts.values()))
    return document(f"Lean Diffusion: {study}", (
        f"<h1>Lean Diffusion: the study <i>{study}</i></h1>"
        f"<p>Made by the pipeline from what its notebooks found; all code stands there. {html.escape(about)}.</p>"
        f"{front}<nav><ol>{contents}</ol></nav>{top}{body}"))


def document(title: str, body: str) -> str:
    """Give a page of a title and a body, both HTML, in the one style; it needs nothing else."""
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
            f"<style>{STYLE}</style></head><body>{body}</body></html>\n")


def executed(study: str, notebook: str) -> nbformat.NotebookNode:
    """Read a notebook that a study has run, with today's prose where its code is today's.

    A run depends on the code of its notebook alone, so the prose may have been mended since.
    """
    ran = nbformat.read(paths.DATA / study / notebook / "notebook.ipynb", 4)
    today = nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", 4)
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    sources = [cell.source for cell in today.cells if cell.cell_type == "code"]
    if [cell.source for cell in code if not _injected(cell)] == sources:
        ran.cells = []
        for cell in today.cells:
            ran.cells.append(code.pop(0) if cell.cell_type == "code" else cell)
            while code and _injected(code[0]):
                ran.cells.append(code.pop(0))
    return ran


def _injected(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell holds the study's parameters, as papermill puts them behind the notebook's own."""
    return "injected-parameters" in cell.metadata.get("tags", [])


def _section(study: str, notebook: str) -> str:
    folder, parts, place = paths.DATA / study / notebook / "figures", [], ""
    for cell in executed(study, notebook).cells:
        if cell.cell_type == "markdown":
            parts.append(_prose(cell.source, notebook))
            place = next(iter(re.findall(r"^#+ (.*)", cell.source, re.M)[::-1]), place)
        elif _injected(cell):
            parts.append(f"<details><summary>Parameters</summary><pre>{html.escape(cell.source)}</pre></details>")
        else:
            parts += [_output(output, f"{notebook[:2]}, {place}", folder) for output in cell.outputs]
    return "".join(parts)


def _output(output: nbformat.NotebookNode, place: str, folder: Path) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        caption = html.escape(place)
        if name := output.metadata.get("figure"):  # as `lib.study.stage.Stage.figure` shows it
            numbers = folder / f"{name}.csv"
            bars = any(column.endswith("_low") for column in pd.read_csv(numbers, nrows=0))
            caption += f": {numbers.stem.replace('_', ' ')}. {'Bars: 95 % intervals. ' * bars}"
            caption += f"Numbers: <code>{numbers.parent.parent.name}/figures/{numbers.name}</code>"
        return figure(data["image/png"].strip(), place, caption)
    if "text/html" in data:
        return f"<div class='wide'>{re.sub(' border=.1. class=.dataframe.', '', data['text/html'])}</div>"
    if "text/markdown" in data:
        return f"<div class='said'>{_prose(data['text/markdown'])}</div>"
    text = output.get("text") if output.get("name") == "stdout" else data.get("text/plain")
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def figure(png: str, alt: str, caption: str) -> str:
    """Give a picture, as base64, with its caption, as HTML."""
    return (f"<figure><img alt='{html.escape(alt)}' src='data:image/png;base64,{png}'>"
            f"<figcaption>{caption}</figcaption></figure>")


def _prose(text: str, notebook: str = "") -> str:
    """Turn Markdown into HTML, formulas into MathML; headings one level down, with anchors."""
    formulas: list[str] = []

    def keep(found: re.Match) -> str:
        display = "block" if found[0].startswith("$$") else "inline"
        formulas.append(latex2mathml.converter.convert(found[1] or found[2], display=display))
        return f"FORMULA{len(formulas) - 1}END"

    pieces = re.split(r"(`[^`]*`)", text)  # a dollar in code is a dollar
    text = "".join(piece if piece.startswith("`") else re.sub(r"\$\$(.+?)\$\$|\$([^$]+?)\$", keep, piece, flags=re.S)
                   for piece in pieces)
    made = re.sub(r"<a class=.anchor-link.*?</a>", "", markdown2html(text))
    made = re.sub(r"FORMULA(\d+)END", lambda found: formulas[int(found[1])], made)
    made = re.sub(r"href=.(\d\d_\w+)\.ipynb.", r"href='#\1'", made).replace("<table>", "<div class='wide'><table>")
    made = made.replace("</table>", "</table></div>")

    def heading(found: re.Match) -> str:
        level, words = int(found[1]) + 1, found[2]
        anchor = notebook if level == 2 else f"{notebook}-{_anchor(words)}"
        return f"<h{level} id='{anchor}'>{words}</h{level}>"

    return re.sub(r"<h(\d)[^>]*>(.*?)</h\d>", heading, made)


def _grounded(body: str) -> str:
    """Keep the links that lead to a part of the body or to the web; of others, which a lone page lacks, the words."""
    anchors = set(re.findall(r"\bid='([^']+)'", body))

    def link(found: re.Match) -> str:
        leads = found[1].startswith(("http://", "https://")) or found[1].removeprefix("#") in anchors
        return found[0] if leads else found[2]

    return re.sub(r"<a href=['\"]([^'\"]*)['\"][^>]*>(.*?)</a>", link, body, flags=re.S)


def _title(body: str) -> str:
    return re.search(r"<h2[^>]*>(.*?)</h2>", body)[1]


def _anchor(words: str) -> str:
    return re.sub(r"\W+", "-", re.sub(r"<[^>]*>", "", words)).strip("-").lower()
