"""What is said of the teacher's blocks: similarity, sensitivity, time."""

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch
from doors import full_plan

from lib.grid import cost, sampling, solvers
from lib.grid.model import Model
from lib.grid.plan import HOLD, LINE, Plan
from lib.judging import analysis


def test_similarity_is_the_cosine_of_neighbouring_outputs(unet, schedule, teacher, noise, described):
    found = analysis.similarity(Model(unet, schedule), teacher, noise)
    assert np.isnan(found[0]).all() and not np.isnan(found[1:]).any()
    outputs = []
    handle = unet.up_blocks[0].resnets[1].register_forward_hook(lambda m, i, o: outputs.append(o.flatten(1)))
    with torch.inference_mode():
        reference.sample(unet, teacher, noise)
    handle.remove()
    a, b = outputs[3], outputs[4]
    cosine = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    assert found[4, described.index["up0.1"]] == pytest.approx(float(cosine), abs=1e-4)


def test_sensitivity_is_the_change_of_the_image_from_one_reused_cell(unet, schedule, teacher, noise, described):
    damage = analysis.sensitivity(Model(unet, schedule), teacher, noise, [2, 7])
    images = sampling.sample(Model(unet, schedule), teacher, noise)
    for row, step in enumerate((2, 7)):
        for name in ("mid", "up2.1", "down0.0"):
            cells = teacher.computes
            cells[step, described.index[name]] = False
            changed = sampling.sample(Model(unet, schedule), teacher.with_cells(cells), noise)
            expected = float((changed - images).square().mean() / images.var(dim=0).mean())
            assert damage[row, described.index[name]] == pytest.approx(expected, rel=0.02, abs=1e-9), (step, name)
    with pytest.raises(ValueError, match="a full plan of DDIM"):
        analysis.sensitivity(Model(unet, schedule), Plan.random(0.5, 0, teacher), noise, [2])


def test_errors_of_reuse_are_those_of_outputs_written_out(unet, schedule, teacher, noise, described):
    rare = np.arange(teacher.steps) % 3 == 0
    plan = teacher.with_cells(np.repeat(rare[:, None], len(described), axis=1))
    found = analysis.forecast_errors(Model(unet, schedule), plan, noise)
    outputs = []
    handle = unet.up_blocks[0].resnets[1].register_forward_hook(lambda m, i, o: outputs.append(o.flatten(1)))
    with torch.inference_mode():
        reference.sample(unet, teacher, noise)
    handle.remove()
    places = solvers.abscissae(plan.timesteps, plan.schedule, plan.abscissa).tolist()

    def far(value, step):
        return float(((value - outputs[step]).norm(dim=1) / outputs[step].norm(dim=1)).mean())

    rows = found[found["block"] == "up0.1"].set_index("step")
    slope = (outputs[6] - outputs[3]) / (places[6] - places[3])
    assert rows.loc[8, "hold"] == pytest.approx(far(outputs[6], 8), rel=1e-3)
    assert rows.loc[8, "line"] == pytest.approx(far(outputs[6] + (places[8] - places[6]) * slope, 8), rel=1e-3)
    assert rows.loc[8, "since"] == 2 and set(found["pass"]) == {"given"}
    assert np.isnan(rows.loc[2, "line"]) and np.isnan(rows.loc[5, "parabola"])


def test_on_a_transformer_errors_are_those_of_the_changes_that_cells_keep():
    """A block whose change is held gives today's input and that change."""
    pipe, _ = tiny.made(tiny.dit)
    network, seen = pipe.transformer, []
    plan = full_plan(pipe, 4)
    held = plan.with_cells(np.repeat([[True], [False], [True], [False]], len(plan.blocks), axis=1))
    model = Model(network, pipe.scheduler)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    found = analysis.forecast_errors(model, held, noise).set_index(["block", "step"])
    block = network.transformer_blocks[1]
    handle = block.register_forward_hook(lambda m, i, o: seen.append((o - i[0]).flatten(1)))
    sampling.sample(model, plan, noise)
    handle.remove()
    wanted = ((seen[0] - seen[1]).norm(dim=1) / seen[1].norm(dim=1)).mean()
    assert found.loc[(plan.blocks[1], 1), "hold"] == pytest.approx(float(wanted), rel=1e-3)


def test_each_cell_reuses_what_erred_least(teacher, described):
    held = Plan.deepcache(2, described.branch(0), teacher)
    errors = pd.DataFrame([{"pass": which, "step": step, "block": "mid", "hold": 0.2, "line": line, "parabola": np.nan}
                           for which, step, line in (("null", 3, 0.1), ("null", 5, 0.3), ("given", 3, 0.3),
                                                     ("given", 5, 0.1))])
    plan, mid = analysis.reuse_by_error(held, errors), described.index["mid"]
    assert plan.passes == ("null", "given")
    assert plan.sheets[:, [3, 5], mid].tolist() == [[LINE, HOLD], [HOLD, LINE]]
    rest = np.delete(plan.sheets, mid, axis=2)
    assert (rest == np.delete(held.cells, mid, axis=1)).all() and plan.alone().steps == held.steps
    one = analysis.reuse_by_error(held, errors[errors["pass"] == "given"])
    assert one.passes == ("given",) and one.cells[5, mid] == LINE


def test_a_blocks_time_is_that_blocks(unet, noise, described):
    """A block that sleeps takes the time; the others and the rest do not."""
    import time

    handle = unet.up_blocks[1].upsamplers[0].conv.register_forward_hook(lambda *_: time.sleep(0.3))
    seconds = cost.block_seconds(unet, noise, repeats=3)
    handle.remove()
    assert set(seconds) == {*described.names, "stem and head"}
    assert seconds["up1.up"] >= 0.3 > max(value for name, value in seconds.items() if name != "up1.up")
    assert not unet.mid_block._forward_hooks and not unet.mid_block._forward_pre_hooks
