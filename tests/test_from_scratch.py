"""The page that imports nothing of the library gives what the library gives."""

import re
import sys

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from lib.grid import blocks
from lib.grid.plan import HOLD, LINE, NoiseSchedule, Plan
from lib.grid.sampling import sample
from lib.study import paths
from lib.teachers import networks

PAGE = paths.NOTEBOOKS / "plan_from_scratch.ipynb"
CELLS = [cell.source for cell in nbformat.read(PAGE, nbformat.NO_CONVERT).cells if cell.cell_type == "code"]


def test_it_is_a_page():
    lines = [line for cell in CELLS for line in cell.splitlines() if line.strip()]
    assert len(lines) <= 80 and sorted(len(cell.splitlines()) for cell in CELLS)[len(CELLS) // 2] <= 4
    assert not any(re.search(r"(?m)^\s*(from|import) lib\b", cell) for cell in CELLS)


@pytest.fixture(scope="module")
def page():
    """What its cells made, up to the search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(paths.NOTEBOOKS)
        patch.setitem(sys.modules, "torchvision", None)
        matplotlib.use("Agg")
        made = {}
        for cell in CELLS[:next(number for number, cell in enumerate(CELLS) if "default_rng" in cell)]:
            exec(cell, made)
    plt.close("all")
    return made


@pytest.fixture(scope="module")
def library():
    """The library's two halves of the same: full plans by timesteps and order, and what draws images under a plan."""
    model = networks.load(paths.ROOT / "data" / "shipped" / "digits")
    described, fits = blocks.describe(model.network), NoiseSchedule.of(model.schedule)
    return (lambda steps, order: Plan.full(steps, fits, described, order),
            lambda plan, noise: sample(model, plan, noise))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("two_step", 2)])
def test_its_samplers_are_the_librarys(page, library, sampler, order):
    full, images = library
    steps = page["even"](9)
    torch.testing.assert_close(page[sampler](page["start"], steps), images(full(steps, order), page["start"]),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("forecast", "state"), [(False, HOLD), (True, LINE)])
def test_its_row_is_the_librarys(page, library, forecast, state):
    full, images = library
    plan = full(page["even"](8), 1).replace(abscissa="step")
    cells = np.ones((plan.steps, len(plan.blocks)), int)
    cells[1::2, plan.blocks.index("up1.up")] = state
    found = page["with_row"](page["unet"].up_blocks[1], forecast, page["ddim"], 8)
    del page["unet"].up_blocks[1].forward
    torch.testing.assert_close(found, images(plan.with_cells(cells), page["start"]), rtol=1e-3, atol=1e-3)
