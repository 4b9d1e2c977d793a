"""What a network under a plan costs: multiply-accumulates (MACs) executed, parameters, measured time.

MACs are counted by torch's `FlopCounterMode` on the meta device (where a network does not run there, on its own).
Convolutions and matrix products count; norms, activations and additions do not. The products inside attention are kept
apart, because papers on UNets leave them out and papers on transformers do not.
"""

import copy
import inspect
import json
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lib.grid import blocks as _blocks
from lib.grid import graphs, sampling
from lib.grid.model import Model
from lib.grid.pipelines import Requests, network_of
from lib.grid.plan import Plan

ATTENTION = ("scaled_dot_product", "bmm")  # operators that only attention uses in these networks


@dataclass(frozen=True)
class Costs:
    """MACs of one image's pass through each block, and parameters.

    Attributes
    ----------
    blocks : dict of block name to MACs, attention products included
    attention : dict of block name to MACs, its attention products alone
    parameters : dict of block name to number of parameters
    outputs : dict of block name to numbers that it gives, and "net" to the whole output's: what is kept takes memory
    rest, rest_parameters : MACs and parameters of stem and head, which run at every network call
    passes : how often a plan of one pass runs at each step: 2 under guidance
    text, decoder : MACs of what reads an image's prompt, once for each pass, and of what decodes its latents; they cost
        the same under every plan, so `executed` leaves them out
    """

    blocks: dict[str, int]
    attention: dict[str, int]
    parameters: dict[str, int]
    outputs: dict[str, int]
    rest: int
    rest_parameters: int
    passes: int = 1
    text: int = 0
    decoder: int = 0

    @property
    def call(self) -> int:
        """MACs of one full network call."""
        return sum(self.blocks.values()) + self.rest

    @property
    def step(self) -> int:
        """MACs of one full step, all passes together."""
        return self.passes * self.call

    @property
    def call_without_attention(self) -> int:
        """The same without attention's products, as published for UNets."""
        return self.call - sum(self.attention.values())

    def per_step(self, plan: Plan) -> np.ndarray:
        """Give the MACs executed at each of the plan's steps, all passes together, (S,), int.

        Live cells cost what their blocks do, and each network call its stem and head; a forecast costs nothing.
        """
        macs = np.array([self.blocks[name] for name in plan.blocks], dtype=np.int64)
        return self._runs(plan) * sum(life.live @ macs + life.called * self.rest for life in plan.life)

    def _runs(self, plan: Plan) -> int:
        """Give how many passes each sheet of a plan stands for."""
        return self.passes if len(plan.passes) == 1 else 1

    def executed(self, plan: Plan) -> int:
        """Give the MACs that one image costs under a plan."""
        return int(self.per_step(plan).sum())

    def kept(self, plan: Plan, dtype: torch.dtype = torch.float32) -> int:
        """Give the bytes that a plan keeps between steps at most, for one image: known before it runs."""
        sizes = np.array([self.outputs[name] for name in plan.blocks], dtype=np.int64)
        held = sum(life.keep @ sizes + life.net_keep * self.outputs["net"] for life in plan.life)
        return self._runs(plan) * int(held.max()) * dtype.itemsize

    def save(self, path: Path) -> None:
        """Write the costs as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def count(network: nn.Module, conditions: sampling.Conditions | None = None, shape: Sequence[int] | None = None
          ) -> Costs:
    """Count MACs and parameters of a network's blocks for one image.

    Parameters
    ----------
    conditions : Conditions of one image; None for what such networks mostly read
    shape : of what the network is given, (C, H, W); None for its sample size
    """
    # Parameters, which want gradients: of tensors that do not, the counter misses what attention multiplies.
    weightless = {id(tensor): nn.Parameter(tensor.detach().to("meta")) for tensor in network.parameters()}
    described, shape = _blocks.describe(network), shape or _blocks.input_shape(network)
    known = conditions is not None and conditions.given
    given = conditions.given if known else _blocks.example_conditions(network, 1, network.device)
    try:
        twin = copy.deepcopy(network, weightless).to("meta").float()
        on_meta = tree_map_only(torch.Tensor, lambda rows: rows.to("meta"), given)
        counter, outputs = _counted(twin, described, torch.empty(1, *shape, device="meta"), on_meta)
    except NotImplementedError:  # it reads the numbers of a mask, and on the meta device there are none
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            x_t = torch.zeros(1, *shape, dtype=network.dtype, device=network.device)
            counter, outputs = _counted(network, described, x_t, given)
    root = type(network).__name__
    flops = {path.removeprefix(f"{root}."): {str(operator): n for operator, n in operators.items()}
             for path, operators in counter.get_flop_counts().items()}
    macs, attention, parameters = {}, {}, {}
    for block in described:
        operators = [item for path in block.modules for item in flops.get(path, {}).items()]
        macs[block.name] = sum(n for _, n in operators) // 2
        attention[block.name] = sum(n for name, n in operators if any(word in name for word in ATTENTION)) // 2
        parameters[block.name] = sum(p.numel() for path in block.modules
                                     for p in network.get_submodule(path).parameters())
    total = sum(p.numel() for p in network.parameters())
    return Costs(macs, attention, parameters, outputs, counter.get_total_flops() // 2 - sum(macs.values()),
                 total - sum(parameters.values()), passes=2 if conditions and conditions.null else 1)


def _counted(network: nn.Module, described: _blocks.Blocks, x_t: torch.Tensor, given: Mapping
             ) -> tuple[FlopCounterMode, dict[str, int]]:
    """Call a network once, counting, and give how many numbers each block outputs."""
    outputs: dict[str, int] = {}

    def measure(name: str) -> Callable:
        return lambda module, inputs, output: outputs.__setitem__(name, sum(
            part.numel() for part in tree_leaves(output) if isinstance(part, torch.Tensor)))

    hooks = [network.get_submodule(block.modules[-1]).register_forward_hook(measure(block.name)) for block in described]
    try:
        with FlopCounterMode(display=False, depth=None) as counter:
            predicted = network(x_t, timestep=torch.zeros(1, device=x_t.device, dtype=torch.long), **given)
    finally:
        for hook in hooks:
            hook.remove()
    return counter, outputs | {"net": predicted[0].numel()}


@torch.no_grad()
def count_model(model: Model) -> Costs:
    """Count a model's network under the model's own conditions and guidance, its text encoder and its decoder."""
    noise = torch.zeros(1, *model.shape, device=model.device)
    costs = count(model.network, model.asked(noise))
    with FlopCounterMode(display=False, depth=None) as text:
        if model.text is not None and model.prompts:
            model.text.read(model.text.tokens(model.said(noise)))
    with FlopCounterMode(display=False, depth=None) as decoder:
        model.decode(noise)
    return replace(costs, text=costs.passes * text.get_total_flops() // 2, decoder=decoder.get_total_flops() // 2)


def count_requests(requests: Requests, plan: Plan) -> Costs:
    """Count the network of a stock pipeline as the pipeline calls it: with its conditions, at its size.

    Parameters
    ----------
    plan : Plan, full, of which the first and the last step are made
    """
    _, network = network_of(requests.pipe)
    ends = tuple(dict.fromkeys((plan.timesteps[0], plan.timesteps[-1])))  # one, of a run of one step
    calls, few = [], plan.at(ends, solver="dpmsolver++", order=1, table=None)
    handle = network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    try:
        requests.images(few, "analysis", range(requests.batch))
    finally:
        handle.remove()
    args, kwargs = calls[0]
    arguments = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    sample, *_ = arguments.values()

    def one(value: torch.Tensor) -> torch.Tensor:
        return value[:1] if value.ndim and len(value) == len(sample) else value

    given = {name: tree_map_only(torch.Tensor, one, value) for name, value in list(arguments.items())[1:]
             if name not in ("timestep", "return_dict")}
    passes = len(sample) * len(calls) // few.steps // requests.batch
    return replace(count(network, sampling.Conditions(given), sample.shape[1:]), passes=passes)


def interleave(runs: dict[str, Callable[[], object]], repeats: int, warmup: int = 2, title: str = "timing"
               ) -> dict[str, list[float]]:
    """Time several functions in turn, A B C A B C ..., so that a machine's drift meets all alike.

    Returns
    -------
    seconds : dict of name to list of float, (repeats,)
    """
    def timed(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    for run in list(runs.values()) * warmup:
        timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc=title, unit="round"):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def median_ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Give the ratio of the medians of paired times a / b with its 95 % bootstrap interval: (ratio, low, high)."""
    pairs = np.stack([a, b])
    draws = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    ratios = np.median(pairs[0][draws], axis=1) / np.median(pairs[1][draws], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def speed_ups(runs: Mapping[str, Callable[[], object]], macs: Mapping[str, float], images: int, repeats: int
              ) -> pd.DataFrame:
    """Time sampling runs in turn, beside what their MACs promise, and see what memory they take.

    Parameters
    ----------
    runs : dict of name to what samples one batch; the first is what the others are compared with
    macs : dict of name to executed MACs
    images : int, of the batch
    repeats : int, rounds

    Returns
    -------
    table : columns name, times fewer MACs, times faster, low, high (95 %), measured / MACs, ms an image (median),
        peak MB (`peak_memory`, of the whole batch)
    """
    measured, first, rows = interleave(dict(runs), repeats), next(iter(runs)), []
    for name, run in runs.items():
        ratio, low, high = median_ratio(measured[first], measured[name])
        fewer = macs[first] / macs[name]
        rows.append({"name": name, "times fewer MACs": fewer, "times faster": ratio, "low": low, "high": high,
                     "measured / MACs": ratio / fewer, "ms an image": 1e3 * float(np.median(measured[name])) / images,
                     "peak MB": peak_memory(run) / 1e6})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Latency:
    """Measured seconds of one step (network call and solver) for each pattern of live cells in a column.

    Attributes
    ----------
    seconds : dict of pattern to float; a pattern is a string of 1 (runs) and 0, a character a block, then the network
    batch : int, images a step
    precision : str
    """

    seconds: dict[str, float]
    batch: int
    precision: str

    def of(self, plan: Plan) -> float:
        """Give the seconds that a batch takes under a plan."""
        return sum(self.steps(plan))

    def steps(self, plan: Plan) -> list[float]:
        """Give the seconds of each of a plan's steps, (S,).

        Raises
        ------
        KeyError
            If a column's pattern was not measured.
        """
        columns = patterns(plan)
        strange = set(columns) - set(self.seconds)
        if strange:
            raise KeyError(f"the latency table has no column {sorted(strange)[0]}: measure a plan that holds it")
        return [self.seconds[pattern] for pattern in columns]

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def measure(model: Model, plans: Iterable[Plan], noise: torch.Tensor, *, precision: str, repeats: int) -> Latency:
    """Measure the median time of each column pattern while walking some plans in turn.

    Parameters
    ----------
    plans : Plan
        A few steps of each kind are enough, such as DeepCache over ten steps at each branch.
    noise : Tensor, (B, C, H, W)
    repeats : int, walks of each plan, after one that does not count
    """
    engines = [graphs.engine(model.network, plan, model.noise_schedule) for plan in plans]
    seconds: dict[str, list[float]] = {pattern: [] for engine in engines for pattern in patterns(engine.plan)}
    conditions = model.asked(noise)
    with torch.inference_mode(), sampling.autocast(noise.device, precision):
        for turn in tqdm(range(repeats + 1), desc="latency of columns", unit="round"):
            for engine in engines:
                with engine:
                    start = now()
                    steps = sampling.walk(engine, noise, conditions)
                    for pattern, _ in zip(patterns(engine.plan), steps, strict=True):
                        if turn:
                            seconds[pattern].append(now() - start)
                        start = now()
    return Latency({pattern: float(np.median(times)) for pattern, times in seconds.items()}, len(noise), precision)


def patterns(plan: Plan) -> list[str]:
    """Give for each step, as a string of 1 and 0, which cells run and whether the network is called, of all passes."""
    live = np.concatenate([part for life in plan.life for part in (life.live, life.called[:, None])], axis=1)
    return ["".join("01"[int(runs)] for runs in row) for row in live]


def block_seconds(network: nn.Module, x_t: torch.Tensor, repeats: int,
                  conditions: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
    """Measure the median time of each block in a plain network call.

    Parameters
    ----------
    x_t : Tensor, (B, C, H, W)
    conditions : what else the network reads; nothing (zeros), if it is not given

    Returns
    -------
    seconds : dict of block name to float, and of "stem and head"
    """
    described = _blocks.describe(network)
    conditions = conditions or _blocks.example_conditions(network, len(x_t), x_t.device)
    owner = {path: block.name for block in described for path in block.modules}
    spent: dict[str, float] = {}
    starts: dict[str, float] = {}

    def before(path):
        return lambda *_: starts.__setitem__(path, now())

    def after(path):
        def add(*_):
            spent[owner[path]] = spent.get(owner[path], 0.0) + now() - starts[path]
        return add

    handles = []
    for path in owner:
        module = network.get_submodule(path)
        handles += [module.register_forward_pre_hook(before(path)), module.register_forward_hook(after(path))]
    rounds = []
    try:
        with torch.inference_mode():
            for _ in range(repeats + 1):
                spent.clear()
                start = now()
                network(x_t, timestep=torch.full((len(x_t),), 500, device=x_t.device), **conditions)
                rounds.append(dict(spent) | {"stem and head": now() - start - sum(spent.values())})
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(np.median([r[name] for r in rounds[1:]])) for name in rounds[0]}


def peak_memory(run: Callable[[], object]) -> int:
    """Give the bytes that the tensors made by `run` hold at most at one time; what was there before is not counted.

    Every operator's outputs are watched until their storage is freed, so the count is exact and repeats; what a kernel
    uses inside itself is not seen.
    """
    with _Watch() as watch, graphs.unrecorded():
        run()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Sees what operators give, forward and backward, and when its memory goes."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and id(storage) not in self._seen:
                    self._take(storage)
        return outputs

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_: weakref.ref) -> None:
            self.held -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, free)
        self.held += size
        self.peak = max(self.peak, self.held)


def now() -> float:
    """Give the time once all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
