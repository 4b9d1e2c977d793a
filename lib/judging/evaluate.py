"""How good the images are: distances between sets of features, with intervals from a jackknife over noise.

The *score* is the FID-like distance between all generated images and the whole data set, in the features of
`lib.judging.extractor`. Its interval and that of its ratio to the teacher's come from leaving out one block of noise
indices after another: both sets of images come from the same noise, so the ratio is compared in pairs.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from lib.grid import blocks, sampling
from lib.grid.plan import Plan
from lib.judging import extractor

GROUPS = 20
"""Blocks of noise indices that the jackknife leaves out one by one."""
PRC_IMAGES = 5_000
"""Precision and recall compare all pairs: of so many generated images at most, and as many real ones."""

KINDS = ("rfid", "rfid, shrunk", "paired")
"""Ways to measure how far images lie from the teacher's: see `Imitation`."""

Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def statistics(features: Tensor, shrink: bool = False) -> Statistics:
    """Give mean and covariance of features (n, D), in float64.

    Parameters
    ----------
    shrink : bool
        Estimate the covariance after Ledoit and Wolf (2004), which is sound at small n, instead of plainly.
    """
    if not shrink:
        return fid_features_to_statistics(features.double())
    array = features.double().numpy()
    return {"mu": array.mean(axis=0), "sigma": ledoit_wolf(array)[0]}


def distance(a: Tensor | Statistics, b: Tensor | Statistics) -> float:
    """Give the Frechet distance between two sets of features (Heusel et al. 2017, eq. 6): FID's formula.

    Parameters
    ----------
    a, b : Tensor, (n, D), or what `statistics` made of one

    Returns
    -------
    distance : float, |m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))
    """
    a, b = (statistics(part) if isinstance(part, Tensor) else part for part in (a, b))
    return fid_statistics_to_metric(a, b, False)[KEY_METRIC_FID]


def jackknife(value: Callable[[Tensor], float], sample: Tensor, groups: int = GROUPS) -> np.ndarray:
    """Give the log of a positive statistic of a sample, then the same with one block of rows after another left out.

    Paired samples (row i of all of them comes from the same noise) have paired logs: their differences are the logs of
    ratios.

    Parameters
    ----------
    value : callable(sample) -> float, > 0
    sample : Tensor, n rows
    groups : int, G blocks

    Returns
    -------
    logs : (1 + G,), float
    """
    n = len(sample)
    edges = np.linspace(0, n, groups + 1).astype(int)
    return np.log([value(sample), *(value(sample[np.r_[0:a, b:n]]) for a, b in pairwise(edges))])


def interval(logs: np.ndarray) -> Estimate:
    """Give what a jackknife's logs estimate.

    Parameters
    ----------
    logs : (1 + G,), float, from `jackknife`, or weighted sums of such

    Returns
    -------
    estimate : Estimate
        exp(log value +- t s), s^2 = (G - 1) / G * sum of squared deviations (Efron and Tibshirani 1993, chapter 11)
    """
    whole, left, groups = logs[0], logs[1:], len(logs) - 1
    error = np.sqrt((groups - 1) / groups * np.sum((left - left.mean()) ** 2))
    reach = stats.t.ppf(0.975, groups - 1) * error
    return Estimate(*(float(np.exp(whole + side)) for side in (0, -reach, reach)))


@dataclass(frozen=True)
class Judge:
    """Scores features of generated images against a data set's.

    Attributes
    ----------
    real : Tensor, (m, D)
        Features of the whole data set.
    extractor : str
        The name of what gave the features; it stands beside every number.
    """

    real: Tensor
    extractor: str

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the data set's features."""
        return statistics(self.real)

    @cached_property
    def _logs(self) -> Callable[[Tensor], np.ndarray]:
        """Give the jackknife of features' score, worked out once: one plan stands in many comparisons."""
        return cache(lambda generated: jackknife(lambda part: distance(part, self.statistics), generated))

    def score(self, generated: Tensor) -> Estimate:
        """Give the distance to the data set, with its interval."""
        return self.compare([(generated, 1.0)], [])

    def ratio(self, generated: Tensor, teacher: Tensor) -> Estimate:
        """Give the score over the teacher's score from the same noise, with the interval of the pair."""
        return self.compare([(generated, 1.0)], [(teacher, 1.0)])

    def compare(self, a: Sequence[tuple[Tensor, float]], b: Sequence[tuple[Tensor, float]]) -> Estimate:
        """Give the score of `a` over that of `b`, each a geometric mean with weights; with no `b`, the score of `a`.

        A control that brackets a cost is [(cheaper, w), (dearer, 1 - w)]: its score is interpolated on the log.
        """
        parts = [*a, *((features, -weight) for features, weight in b)]
        return interval(sum(weight * self._logs(features) for features, weight in parts))

    def trainings(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float]:
        """Compare two kinds of model, each trained several times (or once, for all of the other's).

        Returns
        -------
        ratio : dict of ratio, ratio_low, ratio_high: the geometric mean over the pairs of trainings, with the interval
            of the noise; and least, greatest: the single pairs' extremes
        """
        count = max(len(mine), len(theirs))
        pairs = [(mine[i % len(mine)], theirs[i % len(theirs)]) for i in range(count)]
        together = self.compare([(a, 1 / count) for a, _ in pairs], [(b, 1 / count) for _, b in pairs])
        single = [self.ratio(a, b).value for a, b in pairs]
        return {"ratio": together.value, "ratio_low": together.low, "ratio_high": together.high, "least": min(single),
                "greatest": max(single)}

    def further(self, generated: Tensor) -> dict[str, float]:
        """Give kernel distance (x 1000), precision and recall (k = 3) as torch-fidelity computes them."""
        size = min(1000, len(generated), len(self.real))
        kid = kid_features_to_metric(generated, self.real, kid_subsets=20, kid_subset_size=size, verbose=False)
        some = self.real[::-(-len(self.real) // PRC_IMAGES)]
        prc = prc_features_to_metric(generated[:PRC_IMAGES], some, verbose=False)
        return {"kid_x1e3": 1e3 * kid[KEY_METRIC_KID_MEAN], "precision": prc[KEY_METRIC_PRECISION],
                "recall": prc[KEY_METRIC_RECALL]}


class Bank:
    """What the extractor sees of images sampled from one bank of noise: each plan is sampled once.

    Parameters
    ----------
    name : str, of the bank of noise (`lib.grid.sampling.BANKS`)
    model, schedule : a model and its noise schedule
    classifier : the extractor
    count : int, n images
    seed : int, of the bank
    precision : "fp32" or "bf16"
    work : Path
        Folder that keeps the features of each plan as they come, so that an interrupted run goes on.
    known : Path of files of features that `save` wrote; those of the same bank are taken
    """

    def __init__(self, name: str, model: nn.Module, schedule: SchedulerMixin, classifier: extractor.Classifier, *,
                 count: int, seed: int, precision: str, work: Path, known: Iterable[Path] = ()):
        self.name, self.model, self.schedule, self.classifier = name, model, schedule, classifier
        self.count, self.seed, self.precision = count, seed, precision
        self.key = hashlib.sha256(f"{digest(model)} {classifier.name} {name} {seed} {count} {precision}".encode()
                                  ).hexdigest()[:16]
        self.work = work / f"{name}-{self.key}"
        self.work.mkdir(parents=True, exist_ok=True)
        self._features: dict[str, Tensor] = {}
        for path in known:
            for name_, tensor in load_file(path).items():
                key, _, plan = name_.partition("/")
                if key == self.key:
                    self._features[plan] = tensor

    def noise(self, count: int | None = None) -> Tensor:
        """Give the first `count` (or all) noises of the bank, (n, C, H, W)."""
        return sampling.noise(self.name, self.seed, 0, count or self.count, blocks.input_shape(self.model))

    def images(self, plan: Plan, count: int) -> Tensor:
        """Sample the bank's first `count` images under a plan, (count, C, H, W), about [-1, 1]."""
        return sampling.sample(self.model, self.schedule, plan, self.noise(count), precision=self.precision)

    def features(self, plan: Plan, title: str | None = None) -> Tensor:
        """Give the features of the bank's images under a plan, (n, D).

        Parameters
        ----------
        title : of a progress bar; None for none
        """
        if plan.key not in self._features:
            path = self.work / f"{plan.key}.safetensors"
            if path.exists():
                self._features[plan.key] = load_file(path)["features"]
            else:
                images = sampling.sample(self.model, self.schedule, plan, self.noise(), precision=self.precision,
                                         title=title)
                self._features[plan.key] = extractor.embed(self.classifier, images)
                partial = path.with_suffix(f".{os.getpid()}")  # workers may write the same features at once
                save_file({"features": self._features[plan.key]}, partial)
                partial.replace(path)
        return self._features[plan.key]

    def save(self, path: Path) -> None:
        """Write the features of all plans seen so far to one file."""
        save_file({f"{self.key}/{plan}": tensor for plan, tensor in self._features.items()}, path)


@dataclass(frozen=True)
class Imitation:
    """How far a plan's images lie from the teacher's of the same noise: Flexiffusion's rFID, and two cross-checks.

    No real image is needed, and the teacher's are made once. Smaller is nearer; the teacher itself is at 0.

    Attributes
    ----------
    bank : Bank
    teacher : Plan
    kind : str, of `KINDS`
        The Frechet distance between the two sets of features, with plain or with shrunk covariances; or the mean
        squared distance between the features of the two images that come from one noise.
    """

    bank: Bank
    teacher: Plan
    kind: str = "rfid, shrunk"

    def __call__(self, plan: Plan) -> float:
        """Give the error of a plan."""
        return imitation(self.bank.features(plan), self.bank.features(self.teacher), self.kind)


def imitation(features: Tensor, teacher: Tensor, kind: str) -> float:
    """Give the distance of features (n, D) to the teacher's from the same noise, by a measure of `KINDS`."""
    if kind == "paired":
        return float((features.double() - teacher.double()).square().sum(dim=1).mean())
    shrink = {"rfid": False, "rfid, shrunk": True}[kind]
    return distance(statistics(features, shrink), statistics(teacher, shrink))


def rank_agreement(plans: Sequence[Tensor], final: Sequence[float], judge: Judge, teacher: Tensor,
                   sizes: Iterable[int], seed: int, draws: int = 8) -> pd.DataFrame:
    """Ask how well cheap measures rank plans: Kendall's tau with the final score, from fewer and fewer images.

    Parameters
    ----------
    plans : features (n, D) of each plan's images, all from the same noise
    final : the plans' final scores, from other noise
    teacher : Tensor, (n, D), features of the imitated teacher from that noise
    sizes : numbers of images, each at most n
    draws : subsets of the noise per size (one, where the size is n)

    Returns
    -------
    agreement : columns kind, images, tau (mean over the draws), tau_low, tau_high (least and greatest)
    """
    rows = []
    for size in sizes:
        taus: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "score")}
        for draw in range(draws if size < len(teacher) else 1):
            chosen = np.random.default_rng((seed, size, draw)).permutation(len(teacher))[:size]
            for kind in taus:
                values = [distance(features[chosen], judge.statistics) if kind == "score" else
                          imitation(features[chosen], teacher[chosen], kind) for features in plans]
                taus[kind].append(float(stats.kendalltau(values, final).statistic))
        rows += [{"kind": kind, "images": size, "tau": np.mean(found), "tau_low": min(found), "tau_high": max(found)}
                 for kind, found in taus.items()]
    return pd.DataFrame(rows)


def digest(model: nn.Module) -> str:
    """Give a hash of a model's configuration and weights."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}  # "_" holds the folder
    total = hashlib.sha256(str(sorted(config.items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
