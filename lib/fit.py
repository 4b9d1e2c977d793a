"""A budget in, a plan out: for a diffusers pipeline of one's own, with no threshold to choose.

``python -m lib.fit --model PATH --prompts FILE --budget 4x --out plan.json`` times the pipeline's steps, looks at one
full run, searches for what comes nearest to its images within the budget (`lib.methods.fitting`), and writes beside
the plan a certificate, as JSON and as a page: what the plan costs and how near it comes, beside fewer steps and
DeepCache of the same seconds. Killed, it goes on; under ``accelerate launch`` several processes, or devices, share
the search.
"""

import argparse
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState
from diffusers import DiffusionPipeline
from optuna.storages import RDBStorage

from lib import apply
from lib.grid.pipelines import Requests
from lib.grid.plan import Plan, PlanError
from lib.methods.fitting import Effort, Fitting
from lib.study import certificate, paths
from lib.teachers import files, networks

BANKS = ("search", "select", "report")
WAIT = timedelta(days=2)
"""So long one process waits for what another works out."""


@dataclass(frozen=True)
class Budget:
    """What a call may cost: a share of the full run's seconds, or seconds."""

    share: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, text: str) -> Self:
        """Read "4x" (times faster), "0.25" (of the full run's seconds) or "2.5s" (seconds a call).

        Raises
        ------
        ValueError
            If it is none of these, or no less than the full run.
        """
        text = str(text)
        try:
            number = float(text.removesuffix("x").removesuffix("s"))
        except ValueError:
            number = math.nan
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"budget: {text!r} is none: write 4x (times faster), 0.25 (of the full run's seconds) or "
                             "2.5s (seconds a call)")
        if text.endswith("s"):
            return cls(seconds=number)
        share = 1 / number if text.endswith("x") else number
        if share >= 1:
            raise ValueError(f"budget: {text} is no less than the full run: write 4x, 0.25, or {number:g}s for seconds")
        return cls(share=share)


def begin(pipe: DiffusionPipeline, out: Path, *, prompts: Sequence[str | int] = (),
          options: Mapping[str, Any] | None = None, batch: int = 1, effort: Effort | None = None) -> Fitting:
    """Look at a pipeline: what `fit` begins with, and what can be looked at before.

    Parameters
    ----------
    out : Path
        Of the plan to be; beside it lies, while it is not done, what a killed fit goes on from.
    prompts : what to draw, or class numbers
        Cut in three: to search with, to choose with, to report. Fewer than three serve for all, and the page says so.
    options : what each call is given besides, such as guidance_scale, height and width
    batch : int, images of a call

    Raises
    ------
    ValueError
        If the pipeline wants prompts, or `out` is no JSON file.
    lib.grid.plan.PlanError
        If no plan fits the pipeline.
    """
    effort, out = effort or Effort(), Path(out)
    if out.suffix != ".json":
        raise ValueError(f"out: {out} is to hold a plan: name it .json")
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder")
    paths.writable(out.parent)
    parts = [prompts[number::len(BANKS)] if len(prompts) >= len(BANKS) else prompts for number in range(len(BANKS))]
    requests = {bank: Requests(pipe, part, options or {}, batch, effort.seed)
                for bank, part in zip(BANKS, parts)}
    return Fitting(requests, effort, out.with_suffix(".unfinished"))


def fit(pipe: DiffusionPipeline, budget: str, out: Path, *, prompts: Sequence[str | int] = (),
        options: Mapping[str, Any] | None = None, batch: int = 1, effort: Effort | None = None) -> Plan:
    """Fit a plan to a pipeline and a budget, and write it with its certificate, ``.certificate.json`` and ``.html``.

    Parameters
    ----------
    budget : as `Budget.of` reads it
    out, prompts, options, batch, effort : as `begin` takes them

    Raises
    ------
    ValueError
        If the budget is none, or buys too little; and what `begin` raises.
    """
    wanted, state = Budget.of(budget), PartialState(timeout=WAIT)
    fitting = begin(pipe, out, prompts=prompts, options=options, batch=batch, effort=effort)
    storage = fitting.work / "search.journal" if state.num_processes == 1 else f"sqlite:///{fitting.work}/search.db"
    if state.is_main_process:  # the others find on the disk what it worked out
        fitting.profile()
        if isinstance(storage, str):
            RDBStorage(storage)  # makes its tables: two at once would get in each other's way
    state.wait_for_everyone()
    full = fitting.profile().of(fitting.full)
    seconds = wanted.seconds or wanted.share * full
    if seconds >= full:
        raise ValueError(f"budget: {budget} is no less than the full run, which takes {full:.3g} s a call")
    fitting.search(seconds, storage)
    state.wait_for_everyone()
    if state.is_main_process:
        found = fitting.fit(seconds, storage)
        told = "others for search, choice and report" if len(prompts) >= len(BANKS) else "the same throughout"
        about = {"pipeline": type(pipe).__name__, "budget": f"{budget}: {seconds:.3g} s a call of {batch}",
                 "prompts": f"{len(prompts)}, {told}" if prompts else "none",
                 "options": ", ".join(f"{name} {value}" for name, value in (options or {}).items()
                                      if isinstance(value, str | int | float)) or "none",
                 "effort": ", ".join(f"{field.name} {getattr(fitting.effort, field.name)}" for field in fields(Effort))}
        found.plan.replace(provenance=found.plan.provenance | {"fitted": about}).save(out)
        certificate.certify(fitting, found, about, out)
        shutil.rmtree(out.with_suffix(".unfinished"))
    state.wait_for_everyone()
    return Plan.load(out)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.fit", description=__doc__.splitlines()[0])
    apply.add_pipeline(parser)
    parser.add_argument("--budget", required=True, help="4x (times faster), 0.25 (of the full run) or 2.5s (a call)")
    parser.add_argument("--out", required=True, type=Path, help="the plan's JSON file, to be written")
    parser.add_argument("--batch", type=int, default=1, help="images of a call (default: %(default)s)")
    for effort in fields(Effort):
        parser.add_argument(f"--{effort.name.replace('_', '-')}", type=int, default=effort.default,
                            help=f"{effort.metadata['help']} (default: %(default)s)")
    chosen = parser.parse_args()
    try:
        Budget.of(chosen.budget)
        device = PartialState(cpu=chosen.device == "cpu", timeout=WAIT).device
        pipe = networks.pipeline(chosen.model, str(device), chosen.precision)
        fit(pipe, chosen.budget, chosen.out, prompts=files.lines(chosen.prompts), batch=chosen.batch,
            options=apply.options_of(chosen),
            effort=Effort(**{effort.name: getattr(chosen, effort.name) for effort in fields(Effort)}))
    except (PlanError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
