"""The leaderboard: a plan becomes a row, the same again, on the teacher that it fits."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest

from lib.grid.plan import Plan
from lib.study import leaderboard, paths


@pytest.fixture
def board(tmp_path, monkeypatch):
    """The digits' board, with few steps and images, in a folder of its own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shipped").symlink_to(paths.DATA / "shipped")
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(leaderboard, "STEPS", (6, 3))
    monkeypatch.setattr(leaderboard, "INTERVALS", (2,))
    load = leaderboard.params.load

    def small(name):
        return {key: values.model_copy(update={"score_images": 100, "teacher_steps": 6}) if "00" in key else values
                for key, values in load(name).items()}

    monkeypatch.setattr(leaderboard.params, "load", small)
    return leaderboard.Board("digits")


def test_a_plan_becomes_a_row_and_again_the_same(board):
    first = board.add({"mine": board.teacher.at((999, 600, 200))})
    assert first["name"].tolist() == ["mine"] and first["macs_ratio"].iloc[0] == pytest.approx(2)
    shutil.rmtree(paths.DATA / "leaderboard")  # nothing is kept: sampled and judged anew
    board = leaderboard.Board("digits")
    both = board.add({"mine again": board.teacher.at((999, 600, 200)), "one more": board.teacher.at((999, 500))})
    assert both["name"].tolist() == ["mine again", "one more"], "dearest first, each plan once"
    assert both["score"].iloc[0] == pytest.approx(first["score"].iloc[0])
    written = pd.read_csv(board.file)
    assert {Plan.load(path).key for path in board.file.with_suffix("").glob("*.json")} == set(written["key"])
    assert board.file.with_suffix(".png").stat().st_size
    assert "| one more | 2 |" in leaderboard.page({"digits": both})


def test_what_everybody_knows_fits_the_teacher(board):
    known = board.known()
    assert {"DDIM, uniform 3", "DPM-Solver++, uniform 6", "DeepCache-like, 1:2", "TaylorSeer-like, 1:2"} <= set(known)
    assert all(board.takes(plan) for plan in known.values())
    for notebook, name in (("04", "mine"), ("04", "front_mine_00"), ("04", "learned_steps_9"), ("06", "student"),
                           ("05", "genetic_search_22"), ("01", "forecast_line"), ("01", "ddim_uniform_5")):
        folder = paths.REPORTS / "digits" / f"{notebook}_some" / "plans"
        folder.mkdir(parents=True, exist_ok=True)
        board.teacher.save(folder / f"{name}.json")
    assert board.known().keys() - known.keys() == {
        "mine (04)", "learned steps 9 (04, LD3-like)", "genetic search 22 (05, ECAD-like)", "forecast line (01)"}
    assert board.macs(known["TaylorSeer-like, 1:2"]) < board.macs(known["DeepCache-like, 1:2"])


def test_a_plan_of_nobodys_is_refused(tmp_path, teacher):
    teacher.replace(blocks=("a", "b"), states=(((1, 1),) * teacher.steps,)).save(tmp_path / "other.json")
    command = [sys.executable, "-m", "lib.study.leaderboard", str(tmp_path / "other.json")]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "error: other: this plan is for none of the teachers that ship" in done.stderr
