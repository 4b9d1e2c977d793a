"""Banks of noise: what extractors see of the images that each plan makes of one numbered store of noise."""

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.grid import sampling
from lib.grid.model import Model
from lib.grid.plan import Plan
from lib.grid.saving import write_tensors
from lib.judging import extractor


class Bank:
    """What extractors see of images sampled from one bank of noise: each plan is sampled once.

    Parameters
    ----------
    name : str, of the bank of noise (`lib.grid.sampling.BANKS`)
    model : Model, a teacher or a student
    extractors : all that look at the images; the first is asked where none is named
    count : int, n images
    seed : int, of the bank
    precision : "fp32" or "bf16"
    work : Path
        Folder that keeps the features of each plan as they come, so that an interrupted run goes on.
    known : Path of files of features that `save` wrote; those of the same bank are taken
    """

    def __init__(self, name: str, model: Model, extractors: Sequence[extractor.Extractor], *, count: int, seed: int,
                 precision: str, work: Path, known: Iterable[Path] = ()):
        self.name, self.model = name, model
        self.extractors = {one.name: one for one in extractors}  # a name is a hash of weights: taken once
        self.first = next(iter(self.extractors))
        self.count, self.seed, self.precision = count, seed, precision
        libraries = " ".join(f"{library} {version(library)}" for library in ("torch", "diffusers"))
        about = f"{model.digest} {name} {seed} {count} {precision} {libraries}"
        self.key = hashlib.sha256(about.encode()).hexdigest()[:16]
        self.work = work / f"{name}-{self.key}"
        self.work.mkdir(parents=True, exist_ok=True)
        self._features: dict[str, dict[str, Tensor]] = {}  # of a plan, by each extractor's name
        for path in known:
            for name_, tensor in load_file(path).items():
                key, plan, by = name_.split("/", 2)
                if key == self.key:
                    self._features.setdefault(plan, {})[by] = tensor

    def noise(self, count: int | None = None) -> Tensor:
        """Give the first `count` (or all) noises of the bank, (n, C, H, W)."""
        return sampling.noise(self.name, self.seed, 0, count or self.count, self.model.shape)

    def images(self, plan: Plan, count: int) -> Tensor:
        """Sample the bank's first `count` images under a plan, (count, C, H, W), about [-1, 1]."""
        return sampling.sample(self.model, plan, self.noise(count), precision=self.precision)

    def features(self, plan: Plan, title: str | None = None, by: str | None = None) -> Tensor:
        """Give the features of the bank's images under a plan, (n, D).

        Parameters
        ----------
        title : of a progress bar; None for none
        by : name of the extractor; None for the first

        Raises
        ------
        FloatingPointError
            If the images are not numbers.
        """
        found = self._features.setdefault(plan.key, {})
        path = self.work / f"{plan.key}.safetensors"
        if not found and path.exists():
            found.update(load_file(path))
        if missing := self.extractors.keys() - found.keys():
            images = sampling.sample(self.model, plan, self.noise(), precision=self.precision, title=title)
            if not images.isfinite().all():
                raise FloatingPointError(f"images under a plan of {plan.steps} steps are not numbers in precision "
                                         f"{self.precision}: take fp32, or forecast less")
            found.update({one: extractor.embed(self.extractors[one], images) for one in missing})
            if self.work.exists():  # it goes when the stage ends: then there is nothing to resume any more
                write_tensors(path, found)
        return found[by or self.first]

    def save(self, path: Path) -> None:
        """Write the features of all plans seen so far to one file."""
        save_file({f"{self.key}/{plan}/{by}": tensor for plan, found in self._features.items()
                   for by, tensor in found.items()}, path)
