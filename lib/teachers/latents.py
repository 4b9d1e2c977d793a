"""Latents: a small autoencoder between images and what a latent model denoises, and any pipeline's own."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderDC, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from lib.teachers.training import own_share, train

FEW = 16
"""Images that an autoencoder sees at once: those of other people's pipelines are large."""
NOISE = 0.05
"""Deviation of the noise that latents carry in training, of their own 1: near latents mean near images."""


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """diffusers' deep-compression autoencoder (Chen et al. 2024) whose latents have mean 0 and deviation 1 a channel.

    A Stable Diffusion pipeline decodes with it.

    Parameters
    ----------
    in_channels, latent_channels : of images and of latents
    block_out_channels : channels of each level; each but the first halves the resolution
    encoder_layers, decoder_layers : residual blocks of each level
    scaling_factor : 1, for pipelines that ask
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, latent_channels: int = 8,
                 block_out_channels: tuple[int, ...] = (32, 64, 128), encoder_layers: tuple[int, ...] = (0, 1, 1),
                 decoder_layers: tuple[int, ...] = (0, 1, 2), scaling_factor: float = 1.0):
        super().__init__()
        self.coder = AutoencoderDC(
            in_channels=in_channels, latent_channels=latent_channels, encoder_block_out_channels=block_out_channels,
            decoder_block_out_channels=block_out_channels, encoder_layers_per_block=encoder_layers,
            decoder_layers_per_block=decoder_layers, encoder_qkv_multiscales=((),) * len(block_out_channels),
            decoder_qkv_multiscales=((),) * len(block_out_channels))
        self.register_buffer("mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, latent_channels, 1, 1))

    @property
    def patch(self) -> int:
        """Pixels a side of what one place of the latents stands for."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> EncoderOutput:
        """Map images, (n, C', H', W') in [-1, 1], to latents, (n, C, H, W)."""
        return EncoderOutput(latent=(self.coder.encode(images).latent - self.mean) / self.deviation)

    def decode(self, latents: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
               ) -> DecoderOutput | tuple[Tensor]:
        """Map latents, (n, C, H, W), to images, (n, C', H', W'); pipelines hand in a generator, which nothing needs."""
        made = self.coder.decode(latents * self.deviation + self.mean)
        return made if return_dict else (made.sample,)


def fit(coder: PatchAutoencoder, images: Tensor, *, steps: int, seed: int, device: str, precision: str, work: Path,
        batch_size: int = 64, learning_rate: float = 2e-3) -> list[dict]:
    """Train an autoencoder, in place: L1 + L2 of the images, with a little noise on the latents.

    Parameters
    ----------
    images : Tensor, (n, C', H', W'), in [-1, 1]

    Returns
    -------
    history : as `lib.teachers.training.train` gives it
    """
    history = train(coder.to(device), reconstruction_loss(images, batch_size), steps=steps, lr=learning_rate,
                    ema_decay=0.995, seed=seed, device=device, precision=precision, work=work, title="autoencoder")
    coder.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([coder.coder.encode(few.to(device)).latent for few in images[:2000].split(FEW)])
    coder.mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
    coder.deviation.copy_(latents.std(dim=(0, 2, 3), keepdim=True))
    return history


def reconstruction_loss(images: Tensor, batch_size: int
                        ) -> Callable[[PatchAutoencoder, torch.Generator, float], Tensor]:
    """Give an autoencoder's loss, as `lib.teachers.training.train` wants it."""
    def loss(coder: PatchAutoencoder, generator: torch.Generator, _: float) -> Tensor:
        rows = own_share(torch.randint(len(images), (batch_size,), generator=generator))
        x = images[rows].to(next(coder.parameters()).device)
        latents = coder.encode(x).latent
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        far = coder.decode(latents + NOISE * latents.detach().std() * noise).sample.float() - x
        return far.abs().mean() + far.square().mean()

    return loss


class Coder(nn.Module):
    """A pipeline's autoencoder, between images and latents as the pipeline scales them; a few images at a time."""

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.vae, self.config = vae, vae.config

    def encode(self, images: Tensor) -> Tensor:
        """Map images, (n, C', H', W') in [-1, 1], to latents (their means, where they are drawn), (n, C, H, W)."""
        scale, shift = self._scaling()
        return torch.cat([(self._mean(few) - shift) * scale for few in images.split(FEW)])

    def _mean(self, images: Tensor) -> Tensor:
        coded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        return coded.latent_dist.mean if "latent_dist" in coded else coded[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents, (n, C, H, W), to images, (n, C', H', W'), about [-1, 1]."""
        scale, shift = self._scaling()
        latents = latents.to(self.vae.device, self.vae.dtype) / scale + shift
        return torch.cat([self.vae.decode(few).sample for few in latents.split(FEW)])

    def _scaling(self) -> tuple[float, float]:
        return self.config.get("scaling_factor") or 1.0, self.config.get("shift_factor") or 0.0
