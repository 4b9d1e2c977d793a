"""Runs a network under a plan: each cell computes, holds or forecasts, and what is needed later is kept.

The network's own forward pass stays as it is (no copy of it that the next diffusers release would break): hooks
(`lib.grid.hooks`) ask the engine at each block whether it runs. Nothing of the cache is ever lent: what a block gave
is copied in and copied out, so no other code can change it. A call that the plan does not know is refused by name, and
what was cached for other rows than those that come is not used: no wrong image without a word.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lib.grid import blocks as _blocks
from lib.grid import solvers
from lib.grid.hooks import CONTEXTS, Hooks
from lib.grid.plan import COMPUTE, DROP, GIVEN, NULL, NoiseSchedule, Plan, PlanError

CLOSE = 0.01
"""Timesteps that lie no further apart are the same: networks are told them in single precision."""


class Engine:
    """A network under a plan, as a context manager: inside, ``engine(x_t, step)`` predicts at a step of the plan.

    A pipeline may call the network itself instead: the timestep of a call says which step it is. A run may begin at any
    step; what nothing is cached for is computed. On leaving, the network is as it was. `reset` starts over (the next
    batch, or after a run that was broken off) and forgets what was cached.

    Parameters
    ----------
    network : Module of a family that `lib.grid.blocks.describe` knows
    plan : Plan
    schedule : NoiseSchedule of the network, checked against the plan's
    led : bool
        True if a scheduler says when the next step begins (`at`), when a run is on (`closed`), and how many steps its
        pipeline counts (`counted`): then calls at any other timestep, or between runs, are somebody else's and refused.
    compiling : dict of torch.compile's options, by which each block's own forward is compiled; None for none

    Raises
    ------
    PlanError
        If the plan is for other blocks or another noise schedule; if a plan, or another cache, is on the network; at
        calls that the plan does not know.
    """

    def __init__(self, network: nn.Module, plan: Plan, schedule: NoiseSchedule, led: bool = False,
                 compiling: dict[str, Any] | None = None):
        self.network, self.plan, self.led, self.compiling = network, plan, led, compiling
        self.blocks = _blocks.describe(network)
        plan.check_fits(self.blocks.names, schedule)
        if plan.cache != self.blocks.cache:
            raise PlanError(f"the plan caches each block's {plan.cache}, this network's blocks cache their "
                            f"{self.blocks.cache}.")
        self.solver = solvers.of(plan)
        self._abscissae = solvers.abscissae(plan.timesteps, plan.schedule, plan.abscissa).tolist()
        self._hooks = Hooks(self)
        self._signature = inspect.signature(network.forward)
        self.closed, self.counted = led, plan.steps
        self.reset()

    def reset(self) -> None:
        """Go back to the first step and forget all that was cached."""
        self._now, self.life, self._first = self.plan, self.plan.life, 0
        self._cache: dict[str, _Pass] = {}
        self._shapes: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._packed: Callable[[Tensor], Any] | None = None
        self.step, self._names = 0, self._now.passes
        self._done: set[str] = set()
        self._given: Tensor | None = None  # the given pass's output at this step
        self._group: _Group | None = None  # the passes that the network runs for just now
        self._told = False  # that the next call's step is known
        self._pair: tuple[Tensor, ...] | None = None  # outputs of the first batch of two passes; () once looked at
        self._asked: Tensor | None = None  # at what latents the first call of this step asked, if it had no name
        self.thread: int | None = None  # whose run it is; None until its first call
        if self.on:
            self._hooks.check()
            self._dtype = self.network.dtype

    def at(self, step: int) -> None:
        """Say which step the next calls belong to."""
        if step == self.step:
            return
        if not self._cache:
            self._refresh(step)
        elif step != self.step + 1:
            raise PlanError(f"step {step} was asked for after step {self.step}: steps are walked in their order. "
                            "Call reset() to start anew.")
        elif not self._done:
            raise PlanError(f"step {self.step} was begun and not finished: make it again, or call reset().")
        self._cache = {name: self._cache[name] for name in self._cache if name in self._done}
        for memory in self._cache.values():
            memory.forget(self.life[memory.sheet], self.step)
        if self._asked is not None:
            self._names = self._now.passes
        self.step, self._done, self._given, self._asked = step, set(), None, None

    def _refresh(self, step: int, alone: bool = False) -> None:
        """Go on from a step without what was cached: there every block is computed; `alone`, of the given pass only."""
        self._now = (self._now.alone() if alone else self._now).refreshed(step)
        self._cache, self._shapes, self.life, self._first = {}, {}, self._now.life, step

    def __enter__(self) -> Self:
        self._weight, self._dtype = next(self.network.parameters()), self.network.dtype
        self._hooks.put_on()
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.take_off()
        self.reset()

    @property
    def on(self) -> bool:
        """Whether the plan is on the network."""
        return self._hooks.on

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
        self._names, self._told = tuple(passes), True
        if step < self.plan.steps:
            t = torch.as_tensor(self.plan.timesteps[step], device=x_t.device).expand(len(x_t))
        else:
            t = None  # is refused by `run`
        try:
            return self.network(x_t.to(self._dtype), timestep=t, **conditions).sample[:, :x_t.shape[1]]
        finally:
            self._told, self._names = False, self._now.passes

    def name(self, context: str | None) -> None:
        """Take a pipeline's name of the pass that the next calls make; None: all passes lie in one batch."""
        self._names = self._now.passes if context is None else (CONTEXTS.get(context, context),)
        self._asked = None

    def check_passes(self, images: int) -> None:
        """Refuse a step for so many images if its calls of the network did not hold the plan's several passes.

        Raises
        ------
        PlanError
            Saying what was called.
        """
        shapes = {memory.shape[0] for memory in self._cache.values()}
        missing = set(self._now.passes) - self._done
        if not self._done:
            raise PlanError(f"{self.plan.title} is on the pipeline, but its network was not called: was unet or "
                            "transformer replaced? Leave the block, and make a new one.")
        if self._asked is not None and not set(self._cache) <= self._done:
            raise PlanError(f"step {self.step} made fewer calls of the network than the step before, and calls without "
                            "names are told apart by their order: name them (cache_context), or run the pipeline "
                            "without a plan.")
        if len(self._now.passes) > 1 and (missing or shapes != {images}):
            raise PlanError(f"the plan has passes {', '.join(self._now.passes)}, but the network was called for "
                            f"{', '.join(sorted(self._done))} with {sorted(shapes)} rows a pass where there are "
                            f"{images} images: call the pipeline with guidance, or take a plan of one pass.")

    def check_order(self, output: Tensor) -> None:
        """Refuse a pipeline that holds the given pass first: told by what it made of the first batch of two.

        Guidance gives a multiple of ``mean + (2 g - 1) (given - null) / 2``: with g above one half it lies, beyond the
        mean of both passes, on the given one's side.

        Parameters
        ----------
        output : Tensor, (n, C, ...), what the pipeline gave its scheduler
        """
        if not self._pair:
            return
        pair, self._pair = self._pair, ()
        if pair[0][:, :output.shape[1]].shape != output.shape:
            return
        null, given, guided = (part[:, :output.shape[1]].float().flatten() for part in (*pair, output))
        mean, apart = (null + given) / 2, given - null
        apart = apart - mean * (apart @ mean) / (mean @ mean)
        share = (guided @ mean) / (mean @ mean)
        beyond = torch.cosine_similarity(guided - share * mean, apart, dim=0) * share.sign()
        if beyond < -0.5:
            raise PlanError("the guided output lies on the null pass's side: either this pipeline's batches hold the "
                            f"given pass first, where {self.plan.title} takes the first half for the null pass, or its "
                            "guidance_scale is below 0.5. Take a plan of one pass, which holds for both.")

    def run(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Give what the network gives at the current step: its `forward` runs for the passes that compute."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        sample = next(iter(arguments.values()))
        self.check_thread()
        self._hooks.mend()
        if not self._told:
            self._arrive(arguments.get("timestep"))
            self._tell_apart(sample)
        self._check_call(arguments)
        self._take(sample)
        memories = [self._cache[name] for name in self._names]
        batch, rows = len(sample), memories[0].shape[0]
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
            try:
                output = self.call(partial(self._whole, forward), *chosen)
            finally:
                self._group = None
            self.check_thread()
            self._packed = _packing(output)
            for number, part in zip(members, output[0].chunk(len(members)), strict=True):
                fresh[number] = part
        self._done |= set(self._names)
        outputs = self._outputs(memories, fresh)
        if len(fresh) == 2 and self.led and self._pair is None:
            self._pair = outputs[0], outputs[1]
        if len(groups) == 1 and all(self._now.net[memory.sheet][self.step] == COMPUTE for memory in memories):
            return output
        return self._packed(torch.cat(outputs))

    def _arrive(self, timestep: float | Tensor) -> None:
        """Find the step of a call that others make, by its timestep."""
        if self.closed:
            raise PlanError(f"{self.plan.title} is on this network, and was called by something else than a run of its "
                            "pipeline under the plan's scheduler (another pipeline, a scheduler put in its place, or a "
                            "call by hand): disable() the plan first, or call scheduler.set_timesteps.")
        there = set(timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep])
        if len(there) > 1:
            raise PlanError("the rows of one call lie at different timesteps, and a plan's step is at one.")
        t = float(there.pop())
        coarse = isinstance(timestep, Tensor) and timestep.dtype in (torch.float16, torch.bfloat16)
        kind, train = type(self.network).__name__, self.plan.schedule.train_timesteps
        close = CLOSE
        if kind in _blocks.SHARES:
            t *= train
        elif kind in _blocks.REMAINDERS:
            t = (1 - t) * train
        if coarse:
            close = max(CLOSE, (train if kind in _blocks.REMAINDERS else t) * torch.finfo(timestep.dtype).eps)
        near = {step: abs(own - t) for step, own in enumerate(self.plan.timesteps) if abs(own - t) < close}
        steps = sorted(near, key=lambda step: (step != self.step, near[step]))
        again = not self.led and bool(self._done & set(self._names))
        if not self._cache and steps:
            self.at(steps[0])
        elif self.step in steps and not (again and self.step + 1 in steps):
            pass
        elif self.step + 1 in steps and not self.led:
            self.at(self.step + 1)
        elif steps and self.step == self.plan.steps - 1 and self._done and not self.led:
            self.reset()
            self.at(steps[0])
        else:
            there = f"at timestep {self.plan.timesteps[self.step]}" if self.step < self.plan.steps else "at its end"
            raise PlanError(f"the network was called at timestep {t:g}, but {self.plan.title} is {there}" + (
                "" if steps else " and does not walk that one") + ": is another scheduler or pipeline at work? Call "
                "the pipeline as the plan wants it, or reset() to start anew.")

    def _tell_apart(self, sample: Tensor) -> None:
        """Name calls by their order where a pipeline makes several of a step, at the same latents, without names.

        So do some with guidance. Under a plan of one pass it does not matter which is which, but each has its cache.
        """
        if not self._done and self._names == (GIVEN,):
            self._asked = sample
        elif (asked := self._asked) is not None and self.led and asked.dtype == sample.dtype and asked.equal(sample):
            self._names = (f"call {len(self._done) + 1}",)

    def check_thread(self) -> None:
        """Refuse calls of a thread in another one's run."""
        if self.thread not in (None, threading.get_ident()):
            raise PlanError(f"{self.plan.title} is on this network, and two threads sample with it at once: give each "
                            "a pipeline of its own, or let them take turns.")
        self.thread = threading.get_ident()

    def _check_call(self, arguments: dict) -> None:
        """Refuse calls that the plan cannot serve."""
        if self.step >= self.plan.steps:
            raise PlanError(f"the plan has {self.plan.steps} steps and was called once more. Call reset() before the "
                            "next batch.")
        if again := self._done & set(self._names):
            raise PlanError(f"step {self.step} was called twice for the pass {sorted(again)[0]!r}: which pass is the "
                            "second call? Name it, or make all passes in one batch; call reset() before a new run.")
        if len(self._now.passes) > 1 and len(self._names) > 1 and any(
                isinstance(leaf, Tensor) for leaf in tree_leaves(arguments.get("cross_attention_kwargs"))):
            raise PlanError("cross_attention_kwargs hold tensors, and nobody can say which of their rows are of which "
                            "pass: take a plan of one pass, which holds for all.")
        inside = arguments.get("down_intrablock_additional_residuals") is not None or (
            arguments.get("down_block_additional_residuals") is not None
            and arguments.get("mid_block_additional_residual") is None)  # an adapter too, as it was written once
        if inside and not all((sheet == COMPUTE).all() for sheet in self.plan.sheets):
            raise PlanError("an adapter adds to what blocks give inside the levels, and plans that skip blocks do not "
                            "know it: run it without a plan.")
        if inside and self.counted != self.plan.steps:
            raise PlanError(f"the pipeline counts {self.counted} steps, and its adapter acts at some of them; the plan "
                            f"has {self.plan.steps}: call it with num_inference_steps={self.plan.steps}.")

    def _take(self, sample: Tensor) -> None:
        """See whose rows a batch holds; where what was cached does not fit them, all is computed anew from here."""
        known = {memory.shape for memory in self._cache.values()}
        batch, count = len(sample), len(self._names)
        shape = (batch // count, *sample.shape[1:])
        late = self.step > self._first and not set(self._names) <= set(self._cache)
        if (known and known != {shape}) or batch % count or late:
            switched_off = not self._told and count > 1 and known == {tuple(sample.shape)}  # guidance, from here on
            if batch % count and not switched_off:
                raise PlanError(f"a batch of {batch} cannot hold {count} passes ({', '.join(self._names)}): call the "
                                "pipeline with guidance, or take a plan of one pass.")
            if self._done:
                raise PlanError(f"at step {self.step} the pass {self._names[0]!r} does not fit the others: it comes "
                                f"anew, or with another shape ({shape} beside {sorted(known)}). Call reset() first.")
            self._refresh(self.step, alone=switched_off)
            if switched_off:
                self._names, shape = (GIVEN,), tuple(sample.shape)
        elif not known and not self._told and count > 1:
            if not self.led:
                raise PlanError(f"nobody says which rows of this batch are of which pass ({', '.join(self._names)}): "
                                "put the plan on the pipeline (lib.apply.Planned), name each pass (cache_context), or "
                                "take a plan of one pass.")
            if self._names != (NULL, GIVEN):
                raise PlanError(f"pipelines that make their passes in one batch hold the null pass first, then the "
                                f"given one; the plan has {', '.join(self._names)}.")
            if not all(part.equal(sample[:shape[0]]) for part in sample.chunk(count)):
                raise PlanError(f"the plan has passes {', '.join(self._names)}, but the parts of the batch begin with "
                                "different noise: call the pipeline with guidance, or take a plan of one pass.")
        for name in self._names:
            if name not in self._cache:
                self._cache[name] = _Pass(self._now.pass_of(name), shape)

    def _together(self, memories: list["_Pass"]) -> "_Group":
        life = self.life[memories[0].sheet]
        kept = np.any([self.life[memory.sheet].keep[self.step] > 0 for memory in memories], axis=0)
        return _Group(memories, life.live[self.step], life.read[self.step], life.live[self.step] & kept)

    def _outputs(self, memories: Sequence["_Pass"], fresh: dict[int, Tensor]) -> list[Tensor]:
        """Give each pass's output, and keep what later steps read; the given pass's first, for others may need it."""
        outputs: dict[int, Tensor] = {}
        several = len(self._now.passes) > 1
        for number in sorted(range(len(memories)), key=lambda number: self._names[number] != GIVEN):
            memory = memories[number]
            state = self._now.net[memory.sheet][self.step]
            apart = several and self._now.null_holds == "difference" and self._names[number] != GIVEN
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

    def _whole(self, forward: Callable, *args, **kwargs) -> Any:
        """Run the network's forward, and refuse one that left out blocks that the plan computes."""
        self._ran, live = set(), self._group.live.nonzero()[0]
        output = forward(*args, **kwargs)
        if left_out := [place for place in live if place not in self._ran]:
            raise PlanError(f"{self.plan.title} computes {self.plan.blocks[left_out[0]]} at step {self.step}, and the "
                            "network's forward left it out (another cache?): take that off first.")
        return output

    def runs(self, place: int) -> bool:
        """Say whether the cell of block `place` runs now."""
        if self._group is None:
            raise PlanError(f"{self.plan.title} is on this network, and one of its blocks was called by itself: "
                            "disable() the plan first.")
        return bool(self._group.live[place])

    def reads(self, place: int) -> bool:
        """Say whether anybody reads what a cell that does not run stands for."""
        return bool(self._group.read[place])

    def put(self, place: int, given: Callable[[], Tensor]) -> None:
        """Take what a block gave: to keep, if a later step reads it."""
        self._ran.add(place)
        known = place in self._shapes
        if known and not self._group.kept[place]:
            return
        value = given()
        if not known:
            self._shapes[place] = value.shape[1:], value.dtype, value.device
        if self._group.kept[place]:
            self.store(place, value)

    def store(self, place: int, value: Tensor) -> None:
        """Copy what a block gave into the current passes' memories."""
        for memory, part in zip(self._group.memories, value.chunk(len(self._group.memories)), strict=True):
            if keep := int(self.life[memory.sheet].keep[self.step, place]):
                memory.put(place, self.step, part, keep)

    def get(self, place: int) -> Tensor:
        """Give what a cell that does not run stands for: a held or forecast value, or a placeholder nobody reads.

        All placeholders are views of one scratch tensor: of the right shape, free of cost, and what code between the
        blocks writes into them harms nobody.
        """
        if self.reads(place):
            return self.value(place)
        shape, *kind = self._shapes[place]
        rows = sum(memory.shape[0] for memory in self._group.memories)
        return self.scratch(rows * shape.numel(), *kind).view(rows, *shape)

    def scratch(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give so many numbers that belong to nobody."""
        if (dtype, device) not in self._scratch or len(self._scratch[dtype, device]) < count:
            with torch.inference_mode(False):  # one that every kind of context may write
                self._scratch[dtype, device] = torch.zeros(count, dtype=dtype, device=device)
        return self._scratch[dtype, device][:count]

    def value(self, place: int) -> Tensor:
        """Make the value that a cell holds or forecasts for the current passes; it is the caller's own."""
        parts = [self._value(memory, place) for memory in self._group.memories]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _value(self, memory: "_Pass", place: int) -> Tensor:
        known = [(step, value) for step, value in memory.kept[place] if step != self.step]
        plan, step = self._now, self.step
        state = plan.net[memory.sheet][step] if place == NET else plan.states[memory.sheet][step][place]
        if state <= 1:
            return known[0][1].clone()
        known = known[:state]
        weights = solvers.forecast(self._abscissae[self.step], [self._abscissae[step] for step, _ in known])
        total = known[0][1] * weights[0]
        for weight, (_, value) in zip(weights[1:], known[1:]):
            total.add_(value, alpha=weight)
        return total


NET = -1
"""The place of the whole output in a memory."""


@dataclass
class _Pass:
    """What one pass computed last, the newest first, with the steps at which it did.

    Attributes
    ----------
    sheet : which of the plan's sheets of cells is the pass's
    shape : (B, C, H, W) of the network's input, a pass
    kept : for each block's place, and `NET`, its (step, value) pairs
    """

    sheet: int
    shape: tuple[int, ...]
    kept: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def put(self, place: int, step: int, value: Tensor, keep: int) -> None:
        """Copy a value in, to be one of `keep`, in the place of one of the same step (a call made again).

        Those of another shape (a text of another length) are forgotten.
        """
        older = [pair for pair in self.kept.get(place, ()) if pair[0] != step and pair[1].shape == value.shape]
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
