"""Both doors of a plan, `Planned` and `Engine`, on stock pipelines, beside the slow reference."""

import contextlib

import numpy as np
import reference
import tiny
import torch

from lib.apply import Planned
from lib.grid import blocks
from lib.grid.engine import Engine
from lib.grid.plan import LINE, NoiseSchedule, Plan, trailing


def full_plan(pipe, steps=tiny.STEPS, order=1):
    described, fits = blocks.describe(tiny.network(pipe)), NoiseSchedule.of(pipe.scheduler)
    return Plan.full(trailing(steps, fits.train_timesteps), fits, described, order)


def random_plan(full, seed):
    """Cells and columns of all states."""
    draw = np.random.default_rng(seed)
    cells = draw.choice([0, 1, 2, 3], (full.steps, len(full.blocks)), p=[0.3, 0.5, 0.15, 0.05])
    net = draw.choice([0, 1, 2], full.steps, p=[0.15, 0.7, 0.15])
    cells[0], net[0] = 1, 1
    return full.with_cells(cells, net)


def plans(pipe):
    full, described = full_plan(pipe), blocks.describe(tiny.network(pipe))
    found = {f"deepcache {branch}": Plan.deepcache(3, described.branch(branch), full)
             for branch in range(0, described.branches, 2)}
    found |= {"line": Plan.deepcache(2, described.branch(0), full, LINE), "full": full}
    held = np.ones((full.steps, len(full.blocks)), bool)
    held[2::3] = held[4::3] = False
    found["held columns"] = full.with_cells(held, held[:, 0].astype(int))
    return found | {f"random {seed}": random_plan(full, seed) for seed in range(3)}


@contextlib.contextmanager
def watched(model):
    """The outputs that a pipeline is given."""
    outputs = []
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output[0].clone()))
    yield outputs
    handle.remove()


def by_planned(pipe, plan, run):
    with Planned(pipe, plan), watched(tiny.network(pipe)) as outputs:
        run()
    return outputs


def by_engine(pipe, plan, run):
    model = tiny.network(pipe)
    with Engine(model, plan, NoiseSchedule.of(pipe.scheduler)), watched(model) as outputs:
        run()
    return outputs


def by_reference(pipe, plan, run):
    with reference.Watched(tiny.network(pipe), plan) as watch:
        run()
    return watch.outputs


def check(pipe, plan, run, doors=(by_planned, by_engine)):
    """Both doors give what the reference gives, at every call; the reference walks with the pipeline's own DDIM."""
    wanted = by_reference(pipe, plan, run)
    assert wanted
    for door in doors:
        outputs = door(pipe, plan, run)
        assert len(outputs) == len(wanted), door.__name__
        for one, other in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), msg=door.__name__)
    return wanted


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))
