"""How near images are to others from the same noise, image by image: PSNR, SSIM, and a distance of features.

For pipelines whose images have no data set to be compared with: a cheaper run is as good as it is near to the full one.
All functions compare images, (n, C, H, W) in [0, 1], and give a number an image, (n,).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.registry import SAMPLE_SIMILARITY_REGISTRY

from lib.judging.estimates import MARGIN, Contrast, Estimate
from lib.judging.extractor import weights_alone

Distance = Callable[[Tensor, Tensor], Tensor]

WINDOW = 7
"""Pixels a side of SSIM's flat window; of smaller images all of it."""
HIGHEST = 100.0
"""PSNR of images that are equal, in dB."""


def root_mean_square(images: Tensor, others: Tensor) -> Tensor:
    """Give the root of the mean squared difference."""
    return (images - others).flatten(1).square().mean(1).sqrt()


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Give the peak signal-to-noise ratio in dB, at most `HIGHEST`."""
    return (-20 * root_mean_square(images, others).log10()).clamp(max=HIGHEST)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Give the structural similarity (Wang et al. 2004), its window flat and without padding; differentiable."""
    window = min(WINDOW, *images.shape[2:])

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, stride=1)

    m, n = mean(images), mean(others)
    spread = mean(images * images) - m * m + mean(others * others) - n * n
    alike = (2 * m * n + 0.01**2) * (2 * (mean(images * others) - m * n) + 0.03**2)
    return (alike / ((m * m + n * n + 0.01**2) * (spread + 0.03**2))).flatten(1).mean(1)


def pyramid(images: Tensor, others: Tensor) -> Tensor:
    """Give the mean over scales (the full one, halves, ... down to 4 pixels) of the root mean squared difference.

    Blurred images differ as much as sharp ones only where something stands in another place: a distance without any
    weights, for where there are none.
    """
    scales = []
    while True:
        scales.append(root_mean_square(images, others))
        if min(images.shape[2:]) < 8:
            return torch.stack(scales).mean(0)
        images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)


def perceptual(device: torch.device) -> tuple[str, Distance]:
    """Give LPIPS (Zhang et al. 2018; torch-fidelity's, VGG-16) and its name, or `pyramid` where its weights are not."""
    try:
        with weights_alone():
            net = SAMPLE_SIMILARITY_REGISTRY["lpips-vgg16"]("lpips-vgg16").to(device)
    except (OSError, RuntimeError) as error:
        print(f"LPIPS cannot be had here ({error}): images are compared over a pyramid of scales instead.")
        return "pyramid", pyramid

    @torch.inference_mode()
    def lpips(images: Tensor, others: Tensor) -> Tensor:
        both = ((part.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8).split(1) for part in (images, others))
        return torch.cat([net(*(part.to(device) for part in pair)).flatten().cpu() for pair in zip(*both)])

    return "LPIPS (VGG-16)", lpips


def nearer(images: Tensor, others: Tensor, wanted: Tensor) -> Contrast:
    """Say whether images are nearer to the wanted ones than others are, by the root mean squared difference.

    The ratio is the geometric mean of the images' ratios: below 1 is nearer.
    """
    mine, theirs = (root_mean_square(made, wanted).clamp(min=1e-6).double().numpy() for made in (images, others))
    logs = Estimate.of(np.log(mine / theirs))
    ratio = Estimate(*(float(np.exp(value)) for value in (logs.value, logs.low, logs.high)))
    return Contrast(ratio, Estimate.of(mine - theirs), MARGIN, len(mine))
