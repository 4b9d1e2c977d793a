"""Noise to images under a plan: the same noise gives the same image, whatever the batch."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from tqdm import tqdm

from lib.grid import graphs
from lib.grid.blocks import example_conditions
from lib.grid.engine import Engine
from lib.grid.plan import GIVEN, NULL, NoiseSchedule, Plan
from lib.grid.solvers import State, advance

BANKS = {"search": 1, "select": 2, "report": 3, "analysis": 4}
"""Banks of noise that share no image: searching, choosing among the found, reporting, looking."""


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


@dataclass(frozen=True)
class Conditions:
    """What a network reads besides image and timestep, and how strongly it is guided by it.

    Attributes
    ----------
    given : dict of the network's argument to Tensor, (n, ...), a row an image, or to such a dict
    null : the same without a condition, for classifier-free guidance; None for none
    scale : float, of the guidance: null + scale * (given - null)
    apart : bool; False makes both passes in one batch, True one network call after the other
    """

    given: Mapping[str, Any]
    null: Mapping[str, Any] | None = None
    scale: float = 1.0
    apart: bool = False

    @classmethod
    def drawn(cls, model: nn.Module, noise: Tensor) -> Self | None:
        """Draw each image's label, where a network reads labels and nothing else; else give None.

        A label is drawn by the hash of all of its image's noise: one noise gives one image, whatever the batch, and no
        part of the noise tells the label.
        """
        classes = model.config.get("num_embeds_ada_norm") or model.config.get("num_class_embeds")
        if set(example_conditions(model, 0, "cpu")) != {"class_labels"} or not classes:
            return None
        draws = [hashlib.sha256(own.numpy().tobytes()).digest() for own in noise.detach().float().cpu()]
        labels = [int.from_bytes(draw[:8]) % classes for draw in draws]
        return cls({"class_labels": torch.tensor(labels, device=noise.device)})

    def rows(self, first: int, count: int) -> Self:
        """Give the conditions of some images."""
        def part(rows: Any) -> Any:
            return tree_map_only(Tensor, lambda value: value[first:first + count], rows)

        return replace(self, given=part(self.given), null=part(self.null))

    def predict(self, engine: Engine, x_t: Tensor, step: int) -> Tensor:
        """Predict at a step of an engine's plan, guided (Ho and Salimans 2022)."""
        given, null = tree_map_only(Tensor, lambda value: value.to(x_t.device), (self.given, self.null))
        if null is None:
            return engine(x_t, step, **given)
        if self.apart:
            along, without = engine(x_t, step, (GIVEN,), **given), engine(x_t, step, (NULL,), **null)
        else:
            both = tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], null, given)
            without, along = engine(torch.cat([x_t, x_t]), step, (NULL, GIVEN), **both).chunk(2)
        return without + self.scale * (along - without)


def walk(engine: Engine, x_t: Tensor, conditions: Conditions | None = None) -> Iterator[Tensor]:
    """Walk an engine's plan from `x_t`, from the start, and yield x_t after each step; the last one is the image.

    Without conditions, those of class-conditional networks are drawn from `x_t`, which is noise (`Conditions.drawn`).
    """
    engine.reset()
    conditions = conditions or Conditions.drawn(engine.model, x_t)
    predict = partial(conditions.predict, engine) if conditions else engine
    state: State = ()
    for step in range(engine.plan.steps):
        predicted = predict(x_t, step)
        engine.check_passes(len(x_t))
        x_t, state = advance(engine.solver, step, x_t, predicted.to(x_t.dtype), state)
        yield x_t


@torch.inference_mode()
def sample(model: nn.Module, schedule: SchedulerMixin, plan: Plan, noise: Tensor, conditions: Conditions | None = None,
           *, precision: str = "fp32", batch_size: int = 250, title: str | None = None) -> Tensor:
    """Sample images under a plan.

    Parameters
    ----------
    model, schedule : a teacher or student and its noise schedule, as `lib.teachers.networks.load` gives them
    noise : Tensor, (n, C, H, W)
    conditions : Conditions of the n images, where the network reads any
    precision : "fp32" or "bf16" (autocast in the network; the solver stays in fp32)
    title : of a progress bar; None for none

    Returns
    -------
    images : Tensor, (n, C, H, W), float32, about [-1, 1], on the CPU
    """
    device = next(model.parameters()).device
    images = []
    bar = tqdm(total=len(noise), desc=title, unit="image", disable=title is None, leave=False)
    with graphs.engine(model, plan, NoiseSchedule.of(schedule)) as engine, autocast(device, precision):
        for first in range(0, len(noise), batch_size):
            batch = noise[first:first + batch_size]
            own = conditions and conditions.rows(first, len(batch))
            *_, x_0 = walk(engine, batch.to(device), own)
            images.append(x_0.cpu())
            bar.update(len(batch))
    bar.close()
    return torch.cat(images)


def autocast(device: torch.device, precision: str):
    """Give the context in which the network computes: bf16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
