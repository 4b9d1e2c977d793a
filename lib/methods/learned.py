"""Few steps that are learned: by gradient through the full run, or by a dynamic programme. No cell reuses anything.

This is the control that any cache has to beat. `learn` moves the timesteps, and where one wants the solver's
coefficients too, so that few steps end where the teacher's many do (LD3, arXiv 2405.15506; coefficients as in DSS,
arXiv 2505.21114). `shortest` asks which of the teacher's own timesteps to keep (GITS, arXiv 2405.11326; OptimalSteps,
arXiv 2503.21774).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.grid import sampling, solvers
from lib.grid.engine import Engine
from lib.grid.model import Model
from lib.grid.plan import Learned, Plan, PlanError
from lib.teachers.training import train

CLOSEST = 0.1
"""No two steps begin closer than this, in timesteps, nor the last one to the image."""
PACE = 0.1
"""Coefficients move so many times as far as the logarithms of gaps: errors of theirs add up over the steps."""


@dataclass(frozen=True)
class Recipe:
    """How to learn steps.

    Attributes
    ----------
    updates, batch : int; of AdamW, and images of each, drawn from the noise that is given
    learning_rate : float, of the logarithms of the gaps between steps, with a cosine
    coefficients : bool, learn what each of the solver's coefficients is multiplied by, too
    seed : int, of the batches
    """

    updates: int
    batch: int = 64
    learning_rate: float = 0.03
    coefficients: bool = False
    seed: int = 0


class Steps(nn.Module):
    """The timesteps of a plan, and changes of its solver's coefficients, as weights.

    The first timestep stays; the gaps between the steps, the last of which ends at the image, are shares of it (a
    softmax, as in LD3). The weights may lie on any device; the timesteps and the table that they give lie on the CPU.

    Parameters
    ----------
    start : Plan, full, of at least 2 steps and one pass
    coefficients : bool, let what the coefficients are multiplied by be learned

    Raises
    ------
    PlanError
        If the plan reuses anything, or has a table of its own.
    """

    def __init__(self, start: Plan, coefficients: bool = False):
        super().__init__()
        if not start.computes.all() or len(start.passes) > 1 or start.steps < 2:
            raise PlanError("start: learned steps begin with a full plan of one pass and two steps or more.")
        if start.solver in ("learned", "pndm"):
            raise PlanError(f"start: the timesteps of solver {start.solver} cannot be moved; take dpmsolver++.")
        self.start, t = start, torch.tensor(start.timesteps, dtype=torch.float64)
        self.first = float(t[0])
        gaps = t - torch.cat([t[1:], torch.zeros(1)])
        self.gaps = nn.Parameter((gaps - CLOSEST).clamp(min=1e-3).log().float())
        self.changes = nn.Parameter(torch.zeros(solvers.of(start).b.shape), requires_grad=coefficients)

    def timesteps(self) -> Tensor:
        """Give the timesteps, (S,), float64."""
        gaps = CLOSEST + (self.first - CLOSEST * len(self.gaps)) * self.gaps.cpu().double().softmax(0)
        return self.first - torch.cat([torch.zeros(1), gaps[:-1].cumsum(0)])

    def table(self, timesteps: Tensor) -> solvers.Table:
        """Give the solver's table at some timesteps, with its coefficients changed."""
        plain = solvers.coefficients(self.start.solver, timesteps, self.start.schedule, order=self.start.order,
                                     final_sigma=self.start.final_sigma)
        b = plain.b * (1 + PACE * self.changes.cpu())
        return solvers.Table(plain.from_x, plain.from_output, plain.a, b, plain.A, plain.B)

    def forward(self, model: Model, noise: Tensor, precision: str) -> Tensor:
        """Sample images, (n, C', H', W'), of noise, (n, C, H, W); differentiable in the weights."""
        timesteps, conditions = self.timesteps(), model.asked(noise)
        table, state, x_t = self.table(timesteps), (), noise

        def predict(x_t: Tensor, step: int, passes: tuple[str, ...] = (), **given: Tensor) -> Tensor:
            return model.predict(x_t, timesteps[step].to(x_t), **given)

        for step in range(self.start.steps):
            with sampling.autocast(x_t.device, precision):
                output = checkpoint(conditions.predict, predict, x_t, step, use_reentrant=False,
                                    preserve_rng_state=False)
            x_t, state = solvers.advance(table, step, x_t, output.to(x_t.dtype), state)
        return model.decode(x_t.float())

    @torch.no_grad()
    def plan(self) -> Plan:
        """Give the plan of the weights as they are."""
        timesteps = self.timesteps()
        about = {"timesteps": tuple(timesteps.tolist()), "provenance": {"method": "learned steps"}}
        if self.changes.requires_grad:
            table = self.table(timesteps)
            rows = {name: tuple(map(tuple, getattr(table, name).tolist())) for name in ("b", "B")
                    if getattr(table, name) is not None}
            ends = {name: tuple(getattr(table, name).tolist()) for name in ("a", "A")
                    if getattr(table, name) is not None}
            about |= {"solver": "learned", "table": Learned(quantity=solvers.QUANTITIES[self.start.solver],
                                                            **rows, **ends)}
        return self.start.replace(**about)


def learn(model: Model, start: Plan, noise: Tensor, wanted: Tensor, extractor: Callable[[Tensor], tuple],
          recipe: Recipe, *, precision: str, work: Path, title: str = "steps") -> tuple[Plan, list[dict]]:
    """Learn steps whose images look as wanted, from the same noise. A killed training goes on.

    The loss is the mean distance (root of the sum of squares) of an image's features from the wanted image's.

    Parameters
    ----------
    start : Plan, full: the few steps to begin with
    noise, wanted : Tensor, (n, C, H, W) and (n, C', H', W'), all that the training sees: noise, and the images that
        many steps make of it
    extractor : callable(images), whose first output, (n, D), is what is compared; differentiable
    work : Path, of the training's state; each start of one model may have the same

    Returns
    -------
    plan, history : the learned plan, and what `lib.teachers.training.train` gives
    """
    device, steps = model.device, Steps(start, recipe.coefficients)
    with torch.no_grad():
        seen = torch.cat([extractor(few.to(device))[0] for few in wanted.split(250)])

    def loss(steps: Steps, generator: torch.Generator, _: float) -> Tensor:
        rows = torch.randperm(len(noise), generator=generator)[:recipe.batch]
        made = extractor(steps(model, noise[rows].to(device), precision))[0]
        return (made - seen[rows]).norm(dim=1).mean()  # squares are the few images' alone that became something else

    history = train(steps, loss, steps=recipe.updates, lr=recipe.learning_rate, ema_decay=0.9, seed=recipe.seed,
                    device=device.type, precision="fp32", work=work / start.key, save_every=20, warmup=5, title=title)
    plan = steps.plan()
    return plan.replace(provenance=plan.provenance | asdict(recipe) | {"from": list(start.timesteps)}), history


def shortest(model: Model, teacher: Plan, counts: Sequence[int], noise: Tensor, order: int, *, precision: str
             ) -> dict[int, Plan]:
    """Keep those of a teacher's timesteps over which first-order steps err least in all: shortest paths.

    One run of the teacher gives x_t on its way and the outputs there. The price of a jump from i to j is how far one
    DDIM step from x_i ends from x_j; prices add up along a path (GITS, section 3.3, without its weights).

    Parameters
    ----------
    teacher : Plan, full
    counts : sequence of int, how many timesteps to keep, each from 1 to the teacher's
    order : int, of DPM-Solver++, which then walks them

    Returns
    -------
    plans : dict of count to Plan, full

    Raises
    ------
    ValueError
        If a count is none of these.
    """
    if not 1 <= min(counts) <= max(counts) <= teacher.steps:
        raise ValueError(f"counts: of {teacher.steps} timesteps 1 to {teacher.steps} can be kept, got {list(counts)}")
    return along(teacher, counts, order, jumps(model, teacher, noise, precision))


def along(teacher: Plan, counts: Sequence[int], order: int, price: np.ndarray) -> dict[int, Plan]:
    """Give what `shortest` gives, of known prices of jumps."""
    total = np.full((max(counts) + 1, teacher.steps + 1), np.inf)  # of the best path of so many jumps to a place
    came, total[0, 0] = np.zeros(total.shape, int), 0.0
    for jump in range(1, max(counts) + 1):
        ways = total[jump - 1][:, None] + price
        came[jump], total[jump] = ways.argmin(axis=0), ways.min(axis=0)
    plans = {}
    for steps in counts:
        place, kept = teacher.steps, []
        for jump in range(steps, 0, -1):
            place = came[jump, place]
            kept.append(teacher.timesteps[place])
        plans[steps] = teacher.at(kept[::-1], solver="dpmsolver++", order=order, table=None,
                                  provenance={"method": "shortest path", "steps": steps})
    return plans


@torch.inference_mode()
def jumps(model: Model, teacher: Plan, noise: Tensor, precision: str) -> np.ndarray:
    """Give the prices of jumps, as `prices` does, along one run of a teacher."""
    device = model.device
    x_t, state, path, outputs = noise.to(device), (), [noise.to(device)], []
    conditions = model.asked(noise)
    with Engine(model.network, teacher, model.noise_schedule) as engine, sampling.autocast(device, precision):
        for step in range(teacher.steps):
            outputs.append(conditions.predict(engine, x_t, step).to(x_t.dtype))
            x_t, state = solvers.advance(engine.solver, step, x_t, outputs[-1], state)
            path.append(x_t)
    return prices(teacher, path, outputs)


def prices(teacher: Plan, path: Sequence[Tensor], outputs: Sequence[Tensor]) -> np.ndarray:
    """Give the prices of jumps between a teacher's places, (T + 1, T + 1), the last of which is the image.

    The mean over images of the distance (root of the sum of squares) of where the jump ends from where the teacher
    walks; infinite where a jump would go back.

    Parameters
    ----------
    path : (T + 1) Tensors, (n, ...), x_t at each of the teacher's timesteps, and the image
    outputs : (T) Tensors, (n, ...), what the network predicts there, guided
    """
    fits = teacher.schedule
    ddim = solvers.coefficients("ddim", teacher.timesteps, fits, order=1)
    alpha, sigma = (torch.cat([level, end[None]]) for level, end in zip(
        solvers.noise_levels(teacher.timesteps, fits), torch.tensor([1.0, 0.0], dtype=torch.float64)))
    price = np.full((len(path), len(path)), np.inf)
    for i, (x_t, output) in enumerate(zip(path, outputs)):
        data = ddim.from_x[i] * x_t + ddim.from_output[i] * output
        for j in range(i + 1, len(path)):
            there = sigma[j] / sigma[i] * (x_t - alpha[i] * data) + alpha[j] * data
            price[i, j] = float((there - path[j]).flatten(1).norm(dim=1).mean())
    return price
