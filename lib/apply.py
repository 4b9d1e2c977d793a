"""Plans in use: on a stock diffusers pipeline, or from the command line.

``python -m lib.apply --model PATH --plan FILE --out DIR`` samples images with a saved plan. Under ``accelerate launch``
several processes, or devices, make their share of the images each.
"""

import argparse
import copy
import math
import threading
import time
from pathlib import Path
from typing import Self

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from PIL import Image
from torch import Tensor

from lib.grid import blocks, cost, graphs, sampling, solvers
from lib.grid.engine import Engine
from lib.grid.model import Model
from lib.grid.plan import NoiseSchedule, Plan, PlanError
from lib.grid.solvers import State, advance, noise_levels
from lib.study import paths
from lib.teachers import networks
from lib.teachers.data import to_uint8

UNGUIDABLE = ("DiTPipeline", "PAG")
"""Pipelines, by parts of their names, whose batches are no pair of a null and a given pass."""
COMPARED = 16
"""So many images are sampled at all steps too, to say what the plan saves and changes."""


class Planned:
    """A stock diffusers pipeline under a plan: inside ``with Planned(pipe, plan):`` it is called as ever, but cheaper.

    `enable` and `disable` do the same without a block of code. Any pipeline will do that has a network of a known
    family (``unet`` or ``transformer``) and walks a scheduler's timesteps; guidance in one pass and in several. The
    plan's solver takes the place of the pipeline's, so the pipeline is deterministic from its first noise on.

    Parameters
    ----------
    pipe : DiffusionPipeline
    plan : Plan

    Raises
    ------
    PlanError
        If the plan is for other blocks or another noise schedule.
    """

    def __init__(self, pipe: DiffusionPipeline, plan: Plan):
        self.pipe, self.plan, self._own = pipe, plan, None
        self._prepare()

    def _prepare(self) -> tuple[Engine, "_Walk"]:
        """Check that the plan fits the pipeline as it is now, and give what walks it."""
        part = next((part for part in ("unet", "transformer") if getattr(self.pipe, part, None) is not None), None)
        kind = type(self.pipe).__name__
        if part is None or getattr(self.pipe, "scheduler", None) is None:
            raise PlanError(f"a {kind} has no unet and no transformer, or no scheduler: no plan fits it.")
        if len(self.plan.passes) > 1 and any(word in kind for word in UNGUIDABLE):
            raise PlanError(f"a {kind} makes batches in which nobody can say which rows are of which pass: take a plan "
                            "of one pass, which holds for all.")
        if isinstance(self.pipe.scheduler, _Walk):
            raise PlanError(f"{self.pipe.scheduler.engine.plan.title} is on this pipeline: leave its block, or "
                            "disable() it, first.")
        model = getattr(self.pipe, part)
        self._part, self._model = part, getattr(model, "_orig_mod", model)  # a compiled network's own
        engine = graphs.engine(self._model, self.plan, NoiseSchedule.of(self.pipe.scheduler), led=True)
        return engine, _Walk.in_place_of(self.pipe.scheduler, engine)

    def enable(self) -> None:
        """Put the plan on the pipeline; a compiled network runs uncompiled for as long."""
        if self._own is not None:
            raise PlanError(f"{self.plan.title} is on this pipeline already.")
        self._engine, walk = self._prepare()
        self._engine.__enter__()
        self._own = {self._part: getattr(self.pipe, self._part), "scheduler": self.pipe.scheduler}
        self._put({self._part: self._model, "scheduler": walk})

    def disable(self) -> None:
        """Take it off again: the pipeline is as it was."""
        if self._own is not None:
            self._put(self._own)
            self._own = None
            self._engine.__exit__()

    def _put(self, parts: dict) -> None:
        for name, part in parts.items():
            setattr(self.pipe, name, part)

    def __enter__(self) -> DiffusionPipeline:
        self.enable()
        return self.pipe

    def __exit__(self, *_) -> None:
        self.disable()


class _Walk:
    """A plan's solver, as a pipeline's scheduler that takes no other timesteps.

    Whoever asks it, saves it or copies it meets the pipeline's own scheduler.
    """

    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def in_place_of(cls, own: SchedulerMixin, engine: Engine) -> Self:
        """Give a walk of an engine's plan that is of the own scheduler's class too."""
        kind = type(own)
        hidden = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "from_config": kind.from_config}
        walk = object.__new__(type(kind.__name__, (cls, kind), hidden))
        vars(walk).update({name: value for name, value in vars(own).items() if not hasattr(cls, name)})
        walk.own, walk.engine, walk._state = own, engine, ()
        return walk

    def __reduce__(self) -> tuple:
        return copy.copy, (self.own,)

    @property
    def sigmas(self) -> None:
        raise PlanError("this pipeline reads its scheduler's sigmas, and a plan's solver is not told by them: run it "
                        "without a plan.")

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        plan = self.engine.plan
        if num_inference_steps not in (len(plan.grid), plan.steps):
            raise PlanError(f"the plan is for runs of {len(plan.grid)} steps, of which it takes {plan.steps}: call the "
                            f"pipeline with num_inference_steps={len(plan.grid)}, not {num_inference_steps}.")
        if not self.engine.on:
            raise PlanError(f"{plan.title} is no longer on this network, but its scheduler is still on this pipeline, "
                            "which was made meanwhile: give it a scheduler of its own.")
        self.engine.reset()
        self.engine.closed, self.engine.thread = False, threading.get_ident()
        self.timesteps, self.num_inference_steps = torch.tensor(plan.timesteps, device=device), num_inference_steps
        self._state: State = ()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later step (image to image); see `lib.grid.plan.Plan.refreshed`."""
        plan = self.engine.plan
        if begin_index >= plan.steps:
            raise PlanError(f"the pipeline begins at step {begin_index}, and the plan has {plan.steps}, from 0 on: "
                            f"call it with num_inference_steps={plan.steps} and a greater strength.")
        if begin_index and self.num_inference_steps != plan.steps:
            raise PlanError(f"the plan takes {plan.steps} of {self.num_inference_steps} steps, and the pipeline begins "
                            f"in the middle, which it counts in its own steps: call it with num_inference_steps="
                            f"{plan.steps}.")
        if begin_index and plan.solver in ("pndm", "learned"):
            raise PlanError(f"the pipeline begins at step {begin_index}, and the plan's solver ({plan.solver}) can "
                            "only be walked from its first step: call it with strength 1, or take another solver.")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not len(timesteps):
            raise PlanError(f"the pipeline asks for none of the plan's {self.engine.plan.steps} steps: call it with "
                            f"num_inference_steps={self.engine.plan.steps} and a greater strength.")
        shape = (-1,) + (1,) * (noise.ndim - 1)
        alpha, sigma = (part.to(noise).view(shape) for part in
                        noise_levels(timesteps.cpu(), self.engine.plan.schedule))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, eta: float = 0.0,
             use_clipped_model_output: bool = False, generator: torch.Generator | None = None,
             return_dict: bool = True):
        if eta:
            raise PlanError(f"a plan is walked without noise: call the pipeline with eta=0, not {eta}.")
        engine, given = self.engine, sample.dtype
        engine.check_passes(len(sample))
        if not self._state:
            self._begin(engine.step)
        output = model_output[:, :sample.shape[1]].float()
        sample, self._state = advance(self._solver, engine.step - self._first, sample.float(), output, self._state)
        engine.at(engine.step + 1)
        engine.closed = engine.step == engine.plan.steps
        return SchedulerOutput(prev_sample=sample.to(given)) if return_dict else (sample.to(given),)

    def _begin(self, step: int) -> None:
        """Take the solver of a walk that begins at a step."""
        self.set_begin_index(step)
        plan = self.engine.plan
        self._first = step
        self._solver = solvers.of(plan.at(plan.timesteps[step:])) if step else self.engine.solver


def images(model: str, plan: Path, out: Path, *, count: int, seed: int, device: str, precision: str) -> None:
    """Sample images with a plan and write them as PNGs, and say what they cost.

    Parameters
    ----------
    model : what `lib.teachers.networks.load` takes
    count : int, images of all processes together
    seed : int, of the noise: image number i of a seed is the same whoever makes it
    """
    state = PartialState(cpu=device == "cpu")
    teacher = networks.load(model, str(state.device))
    if reads := set(blocks.example_conditions(teacher.network, 1, "cpu")) - {"class_labels"}:
        raise ValueError(f"{model} reads {', '.join(sorted(reads))}, and the command line has none to give: in Python, "
                         "`with lib.apply.Planned(pipe, plan): pipe(prompt, ...)` does the same")
    if teacher.latents is None and teacher.shape[0] not in (1, 3):
        raise ValueError(f"{model} draws {teacher.shape[0]} channels, which is no picture, and names no vae to decode "
                         "them")
    walk = Plan.load(plan)
    if count < state.num_processes:
        raise ValueError(f"{count} images for {state.num_processes} processes: ask for more images, or start fewer")
    own = np.array_split(np.arange(count), state.num_processes)[state.process_index]
    noise = sampling.noise("report", seed, int(own[0]), len(own), teacher.shape)
    made, seconds = _timed(teacher, walk, noise, precision, "sampling" if state.is_main_process else None)
    paths.writable(out)
    for number, pixels in zip(own, to_uint8(made).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels.squeeze()).save(out / f"{number:06d}.png")
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{count} images in {out}: {seconds:.4f} s each")
        costs, few = cost.count_model(teacher), noise[:COMPARED]
        own = {"solver": "dpmsolver++", "order": 2, "table": None} if walk.table else {}
        full = walk.at(walk.grid, **own)
        fewer = costs.executed(full) / costs.executed(walk)
        if teacher.device.type == "cuda":  # what comes for the second time is recorded: the third is as fast as it gets
            for plan in (full, walk) * 2:
                sampling.sample(teacher, plan, few, precision=precision)
        theirs, slow = _timed(teacher, full, few, precision, "the full run")
        ours, fast = _timed(teacher, walk, few, precision, "the plan")
        noisy = float((ours - theirs).square().mean())
        print(f"beside all {len(walk.grid)} steps, on {len(few)} images: {fewer:.2f} times fewer executed MACs, "
              f"{slow / fast:.2f} times faster, {costs.kept(walk) / 2**20:.2f} MiB an image kept between steps, "
              f"PSNR {10 * math.log10(4 / max(noisy, 1e-10)):.1f} dB")


def _timed(model: Model, plan: Plan, noise: Tensor, precision: str, title: str | None) -> tuple[Tensor, float]:
    """Give the images and the seconds of each."""
    begun = time.perf_counter()
    made = sampling.sample(model, plan, noise, precision=precision, title=title)
    return made, (time.perf_counter() - begun) / len(noise)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.apply", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a diffusers pipeline, or hub:OWNER/NAME")
    parser.add_argument("--plan", required=True, type=Path, help="a plan's JSON file")
    parser.add_argument("--out", required=True, type=Path, help="folder for the images")
    parser.add_argument("--count", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    arguments = vars(parser.parse_args())
    try:
        images(**arguments)
    except (PlanError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
