"""One training loop for everything that learns here: EMA, resume after a kill, device and precision by accelerate.

Batches are drawn from ``(seed, step)`` alone, so a run that was killed and resumed sees what an unbroken run sees and
ends in the same weights. Under ``accelerate launch`` every process draws the whole batch and takes its own share of it
(`own_share`), so several end in the weights of one, to rounding.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lib.grid.sampling import autocast
from lib.grid.saving import write_json

CLIP = 1.0
"""The largest norm of a gradient."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """Give the random generator of one training step (on the CPU, so that every device draws the same)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Rise linearly over `warmup` steps, then fall to 0 along a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: nn.Module, loss: Callable[[nn.Module, torch.Generator, float], Tensor], *, steps: int, lr: float,
          ema_decay: float, seed: int, device: str, precision: str, work: Path, save_every: int = 200,
          warmup: int = 50, weight_decay: float = 0.0, compiled: bool = False,
          title: str = "training") -> list[dict]:
    """Train `model` in place with AdamW and leave the exponential moving average of its weights in it.

    On CUDA its convolutions lie channels-last and the optimiser is fused.

    Parameters
    ----------
    model : Module
    loss : callable(model, generator, way) -> scalar Tensor
        Draws its batch with `generator`, one generator a step; `way` is the share of the steps done, in [0, 1).
    steps, save_every, warmup : int, optimiser steps
    lr : float, peak learning rate, > 0
    ema_decay : float, in [0, 1); the average warms up as diffusers' `EMAModel` does
    seed : int
    device : str, "cpu" or "cuda"
    precision : str, "fp32" or "bf16" (autocast)
    work : Path
        Folder of the training state. If it holds a state, training goes on from there.
    weight_decay : float, AdamW's
    compiled : bool, on CUDA; for networks that run the same at every step (a supernet's paths do not)

    Returns
    -------
    history : list of {"step": int, "loss": float, "lr": float}
        The mean loss over each 1/100th of the steps; the last takes what is left along.

    Raises
    ------
    TrainingDiverged
        If the loss or its gradient is NaN or infinite. The last good state stays in `work`.
    """
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")  # its choice would bind the whole process
    on_cuda = accelerator.device.type == "cuda"
    if on_cuda:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=on_cuda)
    model.train()
    # Not wrapped for several processes (evaluation_mode): their gradients are averaged below, whatever a loss calls.
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    network = torch.compile(prepared) if compiled and on_cuda else prepared
    optimizer = accelerator.prepare_optimizer(optimizer)
    ema = EMAModel(model.parameters(), decay=ema_decay)
    ema.to(accelerator.device)
    start, history, recent = _resume(work, model, ema, optimizer)
    every = max(1, steps // 100)
    bar = tqdm(total=steps, initial=start, desc=title, unit="step", disable=not accelerator.is_main_process)
    for step in range(start, steps):
        rate = learning_rate(step, steps, lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(accelerator.device, precision):
            value = loss(network, step_generator(seed, step), step / steps)
        recent.append(accelerator.reduce(value.detach(), "mean").item())
        accelerator.backward(value)
        if accelerator.num_processes > 1:
            _average(accelerator, [weight.grad for weight in model.parameters() if weight.grad is not None])
        norm = float(accelerator.clip_grad_norm_(model.parameters(), CLIP))
        if not math.isfinite(recent[-1]) or not math.isfinite(norm):
            bar.close()
            raise TrainingDiverged(f"{title}: the loss is {recent[-1]}, its gradient's norm {norm} at step {step}. "
                                   f"{_kept(work)} Lower the learning rate ({lr:g}) and run again.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        left = steps - step - 1
        if not left or ((step + 1) % every == 0 and left >= every):  # no last mean of fewer steps
            history.append({"step": step + 1, "loss": sum(recent) / len(recent), "lr": rate})
            bar.set_postfix(loss=f"{history[-1]['loss']:.4f}", lr=f"{rate:.1e}", refresh=False)
            recent = []
        if ((step + 1) % save_every == 0 or step + 1 == steps) and accelerator.is_main_process:
            _save(work, {"step": step + 1, "history": history, "recent": recent}, model, ema, optimizer)
        bar.update()
    bar.close()
    ema.copy_to(model.parameters())
    return history


def watched(loss: Callable[[nn.Module, torch.Generator, float], Tensor], look: Callable[[nn.Module], float],
            points: int, path: Path) -> Callable[[nn.Module, torch.Generator, float], Tensor]:
    """Give a loss that also writes down, now and then along the training, what `look` says of the model.

    Parameters
    ----------
    loss : callable(model, generator, way) -> scalar Tensor, as `train` takes it
    look : callable(model) -> float; it must draw nothing from the step's generator, and keep no gradient
    points : int
        So many stretches of equal length has the training; `look` is asked at the first step of each.
    path : Path
        A JSON file of stretch ("0", "1", ...) to value. A resumed training takes none of them twice.
    """
    seen = json.loads(path.read_text()) if path.exists() else {}

    def watching(model: nn.Module, generator: torch.Generator, way: float) -> Tensor:
        if (stretch := str(int(way * points))) not in seen:
            seen[stretch] = look(model)
            write_json(path, seen, allow_nan=True)
        return loss(model, generator, way)

    return watching


def own_share(rows: Tensor) -> Tensor:
    """Give this process's rows of a batch that all processes of a training have drawn alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    return rows[torch.distributed.get_rank()::torch.distributed.get_world_size()]


def _average(accelerator: Accelerator, gradients: list[Tensor]) -> None:
    """Put the mean over all processes in each gradient's place."""
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def _kept(work: Path) -> str:
    state = work / "state" / "state.json"
    if not state.exists():
        return "No state was saved before."
    return f"The last good state, step {json.loads(state.read_text())['step']}, is kept in {work}."


def _save(work: Path, state: dict, model: nn.Module, ema: EMAModel, optimizer) -> None:
    """Write the whole training state to a new folder, then put it in the place of the old one."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema/{i}": tensor for i, tensor in enumerate(ema.shadow_params)}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": torch.as_tensor(value) for name, value in slots.items()}
    fresh, current, old = work / "state.new", work / "state", work / "state.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
              fresh / "state.safetensors")
    (fresh / "state.json").write_text(json.dumps(state | {"ema_step": ema.optimization_step}))
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        os.replace(current, old)
    os.replace(fresh, current)
    shutil.rmtree(old, ignore_errors=True)


def _resume(work: Path, model: nn.Module, ema: EMAModel, optimizer) -> tuple[int, list[dict], list[float]]:
    """Load the state that `_save` left; a kill between its two renames leaves the good state under the old name."""
    current, old = work / "state", work / "state.old"
    if not current.exists() and old.exists():
        os.replace(old, current)
    if not current.exists():
        return 0, [], []
    state, tensors = json.loads((current / "state.json").read_text()), load_file(current / "state.safetensors")
    part = {kind: {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(kind + "/")}
            for kind in ("model", "ema", "optimizer")}
    model.load_state_dict(part["model"])
    for i, shadow in enumerate(ema.shadow_params):
        shadow.data.copy_(part["ema"][str(i)])
    ema.optimization_step = state["ema_step"]
    slots: dict[int, dict] = {}
    for name, tensor in part["optimizer"].items():
        i, slot = name.split("/")
        slots.setdefault(int(i), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    for weight, slots in optimizer.state.items():  # laid out as the weight is, which the fused optimiser asks for
        for name, tensor in slots.items():
            if tensor.shape == weight.shape:
                slots[name] = torch.empty_like(weight).copy_(tensor)
    tqdm.write(f"resuming from step {state['step']} ({work.name})", file=sys.stderr)
    return state["step"], state["history"], state["recent"]
