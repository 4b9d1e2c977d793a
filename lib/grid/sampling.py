"""Noise to images under a plan: the same noise gives the same image, whatever the batch."""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.grid import graphs
from lib.grid.engine import Engine
from lib.grid.model import Conditions, Model
from lib.grid.plan import Plan
from lib.grid.solvers import State, advance

BANKS = {"search": 1, "select": 2, "report": 3, "analysis": 4}
"""Banks of noise that share no image: searching, choosing among the found, reporting, looking."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a network may compute in."""
WALKED, DECODED = 2 ** 18, 2 ** 14
"""Positions (height x width of what the network sees) that are denoised, and that are decoded, at once. Of 64 x 64
latents those are 64 and 4 images, for a decoder to 512 x 512 pixels takes many times the network's memory."""


def noise(bank: str, seed: int, first: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Give images `first` .. `first + count - 1` of a noise bank.

    Each image's noise depends on (seed, bank, number) alone, so batches and processes may split a bank as they like.

    Parameters
    ----------
    bank : str, a key of `BANKS`
    shape : (C, H, W)

    Returns
    -------
    noise : Tensor, (count, C, H, W), float32, standard normal
    """
    draws = [np.random.default_rng((seed, BANKS[bank], number)).standard_normal(shape, dtype=np.float32)
             for number in range(first, first + count)]
    return torch.from_numpy(np.stack(draws))


def walk(engine: Engine, x_t: Tensor, conditions: Conditions) -> Iterator[Tensor]:
    """Walk an engine's plan from `x_t`, from the start, and yield x_t after each step; the last one is x_0."""
    engine.reset()
    state: State = ()
    for step in range(engine.plan.steps):
        predicted = conditions.predict(engine, x_t, step)
        engine.check_passes(len(x_t))
        x_t, state = advance(engine.solver, step, x_t, predicted.to(x_t.dtype), state)
        yield x_t


@torch.inference_mode()
def sample(model: Model, plan: Plan, noise: Tensor, conditions: Conditions | None = None, *, precision: str = "fp32",
           batch_size: int = 250, title: str | None = None) -> Tensor:
    """Sample images under a plan.

    Parameters
    ----------
    noise : Tensor, (n, C, H, W)
    conditions : Conditions of the n images; None for those that the model draws (`Model.asked`)
    precision : "fp32" or "bf16" (autocast in the network; the solver stays in fp32)
    batch_size : int, images that the network sees at once; fewer where they are large (`WALKED`)
    title : of a progress bar; None for none

    Returns
    -------
    images : Tensor, (n, C', H', W'), float32, about [-1, 1], on the CPU
    """
    images, positions = [], noise[0, 0].numel()
    batch_size, decoded_at_once = min(batch_size, max(1, WALKED // positions)), max(1, DECODED // positions)
    bar = tqdm(total=len(noise), desc=title, unit="image", disable=title is None, leave=False)
    with graphs.engine(model.network, plan, model.noise_schedule) as engine:
        for first in range(0, len(noise), batch_size):
            batch = noise[first:first + batch_size]
            own = conditions.rows(slice(first, first + batch_size)) if conditions else model.asked(batch)
            with autocast(model.device, precision):
                *_, x_0 = walk(engine, batch.to(model.device), own)
            images.extend(model.decode(part).cpu() for part in x_0.split(decoded_at_once))
            bar.update(len(batch))
    bar.close()
    return torch.cat(images)


def autocast(device: torch.device, precision: str):
    """Give the context in which the network computes: autocast to bf16 or fp16, or none for fp32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, PRECISIONS[precision])
