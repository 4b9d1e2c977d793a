"""Training a pruner through the whole sampling run: the paper's recipe, and annealing, ours."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from lib.grid.saving import write_tensors
from lib.judging.pairs import ssim
from lib.methods.dipgo.prices import Prices
from lib.methods.dipgo.pruners import Pruner, likely, straight_through
from lib.methods.dipgo.pruning import by_threshold
from lib.methods.dipgo.supernet import Checkpoints, SuperNet
from lib.teachers.training import learning_rate

KINDS = ("ssim", "l1", "l2", "ssim+l1")
"""Of `consistency`."""
SAVE_EVERY = 20
"""Seconds between two states to resume from."""


def consistency(images: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Give the difference of images from the teacher's, both (n, C, H, W) in about [-1, 1], compared in [0, 1].

    Parameters
    ----------
    kind : "ssim" (1 - SSIM, window of 7 pixels), "l1", "l2", or "ssim+l1"
    """
    if kind not in KINDS:
        raise ValueError(f"loss {kind!r}: must be one of {', '.join(KINDS)}")
    a, b = (images + 1) / 2, (teacher + 1) / 2
    if kind == "l1":
        return (a - b).abs().mean()
    if kind == "l2":
        return (a - b).square().mean()
    differs = 1 - ssim(a, b).mean()
    return differs + (a - b).abs().mean() if kind == "ssim+l1" else differs


@dataclass(frozen=True)
class Recipe:
    """How to train a pruner: as the paper does (equation 3), or by annealing, ours.

    In the paper a gate is on where computing is likelier than not; the images' difference from the teacher's and, until
    few enough MACs are kept, the price of the gates are minimised by SGD with clipped gradients. Annealed, on are the
    likeliest gates that a budget allows, which falls to `stop`; the sparsity has no loss; gradients count per MAC that
    a gate frees, and the learning rate is the root mean square of a step of the logits.

    Attributes
    ----------
    updates, batch : int; updates x batch trajectories in all
    learning_rate : float, of SGD with a cosine
    annealed : bool
    alpha : float, weight of the sparsity
    stop : float, tau: below this kept fraction of the MACs the sparsity no longer counts
    loss : str, kind of `consistency`
    weights : str, kind of `Prices.weights`
    fresh : bool, new noise at each update; False keeps the first (the released code's behaviour)
    """

    updates: int
    batch: int
    learning_rate: float
    annealed: bool = False
    alpha: float = 1.0
    stop: float = 0.2
    loss: str = "ssim"
    weights: str = "static"
    fresh: bool = True

    def budget(self, update: int) -> float:
        """Give the share of the MACs that annealed gates may cost: from a half to `stop` in four fifths of the time."""
        way = min(1.0, (update + 1) / (0.8 * self.updates))
        return self.stop + max(0.0, 0.5 - self.stop) * 0.5 * (1 + math.cos(math.pi * way))


@dataclass(frozen=True)
class Watch:
    """A stop rule: a look at the pruner now and then; the best look is kept, and one long past ends the training.

    Attributes
    ----------
    look : callable(pruner) -> float, lower is better
        Such as the error of its plan on a bank of noise that neither the training nor a report sees.
    every : int, updates between two looks
    patience : int, looks without a better one that end the training
    """

    look: Callable[[Pruner], float]
    every: int
    patience: int

    def over(self, looks: list[float]) -> bool:
        """Say whether the best of the looks so far, of equal ones the last, is long past.

        While no gate has closed the plan stays the same, and so does the look: that is no reason to give up.
        """
        return bool(looks) and 1 + int(np.argmin(looks[::-1])) > self.patience


@dataclass(frozen=True)
class Training:
    """What a training changes, in place, and how.

    Attributes
    ----------
    pruner : Pruner
    prices : Prices, of its gates
    recipe : Recipe
    watch : Watch, by whose best look the pruner is left; None trains to the end

    Raises
    ------
    ValueError
        If gates are annealed and the pruner is no table of logits.
    """

    pruner: Pruner
    prices: Prices
    recipe: Recipe
    watch: Watch | None = None

    def __post_init__(self):
        if self.recipe.annealed and self.pruner.kind != "table":
            raise ValueError(f"annealed gates need a table of logits, not {self.pruner.kind}")


def train(trainings: Mapping[str, Training], net: SuperNet, noise: Callable[[int, int], Tensor], *, work: Path
          ) -> dict[str, list[dict]]:
    """Train pruners, each as if alone, to rounding: in one batch, which takes far less time than one after another.

    A killed call goes on, to the same end. What fits twice into the free memory is kept for the gradient, else nested
    checkpoints make it again: the same to rounding, too.

    Parameters
    ----------
    trainings : what to train, by name
    net : SuperNet, of all of them
    noise : callable(first, count) -> Tensor, (count, C, H, W)
        Images of a bank of noise.
    work : Path
        Folder for the state to resume from.

    Returns
    -------
    histories : by name, a list of {"update", "consistency", "sparsity", "kept", "gates"}
        `gates` as one string of 0 and 1 a step; where there was a look, "look" too.

    Raises
    ------
    FloatingPointError
        If a gradient is no number, of any of them: all stop. What came before is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    state, saved = work / "pruners.safetensors", time.monotonic()
    runs = {name: _Run(name, training) for name, training in trainings.items()}
    if state.exists():
        with safe_open(state, "pt") as file:
            told = json.loads(file.metadata()["histories"])
            for name, run in runs.items():
                run.resume(told[name], {part: file.get_tensor(part) for part in file.keys()})  # noqa: SIM118
    checkpoints: Checkpoints | None = None
    begun = max(len(run.history) for run in runs.values())
    bar = tqdm(initial=begun, total=max(run.recipe.updates for run in runs.values()), desc=", ".join(runs)[:60],
               unit="update")
    while going := [run for run in runs.values() if not run.over]:
        starts = {run.images: noise(*run.images) for run in going}
        first, start = torch.cat([*starts.values()]), torch.cat([starts[run.images] for run in going])
        gates = torch.cat([run.gates()[..., None].expand(-1, -1, run.recipe.batch) for run in going], dim=-1)
        ones = torch.ones(*gates.shape[:2], len(first))
        both = torch.cat([first, start]), torch.cat([ones, gates], dim=-1)
        checkpoints = checkpoints or ("none" if net.kept(*both) < _free(net.model.device) / 2 else "nested")
        if checkpoints == "none":  # the teacher's images in the same batch: that takes less time than two calls
            teachers, images = net.images(*both, "none").split([len(first), len(start)])
        else:
            with torch.no_grad():
                teachers = net.images(first, ones, "none")
            images = net.images(start, gates, checkpoints)
        targets = dict(zip(starts, teachers.detach().split([len(some) for some in starts.values()])))
        images = images.split([run.recipe.batch for run in going])
        losses = [run.loss(made, targets[run.images]) for run, made in zip(going, images)]
        torch.stack(losses).sum().backward()  # no loss depends on another's pruner
        if strange := [run.name for run in going if not run.finite]:
            _save(runs, state)
            update = len(runs[strange[0]].history)
            raise FloatingPointError(f"{strange[0]}: the gradient of update {update} is no number. Lower the learning "
                                     "rate, or use precision: fp32. What came before is kept.")
        for run in going:
            run.step()
        if time.monotonic() - saved > SAVE_EVERY or all(run.over for run in going):
            _save(runs, state)
            saved = time.monotonic()
        bar.update()
        bar.set_postfix_str("kept " + ", ".join(f"{run.history[-1]['kept']:.0%}" for run in going), refresh=False)
    bar.close()
    for run in runs.values():
        run.end()
    return {name: run.history for name, run in runs.items()}


class _Run:
    """A training under way: each update takes `gates`, then `loss`, then `step`."""

    def __init__(self, name: str, training: Training):
        self.name, self.training, self.recipe = name, training, training.recipe
        self.pruner, self.prices = training.pruner, training.prices
        self.optimiser = torch.optim.SGD(self.pruner.parameters(), lr=self.recipe.learning_rate, weight_decay=1e-4)
        self.total = float(self.prices.weights(self.recipe.weights, np.ones(self.pruner.shape, bool))[1:].sum())
        self.history: list[dict] = []
        self.best: dict[str, Tensor] = {}
        self._gates = self._gamma = torch.empty(0)  # of the update under way, as is its row of the history
        self._row: dict = {}

    @property
    def finite(self) -> bool:
        """Whether all gradients are numbers."""
        return all(bool(p.grad.isfinite().all()) for p in self.pruner.parameters())

    @property
    def looks(self) -> list[float]:
        return [row["look"] for row in self.history if "look" in row]

    @property
    def over(self) -> bool:
        watch = self.training.watch
        return len(self.history) >= self.recipe.updates or bool(watch and watch.over(self.looks))

    @property
    def images(self) -> tuple[int, int]:
        """The first of the next update's images, and their number."""
        return len(self.history) * self.recipe.batch if self.recipe.fresh else 0, self.recipe.batch

    def gates(self) -> Tensor:
        """Give the gates of the next update, a block each, (T, N)."""
        def affordable(scores: np.ndarray) -> np.ndarray:
            return by_threshold(scores, self.prices, self.recipe.budget(len(self.history)))

        self._gates = straight_through(self.pruner(), affordable if self.recipe.annealed else likely)
        return self._gates[:, torch.from_numpy(self.prices.groups)]

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Give the loss of the images that the gates made, and note it."""
        hard = self._gates.detach().numpy() > 0.5
        hard[0] = True
        self._gamma = torch.from_numpy(self.prices.weights(self.recipe.weights, hard)).float()
        sparsity = (self._gamma[1:] * self._gates[1:]).sum() / self.total
        differs, kept = consistency(images, target, self.recipe.loss), self.prices.kept(hard)
        self._row = {"update": len(self.history), "consistency": differs.item(), "sparsity": sparsity.item(),
                     "kept": kept, "gates": ["".join("01"[int(on)] for on in row) for row in hard]}
        self.optimiser.zero_grad()
        return differs if self.recipe.annealed or kept <= self.recipe.stop else differs + self.recipe.alpha * sparsity

    def step(self) -> None:
        """Make the update whose gradients are there, and a look where one is due."""
        if self.recipe.annealed:
            grad = self.pruner.bias.grad
            grad[1:] /= self._gamma[1:, :, None].clamp(min=1e-3)
            grad /= grad[1:].square().mean().sqrt().clamp(min=1e-12)
        else:
            nn.utils.clip_grad_norm_(self.pruner.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(len(self.history), self.recipe.updates, self.recipe.learning_rate, warmup=0)
        self.optimiser.step()
        self.history.append(self._row)
        watch = self.training.watch
        if watch and len(self.history) % watch.every == 0:
            self._row["look"] = watch.look(self.pruner)
            if self._row["look"] == min(self.looks):
                self.best = {part: tensor.clone() for part, tensor in self.pruner.state_dict().items()}

    def end(self) -> None:
        """Leave the pruner as at its best look."""
        if self.best:
            self.pruner.load_state_dict(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """Give what to save, under names of this training's."""
        return ({f"{self.name}/now/{part}": tensor for part, tensor in self.pruner.state_dict().items()}
                | {f"{self.name}/best/{part}": tensor for part, tensor in self.best.items()})

    def resume(self, history: list[dict], tensors: Mapping[str, Tensor]) -> None:
        """Take up what was saved."""
        def of(kind: str) -> dict[str, Tensor]:
            start = f"{self.name}/{kind}/"
            return {part.removeprefix(start): tensor for part, tensor in tensors.items() if part.startswith(start)}

        self.history, self.best = history, of("best")
        self.pruner.load_state_dict(of("now"))


def _free(device: torch.device) -> int:
    """Give the bytes of memory that are free, those among them that torch has reserved."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device))


def _save(runs: Mapping[str, _Run], path: Path) -> None:
    """Write the state of all runs, so that a kill leaves the old one or the new."""
    tensors = {part: tensor for run in runs.values() for part, tensor in run.tensors().items()}
    histories = json.dumps({name: run.history for name, run in runs.items()})
    write_tensors(path, tensors, {"histories": histories})
