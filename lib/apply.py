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
from PIL import Image
from torch import Tensor

from lib.grid import blocks, cost, sampling
from lib.grid.model import Model
from lib.grid.pipelines import Planned as Planned
from lib.grid.plan import Plan, PlanError
from lib.study import paths
from lib.teachers import networks
from lib.teachers.data import to_uint8

COMPARED = 16
"""So many images are sampled at all steps too, to say what the plan saves and changes."""


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
