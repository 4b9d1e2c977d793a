"""Hooks on a network's blocks, by which an engine decides what runs: put on, watched, taken off.

diffusers' `ModelHook` stands at each layer, at each level that no live cell needs, and at the network's door. Others
put hooks there too (offloading, caches, compilers): with some one can live, the rest are refused by name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from diffusers import Transformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from lib.grid.plan import GIVEN, NULL, PlanError

if TYPE_CHECKING:
    from lib.grid.engine import Engine

HOOK = "lean_diffusion"
CACHES = ("cache", "fbc", "pyramid")
"""What the names of other caches' hooks hold."""
REPLACED = "something has replaced the forward of {} (another cache?): take it off first."
CONTEXTS = {"cond": GIVEN, "uncond": NULL}
"""What pipelines that call the network once a pass name them (diffusers' `cache_context`)."""


@dataclass
class _Place:
    """A module under a hook.

    Attributes
    ----------
    path, module, hook : where it is, what it is, what lies on it
    outer, inner : the module's forward, and the hook's part of it, as they were put on
    compiled : what an in-place compiler had made of the module
    """

    path: str
    module: nn.Module
    hook: "_Hook"
    outer: Callable
    inner: Callable
    compiled: Any


class Hooks:
    """An engine's hooks on its network.

    Parameters
    ----------
    engine : Engine

    Raises
    ------
    PlanError
        If a plan, or another cache, is on the network already.
    """

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self._places: list[_Place] = []

    def put_on(self) -> None:
        """Put all hooks on; if that fails, none stays."""
        blocks = self.engine.blocks
        hooks: list[tuple[str, _Hook]] = [("", _ModelHook(self.engine))]
        layers = {path for block in blocks for path in block.modules}
        for level, members in blocks.levels.items():
            if (path := blocks.level_modules[level]) not in layers:  # a transformer's block, and the middle, are both
                hooks.append((path, _LevelHook(self.engine, level, members)))
        for place, block in enumerate(blocks):
            if block.changes:
                hooks.append((block.modules[0], _ResidualHook(self.engine, place, block.changes)))
                continue
            for path in block.modules:
                hooks.append((path, _LayerHook(self.engine, place, gives_output=path == block.modules[-1])))
        self._check_strangers({path for path, _ in hooks})
        try:
            for path, hook in hooks:
                self._places.append(_put(path, self.engine.network.get_submodule(path), hook))
        except BaseException:
            self.take_off()
            raise

    def take_off(self) -> None:
        """Take all hooks off."""
        while self._places:
            _take(self._places.pop())

    @property
    def on(self) -> bool:
        """Whether they are on."""
        return bool(self._places)

    def mend(self) -> None:
        """Put our part back where diffusers, taking a hook from beneath ours, has taken ours as well."""
        for place in self._places:
            reference = place.hook.fn_ref
            if reference.forward is not place.inner:
                reference.original_forward, reference.forward = reference.forward, place.inner

    def check(self) -> None:
        """Put hooks that something took off (offloading, between two calls of a pipeline) on again.

        Raises
        ------
        PlanError
            If a module is another one than it was, or somebody else caches it.
        """
        self.mend()
        self._check_strangers({place.path for place in self._places})
        for number, place in enumerate(self._places):
            module, name = place.module, place.path or "the network"
            if self.engine.network.get_submodule(place.path) is not module:
                raise PlanError(f"{name} is another module than when {self.engine.plan.title} was put on: leave the "
                                "block, or disable() the plan, and put it on again.")
            around = module._diffusers_hook._hook_order[-1] != HOOK or (
                getattr(module, "_old_forward", None) is place.outer)
            if module.forward is place.outer or around:
                continue
            if not hasattr(module, "_hf_hook") and not _is_own(module):
                raise PlanError(REPLACED.format(name))
            _take(place)
            self._places[number] = _put(place.path, module, place.hook)

    def _check_strangers(self, own: set[str]) -> None:
        """Refuse a network that others cache, or load in groups: they know nothing of blocks that do not run."""
        for path, module in self.engine.network.named_modules():
            registry, name = getattr(module, "_diffusers_hook", None), path or "the network"
            for kind, hook in (registry.hooks.items() if registry else ()):
                if kind == HOOK and hook.engine is not self.engine:
                    raise PlanError(f"{hook.engine.plan.title} is on this network: leave its block, or disable() it, "
                                    "first.")
                if any(word in kind for word in CACHES):
                    raise PlanError(f"the cache {kind!r} is on {name}: disable_cache() first.")
                group = getattr(hook, "group", None)
                if "prefetch" in kind or "tracker" in kind or (group is not None and (
                        getattr(group, "stream", None) is not None or (path and path in own))):
                    raise PlanError(f"group offloading is on {name}, by groups of blocks or ahead of time, and a plan "
                                    "may skip the block that loads the next: offload leaf by leaf without a stream, or "
                                    "the whole network.")
            if len(self.engine.plan.passes) > 1 and is_foreign(vars(module).get("processor")):
                raise PlanError(f"{name} has an attention processor of its own, which may tell the passes of a batch "
                                "apart by their rows, and the plan runs them apart: take a plan of one pass.")
            known = (registry and registry.hooks) or hasattr(module, "_hf_hook") or _is_own(module)
            if path in own and "forward" in vars(module) and not known:
                raise PlanError(REPLACED.format(name))


def _put(path: str, module: nn.Module, hook: "_Hook") -> _Place:
    """Put a hook on a module, which runs uncompiled for as long: what a compiler saw of it knows no plan."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
    return _Place(path, module, hook, module.forward, hook.fn_ref.forward, compiled)


def _take(place: _Place) -> None:
    """Take a hook off; what was put around, or in place of, it in the meantime (offloading) stays.

    (diffusers' own removal would take a hook that lies above along.)
    """
    module, reference = place.module, place.hook.fn_ref
    registry = module._diffusers_hook
    number = registry._fn_refs.index(reference)
    below = reference.original_forward if reference.forward is place.inner else reference.forward
    if getattr(module, "_old_forward", None) is place.outer:  # accelerate's, around ours
        module._old_forward = below
    if number + 1 < len(registry._fn_refs):
        above = registry._fn_refs[number + 1]
        setattr(above, "forward" if above.original_forward is None else "original_forward", below)
    elif module.forward is place.outer:
        module.forward = below
    for known in (registry._fn_refs, registry._hook_order):
        known.pop(number)
    del registry.hooks[HOOK]
    if _is_own(module):
        del module.forward
    module._compiled_call_impl = place.compiled


def is_foreign(processor: Any) -> bool:
    """Say whether an attention processor is neither diffusers' nor missing."""
    return not type(processor).__module__.startswith(("diffusers.", "builtins"))


def _is_own(module: nn.Module) -> bool:
    """Say whether a module carries, as an attribute, the forward that its class has anyway."""
    return getattr(vars(module).get("forward"), "__func__", None) is type(module).forward


class _Names(StateManager):
    """Where diffusers' `cache_context` says which pass the next calls make."""

    def __init__(self, engine: "Engine"):
        super().__init__(BaseState)
        self.engine = engine

    def set_context(self, context: Any) -> None:
        self.engine.name(context and getattr(context, "name", context))


class _Hook(ModelHook):
    """One of an engine's hooks, on a module that cannot be copied meanwhile: the copy would run the original."""

    def __init__(self, engine: "Engine"):
        super().__init__()
        self.engine = engine

    def __deepcopy__(self, memo: dict) -> None:
        raise PlanError(f"{self.engine.plan.title} is on this network, which cannot be copied, or counted, meanwhile: "
                        "leave its block, or disable() it, first.")


class _ModelHook(_Hook):
    """Stands at the network's door, whoever calls it; hears the names of passes that a pipeline gives."""

    _is_stateful = True

    def __init__(self, engine: "Engine"):
        super().__init__(engine)
        self.names = _Names(engine)

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        if not self.engine.on:  # something still holds the hooked forward
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.engine.run(self.fn_ref.original_forward, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


class _LayerHook(_Hook):
    """Runs one module of a layer, or passes on what the layer stands for."""

    def __init__(self, engine: "Engine", place: int, gives_output: bool):
        super().__init__(engine)
        self.place, self.gives_output = place, gives_output
        self.compiled: tuple[Callable, Callable] | None = None

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor]:
        if self.engine.on and not self.engine.runs(self.place):
            if not self.gives_output:  # the layer's last module gives the value
                return args[0] if args else kwargs["hidden_states"]
            output = self.engine.get(self.place)
            return (output,) if isinstance(module, Transformer2DModel) else output
        output = self.original(*args, **kwargs)
        if self.gives_output and self.engine.on:
            self.engine.put(self.place, lambda: output[0] if isinstance(output, tuple) else output)
        return output

    def original(self, *args, **kwargs) -> Any:
        """Run the module's own forward: compiled, where the engine compiles; what it decides stays in Python."""
        plain = self.fn_ref.original_forward
        if self.engine.compiling is None:
            return plain(*args, **kwargs)
        if self.compiled is None or self.compiled[0] is not plain:  # offloading may have put another in its place
            self.compiled = plain, torch.compile(plain, **self.engine.compiling)
        return self.compiled[1](*args, **kwargs)


_GIVEN: WeakKeyDictionary[nn.Module, tuple[str | None, ...] | None] = WeakKeyDictionary()
"""What each block gave when it ran last (None: one tensor): a recording replays it without asking the hook."""


class _ResidualHook(_LayerHook):
    """Runs one block, or adds to its input the change that it stands for: of the image's tokens, and of the text's.

    Some blocks change several streams of tokens, and give all. Their changes are kept as one tensor, a row an image.
    """

    def __init__(self, engine: "Engine", place: int, changes: tuple[str, ...]):
        super().__init__(engine, place, gives_output=True)
        self.changes = changes

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        names = list(inspect.signature(type(getattr(module, "_orig_mod", module)).forward).parameters)[1:]
        self.module, self.numbers = module, {name: names.index(name) for name in self.changes}
        return module

    @property
    def given(self) -> tuple[str | None, ...] | None:
        """What each part of the block's output is called; None for a part that it leaves out, or for one tensor."""
        return _GIVEN[self.module]

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor | None, ...]:
        if self.engine.on and not self.engine.runs(self.place):
            inputs = self._inputs(args, kwargs)
            return self._changed(inputs, self.engine.get(self.place) if self.engine.reads(self.place) else None)
        output = self.original(*args, **kwargs)
        if self.engine.on:
            _GIVEN[module] = None if isinstance(output, Tensor) else tuple(
                None if part is None else name for name, part in zip(self.changes, output, strict=True))
            self.engine.put(self.place, lambda: self._change(self._inputs(args, kwargs), output))
        return output

    def _inputs(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """Give the streams that a block is given and changes."""
        return {name: kwargs[name] if name in kwargs else args[self.numbers[name]]
                for name in self.given or self.changes[:1] if name is not None}

    def _change(self, inputs: dict[str, Tensor], output: Any) -> Tensor:
        if self.given is None:
            return output - inputs[self.changes[0]]
        parts = dict(zip(self.given, output))
        return torch.cat([(parts[name] - stream).flatten(1) for name, stream in inputs.items()], dim=1)

    def _changed(self, inputs: dict[str, Tensor], change: Tensor | None) -> Any:
        """Add a change to the streams; none where nobody reads the result."""
        if change is None:
            made = {name: stream.clone() for name, stream in inputs.items()}
            return made[self.changes[0]] if self.given is None else tuple(made.get(name) for name in self.given)
        sizes = [stream[0].numel() for stream in inputs.values()]
        if sum(sizes) != change[0].numel():
            raise PlanError(f"at step {self.engine.step} the text, or the image, is of another length than before, and "
                            f"{self.engine.plan.title} reuses what was made of that: run such a call without a plan.")
        if self.given is None:
            return inputs[self.changes[0]] + change
        parts = change.split(sizes, dim=1)
        made = {name: stream + part.view_as(stream) for (name, stream), part in zip(inputs.items(), parts)}
        return tuple(made.get(name) for name in self.given)


class _LevelHook(_Hook):
    """Skips a level of which no cell runs, its concatenations with it."""

    def __init__(self, engine: "Engine", level: str, places: list[int]):
        super().__init__(engine)
        self.places = places
        self.gives_skips = level.startswith("down")

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        if not self.engine.on or any(self.engine.runs(place) for place in self.places):
            return self.fn_ref.original_forward(*args, **kwargs)
        outputs = tuple(self.engine.get(place) for place in self.places)
        return (outputs[-1], outputs) if self.gives_skips else outputs[-1]
