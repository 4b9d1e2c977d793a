"""Recorded steps, on tapes instead of CUDA graphs (conftest): when they are made, reused, dropped, and given up."""

import copy

import pytest
import torch
from torch import nn

from lib.grid import graphs, sampling
from lib.grid.model import Conditions, Model
from lib.grid.plan import NoiseSchedule, Plan


@pytest.fixture
def own(unet):
    """A network that no other test has recorded."""
    return copy.deepcopy(unet)


@pytest.fixture
def deepcache(teacher, described):
    return Plan.deepcache(5, described.branch(1), teacher)


@pytest.fixture
def plain(unet, schedule, deepcache, noise):
    """The images without recordings; to be asked for before `tapes`."""
    return sampling.sample(Model(unet, schedule), deepcache, noise)


@pytest.fixture
def calls(own):
    """How often the network's Python runs: a replay runs none of it."""
    made = []

    class Counted(nn.Conv2d):  # a hook would keep the network from being recorded
        def forward(self, x):
            made.append(1)
            return super().forward(x)

    own.conv_in.__class__ = Counted
    return made


def test_a_kind_of_step_is_recorded_once_and_then_no_python_runs(plain, own, schedule, deepcache, noise, tapes, calls):
    for _ in range(2):
        assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), plain)
    assert len(tapes) == 2  # the full step, which keeps a feature, and the partial one
    calls.clear()
    assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), plain)
    assert not calls


def test_every_batch_size_has_recordings_of_its_own(own, schedule, deepcache, noise, tapes):
    for _ in range(3):
        for count in (3, 1, 2):
            alone = sampling.sample(Model(own, schedule), deepcache, noise, batch_size=count)
            together = sampling.sample(Model(own, schedule), deepcache, noise)
            torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert len(tapes) == 6


def test_plans_share_recordings(own, schedule, teacher, deepcache, noise, tapes):
    for _ in range(2):
        sampling.sample(Model(own, schedule), deepcache, noise)
    made = len(tapes)
    sampling.sample(Model(own, schedule), deepcache.with_cells(deepcache.computes, method="another"), noise)
    assert len(tapes) == made


def test_no_more_recordings_are_kept_than_the_limit(plain, own, schedule, deepcache, noise, tapes, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 1)
    for _ in range(3):
        assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), plain)
        assert len(graphs._shelves[own].recordings) == 1 < len(tapes)


def test_weights_trained_on_are_read_anew_and_moved_ones_recorded_anew(own, schedule, deepcache, noise, tapes):
    for _ in range(2):
        before = sampling.sample(Model(own, schedule), deepcache, noise)
    made = len(tapes)
    with torch.no_grad():
        own.conv_out.weight.mul_(0.5)
    other = sampling.sample(Model(own, schedule), deepcache, noise)
    assert len(tapes) == made and not torch.equal(other, before)
    own.double().float()  # elsewhere in memory
    for _ in range(2):
        assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), other)
    assert len(tapes) == 2 * made


def test_a_step_that_cannot_be_recorded_runs_as_it_is_with_a_message(plain, own, schedule, deepcache, noise, tapes,
                                                                     monkeypatch):
    def refuse(run, pool, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "cuda_graph", refuse)
    with pytest.warns(UserWarning, match="all run without from here: operation not permitted"):
        assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), plain)
    assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), plain)


def test_a_step_that_takes_or_gives_something_that_can_change_is_not_recorded(plain, own, schedule, deepcache, noise,
                                                                              tapes, monkeypatch):
    """Such as a cache of keys and values, which a replay would give again as it was."""
    assert graphs._is_plain(noise) and graphs._is_plain(None) and not graphs._is_plain(object())
    monkeypatch.setattr(graphs, "_is_plain", lambda leaf: False)
    for _ in range(3):
        assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), plain)
    assert not tapes


def test_what_lies_on_no_cuda_device_is_not_recorded():
    with pytest.raises(RuntimeError, match="moved to cpu"):
        graphs.cuda_graph(lambda: None, None, torch.device("cpu"))


def test_gradients_flow_where_they_are_asked_for(own, schedule, teacher, noise, tapes):
    x_t = noise.clone().requires_grad_()
    with graphs.engine(own, teacher, NoiseSchedule.of(schedule)) as engine:
        for step in range(teacher.steps):
            predicted = engine(x_t, step)
    predicted.sum().backward()
    assert x_t.grad.abs().sum() > 0 and not tapes


def test_an_exception_in_a_run_leaves_nothing_behind(own, schedule, deepcache, noise, tapes):
    wanted = [sampling.sample(Model(own, schedule), deepcache, noise) for _ in range(3)][-1]
    engine = graphs.engine(own, deepcache, NoiseSchedule.of(schedule))
    with pytest.raises(KeyboardInterrupt), torch.inference_mode(), engine:
        for number, _ in enumerate(sampling.walk(engine, noise, Conditions())):
            if number == 3:
                raise KeyboardInterrupt
    assert torch.equal(sampling.sample(Model(own, schedule), deepcache, noise), wanted)
