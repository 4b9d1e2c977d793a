"""Lean Diffusion: three ways to make a diffusion model cheaper to sample, on one grid.

Sampling walks steps, the network at each step is a list of blocks: a grid of cells, and each cell computes its block,
holds what the block gave last, or forecasts it. A *model* and a *plan* (which cells compute) are all there is; see
``lib.grid.plan``. The wings grid, teachers, judging, methods and study each say in a few lines what lives there.
"""

import warnings

from tqdm import TqdmWarning

from lib._torchvision import repair as _repair_torchvision

__version__ = "0.1.0"

_repair_torchvision()
warnings.filterwarnings("ignore", category=TqdmWarning)  # libraries ask for notebook widgets; text is what we want
