"""The report: one page that needs nothing else, with every heading, figure and number of the notebooks."""

import base64
import json
import re

import nbformat
import pytest

from lib.study import page, params, paths, report

PIXEL = base64.b64encode(b"no real picture").decode()
PROSE = """# 04 - A title

See [the teacher](00_teacher_training.ipynb), and $x_t = \sqrt{\alpha} x_0$:

$$ L = \sum_k L_k $$

## Step 1 - Look & see

`a $ in code $ stays`

| a | b |
|---|---|
| 1 | 2 |"""


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    new = nbformat.v4
    figure = new.new_code_cell('stage.figure(picture, table, "front")', outputs=[
        new.new_output("stream", name="stderr", text="a progress bar"), new.new_output("stream", text="1 < 2 steps"),
        new.new_output("display_data", {"image/png": PIXEL}, metadata={"figure": "front"}),
        new.new_output("display_data", {"text/html": '<table border="1" class="dataframe"><td>7.5</td></table>'})])
    given = new.new_code_cell("keep = 0.3", metadata={"tags": ["injected-parameters"]})
    for notebook in params.NOTEBOOKS:
        (tmp_path / "mine" / notebook / "figures").mkdir(parents=True)
        prose = PROSE.replace("04 - A title", notebook)
        nbformat.write(new.new_notebook(cells=[given, new.new_markdown_cell(prose), figure]),
                       tmp_path / "mine" / notebook / "notebook.ipynb")
        (tmp_path / "mine" / notebook / "figures" / "front.csv").write_text("name,ratio,ratio_low,ratio_high\n")
        (tmp_path / "mine" / notebook / "meta.json").write_text(json.dumps({"commit": "abc"}))
    (tmp_path / "mine" / "06_comparison" / "figures" / "front.png").write_bytes(base64.b64decode(PIXEL))
    return page.page("mine", list(params.NOTEBOOKS), {"Every way": "| plan |\n|---|\n| <i>x</i> 1.05 |"})


def test_it_needs_no_network_and_no_scripts(text):
    assert not re.findall(r"(?:src|href)=.(?!#|data:)", text) and "<script" not in text and "@import" not in text


def test_every_link_leads_somewhere(text):
    anchors = re.findall(r"id='([^']+)'", text)
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"href='#([^']+)'", text)) <= set(anchors)
    assert set(params.NOTEBOOKS) <= set(anchors)


def test_it_holds_all_that_was_found(text):
    count = len(params.NOTEBOOKS)
    assert text.count(f"data:image/png;base64,{PIXEL}") == count + 1 and text.count("7.5") == count
    assert text.count("1 &lt; 2 steps") == count and "a progress bar" not in text
    assert text.count("keep = 0.3") == count and "1.05" in text and "commit abc" in text
    assert "04, Step 1 - Look &amp; see: front. Bars: 95 % intervals." in text
    assert "<code>04_schedule_search/figures/front.csv</code>" in text


def test_notebooks_are_written_with_all_outputs_for_code_hosts(text, tmp_path, monkeypatch):
    """Published figures are linked, others written beside; links lead to the written notebooks."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    (tmp_path / "reports" / "mine").mkdir(parents=True)
    monkeypatch.setattr(report, "notebooks", lambda study: ["04_schedule_search"])
    path = tmp_path / "mine" / "04_schedule_search" / "notebook.ipynb"
    notebook = nbformat.read(path, 4)
    output = nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure size 1 x 1>"})
    table = nbformat.v4.new_output("display_data", {"text/html": "<style scoped>\ntd {}\n</style><table>8.25</table>"})
    notebook.cells.append(nbformat.v4.new_code_cell("figures.grid(images)", outputs=[output, table]))
    nbformat.write(notebook, path)
    report.write_notebooks("mine")
    target = tmp_path / "reports" / "mine"
    written = (target / "04_schedule_search.md").read_text()
    assert "![front](04_schedule_search/figures/front.png)" in written
    assert "[the teacher](00_teacher_training.md)" in written and "1 < 2 steps" in written and "$$ L =" in written
    assert "8.25" in written and "style" not in written
    shown, = (target / "04_schedule_search" / "shown").iterdir()
    assert shown.read_bytes() == base64.b64decode(PIXEL) and f"04_schedule_search/shown/{shown.name})" in written


def test_formulas_are_mathml_but_not_in_code(text):
    assert text.count("<math") == 2 * len(params.NOTEBOOKS) and "<msqrt>" in text and "$$" not in text
    assert "a $ in code $ stays" in text


def test_a_notebook_that_has_not_run_is_named(text, tmp_path):
    (tmp_path / "mine" / "05_pruner_training" / "notebook.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match="05_pruner_training"):
        page.page("mine", list(params.NOTEBOOKS), {})


def test_a_study_of_some_notebooks_has_a_page_of_these(text, tmp_path):
    (tmp_path / "mine" / "06_comparison" / "figures" / "front.png").unlink()
    part = page.page("mine", ["00_teacher_training", "05_pruner_training"], {})
    assert part.count(f"data:image/png;base64,{PIXEL}") == 2 and "04_schedule_search" not in part
