"""Runs a model under a plan: hooks on its blocks let each cell compute, hold or forecast.

The network's own forward pass stays as it is (no copy of it that the next diffusers release would break): diffusers'
`ModelHook` decides at each layer, and at each level that no live cell needs, whether the original forward runs.
Nothing of the cache is ever lent: what a block gave is copied in and copied out, so no other code can change it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from diffusers import Transformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lib.grid import blocks as _blocks
from lib.grid import solvers
from lib.grid.plan import COMPUTE, DROP, GIVEN, NULL, NoiseSchedule, Plan, PlanError

HOOK = "lean_diffusion"
CONTEXTS = {"cond": GIVEN, "uncond": NULL}
"""What pipelines that call the network once a pass name them (diffusers' `cache_context`)."""


class Engine:
    """A model under a plan, as a context manager: inside, ``engine(x_t, step)`` predicts at a step of the plan.

    A pipeline may call the model itself instead; `at` then says which step a call belongs to. On leaving, the model is
    as it was. `reset` starts over (the next batch) and forgets what was cached.

    Parameters
    ----------
    model : Module of a family that `lib.grid.blocks.describe` knows
    plan : Plan
    schedule : NoiseSchedule of the model, checked against the plan's

    Raises
    ------
    PlanError
        If the plan is for other blocks or another noise schedule, or when a pass is called twice at one step.
    """

    def __init__(self, model: nn.Module, plan: Plan, schedule: NoiseSchedule):
        self.model, self.plan = model, plan
        self.blocks = _blocks.describe(model)
        plan.check_fits(self.blocks.names, schedule)
        if plan.cache != self.blocks.cache:
            raise PlanError(f"the plan caches each block's {plan.cache}, this network's blocks cache their "
                            f"{self.blocks.cache}.")
        self.life = plan.life
        self.solver = solvers.of(plan)
        self._abscissae = solvers.abscissae(plan.timesteps, plan.schedule, plan.abscissa).tolist()
        self._hooked: list[nn.Module] = []
        self.reset()

    def reset(self) -> None:
        """Go back to the first step and forget all that was cached."""
        self._cache: dict[str, _Pass] = {}
        self._shapes: dict[int, Tensor] = {}
        self._packed: Callable[[Tensor], Any] | None = None
        self.step, self._names = 0, self.plan.passes
        self._done: set[str] = set()
        self._given: Tensor | None = None  # the given pass's output at this step

    def at(self, step: int) -> None:
        """Say which step the next calls belong to."""
        if step != self.step:
            if step != self.step + 1 and self._cache:
                raise PlanError(f"step {step} was asked for after step {self.step}: steps are walked in their order. "
                                "Call reset() to start anew.")
            for memory in self._cache.values():
                memory.forget(self.life[memory.sheet], self.step)
            self.step, self._done, self._given = step, set(), None

    def __enter__(self) -> Self:
        self._weight = next(self.model.parameters())
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

    def __call__(self, x_t: Tensor, step: int, passes: Sequence[str] = (GIVEN,), **conditions) -> Tensor:
        """Predict at a step of the plan.

        Parameters
        ----------
        x_t : Tensor, (B, C, H, W); of several passes their batches one after the other
        step : int, 0..S-1
        passes : their names, in that order
        conditions : what else the network reads

        Returns
        -------
        prediction : Tensor, (B, C, H, W), without a learned variance
        """
        self.at(step)
        self._names = tuple(passes)
        if step < self.plan.steps:
            t = torch.as_tensor(self.plan.timesteps[step], device=x_t.device).expand(len(x_t))
        else:
            t = None  # is refused by `run`
        output = self.model(x_t.to(self._weight.dtype), timestep=t, **conditions)
        return output.sample[:, :x_t.shape[1]]

    def name(self, context: str | None) -> None:
        """Take a pipeline's name of the pass that the next calls make; None: all passes lie in one batch."""
        self._names = self.plan.passes if context is None else (CONTEXTS.get(context, context),)

    def check_passes(self, images: int) -> None:
        """Refuse a run of so many images if the calls of this step did not hold the plan's several passes.

        Raises
        ------
        PlanError
            Saying what was called.
        """
        rows = {memory.rows for memory in self._cache.values()}
        missing = set(self.plan.passes) - self._done
        if len(self.plan.passes) > 1 and (missing or rows != {images}):
            raise PlanError(f"the plan has passes {', '.join(self.plan.passes)}, but the network was called for "
                            f"{', '.join(sorted(self._done)) or 'none of them'} with {sorted(rows)} rows a pass where "
                            f"there are {images} images: call the pipeline with guidance, or take a plan of one pass.")

    def run(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Give what the network gives at the current step: its `forward` runs for the passes that compute."""
        if self.step >= self.plan.steps:
            raise PlanError(f"the plan has {self.plan.steps} steps and was called once more. Call reset() before the "
                            "next batch.")
        if again := self._done & set(self._names):
            raise PlanError(f"step {self.step} was called twice for the pass {sorted(again)[0]!r}: which pass is the "
                            "second call? Name it, or make all passes in one batch.")
        if kwargs.get("down_intrablock_additional_residuals") is not None and not all(map(all, self.plan.computes)):
            raise PlanError("an adapter adds to what blocks give inside the levels, and plans that skip blocks do not "
                            "know it: run it without a plan.")
        batch = len(next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim))
        memories = [self._memory(name) for name in self._names]
        if batch % len(memories):
            raise PlanError(f"a batch of {batch} cannot hold {len(memories)} passes ({', '.join(self._names)}).")
        rows = batch // len(memories)
        for memory in memories:
            if memory.rows not in (None, rows):
                raise PlanError(f"the batch changed from {memory.rows} to {rows} images in the middle of a run: what "
                                "was cached does not fit. Call reset() first.")
            memory.rows = rows
        groups: dict[tuple, list[int]] = {}
        for number, memory in enumerate(memories):
            life = self.life[memory.sheet]
            if life.called[self.step]:
                kind = life.live[self.step].tobytes(), life.read[self.step].tobytes()
                groups.setdefault(kind, []).append(number)
        fresh: dict[int, Tensor] = {}
        for members in groups.values():
            chosen = (args, kwargs)
            if len(members) < len(memories):
                chosen = tree_map_only(Tensor, lambda value: _chunks(value, members, rows, batch), chosen)  # noqa: B023
            self._group = self._together([memories[number] for number in members])
            output = self.call(forward, *chosen)
            self._packed = _packing(output)
            for number, part in zip(members, output[0].chunk(len(members)), strict=True):
                fresh[number] = part
        self._done |= set(self._names)
        outputs = self._outputs(memories, fresh)
        if len(groups) == 1 and all(self.plan.net[memory.sheet][self.step] == COMPUTE for memory in memories):
            return output
        return self._packed(torch.cat(outputs))

    def _together(self, memories: list["_Pass"]) -> "_Group":
        life = self.life[memories[0].sheet]
        kept = np.any([self.life[memory.sheet].keep[self.step] > 0 for memory in memories], axis=0)
        return _Group(memories, life.live[self.step], life.read[self.step], life.live[self.step] & kept)

    def _memory(self, name: str) -> "_Pass":
        if name not in self._cache:
            self._cache[name] = _Pass(self.plan.pass_of(name))
        return self._cache[name]

    def _outputs(self, memories: Sequence["_Pass"], fresh: dict[int, Tensor]) -> list[Tensor]:
        """Give each pass's output, and keep what later steps read; the given pass's first, for others may need it."""
        outputs: dict[int, Tensor] = {}
        several = len(self.plan.passes) > 1
        for number in sorted(range(len(memories)), key=lambda number: self._names[number] != GIVEN):
            memory = memories[number]
            state = self.plan.net[memory.sheet][self.step]
            apart = several and self.plan.null_holds == "difference" and self._names[number] != GIVEN
            if state == COMPUTE:
                output = fresh[number]
                if keep := int(self.life[memory.sheet].net_keep[self.step]):
                    memory.put(NET, self.step, output - self._given_output(number) if apart else output, keep)
            elif state == DROP:
                output = self._given_output(number).clone()
            else:
                output = self._value(memory, NET)
                output = output + self._given_output(number) if apart else output
            outputs[number] = output
            if several and self._names[number] == GIVEN:
                self._given = output if len(memories) > 1 else output.clone()  # others may come in calls of their own
        return [outputs[number] for number in range(len(memories))]

    def _given_output(self, number: int) -> Tensor:
        if self._given is None:
            raise PlanError(f"at step {self.step} the pass {self._names[number]!r} is made of the given pass's output, "
                            "which comes after it: make both passes in one batch.")
        return self._given

    def call(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Run the network at the current step for the current group of passes."""
        return forward(*args, **kwargs)

    def runs(self, place: int) -> bool:
        """Say whether the cell of block `place` runs now."""
        return bool(self._group.live[place])

    def put(self, place: int, given: Callable[[], Tensor]) -> None:
        """Take what a block gave: to keep, if a later step reads it."""
        known = place in self._shapes
        if known and not self._group.kept[place]:
            return
        value = given()
        if not known:
            self._shapes[place] = value.new_zeros(1).expand(1, *value.shape[1:])
        if self._group.kept[place]:
            self.store(place, value)

    def store(self, place: int, value: Tensor) -> None:
        """Copy what a block gave into the current passes' memories."""
        for memory, part in zip(self._group.memories, value.chunk(len(self._group.memories)), strict=True):
            if keep := int(self.life[memory.sheet].keep[self.step, place]):
                memory.put(place, self.step, part, keep)

    def get(self, place: int) -> Tensor:
        """Give what a cell that does not run stands for: a held or forecast value, or zeros where nobody reads it."""
        if self._group.read[place]:
            return self.value(place)
        return self._shapes[place].expand(sum(memory.rows for memory in self._group.memories),
                                          *self._shapes[place].shape[1:])

    def value(self, place: int) -> Tensor:
        """Make the value that a cell holds or forecasts for the current passes; it is the caller's own."""
        parts = [self._value(memory, place) for memory in self._group.memories]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _value(self, memory: "_Pass", place: int) -> Tensor:
        known = [(step, value) for step, value in memory.kept[place] if step != self.step]
        plan, step = self.plan, self.step
        state = plan.net[memory.sheet][step] if place == NET else plan.states[memory.sheet][step][place]
        if state <= 1:
            return known[0][1].clone()
        known = known[:state]
        weights = solvers.forecast(self._abscissae[self.step], [self._abscissae[step] for step, _ in known])
        total = known[0][1] * weights[0]
        for weight, (_, value) in zip(weights[1:], known[1:]):
            total = total.add(value, alpha=weight)
        return total


NET = -1
"""The place of the whole output in a memory."""


@dataclass
class _Pass:
    """What one pass computed last, the newest first, with the steps at which it did.

    Attributes
    ----------
    sheet : which of the plan's sheets of cells is the pass's
    rows : images a call
    kept : for each block's place, and `NET`, its (step, value) pairs
    """

    sheet: int
    rows: int | None = None
    kept: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def put(self, place: int, step: int, value: Tensor, keep: int) -> None:
        """Copy a value in, to be one of `keep`; it takes the place of one of the same step (a call made again)."""
        older = [pair for pair in self.kept.get(place, ()) if pair[0] != step]
        self.kept[place] = [(step, value.clone()), *older[:keep - 1]]

    def forget(self, life: _blocks.Life, step: int) -> None:
        """Drop what no step after `step` reads."""
        for place, pairs in self.kept.items():
            del pairs[int(life.net_keep[step] if place == NET else life.keep[step, place]):]


@dataclass
class _Group:
    """The passes that one call of the network serves; which blocks run, are read from before, and are kept, (N,)."""

    memories: list[_Pass]
    live: np.ndarray
    read: np.ndarray
    kept: np.ndarray


def _chunks(value: Tensor, members: Sequence[int], rows: int, batch: int) -> Tensor:
    """Take some passes' rows of what has a row an image; give all else as it is."""
    if not value.ndim or len(value) != batch:
        return value
    return torch.cat([value[number * rows:(number + 1) * rows] for number in members])


def _packing(output: Any) -> Callable[[Tensor], Any]:
    """Give what puts another tensor in place of a network's output."""
    return (lambda value: (value,)) if isinstance(output, tuple) else (lambda value: type(output)(sample=value))


class _Names(StateManager):
    """Where diffusers' `cache_context` says which pass the next calls make."""

    def __init__(self, engine: Engine):
        super().__init__(BaseState)
        self.engine = engine

    def set_context(self, context: Any) -> None:
        self.engine.name(context and getattr(context, "name", context))


class _ModelHook(ModelHook):
    """Stands at the network's door, whoever calls it; hears the names of passes that a pipeline gives."""

    _is_stateful = True

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine, self.names = engine, _Names(engine)

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        return self.engine.run(self.fn_ref.original_forward, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


class _LayerHook(ModelHook):
    """Runs one module of a layer, or passes on what the layer stands for."""

    def __init__(self, engine: Engine, place: int, gives_output: bool):
        super().__init__()
        self.engine, self.place, self.gives_output = engine, place, gives_output

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor]:
        if not self.engine.runs(self.place):
            if not self.gives_output:  # the layer's last module gives the value
                return args[0] if args else kwargs["hidden_states"]
            output = self.engine.get(self.place)
            return (output,) if isinstance(module, Transformer2DModel) else output
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.gives_output:
            self.engine.put(self.place, lambda: output[0] if isinstance(output, tuple) else output)
        return output


class _ResidualHook(_LayerHook):
    """Runs one block, or adds to its input the change that it stands for."""

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not self.engine.runs(self.place):
            return hidden_states + self.engine.get(self.place)
        output = self.fn_ref.original_forward(hidden_states, *args, **kwargs)
        self.engine.put(self.place, lambda: output - hidden_states)
        return output


class _LevelHook(ModelHook):
    """Skips a level of which no cell runs, its concatenations with it."""

    def __init__(self, engine: Engine, level: str, places: list[int]):
        super().__init__()
        self.engine, self.places = engine, places
        self.gives_skips = level.startswith("down")

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        if any(self.engine.runs(place) for place in self.places):
            return self.fn_ref.original_forward(*args, **kwargs)
        outputs = tuple(self.engine.get(place) for place in self.places)
        return (outputs[-1], outputs) if self.gives_skips else outputs[-1]
