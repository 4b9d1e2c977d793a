"""Levels judged one by one: the teacher's features in, and how far from the teacher's come out."""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.grid import blocks, cost, sampling
from lib.grid.saving import write_json
from lib.methods.diffnas.students import Architecture, Form, FormSpace, UNet, residuals, shape
from lib.methods.diffnas.supernets import choose


@dataclass
class Seen:
    """What a level of the teacher was given, and what it gave: skip connections, if it has any; its feature last."""

    arguments: tuple
    options: dict
    outputs: tuple[Tensor, ...]


def observe(teacher: UNet, x_t: Tensor, t: Tensor, **conditions) -> tuple[dict[str, Seen], Tensor]:
    """Run the teacher once and give what each level saw, and the noise that it predicts.

    Parameters
    ----------
    x_t : Tensor, (B, C, H, W)
    t : Tensor, (B,)
    conditions : what else the teacher reads
    """
    seen: dict[str, Seen] = {}

    def hook(level: str):
        def keep(_, arguments, options, output) -> None:
            seen[level] = Seen(arguments, options, _outputs(output))
        return keep

    handles = [teacher.get_submodule(path).register_forward_hook(hook(level), with_kwargs=True)
               for level, path in blocks.describe(teacher).level_modules.items()]
    try:
        with torch.no_grad():
            predicted = teacher(x_t, t, **conditions).sample
    finally:
        for handle in handles:
            handle.remove()
    return seen, predicted


def _outputs(output: Tensor | tuple) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output[1])  # the last skip is the feature


def level_errors(level: nn.Module, seen: Seen) -> tuple[Tensor, Tensor]:
    """Give the errors of what a level makes of the teacher's features.

    Returns
    -------
    relative : mean over the level's outputs of |made - teacher's|^2 / Var(teacher's): levels of all scales weigh alike
    raw : the same without the variance
    """
    made = _outputs(level(*seen.arguments, **seen.options))
    raw = torch.stack([F.mse_loss(one.float(), target.float()) for one, target in zip(made, seen.outputs)])
    return (raw / torch.stack([target.float().var() for target in seen.outputs])).mean(), raw.mean()


def level_losses(model: UNet, seen: Mapping[str, Seen]) -> dict[str, Tensor]:
    """Give every level's relative error, each for itself, from one pass of the teacher."""
    return {level: level_errors(model.get_submodule(path), seen[level])[0]
            for level, path in blocks.describe(model).level_modules.items()}


def candidates(model: nn.Module, space: FormSpace, level: str) -> Iterator[dict[str, Form]]:
    """Walk all architectures of one level."""
    start = blocks.describe(model).level_modules[level] + "."
    members = {path: space.of(block) for path, block in residuals(model).items() if path.startswith(start)}
    for chosen in itertools.product(*members.values()):
        yield dict(zip(members, chosen))


def resolutions(model: UNet) -> dict[str, tuple[int, int]]:
    """Give the height and width at which each residual block's convolutions run, at the model's sample size."""
    found = {}
    plain = UNet2DModel if isinstance(model, UNet2DModel) else UNet2DConditionModel
    with torch.device("meta"):
        twin = plain.from_config({name: value for name, value in model.config.items() if name != "architecture"})
        for path, block in residuals(twin).items():
            block.register_forward_hook(lambda _, __, output, path=path: found.update({path: tuple(output.shape[-2:])}))
        twin(torch.empty(1, *blocks.input_shape(model)), torch.zeros(1),
             **blocks.example_conditions(model, 1, "meta"))
    return found


def form_macs(block: ResnetBlock2D, form: Form, resolution: tuple[int, int]) -> int:
    """Give the MACs of a block's searched parts in a form; whatever else it runs costs the same in all forms."""
    pixels = resolution[0] * resolution[1]
    return (pixels * form.width * (block.in_channels * form.kernel_1**2 + block.out_channels * form.kernel_2**2)
            + form.width * block.time_emb_proj.in_features)


def searched_macs(model: UNet, architecture: Architecture) -> int:
    """Give the MACs of all searched parts of a network in an architecture, as in `form_macs`."""
    found, at = residuals(model), resolutions(model)
    return sum(form_macs(found[path], form, at[path]) for path, form in architecture.items())


@torch.inference_mode()
def form_seconds(model: UNet, space: FormSpace, images: int, repeats: int, *, precision: str, kept: Path
                 ) -> dict[str, dict[Form, float]]:
    """Measure the median seconds of each residual block in each of its forms, by itself, on the model's device.

    All forms lie in memory as `lib.teachers.networks.load` lays a teacher: channels-last on CUDA. No graph is recorded.

    Parameters
    ----------
    model : a teacher; time does not hang on the weights
    images : int, of a batch
    repeats : int, rounds in which all forms of a block take turns
    kept : Path
        A JSON file that keeps the table: what was measured once is not measured again, so one search has one table.
    """
    found, at = residuals(model), resolutions(model)
    if not kept.exists():
        seconds, device = {}, next(model.parameters()).device
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        with sampling.autocast(device, precision):
            for path, block in found.items():
                h = torch.randn(images, block.in_channels, *at[path], device=device).to(memory_format=layout)
                embedded = torch.randn(images, block.time_emb_proj.in_features, device=device)
                shaped = {form: copy.deepcopy(block) for form in space.of(block)}
                for form, one in shaped.items():
                    shape(one, form)
                    one.to(device, memory_format=layout)
                runs = {form: partial(one, h, embedded) for form, one in shaped.items()}
                times = cost.interleave(runs, repeats, title=f"forms of {path}")
                seconds[path] = [float(np.median(times[form])) for form in runs]
        write_json(kept, seconds)
    return {path: dict(zip(space.of(found[path]), some)) for path, some in json.loads(kept.read_text()).items()}


class _Shared:
    """Inside, a level's residual blocks run again only where their own form, or one before, has changed."""

    def __init__(self, blocks: list[ResnetBlock2D]):
        self.blocks = blocks

    def __enter__(self) -> None:
        self.kept: dict[int, tuple[tuple[Form, ...], Tensor]] = {}
        self.plain = [block.forward for block in self.blocks]
        for place, block in enumerate(self.blocks):
            block.forward = self._remembering(place, block.forward)

    def _remembering(self, place: int, forward):
        def run(*arguments, **options) -> Tensor:
            prefix = tuple(block.choice.form for block in self.blocks[:place + 1])
            if self.kept.get(place, ((),))[0] != prefix:
                self.kept[place] = prefix, forward(*arguments, **options)
            return self.kept[place][1]
        return run

    def __exit__(self, *_) -> None:
        for block, plain in zip(self.blocks, self.plain):
            block.forward = plain


@torch.no_grad()
def level_table(model: UNet, space: FormSpace, batches: list[Mapping[str, Seen]], level: str, work: Path
                ) -> pd.DataFrame:
    """Try all architectures of one level: every one, with prefixes that many share run once.

    Parameters
    ----------
    model : a supernet
    batches : what the teacher's levels saw, by `observe`; the same for all candidates
    work : Path
        Folder that keeps a finished table, so that an interrupted run goes on.

    Returns
    -------
    table : columns forms (dict of path to Form), loss and raw (`level_errors`, means over batches), macs
    """
    found, at = residuals(model), resolutions(model)
    every = list(candidates(model, space, level))
    macs = [sum(form_macs(found[path], form, at[path]) for path, form in chosen.items()) for chosen in every]
    kept = work / f"tried_{level}.json"
    if not kept.exists():
        module = model.get_submodule(blocks.describe(model).level_modules[level])
        total = torch.zeros(len(every), 2)
        bar = tqdm(total=len(batches) * len(every), desc=f"candidates of {level}", unit="candidate")
        for seen in batches:
            with _Shared([found[path] for path in every[0]]):
                for place, chosen in enumerate(every):
                    choose(model, chosen)
                    total[place] += torch.stack(level_errors(module, seen[level])).cpu()
                    bar.update()
        bar.close()
        write_json(kept, (total / len(batches)).tolist())
    losses = pd.DataFrame(json.loads(kept.read_text()), columns=["loss", "raw"])
    return pd.concat([pd.DataFrame({"forms": every, "macs": macs}), losses], axis=1)
