"""Lets torchvision's Python parts work where its compiled library does not fit the installed torch.

A registry's torchvision is built for CUDA; beside a CPU-only torch its import fails with ``operator torchvision::nms
does not exist``, and torch-fidelity and diffusers fail with it. Nothing in this project calls these operators: it is
enough that they are declared.
"""

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # a Library's declarations live as long as the object


def repair() -> None:
    """Declare torchvision's two operators if its compiled library cannot be loaded; else change nothing."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _declared:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(operators)
