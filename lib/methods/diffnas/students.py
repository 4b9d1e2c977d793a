"""Forms of residual blocks, and students: diffusers models whose blocks have forms of their own."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel  # noqa: F401 (who loads a student asks for ModelMixin)
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lib.grid import blocks


@dataclass(frozen=True, order=True)
class Form:
    """A residual block's searched part.

    Attributes
    ----------
    kernel_1, kernel_2 : int, odd, of its two convolutions
    width : int, channels between them
    """

    kernel_1: int
    kernel_2: int
    width: int


Architecture = Mapping[str, Form]
"""A form for each residual block, by its module path."""


def residuals(model: nn.Module) -> dict[str, ResnetBlock2D]:
    """Give a network's residual blocks by module path, in the order in which they run.

    Raises
    ------
    TypeError
        If one has no part that could be searched here (the time embedding must be added between the convolutions).
    """
    found = {path: module for level in blocks.describe(model).level_modules.values()
             for path, module in model.get_submodule(level).named_modules(prefix=level)
             if isinstance(module, ResnetBlock2D)}
    for path, block in found.items():
        if block.time_embedding_norm != "default" or block.time_emb_proj is None:
            raise TypeError(f"{path}: only residual blocks that add a time embedding are supported")
    return found


def form_of(block: ResnetBlock2D) -> Form:
    """Give the form that a block has."""
    return Form(block.conv1.kernel_size[0], block.conv2.kernel_size[0], block.conv1.out_channels)


def forms(model: nn.Module) -> dict[str, Form]:
    """Give the architecture of a network."""
    return {path: form_of(block) for path, block in residuals(model).items()}


@dataclass(frozen=True)
class FormSpace:
    """The forms a residual block may take.

    Attributes
    ----------
    kernels : tuple of int, odd
    widths : tuple of float, of the block's own width; rounded to the norm's groups, equal ones merged. A group has two
        channels at least: a norm over one alone takes out the time embedding, which is one number for all of a channel
    """

    kernels: tuple[int, ...]
    widths: tuple[float, ...]

    def __post_init__(self):
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels: must be odd, got {list(self.kernels)}")

    def of(self, block: ResnetBlock2D) -> list[Form]:
        """Give a block's forms."""
        groups, width = block.norm1.num_groups, block.out_channels
        channels = sorted({groups * max(2, round(share * width / groups)) for share in self.widths})
        return [Form(*kernels, count) for *kernels, count in itertools.product(self.kernels, self.kernels, channels)]


def shape(block: ResnetBlock2D, form: Form) -> None:
    """Give a block another form, in place, with fresh weights where the form is another."""
    if form == form_of(block):
        return
    groups, eps = block.norm2.num_groups, block.norm2.eps
    block.conv1 = nn.Conv2d(block.conv1.in_channels, form.width, form.kernel_1, padding=form.kernel_1 // 2)
    block.time_emb_proj = nn.Linear(block.time_emb_proj.in_features, form.width)
    block.norm2 = nn.GroupNorm(groups, form.width, eps=eps)
    block.conv2 = nn.Conv2d(form.width, block.conv2.out_channels, form.kernel_2, padding=form.kernel_2 // 2)


class _Shaped:
    """A UNet whose residual blocks have forms of their own, kept in its configuration.

    It is built by `from_config` from a UNet's configuration with an entry ``architecture`` (module path to kernel_1,
    kernel_2, width), and saved and loaded like any diffusers model.
    """

    @classmethod
    def from_config(cls, config, **options):
        """Build one; blocks that the architecture does not name keep the UNet's form."""
        config = dict(config)
        architecture = config.pop("architecture", {})
        model = super().from_config(config, **options)
        inner = model[0] if isinstance(model, tuple) else model  # with return_unused_kwargs there are two
        known = residuals(inner)
        if strange := set(architecture) - set(known):
            raise ValueError(f"architecture: {sorted(strange)[0]} is no residual block; there are: {', '.join(known)}")
        for path, form in architecture.items():
            shape(known[path], Form(**form))
        inner.register_to_config(architecture=architecture)
        return model


class Student(_Shaped, UNet2DModel):
    """A student of a `UNet2DModel`."""


class ConditionStudent(_Shaped, UNet2DConditionModel):
    """A student of a `UNet2DConditionModel`."""


UNet = UNet2DModel | UNet2DConditionModel
