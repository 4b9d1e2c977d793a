"""Letters: images of one character each, drawn as many as one likes, with a prompt: "a red bold serif R on yellow".

The fonts are those that matplotlib ships, so nothing has to be fetched. Each image has four attributes, and its prompt
says them all; so a classifier can say whether an image shows what was asked for. Some combinations of a character and
an ink are in no data set: they show whether prompts compose.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CHARACTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
STYLES = {"sans": "DejaVuSans", "bold sans": "DejaVuSans-Bold", "serif": "DejaVuSerif",
          "bold serif": "DejaVuSerif-Bold", "italic": "STIXGeneralItalic", "bold italic": "STIXGeneralBolIta"}
COLOURS = {"black": (20, 20, 20), "white": (240, 240, 240), "red": (215, 45, 45), "green": (45, 160, 70),
           "blue": (45, 75, 215), "yellow": (240, 210, 50), "purple": (150, 60, 190), "cyan": (70, 205, 220)}
ATTRIBUTES = {"character": CHARACTERS, "style": tuple(STYLES), "ink": tuple(COLOURS), "ground": tuple(COLOURS)}
"""What a letter's row of four numbers means: a place in each of these, in this order."""

TURN, SHIFT, SIZES, COLOUR = 4.0, 0.02, (0.95, 1.2), 8.0
"""How letters differ: deviation of the turn in degrees, of the shift in sides of the image, least and greatest size,
deviation of each colour channel of 0..255."""
FINE, CAPITAL = 96, 50  # pixels a side of a glyph's page before it is turned and sized, and of a capital's height there


def every() -> Tensor:
    """Give all letters that there are, (m, 4), int64: all attributes with each other, but no ink on its own ground."""
    rows = torch.cartesian_prod(*(torch.arange(len(values)) for values in ATTRIBUTES.values()))
    return rows[rows[:, 2] != rows[:, 3]]


def unseen(rows: Tensor) -> Tensor:
    """Say of letters (n, 4) which are in no data set, (n,), bool: three characters of each ink."""
    return (rows[:, 0] + 5 * rows[:, 2]) % 12 == 0


def prompt(row: Sequence[int]) -> str:
    """Say a letter, (4,): "a red bold serif R on yellow"."""
    character, style, ink, ground = (values[int(place)] for values, place in zip(ATTRIBUTES.values(), row))
    return f"a {ink} {style} {character} on {ground}"


@cache
def _prompts() -> dict[str, tuple[int, ...]]:
    return {prompt(row): tuple(row) for row in every().tolist()}


def read(said: str) -> tuple[int, ...]:
    """Give the letter, four numbers, that a prompt asks for.

    Raises
    ------
    ValueError
        If it asks for none, saying how one is asked for.
    """
    if said not in _prompts():
        raise ValueError(f"{said!r} asks for no letter: say 'a INK STYLE CHARACTER on GROUND', such as "
                         f"{prompt((17, 3, 2, 5))!r}, with a capital or a digit; styles: {', '.join(STYLES)}; inks and "
                         f"grounds, two different ones: {', '.join(COLOURS)}")
    return _prompts()[said]


def some(count: int) -> Tensor:
    """Give letters of a data set, (count, 4), int64: of all that are not `unseen` alike; more of them begin alike."""
    known = every()
    known = known[~unseen(known)]
    return known[torch.from_numpy(np.random.default_rng(0).integers(len(known), size=count))]


def draw(rows: Tensor, resolution: int, seed: int = 0) -> Tensor:
    """Draw letters, each with its own turn, shift, size and colours; more of them begin alike.

    Parameters
    ----------
    rows : Tensor, (n, 4)
    resolution : int, pixels a side
    seed : int

    Returns
    -------
    images : Tensor, (n, 3, resolution, resolution), float32, in [-1, 1], of 256 levels
    """
    chance = np.random.default_rng((seed, 1)).standard_normal((len(rows), 10), dtype=np.float32)
    chance = torch.from_numpy(chance).split(1000)
    return torch.cat([_drawn(some, own, resolution) for some, own in zip(rows.split(1000), chance)])


def _drawn(rows: Tensor, chance: Tensor, resolution: int) -> Tensor:
    """Draw letters with these standard normal numbers, (n, 10)."""
    turn, share = torch.deg2rad(TURN * chance[:, 0]), torch.special.ndtr(chance[:, 1])
    size = SIZES[0] + (SIZES[1] - SIZES[0]) * share
    cosine, sine = turn.cos() / size, turn.sin() / size
    move = 2 * SHIFT * chance[:, 2:4]  # grids go from -1 to 1
    affine = torch.stack([torch.stack([cosine, -sine, move[:, 0]], 1), torch.stack([sine, cosine, move[:, 1]], 1)], 1)
    grid = F.affine_grid(affine, [len(rows), 1, 2 * resolution, 2 * resolution], align_corners=False)
    fine = F.grid_sample(_glyphs()[rows[:, 1], rows[:, 0]], grid, align_corners=False)
    there = F.avg_pool2d(fine, 2)
    paints = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    ink, ground = ((paints[rows[:, place]] + COLOUR * chance[:, first:first + 3])[:, :, None, None]
                   for place, first in ((2, 4), (3, 7)))
    return (there * ink + (1 - there) * ground).round().clamp(0, 255) / 127.5 - 1


@cache
def _glyphs() -> Tensor:
    """Draw each character in each style, black on white, (styles, characters, 1, FINE, FINE), in [0, 1]."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    made = []
    for file in STYLES.values():
        _, top, _, bottom = ImageFont.truetype(fonts / f"{file}.ttf", 1000).getbbox("H")
        font = ImageFont.truetype(fonts / f"{file}.ttf", 1000 * CAPITAL / (bottom - top))
        for character in CHARACTERS:
            page = Image.new("L", (FINE, FINE))
            ImageDraw.Draw(page).text((FINE / 2, FINE / 2), character, fill=255, font=font, anchor="mm")
            left, top, right, bottom = page.getbbox()
            middle = (FINE - left - right) // 2, (FINE - top - bottom) // 2
            made.append(np.roll(np.asarray(page), middle[::-1], (0, 1)))
    return torch.from_numpy(np.stack(made)).float().view(len(STYLES), len(CHARACTERS), 1, FINE, FINE) / 255
