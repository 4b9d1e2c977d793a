"""Supernets: networks whose residual blocks hold all of their forms in one set of weights."""

import copy
from dataclasses import asdict, dataclass

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from lib.diffnas.students import Architecture, ConditionStudent, Form, FormSpace, Student, UNet, form_of, residuals

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
        own = form_of(block)
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


def draw(model: nn.Module, space: FormSpace, generator: torch.Generator) -> dict[str, Form]:
    """Draw one form for each residual block, every form alike."""
    options = {path: space.of(block) for path, block in residuals(model).items()}
    return {path: some[int(torch.randint(len(some), (1,), generator=generator))] for path, some in options.items()}
