"""The pipeline: what a change re-runs, what stages depend on, and the environments' pins."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from dvc.repo import Repo
from ruamel.yaml import YAML

from lib.grid.model import Model
from lib.grid.plan import Plan
from lib.study import params, paths, report, run, stage
from lib.teachers import networks

STAGES = list(params.NOTEBOOKS)
IDLE = {"lib/__init__.py", *(f"lib/{wing}/__init__.py" for wing in ("grid", "teachers", "judging", "methods", "study")),
        "lib/study/run.py", "lib/study/paths.py", "lib/study/params.py"}


def yaml(path):
    return YAML(typ="safe", pure=True).load(path.read_text())


# ---- what stages depend on ------------------------------------------------------------------------------------------


def imports(source):
    """The files of lib that Python source imports, as dvc.yaml names them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = module.replace(".", "/")
                found |= {name for name in (f"{path}.py", f"{path}/__init__.py") if (paths.ROOT / name).exists()}
    return found


def needed(notebook):
    """The files of lib that a notebook needs, through other modules too.

    The runner, paths and the checks of parameters only start things; no result hangs on them. (The parameters' values
    are dependencies of their own.) The wings' own files hold words alone.
    """
    return behind(imports("\n".join(c.source for c in nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", 4).cells
                                    if c.cell_type == "code")))


def behind(todo):
    """These files of lib, and all that they import, through others too."""
    seen, todo = set(), set(todo)
    while todo:
        name = todo.pop()
        if name not in seen | IDLE:
            seen.add(name)
            todo |= imports((paths.ROOT / name).read_text())
    return seen


@pytest.mark.parametrize("notebook", STAGES)
def test_a_stage_depends_on_just_what_its_notebook_imports(notebook):
    done = yaml(paths.ROOT / "dvc.yaml")["stages"][notebook]["do"]
    assert {dep for dep in done["deps"] if dep.startswith("lib/")} == needed(notebook)
    assert f"data/code/{notebook}.py" in done["deps"]
    source = (paths.NOTEBOOKS / f"{notebook}.ipynb").read_text()
    others = re.findall(r'params\.load\(p\.study\)\[\\"(\w+)\\"\]', source)  # of earlier notebooks
    assert done["params"] == [{"params/${item}.yaml": ["common", *map(params.section, [*others, notebook])]}]


def test_publishing_depends_on_just_what_it_imports():
    done = yaml(paths.ROOT / "dvc.yaml")["stages"]["publish"]["do"]
    assert {dep for dep in done["deps"] if dep.startswith("lib/")} == behind({"lib/study/report.py"})


@pytest.mark.parametrize("notebook", STAGES)
def test_a_stage_depends_on_just_what_its_notebook_reads(notebook):
    done = yaml(paths.ROOT / "dvc.yaml")["stages"][notebook]["do"]
    source = "\n".join(c.source for c in nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", 4).cells)
    read = set(re.findall(r'stage\.read\("([^"]+)"\)', source))
    assert {dep.removeprefix("data/${item}/") for dep in done["deps"] if "${item}" in dep} == read | {"sources.json"}
    assert "requirements.lock" in done["deps"]


# ---- what a change re-runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project whose smoke study is recorded as done, with made-up results."""
    root = tmp_path_factory.mktemp("project")
    for name in ("lib", "notebooks", "params"):
        shutil.copytree(paths.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(paths.ROOT / "data" / "shipped", root / "data" / "shipped")
    shutil.copytree(paths.ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    for name in ("dvc.yaml", "requirements.lock", ".gitignore", ".dvcignore"):
        shutil.copy(paths.ROOT / name, root / name)
    pipeline = root / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("      digits: digits\n", "      smoke: smoke\n"))
    command(root, "git", "init", "--quiet")
    command(root, "git", "config", "user.name", "tests")
    command(root, "git", "config", "user.email", "tests@localhost")
    command(root, "git", "add", ".")
    command(root, "git", "commit", "--quiet", "--message", "start")
    dvc(root, "repro", "code")
    for name, done in yaml(root / "dvc.yaml")["stages"].items():
        if name != "code":
            for out in (*done["do"].get("outs", ()), *done["do"].get("metrics", ())):
                make(root / (out if isinstance(out, str) else next(iter(out))).replace("${item}", "smoke"))
    dvc(root, "commit", "--force")
    return root


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "metrics.json":
        path.write_text('{"score": 1.5}')
    elif path.suffix:
        path.write_text(path.name)
    else:
        path.mkdir(exist_ok=True)
        (path / "file").write_text(path.name)


def environment(root):
    return {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root)}


def command(root, *words):
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env=os.environ | environment(root))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(root, *words):
    return command(root, sys.executable, "-m", "dvc", *words)


def changed(root):
    """The stages that `dvc repro` would run for their own sake; what follows runs if their results differ."""
    with contextlib.chdir(root), mock.patch.dict(os.environ, environment(root)), Repo() as repo:
        repo.reproduce("code")
        return {found.name.removesuffix("@smoke") for found in repo.reproduce(dry=True)} - {"sources"}


@pytest.fixture
def change(project):
    """Edits a file of the project, and puts it back afterwards."""
    kept = {}

    def edit(name, old, new):
        path = project / name
        kept.setdefault(path, path.read_text())
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    yield edit
    for path, text in kept.items():
        path.write_text(text)


def test_nothing_runs_twice(project):
    assert changed(project) == set()


def test_prose_and_outputs_of_a_notebook_re_run_nothing(project, change):
    change("notebooks/00_teacher_training.ipynb", "real scans of handwritten digits", "scans of digits")
    change("notebooks/00_teacher_training.ipynb", '"outputs": []',
           '"outputs": [{"name": "stdout", "output_type": "stream", "text": ["seen\\n"]}]')
    change("notebooks/00_teacher_training.ipynb", '"execution_count": null', '"execution_count": 7')
    assert changed(project) == set()


def test_code_of_a_notebook_re_runs_its_stage(project, change):
    change("notebooks/04_schedule_search.ipynb", "figures.step_kinds(", "figures.step_kinds( ")
    assert changed(project) == {"04_schedule_search"}


def test_a_parameter_re_runs_the_stages_that_know_it(project, change):
    change("params/smoke.yaml", "workers: 1", "workers: 2")
    assert changed(project) == {"04_schedule_search"}
    change("params/smoke.yaml", "seed: 0", "seed: 1")
    assert changed(project) == set(STAGES)


def test_another_studys_parameter_re_runs_nothing(project, change):
    change("params/digits.yaml", "seed: 0", "seed: 1")
    assert changed(project) == set()


@pytest.mark.parametrize(("module", "expected"), [
    ("methods/flexiffusion", set(STAGES) - {"00_teacher_training", "02_block_search", "03_joint_loss_ablation"}),
    ("methods/dipgo/pruning", {"05_pruner_training", "06_comparison", "07_transformer"}),
    ("methods/compose", {"06_comparison"}), ("methods/peers", {"03_joint_loss_ablation", "07_transformer"}),
    ("judging/analysis", {"01_teacher_analysis", "04_schedule_search", "07_transformer"}),
    ("study/run", set()), ("study/params", set()),
    ("grid/plan", {*STAGES, "publish"}), ("study/explorer", {"publish"}),
    ("judging/controls", {*STAGES, "publish"} - {"00_teacher_training", "02_block_search", "03_joint_loss_ablation"})])
def test_a_module_re_runs_the_stages_that_import_it(project, change, module, expected):
    change(f"lib/{module}.py", '"""', '"""Changed: ')
    assert changed(project) == expected


@pytest.mark.parametrize("path", ["data/smoke/sources.json", "requirements.lock"])
def test_other_images_and_other_libraries_re_run_everything(project, change, path):
    first = (project / path).read_text().split("\n")[0]
    change(path, first, first + "2")
    assert changed(project) >= set(STAGES)


def test_a_folder_whose_images_were_replaced_is_another_source(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "mine").mkdir()
    changed_values = {"data": str(tmp_path / "pictures"), "checkpoint": str(tmp_path / "mine")}
    values = params.load("smoke")["00_teacher_training"].model_copy(update=changed_values)
    monkeypatch.setattr(params, "load", lambda _: {"00_teacher_training": values})
    noted = set()
    for picture, weights in ((b"one", b"1"), (b"another", b"1"), (b"one", b"2"), (b"one", b"1")):
        (tmp_path / "pictures" / "a.png").write_bytes(picture)
        (tmp_path / "mine" / "model.safetensors").write_bytes(weights)
        run.note_sources("smoke")
        noted.add((tmp_path / "data" / "smoke" / "sources.json").read_text())
    assert len(noted) == 3


def test_a_result_re_runs_what_reads_it(project, change):
    assert "04_schedule_search" not in changed(project), "whatever a test before it left"
    change("data/smoke/01_teacher_analysis/costs.json", "costs", "other costs")
    assert "04_schedule_search" in dvc(project, "status", "04_schedule_search")


def test_metrics_show_and_an_experiment_runs_for_real(project):
    shown = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"]
    assert {name for name, part in shown.items() if part["data"]["score"] == 1.5} == {
        f"data/smoke/{notebook}/metrics.json" for notebook in STAGES}
    dvc(project, "exp", "run", "--single-item", "--set-param", "params/smoke.yaml:teacher_training.learning_rate=1e-4",
        "00_teacher_training@smoke")
    out = project / "data" / "smoke" / "00_teacher_training"
    assert json.loads((out / "meta.json").read_text())["params"]["learning_rate"] == 1e-4, "a number, no string"
    assert json.loads((out / "metrics.json").read_text())["score_20_steps"] > 0
    assert not list(out.parent.glob(".resume/*")), "what was kept to resume is gone"
    executed = nbformat.read(out / "notebook.ipynb", 4)
    assert not any("papermill" in part.metadata for part in (executed, *executed.cells))
    assert "score_20_steps" in dvc(project, "metrics", "show")


def test_a_bare_repro_runs_digits_alone():
    assert yaml(paths.ROOT / "dvc.yaml")["vars"] == [{"studies": {"digits": "digits"}}]


# ---- the runner -----------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_before_any_work():
    with pytest.raises(params.ParamsError, match="unknown notebook '07'.* There are: 00_teacher_training"):
        run.notebook("07", "smoke")
    with pytest.raises(params.ParamsError, match="the study dipgo_dit has no 06_comparison: `only` in params"):
        run.notebook("06_comparison", "dipgo_dit")
    with pytest.raises(params.ParamsError, match="letters takes its teacher from data/shipped/letters: there is"):
        run.teacher("letters")
    done = subprocess.run([sys.executable, "-m", "lib.study.run", "study", "nope"], cwd=paths.ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "error: unknown study 'nope'" in done.stderr and "Traceback" not in done.stderr


def test_a_study_is_listed_only_while_it_runs_and_no_tracked_file_changes(tmp_path, monkeypatch):
    shutil.copy(paths.ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(paths.ROOT / "data" / "shipped", tmp_path / "data" / "shipped")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    seen, more, broken = [], tmp_path / "params.yaml", {"02_block_search@digits"}

    def repro(*words):
        seen.append((words[-1], yaml(more)["studies"] if more.exists() else None))
        if words[-1] in broken:
            raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(run, "_repro", repro)
    monkeypatch.setattr(stage, "free_processors", lambda: 1)
    run.study("smoke")
    named = sorted(target for target, _ in seen)
    assert named == sorted(["code", *(f"{name}@smoke" for name in ("sources", *STAGES, "publish"))])
    assert {str(listed) for _, listed in seen} == {"{'smoke': 'smoke'}"}
    seen.clear()
    with pytest.raises(SystemExit, match="digits stopped in 02_block_search@digits. What it finished is kept"):
        run.study("digits")
    assert seen == [("code", None), *((f"{name}@digits", None) for name in ("sources", *STAGES[:3]))], "no more began"
    assert {path.name for path in tmp_path.iterdir()} == {"dvc.yaml", "data"}
    more.write_text("studies:\n  mine: mine\n")
    with pytest.raises(params.ParamsError, match="params.yaml is there and does not list smoke: add the line"):
        run.study("smoke")
    run_before = more.read_text()
    broken.clear()
    run.study("digits")
    assert more.read_text() == run_before, "nobody else's list is touched"


def test_stages_run_side_by_side_once_what_they_read_is_made():
    reads = {"00": set(), "01": {"00"}, "02": {"00"}, "03": {"02"}, "04": {"01"}, "06": {"03", "04"}}
    made, meeting, lock, running, most = [], threading.Barrier(2, timeout=30), threading.Lock(), set(), []

    def make(name):
        assert reads[name] <= set(made)
        with lock:
            running.add(name)
            most.append(len(running))
        if name in ("01", "02"):
            meeting.wait()  # neither ends before both have begun
        with lock:
            running.remove(name)
            made.append(name)

    run._in_order(reads, 2, make)
    assert sorted(made) == sorted(reads) and max(most) == 2


def test_a_stage_begins_after_those_that_more_stages_wait_for():
    made = []
    run._in_order({"00": set(), "03": {"00"}, "04": {"00"}, "05": {"04"}, "06": {"05", "03"}}, 1, made.append)
    assert made == ["00", "04", "03", "05", "06"], "04 has two after it, 03 one"


def test_a_stage_that_fails_lets_the_others_end_and_nothing_begin():
    begun, ended, failed = [], [], threading.Event()

    def make(name):
        begun.append(name)
        if name == "01":
            failed.set()
            raise ValueError("broken")
        assert failed.wait(30)
        time.sleep(0.2)
        ended.append(name)

    with pytest.raises(ValueError, match="broken"):
        run._in_order({"01": set(), "02": set(), "03": {"02"}, "04": set()}, 2, make)
    assert sorted(begun) == ["01", "02"] and ended == ["02"]


@pytest.mark.parametrize(("code", "told"), [(0, contextlib.nullcontext()),
                                            (3, pytest.raises(subprocess.CalledProcessError))])
def test_lines_of_a_stage_begin_with_its_name_and_its_failure_is_told(monkeypatch, capsys, code, told):
    script = f"printf '1 of 2\\r2 of 2\\rdone\\n'; exit {code}"  # progress as bars show it, in place of DVC
    popen = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda _, **kwargs: popen(["sh", "-c", script], **kwargs))
    with told:
        run._repro("--single-item", "04_schedule_search@smoke")
    assert capsys.readouterr().out == "04 | 1 of 2\n04 | 2 of 2\n04 | done\n"


@pytest.mark.parametrize(("device", "threads", "free", "workers"), [
    ("cpu", 1, 2, 2), ("cpu", 2, 5, 2), ("cpu", 8, 2, 1), ("cuda", 1, 16, 1)])
def test_as_many_notebooks_run_at_once_as_processors_are_free(monkeypatch, device, threads, free, workers):
    monkeypatch.setattr(stage, "free_processors", lambda: free)
    assert run._workers(SimpleNamespace(device=device, threads=threads)) == workers


def test_dvc_takes_two_stages_at_once(project, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", project)
    monkeypatch.setenv("PYTHONPATH", str(project))
    dvc(project, "commit", "--force")  # whatever tests before it left: as done
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stage: run._repro("--single-item", f"{stage}@smoke"), STAGES[1:3]))
    said = capsys.readouterr().out
    assert all(f"{number} | Stage '{stage}@smoke' didn't change, skipping" in said
               for number, stage in zip(("01", "02"), STAGES[1:3]))


def test_dvc_takes_a_study_that_is_listed_beside(project):
    (project / "params.yaml").write_text("studies:\n  digits: digits\n")
    try:
        assert {"publish@digits", "publish@smoke"} <= set(dvc(project, "stage", "list", "--name-only").split())
        assert command(project, "git", "status", "--porcelain", "params.yaml") == "", "git ignores the file"
    finally:
        (project / "params.yaml").unlink()


@pytest.mark.parametrize(("percent", "left"), [(0, 4), (5, 4), (10, 3), (25, 3), (30, 3), (50, 2), (100, 1)])
def test_a_stage_leaves_the_processors_that_others_keep_busy(monkeypatch, capsys, percent, left):
    monkeypatch.setattr(stage.psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(stage.psutil, "cpu_percent", lambda interval: percent)
    assert stage.free_processors() == left
    looks = iter((100, percent, 100))
    monkeypatch.setattr(stage.psutil, "cpu_percent", lambda interval: next(looks))
    assert stage.free_processors() == left, "what passes does not count"
    monkeypatch.setattr(stage.psutil, "cpu_percent", lambda interval: percent)
    before = torch.get_num_threads()
    try:
        values = params.load("smoke")["00_teacher_training"].model_copy(update={"threads": 2})
        stage.Stage("00_teacher_training", values)
        assert torch.get_num_threads() == min(2, left)
    finally:
        torch.set_num_threads(before)  # the tests after this one
    assert ("1 of 2 threads" in capsys.readouterr().out) == (left < 2)


def test_a_notebook_with_other_parameters_than_its_dataclass_is_refused(tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("seed = 1\nspeed = 2")])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "04_schedule_search.ipynb")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    with pytest.raises(params.ParamsError, match=r"has \['speed'\] too much and lacks \['base_budgets', .*'workers'\]"):
        run.notebook("04_schedule_search", "smoke")


def test_notebooks_that_run_at_once_share_no_socket(tmp_path, monkeypatch):
    seen = []

    def execute(source, executed, values, config, **_):
        seen.append(config.KernelManager)
        assert Path(config.KernelManager.ip).parent.is_dir()
        nbformat.write(nbformat.v4.new_notebook(), executed)

    monkeypatch.setattr(run.papermill, "execute_notebook", execute)
    monkeypatch.setattr(paths, "DATA", tmp_path)
    for _ in range(2):
        run.notebook("01_teacher_analysis", "smoke")
    assert [one.transport for one in seen] == ["ipc", "ipc"], "no network"
    assert seen[0].ip != seen[1].ip


def test_a_missing_input_names_the_notebook_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    there = stage.Stage("01_teacher_analysis", params.load("digits")["01_teacher_analysis"])
    with pytest.raises(FileNotFoundError, match="Notebook 00_teacher_training makes it"):
        there.read("00_teacher_training/teacher")


def test_a_finished_stage_leaves_numbers_and_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    there = stage.Stage("01_teacher_analysis", params.load("digits")["01_teacher_analysis"])
    (there.work / "state").write_text("half done")
    with pytest.raises(ValueError, match="not JSON compliant"):
        there.finish({"score": float("nan")}, {})
    assert there.work.exists()
    there.finish({"b": 1.0, "a": 2, "ratio_few": float("nan")}, {"seconds": 0.5})  # of a row at the floor
    assert json.loads((there.out / "metrics.json").read_text()) == {"a": 2, "b": 1.0}
    assert json.loads((there.out / "timings.json").read_text()) == {"minutes": pytest.approx(0, abs=1), "seconds": 0.5}
    assert not there.work.exists()


def test_a_stage_writes_tables_figures_plans_and_flat_numbers(tmp_path, monkeypatch, teacher):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    there = stage.Stage("01_teacher_analysis", params.load("digits")["01_teacher_analysis"])
    rows = pd.DataFrame({"name": ["DDIM, 5 steps", "DDIM, 9 steps"], "score": [1 / 3, 2.0]})
    figure, axes = plt.subplots()
    axes.plot(rows["score"])
    shown = []
    monkeypatch.setattr(stage, "display", lambda picture, metadata: shown.append((picture, metadata)))
    there.table(rows, "front")
    there.figure(figure, rows, "front")
    assert shown == [(figure, {"figure": "front"})] and not plt.fignum_exists(figure.number), "shown once"
    there.plans({"DDIM, 5 steps": teacher})
    there.strip(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 3, 3), "DDIM, 5 steps")
    pixels = plt.imread(there.out / "figures" / "plans" / "ddim_5_steps.png")[..., :3]
    assert pixels.shape == (3, 6, 3) and (pixels[:, :3] == 0).all() and (pixels[:, 3:] == 1).all()
    assert Plan.load(there.out / "plans" / "ddim_5_steps.json") == teacher
    lines = (there.out / "tables" / "front.csv").read_text().splitlines()
    assert lines == ["name,score", '"DDIM, 5 steps",0.333333', '"DDIM, 9 steps",2']
    assert {path.name for path in (there.out / "figures").iterdir()} == {"front.png", "front.csv", "plans"}
    assert there.numbers(rows, "score") == {"score_ddim_5_steps": 1 / 3, "score_ddim_9_steps": 2.0}


def test_half_done_work_hangs_on_what_came_before_and_on_its_own_modules_alone(tmp_path, monkeypatch):
    shutil.copytree(paths.ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(paths.NOTEBOOKS, tmp_path / "notebooks")
    for name in ("dvc.yaml", "requirements.lock"):
        shutil.copy(paths.ROOT / name, tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")

    def key():
        return stage.Stage("01_teacher_analysis", params.load("digits")["01_teacher_analysis"]).work.name

    begun, other, own = key(), "# another line\n", {"lib/grid/plan.py", "lib/judging/analysis.py"}
    for name in ("lib/methods/dipgo/learning.py", "lib/study/params.py", "lib/grid/plan.py", "lib/judging/analysis.py"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + other)
        assert (key() != begun) == (name in own), name
        (tmp_path / name).write_text(text)
    for name, hangs in {"00_teacher_training": True, "04_schedule_search": False}.items():
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        text = path.read_text()
        path.write_text(text.replace("figures.style()", "figures.style() "))
        assert (key() != begun) == hangs, name
        path.write_text(text)
    assert key() == begun


def test_half_done_work_hangs_on_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)  # wherever a notebook is opened
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "a.png"
    values = params.load("smoke")["00_teacher_training"].model_copy(update={"data": str(tmp_path / "pictures")})
    found = set()
    for content in (b"one", b"another", b"one"):
        picture.write_bytes(content)
        found.add(stage.Stage("00_teacher_training", values).work.name)
    assert len(found) == 2


# ---- the environments -----------------------------------------------------------------------------------------------


def test_the_lock_pins_every_dependency_for_cpu_and_gpu():
    lines = [line for line in (paths.ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines), "no local builds, no hashes"
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert not {name for name in pinned if name.startswith("nvidia") or name == "triton"}
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    assert {re.sub(r"[-_.]+", "-", re.split(r"[><=]", name)[0]).lower() for name in wanted} <= pinned


def test_conda_users_get_the_same_pins():
    dependencies = yaml(paths.ROOT / "environment.yml")["dependencies"]
    assert dependencies[0] == "python=3.11"
    assert dependencies[-1] == {"pip": ["--requirement requirements.lock", "--editable ."]}
    assert all(isinstance(name, str) and name in ("pip", "make") for name in dependencies[1:-1])


def test_a_study_of_some_notebooks_runs_these_and_is_published(monkeypatch, tmp_path):
    told = []
    some = ["00_teacher_training", "05_pruner_training"]
    monkeypatch.setattr(run.params, "load", lambda name: dict.fromkeys(some, SimpleNamespace(device="cpu", threads=1)))
    monkeypatch.setattr(run, "_repro", lambda *words: told.append(words[-1]))
    monkeypatch.setattr(report, "publish", lambda name, so_far: told.append(f"published {name}"))
    monkeypatch.setattr(report, "write_page", lambda name: told.append(f"page {name}"))
    monkeypatch.setattr(report, "write_readme", lambda name: told.append(f"readme {name}"))
    monkeypatch.setattr(report, "write_notebooks", lambda name: told.append(f"notebooks {name}"))
    monkeypatch.setattr(report, "write_caching", lambda: told.append("caching"))
    monkeypatch.setattr(report, "fill_readme", lambda: told.append("README"))
    run.study("digits")
    assert told == ["code", "sources@digits", "00_teacher_training@digits", "05_pruner_training@digits",
                    "published digits", "page digits", "readme digits", "notebooks digits", "caching", "README"]
    report.write("digits", so_far=True)
    assert told[-1] == "caching", "what the README tells may be left out"


def test_a_studys_teacher_is_shipped_and_nobody_elses_folder_is_written_to(tmp_path, monkeypatch, unet, schedule):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    networks.save(tmp_path / "digits" / "00_teacher_training" / "teacher", Model(unet, schedule))
    folder = run.ship("digits")
    assert folder == tmp_path / "shipped" / "digits"
    for mine, theirs in zip(unet.parameters(), networks.load(folder).network.parameters(), strict=True):
        assert torch.equal(mine.bfloat16().float(), theirs)
    of_mine = {"00_teacher_training": SimpleNamespace(data=str(tmp_path / "images"))}
    monkeypatch.setattr(params, "load", lambda study: of_mine)
    with pytest.raises(params.ParamsError, match="only teachers of digits and letters ship"):
        run.ship("mine")
    assert not (tmp_path / "images").exists()
