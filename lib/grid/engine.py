"""Runs a model under a plan: hooks on its blocks let each cell compute or reuse.

The network's own forward pass stays as it is (no copy of it that the next diffusers release would break): diffusers'
`ModelHook` decides at each layer, and at each level that no live cell needs, whether the original forward runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from diffusers import Transformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from lib.grid import blocks as _blocks
from lib.grid.plan import NoiseSchedule, Plan, PlanError

HOOK = "lean_diffusion"


class Engine:
    """A model under a plan, as a context manager: inside, ``engine(x_t, t)`` predicts at the plan's next step.

    Calls walk the plan's steps in order; `reset` starts over (the next batch) and forgets what was cached. The step is
    counted, never looked up from the timestep's value. On leaving, the model is as it was.

    A pipeline may call the model itself instead, once a step (`branch` tells passes of the same step apart).

    Parameters
    ----------
    model : Module of a family that `lib.grid.blocks.describe` knows
    plan : Plan
    schedule : NoiseSchedule of the model, checked against the plan's

    Raises
    ------
    PlanError
        If the plan is for other blocks or another noise schedule, or when called more often than it has steps.
    """

    def __init__(self, model: nn.Module, plan: Plan, schedule: NoiseSchedule):
        self.model, self.plan = model, plan
        self.blocks = _blocks.describe(model)
        plan.check_fits(self.blocks.names, schedule)
        if plan.cache != self.blocks.cache:
            raise PlanError(f"the plan caches each block's {plan.cache}, this network's blocks cache their "
                            f"{self.blocks.cache}.")
        self.live, self.stored = self.blocks.liveness(plan.cells)
        self._calls = self.blocks.calls(self.live)
        self._keeps = [int(i) for i in range(plan.steps - 1) if self._calls[i] and not self._calls[i + 1]]
        self._unread = torch.empty(0)
        self._hooked: list[nn.Module] = []
        self.reset()

    def reset(self) -> None:
        """Go back to the first step and forget all that was cached."""
        self._passes: dict[str, _Pass] = {}
        self._now, self.branch = _Pass(), ""

    def __enter__(self) -> Self:
        self._weight = next(self.model.parameters())
        self._unread = torch.empty(0, device=self._weight.device)
        self._hook("", _ModelHook(self))
        for level, members in self.blocks.levels.items():
            if len(members) > 1:
                self._hook(self.blocks.level_modules[level], _LevelHook(self, level, members))
        for place, block in enumerate(self.blocks):
            for path in block.modules:
                kind = _ResidualHook if self.blocks.cache == "residual" else _LayerHook
                self._hook(path, kind(self, place, gives_output=path == block.modules[-1]))
        return self

    def __exit__(self, *_: Any) -> None:
        for module in self._hooked:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK, recurse=False)
        self._hooked = []
        self.reset()

    def _hook(self, path: str, hook: ModelHook) -> None:
        module = self.model.get_submodule(path)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
        self._hooked.append(module)

    def __call__(self, x_t: Tensor, t: Tensor | int, branch: str = "", **conditions) -> Tensor:
        """Predict at the plan's next step.

        Parameters
        ----------
        x_t : Tensor, (B, C, H, W)
        t : the timestep
        branch : str
            Which pass this is, where guidance makes several a step: each has steps and a cache of its own.
        conditions : what else the network reads

        Returns
        -------
        prediction : Tensor, (B, C, H, W), without a learned variance
        """
        self.branch = branch
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        output = self.model(x_t.to(self._weight.dtype), t, **conditions)
        return output.sample[:, :x_t.shape[1]]

    def step(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Go one step on in the current branch: give what the network's `forward` gives, or what it gave last."""
        self._now = now = self._passes.setdefault(self.branch, _Pass())
        now.step += 1
        if now.step >= self.plan.steps:
            raise PlanError(f"the plan has {self.plan.steps} steps and was called once more. Call reset() before the "
                            "next batch.")
        if not self._calls[now.step]:
            return now.output
        output = self.call(forward, args, kwargs)
        if now.step in self._keeps:
            now.output = output
        return output

    def call(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Run the network at the current step."""
        return forward(*args, **kwargs)

    def runs(self, place: int) -> bool:
        """Say whether the cell of block `place` at the current step computes."""
        return self.live[self._now.step, place]

    def put(self, place: int, given: Callable[[], Tensor]) -> None:
        """Take what a block gave: to keep, if a later step reads it."""
        if self.stored[self._now.step, place]:
            self._now.cache[place] = given()
        else:
            self._now.cache.pop(place, None)  # the older one has been read for the last time

    def get(self, place: int) -> Tensor:
        """Give what a skipped block gave last; an empty tensor, which costs no concatenation, where nobody reads it."""
        return self._now.cache.get(place, self._unread)


@dataclass
class _Pass:
    """Where one pass stands (guidance may make two a step), and what its blocks gave."""

    step: int = -1
    cache: dict[int, Tensor] = field(default_factory=dict)
    output: Any = None


class _ModelHook(ModelHook):
    """Counts the network's calls, whoever makes them, and leaves out those that compute nothing."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        return self.engine.step(self.fn_ref.original_forward, args, kwargs)


class _LayerHook(ModelHook):
    """Runs one module of a layer, or passes on what the layer gave last."""

    def __init__(self, engine: Engine, place: int, gives_output: bool):
        super().__init__()
        self.engine, self.place, self.gives_output = engine, place, gives_output

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor:
        if not self.engine.runs(self.place):
            output = self.engine.get(self.place)
            return (output,) if isinstance(module, Transformer2DModel) else output
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.gives_output:
            self.engine.put(self.place, lambda: output[0] if isinstance(output, tuple) else output)
        return output


class _ResidualHook(_LayerHook):
    """Runs one block, or adds to its input what the block added last."""

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not self.engine.runs(self.place):
            return hidden_states + self.engine.get(self.place)
        output = self.fn_ref.original_forward(hidden_states, *args, **kwargs)
        self.engine.put(self.place, lambda: output - hidden_states)
        return output


class _LevelHook(ModelHook):
    """Skips a level of which no cell computes, its concatenations with it."""

    def __init__(self, engine: Engine, level: str, places: list[int]):
        super().__init__()
        self.engine, self.places = engine, places
        self.gives_skips = level.startswith("down")

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        if any(self.engine.runs(place) for place in self.places):
            return self.fn_ref.original_forward(*args, **kwargs)
        outputs = tuple(self.engine.get(place) for place in self.places)
        return (outputs[-1], outputs) if self.gives_skips else outputs[-1]
