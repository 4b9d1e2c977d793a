"""What supernets and students are trained on."""

import math
from collections.abc import Callable, Mapping

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from lib.methods.diffnas.levels import level_losses, observe
from lib.methods.diffnas.students import FormSpace, UNet
from lib.methods.diffnas.supernets import choose, draw
from lib.teachers.networks import Samples


def supernet_loss(teacher: UNet, samples: Samples, schedule: DDIMScheduler, batch_size: int, space: FormSpace):
    """Give the loss of single-path supernet training: every level in a random form, all from one pass of the teacher.

    Returns
    -------
    loss : callable(model, generator, way) -> scalar Tensor, as `lib.teachers.training.train` wants it
    """

    def loss(model: UNet, generator: torch.Generator, _: float) -> Tensor:
        x_t, t, _, given = samples.noisy(schedule, batch_size, generator, teacher.device)
        choose(model, draw(model, space, generator))
        return torch.stack(list(level_losses(model, observe(teacher, x_t, t, **given)[0]).values())).mean()

    return loss


def retraining_loss(teacher: UNet, samples: Samples, schedule: DDIMScheduler, batch_size: int,
                    beta: Callable[[float], float], target: str = "noise"):
    """Give the dynamic joint loss on random batches, with a weight that changes on the way through the training.

    Parameters
    ----------
    beta : callable(way) -> float, of `BETAS`
    target : see `joint_loss`

    Returns
    -------
    loss : callable(model, generator, way) -> scalar Tensor, as `lib.teachers.training.train` wants it
    """

    def loss(model: UNet, generator: torch.Generator, way: float) -> Tensor:
        x_t, t, noise, given = samples.noisy(schedule, batch_size, generator, teacher.device)
        return joint_loss(model, teacher, x_t, t, noise, beta(way), target, **given)

    return loss


BETAS: Mapping[str, Callable[[float], float]] = {
    "noise only": lambda way: 1.0, "blocks only": lambda way: 0.0, "fixed": lambda way: 0.5,
    "linear": lambda way: min(1.0, 2 * way), "cosine": lambda way: 0.5 - 0.5 * math.cos(math.pi * min(1.0, 2 * way)),
    "step": lambda way: float(way >= 0.5)}
"""beta, the weight of the noise loss, over the way through the training, 0 to 1: it rises in the first half."""


def joint_loss(made: UNet, teacher: UNet, x_t: Tensor, t: Tensor, noise: Tensor, beta: float,
               target: str = "noise", **conditions) -> Tensor:
    """Give (1 - beta) * L_blocks + beta * L_noise, the dynamic joint loss.

    L_blocks is the mean over the levels of `level_losses`; L_noise the mean squared error of the student's own
    prediction. A term without weight is not computed.

    Parameters
    ----------
    target : "noise" (the true one, as in the paper) or "teacher" (what the teacher predicts: output distillation)
    conditions : what else the networks read
    """
    if target not in ("noise", "teacher"):
        raise ValueError(f"target {target!r}: must be noise or teacher")
    seen, predicted = observe(teacher, x_t, t, **conditions) if beta < 1 or target == "teacher" else (None, None)
    total = torch.zeros((), device=x_t.device)
    if beta < 1:
        total = total + (1 - beta) * torch.stack(list(level_losses(made, seen).values())).mean()
    if beta > 0:
        wanted = predicted.float() if target == "teacher" else noise
        total = total + beta * F.mse_loss(made(x_t, t, **conditions).sample.float(), wanted)
    return total
