"""The README: its numbers come from files, its links lead somewhere, its example runs."""

import re

import numpy as np
import pandas as pd
import pytest

from lib.grid.model import Model
from lib.study import claims, params, paths, report
from lib.teachers import networks

README = (paths.ROOT / "README.md").read_text()


def test_its_tables_are_what_the_reports_say():
    assert report.filled(README) == README, "run: python -m lib.study.report readme"
    assert re.findall(r"<!-- (\w+:[\w,]+) -->", README) == [
        "brief:digits,letters,digits_full",
        "claims:digits,flexiffusion_claims,equal_training,dipgo_sweep,letters,dipgo_dit"]


def test_it_is_read_in_minutes():
    prose = re.sub(r"(?m)^\|[^\n]*$", "", README)
    assert "## Limits" in prose and len(prose.split()) <= 1200


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "notebooks/README.md", "lib/README.md",
                                  "reports/digits/README.md", "reports/letters/README.md"])
def test_links_and_pictures_exist(page):
    path = paths.ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_every_module_is_in_its_tree():
    lib = paths.ROOT / "lib"
    named = set(re.findall(r"\b\w+\.py\b", (lib / "README.md").read_text().split("## A plan on")[0]))
    assert named == {path.name for path in (*lib.glob("*.py"), *lib.glob("*/*.py")) if not path.name.startswith("_")}


def test_its_examples_run(tmp_path, monkeypatch, unet, schedule, capsys):
    networks.save(tmp_path / "my-ddim-pipeline", Model(unet, schedule))
    asked, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    own, = re.findall(r"```python\n(.*?)```", (paths.ROOT / "lib" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(paths.ROOT)
    assert len(asked.strip().splitlines()) <= 10
    exec(asked, made := {})
    assert made["image"].size == (32, 32)
    red, yellow = made["image"].getpixel((16, 16)), made["image"].getpixel((0, 0))
    assert yellow[1] > 150 > yellow[2] and red[0] > red[2]
    monkeypatch.chdir(tmp_path)
    assert len(own.splitlines()) <= 20
    exec(own, made := {})
    assert "times fewer executed MACs" in capsys.readouterr().out
    assert len(made["images"]) == 16


def test_a_table_is_filled_from_a_studys_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    columns = ["plan", "name", "n", *(f"plan_over_control{end}" for end in ("", "_low", "_high", "_word", "_needs")),
               *(f"second_over_control{end}" for end in ("", "_low", "_high", "_word")), "strongest"]
    forecasts = tmp_path / "mine" / "01_teacher_analysis" / "tables"
    forecasts.mkdir(parents=True)
    pd.DataFrame([["forecast, line, 9 steps", "E", 700, 1.5, 1.4, 1.6, "worse", 9, 1, 1, 1, "worse", True],
                  ["forecast, by error", "E", 700, 0.5, 0.4, 0.6, "better", 9, 1, 1, 1, "worse", True],
                  ["DeepCache, 9 steps", "E", 700, 1.5, 1.4, 1.6, "worse", 9, 1, 1, 1, "worse", True]], columns=columns
                 ).to_csv(forecasts / "forecast_controls.csv", index=False)
    again = ["forecast, by error", "F", 700, 1.1, 1, 1.2, "undecided", 9, 1, 1, 1, "worse", True]
    (tmp_path / "mine" / "06_comparison" / "tables").mkdir(parents=True)
    pd.DataFrame([again], columns=columns).to_csv(tmp_path / "mine" / "06_comparison" / "tables" / "forecasts.csv")
    rows = {"04_schedule_search": [["A", "B", 700, 1.23456, 1.1, 1.3, "worse", 90, 1.4, 1.2, 1.6, "worse", True],
                                   ["A", "C", 700, 1.5, 1.4, 1.6, "worse", 50, 0.5, 0.4, 0.6, "better", False]],
            "05_pruner_training": [["D", "B", 700, 1.01, 0.9, 1.1, "undecided", 4321.4, 1, 0.98, 1.02, "as good",
                                    True]],
            "06_comparison": []}
    for notebook, some in rows.items():
        tables = tmp_path / "mine" / notebook / "tables"
        tables.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(some, columns=columns).to_csv(tables / "controls.csv", index=False)
    text = report.filled("before\n<!-- controls:mine -->\nold\n<!-- end -->\nafter")
    luckier = "not C, the stronger on this noise"
    assert "| A | B | 1.23 [1.1, 1.3] | worse | 1.4 [1.2, 1.6]: worse | 0 | 0 | 0 | 2 |" in text, luckier
    assert "| D | B | 1.01 [0.9, 1.1] | undecided, n = 4,321 | 1 [0.98, 1.02]: as good | 0 | 0 | 1 | 0 |" in text
    assert "| forecast, line, 9 steps | E | 1.5" in text and "DeepCache, 9 steps" not in text, "it is a control"
    assert "| forecast, by error | F | 1.1" in text and "| E | 0.5" not in text, "what it met last"
    assert "5 comparisons at n = 700: 0 better, 0 as good, 2 undecided, 3 worse." in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter") and "old" not in text


def test_the_one_table_has_every_column_and_a_dash_for_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    row = {"macs": 30e6, "macs_ratio": 2.5, "n": 2000, "steps": 5,
           "extractor": "a classifier", "second_extractor": "a denoiser",
           "precision": 0.9, "recall": 0.8, "paired": 1.25, "parameters": 267313, "ms an image": 3.14159,
           "times faster": 2.4, "low": 2.3, "high": 2.5, "peak MB": 7.77, "raw": 1.375, "training": "some"} | {
               f"{name}{end}": 1.0 for name in ("score", "second_score", "ratio", "second_ratio", "ddim_ratio")
               for end in ("", "_low", "_high")}
    rows = pd.DataFrame([row | {"name": "few", "family": "few", "cost": None},
                         row | {"name": "DiP-GO, 22%", "family": "DiP-GO", "times faster": None, "cost": 12.3,
                                "second_ratio": None,
                                "second_ratio_difference": 0.1, "second_ratio_difference_low": -0.1,
                                "second_ratio_difference_high": 0.3}])
    for notebook, name, table in (("06_comparison", "everything", rows),
                                  ("07_transformer", "front", rows.drop(columns=["parameters", "cost", "training"]))):
        folder = tmp_path / "mine" / notebook / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)
    head, _, few, mine, _, below = report.results_table("mine").splitlines()
    scores = 5 * " 1 [1, 1] |"
    rest = f"1.38 |{scores} 0.90 | 0.80 | 1.25 | - | some |"
    assert few == f"| few | 30 | 2.50 | 267 | 3.14 | 2.4 [2.3, 2.5] | 7.8 | {rest}"
    assert mine.startswith("| **DiP-GO, 22%** | 30 | 2.50 | 267 | 3.14 | - |") and mine.endswith("| 12 | some |")
    assert " 1 [1, 1] | 0.1 [-0.1, 0.3] more | 1 [1, 1] |" in mine, "no ratio at the floor"
    assert head.count("|") == few.count("|") == mine.count("|")
    assert below == "n = 2,000 images a row; features of a classifier and a denoiser."
    assert report.transformer_table("mine").splitlines()[2] == few.replace(" | 267", "").removesuffix(" - | some |")


def test_the_students_table_says_how_small_how_fast_and_how_good(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    tables = tmp_path / "mine" / "02_block_search" / "tables"
    tables.mkdir(parents=True)
    row = {"trainings": 3, "extractor": "a classifier", "n": 5000, "macs_ratio": 2.25, "parameters_ratio": 2.0,
           "score": 0.5, "score_low": 0.4, "score_high": 0.6, "ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3,
           "least": 1.15, "greatest": 1.25}
    students = pd.DataFrame([row | {"name": "DiffNAS, 50%"}, row | {"name": "thin, 50%"}])
    students.to_csv(tables / "students.csv", index=False)
    pd.DataFrame([{"name": name, "times fewer MACs": 2.25, "times faster": faster, "low": 1.1, "high": 1.9}
                  for name, faster in {"thin, 50%": 1.5, "teacher": 1.0, "DiffNAS, 50%": 1.4}.items()]
                 ).to_csv(tables / "seconds.csv", index=False)
    _, _, mine, thin, _, below = report.students_table("mine").splitlines()
    rest = "0.5 [0.4, 0.6] | 1.2 [1.1, 1.3] | 1.15, 1.25 |"
    assert mine == f"| **DiffNAS, 50%** | 3 | 2.25 | 2.00 | 1.4 [1.1, 1.9] | {rest}"
    assert thin == f"| thin, 50% | 3 | 2.25 | 2.00 | 1.5 [1.1, 1.9] | {rest}"
    assert below == "n = 5,000 images a row; features of a classifier."
    students.assign(name=["DiffNAS, 50%", "teacher, trained on"], raw=0.7, second_score=0.3, second_score_low=0.2,
                    second_score_high=0.4, training="long").to_csv(tables / "students.csv", index=False)
    pd.DataFrame([{"name": name, "times faster": 1.4, "low": 1.1, "high": 1.9}
                  for name in ("teacher, trained on", "DiffNAS, 50%")]).to_csv(tables / "seconds.csv", index=False)
    assert "| 0.7 |" in report.students_table("mine") and "long" in report.students_table("mine")


def test_rivals_stand_beside_what_they_change(tmp_path, monkeypatch):
    """A loss beside the noise loss, all else beside the method; where single trainings differ nothing is sure."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    tables = tmp_path / "mine" / "03_joint_loss_ablation" / "tables"
    tables.mkdir(parents=True)
    rows = pd.DataFrame([["schedule", "fixed", 1.2, "worse", True], ["choice", "thin", 0.5, "better", False],
                         ["start", "weights: teacher", np.nan, "as good", True]],
                        columns=["part", "name", "ratio", "ratio_word", "agree"])
    rows = rows.assign(ratio_low=rows["ratio"] - 0.1, ratio_high=rows["ratio"] + 0.1, least=1.0, greatest=1.5,
                       second_ratio_word="worse", training="9 steps")
    rows.to_csv(tables / "ablation.csv", index=False)
    assert report.rivals("mine").splitlines()[2:] == [
        "| loss: fixed | 9 steps | loss: noise only | 1.2 [1.1, 1.3] | 1, 1.5 | worse | worse |",
        "| network: thin | 9 steps | the method | 0.5 [0.4, 0.6] | 1, 1.5 | undecided | worse |",
        "| weights: teacher | 9 steps | the method | - | 1, 1.5 | as good | worse |"]


def test_the_claims_stand_as_notebook_06_wrote_them(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    tables = tmp_path / "mine" / "06_comparison" / "tables"
    tables.mkdir(parents=True)
    (tables / "claims.csv").write_text('paper,claimed,setting,measured,control,holds\n'
                                       'A,"twice, at least",T = 9,1.5 times,B,no\nall,more,-,-,-,-\n')
    rows = report.claims_table("mine").splitlines()[2:]
    assert rows == ["| A | twice, at least | T = 9 | 1.5 times | B | no |"], "without what the study does not test"
    beside = tmp_path / "mine" / "07_transformer" / "tables"
    beside.mkdir(parents=True)
    row = {"claimed": "3 times", "here": "T = 7", "times fewer MACs": 3.0, "ratio_holds": "no", "ratio_holds_needs": 9}
    row |= {f"ratio{end}": 1.5 for end in ("", "_low", "_high")}
    row |= {f"over {name}{end}": value for name in ("even", "as many DDIM steps")
            for end, value in {"": 1.25, "_word": "worse"}.items()}
    pd.DataFrame([row]).to_csv(beside / "claims.csv", index=False)
    assert report.claims_table("mine").splitlines()[2] == (
        "| DiP-GO | 3 times (DiT) | T = 7 | 3.00 times fewer MACs at 1.5 [1.5, 1.5] times the score | "
        "worse (1.25) over steps left out evenly; worse (1.25) over as many DDIM steps | no |")


def test_a_study_without_notebook_06_has_flexiffusions_claims_from_04(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    tables = tmp_path / "mine" / "04_schedule_search" / "tables"
    tables.mkdir(parents=True)
    row = {"claimed": "twice, at least", "here": "DDIM, T = 9", "times": 2.0, "claimed times": 2.0,
           "full steps alone": False, "ratio": 1.2, "ratio_low": 1.1,
           "ratio_high": 1.3, "ratio_holds": "no", "ratio_holds_needs": 9, "as many DDIM steps": 0.9,
           "as many DDIM steps, word": "better", "DeepCache": np.nan, "DeepCache, word": "-", "strongest": "DeepCache",
           "over the strongest": 2.0, "over the strongest, word": "worse"}
    pd.DataFrame([row, row | {"claimed": "-"}]).to_csv(tables / "claims.csv", index=False)
    (only,) = report.claims_table("mine").splitlines()[2:]
    assert only.startswith("| Flexiffusion | twice, at least | DDIM, T = 9 | 2.00 times fewer MACs at 1.2 [1.1, ")
    assert only.endswith("| better (0.90) over as many DDIM steps; worse (2.00) over DeepCache | no |")
    pd.DataFrame([row | {"claimed": "-"}]).to_csv(tables / "claims.csv", index=False)
    assert report.claims_table("mine") == "", "no claim was tested"


def test_claims_of_several_studies_are_sorted_by_paper_and_say_where_they_were_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    for study, names in {"mine": ["DiP-GO", "Flexiffusion"], "other": ["DiffNAS"]}.items():
        tables = tmp_path / study / "06_comparison" / "tables"
        tables.mkdir(parents=True)
        rows = [[name, "twice", "T = 9", "1.5 times", "B", "no"] for name in names]
        pd.DataFrame(rows, columns=claims.COLUMNS).to_csv(tables / "claims.csv", index=False)
    head, _, *rows = report.claims_table("mine", "other").splitlines()
    assert head == "| paper | claimed | study | setting | measured here | control | holds? |"
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| DiffNAS", "twice", "[other](reports/other/README.md)"],
        ["| Flexiffusion", "twice", "[mine](reports/mine/README.md)"],
        ["| DiP-GO", "twice", "[mine](reports/mine/README.md)"]]


def test_a_study_without_notebook_06_has_diffnass_and_dipgos_claims_from_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    kept = {f"{name}{end}": value for name in ("ratio", "ddim_ratio")
            for end, value in {"": 1.2, "_low": 1.1, "_high": 1.3, "_holds": "no", "_holds_needs": 9}.items()}
    beside = {"strongest": True, "plan_over_control": 2.0, "plan_over_control_word": "worse"}
    for notebook, name, rows in (
            ("02_block_search", "students", [{"name": "DiffNAS, 50%", "steps": 9, "trainings": 3, "macs_ratio": 2.0}]),
            ("03_joint_loss_ablation", "claims", [{"claimed": "helps", "here": "9 steps", "holds": "undecided"}]),
            ("05_pruner_training", "front", [{"name": "DiP-GO, 22%", "macs_ratio": 4.4},
                                             {"name": "DiP-GO, refined, 22%", "macs_ratio": 4.4}]),
            ("05_pruner_training", "controls", [{"plan": "DiP-GO, 22%", "name": "searched steps"} | beside])):
        tables = tmp_path / "dipgo_sweep" / notebook / "tables"
        tables.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row | kept for row in rows]).to_csv(tables / f"{name}.csv", index=False)
    network, loss, gates = report.claims_table("dipgo_sweep").splitlines()[2:]
    assert "| DPM-Solver++, 9 steps, trained 3 x | 2.00 times fewer MACs at 1.2 [1.1, 1.3] times" in network
    assert loss == "| DiffNAS | helps | 9 steps | 1.2 [1.1, 1.3] times the score | - | undecided |"
    assert "| DDIM, T = 50 | 4.40 times fewer MACs at 1.2" in gates
    assert gates.endswith("| worse (2.00) over searched steps | no |")


def test_findings_are_sentences_from_a_studys_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    ways = [["DDIM, uniform 50", "control", "DDIM, uniform", 1, 1.0],
            ["DDIM, uniform 30", "control", "DDIM, uniform", 1.7, 1.0],
            ["fast", "control", "DPM-Solver++, uniform", 5, 0.9], ["poor", "control", "DDIM, uniform", 9, 1.2],
            ["DeepCache, 1:3", "control", "DeepCache, branch 0", 6, 1.0], ["DiP-GO, 22%", "DiP-GO", "DiP-GO", 4, 0.8],
            ["thin, 50%", "student", "thin", 8, 0.5],
            ["shortest path (teacher), 7-8 steps", "control", "shortest path (teacher)", 7, 0.6]]
    every = pd.DataFrame(ways, columns=["name", "kind", "family", "macs_ratio", "ddim_ratio"])
    every = every.assign(steps=5, ddim_ratio_low=every["ddim_ratio"] - 0.02, ddim_ratio_high=every["ddim_ratio"] + 0.02,
                         ddim_ratio_holds=every["ddim_ratio"].map(lambda ratio: "no" if ratio > 1.1 else "yes"))
    beside = pd.DataFrame({
        "strongest": [True, True, True, False, True], "plan": ["A", "A", "B", "B", "B again"], "score": 1.0,
        "plan_over_control_word": ["worse", "worse", "better", "better", "better"], "kind": "control",
        "plan_macs": [1, 1, 2, 2, 2], "steps": ["7-8", "9", "50", "50", "50"],
        "name": ["shortest path (teacher)", "learned steps", "searched steps, passes", "none",
                 "searched steps, passes"],
        "macs": [700, 500, 500, 500, 500], "macs_ratio": [7.0, 8.0, 9.0, 9.0, 9.0],
        "ddim_ratio": [0.6, 2.0, 0.1, 0.1, 0.1]})
    beside = beside.assign(ddim_ratio_low=beside["ddim_ratio"] - 0.1, ddim_ratio_high=beside["ddim_ratio"] + 0.1,
                           plan_over_control_difference_low=-0.5, plan_over_control_difference_high=0.0,
                           second_over_control_word=["worse", "worse", "better", "better", "better"])
    tested = pd.DataFrame({"holds": ["yes", "no", "no (n = 9)", "-"]})
    pays = pd.DataFrame({"reuse": ["hold", "line", "line", "line"], "order": [1, 1, 1, 2],
                         "nearness": [1.2, 0.8, np.nan, 1.1], "nearness_high": [1.3, 0.9, np.nan, 1.2]})
    forecasts = beside.iloc[:1].assign(plan="forecast, line", plan_over_control_difference=9.0)
    for notebook, name, table in (("06_comparison", "everything", every), ("06_comparison", "claims", tested),
                                  ("04_schedule_search", "dividends", pays),
                                  ("01_teacher_analysis", "forecast_controls", forecasts),
                                  ("06_comparison", "forecasts", forecasts.iloc[:0]),
                                  *((notebook, "controls", beside.assign(plan=notebook + beside["plan"],
                                                                         plan_over_control_difference=place))
                                    for place, notebook in enumerate(report.PLANNING))):
        folder = tmp_path / "mine" / notebook / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)
    controls, steps, methods, claimed, cached = report.findings("mine").splitlines()
    assert "**3 of 7 plans of the methods and our extensions (on the UNet) did better" in controls
    assert "(4 worse)." in controls, "two controls that are one count once, so do two plans"
    assert "**, by both judges 3: *04" in controls
    named = "*04_schedule_searchB*, *05_pruner_trainingB*, *06_comparisonB*"
    assert f": {named} (" in controls and report.verdict("mine") == controls
    assert "For 4 of them that control is full steps alone." in controls, "not where null passes are left out"
    tables = tmp_path / "mine" / "04_schedule_search" / "tables"
    equal = {"plan": "04_schedule_searchB", "name": "shortest path", "strongest": False,
             "plan_over_control_difference_low": 0.0, "plan_over_control_difference_high": 0.0}
    pd.concat([pd.read_csv(tables / "controls.csv"), pd.DataFrame([equal])]).to_csv(tables / "controls.csv")
    found = report.verdict("mine")
    assert "*04_schedule_searchB*, step for step *shortest path*, another control, *05" in found
    assert found.endswith("Plans that are themselves such steps, the same as a control's: 1.")
    assert "*shortest path, 7-8 steps*, 7.0 times fewer MACs at 0.6 [0.58, 0.62] of its score" in steps
    assert "Even *DDIM, uniform 30* keeps it" in steps
    assert "*DiP-GO, 22%*, 4.0 times fewer MACs" in methods
    assert claimed.endswith("** 1 yes, 0 undecided, 2 no, 0 not tested."), "without what the study does not test"
    brief = dict(row.split(" | ") for row in report.brief("mine").splitlines()[2:])
    assert [*brief.values()] == ["**3** of 7 (3) |", "**7.0 times** fewer: *shortest path, 7-8 steps* |",
                                 "**4.0 times** fewer: *DiP-GO, 22%* |", "**1** of 2 |", "**0** of 1 |"]
    assert cached.endswith("do: under DDIM, features held 0 of 1, forecast by a line 1 of 1; "
                           "under DPM-Solver++, features forecast by a line 0 of 1.")


def test_a_pruners_recipe_is_told_from_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    tables = tmp_path / "mine" / "05_pruner_training" / "tables"
    tables.mkdir(parents=True)
    rows = pd.DataFrame([["recipe", "threshold", 1.2, "worse"], ["post-processing", "greed", 0.5, "better"],
                         ["untrained", "line", 0.5, "better"],
                         ["rate", "3", 2.0, "worse"], ["gates", "a gate a layer", 0.9, "better"],
                         ["alpha", "1.5", 0.9, "better"],
                         ["backup", "line", 0.6, "better"]], columns=["part", "variant", "ratio", "ratio_word"])
    rows = rows.assign(ratio_low=rows["ratio"] - 0.05, ratio_high=rows["ratio"] + 0.05, executed=0.218,
                       updates=250,
                       **{"kept there": [0.2, 0.2, None, 0.98, 0.2, 0.2, 0.2]})
    rows.to_csv(tables / "ablation.csv", index=False)
    head, _, recipe, *_, line, _, _ = report.pruner("mine").splitlines()
    assert recipe == "| the recipe, its plan made by threshold | 1.2 [1.15, 1.25] | worse | 21.8% |"
    told = report.pruner("mine")
    assert "| no training, left-out steps forecast by a line | 0.5 [0.45, 0.55] | better | 21.8% |" in told
    assert "| learning rate 3 (gates still open) |" in told and told.count("still open)") == 1, "98 % of it was kept"
    assert "| a gate a layer |" in told and "| alpha: 1.5 |" in told
    assert line.startswith("| reused cells forecast by a line | 0.6") and head.count("|") == line.count("|")


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


def test_what_is_done_of_a_study_is_published_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    with pytest.raises(FileNotFoundError, match="00_teacher_training of study smoke is not done"):
        report.publish("smoke", so_far=True)
    stage = tmp_path / "data" / "smoke" / "00_teacher_training"
    stage.mkdir(parents=True)
    (stage / "metrics.json").write_text("{}")
    (stage / "meta.json").write_text('{"commit": "abc"}')
    (stage / "timings.json").write_text('{"minutes": 1.5}')
    with pytest.raises(FileNotFoundError, match="01_teacher_analysis of study smoke is not done"):
        report.publish("smoke")
    report.publish("smoke", so_far=True)
    report.write_readme("smoke")
    assert report.published("smoke") == ["00_teacher_training"]
    written = (tmp_path / "reports" / "smoke" / "README.md").read_text()
    assert "**Not run to its end**: without 01_teacher_analysis, 02_block" in written and "commit abc" in written
    assert "Minutes: 00 1.5; together 2," in written


def test_where_caching_pays_is_drawn_of_all_studies_that_mean_something(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    report.write_caching()
    assert not list(tmp_path.iterdir()), "nothing is published yet"
    rows = pd.DataFrame([{"order": order, "full_steps": 9, "branch": 0, "reuse": reuse, "calls": 10.3, "share": 0.15,
                          "alike": 0.99, "ratio": 1.1, "nearness": value, "nearness_high": value + 0.1}
                         for order in (1, 2) for reuse, value in (("hold", 0.5), ("line", 2.0), ("parabola", np.nan))])
    for study, notebook in (("mine", "04_schedule_search"), ("mine", "07_transformer"), ("smoke", "07_transformer")):
        folder = tmp_path / study / notebook / "tables"
        folder.mkdir(parents=True)
        rows.to_csv(folder / "dividends.csv", index=False)
    report.write_caching()
    found = pd.read_csv(tmp_path / "caching.csv")
    assert set(found["teacher"]) == {"UNet (mine)", "transformer (mine)"} and len(found) == 12
    assert (tmp_path / "caching.png").stat().st_size > 5000
    told = (tmp_path / "caching.md").read_text()
    assert "| UNet (mine) | DDIM | 1 of 1 | 0 of 1 |" in told, "cases at the floor are left out"
    assert "The kind of reuse: forecast by a line 0 of 4, held 4 of 4. " in told
    assert "neither predicts it" in told
