"""DiffNAS (arXiv 2311.04950): smaller residual blocks, searched level by level against the teacher's features.

A residual block may have other kernels and another middle width; what it reads and gives keeps the teacher's shape. So
each level (a resolution going down or up, the middle) can be trained and judged alone: teacher features in, teacher
features out. A `Student` is a diffusers model of such blocks, and `supernet` holds all of them in one set of weights.
"""

import copy
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import (  # noqa: F401 (a pipeline that loads a student asks for ModelMixin)
    DDIMScheduler,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.resnet import ResnetBlock2D
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib import blocks as _blocks
from lib.teachers import noisy_batch


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
    found = {path: module for level in _blocks.describe(model).level_modules.values()
             for path, module in model.get_submodule(level).named_modules(prefix=level)
             if isinstance(module, ResnetBlock2D)}
    for path, block in found.items():
        if block.time_embedding_norm != "default" or block.time_emb_proj is None:
            raise TypeError(f"{path}: only residual blocks that add a time embedding are supported")
    return found


def _form(block: ResnetBlock2D) -> Form:
    return Form(block.conv1.kernel_size[0], block.conv2.kernel_size[0], block.conv1.out_channels)


def forms(model: nn.Module) -> dict[str, Form]:
    """Give the architecture of a network."""
    return {path: _form(block) for path, block in residuals(model).items()}


@dataclass(frozen=True)
class FormSpace:
    """The forms a residual block may take.

    Attributes
    ----------
    kernels : tuple of int, odd
    widths : tuple of float, of the block's own width; rounded to the norm's groups, equal ones merged
    """

    kernels: tuple[int, ...]
    widths: tuple[float, ...]

    def __post_init__(self):
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels: must be odd, got {list(self.kernels)}")

    def of(self, block: ResnetBlock2D) -> list[Form]:
        """Give a block's forms."""
        groups, width = block.norm1.num_groups, block.out_channels
        channels = sorted({max(groups, groups * round(share * width / groups)) for share in self.widths})
        return [Form(*kernels, count) for *kernels, count in itertools.product(self.kernels, self.kernels, channels)]


# ---- students --------------------------------------------------------------------------------------------------------


def shape(block: ResnetBlock2D, form: Form) -> None:
    """Give a block another form, in place, with fresh weights where the form is another."""
    if form == _form(block):
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


def student(model: UNet, architecture: Architecture) -> Student | ConditionStudent:
    """Take a student out of a supernet, with the weights that its blocks have there.

    From a supernet that nobody has trained these are the teacher's, cut or padded where the form is another.
    """
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    config["architecture"] = {path: asdict(form) for path, form in architecture.items()}
    kind = Student if isinstance(model, UNet2DModel) else ConditionStudent
    made = kind.from_config(config).to(model.device)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in made.state_dict()}
    for path, block in residuals(model).items():
        for name in SEARCHED:
            for key, tensor in getattr(block, name).sliced(architecture[path]).items():
                weights[f"{path}.{name}.{key}"] = tensor
    made.load_state_dict(weights)
    return made


# ---- the supernet ----------------------------------------------------------------------------------------------------

SEARCHED = ("conv1", "time_emb_proj", "norm2", "conv2")
"""The parts of a residual block that have another shape in another form."""


def resized(weight: Tensor, kernel: int) -> Tensor:
    """Give a convolution's weight (out, in, k, k) with another kernel: its middle, or itself amid zeros."""
    more = (kernel - weight.shape[-1]) // 2
    return F.pad(weight, (more,) * 4)  # a negative padding cuts


@dataclass
class _Choice:
    """The form that a block runs in now."""

    form: Form


class _Elastic(nn.Module):
    """One part of a residual block in all of its forms; it runs in the form that its block is in."""

    def __init__(self, choice: _Choice):
        super().__init__()
        self.choice = choice


class _Conv(_Elastic):
    def __init__(self, choice: _Choice, conv: nn.Conv2d, kernels: set[int], given: int, made: int, first: bool):
        super().__init__(choice)
        self.first = first
        self.kernels = nn.ModuleDict()
        for kernel in sorted(kernels):
            wide = nn.Conv2d(given, made, kernel, padding=kernel // 2)
            with torch.no_grad():
                if not first:
                    wide.weight.zero_()  # channels beyond the teacher's change nothing at first
                own = resized(conv.weight, kernel)[:made, :given]
                wide.weight[:own.shape[0], :own.shape[1]] = own
                wide.bias[:conv.out_channels] = conv.bias[:made]
            self.kernels[str(kernel)] = wide

    def sliced(self, form: Form) -> dict[str, Tensor]:
        wide = self.kernels[str(form.kernel_1 if self.first else form.kernel_2)]
        if self.first:
            return {"weight": wide.weight[:form.width], "bias": wide.bias[:form.width]}
        return {"weight": wide.weight[:, :form.width], "bias": wide.bias}

    def forward(self, x: Tensor) -> Tensor:
        part = self.sliced(self.choice.form)
        return F.conv2d(x, part["weight"], part["bias"], padding=part["weight"].shape[-1] // 2)


class _Linear(_Elastic):
    def __init__(self, choice: _Choice, linear: nn.Linear, made: int):
        super().__init__(choice)
        self.in_features = linear.in_features
        self.wide = nn.Linear(linear.in_features, made)
        with torch.no_grad():
            self.wide.weight[:linear.out_features] = linear.weight[:made]
            self.wide.bias[:linear.out_features] = linear.bias[:made]

    def sliced(self, form: Form) -> dict[str, Tensor]:
        return {"weight": self.wide.weight[:form.width], "bias": self.wide.bias[:form.width]}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, **self.sliced(self.choice.form))


class _Norm(_Elastic):
    def __init__(self, choice: _Choice, norm: nn.GroupNorm, widths: set[int]):
        super().__init__(choice)
        self.widths = nn.ModuleDict()
        for width in sorted(widths):
            one = nn.GroupNorm(norm.num_groups, width, eps=norm.eps)
            with torch.no_grad():
                one.weight[:norm.num_channels] = norm.weight[:width]
                one.bias[:norm.num_channels] = norm.bias[:width]
            self.widths[str(width)] = one

    def sliced(self, form: Form) -> dict[str, Tensor]:
        one = self.widths[str(form.width)]
        return {"weight": one.weight, "bias": one.bias}

    def forward(self, x: Tensor) -> Tensor:
        return self.widths[str(self.choice.form.width)](x)


def supernet(teacher: UNet, space: FormSpace) -> UNet:
    """Give a copy of a teacher whose residual blocks hold all of their forms, weights taken from the teacher.

    Kernels have weights of their own; a width takes the first channels of the widest, with a norm of its own. In the
    teacher's forms it gives what the teacher gives.
    """
    model = copy.deepcopy(teacher)
    for block in residuals(model).values():
        own = _form(block)
        choices = {*space.of(block), own}
        widths = {form.width for form in choices}
        first, second = {form.kernel_1 for form in choices}, {form.kernel_2 for form in choices}
        block.choice = _Choice(own)
        block.conv1 = _Conv(block.choice, block.conv1, first, block.in_channels, max(widths), first=True)
        block.time_emb_proj = _Linear(block.choice, block.time_emb_proj, max(widths))
        block.norm2 = _Norm(block.choice, block.norm2, widths)
        block.conv2 = _Conv(block.choice, block.conv2, second, max(widths), block.conv2.out_channels, first=False)
    return model.requires_grad_(True).to(teacher.device)


def choose(model: UNet, architecture: Architecture) -> None:
    """Let a supernet's blocks run in these forms from now on."""
    found = residuals(model)
    for path, form in architecture.items():
        found[path].choice.form = form


# ---- levels, one by one ----------------------------------------------------------------------------------------------


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
               for level, path in _blocks.describe(teacher).level_modules.items()]
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
            for level, path in _blocks.describe(model).level_modules.items()}


def draw(model: nn.Module, space: FormSpace, generator: torch.Generator) -> dict[str, Form]:
    """Draw one form for each residual block, every form alike."""
    options = {path: space.of(block) for path, block in residuals(model).items()}
    return {path: some[int(torch.randint(len(some), (1,), generator=generator))] for path, some in options.items()}


def paths(model: nn.Module, space: FormSpace, level: str) -> Iterator[dict[str, Form]]:
    """Walk all architectures of one level."""
    start = _blocks.describe(model).level_modules[level] + "."
    members = {path: space.of(block) for path, block in residuals(model).items() if path.startswith(start)}
    for chosen in itertools.product(*members.values()):
        yield dict(zip(members, chosen))


def resolutions(model: UNet) -> dict[str, tuple[int, int]]:
    """Give the height and width at which each residual block's convolutions run, at the model's sample size."""
    config, found = model.config, {}
    plain = UNet2DModel if isinstance(model, UNet2DModel) else UNet2DConditionModel
    with torch.device("meta"):
        twin = plain.from_config({name: value for name, value in config.items() if name != "architecture"})
        for path, block in residuals(twin).items():
            block.register_forward_hook(lambda _, __, output, path=path: found.update({path: tuple(output.shape[-2:])}))
        twin(torch.empty(1, config.in_channels, config.sample_size, config.sample_size), torch.zeros(1),
             **_blocks.example_conditions(model, 1, "meta"))
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
def judge(model: UNet, space: FormSpace, batches: list[Mapping[str, Seen]], level: str, work: Path) -> pd.DataFrame:
    """Judge all architectures of one level: every one, with prefixes that many share run once.

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
    candidates = list(paths(model, space, level))
    macs = [sum(form_macs(found[path], form, at[path]) for path, form in chosen.items()) for chosen in candidates]
    kept = work / f"judged_{level}.json"
    if not kept.exists():
        module = model.get_submodule(_blocks.describe(model).level_modules[level])
        total = torch.zeros(len(candidates), 2)
        bar = tqdm(total=len(batches) * len(candidates), desc=f"candidates of {level}", unit="candidate")
        for seen in batches:
            with _Shared([found[path] for path in candidates[0]]):
                for place, chosen in enumerate(candidates):
                    choose(model, chosen)
                    total[place] += torch.stack(level_errors(module, seen[level])).cpu()
                    bar.update()
        bar.close()
        kept.write_text(json.dumps((total / len(batches)).tolist()))
    losses = pd.DataFrame(json.loads(kept.read_text()), columns=["loss", "raw"])
    return pd.concat([pd.DataFrame({"forms": candidates, "macs": macs}), losses], axis=1)


# ---- choosing --------------------------------------------------------------------------------------------------------


def local_search(tables: Mapping[str, pd.DataFrame], own: Architecture, tolerance: float) -> dict[str, Form]:
    """Take in each level, for itself, the cheapest architecture at most `tolerance` times as bad as the reference.

    The reference is the teacher's own architecture with the supernet's weights.
    """
    chosen: dict[str, Form] = {}
    for table in tables.values():
        near = table[table["loss"] <= tolerance * pick(table, own)["loss"]]
        chosen |= near.sort_values(["macs", "loss"])["forms"].iloc[0]
    return chosen


def pick(table: pd.DataFrame, architecture: Architecture) -> pd.Series:
    """Give the row of a level's table that an architecture takes."""
    return table[[all(architecture[path] == form for path, form in forms.items()) for forms in table["forms"]]].iloc[0]


def smallest_tolerance(tables: Mapping[str, pd.DataFrame], own: Architecture,
                       fits: Callable[[Architecture], bool]) -> float:
    """Give the least tolerance, at least 1, at which `local_search` finds an architecture that fits.

    With a larger tolerance it costs fewer MACs; `fits` should follow these.

    Raises
    ------
    ValueError
        If even the cheapest of all architectures does not fit.
    """
    steps = np.concatenate([table["loss"] / pick(table, own)["loss"] for table in tables.values()])
    steps = np.unique(np.maximum(1.0, steps)) * (1 + 1e-9)  # so that rounding leaves nobody out
    place = bisect_left(steps, True, key=lambda tolerance: fits(local_search(tables, own, tolerance)))
    if place == len(steps):
        raise ValueError("not even the cheapest architecture is so small: raise the budget, or widen the space")
    return float(steps[place])


def global_search(tables: Mapping[str, pd.DataFrame], budget: int, by: str) -> dict[str, Form]:
    """Take one architecture a level so that the summed losses are least within a budget: an exact knapsack.

    Parameters
    ----------
    budget : int, MACs of all searched parts
    by : "loss" (relative) or "raw" (whose sum levels of large features rule)

    Raises
    ------
    ValueError
        If nothing costs so little.
    """
    sizes = [len(table) for table in tables.values()]
    losses = np.concatenate([table[by] for table in tables.values()])
    macs = np.concatenate([table["macs"] for table in tables.values()])
    one_each = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(macs / budget, -np.inf, 1)]
    solved = milp(losses / losses.max(), constraints=constraints, integrality=np.ones(len(losses)), bounds=Bounds(0, 1))
    if solved.x is None:
        raise ValueError(f"no architecture costs at most {budget} MACs in its searched parts: raise the budget")
    chosen: dict[str, Form] = {}
    for table, picked in zip(tables.values(), np.split(solved.x > 0.5, np.cumsum(sizes)[:-1])):
        chosen |= table["forms"][picked].iloc[0]
    return chosen


def random_search(model: UNet, space: FormSpace, budget: int, generator: torch.Generator) -> dict[str, Form]:
    """Draw an architecture, then redraw one block after another, where that is cheaper, until the budget is kept.

    Parameters
    ----------
    budget : int, MACs of all searched parts

    Raises
    ------
    ValueError
        If nothing costs so little.
    """
    found, at = residuals(model), resolutions(model)
    prices = {path: {form: form_macs(block, form, at[path]) for form in space.of(block)}
              for path, block in found.items()}
    least = sum(min(forms.values()) for forms in prices.values())
    if least > budget:
        raise ValueError(f"the searched parts cost at least {least} MACs: raise the budget of {budget}")
    chosen, places = draw(model, space, generator), list(found)
    while sum(prices[path][form] for path, form in chosen.items()) > budget:
        path = places[int(torch.randint(len(places), (1,), generator=generator))]
        other = list(prices[path])[int(torch.randint(len(prices[path]), (1,), generator=generator))]
        if prices[path][other] < prices[path][chosen[path]]:
            chosen[path] = other
    return chosen


# ---- training --------------------------------------------------------------------------------------------------------


def supernet_loss(teacher: UNet, images: Tensor, schedule: DDIMScheduler, batch_size: int, space: FormSpace):
    """Give the loss of single-path supernet training: every level in a random form, all from one pass of the teacher.

    Returns
    -------
    loss : callable(model, generator, way) -> scalar Tensor, as `lib.training.train` wants it
    """

    def loss(model: UNet, generator: torch.Generator, _: float) -> Tensor:
        x_t, t, _, _ = noisy_batch(images, schedule, batch_size, generator, teacher.device)
        choose(model, draw(model, space, generator))
        return torch.stack(list(level_losses(model, observe(teacher, x_t, t)[0]).values())).mean()

    return loss


def retraining_loss(teacher: UNet, images: Tensor, schedule: DDIMScheduler, batch_size: int,
                    beta: Callable[[float], float], target: str = "noise"):
    """Give the dynamic joint loss on random batches, with a weight that changes on the way through the training.

    Parameters
    ----------
    beta : callable(way) -> float, of `BETAS`
    target : see `joint_loss`

    Returns
    -------
    loss : callable(model, generator, way) -> scalar Tensor, as `lib.training.train` wants it
    """

    def loss(model: UNet, generator: torch.Generator, way: float) -> Tensor:
        x_t, t, noise, _ = noisy_batch(images, schedule, batch_size, generator, teacher.device)
        return joint_loss(model, teacher, x_t, t, noise, beta(way), target)

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
    seen, predicted = observe(teacher, x_t, t, **conditions) if beta < 1 or target == "teacher" else (None, None)
    total = torch.zeros((), device=x_t.device)
    if beta < 1:
        total = total + (1 - beta) * torch.stack(list(level_losses(made, seen).values())).mean()
    if beta > 0:
        wanted = predicted.float() if target == "teacher" else noise
        total = total + beta * F.mse_loss(made(x_t, t, **conditions).sample.float(), wanted)
    return total
