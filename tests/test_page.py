"""The report: one page that needs nothing else, with every heading, figure and number of the notebooks."""

import base64
import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest

from lib.grid.plan import Plan
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
def text(tmp_path, monkeypatch, teacher):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    new = nbformat.v4
    figure = new.new_code_cell('stage.figure(picture, table, "front")', outputs=[
        new.new_output("stream", name="stderr", text="a progress bar"), new.new_output("stream", text="1 < 2 steps"),
        new.new_output("display_data", {"image/png": PIXEL}, metadata={"figure": "front"}),
        new.new_output("display_data", {"text/html": '<table border="1" class="dataframe"><td>7.5</td></table>'}),
        new.new_output("display_data", {"text/markdown": "**Answer:** *held* steps", "text/plain": "<an object>"})])
    given = new.new_code_cell("keep = 0.3", metadata={"tags": ["injected-parameters"]})
    for notebook in params.NOTEBOOKS:
        (tmp_path / "mine" / notebook / "figures").mkdir(parents=True)
        prose = PROSE.replace("04 - A title", notebook)
        nbformat.write(new.new_notebook(cells=[given, new.new_markdown_cell(prose), figure]),
                       tmp_path / "mine" / notebook / "notebook.ipynb")
        (tmp_path / "mine" / notebook / "figures" / "front.csv").write_text("name,ratio,ratio_low,ratio_high\n")
        (tmp_path / "mine" / notebook / "meta.json").write_text(json.dumps({"commit": "abc"}))
    shown = tmp_path / "mine" / "06_comparison"
    for folder in ("tables", "figures/plans"):
        (shown / folder).mkdir()
    pd.DataFrame({"name": ["mine, 20%", "without a plan"], "family": ["mine", "another"], "macs_ratio": [5.0, 2.0],
                  "honest_factor": [2.0, 1.0], "ratio": [1.25, 1.0], "ratio_low": [1.0, 0.9], "ratio_high": [1.5, 1.1],
                  "times faster": [4.5, np.nan]}).to_csv(shown / "tables" / "everything.csv", index=False)
    (tmp_path / "mine" / "04_schedule_search" / "plans").mkdir()
    teacher.save(tmp_path / "mine" / "04_schedule_search" / "plans" / "mine_20.json")
    (shown / "figures" / "plans" / "mine_20.png").write_bytes(b"no real sample")
    return page.page("mine", list(params.NOTEBOOKS), "* **A finding.**",
                     {"Every way": "| plan |\n|---|\n| <i>x</i> 1.05 |"})


def test_it_needs_no_network_and_no_scripts(text):
    assert not re.findall(r"(?:src|href)=.(?!#|data:)|url\((?!#)", text)
    assert "<script" not in text and "@import" not in text


def test_every_link_leads_somewhere(text):
    anchors = re.findall(r"\bid=['\"]([^'\"]+)['\"]", text)
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"href=['\"]#([^'\"]+)", text)) <= set(anchors)
    assert set(params.NOTEBOOKS) <= set(anchors)


@pytest.mark.parametrize("notebook", params.NOTEBOOKS)
def test_links_of_the_real_notebooks_lead_somewhere_in_both_copies(notebook):
    """On the page to a part of it or to the web, in Markdown to a file that is there or will be."""
    runs = list(params.NOTEBOOKS)[:-1]
    for cell in nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type == "markdown":
            assert not re.findall(r"href=.(?!#|https?://)", page._grounded(page._prose(cell.source, notebook)))
            for link in re.findall(report.LINK, cell.source):
                written = report._from_reports(link, runs)
                there = written.removesuffix(".md") in runs or (paths.REPORTS / "mine" / written).resolve().exists()
                assert written.startswith(("http", "#")) or there, link


def test_it_holds_all_that_was_found(text):
    count = len(params.NOTEBOOKS)
    assert text.count(f"data:image/png;base64,{PIXEL}") == count and text.count("<td>7.5<") == count
    assert text.count("<strong>Answer:</strong> <em>held</em> steps") == count and "an object" not in text
    assert text.count("1 &lt; 2 steps") == count and "a progress bar" not in text
    assert text.count("keep = 0.3") == count and "1.05" in text and "commit abc" in text
    assert "04, Step 1 - Look &amp; see: front. Bars: 95 % intervals." in text
    assert "<code>04_schedule_search/figures/front.csv</code>" in text


def test_a_point_of_the_front_leads_to_its_plan_its_images_and_its_file(text, teacher, tmp_path):
    """What has no plan leads nowhere."""
    assert set(re.findall(r'xlink:href="(#plan[^"]*)"', text)) == {"#plan-mine_20"}
    card, = re.findall(r"<section class='card' id='plan-mine_20'>.*?</section>", text, re.DOTALL)
    assert "mine, 20%" in card and "5.00 times fewer executed MACs than the teacher, 4.50 times faster" in card
    assert "1.25 [1, 1.5]" in card and base64.b64encode(b"no real sample").decode() in card
    packed, = re.findall(r"data:application/json;base64,([^']+)'", card)
    (tmp_path / "plan.json").write_bytes(base64.b64decode(packed))
    assert Plan.load(tmp_path / "plan.json") == teacher
    assert text.index("A finding.") < text.index("id='front'") < text.index("<nav>")


def test_notebooks_are_written_with_all_outputs_for_code_hosts(text, tmp_path, monkeypatch):
    """Published figures are linked, others written beside; links lead to the written notebooks."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    (tmp_path / "reports" / "mine" / "04_schedule_search").mkdir(parents=True)
    (tmp_path / "reports" / "mine" / "04_schedule_search" / "metrics.json").write_text("{}")
    monkeypatch.setattr(report, "notebooks", lambda study: ["04_schedule_search", "05_pruner_training"])
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
    assert "[the teacher](../../notebooks/00_teacher_training.ipynb)" in written
    assert "1 < 2 steps" in written and "$$ L =" in written
    assert "8.25" in written and "style" not in written
    shown, = (target / "04_schedule_search" / "shown").iterdir()
    assert shown.read_bytes() == base64.b64decode(PIXEL) and f"04_schedule_search/shown/{shown.name})" in written


def test_a_run_has_todays_prose_where_its_code_is_todays(tmp_path, monkeypatch):
    """And its own where the code is another, as its outputs may not fit today's prose."""
    new = nbformat.v4

    def write(path, prose, code, **outputs):
        cells = [new.new_markdown_cell(prose), new.new_code_cell("keep = 0.5"), new.new_code_cell(code, **outputs)]
        if outputs:
            cells.insert(2, new.new_code_cell("keep = 0.3", metadata={"tags": ["injected-parameters"]}))
        path.mkdir(parents=True)
        nbformat.write(new.new_notebook(cells=cells), path / ("notebook.ipynb" if outputs else "mine.ipynb"))

    for place in ("DATA", "NOTEBOOKS"):
        monkeypatch.setattr(paths, place, tmp_path / place)
    write(tmp_path / "NOTEBOOKS", "new words", "print(keep)")
    stream = new.new_output("stream", text="0.3")
    write(tmp_path / "DATA" / "same" / "mine", "old words", "print(keep)", outputs=[stream])
    write(tmp_path / "DATA" / "other" / "mine", "old words", "print(2 * keep)", outputs=[stream])
    found = page.executed("same", "mine").cells
    assert [cell.source for cell in found] == ["new words", "keep = 0.5", "keep = 0.3", "print(keep)"]
    assert found[-1].outputs == [stream]
    assert page.executed("other", "mine").cells[0].source == "old words"


def test_formulas_are_mathml_but_not_in_code(text):
    assert text.count("<math") == 2 * len(params.NOTEBOOKS) and "<msqrt>" in text and "$$" not in text
    assert "a $ in code $ stays" in text


def test_a_notebook_that_has_not_run_is_named(text, tmp_path):
    (tmp_path / "mine" / "05_pruner_training" / "notebook.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match="05_pruner_training"):
        page.page("mine", list(params.NOTEBOOKS), "* **A finding.**", {})


def test_a_study_of_some_notebooks_has_a_page_of_these(text, tmp_path):
    part = page.page("mine", ["00_teacher_training", "05_pruner_training"], "", {})
    assert part.count(f"data:image/png;base64,{PIXEL}") == 2 and "04_schedule_search" not in part


def test_notebooks_of_no_study_are_run_and_written_with_what_they_show(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    monkeypatch.setattr(report, "FREE", ("free",))
    new = nbformat.v4
    drawn = "import sys\nimport matplotlib.pyplot as plt\nprint('late', file=sys.stderr)\n_ = plt.plot([6 * 7])"
    cells = [new.new_markdown_cell("See [itself](free.ipynb), [another](01_teacher_analysis.ipynb)."),
             new.new_code_cell("print(6 * 7)"), new.new_code_cell(drawn)]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "free.ipynb")
    report.write_free()
    text = (tmp_path / "notebooks" / "free.md").read_text()
    assert "See [itself](free.md), [another](../../notebooks/01_teacher_analysis.ipynb)." in text
    assert "    42\n" in text and "late" not in text.replace(drawn, "")
    picture, = re.findall(r"!\[png\]\((.*)\)", text)
    assert (tmp_path / "notebooks" / picture).stat().st_size > 1000
