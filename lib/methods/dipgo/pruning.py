"""From scores to plans of any cost (algorithm 1), and the space of scores for a search without gradient."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from scipy import stats

from lib.grid.plan import Plan
from lib.methods.dipgo.prices import Prices

ACCEPTED = 0.0125
"""The paper's bisection ends where the kept fraction is as near as this to the wanted one."""
SHAKE = 0.1
"""Standard deviation of what is added to known ranks, in (0, 1], to make further genomes to start from."""


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


def by_bisection(scores: np.ndarray, prices: Prices, keep: float) -> np.ndarray:
    """Keep the gates whose score is above a threshold in [0, 1] that keeps about `keep`, to 0.0125 (algorithm 1).

    Where one gate wakes so much that no threshold comes so near, the one where the halving ends is taken.
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        threshold = (low + high) / 2
        gates = scores >= threshold
        gates[0] = True
        kept = prices.kept(gates)
        if abs(kept - keep) < ACCEPTED:
            break
        low, high = (threshold, high) if kept > keep else (low, threshold)
    return gates


PRUNE: Mapping[str, Callable[[np.ndarray, Prices, float], np.ndarray]] = {
    "threshold": by_threshold, "bisection": by_bisection, "greed": by_greed}
"""Ours, the paper's and the released code's."""


def prune(scores: np.ndarray, prices: Prices, keep: float, teacher: Plan, method: str = "threshold") -> Plan:
    """Make a plan that executes about `keep` of the full plan's MACs out of a pruner's scores.

    Cells that nobody reads any more are switched off too (the dependency cascade), so the plan shows what runs.
    """
    gates = PRUNE[method](scores, prices, keep)
    live = prices.life(prices.cells(gates)).live
    return Plan.from_gates(live, teacher, prices.reuse, paper="2410.16942", keep=keep, method=f"DiP-GO, {method}")


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

    def known(self, learnt: Sequence[np.ndarray], count: int, seed: int) -> list[dict[str, float]]:
        """Give genomes to start from: known scores as ranks, then the same shaken again and again.

        Parameters
        ----------
        learnt : sequence of (T, groups), scores in any range, at least one
        count : int, of genomes, such as a search's population; of more known scores than that the first are taken
        seed : int, of what is added to the shaken ones

        Returns
        -------
        genomes : list of `count` dicts, as `encode` gives them
        """
        ranks = [stats.rankdata(scores).reshape(scores.shape) / scores.size for scores in learnt]
        genomes = [self.encode(rank) for rank in ranks[:count]]
        for number in range(len(ranks), count):
            rank = ranks[number % len(ranks)]
            noise = np.random.default_rng((seed, number)).normal(0, SHAKE, rank.shape)
            genomes.append(self.encode(np.clip(rank + noise, 0, 1)))
        return genomes
