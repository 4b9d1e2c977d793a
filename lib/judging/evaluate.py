"""How good the images are: distances between sets of features, and what judges say of them.

The *score* is the FID-like distance between all generated images and the whole data set, in the features of
`lib.judging.extractor`, less the bias of a finite sample: a perfect sampler scores 0, give or take. Where images are
asked for by prompts, the *prompt score* is the share that shows what was asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from lib.grid.plan import Plan
from lib.judging import extractor
from lib.judging.banks import Bank
from lib.judging.estimates import (
    GROUPS,
    Contrast,
    Estimate,
    Score,
    blend,
    columns,
    jackknife,
    left_out,
    mean_score,
    pseudo_values,
    uncorrected,
)
from lib.teachers.data import DataSet

NEIGHBOURS = 3
"""k of precision and recall."""
PRC_IMAGES = 5_000
"""Precision and recall compare all pairs: of so many generated images at most, and as many real ones."""

DRAWS = 8
"""Subsets of the noise of each size in `rank_agreement`; one where the size is all of it."""

KINDS = ("rfid", "rfid, shrunk", "paired")
"""Ways to measure how far images lie from the teacher's: see `Imitation`."""

Statistics = dict[str, np.ndarray]


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


class Measure:
    """Something that scores images by their features: smaller is better, and 0 is perfect.

    Attributes
    ----------
    extractor : str
        The name of what gave the features; it stands beside every number.
    score : callable(features) -> Score
        Of features (n, D), worked out once: one plan stands in many comparisons.
    """

    extractor: str
    score: Callable[[Tensor], Score]

    def blend(self, parts: Sequence[tuple[Tensor, float]]) -> Score:
        """Give the weighted mean score of several sets of features, as `blend` does.

        A control that brackets a cost is [(cheaper, w), (dearer, 1 - w)]: its score is interpolated, on the log where
        none may be 0.
        """
        return blend([(self.score(features), weight) for features, weight in parts])

    def compare(self, a: Sequence[tuple[Tensor, float]], b: Sequence[tuple[Tensor, float]]) -> Contrast:
        """Compare the blended score of `a` with that of `b`, each [(features, weight), ...]."""
        mine, theirs = ([(self.score(features), weight) for features, weight in parts] for parts in (a, b))
        return Contrast.of(mine, theirs, len(a[0][0]))

    def over(self, generated: Tensor, teacher: Tensor) -> Contrast:
        """Compare a score with the teacher's from the same noise."""
        return self.compare([(generated, 1.0)], [(teacher, 1.0)])

    def trainings(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float | str]:
        """Compare two kinds of model, each trained several times (or once, for all of the other's).

        Returns
        -------
        ratio : columns of the `Contrast` of all trainings together, its interval that of the noise; least, greatest:
            the single pairs' extreme ratios; agree: whether all of them lie on one side
        """
        count = max(len(mine), len(theirs))
        pairs = [(mine[i % len(mine)], theirs[i % len(theirs)]) for i in range(count)]
        together = self.compare([(a, 1 / count) for a, _ in pairs], [(b, 1 / count) for _, b in pairs])
        single = [self.over(a, b) for a, b in pairs]
        ratios, sides = [one.ratio.value for one in single], {one.difference.value < 0 for one in single}
        return {**together.columns("ratio"), "least": np.min(ratios), "greatest": np.max(ratios),
                "agree": len(sides) == 1}


@dataclass(frozen=True)
class Judge(Measure):
    """Scores features of generated images against a data set's, by their distance.

    Attributes
    ----------
    real : Tensor, (m, D)
        Features of the whole data set.
    extractor : str, as `Measure` has it
    """

    real: Tensor
    extractor: str

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the data set's features."""
        return statistics(self.real)

    @cached_property
    def score(self) -> Callable[[Tensor], Score]:
        """Give the score of features (n, D)."""
        unit = float(np.trace(self.statistics["sigma"])) / self.real.shape[1]

        def score(generated: Tensor) -> Score:
            if len(generated) * (1 - 1 / GROUPS) <= self.real.shape[1]:
                raise ValueError(f"{len(generated)} images are too few for {self.extractor}'s {self.real.shape[1]} "
                                 "features: raise score_images and select_images, or take another judge")
            values = jackknife(lambda part: distance(part, self.statistics), generated)
            return Score(float(values[0]), pseudo_values(values), unit)

        return cache(score)

    def further(self, generated: Tensor) -> dict[str, float]:
        """Give kernel distance (x 1000; KID of torch-fidelity), precision and recall, these with intervals."""
        size = min(1000, len(generated), len(self.real))
        kid = kid_features_to_metric(generated, self.real, kid_subsets=20, kid_subset_size=size, verbose=False)
        some = self.real[::-(-len(self.real) // PRC_IMAGES)]
        precision, recall = precision_and_recall(generated[:PRC_IMAGES], some)
        return {"kid_x1e3": 1e3 * kid[KEY_METRIC_KID_MEAN], **columns("precision", precision),
                **columns("recall", recall)}


@dataclass(frozen=True)
class Prompts(Measure):
    """Says of a bank's images which share does not show what was asked for: 1 less the *prompt score*.

    Two shares are compared by their difference, and 5 in 100 images are none.

    Attributes
    ----------
    classifier : Extractor that tells labels, or each attribute
    asked : Tensor, (n, H), int64, what each of the bank's images is asked to show of them; the first alone, where H = 1
    """

    classifier: extractor.Extractor
    asked: Tensor

    @property
    def extractor(self) -> str:
        """The classifier's name."""
        return self.classifier.name

    @cached_property
    def score(self) -> Callable[[Tensor], Score]:
        """Give the share that misses any of what is asked for, of features (n, D)."""
        asked = self.asked
        return cache(lambda features: missed(self.classifier.told(features)[:, :asked.shape[1]], asked))


@dataclass(frozen=True)
class Likeness(Measure):
    """Says how little images look like their prompts to CLIP: 1 less the cosine of both features, 0 at least.

    That cosine is the usual CLIP score over 100 (Hessel et al. 2021 multiply it by 2.5). Two are compared by their
    difference, and half a point of a hundred is none.

    Attributes
    ----------
    extractor : str, the CLIP model's name
    asked : Tensor, (n, D), its features of each of the bank's prompts
    """

    extractor: str
    asked: Tensor

    @cached_property
    def score(self) -> Callable[[Tensor], Score]:
        """Give the mean of what is lacking, of features (n, D)."""
        def score(features: Tensor) -> Score:
            return mean_score(1 - (features.double() * self.asked).sum(1).clamp(0), unit=0.1, ratios=False)

        return cache(score)


def prompts_of(bank: Bank, data: DataSet) -> Measure | None:
    """Give the measure of what a bank's model is asked for by a data set's prompts or labels; None where by neither.

    The bank's first extractor reads attributes and labels, those that it was taught; else a CLIP model of the bank
    compares prompts with images.
    """
    model, noise, reader = bank.model, bank.noise(), bank.extractors[bank.first]
    clip = next((one for one in bank.extractors.values() if isinstance(one, extractor.Clip)), None)
    if model.text is not None and data.attributes:
        known = dict(zip(data.prompts, data.answers.tolist()))
        return Prompts(reader, torch.tensor([known[one] for one in model.said(noise)]))
    if model.text is not None and data.prompts and clip:
        return Likeness(clip.name, clip.read(model.said(noise)))
    if model.classes and getattr(reader, "made_of", {}).get("outputs", [None])[0] == model.classes:
        return Prompts(reader, model.labels(noise)[:, None])
    return None


@dataclass(frozen=True)
class Nearness(Measure):
    """Says how far images lie from the teacher's of the same noise: the mean squared distance of their features.

    Attributes
    ----------
    teacher : Tensor, (n, D), features of the teacher's images
    extractor : str, as `Measure` has it
    """

    teacher: Tensor
    extractor: str

    @cached_property
    def score(self) -> Callable[[Tensor], Score]:
        """Give the distance of features (n, D)."""
        def score(generated: Tensor) -> Score:
            return mean_score(_gaps(generated, self.teacher))

        return cache(score)


def judges(extractors: Sequence[extractor.Extractor], images: Tensor) -> list[Judge]:
    """Give a judge for each extractor, over the images of the whole data set."""
    return [Judge(extractor.embed(one, images), one.name) for one in extractors]


def missed(told: Tensor, asked: Tensor) -> Score:
    """Give the share of images that do not show what was asked for.

    Parameters
    ----------
    told : Tensor, (n, H), what a classifier reads in each image (`lib.judging.extractor.Extractor.told`)
    asked : Tensor, (n, H), what its prompt asks for; all H attributes have to be right
    """
    return mean_score((told != asked).any(dim=1).double(), ratios=False)


def disagreements(scores: Mapping[str, tuple[Score, Score]], n: int) -> pd.DataFrame:
    """Find the pairs that one judge surely orders one way and the other surely the other way.

    Parameters
    ----------
    scores : name to both judges' scores
    n : images of each

    Returns
    -------
    pairs : columns better, worse (names, as the first judge has it), first, second (each judge's ratio of the two)
    """
    pairs = []
    for (one, mine), (other, theirs) in permutations(scores.items(), 2):
        first, second = (Contrast.of([(a, 1.0)], [(b, 1.0)], n) for a, b in zip(mine, theirs))
        if (first.word, second.word) == ("better", "worse"):
            pairs.append({"better": one, "worse": other, "first": first.ratio.value, "second": second.ratio.value})
    return pd.DataFrame(pairs, columns=["better", "worse", "first", "second"])


def precision_and_recall(generated: Tensor, real: Tensor) -> tuple[Estimate, Estimate]:
    """Give how many generated images lie near real ones, and how many real images near generated ones.

    Near is: as near as the other image's third neighbour of its own kind (Kynkaanniemi et al. 2019). The values are
    torch-fidelity's; the intervals come from leaving out blocks of noise indices.

    Parameters
    ----------
    generated, real : Tensor, (n, D) and (m, D), features
    """
    def radii(among: Tensor) -> Tensor:
        return among.topk(NEIGHBOURS + 1, largest=False).values[:, -1]  # the nearest is the image itself

    across, among = torch.cdist(generated, real), torch.cdist(generated, generated)
    near = (across <= radii(torch.cdist(real, real))).any(dim=1).float()
    kept = [np.arange(len(generated)), *left_out(len(generated))]
    recall = [float((across[rows] <= radii(among[rows][:, rows])[:, None]).any(dim=0).float().mean()) for rows in kept]
    return uncorrected(np.array([float(near[rows].mean()) for rows in kept])), uncorrected(np.array(recall))


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

    @property
    def key(self) -> str:
        """What the errors hang on."""
        return f"{self.kind} {self.bank.key} {self.teacher.key} {self.bank.first}"

    def __call__(self, plan: Plan) -> float:
        """Give the error of a plan."""
        return imitation(self.bank.features(plan), self.bank.features(self.teacher), self.kind)


def imitation(features: Tensor, teacher: Tensor, kind: str) -> float:
    """Give the distance of features (n, D) to the teacher's from the same noise, by a measure of `KINDS`."""
    if kind == "paired":
        return paired(features, teacher).value
    shrink = {"rfid": False, "rfid, shrunk": True}[kind]
    return distance(statistics(features, shrink), statistics(teacher, shrink))


def paired(features: Tensor, teacher: Tensor) -> Estimate:
    """Give the mean squared distance of features (n, D) to the teacher's, noise by noise, with its interval."""
    return uncorrected(jackknife(lambda part: float(part.mean()), _gaps(features, teacher)))


def _gaps(features: Tensor, teacher: Tensor) -> Tensor:
    return (features.double() - teacher.double()).square().sum(dim=1)


def rank_agreement(plans: Sequence[Tensor], final: Sequence[float], judge: Judge, teacher: Tensor,
                   sizes: Iterable[int], seed: int) -> pd.DataFrame:
    """Ask how well cheap measures rank plans: Kendall's tau with the final score, from fewer and fewer images.

    Parameters
    ----------
    plans : features (n, D) of each plan's images, all from the same noise
    final : the plans' final scores, from other noise
    teacher : Tensor, (n, D), features of the imitated teacher from that noise
    sizes : numbers of images, each at most n

    Returns
    -------
    agreement : columns kind, images, tau (mean over `DRAWS` subsets), tau_low, tau_high (least and greatest)
    """
    rows = []
    for size in sizes:
        taus: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "score")}
        for draw in range(DRAWS if size < len(teacher) else 1):
            chosen = np.random.default_rng((seed, size, draw)).permutation(len(teacher))[:size]
            for kind in taus:
                values = [distance(features[chosen], judge.statistics) if kind == "score" else
                          imitation(features[chosen], teacher[chosen], kind) for features in plans]
                taus[kind].append(float(stats.kendalltau(values, final).statistic))
        rows += [{"kind": kind, "images": size, "tau": np.mean(found), "tau_low": min(found), "tau_high": max(found)}
                 for kind, found in taus.items()]
    return pd.DataFrame(rows)
