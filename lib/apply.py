"""Samples images with a saved plan: ``python -m lib.apply --model PATH --plan FILE --out DIR``.

Under ``accelerate launch`` several processes, or devices, make their share of the images each.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from lib import cost, paths, sampling, teachers
from lib.data import to_uint8
from lib.plan import Plan, PlanError


def images(model: str, plan: Path, out: Path, *, count: int, seed: int, device: str, precision: str) -> None:
    """Sample images with a plan and write them as PNGs, and say what they cost.

    Parameters
    ----------
    model : what `lib.teachers.load` takes
    count : int, images of all processes together
    seed : int, of the noise: image number i of a seed is the same whoever makes it
    """
    state = PartialState(cpu=device == "cpu")
    network, schedule = teachers.load(model, str(state.device))
    walk = Plan.load(plan)
    if count < state.num_processes:
        raise ValueError(f"{count} images for {state.num_processes} processes: ask for more images, or start fewer")
    own = np.array_split(np.arange(count), state.num_processes)[state.process_index]
    side = network.config.sample_size
    noise = sampling.noise("report", seed, int(own[0]), len(own), (network.config.in_channels, side, side))
    begun = time.perf_counter()
    made = sampling.sample(network, schedule, walk, noise, precision=precision,
                           title="sampling" if state.is_main_process else None)
    seconds = time.perf_counter() - begun
    paths.writable(out)
    for number, pixels in zip(own, to_uint8(made).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels.squeeze()).save(out / f"{number:06d}.png")
    state.wait_for_everyone()
    if state.is_main_process:
        costs = cost.count(network)
        full = Plan.full(walk.grid, walk.schedule, walk.blocks, walk.order, cache=walk.cache)
        fewer = cost.executed(network, costs, full) / cost.executed(network, costs, walk)
        print(f"{count} images in {out}: {seconds / len(own):.4f} s each; {fewer:.2f} times fewer executed MACs than "
              f"all {len(walk.grid)} steps")


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
