"""Plans in use: on a stock diffusers pipeline, or from the command line.

``python -m lib.apply --model PATH --plan FILE --out DIR`` samples images with a saved plan, of prompts where the model
reads any. Under ``accelerate launch`` several processes, or devices, make their share of the images each.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from lib.grid import blocks, cost, sampling
from lib.grid.pipelines import Planned as Planned
from lib.grid.pipelines import Requests
from lib.grid.plan import Plan, PlanError
from lib.judging import pairs
from lib.study import paths
from lib.teachers import files, networks

COMPARED = 16
"""So many images are sampled at all steps too, to say what the plan saves and changes."""

Draw = Callable[[Plan, Sequence[int], str | None], Tensor]
"""Gives images of some numbers under a plan, (n, C, H, W) in [0, 1]; the last is the title of a progress bar."""


def images(model: str, plan: Path, out: Path, *, said: Sequence[str | int] = (), options: dict | None = None,
           count: int, batch: int = 8, seed: int, device: str, precision: str) -> None:
    """Sample images with a plan and write them as PNGs, and say what they cost.

    Parameters
    ----------
    model : a pipeline's folder, "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION"
    said : prompts or classes, of which images get one after the other
        A model that reads classes or nothing draws them itself if there are none.
    options : what a pipeline's call is given besides, such as guidance_scale, height and width
    count : int, images of all processes together
    seed : int, of the noise: image number i of a seed is the same whoever makes it
    """
    state, walk = PartialState(cpu=device == "cpu"), Plan.load(plan)
    if count < state.num_processes:
        raise ValueError(f"{count} images for {state.num_processes} processes: ask for more images, or start fewer")
    if said or options:
        draw, costs = _by_pipeline(model, said, options or {}, batch, seed, str(state.device), precision)
    else:
        draw, costs = _by_model(model, seed, str(state.device), precision)
    paths.writable(out)
    own = np.array_split(np.arange(count), state.num_processes)[state.process_index].tolist()
    solver = {"solver": "dpmsolver++", "order": 2, "table": None} if walk.table else {}
    grid = tuple(dict.fromkeys(walk.grid))
    full = walk.at(grid[:2] + grid[1:] if walk.solver == "pndm" else grid, **solver)
    counted = costs(full)  # before anything is drawn: it may be refused
    made, seconds = _timed(draw, walk, own, "sampling" if state.is_main_process else None)
    if not made.isfinite().all():
        raise ValueError("the images are not numbers: give the weights in fp32 or bf16")
    pictures = VaeImageProcessor.numpy_to_pil(made.clamp(0, 1).permute(0, 2, 3, 1).numpy())
    for number, picture in zip(own, pictures):
        picture.save(out / f"{number:06d}.png")
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{count} images in {out}: {seconds:.4f} s each")
        few = own[:COMPARED]
        if state.device.type == "cuda":  # what comes for the second time is recorded: the third is as fast as it gets
            for one in (full, walk) * 2:
                draw(one, few, None)
        theirs, slow = _timed(draw, full, few, "the full run")
        ours, fast = _timed(draw, walk, few, "the plan")
        fewer = counted.executed(full) / counted.executed(walk)
        kept = counted.kept(walk, sampling.PRECISIONS[precision]) / 2**20
        print(f"beside all {len(walk.grid)} steps, on {len(few)} images: {fewer:.2f} times fewer executed MACs, "
              f"{slow / fast:.2f} times faster, {kept:.2f} MiB an image kept between steps, "
              f"PSNR {float(pairs.psnr(ours, theirs).mean()):.1f} dB")


def _by_pipeline(source: str, said: Sequence[str | int], options: dict, batch: int, seed: int, device: str,
                 precision: str) -> tuple[Draw, Callable[[Plan], cost.Costs]]:
    """Draw as the pipeline is called by its users, with its own decoder."""
    asked = Requests(networks.pipeline(source, device, precision), said, options, batch, seed)
    return (lambda plan, numbers, title: asked.images(plan, "report", numbers, title=title),
            lambda plan: cost.count_requests(asked, plan))


def _by_model(source: str, seed: int, device: str, precision: str) -> tuple[Draw, Callable[[Plan], cost.Costs]]:
    """Draw what reads nothing, or classes that it draws itself, without a pipeline."""
    model = networks.load(source, device)
    try:
        blocks.describe(model.network)
    except TypeError as error:
        raise PlanError(f"no plan fits {source}: {error}") from None
    if reads := set(blocks.example_conditions(model.network, 1, "cpu")) - {"class_labels"}:
        raise ValueError(f"{source} reads {', '.join(sorted(reads))}: say what to draw, by --prompt or --prompts FILE")
    if model.latents is None and model.shape[0] not in (1, 3):
        raise ValueError(f"{source} draws {model.shape[0]} channels, which is no picture, and names no vae to decode "
                         "them")

    def draw(plan: Plan, numbers: Sequence[int], title: str | None) -> Tensor:
        noise = sampling.noise("report", seed, numbers[0], len(numbers), model.shape)
        return (sampling.sample(model, plan, noise, precision=precision, title=title).clamp(-1, 1) + 1) / 2

    return draw, lambda _: cost.count_model(model)


def _timed(draw: Draw, plan: Plan, numbers: Sequence[int], title: str | None) -> tuple[Tensor, float]:
    """Give the images and the seconds of each."""
    begun = time.perf_counter()
    made = draw(plan, numbers, title)
    return made, (time.perf_counter() - begun) / len(numbers)


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which pipeline is called, and with what."""
    parser.add_argument("--model", required=True, help="folder of a diffusers pipeline, or hub:OWNER/NAME@REVISION")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt, or a class number, a line")
    parser.add_argument("--guidance", type=float, help="guidance_scale of each call")
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(sampling.PRECISIONS), default="fp32")


def options_of(given: argparse.Namespace) -> dict[str, float | int]:
    """Give what each call of the pipeline is given besides its prompt."""
    options = {"guidance_scale": given.guidance, "height": given.size, "width": given.size}
    return {name: value for name, value in options.items() if value is not None}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.apply", description=__doc__.splitlines()[0])
    add_pipeline(parser)
    parser.add_argument("--plan", required=True, type=Path, help="a plan's JSON file")
    parser.add_argument("--out", required=True, type=Path, help="folder for the images")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--count", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images of a call of a pipeline (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    given = parser.parse_args()
    try:
        images(given.model, given.plan, given.out, said=given.prompt + files.lines(given.prompts), count=given.count,
               options=options_of(given), batch=given.batch, seed=given.seed, device=given.device,
               precision=given.precision)
    except (PlanError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
