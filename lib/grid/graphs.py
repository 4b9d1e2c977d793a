"""The engine on CUDA: steps of the same kind become one recorded graph, which one launch replays.

A small network's step is many short kernels, and what they wait for is Python. A step's kind is which cells run, which
are read from before, which outputs are kept for later, and the inputs' shapes; a plan has few kinds. What is held or
forecast is made outside and copied into buffers of fixed places that a recorded step reads, as its inputs are. So a
recording is a pure function, and belongs to the network: plans share it, for as long as the network is what it was.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lib.grid.engine import Engine
from lib.grid.hooks import HOOK, is_foreign
from lib.grid.plan import NoiseSchedule, Plan

LIMIT = 500
"""So many recordings are kept of a network; then they are made anew. (A search may try thousands of kinds of steps.)"""
_recording = True


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, every step runs as it is, so that what it does can be watched."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


def engine(network: nn.Module, plan: Plan, schedule: NoiseSchedule, led: bool = False,
           compiling: dict[str, Any] | None = None) -> Engine:
    """Give the engine that suits where the network lies: with recorded graphs on CUDA, the plain one elsewhere."""
    kind = GraphedEngine if next(network.parameters()).is_cuda else Engine
    return kind(network, plan, schedule, led, compiling)


def cuda_graph(run: Callable[[], Any], pool: Any, device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record what `run` launches on a device: give what replays it, and its output, which each replay writes anew."""
    if device.type != "cuda":
        raise RuntimeError(f"the network was moved to {device}")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            output = run()
    finally:
        torch.cuda.set_stream(stream)  # a failed recording leaves its own behind
    return graph.replay, output


class GraphedEngine(Engine):
    """An `Engine` that records each kind of step when it comes again, and replays it from then on.

    (Searches try many plans: what comes once is not worth a recording.) Where gradients are asked for, and once a step
    could not be recorded (which a warning says), all run as they are. Predictions are the plain engine's, to rounding.
    """

    def __enter__(self) -> Self:
        self._tape: _Recording | None = None  # the recording that is being made
        super().__enter__()
        self._look()
        return self

    def reset(self) -> None:
        """Go back to the first step and forget all that was cached; and all recordings, if the network has changed."""
        super().reset()
        if self.on and (self.led or self._glance != _glance(self.network)):
            self._look()

    def _look(self) -> None:
        """Take the shelf that belongs to the network as it is now."""
        self._shelf, self._glance = _shelf(self.network), _glance(self.network)
        self._alive = _has_life_of_its_own(self.network)

    def call(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Run the network at the current step, recorded if this kind of step has come before."""
        global _recording
        if not self._told and self._glance != _glance(self.network):  # a callback has changed the network
            self._look()
        if torch.is_grad_enabled() or not _recording or self._alive:
            return forward(*args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        leaves = [leaf.to(self._weight.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, tree)
        kind = self._kind(leaves, str(tree))
        shelf = self._shelf
        if kind not in shelf.seen:
            output = forward(*args, **kwargs)
            if all(map(_is_plain, (*leaves, *tree_flatten(output)[0]))):  # else a replay may not make all of it
                shelf.seen.add(kind)
            return output
        if kind not in shelf.recordings and len(shelf.recordings) >= LIMIT:
            shelf = self._shelf = _new_shelf(self.network, shelf.portrait, shelf.seen)
        values = {int(place): self.value(int(place)) for place in self._group.read.nonzero()[0]}
        try:
            recording = shelf.recordings[kind] = shelf.recordings.get(kind) or self._record(forward, leaves, tree,
                                                                                            values)
        except RuntimeError as error:  # what a device does after a failed recording is not sure: no second try
            warnings.warn(f"a step could not be recorded as a CUDA graph; all run without from here: {error}",
                          stacklevel=2)
            _recording = False
            return forward(*args, **kwargs)
        _fill(recording.inputs, leaves)
        for place, value in values.items():
            recording.reads[place].copy_(value)
        recording.replay()
        self._shapes = recording.shapes | self._shapes
        for place, written in recording.writes.items():
            self.store(place, written)
        return tree_map_only(Tensor, Tensor.clone, recording.output)

    def store(self, place: int, value: Tensor) -> None:
        """Copy what a block gave: while recording, into a buffer from which each replay's is taken."""
        if self._tape is None:
            super().store(place, value)
        else:
            self._tape.writes[place] = self._buffer(("output", place), value)
            self._tape.writes[place].copy_(value)

    def get(self, place: int) -> Tensor:
        """Give what a cell that does not run stands for: while recording, the buffer that holds it."""
        if self._tape is None:
            return super().get(place)
        if place in self._tape.reads:
            return self._tape.reads[place]
        return super().get(place)

    def scratch(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give so many numbers that belong to nobody, where recordings find them again."""
        return self._buffer(("scratch",), torch.empty(count, dtype=dtype, device=device))

    def _kind(self, leaves: list, tree: str) -> tuple:
        """Give all that a recording hangs on, save the weights."""
        inputs = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        cells = tuple(part.tobytes() for part in (self._group.live, self._group.read, self._group.kept))
        kind = self._weight.device.type
        lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cells, tree, inputs, lowered

    def _buffer(self, name: tuple, like: Tensor) -> Tensor:
        """Give the buffer of a name and shape; it stays where it is for as long as the network lives."""
        key = (name, like.shape, like.dtype)
        if key not in self._shelf.buffers:
            with torch.inference_mode(False):  # one that every kind of context may write
                self._shelf.buffers[key] = torch.empty_like(like, memory_format=torch.preserve_format)
        return self._shelf.buffers[key]

    def _record(self, forward: Callable, leaves: list, tree: Any, values: dict[int, Tensor]) -> "_Recording":
        inputs = [self._buffer(("input", i), leaf) if isinstance(leaf, Tensor) else leaf
                  for i, leaf in enumerate(leaves)]
        reads = {place: self._buffer(("value", place), value) for place, value in values.items()}
        _fill([*inputs, *reads.values()], [*leaves, *values.values()])
        args, kwargs = tree_unflatten(inputs, tree)
        self._tape = recording = _Recording(inputs, reads)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a recording must not read lowered weights that are freed after it
        try:
            recording.replay, recording.output = cuda_graph(lambda: forward(*args, **kwargs), self._shelf.pool,
                                                            self._weight.device)
            recording.shapes = dict(self._shapes)
            return recording
        finally:
            torch.set_autocast_cache_enabled(cached)
            self._tape = None


def _is_plain(leaf: Any) -> bool:
    """Say whether a value is a tensor, or cannot be changed."""
    return leaf is None or isinstance(leaf, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _fill(inputs: list, leaves: list) -> None:
    for buffer, leaf in zip(inputs, leaves, strict=True):
        if isinstance(buffer, Tensor):
            buffer.copy_(leaf)


@dataclass
class _Recording:
    """A step that can be replayed: from where it reads, and where it writes."""

    inputs: list
    reads: dict[int, Tensor]
    shapes: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=dict)
    writes: dict[int, Tensor] = field(default_factory=dict)
    replay: Callable[[], None] | None = None
    output: Any = None


@dataclass
class _Shelf:
    """What was recorded of one network, for as long as it is what it was (`_portrait`)."""

    portrait: tuple
    pool: Any
    seen: set[tuple] = field(default_factory=set)
    recordings: dict[tuple, _Recording] = field(default_factory=dict)
    buffers: dict[tuple, Tensor] = field(default_factory=dict)


_shelves: WeakKeyDictionary[nn.Module, _Shelf] = WeakKeyDictionary()


def _shelf(network: nn.Module) -> _Shelf:
    """Give a network's recordings; none, once it is another network than it was."""
    portrait = _portrait(network)
    if network not in _shelves or _shelves[network].portrait != portrait:
        return _new_shelf(network, portrait, set())
    return _shelves[network]


def _new_shelf(network: nn.Module, portrait: tuple, seen: set[tuple]) -> _Shelf:
    """Put an empty shelf, with a pool of its own, in place of a network's."""
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    _shelves[network] = _Shelf(portrait, pool, seen)
    return _shelves[network]


OURS = {"forward", "_diffusers_hook", "_compiled_call_impl"}
"""What an engine itself sets on modules."""


def _portrait(network: nn.Module) -> tuple:
    """Give all of a network that a recording has taken in beside its inputs, and that may have changed since.

    That is where its weights lie (their values are read anew at every replay), which modules it has, and what each of
    them holds as a Python value: FreeU's factors, scales of adapters, attention processors, hooks, the training mode.
    """
    modules = []
    for path, module in network.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in OURS}
        others = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        modules.append((path, type(module), _values(own), _values({k: v for k, v in others.items() if k != HOOK})))
    return modules, torch.get_float32_matmul_precision()


def _values(value: Any, depth: int = 4) -> Any:
    """Give something hashable that differs where the value, or what it holds, does."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.dtype
    if isinstance(value, nn.Module) or not depth:
        return id(value)
    if isinstance(value, Mapping):
        return tuple((_values(name, 0), _values(item, depth - 1)) for name, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_values(item, depth - 1) for item in value)
    return type(value), id(value), _values(getattr(value, "__dict__", None), depth - 1)


def _glance(network: nn.Module) -> list:
    """Give what tells quickly that something was assigned to a module, moved, or changed in an attention processor."""
    seen: list = [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
    for module in network.modules():
        own = vars(module)
        seen.append([_look_at(name, value) for name, value in own.items()])
        if "processor" in own:
            seen.append(_values(own["processor"]))
    return seen


def _look_at(name: str, value: Any) -> Any:
    """Give an attribute's value, or whose it is; of a list, or of a dict that is not torch's own, each item's."""
    if isinstance(value, list):
        return [_look_at("", item) for item in value]
    if isinstance(value, dict) and not name.startswith("_"):
        return [(key, _look_at("_", item)) for key, item in value.items()]
    return value if value is None or isinstance(value, bool | int | float | str) else id(value)


def _has_life_of_its_own(network: nn.Module) -> bool:
    """Say whether Python code that a replay would not run (others' hooks and processors) is within a network."""
    return any((module is not network and (module._forward_hooks or module._forward_pre_hooks))
               or is_foreign(vars(module).get("processor")) for module in network.modules())
