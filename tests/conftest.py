"""A tiny teacher with random weights, and plans for it."""

import hypothesis
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from xdist.scheduler import LoadFileScheduling

from lib.grid import blocks, graphs
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.teachers import networks

SHAPE = (1, 16, 16)

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")
torch.set_num_threads(1)  # more gain little on networks this small, and cost much where processes run side by side


class Shares(LoadFileScheduling):
    """What processes share out: files of tests, and all notebooks in one, for they build on each other."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "notebooks" if file.endswith(".ipynb") else file


def pytest_xdist_make_scheduler(config, log):
    return Shares(config, log)


@pytest.fixture(scope="session")
def unet():
    torch.manual_seed(0)
    return networks.unet(SHAPE, [8, 8, 16], 1, 4).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def schedule():
    return networks.noise_schedule()


@pytest.fixture(scope="session")
def described(unet):
    return blocks.describe(unet)


@pytest.fixture(scope="session")
def teacher(described, schedule):
    """The full plan of ten DDIM steps."""
    fits = NoiseSchedule.of(schedule)
    return Plan.full(trailing(10, fits.train_timesteps), fits, described)


@pytest.fixture(scope="session")
def noise():
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in on the CPU: the operators that ran run again, on the very tensors that they had."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.ran.append((func, args, kwargs or {}, output))
        return output

    def replay(self):
        for func, args, kwargs, output in self.ran:
            for old, fresh in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)


@pytest.fixture
def tapes(monkeypatch):
    """Let all sampling record its steps, on tapes; gives the list of them."""
    made = []

    def record(run, pool, device):
        with Tape() as tape:
            output = run()
        made.append(tape)
        return tape.replay, output

    monkeypatch.setattr(graphs, "engine", graphs.GraphedEngine)
    monkeypatch.setattr(graphs, "cuda_graph", record)
    monkeypatch.setattr(graphs, "_recording", True)
    return made
