"""A stage: where a notebook reads, writes and resumes, and how it ends.

A notebook's results lie in ``data/<study>/<notebook>/``. Work that a kill should not lose lies in
``data/<study>/.resume/``, under a hash of parameters and code, and goes when the stage ends.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from ruamel.yaml import YAML

from lib.grid.plan import Plan
from lib.grid.saving import write_json
from lib.study import figures, params, paths
from lib.teachers import data

LIGHT = 0.25
"""A processor of which other processes take less than this share counts as free."""


class Stage:
    """One notebook's run for one study.

    Parameters
    ----------
    notebook : str, the notebook's stem
    values : its bound parameters

    Attributes
    ----------
    out : Path
        Folder of the results.
    work : Path
        Folder of what an interrupted run left to resume from.
    """

    def __init__(self, notebook: str, values: params.Common):
        os.chdir(paths.ROOT)  # as in the pipeline: paths in parameters begin there
        self.notebook, self.params, self.begun = notebook, values, time.monotonic()
        self.out = paths.writable(paths.DATA / values.study / notebook)
        self.work = paths.writable(paths.DATA / values.study / ".resume" / f"{notebook}-{self._digest()}")
        threads = min(values.threads, free_processors())
        if threads < values.threads:
            print(f"Other processes are busy: this notebook uses {threads} of {values.threads} threads. "
                  "That changes the last bits of its results.")
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, on CUDA too

    def _digest(self) -> str:
        """Hash all that a half-done result may hang on: data, parameters and code up to this stage, its libraries."""
        digest = hashlib.sha256(self.params.model_dump_json().encode())
        checkpoint = next(iter(params.load(self.params.study).values())).checkpoint
        digest.update(json.dumps(sources(self.params.data, checkpoint)).encode())
        digest.update((paths.ROOT / "requirements.lock").read_bytes())
        stages = YAML(typ="safe", pure=True).load((paths.ROOT / "dvc.yaml").read_text())["stages"]
        for name in stages[self.notebook]["do"]["deps"]:
            if name.startswith("lib/"):
                digest.update((paths.ROOT / name).read_bytes())
        for notebook, values in params.load(self.params.study).items():
            if notebook <= self.notebook:
                cells = json.loads((paths.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
                code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
                digest.update((values.model_dump_json() + json.dumps(code)).encode())
        return digest.hexdigest()[:12]

    def folder(self, name: str) -> Path:
        """Make and return a folder for results."""
        return paths.writable(self.out / name)

    def read(self, path: str) -> Path:
        """Give the path of what an earlier notebook of the same study wrote, such as "00_teacher_training/teacher".

        Raises
        ------
        FileNotFoundError
            If it is not there, naming what makes it. In a `smoke` study it is made on the spot.
        """
        found, maker = paths.DATA / self.params.study / path, path.partition("/")[0]
        if not found.exists() and self.params.smoke:
            from lib.study import run  # the runner knows stages, not the other way round, save here

            run.notebook(maker, self.params.study)
        if not found.exists():
            raise FileNotFoundError(f"{found} is missing. Notebook {maker} makes it: run\n"
                                    f"    python -m lib.study.run notebook {maker} --study {self.params.study}\n"
                                    f"or the whole study:\n    make study STUDY={self.params.study}")
        return found

    def table(self, rows: pd.DataFrame, name: str) -> None:
        """Write a table to tables/<name>.csv, six digits a number."""
        rows.to_csv(self.folder("tables") / f"{name}.csv", index=False, float_format="%.6g")

    def figure(self, picture: Figure, numbers: pd.DataFrame, name: str) -> None:
        """Write a figure to figures/<name>.png, its numbers beside it, and show it under that name."""
        figures.save(picture, numbers, self.folder("figures"), name)
        display(picture, metadata={"figure": name})
        plt.close(picture)

    @staticmethod
    def say(label: str, text: str) -> None:
        """Show a paragraph that a notebook computed, in Markdown, its label in bold."""
        display(Markdown(f"**{label}:** {text}"))

    def strip(self, images: torch.Tensor, name: str) -> None:
        """Write images of a plan to figures/plans/<key of its name>.png: the report's front leads there."""
        plt.imsave(self.folder("figures/plans") / f"{self.key(name)}.png", figures.strip(images.numpy()))

    def plans(self, plans: Mapping[str, Plan]) -> None:
        """Write each plan to plans/<key of its name>.json."""
        for name, plan in plans.items():
            self.folder("plans")
            plan.save(self.plan_file(self.out, name))

    @staticmethod
    def plan_file(out: Path, name: str) -> Path:
        """Give where a notebook whose results lie in `out` has the plan of a name."""
        return out / "plans" / f"{Stage.key(name)}.json"

    def numbers(self, rows: pd.DataFrame, *columns: str) -> dict[str, float]:
        """Give columns of a table with a `name` as flat metrics: "score_ddim_50_steps"."""
        return {f"{column}_{self.key(row['name'])}": row[column] for _, row in rows.iterrows() for column in columns}

    @staticmethod
    def key(name: str) -> str:
        """Make a metric's key of a name: "DeepCache, 1:5" gives "deepcache_1_5"."""
        return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("++", "pp")).strip("_")

    def finish(self, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Write metrics.json, timings.json and meta.json, and drop what was kept for resuming.

        Parameters
        ----------
        metrics : flat, finite numbers that repeat on one machine; names carry their units. Ratios alone may be NaN, at
            the floor, and are left out
        timings : flat, measured seconds and ratios of seconds; `minutes`, since the stage was made, are added
        """
        write_json(self.out / "metrics.json", {name: value for name, value in metrics.items()
                                               if not (np.isnan(value) and re.search("ratio|product|over_", name))})
        minutes = round((time.monotonic() - self.begun) / 60, 1)
        write_json(self.out / "timings.json", {**timings, "minutes": minutes})
        write_json(self.out / "meta.json", {"params": self.params.model_dump(), "commit": _commit(),
                                            "threads": torch.get_num_threads(), "precision": self.params.precision,
                                            "machine": platform.machine(), "python": platform.python_version(),
                                            "versions": {name: version(name) for name in
                                                         ("torch", "diffusers", "torch-fidelity", "optuna", "numpy")}})
        for left in self.work.parent.glob(f"{self.notebook}-*"):
            shutil.rmtree(left)


def free_processors() -> int:
    """Count the processors that other processes leave, at least 1.

    A thread that waits for one that others keep off its processor costs more than it gives: two threads beside one busy
    process take tens of times as long as one thread there (`make bench`). Of three looks the quietest counts: a whole
    study hangs on the answer, and a short command may just be at work.
    """
    taken = min(psutil.cpu_percent(interval=1) for _ in range(3)) / 100 * psutil.cpu_count()
    return max(1, psutil.cpu_count() - math.ceil(taken - LIGHT))


def sources(images: str, checkpoint: str) -> dict[str, str]:
    """Give what a study starts from, and digests of it: its images, and the teacher if it is not trained here."""
    found = {"data": images, "data_digest": data.digest(images)}
    if checkpoint:
        found |= {"checkpoint": checkpoint, "checkpoint_digest": data.digest(checkpoint, "model")}
    return found


def _commit() -> str:
    """Give the commit, with "-dirty" where code or parameters are not as committed."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "lib", "notebooks", "params")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "") or "unknown"
