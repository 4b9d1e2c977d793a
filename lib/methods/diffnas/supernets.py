"""Supernets: networks whose residual blocks hold all of their forms in one set of weights."""

import copy
from dataclasses import asdict

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from lib.methods.diffnas.students import (
    Architecture,
    ConditionStudent,
    Form,
    FormSpace,
    Student,
    UNet,
    form_of,
    residuals,
)

SEARCHED = ("conv1", "time_emb_proj", "norm2", "conv2")
"""The parts of a residual block that have another shape in another form."""


def resized(weight: Tensor, kernel: int) -> Tensor:
    """Give a convolution's weight (out, in, k, k) with another kernel: its middle, or itself amid zeros."""
    more = (kernel - weight.shape[-1]) // 2
    return F.pad(weight, (more,) * 4)  # a negative padding cuts


class _Choice:
    """The form that a block runs in now, and the channels that each width takes of the widest.

    A width takes the same number of channels from each group of the norm, those first that weigh most in the teacher:
    so all widths normalise over the same groups, as the teacher does.

    Attributes
    ----------
    form : Form
    places : dict of width to Tensor of int, (width,), channels of the widest
    origin : Tensor of int, (own width,), the teacher's channels in the order in which they are placed
    """

    def __init__(self, block: ResnetBlock2D, widths: set[int]):
        self.form, groups = form_of(block), block.norm2.num_groups
        channels = torch.arange(max(widths)).view(groups, -1)
        self.places = {width: channels[:, :width // groups].flatten() for width in widths}
        weighs = block.conv2.weight.abs().sum(dim=(0, 2, 3)) * block.norm2.weight.abs()
        order = weighs.view(groups, -1).argsort(dim=1, descending=True)
        self.origin = (order + order.shape[1] * torch.arange(groups, device=order.device)[:, None]).flatten()

    def taken(self, width: int) -> tuple[Tensor, Tensor]:
        """Give what a width takes over from the teacher: places among its own channels, and channels of the teacher."""
        found = torch.isin(self.places[width], self.places[len(self.origin)])
        held = torch.isin(self.places[len(self.origin)], self.places[width])
        return torch.nonzero(found).flatten(), self.origin[held]


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
        own = choice.places[len(choice.origin)]
        for kernel in sorted(kernels):
            wide = nn.Conv2d(given, made, kernel, padding=kernel // 2)
            weight = resized(conv.weight, kernel)
            with torch.no_grad():
                if first:
                    wide.weight[own], wide.bias[own] = weight[choice.origin], conv.bias[choice.origin]
                else:
                    wide.weight.zero_()  # channels beyond the teacher's change nothing at first
                    wide.weight[:, own] = weight[:, choice.origin]
                    wide.bias.copy_(conv.bias)
            self.kernels[str(kernel)] = wide

    def sliced(self, form: Form) -> dict[str, Tensor]:
        wide = self.kernels[str(form.kernel_1 if self.first else form.kernel_2)]
        places = self.choice.places[form.width]
        if self.first:
            return {"weight": wide.weight[places], "bias": wide.bias[places]}
        return {"weight": wide.weight[:, places], "bias": wide.bias}

    def forward(self, x: Tensor) -> Tensor:
        part = self.sliced(self.choice.form)
        return F.conv2d(x, part["weight"], part["bias"], padding=part["weight"].shape[-1] // 2)


class _Linear(_Elastic):
    def __init__(self, choice: _Choice, linear: nn.Linear, made: int):
        super().__init__(choice)
        self.in_features = linear.in_features
        self.wide = nn.Linear(linear.in_features, made)
        own = choice.places[len(choice.origin)]
        with torch.no_grad():
            self.wide.weight[own], self.wide.bias[own] = linear.weight[choice.origin], linear.bias[choice.origin]

    def sliced(self, form: Form) -> dict[str, Tensor]:
        places = self.choice.places[form.width]
        return {"weight": self.wide.weight[places], "bias": self.wide.bias[places]}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, **self.sliced(self.choice.form))


class _Norm(_Elastic):
    def __init__(self, choice: _Choice, norm: nn.GroupNorm):
        super().__init__(choice)
        self.widths = nn.ModuleDict()
        for width in sorted(choice.places):
            one, (places, channels) = nn.GroupNorm(norm.num_groups, width, eps=norm.eps), choice.taken(width)
            with torch.no_grad():
                one.weight[places], one.bias[places] = norm.weight[channels], norm.bias[channels]
            self.widths[str(width)] = one

    def sliced(self, form: Form) -> dict[str, Tensor]:
        one = self.widths[str(form.width)]
        return {"weight": one.weight, "bias": one.bias}

    def forward(self, x: Tensor) -> Tensor:
        return self.widths[str(self.choice.form.width)](x)


def supernet(teacher: UNet, space: FormSpace) -> UNet:
    """Give a copy of a teacher whose residual blocks hold all of their forms, weights taken from the teacher.

    Kernels have weights of their own; a width takes some channels of the widest, the same number from each group of the
    norm, with a norm of its own. In the teacher's forms it gives what the teacher gives.
    """
    model = copy.deepcopy(teacher)
    with torch.device(teacher.device):
        for block in residuals(model).values():
            own = form_of(block)
            choices = {*space.of(block), own}
            first, second = {form.kernel_1 for form in choices}, {form.kernel_2 for form in choices}
            block.choice = choice = _Choice(block, {form.width for form in choices})
            widest = max(choice.places)
            block.conv1 = _Conv(choice, block.conv1, first, block.in_channels, widest, first=True)
            block.conv2 = _Conv(choice, block.conv2, second, widest, block.conv2.out_channels, first=False)
            block.time_emb_proj, block.norm2 = _Linear(choice, block.time_emb_proj, widest), _Norm(choice, block.norm2)
    return model.requires_grad_(True)


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
