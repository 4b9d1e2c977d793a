"""A frozen model under soft gates: every cell computes, and is mixed with what it would hold or forecast."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.grid import blocks as _blocks
from lib.grid import sampling, solvers
from lib.grid.model import Conditions, Model
from lib.grid.plan import HOLD, Plan, PlanError
from lib.grid.solvers import State

Checkpoints = Literal["none", "steps", "nested"]


class SuperNet:
    """A frozen model all of whose cells compute, and are mixed by gates with what they would hold or forecast.

    A cell gives g * now + (1 - g) * before (section 3.2 of the paper), where blocks cache residual changes of these.
    What it will have given before at the next step moves along by the gate too: the newest is g * now + (1 - g) * the
    newest before, the second newest g * the newest before + (1 - g) * the second newest, and the steps at which they
    were given likewise. So gates of 0 and 1 are the plan of those gates, forecasts included. The first step has no
    gates.

    Parameters
    ----------
    model : Model
    plan : Plan, full: the teacher's T steps and solver
    precision : "fp32" or "bf16", of the network
    reuse : 0 (hold, as in the paper), 2 (line) or 3 (parabola): what a cell that does not compute gives
    """

    def __init__(self, model: Model, plan: Plan, precision: str = "fp32", reuse: int = HOLD):
        self.model, self.plan, self.precision, self.depth = model, plan, precision, max(1, reuse)
        self.blocks = _blocks.describe(model.network)
        plan.check_fits(self.blocks.names, model.noise_schedule)
        if len(plan.passes) > 1:
            raise PlanError("gates are of one pass: train them under a plan of one, and guide what comes of it.")
        self._solver = solvers.of(plan)
        self._places = solvers.abscissae(plan.timesteps, plan.schedule, plan.abscissa)

    def _step(self, step: int, gates: Tensor, conditions: Conditions, x_t: Tensor, *before: Tensor) -> State:
        """Make one step. It reads and leaves nothing but its arguments, so that a checkpoint may make it again.

        `before` is the solver's state, then for each block its last values and, where there are several, their
        abscissae.
        """
        known = self._remembered(step)
        solver, memory = before[:known], before[known:]
        width = 2 * self.depth if self.depth > 1 else 1
        after: list[State] = []
        residual, here = self.blocks.cache == "residual", self._places[step:step + 1].to(x_t.device)

        def mix(module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor]) -> Tensor | tuple[Tensor]:
            place = len(after)  # blocks run in the order in which they are described
            now = output[0] if isinstance(output, tuple) else output
            now = now - inputs[0] if residual else now
            if memory:
                own, gate = memory[place * width:(place + 1) * width], gates[step, place]
                values, places = own[:self.depth], own[self.depth:]
                values_after = _moved(now, values, _beside(gate, now))
                after.append((*values_after, *_moved(here, places, gate.to(here.dtype))))
                mixed = values_after[0] if self.depth == 1 else torch.lerp(_forecast(here, values, places), now,
                                                                           _beside(gate, now))
            else:
                mixed = now
                after.append((now,) * self.depth + (here,) * (width - self.depth))
            mixed = mixed + inputs[0] if residual else mixed
            return (mixed,) if isinstance(output, tuple) else mixed

        def predict(x_t: Tensor, step: int, passes: tuple[str, ...] = (), **given: Tensor) -> Tensor:
            return self.model.predict(x_t, self.plan.timesteps[step], **given)

        modules = [self.model.network.get_submodule(block.modules[-1]) for block in self.blocks]
        handles = [module.register_forward_hook(mix) for module in modules]
        try:
            with sampling.autocast(x_t.device, self.precision):
                prediction = conditions.predict(predict, x_t, step)
        finally:  # a checkpoint leaves early, by an exception
            for handle in handles:
                handle.remove()
        following, solver = solvers.advance(self._solver, step, x_t, prediction.to(x_t.dtype), solver)
        return following, *solver, *(part for own in after for part in own)

    def _remembered(self, step: int) -> int:
        """Give how many tensors the solver's state has before a step."""
        return min(step, 1) + min(step, self._solver.b.shape[1])

    def images(self, noise: Tensor, gates: Tensor, checkpoints: Checkpoints = "nested",
               conditions: Conditions | None = None) -> Tensor:
        """Sample under soft gates; differentiable in the gates.

        Parameters
        ----------
        noise : Tensor, (n, C, H, W)
        gates : Tensor, (T, N), or (T, N, n) where each image has gates of its own, in [0, 1]; row 0 is not read
        checkpoints : what is kept for the gradient, and what is made again
            "none": all is kept. "steps": what one step hands the next, T x N outputs; the inside of a step, and of the
            decoder, is made again. "nested": the N outputs of some sqrt(2 T) steps only; the steps between are made
            again, twice. The stretches between get shorter as the kept steps fill the memory, so that no stretch needs
            more than another.
        conditions : Conditions of the images, guided in one batch (`apart` False); None for those that the model draws

        Returns
        -------
        images : Tensor, (n, C', H', W')
        """
        if checkpoints not in get_args(Checkpoints):
            raise ValueError(f"checkpoints {checkpoints!r}: must be one of {', '.join(get_args(Checkpoints))}")
        noise, gates = self._placed(noise, gates)
        conditions = conditions or self.model.asked(noise)

        def again(function: Callable[..., State], *arguments: object) -> State:
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

        def walk(first: int, last: int, *state: Tensor) -> State:
            for step in range(first, last):
                state = (self._step(step, gates, conditions, *state) if checkpoints == "none" else
                         again(self._step, step, gates, conditions, *state))
            return state

        state, steps = self._step(0, gates, conditions, noise), self.plan.steps
        if checkpoints == "none":
            return self.model.decode(walk(1, steps, *state)[0])
        if checkpoints == "steps":
            return self._decoded(walk(1, steps, *state)[0], again)
        first, stretch = 1, math.ceil(math.sqrt(2 * steps + 0.25) - 0.5)
        while first < steps:
            last = min(first + stretch, steps)
            state = again(walk, first, last, *state)
            first, stretch = last, max(1, stretch - 1)
        return self._decoded(state[0], again)

    def _decoded(self, x_0: Tensor, again: Callable) -> Tensor:
        """Decode image by image, each made again for the gradient."""
        return torch.cat([again(self.model.decode, one) for one in x_0.split(1)])

    def _placed(self, noise: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Give noise and gates where the network lies, the gates with an axis of images, (T, N, 1 or n)."""
        gates = gates.to(self.model.device)
        return noise.to(self.model.device), gates[..., None] if gates.dim() == 2 else gates

    def kept(self, noise: Tensor, gates: Tensor) -> int:
        """Measure the bytes that a gradient needs without checkpoints: T times the third step's, and the decoder's.

        Parameters
        ----------
        noise, gates : Tensor, (n, C, H, W) and (T, N) or (T, N, n), as `images` takes them
        """
        noise, gates = self._placed(noise, gates.detach())
        conditions, state, sizes = self.model.asked(noise), (noise,), {}
        weights = {weight.untyped_storage().data_ptr() for part in (self.model.network, self.model.latents)
                   if part is not None for weight in part.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        def noted(function: Callable, *arguments: object) -> tuple[object, int]:
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return function(*arguments), sum(sizes.values())

        for step in range(min(3, self.plan.steps)):
            state, of_step = noted(self._step, step, gates.requires_grad_(), conditions, *state)
            state = tuple(part.detach().requires_grad_() for part in state)  # no step keeps another's inside
        _, of_decoder = noted(self.model.decode, state[0][:1])
        return of_step * self.plan.steps + of_decoder * len(noise)


def _beside(numbers: Tensor, values: Tensor) -> Tensor:
    """Shape numbers, one an image or one for all, to multiply values of the images (one pass after another)."""
    passes = len(values) // len(numbers) if len(numbers) > 1 else 1
    return numbers.to(values.dtype).repeat(passes).view(-1, *(1,) * (values.dim() - 1))


def _moved(now: Tensor, known: State, gate: Tensor) -> State:
    """Move what was known on by one, as far as the gate is open."""
    return tuple(torch.lerp(older, newer, gate) for newer, older in zip((now, *known), known))


def _forecast(here: Tensor, values: State, places: State) -> Tensor:
    """Read the polynomial through the last values (at their places) off at `here`, in Newton's form.

    Where two places are one, there were fewer values: the term is left out.
    """
    total, terms = values[0], list(values)
    reach = torch.ones_like(here)
    for order in range(1, len(values)):
        for i in range(len(values) - order):
            apart = places[i] - places[i + order]
            there = (apart != 0) & (places[i + order - 1] != places[i + order])
            slope = (terms[i] - terms[i + 1]) / _beside(apart.where(there, 1), total)
            terms[i] = slope.where(_beside(there, total).bool(), 0)
        reach = reach * (here - places[order - 1])
        total = total + _beside(reach, total) * terms[0]
    return total
