"""Training a pruner through the whole sampling run: the paper's recipe, and annealing, ours."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lib.judging.pairs import ssim
from lib.methods.dipgo.prices import Prices
from lib.methods.dipgo.pruners import Pruner, likely, straight_through
from lib.methods.dipgo.pruning import by_threshold
from lib.methods.dipgo.supernet import SuperNet
from lib.teachers.training import learning_rate


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
    differs = 1 - ssim(a, b).mean()
    return differs + (a - b).abs().mean() if kind == "ssim+l1" else differs


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
    """

    updates: int
    batch: int
    learning_rate: float
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
        """Say whether the best of the looks so far is long past."""
        return len(looks) - int(np.argmin(looks)) > self.patience if looks else False


def learn(pruner: Pruner, net: SuperNet, prices: Prices, noise: Callable[[int, int], Tensor], recipe: Recipe, *,
          work: Path, title: str = "pruner", watch: Watch | None = None) -> list[dict]:
    """Train a pruner, in place, as the paper does (equation 3). A killed training goes on, to the same end.

    A gate is on where computing is likelier than not; the images' difference from the teacher's and, until few enough
    MACs are kept, the price of the gates are minimised by SGD with clipped gradients.

    Parameters
    ----------
    noise : callable(first, count) -> Tensor, (count, C, H, W)
        Images of a bank of noise.
    work : Path
        Folder for the state to resume from.
    watch : Watch, by whose best look the pruner is left; None trains to the end

    Returns
    -------
    history : list of {"update", "consistency", "sparsity", "kept", "gates"}
        `gates` as one string of 0 and 1 a step; where there was a look, "look" too.

    Raises
    ------
    FloatingPointError
        If a gradient is no number; the pruner saved last is kept.
    """
    def descend(differs: Tensor, sparsity: Tensor, gamma: Tensor, kept: float) -> None:
        (differs if kept <= recipe.stop else differs + recipe.alpha * sparsity).backward()
        nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)

    return _train(pruner, net, prices, noise, recipe, lambda update: likely, descend, work, title, watch)


def anneal(pruner: Pruner, net: SuperNet, prices: Prices, noise: Callable[[int, int], Tensor], recipe: Recipe, *,
           work: Path, title: str = "pruner", watch: Watch | None = None) -> list[dict]:
    """Train a pruner by annealing, ours; takes and gives what `learn` does.

    On are the likeliest gates that a budget allows, which falls to `recipe.stop`; the sparsity has no loss; gradients
    count per MAC that a gate frees, and the learning rate is the root mean square of a step of the logits.

    Raises
    ------
    ValueError
        If the pruner is no table of logits.
    """
    if pruner.kind != "table":
        raise ValueError(f"annealed gates need a table of logits, not {pruner.kind}")

    def descend(differs: Tensor, sparsity: Tensor, gamma: Tensor, kept: float) -> None:
        differs.backward()
        pruner.bias.grad[1:] /= gamma[1:, :, None].clamp(min=1e-3)
        pruner.bias.grad /= pruner.bias.grad[1:].square().mean().sqrt().clamp(min=1e-12)

    return _train(pruner, net, prices, noise, recipe,
                  lambda update: partial(by_threshold, prices=prices, keep=recipe.budget(update)), descend, work, title,
                  watch)


def _train(pruner: Pruner, net: SuperNet, prices: Prices, noise: Callable[[int, int], Tensor], recipe: Recipe,
           on: Callable[[int], Callable[[np.ndarray], np.ndarray]],
           descend: Callable[[Tensor, Tensor, Tensor, float], None], work: Path, title: str, watch: Watch | None
           ) -> list[dict]:
    """Train with one rule for which gates are on at an update, and one for the gradients."""
    optimiser = torch.optim.SGD(pruner.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    history: list[dict] = []
    work.mkdir(parents=True, exist_ok=True)
    state, best = work / "pruner.safetensors", work / "best.safetensors"
    if state.exists():
        with safe_open(state, "pt") as saved:
            history = json.loads(saved.metadata()["history"])
            pruner.load_state_dict({name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118
    groups, ones = torch.from_numpy(prices.groups), torch.ones(net.plan.steps, len(net.blocks))
    total = float(prices.weights(recipe.weights, np.ones(pruner.shape, bool))[1:].sum())
    bar = tqdm(range(len(history), recipe.updates), initial=len(history), total=recipe.updates, desc=title,
               unit="update")
    looks = [row["look"] for row in history if "look" in row]
    for update in bar:
        if watch and watch.over(looks):
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(update, recipe.updates, recipe.learning_rate, warmup=0)
        start = noise(update * recipe.batch if recipe.fresh else 0, recipe.batch)
        gates = straight_through(pruner(), on(update))
        hard = gates.detach().numpy() > 0.5
        hard[0] = True
        with torch.no_grad():
            target = net.images(start, ones, nested=False)
        differs = consistency(net.images(start, gates[:, groups]), target, recipe.loss)
        gamma = torch.from_numpy(prices.weights(recipe.weights, hard)).float()
        sparsity = (gamma[1:] * gates[1:]).sum() / total
        kept = prices.kept(hard)
        optimiser.zero_grad()
        descend(differs, sparsity, gamma, kept)
        if not all(p.grad.isfinite().all() for p in pruner.parameters()):
            raise FloatingPointError(f"{title}: the gradient of update {update} is no number. Lower the learning rate, "
                                     "or use precision: fp32. What came before is kept.")
        optimiser.step()
        history.append({"update": update, "consistency": differs.item(), "sparsity": sparsity.item(), "kept": kept,
                        "gates": ["".join("01"[int(on)] for on in row) for row in hard]})
        bar.set_postfix(kept=f"{kept:.0%}", consistency=f"{differs.item():.3f}", refresh=False)
        if watch and (update + 1) % watch.every == 0:
            looks.append(watch.look(pruner))
            history[-1]["look"] = looks[-1]
            if looks[-1] == min(looks):
                _save(pruner, best)
        _save(pruner, state, history=json.dumps(history))
    if looks:
        pruner.load_state_dict(load_file(best))
    return history


def _save(pruner: Pruner, path: Path, **about: str) -> None:
    """Write a pruner's weights, so that a kill leaves the old ones or the new."""
    unfinished = path.with_suffix(".partial")
    save_file(pruner.state_dict(), unfinished, metadata=about)
    unfinished.replace(path)
