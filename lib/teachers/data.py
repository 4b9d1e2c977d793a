"""Data sets: images in [-1, 1] with labels and a split made by seed.

Besides scikit-learn's digits, which come with the package, whatever `datasets` (Hugging Face) reads: folders of images,
parquet files, data sets of the hub.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

HUB = "hub:"
COLUMNS = ("image", "img")
"""What a column of images is called."""


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


def load(source: str, resolution: int, held_out: float, seed: int) -> DataSet:
    """Load a data set and split it, each class in proportion.

    Parameters
    ----------
    source : str
        "digits" (scikit-learn's), a folder of images (labels are the names of its subfolders, if it has any), a parquet
        file or a folder of them, or "hub:OWNER/NAME" or "hub:OWNER/NAME:SPLIT" (split "train", if none is given).
    resolution : int
        Pixels a side: images are cut to their middle square and resized bicubically, with antialiasing.
    held_out : float, fraction of the images that no training sees, in (0, 1)
    seed : int, of the split

    Raises
    ------
    ValueError
        If the source is none of these, holds no images, or one of them cannot be read (with its file and row).
    """
    images, labels = digits(resolution) if source == "digits" else _read(source, resolution)
    rare = np.bincount(labels).min(initial=len(labels), where=np.bincount(labels) > 0) < 2
    train, rest = train_test_split(np.arange(len(images)), test_size=held_out, random_state=seed,
                                   stratify=None if rare else labels)
    return DataSet(source, images, labels, torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(rest)))


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


def _read(source: str, resolution: int) -> tuple[Tensor, Tensor]:
    """Give all images and labels of a source; grey if the first image is grey."""
    pixels, labels, mode = [], [], None
    for where, picture, label in tqdm(_records(source), desc=f"reading {source}", unit="image"):
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture))
            mode = mode or ("L" if image.mode in ("1", "L", "I;16") else "RGB")
            square = ImageOps.fit(image.convert(mode), (resolution, resolution), Image.Resampling.BICUBIC)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{where}: no image that can be read ({error}). Mend it or take it out.") from None
        if label is not None and not isinstance(label, int):
            raise ValueError(f"{where}: the label is {label!r:.40}, must be a whole number")
        pixels.append(torch.from_numpy(np.array(square)).view(resolution, resolution, -1))
        labels.append(label or 0)
    if len(pixels) < 10:
        raise ValueError(f"{source} holds {len(pixels)} images; that is too few to learn from.")
    # Laid out channel by channel: with channels last, torch's group norm crashes on the CPU where its input wants no
    # gradient, as in a level that is distilled.
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1, torch.tensor(labels)


def _records(source: str) -> Iterator[tuple[str, bytes | str, int | None]]:
    """Walk a source: where each image is, its bytes or its path, and its label."""
    import datasets  # slow to import, and digits need none of it

    path = Path(source)
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        wanted = {"path": name, "split": split or "train"}
    elif not path.exists():
        raise ValueError(f"no data set {source!r}: it is neither 'digits' nor a file or folder that exists. A data set "
                         f"of the Hugging Face hub is written {HUB}OWNER/NAME.")
    elif path.is_dir() and not (files := sorted(map(str, path.glob("*.parquet")))):
        if not any(file.suffix.lower() in Image.registered_extensions() for file in path.rglob("*")):
            raise ValueError(f"{source} holds neither images nor parquet files.")
        wanted = {"path": "imagefolder", "data_dir": source, "split": "train"}
    else:
        wanted = {"path": "parquet", "data_files": [source] if path.is_file() else files, "split": "train"}
    try:
        table = datasets.load_dataset(**wanted)
    except Exception as error:  # whatever the library raises of a source that it cannot read
        raise ValueError(f"{source} cannot be read as a data set: {type(error).__name__}: {error}") from None
    column = next((name for name in COLUMNS if name in table.column_names), None)
    if column is None:
        raise ValueError(f"{source} has no column of images ({' or '.join(COLUMNS)}); its columns: "
                         f"{', '.join(table.column_names)}")
    for row, record in enumerate(table.cast_column(column, datasets.Image(decode=False))):
        file = record[column]["path"]
        yield f"{source}, row {row}" + f" ({file})" * bool(file), record[column]["bytes"] or file, record.get("label")
