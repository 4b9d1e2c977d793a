"""Peers, run for real: what others' published code makes of the same teacher. ``pip install .[peers]`` brings them."""

import copy
import os
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    CacheMixin,
    FirstBlockCacheConfig,
    ModelMixin,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_taylorseer_cache
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from tqdm import tqdm

from lib.grid import blocks, cost, sampling, solvers
from lib.grid.model import Model
from lib.grid.plan import COMPUTE, HOLD, LINE, Plan
from lib.teachers.networks import Samples


@torch.inference_mode()
def deepcache(network: nn.Module, teacher: Plan, interval: int, branch: int, noise: Tensor, *,
              precision: str = "fp32", **conditions) -> Tensor:
    """Sample with the `DeepCache` package (Ma et al. 2023), uniformly, over a full plan's steps and solver.

    Parameters
    ----------
    network : a UNet with two residual blocks, or one and a sampler, a level
    interval, branch : int, the package's cache_interval and cache_branch_id
    noise : Tensor, (n, C, H, W)
    conditions : what else the network reads
    """
    from DeepCache import DeepCacheSDHelper

    timesteps = torch.tensor(teacher.timesteps)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=network, scheduler=SimpleNamespace(timesteps=timesteps)))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    x_t, table, state = noise.to(network.device), solvers.of(teacher), ()
    try:
        with sampling.autocast(x_t.device, precision):
            for step, t in enumerate(timesteps):
                predicted = network(x_t.to(network.dtype), t, **conditions).sample[:, :x_t.shape[1]]
                x_t, state = solvers.advance(table, step, x_t, predicted.float(), state)
    finally:
        helper.disable()
    return x_t.cpu()


def first_block_caching(model: Model, teacher: Plan, threshold: float, noise: Tensor) -> tuple[Plan, Tensor]:
    """Sample with diffusers' first-block cache over a full plan's steps and solver.

    It decides at each step, by one number of the whole batch, whether the blocks behind the first run.

    Parameters
    ----------
    model : Model, of a transformer; it stays as it is
    threshold : float, relative change of the first block's residual below which the others are reused
    noise : Tensor, (n, C, H, W)

    Returns
    -------
    plan, images : what it ran, as a plan; the images, (n, C, H, W), on the CPU
    """
    def enable(cached: ModelMixin) -> None:
        apply_first_block_cache(cached, FirstBlockCacheConfig(threshold))

    return _executed(model, teacher, noise, enable, method="first-block caching", threshold=threshold)


def dbcache(model: Model, teacher: Plan, threshold: float, noise: Tensor, forecast: bool = False
            ) -> tuple[Plan, Tensor]:
    """Sample with the `cache-dit` package (DBCache, one block computed first) as `first_block_caching` does.

    Parameters
    ----------
    forecast : bool, what is reused is forecast by a line over the steps (the package's TaylorSeer calibrator, order 1)
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit

    def enable(cached: ModelMixin) -> None:
        config = cache_dit.DBCacheConfig(num_inference_steps=teacher.steps, residual_diff_threshold=threshold,
                                         Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1)
        line = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if forecast else None
        cache_dit.enable_cache(cached, cache_config=config, calibrator_config=line)

    about = {"method": "cache-dit", "threshold": threshold}
    plan, images = _executed(model, teacher, noise, enable, LINE if forecast else HOLD, **about)
    cells = plan.cells
    begun = next((step for step in range(3, plan.steps) if plan.computes[step].all()), plan.steps)
    cells[:begun][cells[:begun] == LINE] = HOLD  # its lines begin with what is computed at the fourth step or later
    return plan.with_cells(cells, **about), images


def taylorseer(model: Model, teacher: Plan, interval: int, noise: Tensor) -> tuple[Plan, Tensor]:
    """Sample with diffusers' TaylorSeer cache (Liu et al. 2025) of order 1, in its lite mode, as `dbcache` does.

    The first three steps and then every `interval`-th compute; between, the network's whole output is forecast by a
    line over the steps. (By its defaults it forecasts what attention gives, which is no cell of ours; its order 2 is no
    parabola.)

    Parameters
    ----------
    model : Model, of a DiTTransformer2DModel
    """
    def enable(cached: ModelMixin) -> None:
        apply_taylorseer_cache(cached, TaylorSeerCacheConfig(
            cache_interval=interval, max_order=1, taylor_factors_dtype=torch.float32,
            cache_identifiers=["proj_out_2"], skip_predict_identifiers=[r"transformer_blocks\.\d+"]))

    plan, images = _executed(model, teacher, noise, enable)
    return plan.with_cells(plan.cells, np.where(plan.computes.all(axis=1), COMPUTE, LINE), method="TaylorSeer",
                           interval=interval), images


@torch.inference_mode()
def _executed(model: Model, teacher: Plan, noise: Tensor, enable: Callable[[ModelMixin], None],
              reuse: int = HOLD, **provenance) -> tuple[Plan, Tensor]:
    """Sample with another's cache on a copy of a transformer, and note which blocks ran at which step."""
    cached, described = copy.deepcopy(model.network), blocks.describe(model.network)
    cells = np.zeros_like(teacher.computes)
    for place, block in enumerate(described):
        def note(*_, place: int = place) -> None:
            cells[step, place] = True
        next(cached.get_submodule(block.modules[0]).children()).register_forward_pre_hook(note)
    enable(cached)
    x_t, table, state, conditions = noise.to(model.device), solvers.of(teacher), (), model.asked(noise)

    def predict(x_t: Tensor, step: int, passes: tuple[str, ...] = (), **given: Tensor) -> Tensor:
        return model.replace(network=cached).predict(x_t, teacher.timesteps[step], **given)

    with CacheMixin.cache_context(cached, "given"):
        for step in range(teacher.steps):
            x_t, state = solvers.advance(table, step, x_t, conditions.predict(predict, x_t, step), state)
    cells = np.where(cells, COMPUTE, reuse)
    return teacher.replace(abscissa="step").with_cells(cells, **provenance), model.decode(x_t).cpu()


def diff_pruning(model: Model, samples: Samples, share: float, *, seed: int, batch_size: int = 64,
                 threshold: float = 0.05) -> ModelMixin:
    """Prune a UNet's channels by `torch-pruning` with the criterion of Diff-Pruning (Fang et al. 2023).

    The gradient of the loss is summed over the timesteps 0, 1, 2, ... up to where the loss has fallen to `threshold` of
    its greatest; channels go in groups by the first Taylor term, the same share of each layer, down to the budget.

    Parameters
    ----------
    model : Model, a teacher with a UNet; it stays as it is
    samples : Samples, for training
    share : float, of the teacher's MACs, in (0, 1)
    seed : int, of images and noise

    Returns
    -------
    pruned : a UNet whose layers are thinner than its configuration says; it still has to be trained

    Raises
    ------
    ModuleNotFoundError
        If torch-pruning is not installed.
    ValueError
        If no pruning is so small.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise ModuleNotFoundError("torch-pruning is not installed: run\n    pip install .[peers]") from None
    graded, asked = copy.deepcopy(model.network).requires_grad_(True), model.asked(torch.zeros(1, *model.shape))
    most = share * cost.count(model.network, asked).call
    generator, greatest = torch.Generator().manual_seed(seed), 0.0
    rows = torch.randint(len(samples.x_0), (batch_size,), generator=generator)
    x_0, given = samples.x_0[rows].to(model.device), samples.conditions.rows(rows).given
    given = {name: some.to(model.device) for name, some in given.items()}
    noise = torch.randn(x_0.shape, generator=generator).to(model.device)
    for t in tqdm(range(model.noise_schedule.train_timesteps), desc="gradients for pruning", unit="timestep"):
        steps = torch.full((batch_size,), t, device=model.device)
        loss = F.mse_loss(graded(model.schedule.add_noise(x_0, noise, steps), steps, **given).sample, noise)
        greatest = max(greatest, loss.item())
        if loss.item() < threshold * greatest:
            break
        loss.backward()
    for percent in range(5, 100, 5):
        pruned = copy.deepcopy(graded)
        for part, whole in zip(pruned.parameters(), graded.parameters()):
            part.grad = whole.grad.clone()
        queries = [layer for part in pruned.modules() if isinstance(part, Attention)
                   for layer in (part.to_q, part.to_k, part.to_v)]  # the heads keep their size
        torch_pruning.pruner.MetaPruner(
            pruned, {"sample": x_0[:1], "timestep": steps[:1]} | {name: some[:1] for name, some in given.items()},
            importance=torch_pruning.importance.TaylorImportance(),
            pruning_ratio=percent / 100, ignored_layers=[pruned.conv_out, *queries]).step()
        for part in pruned.modules():
            if isinstance(part, Downsample2D | Upsample2D):  # they check what they are given
                part.channels, part.out_channels = part.conv.in_channels, part.conv.out_channels
        if cost.count(pruned, asked).call <= most:
            pruned.zero_grad()
            return pruned
    raise ValueError(f"torch-pruning finds no network of {share:.0%} of the MACs: raise the share")
