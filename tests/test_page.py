"""The report: one page that needs nothing else, with every heading, figure and number of the notebooks."""

import base64
import json
import re

import nbformat
import pytest

from lib.study import page, params, paths

PIXEL = base64.b64encode(b"no real picture").decode()
PROSE = """# 04 - A title

See [the teacher](00_teacher_training.ipynb), and $x_t = \sqrt{\alpha} x_0$:

$$ L = \sum_k L_k $$

## Step 1 - Look & see

`a $ in code $ stays`

| a | b |
|---|---|
| 1 | 2 |"""

SAVING = ['figures.save(picture, table, stage.folder("figures"), "front")', 'stage.figure(picture, table, "front")',
          'stage.figure(pruning.maps(table, "gate"), table[["gate", "kept"]],\n             "front")\nprint("done")']
"""Ways in which a cell saves a figure."""


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    new = nbformat.v4
    figure = new.new_code_cell(outputs=[
        new.new_output("stream", name="stderr", text="a progress bar"), new.new_output("stream", text="1 < 2 steps"),
        new.new_output("display_data", {"image/png": PIXEL}),
        new.new_output("display_data", {"text/html": '<table border="1" class="dataframe"><td>7.5</td></table>'})])
    given = new.new_code_cell("keep = 0.3", metadata={"tags": ["injected-parameters"]})
    for number, notebook in enumerate(params.NOTEBOOKS):
        (tmp_path / "mine" / notebook / "figures").mkdir(parents=True)
        figure.source = SAVING[number % len(SAVING)]
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
    assert all(f"<code>{notebook}/figures/front.csv</code>" in text for notebook in params.NOTEBOOKS)


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
