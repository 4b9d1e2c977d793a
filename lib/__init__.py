"""Lean Diffusion: three ways to make a diffusion model cheaper to sample, on one grid.

Sampling walks steps, the network at each step is a list of blocks: a grid of cells, and each cell either computes its
block or reuses what the block gave last. A *model* and a *plan* (which cells compute) are all there is; see
``lib.grid.plan``.
"""

import warnings

from tqdm import TqdmWarning

from lib._torchvision import repair as _repair_torchvision

__version__ = "0.1.0"

_repair_torchvision()
warnings.filterwarnings("ignore", category=TqdmWarning)  # libraries ask for notebook widgets; text is what we want
