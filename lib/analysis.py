"""What a teacher's blocks do from step to step: how alike their outputs are, and what reusing one costs."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from tqdm import tqdm

from lib import blocks as _blocks
from lib.engine import Engine
from lib.plan import NoiseSchedule, Plan
from lib.sampling import walk


@torch.inference_mode()
def similarity(model: nn.Module, schedule: SchedulerMixin, plan: Plan, noise: Tensor) -> np.ndarray:
    """Measure how alike each block's outputs are at neighbouring steps of a full plan.

    Parameters
    ----------
    plan : Plan, (T, N), all cells computing
    noise : Tensor, (n, C, H, W)

    Returns
    -------
    similarity : (T, N), cosine similarity with the step before, mean over images; NaN at the first step
    """
    described = _blocks.describe(model)
    now: dict[int, Tensor] = {}
    handles = [model.get_submodule(block.modules[-1]).register_forward_hook(
        lambda module, inputs, output, place=place: now.__setitem__(place, output.flatten(1)))
        for place, block in enumerate(described)]
    values, before = np.full((plan.steps, len(described)), np.nan), {}
    try:
        with Engine(model, plan, NoiseSchedule.of(schedule)) as engine:
            for step, _ in enumerate(walk(engine, schedule, noise)):
                for place, output in now.items():
                    if step:
                        alike = torch.cosine_similarity(output, before[place], dim=1)
                        values[step, place] = float(alike.mean())
                before = dict(now)
    finally:
        for handle in handles:
            handle.remove()
    return values


@torch.inference_mode()
def sensitivity(model: nn.Module, schedule: SchedulerMixin, plan: Plan, noise: Tensor, steps: list[int]) -> np.ndarray:
    """Measure the damage to the final image when one block is reused at one step.

    Under order 1 a run has no memory but its image and its cache: so each run starts one step before the reused cell,
    from the teacher's own x_t, which halves the price.

    Parameters
    ----------
    plan : Plan, (T, N), order 1, all cells computing
    noise : Tensor, (n, C, H, W)
    steps : steps to try, each in 1..T-1

    Returns
    -------
    damage : (len(steps), N), mean squared difference from the teacher's image over the teacher images' variance
    """
    if plan.order != 1 or not plan.cells.all():
        raise ValueError("sensitivity needs a full plan of order 1")
    fits = NoiseSchedule.of(schedule)
    with Engine(model, plan, fits) as engine:
        states = [noise, *walk(engine, schedule, noise)]  # states[s]: x_t before step s
    images = states[-1]
    damage = np.zeros((len(steps), len(plan.blocks)))
    cells = [(i, place) for i in range(len(steps)) for place in range(len(plan.blocks))]
    for i, place in tqdm(cells, desc="sensitivity", unit="cell"):
        first = steps[i] - 1
        tail = Plan.full(plan.timesteps[first:], plan.schedule, plan.blocks, cache=plan.cache)
        compute = tail.cells
        compute[1, place] = False
        with Engine(model, tail.with_cells(compute), fits) as engine:
            *_, changed = walk(engine, schedule, states[first])
        damage[i, place] = float((changed - images).square().mean() / images.var(dim=0).mean())
    return damage
