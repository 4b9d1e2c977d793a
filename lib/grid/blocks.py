"""A network as named blocks: which modules make a block, what it reads, and which cells of a grid are live.

A UNet's finest block is a *layer*: one residual block with the attention behind it, a down-sampler, the middle, an
up-sampler. Layers group into *levels* (a resolution going down or up, the middle). ``down0`` is the first level and
``up0`` the deepest one, as in diffusers. A block that does not compute holds or forecasts its *output*. A transformer's
block is one transformer block, ``block0`` the first; what is held or forecast is its *residual* change: with outputs
kept, a reused block would make all before it dead. Stem (what comes before, time embedding) and head (what comes after)
belong to no block: they run at every network call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
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
        Module paths in the network, in the order in which they run; the last one gives the block's output.
    reads : tuple of str
        The blocks whose outputs it reads (`STEM` for the stem's): the one before it first, then the skip connection.
    changes : tuple of str
        Of a transformer's block, the arguments that it changes (streams of tokens), in the order in which it gives
        them.
    """

    name: str
    level: str
    modules: tuple[str, ...]
    reads: tuple[str, ...]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """A network's blocks in the order in which they run; the head reads the last one.

    Attributes
    ----------
    blocks : tuple of Block, (N,)
    level_modules : dict of str to str
        The module that runs a whole level.
    cache : "output" or "residual"
        What a block that does not compute holds or forecasts: its output, or its change from input to output.
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
        return wiring(self.names)

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

    def life(self, cells: np.ndarray, net: np.ndarray | None = None) -> "Life":
        """Find the cells that have to run, and what has to be kept of them.

        Parameters
        ----------
        cells : (S, N), states as `lib.grid.plan` has them, or bool (True computes)
        net : (S,), states of the whole output; if it is not given, `default_net`
        """
        cells = np.asarray(cells).astype(np.int8)
        return lives(self.reads, self.cache, cells, default_net(self.reads, self.cache, cells) if net is None else net)


@dataclass(frozen=True)
class Life:
    """What one pass of a plan has to run and to keep.

    Attributes
    ----------
    live : (S, N), bool: cells that have to run
    read : (S, N), bool: cells whose held or forecast value is used in their own column
    keep : (S, N), int: how many computed outputs of each block are still needed after a step, the newest included
    called : (S,), bool: steps at which the network is called; stem and head run there
    net_keep : (S,), int: as `keep`, of the whole output
    settled : (S, N), int8: the states, dead cells at 0, forecasts of no higher order than there are outputs for
    net : (S,), int8: the same of the whole output
    """

    live: np.ndarray
    read: np.ndarray
    keep: np.ndarray
    called: np.ndarray
    net_keep: np.ndarray
    settled: np.ndarray
    net: np.ndarray


def depth(states: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """Give how many computed outputs a held or forecast value is made of, where so many are there; 0 where none is.

    Holding takes one; a line (2) two, a parabola (3) three, or as many as there are.
    """
    return np.where(states == 0, 1, np.where(states > 1, np.minimum(states, np.maximum(computed, 1)), 0))


def lives(reads: Sequence[Sequence[int]], cache: str, cells: np.ndarray, net: np.ndarray) -> Life:
    """Walk a grid backwards and find what a later column, or the head, still needs.

    A computing cell is live if its output is read in its own column, or by a held or forecast cell before so many newer
    ones are there: a read at depth d makes the last d computed cells live. The head reads the last block where the
    whole output is computed (`net` 1). Where blocks cache residual changes every block's input flows on, so a block
    that is read reads the one before it, whatever its own state.

    Parameters
    ----------
    reads : for each block the places of the blocks that it reads
    cache : "output" or "residual"
    cells : (S, N), int8, states; net : (S,), int8
    """
    steps, count = cells.shape
    computes = cells == 1
    depths = depth(cells, np.cumsum(computes, axis=0) - computes)
    net_depths = depth(net, np.cumsum(net == 1) - (net == 1))
    live, read, keep = np.zeros_like(computes), np.zeros_like(computes), np.zeros(cells.shape, dtype=np.int64)
    called, net_keep = np.zeros(steps, dtype=bool), np.zeros(steps, dtype=np.int64)
    later, net_later = np.zeros(count, dtype=np.int64), 0  # computed outputs that steps behind this one need
    for step in range(steps - 1, -1, -1):
        keep[step], net_keep[step] = later, net_later
        row, needed = computes[step], np.zeros(count, dtype=bool)
        needed[count - 1] = called[step] = net[step] == 1
        for i in range(count - 1, -1, -1):
            if row[i]:
                live[step, i] = needed[i] or later[i] > 0
            else:
                read[step, i] = needed[i]
            if live[step, i] or (read[step, i] and cache == "residual"):
                needed[reads[i]] = True
        called[step] |= live[step].any()
        later = np.maximum(later - row, np.where(read[step], depths[step], 0))
        later = np.maximum(later, 0)
        net_later = max(net_later - int(net[step] == 1), int(net_depths[step]), 0)
    lowered = np.where(depths > 1, depths, 0)
    settled = np.where(live, 1, np.where(read, lowered, 0)).astype(np.int8)
    lowered_net = np.where(net > 1, np.where(net_depths > 1, net_depths, 0), net).astype(np.int8)
    return Life(live, read, keep, called, net_keep, settled, lowered_net)


def default_net(reads: Sequence[Sequence[int]], cache: str, cells: np.ndarray) -> np.ndarray:
    """Give the states of the whole output that cells alone suggest, (S,), int8.

    It is computed where any cell has to run or the head has something new to read, and held elsewhere: without the
    network's last block changing, its output does not. Where blocks cache residual changes the input itself is always
    new.
    """
    if cache == "residual":
        return np.ones(len(cells), dtype=np.int8)
    last = cells[:, -1]
    live = lives(reads, cache, cells, np.where(last == 0, 0, 1).astype(np.int8)).live
    return (live.any(axis=1) | (last > 1)).astype(np.int8)


def wiring(names: Sequence[str]) -> list[list[int]]:
    """Give for each block, by the names of `describe`, the places of the blocks that it reads, without the stem.

    A block reads the one before it. Going down, a UNet's blocks leave their outputs behind as skip connections, the
    stem first; going up, every block but the up-samplers takes the last one left.
    """
    reads, skips = [], [STEM]
    for i, name in enumerate(names):
        own = [i - 1] if i else []
        if name.startswith("up") and not name.endswith(".up") and skips:
            skip = skips.pop()
            own += [] if skip == STEM else [skip]
        elif name.startswith("down"):
            skips.append(i)
        reads.append(own)
    return reads


ALONE = ("hidden_states",)
TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
TEXT_LAST = ("hidden_states", "encoder_hidden_states")
CHAINS = {
    "AllegroTransformer3DModel": {"transformer_blocks": ALONE},
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": TEXT_FIRST, "single_transformer_blocks": ALONE},
    "BriaTransformer2DModel": {"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": TEXT_FIRST},
    "ChromaTransformer2DModel": {"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": ALONE},
    "DiTTransformer2DModel": {"transformer_blocks": ALONE},
    "Flux2Transformer2DModel": {"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": ALONE},
    "FluxTransformer2DModel": {"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": TEXT_FIRST},
    "HunyuanDiT2DModel": {"blocks": ALONE},
    "HunyuanImageTransformer2DModel": {"transformer_blocks": TEXT_LAST, "single_transformer_blocks": TEXT_LAST},
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": TEXT_LAST, "single_transformer_blocks": TEXT_LAST},
    "Kandinsky5Transformer3DModel": {"visual_transformer_blocks": ("visual_embed",)},
    "Krea2Transformer2DModel": {"transformer_blocks": ALONE},
    "LTXVideoTransformer3DModel": {"transformer_blocks": ALONE},
    "Lumina2Transformer2DModel": {"layers": ALONE},
    "LuminaNextDiT2DModel": {"layers": ALONE},
    "NucleusMoEImageTransformer2DModel": {"transformer_blocks": ALONE},
    "OvisImageTransformer2DModel": {"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": TEXT_FIRST},
    "PRXTransformer2DModel": {"blocks": ALONE},
    "PixArtTransformer2DModel": {"transformer_blocks": ALONE},
    "QwenImageTransformer2DModel": {"transformer_blocks": TEXT_FIRST},
    "SD3Transformer2DModel": {"transformer_blocks": TEXT_FIRST},
    "SanaTransformer2DModel": {"transformer_blocks": ALONE},
    "SanaVideoTransformer3DModel": {"transformer_blocks": ALONE},
    "SkyReelsV2Transformer3DModel": {"blocks": ALONE},
    "WanTransformer3DModel": {"blocks": ALONE},
}
"""The transformers that are known here, chains of blocks that each add to the tokens they are given: where the blocks
are, in the order in which they run, and which of their arguments they change, in the order in which they give them.
"""
SHARES = ("AuraFlowTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel", "FluxTransformer2DModel",
          "Krea2Transformer2DModel", "NucleusMoEImageTransformer2DModel", "OvisImageTransformer2DModel",
          "PRXTransformer2DModel", "QwenImageTransformer2DModel")
"""Those that are told their timestep as a share of the training timesteps."""
REMAINDERS = ("Lumina2Transformer2DModel", "LuminaNextDiT2DModel")
"""Those that are told what is left of it: 0 at pure noise, 1 at the image."""
LEVELS = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D",
          "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
"""The UNet levels that are known here."""


def describe(network: nn.Module) -> Blocks:
    """Describe a network as blocks.

    Raises
    ------
    TypeError
        If the network, or one of its levels, is of a kind that is not supported.
    """
    if hasattr(network, "_orig_mod"):
        raise TypeError("a network compiled by torch.compile holds no plan: take its own, model._orig_mod. "
                        "(lib.apply.Planned does so by itself.)")
    if isinstance(network, UNet2DModel | UNet2DConditionModel):
        return _unet(network)
    if type(network).__name__ in CHAINS:
        found, before = [], STEM
        for stack, changes in CHAINS[type(network).__name__].items():
            for number in range(len(getattr(network, stack))):
                name = f"block{len(found)}"
                found.append(Block(name, name, (f"{stack}.{number}",), (before,), changes))
                before = name
        return Blocks(tuple(found), {block.name: block.modules[0] for block in found}, "residual")
    raise TypeError(f"{type(network).__name__} is not supported. Supported: UNet2DModel, UNet2DConditionModel, and "
                    f"{len(CHAINS)} transformers (lib.grid.blocks.CHAINS).")


def input_shape(network: nn.Module) -> tuple[int, int, int]:
    """Give the shape of what a network denoises, (C, H, W), at its sample size.

    Raises
    ------
    ValueError
        If its config names none.
    """
    config, size = network.config, network.config.sample_size
    if size is None:
        raise ValueError(f"this {type(network).__name__} names no sample_size: set it in its config.json (latents are "
                         "smaller than images, often by 8)")
    added = HINT if config.get("addition_embed_type") == "image_hint" else 0  # channels that it makes of a picture
    return config.in_channels - added, *((size, size) if isinstance(size, int) else size)


def example_conditions(network: nn.Module, count: int, device: torch.device | str) -> dict[str, Tensor | dict]:
    """Give what a network reads besides image and timestep, of the right shapes, for `count` images."""
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count, *shape, device=device, dtype=dtype)

    config, given, added = network.config, {}, {}
    if isinstance(network, UNet2DConditionModel):
        given["encoder_hidden_states"] = zeros(77, config.encoder_hid_dim or _widest(config.cross_attention_dim))
        images = {"text_image_proj": config.cross_attention_dim, "image_proj": config.encoder_hid_dim}
        if config.encoder_hid_dim_type in images:
            added["image_embeds"] = zeros(_widest(images[config.encoder_hid_dim_type]))
        kind, pooled = config.addition_embed_type, config.projection_class_embeddings_input_dim
        if kind == "text_time":
            added |= {"text_embeds": zeros(pooled - 6 * config.addition_time_embed_dim), "time_ids": zeros(6)}
        elif kind == "text_image":
            added |= {"text_embeds": zeros(_widest(config.cross_attention_dim)),
                      "image_embeds": zeros(_widest(config.cross_attention_dim))}
        elif kind in ("image", "image_hint"):
            added["image_embeds"] = zeros(config.encoder_hid_dim)
        if kind == "image_hint":
            added["hint"] = zeros(3, *(8 * side for side in input_shape(network)[1:]))
    elif config.get("caption_channels"):
        given["encoder_hidden_states"] = zeros(120, config.caption_channels)
        wanted = getattr(network, "use_additional_conditions", False)
        added = {"resolution": zeros(2) if wanted else None, "aspect_ratio": zeros(1) if wanted else None}
    elif hasattr(network, "transformer_blocks") and config.get("num_embeds_ada_norm"):
        given["class_labels"] = zeros(dtype=torch.long)
    kind = config.get("class_embed_type")
    if kind in ("identity", "projection", "simple_projection"):
        wide = config.get("time_embedding_dim") or 4 * config.block_out_channels[0]
        given["class_labels"] = zeros(wide if kind == "identity" else config.projection_class_embeddings_input_dim)
    elif kind == "timestep" or config.get("num_class_embeds"):
        given["class_labels"] = zeros(dtype=torch.long)
    return given | ({"added_cond_kwargs": added} if added else {})


HINT = 4
"""The channels of the picture that Kandinsky's controlled UNet adds to the latents."""


def _widest(widths: int | tuple[int, ...]) -> int:
    return widths if isinstance(widths, int) else max(widths)


def _unet(network: UNet2DModel | UNet2DConditionModel) -> Blocks:
    if isinstance(network, UNet2DModel) and network.config.time_embedding_type == "fourier":
        raise TypeError("time_embedding_type fourier is not supported: there the timestep scales the output, so a "
                        "reused output is not what the network would give.")
    for module in (*network.down_blocks, network.mid_block, *network.up_blocks):
        if type(module).__name__ not in LEVELS:
            raise TypeError(f"a level of type {type(module).__name__} is not supported. Supported: "
                            f"{', '.join(LEVELS)}.")
    blocks: list[Block] = []
    skips, before = [STEM], STEM
    modules: dict[str, str] = {}
    for i, level in enumerate(network.down_blocks):
        name, path = f"down{i}", f"down_blocks.{i}"
        modules[name] = path
        for block in _layers(level, name, path, "downsamplers", "down"):
            blocks.append(Block(block[0], name, block[1], (before,)))
            before = block[0]
            skips.append(before)
    modules["mid"] = "mid_block"
    blocks.append(Block("mid", "mid", ("mid_block",), (before,)))
    before = "mid"
    for i, level in enumerate(network.up_blocks):
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
