"""Data sets: images in [-1, 1] with labels or prompts, and a split made by seed.

Two need no download: scikit-learn's digits, and letters that are drawn here. Else folders of images, parquet files,
data sets of the hub (`lib.teachers.files`).
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from lib.teachers import files, letters
from lib.teachers.files import HUB

LETTERS = 20_000
"""So many letters are drawn where nobody says how many."""

SHOWN, HELD_OUT = 12, 16
"""So many images of each class, and so many held-out ones, a study shows."""


@dataclass(frozen=True)
class DataSet:
    """Images with labels and a fixed split.

    Attributes
    ----------
    name : str
    images : Tensor, (n, C, H, W), float32, in [-1, 1]
    labels : Tensor, (n,), int64; all 0 where the source has none
    train, held_out : Tensor, int64
        Row numbers; together each row once.
    prompts : tuple of str, (n,); empty where the source has none
    attributes : dict of name to Tensor, (n,), int64: what else is known of each image, such as a letter's style
    """

    name: str
    images: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor
    prompts: tuple[str, ...] = ()
    attributes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    @property
    def words(self) -> list[str]:
        """Every word of its prompts."""
        return sorted({word for prompt in self.prompts for word in prompt.split()})

    @property
    def answers(self) -> Tensor:
        """What a classifier has to tell of each image, (n, H), int64: its attributes, or its label alone."""
        return torch.stack(list(self.attributes.values()) or [self.labels], dim=1)

    def check_enough(self) -> None:
        """Refuse data of which the study's pictures cannot show enough.

        Raises
        ------
        ValueError
            Saying how many there are, and how many it takes.
        """
        classes, counts = self.labels.unique(return_counts=True)
        if counts.min() < SHOWN:
            raise ValueError(f"{self.name}: class {int(classes[counts.argmin()])} has {int(counts.min())} images, and "
                             f"the study wants {SHOWN} of each: add some, or take the class out")
        if len(self.held_out) < HELD_OUT:
            raise ValueError(f"{self.name}: {len(self.held_out)} images are held out, and the study wants {HELD_OUT}: "
                             "raise held_out in the params, or take more images")


def load(source: str, resolution: int, held_out: float, seed: int) -> DataSet:
    """Load a data set and split it, each class in proportion.

    Parameters
    ----------
    source : str
        "digits" (scikit-learn's), "letters" or "letters:COUNT" (`lib.teachers.letters`), a folder of images (if each
        lies in a subfolder, the subfolder's name is its label; prompts stand in a column text of metadata.csv or
        metadata.jsonl, beside file_name), a parquet file or a folder of them (whole numbers in a column label or
        labels, prompts in a column text, prompt or caption), or "hub:OWNER/NAME", "hub:OWNER/NAME:SPLIT" (split
        "train", if none is given) or "hub:OWNER/NAME@REVISION:SPLIT", with such columns.
    resolution : int
        Pixels a side: images are cut to their middle square and resized bicubically, with antialiasing. They are grey
        if all are; 16 bits become 8; what is transparent shows white.
    held_out : float, fraction of the images that no training sees, in (0, 1)
    seed : int, of the split

    Raises
    ------
    ValueError
        If the source is none of these, holds no images, or one of them cannot be read (with its file and row).
    """
    prompts, attributes = (), {}
    if source == "digits":
        images, labels = digits(resolution)
    elif count := letters_in(source):
        rows = letters.some(count)
        images, labels, prompts = letters.draw(rows, resolution), rows[:, 0], tuple(map(letters.prompt, rows.tolist()))
        attributes = dict(zip(letters.ATTRIBUTES, rows.T))
    else:
        images, labels, prompts = files.read(source, resolution)
    counts = np.unique(labels, return_counts=True)[1]
    rare = counts.min() < 2 or min(held_out, 1 - held_out) * len(images) < len(counts)
    train, rest = train_test_split(np.arange(len(images)), test_size=held_out, random_state=seed,
                                   stratify=None if rare else labels)
    train, rest = torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(rest))
    return DataSet(source, images, labels, train, rest, prompts, attributes)


def letters_in(source: str) -> int:
    """Give how many letters a source asks for: 0 where it is none of "letters" and "letters:COUNT"."""
    found = re.fullmatch("letters(?::([1-9][0-9]*))?", source)
    return int(found[1] or LETTERS) if found else 0


def digest(source: str, kind: str = "dataset") -> str:
    """Give a hash of what a source holds, so that nothing goes on from what other images left.

    Of "digits" and letters it is the version of the package that ships them or their fonts, of the hub the revision
    (asked for, where none or a branch is named), of files their names and bytes.

    Parameters
    ----------
    source : str, as `load` takes it, or a model's folder or hub:OWNER/NAME
    kind : "dataset" or "model", of the hub

    Raises
    ------
    ValueError
        If the hub does not say which revision it would give.
    """
    path = Path(source)
    if source == "digits":
        return f"scikit-learn {version('scikit-learn')}"
    if letters_in(source):
        return f"{source} matplotlib {version('matplotlib')}"
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition(":")[0].partition("@")
        if not re.fullmatch("[0-9a-f]{40}", revision):  # none, or a branch, which moves
            try:
                revision = HfApi().repo_info(name, repo_type=kind, revision=revision or None).sha
            except Exception as error:  # whatever the library raises of a repository that it cannot reach
                raise ValueError(f"the hub does not say which revision {source} is ({type(error).__name__}): name one, "
                                 f"{HUB}{name}@REVISION, and nothing has to be asked") from None
        return f"{source} {revision}"
    if not path.exists():
        return source
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            found.update(str(file.relative_to(path)).encode() + hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def digits(resolution: int) -> tuple[Tensor, Tensor]:
    """Give scikit-learn's 1,797 scanned digits, 8 x 8 pixels, enlarged bicubically.

    Parameters
    ----------
    resolution : int, pixels a side, a multiple of 8

    Returns
    -------
    images : Tensor, (1797, 1, resolution, resolution), float32, in [-1, 1]
    labels : Tensor, (1797,), int64, 0..9
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    images = F.interpolate(images, size=(resolution, resolution), mode="bicubic", antialias=True).clamp(0, 1)
    return images * 2 - 1, torch.from_numpy(bunch.target).long()


def to_uint8(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to 0..255, clipping what lies outside."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
