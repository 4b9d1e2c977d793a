"""DiP-GO (arXiv 2410.16942): a small pruner learns, through the whole sampling run, which cells may reuse.

The `SuperNet` runs every block at every step and mixes each output with what the block gave before, by a gate. A
`Pruner` gives the gates; the images' difference from the teacher's and the price of the gates that are on are minimised
by gradient (`learn`). Its scores then become plans of any cost (`prune`).
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from optuna.distributions import BaseDistribution, FloatDistribution
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lib.grid import blocks as _blocks
from lib.grid import sampling
from lib.grid.blocks import Blocks
from lib.grid.cost import Costs
from lib.grid.plan import NoiseSchedule, Plan
from lib.grid.sampling import Conditions
from lib.teachers.training import learning_rate

State = tuple[Tensor, ...]


class SuperNet:
    """A frozen model all of whose cells compute, and are mixed with what they gave before, by gates.

    A cell gives g * now + (1 - g) * before (section 3.2 of the paper), and that mixture is what it will have given
    before at the next step; where blocks cache residual changes, these are mixed. The first step has no gates.

    Parameters
    ----------
    model : Module of a family that `lib.grid.blocks.describe` knows
    plan : Plan, full: the teacher's T steps and solver
    schedule : the model's noise schedule
    precision : "fp32" or "bf16", of the network
    """

    def __init__(self, model: nn.Module, plan: Plan, schedule: SchedulerMixin, precision: str = "fp32"):
        self.model, self.plan, self.precision = model, plan, precision
        self.blocks = _blocks.describe(model)
        plan.check_fits(self.blocks.names, NoiseSchedule.of(schedule))
        self._solver = sampling.solver(plan, schedule)

    def _step(self, step: int, gates: Tensor, conditions: Conditions | None, x_t: Tensor, x_0: Tensor,
              *before: Tensor) -> State:
        """Make one step. It reads and leaves nothing but its arguments, so that a checkpoint may make it again."""
        after: list[Tensor] = []
        residual = self.blocks.cache == "residual"

        def mix(module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor]) -> Tensor | tuple[Tensor]:
            place = len(after)  # blocks run in the order in which they are described
            now = output[0] if isinstance(output, tuple) else output
            now = now - inputs[0] if residual else now
            after.append(torch.lerp(before[place], now, gates[step, place].to(now.dtype)) if before else now)
            mixed = after[place] + inputs[0] if residual else after[place]
            return (mixed,) if isinstance(output, tuple) else mixed

        def predict(x_t: Tensor, t: Tensor, **given: Tensor) -> Tensor:
            return self.model(x_t, t.expand(len(x_t)), **given).sample[:, :x_t.shape[1]]

        handles = [self.model.get_submodule(block.modules[-1]).register_forward_hook(mix) for block in self.blocks]
        try:
            with sampling.autocast(x_t.device, self.precision):
                t = self._solver.timesteps[step].to(x_t.device)
                prediction = conditions.predict(predict, x_t, t) if conditions else predict(x_t, t)
        finally:  # a checkpoint leaves early, by an exception
            for handle in handles:
                handle.remove()
        self._solver._step_index = step
        now = self._solver.convert_model_output(prediction.to(x_t.dtype), sample=x_t)
        last = step == self.plan.steps - 1 and (self.plan.final_sigma == "zero" or self.plan.steps < 15)
        if self.plan.order == 1 or step == 0 or last:
            following = self._solver.dpm_solver_first_order_update(now, sample=x_t)
        else:
            following = self._solver.multistep_dpm_solver_second_order_update([x_0, now], sample=x_t)
        return following, now, *after

    def _walk(self, first: int, last: int, gates: Tensor, conditions: Conditions | None, *state: Tensor) -> State:
        for step in range(first, last):
            state = checkpoint(self._step, step, gates, conditions, *state, use_reentrant=False,
                               preserve_rng_state=False)
        return state

    def images(self, noise: Tensor, gates: Tensor, nested: bool = True, conditions: Conditions | None = None
               ) -> Tensor:
        """Sample under soft gates; differentiable in the gates.

        Parameters
        ----------
        noise : Tensor, (n, C, H, W)
        gates : Tensor, (T, N), in [0, 1]; row 0 is not read
        nested : bool
            Keep the N outputs of some sqrt(2 T) steps only, and make the steps between again where the gradient needs
            them: a checkpoint at each step alone would keep all T x N. The stretches between get shorter as the kept
            steps fill the memory, so that no stretch needs more than another.
        conditions : Conditions of the images, guided in one pass, where the network reads any

        Returns
        -------
        images : Tensor, (n, C, H, W)
        """
        device = next(self.model.parameters()).device
        noise, gates = noise.to(device), gates.to(device)
        conditions = conditions or Conditions.drawn(self.model, noise)
        state = self._step(0, gates, conditions, noise, noise)
        first, stretch = 1, math.ceil(math.sqrt(2 * self.plan.steps + 0.25) - 0.5) if nested else self.plan.steps
        while first < self.plan.steps:
            last = min(first + stretch, self.plan.steps)
            if nested:
                state = checkpoint(self._walk, first, last, gates, conditions, *state, use_reentrant=False,
                                   preserve_rng_state=False)
            else:
                state = self._walk(first, last, gates, conditions, *state)
            first, stretch = last, max(1, stretch - 1)
        return state[0]


def grouping(blocks: Blocks, kind: str) -> np.ndarray:
    """Say which gate of a column each block follows, (N,), int.

    Parameters
    ----------
    kind : "layers" (a gate a block), "levels" (a gate a level, as in the paper) or "columns" (one gate: fewer steps)
    """
    levels = list(blocks.levels)
    return {"layers": np.arange(len(blocks)), "levels": np.array([levels.index(block.level) for block in blocks]),
            "columns": np.zeros(len(blocks), dtype=int)}[kind]


def evenly(steps: int) -> np.ndarray:
    """Give scores of steps, (T, 1), in (0, 1], above any threshold of which the steps lie about evenly: 1 is the first.

    Each next step is the (last) one farthest from all that are kept already, and from the end.
    """
    scores, kept, left = np.ones(steps), [0, steps], list(range(1, steps))
    for place in range(len(left)):
        farthest = max(left, key=lambda step: (min(abs(step - other) for other in kept), step))
        scores[farthest] = 1 - (place + 1) / steps
        kept.append(farthest)
        left.remove(farthest)
    return scores[:, None]


class Pruner(nn.Module):
    """Gives each gate the logits of reusing and of computing; they begin at (0, 1), which computes.

    Parameters
    ----------
    kind : "table" (a pair of logits a cell), "queries" (a learnt query a cell and a head of its own), or "encoder"
        (queries with step and block embeddings that attend to each other within a step before the heads)
    steps, groups : int, T and the gates of a column
    width : int, of the queries
    seed : int, of queries and heads
    start : (T, 1) or (T, groups), in [0, 1]
        The order to begin in, such as `evenly`'s: computing begins between 1 and 2.
    """

    def __init__(self, kind: str, steps: int, groups: int, width: int = 64, seed: int = 0,
                 start: np.ndarray | None = None):
        super().__init__()
        self.kind, self.shape = kind, (steps, groups)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        bias = torch.tensor([0.0, 1.0]).repeat(steps, groups, 1)
        if start is not None:
            bias[..., 1] += torch.from_numpy(start)
        self.bias = nn.Parameter(bias)
        if kind == "table":
            return
        self.queries = normal(steps, groups, width, scale=1.0)
        self.hidden = normal(steps, groups, width, width, scale=width**-0.5)
        self.output = nn.Parameter(torch.zeros(steps, groups, width, 2))
        if kind == "encoder":
            self.of_step, self.of_block = normal(steps, 1, width, scale=1.0), normal(1, groups, width, scale=1.0)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)

    def forward(self) -> Tensor:
        """Give the logits, (T, groups, 2), float32: reuse, compute."""
        if self.kind == "table":
            return self.bias
        queries = self.queries
        if self.kind == "encoder":
            queries = self.encoder(queries + self.of_step + self.of_block)
        hidden = torch.relu(torch.einsum("tbi,tbij->tbj", queries, self.hidden))
        return self.bias + torch.einsum("tbj,tbjk->tbk", hidden, self.output)

    def scores(self) -> np.ndarray:
        """Give the probabilities to compute, (T, groups)."""
        with torch.no_grad():
            return self().softmax(dim=-1)[..., 1].numpy()


def _likely(scores: np.ndarray) -> np.ndarray:
    return scores > 0.5


def straight_through(logits: Tensor, on: Callable[[np.ndarray], np.ndarray] = _likely) -> Tensor:
    """Give hard gates, (T, groups), whose gradient is that of the probability to compute (section 3.3).

    Parameters
    ----------
    logits : Tensor, (T, groups, 2)
    on : callable(probabilities) -> bool, both (T, groups): which gates are on
    """
    soft = logits.softmax(dim=-1)[..., 1]
    return torch.from_numpy(on(soft.detach().numpy())).float() + (soft - soft.detach())


@dataclass(frozen=True, eq=False)
class Prices:
    """What gates cost.

    Attributes
    ----------
    blocks : Blocks
    costs : Costs of the model
    groups : (N,), int, from `grouping`
    """

    blocks: Blocks
    costs: Costs
    groups: np.ndarray

    @cached_property
    def _macs(self) -> np.ndarray:
        return np.array([self.costs.blocks[name] for name in self.blocks.names])

    def cells(self, gates: np.ndarray) -> np.ndarray:
        """Give the cells of gates: (T, groups) to (T, N), bool; the first step computes all."""
        cells = np.asarray(gates, dtype=bool)[:, self.groups]
        cells[0] = True
        return cells

    def kept(self, gates: np.ndarray) -> float:
        """Give the executed MACs over the full plan's."""
        live, _ = self.blocks.liveness(self.cells(gates))
        executed = live @ self._macs + self.blocks.calls(live) * self.costs.rest
        return float(executed.sum() / self.costs.call / len(gates))

    @property
    def gates(self) -> int:
        """The number of gates a column."""
        return int(self.groups.max()) + 1

    @property
    def total(self) -> float:
        """The sum of a full column's static weights."""
        return float(self.weights("static", np.ones((1, self.gates), bool)).sum())

    @lru_cache(maxsize=4096)  # noqa: B019 (prices live as long as a training)
    def _column(self, row: bytes) -> np.ndarray:
        """Give for one column what each gate saves if it is off, or costs if it is on, as a share of a full call."""
        gates = np.frombuffer(row, dtype=bool)

        def macs(gates: np.ndarray) -> float:
            live, _ = self.blocks.liveness(np.stack([np.ones(len(self.groups), bool), gates[self.groups]]))
            return (live[1] @ self._macs + self.blocks.calls(live)[1] * self.costs.rest) / self.costs.call

        saved = np.zeros(len(gates))
        for group in range(len(gates)):
            on, off = gates.copy(), gates.copy()
            on[group], off[group] = True, False
            saved[group] = macs(on) - macs(off)
        return saved

    def weights(self, kind: str, gates: np.ndarray) -> np.ndarray:
        """Give gamma, (T, groups): each gate's weight, the share of a call's MACs that it frees, cascade included.

        Parameters
        ----------
        kind : "static" (from the full column, as in the paper), "marginal" (given the other gates of the column as they
            are now; what a later column reads from the cache is not seen), or "none" (all alike: the paper's ablation)
        gates : (T, groups), bool
        """
        if kind == "none":
            return np.ones(gates.shape)
        rows = np.ones_like(gates) if kind == "static" else gates
        return np.stack([self._column(np.ascontiguousarray(row, dtype=bool).tobytes()) for row in rows])


def consistency(images: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Give the difference of images from the teacher's, both (n, C, H, W) in about [-1, 1], compared in [0, 1].

    Parameters
    ----------
    kind : "ssim" (1 - SSIM, window of 7 pixels), "l1", "l2", or "ssim+l1"
    """
    a, b = (images + 1) / 2, (teacher + 1) / 2
    if kind == "l1":
        return (a - b).abs().mean()
    if kind == "l2":
        return (a - b).square().mean()
    mean = partial(F.avg_pool2d, kernel_size=7, stride=1)  # SSIM with a flat window, without padding (Wang et al. 2004)
    m, n = mean(a), mean(b)
    alike = (2 * m * n + 0.01**2) * (2 * (mean(a * b) - m * n) + 0.03**2)
    ssim = 1 - (alike / ((m * m + n * n + 0.01**2) * (mean(a * a) - m * m + mean(b * b) - n * n + 0.03**2))).mean()
    return ssim + (a - b).abs().mean() if kind == "ssim+l1" else ssim


@dataclass(frozen=True)
class Recipe:
    """How to train a pruner.

    Attributes
    ----------
    updates, batch : int; updates x batch trajectories in all
    learning_rate : float, of SGD with a cosine
    alpha : float, weight of the sparsity
    stop : float, tau: below this kept fraction of the MACs the sparsity no longer counts
    loss : str, kind of `consistency`
    weights : str, kind of `Prices.weights`
    fresh : bool, new noise at each update; False keeps the first (the released code's behaviour)
    anneal : bool
        False: a gate is on where computing is likelier than not, as in the paper. True, ours: on are the likeliest that
        a budget allows, which falls to `stop`; the sparsity has no loss; gradients count per MAC that a gate frees, and
        the learning rate is the root mean square of a step of the logits. Needs a table of logits.
    """

    updates: int
    batch: int
    learning_rate: float
    alpha: float = 1.0
    stop: float = 0.2
    loss: str = "ssim"
    weights: str = "static"
    fresh: bool = True
    anneal: bool = False

    def budget(self, update: int) -> float:
        """Give the share of the MACs that annealed gates may cost: from a half to `stop` in four fifths of the time."""
        way = min(1.0, (update + 1) / (0.8 * self.updates))
        return self.stop + max(0.0, 0.5 - self.stop) * 0.5 * (1 + math.cos(math.pi * way))


def learn(pruner: Pruner, net: SuperNet, prices: Prices, noise: Callable[[int, int], Tensor], recipe: Recipe, *,
          work: Path, title: str = "pruner") -> list[dict]:
    """Train a pruner, in place (equations 2 to 4). A killed training goes on where it saved, to the same end.

    Parameters
    ----------
    noise : callable(first, count) -> Tensor, (count, C, H, W)
        Images of a bank of noise.
    work : Path
        Folder for the state to resume from.

    Returns
    -------
    history : list of {"update", "consistency", "sparsity", "kept", "gates"}
        `gates` as one string of 0 and 1 a step.

    Raises
    ------
    FloatingPointError
        If a gradient is no number; the pruner saved last is kept.
    """
    if recipe.anneal and pruner.kind != "table":
        raise ValueError(f"annealed gates need a table of logits, not {pruner.kind}")
    optimiser = torch.optim.SGD(pruner.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    history: list[dict] = []
    work.mkdir(parents=True, exist_ok=True)
    state = work / "pruner.safetensors"
    if state.exists():
        with safe_open(state, "pt") as saved:
            history = json.loads(saved.metadata()["history"])
            pruner.load_state_dict({name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118
    groups, ones = torch.from_numpy(prices.groups), torch.ones(net.plan.steps, len(net.blocks))
    total = float(prices.weights(recipe.weights, np.ones(pruner.shape, bool))[1:].sum())
    bar = tqdm(range(len(history), recipe.updates), initial=len(history), total=recipe.updates, desc=title,
               unit="update")
    for update in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(update, recipe.updates, recipe.learning_rate, warmup=0)
        start = noise(update * recipe.batch if recipe.fresh else 0, recipe.batch)
        on = partial(by_threshold, prices=prices, keep=recipe.budget(update)) if recipe.anneal else _likely
        gates = straight_through(pruner(), on)
        hard = gates.detach().numpy() > 0.5
        hard[0] = True
        with torch.no_grad():
            target = net.images(start, ones, nested=False)
        differs = consistency(net.images(start, gates[:, groups]), target, recipe.loss)
        gamma = torch.from_numpy(prices.weights(recipe.weights, hard)).float()
        sparsity = (gamma[1:] * gates[1:]).sum() / total
        kept = prices.kept(hard)
        optimiser.zero_grad()
        (differs if recipe.anneal or kept <= recipe.stop else differs + recipe.alpha * sparsity).backward()
        if recipe.anneal:
            pruner.bias.grad[1:] /= gamma[1:, :, None].clamp(min=1e-3)
            pruner.bias.grad /= pruner.bias.grad[1:].square().mean().sqrt().clamp(min=1e-12)
        else:
            nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)
        if not all(p.grad.isfinite().all() for p in pruner.parameters()):
            raise FloatingPointError(f"{title}: the gradient of update {update} is no number. Lower the learning rate, "
                                     "or use precision: fp32. What came before is kept.")
        optimiser.step()
        history.append({"update": update, "consistency": differs.item(), "sparsity": sparsity.item(), "kept": kept,
                        "gates": ["".join("01"[int(on)] for on in row) for row in hard]})
        bar.set_postfix(kept=f"{kept:.0%}", consistency=f"{differs.item():.3f}", refresh=False)
        unfinished = state.with_suffix(".partial")
        save_file(pruner.state_dict(), unfinished, metadata={"history": json.dumps(history)})
        unfinished.replace(state)
    return history


def by_threshold(scores: np.ndarray, prices: Prices, keep: float) -> np.ndarray:
    """Keep the gates whose score is above one threshold, found by bisection over the scores (algorithm 1).

    One gate may wake a whole column, so that no threshold comes near the wanted cost. What still fits is therefore
    added in the order of the scores; the paper does not say what it does there.

    Parameters
    ----------
    scores : (T, groups), the probability to compute
    keep : float, wanted executed MACs over the full plan's

    Returns
    -------
    gates : (T, groups), bool
        They cost at most `keep`, or the first column alone.
    """
    order = np.argsort(-scores[1:], axis=None, kind="stable")

    def first(count: int) -> np.ndarray:
        gates = np.zeros(scores.shape, bool)
        gates[0] = True
        gates[1:].flat[order[:count]] = True
        return gates

    count = max(0, bisect_right(range(len(order) + 1), keep, key=lambda count: prices.kept(first(count))) - 1)
    gates = first(count)
    kept = prices.kept(gates)
    for place in order[count:]:
        if kept > keep - 0.005:
            break
        gates[1:].flat[place] = True
        more = prices.kept(gates)
        if more > keep:
            gates[1:].flat[place] = False
        else:
            kept = more
    return gates


def by_greed(scores: np.ndarray, prices: Prices, keep: float) -> np.ndarray:
    """Switch gates off from the output's side, surest first, while at least `keep` is kept (the released code)."""
    gates = np.ones(scores.shape, bool)
    for threshold in np.arange(0.95, -0.01, -0.05):
        for group in range(scores.shape[1] - 1, -1, -1):
            for step in 1 + np.argsort(scores[1:, group], kind="stable"):
                if not gates[step, group] or 1 - scores[step, group] <= threshold:
                    continue
                gates[step, group] = False
                if prices.kept(gates) < keep:
                    gates[step, group] = True
                    break
    return gates


PRUNE: Mapping[str, Callable[[np.ndarray, Prices, float], np.ndarray]] = {"threshold": by_threshold, "greed": by_greed}


def prune(scores: np.ndarray, prices: Prices, keep: float, teacher: Plan, method: str = "threshold") -> Plan:
    """Make a plan that executes about `keep` of the full plan's MACs out of a pruner's scores.

    Cells that nobody reads any more are switched off too (the dependency cascade), so the plan shows what runs.
    """
    gates = PRUNE[method](scores, prices, keep)
    live, _ = prices.blocks.liveness(prices.cells(gates))
    return Plan.from_gates(live, teacher, paper="2410.16942", keep=keep, method=f"DiP-GO, {method}")


@dataclass(frozen=True)
class ScoreSpace:
    """The space of scores, one a gate: what a search finds without a gradient.

    Attributes
    ----------
    prices : Prices
    teacher : Plan, full
    keep : float, executed MACs of every plan over the teacher's, at most
    """

    prices: Prices
    teacher: Plan
    keep: float

    @property
    def _shape(self) -> tuple[int, int]:
        return self.teacher.steps, self.prices.gates

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range."""
        steps, groups = self._shape
        return {f"{step}.{group}": FloatDistribution(0.0, 1.0) for step in range(1, steps) for group in range(groups)}

    def decode(self, genome: Mapping[str, float]) -> Plan:
        """Make a plan of a genome."""
        scores = np.ones(self._shape)
        for gene, value in genome.items():
            step, group = map(int, gene.split("."))
            scores[step, group] = value
        return prune(scores, self.prices, self.keep, self.teacher)

    def encode(self, scores: np.ndarray) -> dict[str, float]:
        """Give the genome of scores, (T, groups), in [0, 1]."""
        return {f"{step}.{group}": float(score) for (step, group), score in np.ndenumerate(scores) if step}


def outside_columns(plan: Plan, blocks: Blocks, costs: Costs) -> float:
    """Give the share of the reused MACs that lies in columns where some cell computes: 0 is a plan of whole steps."""
    live, _ = blocks.liveness(plan.cells)
    reused = ~live @ np.array([costs.blocks[name] for name in plan.blocks])
    return float(reused[live.any(axis=1)].sum() / max(1, reused.sum()))
