"""Kinds of networks that were trained, each once or several times, and how they score on the same noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.grid.plan import Plan
from lib.judging.banks import Bank
from lib.judging.estimates import Score
from lib.judging.evaluate import Measure


@dataclass(frozen=True)
class Trainings:
    """What extractors see of the images of several kinds of networks, all from the same noise.

    Attributes
    ----------
    features : dict of an extractor's name to dict of a kind's name to list of Tensor, (n, D)
        One tensor a training.
    """

    features: Mapping[str, Mapping[str, Sequence[Tensor]]]

    @classmethod
    def of(cls, banks: Mapping[str, Sequence[Bank]], plan: Plan) -> Self:
        """Sample every training of every kind under one plan.

        Parameters
        ----------
        banks : dict of a kind's name to its trainings' banks; all of the same noise, with the same extractors
        """
        extractors = next(iter(banks.values()))[0].extractors
        return cls({by: {name: [bank.features(plan, title=name, by=by) for bank in some]
                         for name, some in banks.items()} for by in extractors})

    def score(self, name: str, judge: Measure) -> Score:
        """Give a kind's score: the geometric mean of its trainings', as `Measure.blend` has it."""
        some = self.features[judge.extractor][name]
        return judge.blend([(features, 1 / len(some)) for features in some])

    def compare(self, name: str, reference: str, judge: Measure) -> dict[str, float | str]:
        """Give `Measure.trainings` of one kind over another: the ratio's columns, least, greatest, agree."""
        found = self.features[judge.extractor]
        return judge.trainings(found[name], found[reference])

    def save(self, path: Path) -> None:
        """Write all features to one file, a tensor (trainings, n, D) each, as "EXTRACTOR/KIND"."""
        save_file({f"{by}/{name}": torch.stack(list(some)) for by, found in self.features.items()
                   for name, some in found.items()}, path)


def word(row: Mapping) -> str:
    """Give the word of a comparison of trainings: *undecided* too where single trainings lie on both sides.

    Parameters
    ----------
    row : what `Trainings.compare` gave, or a table's row that holds it
    """
    surely = row["ratio_word"] in ("better", "worse")
    return "undecided" if surely and not row["agree"] else row["ratio_word"]
