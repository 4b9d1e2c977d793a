"""Runs notebooks and studies: ``python -m lib.study.run notebook 00_teacher_training --study digits``.

A thin, typed layer over papermill: parameters come from the study's params file (read as YAML 1.2) and must be the
very names in the notebook's `parameters` cell; the working directory is the project's root; times and other volatile
metadata are taken out of the executed copy.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from ruamel.yaml import YAML
from traitlets.config import Config

from lib.study import params, paths


def notebook(name: str, study: str) -> Path:
    """Run one notebook with a study's parameters.

    Parameters
    ----------
    name : str, the notebook's stem
    study : str, the stem of a params file

    Returns
    -------
    executed : Path of the executed copy, beside the notebook's results

    Raises
    ------
    ParamsError
        If study or notebook are unknown, or the notebook's `parameters` cell has other names than its dataclass.
    """
    if name not in params.NOTEBOOKS:
        raise params.ParamsError(f"unknown notebook {name!r}. There are: {', '.join(params.NOTEBOOKS)}.")
    if name not in (runs := params.load(study)):
        raise params.ParamsError(f"the study {study} has no {name}: `only` in params/{study}.yaml says which it has.")
    values = runs[name].model_dump()
    source = paths.NOTEBOOKS / f"{name}.ipynb"
    found = set(papermill.inspect_notebook(source))
    if found != set(values):
        raise params.ParamsError(f"{source.name}: its parameters cell has {sorted(found - set(values)) or 'nothing'} "
                                 f"too much and lacks {sorted(set(values) - found) or 'nothing'}.")
    executed = paths.writable(paths.DATA / study / name) / "notebook.ipynb"
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # a line of progress every ten seconds
    print(f"{name}, study {study}:", flush=True)
    with tempfile.TemporaryDirectory() as folder:  # the kernel listens to no network, and to no other notebook's runner
        sockets = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})
        papermill.execute_notebook(source, executed, values, kernel_name="python3", cwd=paths.ROOT, progress_bar=False,
                                   stdout_file=sys.stdout, stderr_file=sys.stderr, config=sockets)
    copy = nbformat.read(executed, nbformat.NO_CONVERT)
    for part in (copy, *copy.cells):
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    for cell in copy.cells:  # progress bars were for the terminal
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(copy, executed)
    return executed


def teacher(study: str) -> None:
    """Train a study's teacher, so that notebook 00 finds it trained; ``accelerate launch`` lets several processes."""
    from lib.study.stage import Stage
    from lib.teachers import data, latents, networks  # torch, which running a notebook does not need here

    p = params.load(study)["00_teacher_training"]
    if p.checkpoint:
        raise params.ParamsError(f"the study {study} takes its teacher from {p.checkpoint}: there is nothing to train.")
    stage = Stage("00_teacher_training", p)
    images = data.load(p.data, p.resolution, p.held_out, p.seed)
    model = networks.untrained(images, **p.architecture)
    if model.latents is not None:
        latents.fit(model.latents.vae, images.images[images.train], steps=p.autoencoder_steps,
                    work=stage.work / "autoencoder", **p.machine)
    networks.fit(model, images, work=stage.work / "teacher", **p.recipe)


def ship(study: str) -> Path:
    """Put a study's teacher among the weights that ship with the project, in bfloat16, named after its data."""
    import torch

    from lib.teachers import networks  # torch, which running a notebook does not need here

    name = params.load(study)["00_teacher_training"].data.partition(":")[0]
    if name not in ("digits", "letters"):
        raise params.ParamsError(f"{study}: only teachers of digits and letters ship; its data are {name}")
    folder = paths.DATA / "shipped" / name
    networks.save(folder, networks.load(paths.DATA / study / "00_teacher_training" / "teacher"), torch.bfloat16)
    return folder


def note_sources(study: str) -> None:
    """Write ``data/<study>/sources.json``: what the study starts from. All stages depend on it."""
    from lib.grid.saving import write_json  # torch, which running a notebook does not need here
    from lib.study.stage import sources

    first = params.load(study)["00_teacher_training"]
    write_json(paths.writable(paths.DATA / study) / "sources.json", sources(first.data, first.checkpoint))


def study(name: str) -> None:
    """Run the pipeline for a study. One that dvc.yaml does not list is listed beside for as long as it runs.

    DVC takes more values from ``params.yaml``, which git ignores: no tracked file changes meanwhile. A study of some
    notebooks alone (`lib.study.params.notebooks`) is published when these are done.
    """
    runs = params.load(name)  # refuses an unknown study, or a wrong file, before any work
    whole = list(runs) == list(params.NOTEBOOKS)
    pipeline = YAML(typ="safe", pure=True).load((paths.ROOT / "dvc.yaml").read_text())
    listed = pipeline["vars"][0]["studies"]
    beside = paths.ROOT / "params.yaml"
    if beside.exists():
        listed |= YAML(typ="safe", pure=True).load(beside.read_text())["studies"]
        if name not in listed:
            raise params.ParamsError(f"params.yaml is there and does not list {name}: add the line `  {name}: {name}`, "
                                     "or take the file away if no study runs")
    missing = name not in listed
    if missing:
        beside.write_text(f"studies:\n  {name}: {name}\n")
    try:
        _repro("code")
        _repro(f"sources@{name}")
        stages = [*runs, "publish"] if whole else list(runs)
        reads = {stage: {other for other in runs for path in pipeline["stages"][stage]["do"]["deps"]
                         if path.startswith(f"data/${{item}}/{other}/")} for stage in stages}
        _in_order(reads, _workers(next(iter(runs.values()))), lambda stage: _repro("--single-item", f"{stage}@{name}"))
    except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
        where = f" in {error.cmd[-1]}" if isinstance(error, subprocess.CalledProcessError) else ""
        raise SystemExit(f"The study {name} stopped{where}. What it finished is kept: run the same command again."
                         ) from None
    finally:
        if missing:
            beside.unlink()
    if not whole:
        from lib.study import report  # torch, which running a notebook does not need here

        report.write(name)
    print(f"\nDone. Figures and tables: {paths.REPORTS / name}\nExecuted notebooks:       {paths.DATA / name}")


def _workers(p: params.Common) -> int:
    """How many notebooks may run at once: on small networks two of one thread get more done than one of two."""
    from lib.study.stage import free_processors  # torch, which running a notebook does not need here

    return max(1, free_processors() // p.threads) if p.device == "cpu" else 1


def _repro(*words: str) -> None:
    """Let DVC make stages that changed, and print what they say, each line with its stage's name before it."""
    label = re.split("[_@]", words[-1])[0]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *words]
    with subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as made:
        for line in made.stdout:
            print(f"{label} | {line}", end="", flush=True)
    if made.returncode:
        raise subprocess.CalledProcessError(made.returncode, command)


def _in_order(reads: dict[str, set[str]], workers: int, make: Callable[[str], None]) -> None:
    """Make each stage once all that it reads are made, at most `workers` at a time. After an error no other begins.

    The longest chain decides when all is done: a stage begins after those that more stages in a row wait for.
    """
    order, chains = TopologicalSorter(reads), {}
    for stage in reversed([*TopologicalSorter(reads).static_order()]):
        chains[stage] = 1 + max((chains[other] for other in reads if stage in reads[other]), default=0)
    left, ready, running = sorted(reads, key=lambda stage: (-chains[stage], stage)), set(), {}
    order.prepare()
    with ThreadPoolExecutor(workers) as pool:
        while order.is_active():
            ready |= {*order.get_ready()}
            while len(running) < workers:
                stage = next((stage for stage in left if stage in ready), None)
                if stage is None or chains[stage] < chains[left[0]]:
                    break
                left.remove(stage)
                running[pool.submit(make, stage)] = stage
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                job.result()
                order.done(running.pop(job))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.study.run", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("notebook", help="run one notebook")
    one.add_argument("name", help="the notebook's stem, such as 01_teacher_analysis")
    one.add_argument("--study", required=True)
    start = commands.add_parser("sources", help="note what a study starts from")
    start.add_argument("--study", required=True)
    alone = commands.add_parser("teacher", help="train a study's teacher, under accelerate launch by several processes")
    alone.add_argument("--study", required=True)
    away = commands.add_parser("ship", help="put a study's teacher among the weights that ship with the project")
    away.add_argument("--study", required=True)
    whole = commands.add_parser("study", help="run the pipeline for a study")
    whole.add_argument("name", help="the stem of a file in params/")
    arguments = parser.parse_args()
    try:
        if arguments.command == "notebook":
            notebook(arguments.name, arguments.study)
        elif arguments.command == "teacher":
            teacher(arguments.study)
        elif arguments.command == "ship":
            print(ship(arguments.study))
        elif arguments.command == "sources":
            note_sources(arguments.study)
        else:
            study(arguments.name)
    except PapermillExecutionError as error:
        raise SystemExit(f"{arguments.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
