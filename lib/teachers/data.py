"""Data sets: images in [-1, 1] with labels and a split made by seed.

Besides scikit-learn's digits, which come with the package: folders of images, parquet files, data sets of the hub.
Files are read here, all that there are: libraries take names such as "train" or "test" for splits and leave others out.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import parquet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

HUB = "hub:"
COLUMNS, LABELS = ("image", "img"), ("label", "labels")
"""What columns of images, and of their labels, are called."""
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes without colour."""


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
        "digits" (scikit-learn's), a folder of images (if each lies in a subfolder, the subfolder's name is its label),
        a parquet file or a folder of them (whole numbers in a column label or labels), or "hub:OWNER/NAME",
        "hub:OWNER/NAME:SPLIT" (split "train", if none is given) or "hub:OWNER/NAME@REVISION:SPLIT".
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
    images, labels = digits(resolution) if source == "digits" else _read(source, resolution)
    counts = np.unique(labels, return_counts=True)[1]
    rare = counts.min() < 2 or min(held_out, 1 - held_out) * len(images) < len(counts)
    train, rest = train_test_split(np.arange(len(images)), test_size=held_out, random_state=seed,
                                   stratify=None if rare else labels)
    return DataSet(source, images, labels, torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(rest)))


def digest(source: str, kind: str = "dataset") -> str:
    """Give a hash of what a source holds, so that nothing goes on from what other images left.

    Of "digits" it is the version of the package that ships them, of the hub the revision (asked for, where none or a
    branch is named), of files their names and bytes.

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


def _read(source: str, resolution: int) -> tuple[Tensor, Tensor]:
    """Give all images and labels of a source; grey if all images are grey."""
    squares, labels, places = [], [], []
    for where, picture, label in tqdm(_records(source), desc=f"reading {source}", unit="image"):
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture))
            square = ImageOps.fit(_eight_bits(image), (resolution, resolution), Image.Resampling.BICUBIC)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{where}: no image that can be read ({error}). Mend it or take it out.") from None
        squares.append(square)
        labels.append(label)
        places.append(where)
    if len(squares) < 10:
        raise ValueError(f"{source} holds {len(squares)} images; that is too few to learn from.")
    _check_labels(labels, places)
    mode = "L" if all(square.mode == "L" for square in squares) else "RGB"
    print(f"{source}: {len(squares)} {'grey' if mode == 'L' else 'colour'} images read, with "
          f"{len(set(labels)) if labels[0] is not None else 'no'} labels")
    # Laid out channel by channel: with channels last, torch's group norm crashes on the CPU where its input wants no
    # gradient, as in a level that is distilled.
    pixels = np.stack([np.asarray(square.convert(mode)).reshape(resolution, resolution, -1) for square in squares])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    return images, torch.tensor([label or 0 for label in labels])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Give an image in mode L or RGB, on white where it is transparent."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # Pillow would clip what lies above 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, where 16 bits hold 0 to 65535")
        return Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("grey values that are no whole numbers; save it with 8 or 16 bits")
    mode = "L" if image.mode in GREY else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert(mode)


def _check_labels(labels: list, places: list[str]) -> None:
    """Refuse labels that name no class: they are whole numbers from 0 on, of all images or of none."""
    for label, where in zip(labels, places):
        if (label is None) != (labels[0] is None):
            raise ValueError(f"{where}: {'no label' if label is None else f'the label is {label!r:.40}'}, where the "
                             f"first image has {'none' if labels[0] is None else 'one'}: label all images or none")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise ValueError(f"{where}: the label is {label!r:.40}, must be a whole number")
        if label is not None and not 0 <= label < len(labels):
            raise ValueError(f"{where}: the label is {label}, must lie in 0..{len(labels) - 1}: number the classes "
                             "from 0 on, and leave out images without one")


def _records(source: str) -> Iterator[tuple[str, bytes | str, int | None]]:
    """Walk a source: where each image is, its bytes or its path, and its label."""
    path = Path(source)
    if source.startswith(HUB):
        yield from _of_hub(source)
    elif not path.exists():
        raise ValueError(f"no data set {source!r}: it is neither 'digits' nor a file or folder that exists. A data set "
                         f"of the Hugging Face hub is written {HUB}OWNER/NAME.")
    elif path.is_file():
        yield from _of_parquet(source, [path])
    elif parquets := sorted(path.glob("*.parquet")):
        yield from _of_parquet(source, parquets)
    else:
        yield from _of_folder(source)


def _of_folder(source: str) -> Iterator[tuple[str, str, int | None]]:
    """Walk the images of a folder, all of them, in the order of their names."""
    files = [file for file in sorted(Path(source).rglob("*")) if file.is_file() and not file.name.startswith(".")]
    if told := next((file for file in files if file.name in ("metadata.csv", "metadata.jsonl")), None):
        raise ValueError(f"{told} says something about the images, which is not read here: put each class into a "
                         "subfolder of its name, or images and labels into a parquet file")
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [file for file in files if file.suffix.lower() in readable]
    if not pictures:
        raise ValueError(f"{source} holds neither images nor parquet files.")
    print(f"{source}: {len(pictures)} of {len(files)} files are images")
    names = sorted({file.parent.name for file in pictures})
    labelled = all(file.parent != Path(source) for file in pictures)
    for file in pictures:
        yield str(file), str(file), names.index(file.parent.name) if labelled else None


def _of_parquet(source: str, files: list[Path]) -> Iterator[tuple[str, bytes | str, int | None]]:
    """Walk the rows of parquet files."""
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            columns = table.schema_arrow.names
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file} cannot be read as a data set: {type(error).__name__}: {error}") from None
        image, label = _columns(source, columns)
        rows = (row for batch in table.iter_batches(64, columns=[image] + [label] * bool(label))
                for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield _record(f"{file}, row {number}", row[image], row.get(label))


def _of_hub(source: str) -> Iterator[tuple[str, bytes | str, int | None]]:
    """Walk a split of a data set of the Hugging Face hub."""
    import datasets  # slow to import, and all else needs none of it

    name, _, split = source.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    try:
        table = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except Exception as error:  # whatever the library raises of a source that it cannot read
        raise ValueError(f"{source} cannot be read as a data set: {type(error).__name__}: {error}") from None
    image, label = _columns(source, table.column_names)
    for number, row in enumerate(table.cast_column(image, datasets.Image(decode=False))):
        yield _record(f"{source}, row {number}", row[image], row.get(label))


def _columns(source: str, names: list[str]) -> tuple[str, str | None]:
    """Find the columns of images and of labels."""
    image = next((name for name in COLUMNS if name in names), None)
    if image is None:
        raise ValueError(f"{source} has no column of images ({' or '.join(COLUMNS)}); its columns: {', '.join(names)}")
    return image, next((name for name in LABELS if name in names), None)


def _record(where: str, cell: dict, label: int | None) -> tuple[str, bytes | str, int | None]:
    """Give a row's image, {bytes, path}, and label."""
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise ValueError(f"{where}: no image, where its bytes or its path should stand. Mend it or take it out.")
    path = cell.get("path")
    return where + f" ({path})" * bool(path), cell.get("bytes") or path, label
