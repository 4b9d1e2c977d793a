"""Images in files: folders, parquet files and data sets of the hub, with the labels and prompts that stand beside them.

All that there is is read: libraries take names such as "train" or "test" for splits and leave others out.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import parquet
from torch import Tensor
from tqdm import tqdm

HUB = "hub:"
COLUMNS, LABELS, PROMPTS = ("image", "img"), ("label", "labels"), ("text", "prompt", "caption")
"""What columns of images, of their labels and of what they show are called."""
TOLD = ("metadata.csv", "metadata.jsonl")
"""Files of a folder that say something about its images: a row an image, named in the column file_name."""
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes without colour."""


class Record(NamedTuple):
    """An image of a source: where it stands, its bytes or its path, its label and its prompt, where there are any."""

    where: str
    picture: bytes | str
    label: Any = None
    prompt: Any = None


def read(source: str, resolution: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Give all images, labels and prompts of a source, as `lib.teachers.data.load` says; grey if all images are grey.

    Raises
    ------
    ValueError
        If the source holds no images, or one of them, its label or its prompt cannot be read (with its file and row).
    """
    squares, records = [], []
    for record in tqdm(_records(source), desc=f"reading {source}", unit="image"):
        where, picture, _, _ = record
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture))
            square = ImageOps.fit(_eight_bits(image), (resolution, resolution), Image.Resampling.BICUBIC)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{where}: no image that can be read ({error}). Mend it or take it out.") from None
        squares.append(square)
        records.append(record._replace(picture=b""))
    if len(squares) < 10:
        raise ValueError(f"{source} holds {len(squares)} images; that is too few to learn from.")
    _check_alike(records)
    labels = [record.label for record in records]
    said = records[0].prompt is not None
    mode = "L" if all(square.mode == "L" for square in squares) else "RGB"
    print(f"{source}: {len(squares)} {'grey' if mode == 'L' else 'colour'} images read, with "
          f"{len(set(labels)) if labels[0] is not None else 'no'} labels" + " and a prompt each" * said)
    # Laid out channel by channel: with channels last, torch's group norm crashes on the CPU where its input wants no
    # gradient, as in a level that is distilled.
    pixels = np.stack([np.asarray(square.convert(mode)).reshape(resolution, resolution, -1) for square in squares])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    prompts = tuple(record.prompt for record in records) if said else ()
    return images, torch.tensor([label or 0 for label in labels]), prompts


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


def _check_alike(records: list[Record]) -> None:
    """Refuse labels that name no class (whole numbers from 0 on), empty prompts, and images with less than the first.

    Raises
    ------
    ValueError
        Naming the image.
    """
    first = records[0]
    for where, _, label, prompt in records:
        for name, own, firsts in (("label", label, first.label), ("prompt", prompt, first.prompt)):
            if (own is None) != (firsts is None):
                raise ValueError(f"{where}: {f'no {name}' if own is None else f'the {name} is {own!r:.40}'}, where the "
                                 f"first image has {'none' if firsts is None else 'one'}: give all images a {name} or "
                                 "none")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise ValueError(f"{where}: the label is {label!r:.40}, must be a whole number")
        if label is not None and not 0 <= label < len(records):
            raise ValueError(f"{where}: the label is {label}, must lie in 0..{len(records) - 1}: number the classes "
                             "from 0 on, and leave out images without one")
        if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(f"{where}: the prompt is {prompt!r:.40}, must be text")


def _records(source: str) -> Iterator[Record]:
    """Walk a source."""
    path = Path(source)
    if source.startswith(HUB):
        yield from _of_hub(source)
    elif not path.exists():
        raise ValueError(f"no data set {source!r}: it is none of 'digits', 'letters', a file or folder that exists. "
                         f"A data set of the Hugging Face hub is written {HUB}OWNER/NAME.")
    elif path.is_file():
        yield from _of_parquet(source, [path])
    elif parquets := sorted(path.glob("*.parquet")):
        yield from _of_parquet(source, parquets)
    else:
        yield from _of_folder(source)


def _of_folder(source: str) -> Iterator[Record]:
    """Walk the images of a folder, all of them, in the order of their names."""
    files = [file for file in sorted(Path(source).rglob("*")) if file.is_file() and not file.name.startswith(".")]
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [file for file in files if file.suffix.lower() in readable]
    if not pictures:
        raise ValueError(f"{source} holds neither images nor parquet files.")
    print(f"{source}: {len(pictures)} of {len(files)} files are images")
    names = sorted({file.parent.name for file in pictures})
    labelled = all(file.parent != Path(source) for file in pictures)
    prompts = {}
    for told in (file for file in files if file.name in TOLD):
        for place, image, prompt in _told(told):
            if image in prompts:
                raise ValueError(f"{place}: {image} has a prompt already, {prompts[image]!r:.40}. Leave one of them.")
            prompts[image] = prompt
    for file in pictures:
        yield Record(str(file), str(file), names.index(file.parent.name) if labelled else None,
                     prompts.get(file.resolve()))


def _told(file: Path) -> Iterator[tuple[str, Path, Any]]:
    """Read the prompts that a folder's file of captions gives its images: the row, the image, its prompt."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as content:
            rows = list(csv.DictReader(content)) if file.suffix == ".csv" else [json.loads(row) for row in content]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    columns = set(rows[0]) if rows and isinstance(rows[0], dict) else set()
    said = next((name for name in PROMPTS if name in columns), None)
    if said is None or "file_name" not in columns:
        raise ValueError(f"{file} must have file_name and one of {', '.join(PROMPTS)} in each row, and nothing else is "
                         "read of it: put each class into a subfolder of its name, or images and labels into a parquet "
                         "file")
    for number, row in enumerate(rows):
        image = file.parent / str(row.get("file_name"))
        if not image.is_file():
            raise ValueError(f"{file}, row {number}: there is no {image}. Mend the row or take it out.")
        yield f"{file}, row {number}", image.resolve(), row.get(said)


def _of_parquet(source: str, files: list[Path]) -> Iterator[Record]:
    """Walk the rows of parquet files."""
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            columns = table.schema_arrow.names
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file} cannot be read as a data set: {type(error).__name__}: {error}") from None
        image, *others = _columns(source, columns)
        rows = (row for batch in table.iter_batches(64, columns=[image, *filter(None, others)])
                for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield _record(f"{file}, row {number}", row[image], *map(row.get, others))


def _of_hub(source: str) -> Iterator[Record]:
    """Walk a split of a data set of the Hugging Face hub."""
    import datasets  # slow to import, and all else needs none of it

    name, _, split = source.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    try:
        table = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except Exception as error:  # whatever the library raises of a source that it cannot read
        raise ValueError(f"{source} cannot be read as a data set: {type(error).__name__}: {error}") from None
    image, *others = _columns(source, table.column_names)
    for number, row in enumerate(table.cast_column(image, datasets.Image(decode=False))):
        yield _record(f"{source}, row {number}", row[image], *map(row.get, others))


def _columns(source: str, names: list[str]) -> tuple[str, str | None, str | None]:
    """Find the columns of images, of labels and of prompts."""
    image, label, prompt = (next((name for name in known if name in names), None)
                            for known in (COLUMNS, LABELS, PROMPTS))
    if image is None:
        raise ValueError(f"{source} has no column of images ({' or '.join(COLUMNS)}); its columns: {', '.join(names)}")
    return image, label, prompt


def _record(where: str, cell: dict, label: Any, prompt: Any) -> Record:
    """Give a row's record; its image is {bytes, path}."""
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise ValueError(f"{where}: no image, where its bytes or its path should stand. Mend it or take it out.")
    path = cell.get("path")
    return Record(where + f" ({path})" * bool(path), cell.get("bytes") or path, label, prompt)


def where(source: str) -> dict[str, str | None]:
    """Give a model's folder, or hub:OWNER/NAME or hub:OWNER/NAME@REVISION, as `from_pretrained` takes it."""
    name, revision = source, None
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision or None}


def lines(path: Path | None) -> list[str]:
    """Read prompts, or class numbers, one a line; of no file, none.

    Raises
    ------
    ValueError
        If the file holds none.
    """
    text = path.read_text(encoding="utf-8-sig") if path else ""  # some editors write a mark before the first word
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if path and not found:
        raise ValueError(f"prompts: {path} holds none: write one a line")
    return found
