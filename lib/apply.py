"""Plans in use: on a stock diffusers pipeline, or from the command line.

``python -m lib.apply --model PATH --plan FILE --out DIR`` samples images with a saved plan. Under ``accelerate launch``
several processes, or devices, make their share of the images each.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from PIL import Image
from torch import Tensor, nn

from lib.grid import cost, graphs, sampling
from lib.grid.engine import Engine
from lib.grid.plan import NoiseSchedule, Plan, PlanError
from lib.grid.solvers import State, advance, noise_levels
from lib.study import paths
from lib.teachers import networks
from lib.teachers.data import to_uint8

UNGUIDABLE = ("DiTPipeline",)
"""Pipelines on which a plan cannot tell the passes apart."""
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
        model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if model is None:
            raise PlanError(f"a {type(pipe).__name__} has neither unet nor transformer: no plan fits it.")
        if len(plan.passes) > 1 and type(pipe).__name__ in UNGUIDABLE:
            raise PlanError(f"a {type(pipe).__name__} walks both passes' rows as images, so nobody can say which are "
                            "which: take a plan of one pass, which holds for both.")
        self.pipe, self._own = pipe, pipe.scheduler
        self._engine = graphs.engine(model, plan, NoiseSchedule.of(pipe.scheduler))
        self._walk = _Walk(self._engine, pipe.scheduler)

    def enable(self) -> None:
        """Put the plan on the pipeline."""
        self._engine.__enter__()
        self.pipe.scheduler = self._walk

    def disable(self) -> None:
        """Take it off again: the pipeline is as it was."""
        self.pipe.scheduler = self._own
        self._engine.__exit__()

    def __enter__(self) -> DiffusionPipeline:
        self.enable()
        return self.pipe

    def __exit__(self, *_) -> None:
        self.disable()


class _Walk:
    """A plan's solver, as a pipeline's scheduler that takes no other timesteps."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, engine: Engine, own: SchedulerMixin):
        self._engine, self._own = engine, own

    def __getattr__(self, name: str):
        return getattr(self._own, name)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        plan = self._engine.plan
        if num_inference_steps != len(plan.grid):
            raise PlanError(f"the plan is for runs of {len(plan.grid)} steps, of which it takes {plan.steps}: call the "
                            f"pipeline with num_inference_steps={len(plan.grid)}, not {num_inference_steps}.")
        self._engine.reset()
        self.timesteps, self.num_inference_steps = torch.tensor(plan.timesteps, device=device), plan.steps
        self._state: State = ()

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise PlanError(f"the pipeline begins at step {begin_index}, and plans are walked from their first step: "
                            "call it with strength 1, or without a plan.")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (noise.ndim - 1)
        alpha, sigma = (part.to(noise).view(shape) for part in
                        noise_levels(timesteps.cpu(), self._engine.plan.schedule))
        return alpha * original_samples + sigma * noise

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, eta: float = 0.0,
             use_clipped_model_output: bool = False, generator: torch.Generator | None = None,
             return_dict: bool = True):
        if eta:
            raise PlanError(f"a plan is walked without noise: call the pipeline with eta=0, not {eta}.")
        engine, given = self._engine, sample.dtype
        if not self._state and float(timestep) != engine.plan.timesteps[0]:
            raise PlanError(f"the pipeline begins at timestep {float(timestep):g}, the plan at "
                            f"{engine.plan.timesteps[0]}: plans are walked from their first step.")
        engine.check_passes(len(sample))
        output = model_output[:, :sample.shape[1]].float()
        sample, self._state = advance(engine.solver, engine.step, sample.float(), output, self._state)
        engine.at(engine.step + 1)
        return SchedulerOutput(prev_sample=sample.to(given)) if return_dict else (sample.to(given),)


def images(model: str, plan: Path, out: Path, *, count: int, seed: int, device: str, precision: str) -> None:
    """Sample images with a plan and write them as PNGs, and say what they cost.

    Parameters
    ----------
    model : what `lib.teachers.networks.load` takes
    count : int, images of all processes together
    seed : int, of the noise: image number i of a seed is the same whoever makes it
    """
    state = PartialState(cpu=device == "cpu")
    network, schedule = networks.load(model, str(state.device))
    walk = Plan.load(plan)
    if count < state.num_processes:
        raise ValueError(f"{count} images for {state.num_processes} processes: ask for more images, or start fewer")
    own = np.array_split(np.arange(count), state.num_processes)[state.process_index]
    side = network.config.sample_size
    noise = sampling.noise("report", seed, int(own[0]), len(own), (network.config.in_channels, side, side))
    made, seconds = _timed(network, schedule, walk, noise, precision, "sampling" if state.is_main_process else None)
    paths.writable(out)
    for number, pixels in zip(own, to_uint8(made).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels.squeeze()).save(out / f"{number:06d}.png")
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{count} images in {out}: {seconds:.4f} s each")
        costs, few = cost.count(network), noise[:COMPARED]
        own = {"solver": "dpmsolver++", "order": 2, "table": None} if walk.table else {}
        full = walk.at(walk.grid, **own)
        fewer = costs.executed(full) / costs.executed(walk)
        if network.device.type == "cuda":  # what comes for the second time is recorded: the third is as fast as it gets
            for plan in (full, walk) * 2:
                sampling.sample(network, schedule, plan, few, precision=precision)
        theirs, slow = _timed(network, schedule, full, few, precision, "the full run")
        ours, fast = _timed(network, schedule, walk, few, precision, "the plan")
        noisy = float((ours - theirs).square().mean())
        print(f"beside all {len(walk.grid)} steps, on {len(few)} images: {fewer:.2f} times fewer executed MACs, "
              f"{slow / fast:.2f} times faster, {costs.kept(walk) / 2**20:.2f} MiB an image kept between steps, "
              f"PSNR {10 * math.log10(4 / max(noisy, 1e-10)):.1f} dB")


def _timed(network: nn.Module, schedule: SchedulerMixin, plan: Plan, noise: Tensor, precision: str, title: str | None
           ) -> tuple[Tensor, float]:
    """Give the images and the seconds of each."""
    begun = time.perf_counter()
    made = sampling.sample(network, schedule, plan, noise, precision=precision, title=title)
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
