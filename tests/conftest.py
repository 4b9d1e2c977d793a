"""A tiny teacher with random weights, and plans for it."""

import hypothesis
import pytest
import torch

from lib import blocks, teachers
from lib.plan import NoiseSchedule, Plan, trailing

SHAPE = (1, 16, 16)

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def unet():
    torch.manual_seed(0)
    return teachers.unet(SHAPE, [8, 8, 16], 1, 4).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def schedule():
    return teachers.noise_schedule()


@pytest.fixture(scope="session")
def described(unet):
    return blocks.describe(unet)


@pytest.fixture(scope="session")
def teacher(described, schedule):
    """The full plan of ten DDIM steps."""
    fits = NoiseSchedule.of(schedule)
    return Plan.full(trailing(10, fits.train_timesteps), fits, described.names)


@pytest.fixture(scope="session")
def noise():
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
