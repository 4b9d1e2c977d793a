"""Hooks on a network's blocks, by which an engine decides what runs: put on, watched, taken off.

diffusers' `ModelHook` stands at each layer, at each level that no live cell needs, and at the network's door. Others
put hooks there too (offloading, caches, compilers): with some one can live, the rest are refused by name.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

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


class Hooks:
    """An engine's hooks on its model.

    Parameters
    ----------
    engine : Engine

    Raises
    ------
    PlanError
        If a plan, or another cache, is on the model already.
    """

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self._hooked: dict[str, Callable] = {}  # each module's forward, with the hook in it
        self._compiled: dict[str, Any] = {}

    def put_on(self) -> None:
        """Put all hooks on; if that fails, none stays."""
        self._check_strangers()
        blocks = self.engine.blocks
        try:
            self._hook("", _ModelHook(self.engine))
            for level, members in blocks.levels.items():
                if len(members) > 1:
                    self._hook(blocks.level_modules[level], _LevelHook(self.engine, level, members))
            for place, block in enumerate(blocks):
                for path in block.modules:
                    kind = _ResidualHook if blocks.cache == "residual" else _LayerHook
                    self._hook(path, kind(self.engine, place, gives_output=path == block.modules[-1]))
        except BaseException:
            self.take_off()
            raise

    def take_off(self) -> None:
        """Take all hooks off."""
        for path in list(self._hooked):
            self._unhook(path)

    @property
    def on(self) -> bool:
        """Whether they are on."""
        return bool(self._hooked)

    def _hook(self, path: str, hook: ModelHook) -> None:
        """Put a hook on a module, which runs uncompiled for as long: what a compiler saw of it knows no plan."""
        module = self.engine.model.get_submodule(path)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
        self._hooked[path] = module.forward
        self._compiled.setdefault(path, module._compiled_call_impl)
        module._compiled_call_impl = None

    def _unhook(self, path: str) -> ModelHook:
        """Take a module's hook off; what was put around, or in place of, it in the meantime (offloading) stays."""
        module = self.engine.model.get_submodule(path)
        hook, hooked, now = module._diffusers_hook.get_hook(HOOK), self._hooked.pop(path), module.forward
        module._diffusers_hook.remove_hook(HOOK, recurse=False)
        if getattr(module, "_old_forward", None) is hooked:  # accelerate's, around ours
            module._old_forward = module.forward
        if now is not hooked:
            module.forward = now
        if _is_own(module):
            del module.forward
        module._compiled_call_impl = self._compiled[path]
        return hook

    def check(self) -> None:
        """Put hooks that something took off (offloading, between two calls of a pipeline) on again."""
        self._check_strangers()
        for path, forward in list(self._hooked.items()):
            module = self.engine.model.get_submodule(path)
            around = module._diffusers_hook._hook_order[-1] != HOOK or getattr(module, "_old_forward", None) is forward
            if module.forward is forward or around:
                continue
            if not hasattr(module, "_hf_hook") and not _is_own(module):
                raise PlanError(REPLACED.format(path or "the network"))
            self._hook(path, self._unhook(path))

    def _check_strangers(self) -> None:
        """Refuse a model that somebody else caches: two caches do not know of each other."""
        for path, module in self.engine.model.named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            for name, hook in (registry.hooks.items() if registry else ()):
                if name == HOOK and hook.engine is not self.engine:
                    raise PlanError(f"{hook.engine.plan.title} is on this network: leave its block, or disable() it, "
                                    "first.")
                if any(word in name for word in CACHES):
                    raise PlanError(f"the cache {name!r} is on {path or 'the network'}: disable_cache() first.")
            known = (registry and registry.hooks) or hasattr(module, "_hf_hook") or _is_own(module)
            if path in self._own_paths and "forward" in vars(module) and not known:
                raise PlanError(REPLACED.format(path or "the network"))

    @cached_property
    def _own_paths(self) -> set[str]:
        """The modules on which a plan lies."""
        blocks = self.engine.blocks
        return {"", *blocks.level_modules.values(), *(path for block in blocks for path in block.modules)}


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

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Tensor | tuple[Tensor]:
        if self.engine.on and not self.engine.runs(self.place):
            if not self.gives_output:  # the layer's last module gives the value
                return args[0] if args else kwargs["hidden_states"]
            output = self.engine.get(self.place)
            return (output,) if isinstance(module, Transformer2DModel) else output
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.gives_output and self.engine.on:
            self.engine.put(self.place, lambda: output[0] if isinstance(output, tuple) else output)
        return output


class _ResidualHook(_LayerHook):
    """Runs one block, or adds to its input the change that it stands for."""

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.engine.on and not self.engine.runs(self.place):
            return hidden_states + self.engine.get(self.place)
        output = self.fn_ref.original_forward(hidden_states, *args, **kwargs)
        if self.engine.on:
            self.engine.put(self.place, lambda: output - hidden_states)
        return output


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
