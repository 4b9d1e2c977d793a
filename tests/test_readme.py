"""The README: its numbers come from files, its links lead somewhere, its example runs."""

import re

import pytest

from lib import params, paths, report, teachers

README = (paths.ROOT / "README.md").read_text()


def test_its_tables_are_what_the_reports_say():
    assert report.filled(README) == README, "run: python -m lib.report readme"
    assert README.count("<!-- end -->") >= 2


@pytest.mark.parametrize("folder", ["", "notebooks/"])
def test_its_links_and_pictures_exist(folder):
    text = (paths.ROOT / folder / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (paths.ROOT / folder / target).exists(), target


def test_every_module_is_in_its_tree():
    named = set(re.findall(r"\b\w+\.py\b", README.split("## What is where")[1].split("## On your own")[0]))
    assert named == {path.name for path in (paths.ROOT / "lib").glob("*.py") if not path.name.startswith("_")}


def test_its_example_runs(tmp_path, monkeypatch, unet, schedule, capsys):
    teachers.save(tmp_path / "my-ddim-pipeline", unet, schedule)
    monkeypatch.chdir(tmp_path)
    example, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 20
    exec(example, made := {})
    assert "times fewer executed MACs" in capsys.readouterr().out
    assert len(made["images"]) == 16


def test_a_table_is_filled_from_a_studys_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    for notebook, rows in {"04_schedule_search": ["A,B,1.23456,1.1,1.3,control", "A,C,0.5,0.4,0.6,plan"],
                           "05_pruner_training": ["D,B,1.01,0.9,1.1,tie"]}.items():
        tables = tmp_path / "mine" / notebook / "tables"
        tables.mkdir(parents=True)
        header = "plan,name,plan_over_control,plan_over_control_low,plan_over_control_high,better"
        (tables / "controls.csv").write_text("\n".join([header, *rows]))
    text = report.filled("before\n<!-- controls:mine -->\nold\n<!-- end -->\nafter")
    assert "| A | B | 1.23 [1.1, 1.3] | 1 | 0 | 1 |" in text and "| D | B | 1.01 [0.9, 1.1] | 0 | 1 | 0 |" in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter") and "old" not in text


def test_publishing_copies_numbers_and_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    stage = tmp_path / "data" / "smoke" / "00_teacher_training"
    with pytest.raises(FileNotFoundError, match="00_teacher_training of study smoke is not done: nothing is published"):
        report.publish("smoke")
    others = set(params.NOTEBOOKS) - {"00_teacher_training"}
    for other in others:
        (tmp_path / "data" / "smoke" / other).mkdir(parents=True)
        (tmp_path / "data" / "smoke" / other / "metrics.json").write_text("{}")
    for name in ("metrics.json", "figures/a.png", "tables/b.csv", "teacher/unet/model.safetensors", "notebook.ipynb"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(name)
    stale = tmp_path / "reports" / "smoke" / "old.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    report.publish("smoke")
    found = {str(file.relative_to(tmp_path / "reports" / "smoke")) for file in (tmp_path / "reports").rglob("*.*")}
    assert found == {f"00_teacher_training/{name}" for name in ("metrics.json", "figures/a.png", "tables/b.csv")} | {
        f"{other}/metrics.json" for other in others}
