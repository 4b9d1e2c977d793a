"""A network as named blocks: which modules make a block, what it reads, and which cells of a grid are live.

A UNet's finest block is a *layer*: one residual block with the attention behind it, a down-sampler, the middle, an
up-sampler. Layers group into *levels* (a resolution going down or up, the middle). ``down0`` is the first level and
``up0`` the deepest one, as in diffusers. A reused block gives its last *output*. A transformer's block is one
transformer block, ``block0`` the first; a reused one adds its last *residual* change: with outputs kept, a reused block
would make all before it dead. Stem (what comes before, time embedding) and head (what comes after) belong to no block:
they run at every network call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

STEM = "stem"


@dataclass(frozen=True)
class Block:
    """One layer of the network.

    Attributes
    ----------
    name : str, such as "down0.1", "down0.down", "mid", "up2.up"
    level : str, such as "down0"
    modules : tuple of str
        Module paths in the model, in the order in which they run; the last one gives the block's output.
    reads : tuple of str
        The blocks whose outputs it reads (`STEM` for the stem's): the one before it first, then the skip connection.
    """

    name: str
    level: str
    modules: tuple[str, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """A network's blocks in the order in which they run; the head reads the last one.

    Attributes
    ----------
    blocks : tuple of Block, (N,)
    level_modules : dict of str to str
        The module that runs a whole level.
    cache : "output" or "residual"
        What a reused block reuses: its last output, or its last change from input to output.
    """

    blocks: tuple[Block, ...]
    level_modules: dict[str, str]
    cache: str = "output"

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The blocks' names, (N,)."""
        return tuple(block.name for block in self.blocks)

    @cached_property
    def index(self) -> dict[str, int]:
        """Each name's place in the order of running."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def levels(self) -> dict[str, list[int]]:
        """For each level the places of its blocks."""
        groups: dict[str, list[int]] = {}
        for i, block in enumerate(self.blocks):
            groups.setdefault(block.level, []).append(i)
        return groups

    @cached_property
    def reads(self) -> list[list[int]]:
        """For each block the places of the blocks it reads; the stem, which always runs, is left out."""
        return [[self.index[name] for name in block.reads if name != STEM] for block in self.blocks]

    @cached_property
    def skips(self) -> tuple[tuple[str, int], ...]:
        """The skip connections from the shallowest: (block or stem that gives it, place of the block that reads it)."""
        found = [(block.reads[1], i) for i, block in enumerate(self.blocks) if len(block.reads) == 2]
        return tuple(reversed(found))

    @property
    def branches(self) -> int:
        """How many branches there are: the skip connections, or all numbers of leading blocks."""
        return len(self.skips) if self.cache == "output" else len(self) - 1

    def branch(self, number: int) -> np.ndarray:
        """Say which blocks a partial step runs.

        Parameters
        ----------
        number : int
            On UNets the skip connection at which the cached feature enters (DeepCache), 0 the shallowest (the stem's:
            only the last block runs). On transformers the last of the leading blocks that run.

        Returns
        -------
        shallow : (N,), bool
        """
        if not 0 <= number < self.branches:
            raise ValueError(f"branch {number}: this network has branches 0..{self.branches - 1}")
        if self.cache == "residual":
            return np.arange(len(self)) <= number
        giver, reader = self.skips[number]
        shallow = np.zeros(len(self), dtype=bool)
        shallow[reader:] = True
        if giver != STEM:
            shallow[:self.index[giver] + 1] = True
        return shallow

    def liveness(self, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the cells that have to run, and those whose output has to be kept.

        A computing cell is live if its output is read in its own column, or from the cache before it computes again.
        The head reads the last block in every column that makes a network call; a column in which nothing is live makes
        none. Where blocks cache residual changes every block's input flows on, so all computing cells are live.

        Parameters
        ----------
        compute : (S, N), bool

        Returns
        -------
        live : (S, N), bool
        stored : (S, N), bool
            Live cells whose output a later column reads.
        """
        steps, last = len(compute), len(self) - 1
        if self.cache == "residual":
            return compute.copy(), np.concatenate([compute[:-1] & ~compute[1:], np.zeros_like(compute[:1])])
        live, stored = np.zeros_like(compute), np.zeros_like(compute)
        later = np.zeros(len(self), dtype=bool)  # is the cached output read in a column behind this one?
        for step in range(steps - 1, -1, -1):
            row, needed = compute[step], later.copy()
            needed[last] |= row[last]  # the head
            for i in range(last, -1, -1):
                if row[i] and needed[i]:
                    live[step, i] = True
                    stored[step, i] = later[i]
                    needed[self.reads[i]] = True
            if live[step].any():
                needed[last] = True
            later = needed & ~row
        return live, stored

    def calls(self, live: np.ndarray) -> np.ndarray:
        """Say at which steps the network is called, (S,), bool: stem and head run there.

        Parameters
        ----------
        live : (S, N), bool, from `liveness`
        """
        return live.any(axis=1) if self.cache == "output" else np.ones(len(live), dtype=bool)


LEVELS = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D",
          "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
"""The UNet levels that are known here."""


def describe(model: nn.Module) -> Blocks:
    """Describe a network as blocks.

    Raises
    ------
    TypeError
        If the model, or one of its levels, is of a kind that is not supported.
    """
    if isinstance(model, UNet2DModel | UNet2DConditionModel):
        return _unet(model)
    stack = getattr(model, "transformer_blocks", ())
    if len(stack) and all(isinstance(block, BasicTransformerBlock) for block in stack):
        paths = {f"block{i}": f"transformer_blocks.{i}" for i in range(len(stack))}
        found = [Block(name, name, (paths[name],), (before,)) for before, name in pairwise([STEM, *paths])]
        return Blocks(tuple(found), paths, "residual")
    raise TypeError(f"{type(model).__name__} is not supported. Supported: UNet2DModel, UNet2DConditionModel, and "
                    "transformers whose transformer_blocks are BasicTransformerBlocks (DiTTransformer2DModel, "
                    "PixArtTransformer2DModel).")


def example_conditions(model: nn.Module, count: int, device: torch.device | str) -> dict[str, Tensor | dict]:
    """Give what a network reads besides image and timestep, of the right shapes, for `count` images."""
    config = model.config
    if isinstance(model, UNet2DConditionModel):
        given = {"encoder_hidden_states": torch.zeros(count, 77, _widest(config.cross_attention_dim), device=device)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            given["added_cond_kwargs"] = {"text_embeds": torch.zeros(count, pooled, device=device),
                                          "time_ids": torch.zeros(count, 6, device=device)}
        return given
    if config.get("caption_channels"):
        return {"encoder_hidden_states": torch.zeros(count, 120, config.caption_channels, device=device),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    labelled = config.get("num_embeds_ada_norm") if hasattr(model, "transformer_blocks") else config.num_class_embeds
    return {"class_labels": torch.zeros(count, dtype=torch.long, device=device)} if labelled else {}


def _widest(widths: int | tuple[int, ...]) -> int:
    return widths if isinstance(widths, int) else max(widths)


def _unet(model: UNet2DModel | UNet2DConditionModel) -> Blocks:
    if isinstance(model, UNet2DModel) and model.config.time_embedding_type == "fourier":
        raise TypeError("time_embedding_type fourier is not supported: there the timestep scales the output, so a "
                        "reused output is not what the network would give.")
    for module in (*model.down_blocks, model.mid_block, *model.up_blocks):
        if type(module).__name__ not in LEVELS:
            raise TypeError(f"a level of type {type(module).__name__} is not supported. Supported: "
                            f"{', '.join(LEVELS)}.")
    blocks: list[Block] = []
    skips, before = [STEM], STEM
    modules: dict[str, str] = {}
    for i, level in enumerate(model.down_blocks):
        name, path = f"down{i}", f"down_blocks.{i}"
        modules[name] = path
        for block in _layers(level, name, path, "downsamplers", "down"):
            blocks.append(Block(block[0], name, block[1], (before,)))
            before = block[0]
            skips.append(before)
    modules["mid"] = "mid_block"
    blocks.append(Block("mid", "mid", ("mid_block",), (before,)))
    before = "mid"
    for i, level in enumerate(model.up_blocks):
        name, path = f"up{i}", f"up_blocks.{i}"
        modules[name] = path
        for block in _layers(level, name, path, "upsamplers", "up"):
            skip = () if block[0].endswith(".up") else (skips.pop(),)
            blocks.append(Block(block[0], name, block[1], (before, *skip)))
            before = block[0]
    return Blocks(tuple(blocks), modules)


def _layers(level: nn.Module, name: str, path: str, samplers: str, sampler: str) -> list[tuple[str, tuple[str, ...]]]:
    """Give name and module paths of each layer of one level, its down- or up-sampler last."""
    attentions = getattr(level, "attentions", None) or [None] * len(level.resnets)
    layers = []
    for j, attention in enumerate(attentions):
        modules = (f"{path}.resnets.{j}",) + ((f"{path}.attentions.{j}",) if attention is not None else ())
        layers.append((f"{name}.{j}", modules))
    if getattr(level, samplers) is not None:
        layers.append((f"{name}.{sampler}", (f"{path}.{samplers}.0",)))
    return layers
