"""What is known of a score: its value without the bias of a finite sample, its interval, and how it compares.

All of it comes from one jackknife over blocks of noise indices (Efron and Tibshirani 1993, chapters 10 and 11).
`tests/benchmarks/bench_coverage.py` shows by simulation what the intervals cover.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy import stats
from torch import Tensor

GROUPS = 20
"""Blocks of noise indices that the jackknife leaves out one by one."""
MARGIN = 0.05
"""So much of another's score, or cost, is no difference that matters: what "as good" and "at most 5 % worse" mean.
Where there is no ratio, so much of a feature's variance in the data set, which the number of images does not change."""


WORDS = ("better", "as good", "undecided", "worse")
"""What a comparison may say: see `Contrast.word`."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, pseudo: np.ndarray) -> "Estimate":
        """Give the mean of a jackknife's pseudo-values, (G,), with its interval: mean +- t s / sqrt(G).

        The mean is the bias-corrected statistic (Efron and Tibshirani 1993, chapters 10 and 11).
        """
        reach = stats.t.ppf(0.975, len(pseudo) - 1) * pseudo.std(ddof=1) / np.sqrt(len(pseudo))
        return cls(*(float(pseudo.mean() + side) for side in (0, -reach, reach)))


@dataclass(frozen=True, eq=False)
class Score:
    """A distance without the bias of a finite sample.

    Attributes
    ----------
    raw : float
        The distance as it comes, bias and all.
    pseudo : (G,), float
        The jackknife's pseudo-values; two scores from the same noise are paired block by block.
    unit : float
        The mean variance of a feature in the data set: what a difference is measured by.
    ratios : bool; False for shares, which are compared by their difference
    """

    raw: float
    pseudo: np.ndarray
    unit: float = 1.0
    ratios: bool = True

    @cached_property
    def estimate(self) -> Estimate:
        """The corrected distance with its interval, which may hold 0."""
        return Estimate.of(self.pseudo)

    @property
    def above_floor(self) -> bool:
        """Whether it surely lies above 0, so that it may stand in a ratio."""
        return self.ratios and self.estimate.low > 0


def blend(parts: Sequence[tuple[Score, float]], logs: bool | None = None) -> Score:
    """Give the weighted geometric mean of scores; the weighted sum, where one of them may be 0.

    Parameters
    ----------
    logs : whether to take the geometric mean; None where all are surely above 0
    """
    scores, weights = [score for score, _ in parts], np.array([weight for _, weight in parts])
    raw = np.array([score.raw for score in scores])
    values = np.array([score.estimate.value for score in scores])
    pseudo = np.stack([score.pseudo for score in scores])
    if not (all(score.above_floor for score in scores) if logs is None else logs):
        return Score(float(weights @ raw), weights @ pseudo, scores[0].unit, scores[0].ratios)
    slopes = weights @ (pseudo / values[:, None] - 1)
    return Score(float(np.exp(weights @ np.log(raw))), np.exp(weights @ np.log(values)) * (1 + slopes), scores[0].unit)


@dataclass(frozen=True)
class Contrast:
    """One score beside another's from the same noise.

    Attributes
    ----------
    ratio : Estimate
        In logs, by the delta method; NaN where one of the two is at the floor (its interval holds 0).
    difference : Estimate
        Decides there.
    margin : float
        The difference that does not matter there, `MARGIN` of a feature's variance.
    n : int, images of each
    """

    ratio: Estimate
    difference: Estimate
    margin: float
    n: int

    @classmethod
    def of(cls, mine: Sequence[tuple[Score, float]], theirs: Sequence[tuple[Score, float]], n: int) -> "Contrast":
        """Compare two blends of scores from the same noise; products, where no score may be 0, else sums."""
        above = all(score.above_floor for score, _ in (*mine, *theirs))
        (mine, other), ratio = (blend(parts, above) for parts in (mine, theirs)), Estimate(np.nan, np.nan, np.nan)
        if above:
            a, b = mine.estimate.value, other.estimate.value
            logs = Estimate.of(np.log(a / b) + mine.pseudo / a - other.pseudo / b)
            ratio = Estimate(*(float(np.exp(end)) for end in (logs.value, logs.low, logs.high)))
        return cls(ratio, Estimate.of(mine.pseudo - other.pseudo), MARGIN * other.unit, n)

    @property
    def _scale(self) -> tuple[Estimate, float, float]:
        """What decides, 0 where both are alike, and the differences that do not matter."""
        if np.isnan(self.ratio.value):
            return self.difference, -self.margin, self.margin
        ratio = self.ratio
        return Estimate(*np.log([ratio.value, ratio.low, ratio.high])), np.log(1 - MARGIN), np.log(1 + MARGIN)

    @property
    def word(self) -> str:
        """*better* or *worse* (surely another score), *as good* (surely within `MARGIN`), or *undecided*."""
        found, least, most = self._scale
        if found.high < 0 or found.low > 0:
            return "better" if found.high < 0 else "worse"
        return "as good" if least <= found.low and found.high <= most else "undecided"

    @property
    def holds(self) -> str:
        """Whether it is at most `MARGIN` worse: yes, no or undecided."""
        found, _, most = self._scale
        return "yes" if found.high <= most else "no" if found.low > most else "undecided"

    @property
    def needed(self) -> float:
        """The images it would take to decide on a word, were all as estimated: intervals shrink as 1 / sqrt(n)."""
        found, least, most = self._scale
        return self._images(max(abs(found.value), min(most - found.value, found.value - least)))

    @property
    def needed_to_hold(self) -> float:
        """The images it would take to decide whether it holds, were all as estimated."""
        found, _, most = self._scale
        return self._images(abs(most - found.value))

    def _images(self, gap: float) -> float:
        """Give the images at which the interval reaches no further than `gap` to either side."""
        found, _, _ = self._scale
        return self.n * ((found.high - found.low) / 2 / gap) ** 2 if gap > 0 else np.inf

    def columns(self, name: str) -> dict[str, float | str]:
        """Give it as a table's columns."""
        return {**columns(name, self.ratio), **columns(f"{name}_difference", self.difference),
                f"{name}_word": self.word, f"{name}_needs": self.needed, f"{name}_holds": self.holds,
                f"{name}_holds_needs": self.needed_to_hold}


def columns(name: str, estimate: Estimate) -> dict[str, float]:
    """Give an estimate as a table's columns: name, name_low, name_high."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def text(row: Mapping, name: str) -> str:
    """Write out an estimate of which `columns` were made; where there is no ratio, the difference."""
    if np.isnan(row[name]) and f"{name}_difference" in row:
        return f"{text(row, f'{name}_difference')} more"
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    width = (high - low) / abs(value) if value else 1
    digits = max(3, 1 + math.ceil(-math.log10(width))) if width > 0 else 3  # enough to tell the ends apart
    return f"{value:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


def shift(row: Mapping, name: str) -> str:
    """Write out a difference of which `columns` were made: "higher by 0.5 [0.25, 0.75]".

    Below 0 it is "lower by", and value and interval have their signs turned.
    """
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value < 0:
        return f"lower by {text(columns(name, Estimate(-value, -high, -low)), name)}"
    return f"higher by {text(row, name)}"


def jackknife(value: Callable[[Tensor], float], sample: Tensor) -> np.ndarray:
    """Give a statistic of a sample, then the same with one block of rows after another left out.

    Parameters
    ----------
    value : callable(sample) -> float
    sample : Tensor, n rows

    Returns
    -------
    values : (1 + `GROUPS`,), float
    """
    return np.array([value(sample), *(value(sample[kept]) for kept in left_out(len(sample)))])


def left_out(n: int) -> list[np.ndarray]:
    """Give the rows that stay as one of `GROUPS` blocks after another is left out."""
    return [np.r_[0:a, b:n] for a, b in pairwise(np.linspace(0, n, GROUPS + 1).astype(int))]


def pseudo_values(values: np.ndarray) -> np.ndarray:
    """Give (1 + G,) values of `jackknife` as G pseudo-values, G * whole - (G - 1) * left-out."""
    groups = len(values) - 1
    return groups * values[0] - (groups - 1) * values[1:]


def mean_score(numbers: Tensor, unit: float = 1.0, ratios: bool = True) -> Score:
    """Give the mean of one number an image, (n,), as a score."""
    values = jackknife(lambda part: float(part.mean()), numbers)
    return Score(float(values[0]), pseudo_values(values), unit, ratios)


def uncorrected(values: np.ndarray) -> Estimate:
    """Give (1 + G,) values of `jackknife` as the value itself with its interval."""
    found = pseudo_values(values)
    return Estimate.of(found - found.mean() + values[0])
