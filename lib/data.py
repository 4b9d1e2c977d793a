"""Data sets: images in [-1, 1] with labels and a split made by seed."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class DataSet:
    """Images with labels and a fixed split.

    Attributes
    ----------
    name : str
    images : Tensor, (n, C, H, W), float32, in [-1, 1]
    labels : Tensor, (n,), int64
    train, held_out : Tensor, int64
        Row numbers; together each row once.
    """

    name: str
    images: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])


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


SOURCES = {"digits": digits}


def load(name: str, resolution: int, held_out: float, seed: int) -> DataSet:
    """Load a data set and split it, each class in proportion.

    Parameters
    ----------
    name : str, a key of `SOURCES`
    resolution : int, pixels a side
    held_out : float, fraction of the images that no training sees, in (0, 1)
    seed : int, of the split

    Raises
    ------
    ValueError
        If the data set is unknown.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}. Known: {', '.join(SOURCES)}.")
    images, labels = SOURCES[name](resolution)
    train, rest = train_test_split(np.arange(len(images)), test_size=held_out, random_state=seed, stratify=labels)
    return DataSet(name, images, labels, torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(rest)))


def to_uint8(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to 0..255, clipping what lies outside."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
