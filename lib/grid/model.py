"""The model: a network with all that stands around it from noise to image. A teacher, or a student in its place."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from lib.grid.blocks import example_conditions, input_shape
from lib.grid.plan import GIVEN, NULL, NoiseSchedule


@dataclass(frozen=True)
class Conditions:
    """What a network reads besides image and timestep, and how strongly it is guided by it.

    Attributes
    ----------
    given : dict of the network's argument to Tensor, (n, ...), a row an image, or to such a dict; empty for nothing
    null : the same without a condition, for classifier-free guidance; None for none
    scale : float, of the guidance: null + scale * (given - null)
    apart : bool; False makes both passes in one batch, True one network call after the other
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    null: Mapping[str, Any] | None = None
    scale: float = 1.0
    apart: bool = False

    def rows(self, chosen: slice | Tensor) -> Self:
        """Give the conditions of some images."""
        def part(rows: Any) -> Any:
            return tree_map_only(Tensor, lambda value: value[chosen], rows)

        return replace(self, given=part(self.given), null=part(self.null))

    def predict(self, engine: Any, x_t: Tensor, step: int) -> Tensor:
        """Predict at a step of an engine's plan, guided (Ho and Salimans 2022)."""
        def along_with_x(value: Tensor) -> Tensor:
            return value.to(x_t) if value.is_floating_point() else value.to(x_t.device)

        given, null = tree_map_only(Tensor, along_with_x, (self.given, self.null))
        if null is None:
            return engine(x_t, step, **given)
        if self.apart:
            along, without = engine(x_t, step, (GIVEN,), **given), engine(x_t, step, (NULL,), **null)
        else:
            both = tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], null, given)
            without, along = engine(torch.cat([x_t, x_t]), step, (NULL, GIVEN), **both).chunk(2)
        return without + self.scale * (along - without)


class Latents(Protocol):
    """An autoencoder: a Module that maps images, (n, C', H', W') in [-1, 1], to latents, (n, C, H, W), and back."""

    def encode(self, images: Tensor) -> Tensor: ...  # noqa: D102
    def decode(self, latents: Tensor) -> Tensor: ...  # noqa: D102


class Text(Protocol):
    """A text encoder: a Module that maps n prompts to what a network reads of them, a row a prompt."""

    def tokens(self, prompts: list[str]) -> Tensor: ...  # noqa: D102
    def read(self, tokens: Tensor) -> Tensor: ...  # noqa: D102
    def __call__(self, prompts: list[str]) -> Mapping[str, Tensor]: ...  # noqa: D102


@dataclass(frozen=True)
class Model:
    """What is sampled under a plan.

    Attributes
    ----------
    network : Module of a family that `lib.grid.blocks.describe` knows
    schedule : a diffusers scheduler, for its noise schedule
    latents : Latents, where the network draws latents; None where it draws the images themselves
    text : Text, where the network reads prompts
    prompts : tuple of str, those of which each image gets one
    guidance : float, the scale of classifier-free guidance; 1 is none, and one pass of the network is enough

    Raises
    ------
    ValueError
        If it is to be guided and reads nothing by which it could be.
    """

    network: nn.Module
    schedule: SchedulerMixin
    latents: Latents | None = None
    text: Text | None = None
    prompts: tuple[str, ...] = ()
    guidance: float = 1.0

    def __post_init__(self):
        prompted = self.text is not None and self.prompts
        if self.guidance != 1 and not prompted and not self.classes:
            raise ValueError(f"this model cannot be guided (guidance {self.guidance:g}): its network reads neither "
                             "labels alone nor prompts, or there are none. Set guidance to 1.")

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule, as plans name it."""
        return NoiseSchedule.of(self.schedule)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        return input_shape(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def replace(self, **fields: Any) -> Self:
        """Give the model with other fields: a student as `network`, another `guidance`."""
        return replace(self, **fields)

    def encode(self, images: Tensor) -> Tensor:
        """Map images, (n, C', H', W') in [-1, 1], to what the network denoises, (n, C, H, W)."""
        return images if self.latents is None else self.latents.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        """Map what the network denoises, (n, C, H, W), to images, (n, C', H', W'), about [-1, 1]."""
        return x_0 if self.latents is None else self.latents.decode(x_0)

    def predict(self, x_t: Tensor, t: float | Tensor, **given: Tensor) -> Tensor:
        """Call the network on x_t, (n, C, H, W), at a timestep: what it predicts, without a learned variance."""
        timesteps = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return self.network(x_t, timestep=timesteps, **given).sample[:, :x_t.shape[1]]

    @cached_property
    def classes(self) -> int:
        """The number of classes of which the network draws one and reads nothing else; else 0."""
        config = self.network.config
        classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0
        return classes if set(example_conditions(self.network, 0, "cpu")) == {"class_labels"} else 0

    def labels(self, noise: Tensor) -> Tensor:
        """Draw the class of each image, (n,), int64, out of `classes`."""
        return torch.tensor(_draws(noise, self.classes), device=noise.device)

    def said(self, noise: Tensor) -> list[str]:
        """Draw the prompt of each image, (n,), out of `prompts`."""
        return [self.prompts[place] for place in _draws(noise, len(self.prompts))]

    def asked(self, noise: Tensor) -> Conditions:
        """Give what images are asked to show, by their noise alone, (n, C, H, W).

        The hash of all of an image's noise draws its label or its prompt: one noise gives one image, whatever the
        batch, and no part of the noise tells the label.
        """
        if self.text is not None and self.prompts:
            given, null = self.text(self.said(noise)), self.text([""] * len(noise))
        elif self.classes:
            given = {"class_labels": self.labels(noise)}
            null = {"class_labels": torch.full((len(noise),), self.classes, device=noise.device)}
        else:
            return Conditions()
        return Conditions(given) if self.guidance == 1 else Conditions(given, null, self.guidance)

    @property
    def digest(self) -> str:
        """A hash of all that decides an image but noise and plan: configurations, weights, prompts and guidance."""
        total = hashlib.sha256(f"{self.prompts} {self.guidance}".encode())
        for part in (self.network, self.latents, self.text):
            if part is not None:
                config = {key: value for key, value in getattr(part, "config", {}).items() if key[0] != "_"}  # a folder
                total.update(json.dumps(config, sort_keys=True, default=str).encode())
                for name, tensor in sorted(part.state_dict().items()):
                    total.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return total.hexdigest()[:16]


def _draws(noise: Tensor, count: int) -> list[int]:
    """Draw a number below `count` for each image, by the hash of all of its noise."""
    draws = [hashlib.sha256(own.numpy().tobytes()).digest() for own in noise.detach().float().cpu()]
    return [int.from_bytes(draw[:8]) % count for draw in draws]
