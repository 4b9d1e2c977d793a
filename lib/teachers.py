"""Teachers: a DDPM UNet trained here, saved and loaded as diffusers does."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.utils import logging
from torch import Tensor, nn

logging.disable_progress_bar()  # of loading, which takes no time here


def noise_schedule() -> DDIMScheduler:
    """Give the noise schedule that all teachers here share: linear betas, epsilon prediction, no clipping.

    Only so are a dropped step and a reused epsilon the same under DDIM (design: one grid), and only so can one ask
    whether a pruned pattern is more than a schedule.
    """
    return DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                         prediction_type="epsilon", clip_sample=False, set_alpha_to_one=True,
                         timestep_spacing="trailing")


def unet(shape: tuple[int, int, int], widths: list[int], layers: int, norm_groups: int) -> UNet2DModel:
    """Build a DDPM UNet with one level a width and attention in the middle.

    Parameters
    ----------
    shape : (C, H, W) of an image; H = W
    widths : channels of each level, from full resolution down
    layers : residual blocks a level
    norm_groups : groups of each GroupNorm; divides every width
    """
    channels, height, _ = shape
    return UNet2DModel(sample_size=height, in_channels=channels, out_channels=channels, layers_per_block=layers,
                       block_out_channels=tuple(widths), norm_num_groups=norm_groups,
                       down_block_types=("DownBlock2D",) * len(widths), up_block_types=("UpBlock2D",) * len(widths))


def noisy_batch(images: Tensor, schedule: DDIMScheduler, size: int, generator: torch.Generator,
                device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draw images and noise them: x_t = sqrt(\bar\alpha_t) x_0 + sqrt(1 - \bar\alpha_t) \epsilon.

    Parameters
    ----------
    images : Tensor, (n, C, H, W), in [-1, 1]
    size : int, images drawn; timesteps come in antithetic pairs t, T-1-t, which lowers the variance

    Returns
    -------
    x_t, t, noise : Tensor, (size, C, H, W), (size,) and (size, C, H, W), on the device
    """
    last = schedule.config.num_train_timesteps - 1
    x_0 = images[torch.randint(len(images), (size,), generator=generator)]
    half = torch.randint(last + 1, ((size + 1) // 2,), generator=generator)
    t = torch.cat([half, last - half])[:size].to(device)
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    return schedule.add_noise(x_0.to(device), noise, t), t, noise


def denoising_loss(images: Tensor, schedule: DDIMScheduler, batch_size: int):
    """Give the loss of DDPM training (Ho et al. 2020, eq. 14): the mean squared error of the predicted noise.

    Parameters
    ----------
    images : Tensor, (n, C, H, W), in [-1, 1]
    batch_size : int, of `noisy_batch`

    Returns
    -------
    loss : callable(model, generator, way) -> scalar Tensor, as `lib.training.train` wants it
    """

    def loss(model: nn.Module, generator: torch.Generator, _: float) -> Tensor:
        x_t, t, noise = noisy_batch(images, schedule, batch_size, generator, next(model.parameters()).device)
        return F.mse_loss(model(x_t, t).sample.float(), noise)

    return loss


def save(folder: Path, model: UNet2DModel, schedule: DDIMScheduler) -> None:
    """Save model and noise schedule as a diffusers pipeline (safetensors and JSON)."""
    DDIMPipeline(unet=model, scheduler=schedule).save_pretrained(folder)


def load(folder: Path, device: str = "cpu") -> tuple[UNet2DModel, DDIMScheduler]:
    """Load what `save` wrote, a teacher or a student, ready for sampling.

    Raises
    ------
    FileNotFoundError
        If the folder holds no diffusers pipeline.
    """
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"no teacher in {folder}. Notebook 00_teacher_training makes it.")
    pipeline = DDIMPipeline.from_pretrained(folder, use_safetensors=True)
    return pipeline.unet.eval().requires_grad_(False).to(device), pipeline.scheduler
