"""Flow matching, and transformers with two streams of tokens: Stable Diffusion 3 and Flux."""

import numpy as np
import pytest
import reference
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from doors import random_plan, watched

from lib.apply import Planned
from lib.grid import blocks
from lib.grid.plan import HOLD, LINE, FlowSchedule, NoiseSchedule, Plan, PlanError


@pytest.fixture(scope="module", params=tiny.FLOWS, ids=lambda kind: kind.__name__)
def pipeline(request):
    return tiny.made(request.param)


def full_plan(pipe, options):
    """The pipeline's own steps, by its own solver."""
    tiny.call(pipe, options)
    own = pipe.scheduler.timesteps.tolist()
    described = blocks.describe(pipe.transformer)
    return Plan.full(own, NoiseSchedule.of(pipe.scheduler), described, solver="euler")


def test_a_full_plan_gives_the_pipelines_own_images(pipeline):
    pipe, options = pipeline
    full, plain = full_plan(pipe, options), tiny.call(pipe, options)
    with Planned(pipe, full):
        images = tiny.call(pipe, options)
    np.testing.assert_allclose(images, plain, atol=1e-4)
    assert np.array_equal(tiny.call(pipe, options), plain) and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def cheap(full, described):
    found = {f"hold {branch}": Plan.deepcache(3, described.branch(branch), full)
             for branch in range(described.branches)}
    forecasting = full.replace(abscissa="timestep")
    found["line"] = Plan.deepcache(2, described.branch(0), forecasting, LINE)
    return found | {f"random {seed}": random_plan(forecasting, seed) for seed in range(6)}


def test_a_cheap_plan_is_what_the_slow_reference_says(pipeline):
    pipe, options = pipeline
    full, described = full_plan(pipe, options), blocks.describe(pipe.transformer)
    plain = tiny.call(pipe, options)
    for name, plan in cheap(full, described).items():
        with reference.Watched(pipe.transformer, plan) as watch:
            tiny.call(pipe, options)
        with Planned(pipe, plan), watched(pipe.transformer) as outputs:
            images = tiny.call(pipe, options)
        assert len(outputs) == len(watch.outputs) > 0
        for one, other in zip(outputs, watch.outputs):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), msg=name)
        assert not np.array_equal(images, plain)


def test_blocks_that_are_held_do_not_run(pipeline):
    pipe, options = pipeline
    full, described = full_plan(pipe, options), blocks.describe(pipe.transformer)
    plan, ran = Plan.deepcache(5, described.branch(0), full, HOLD), []
    last = pipe.transformer.get_submodule(described.blocks[-1].modules[0])
    probe = next(iter(last.children())).register_forward_hook(lambda *_: ran.append(1))
    with Planned(pipe, plan):
        tiny.call(pipe, options)
    probe.remove()
    assert len(ran) == 2


def test_a_stock_pipelines_guidance_is_the_plans():
    pipe, options = tiny.made(tiny.stable_diffusion_3)
    full = full_plan(pipe, options)
    with Planned(pipe, full.guided()):
        both = tiny.call(pipe, options)
    np.testing.assert_allclose(both, tiny.call(pipe, options), atol=1e-4)
    with Planned(pipe, full.guided((2, 7), every=2)):
        fewer = tiny.call(pipe, options)
    assert np.abs(fewer - both).max() > 1e-3


@pytest.mark.parametrize(("reuse", "change", "refused"), [(HOLD, 3, 4), (LINE, 2, None)])
def test_a_text_of_another_length_in_the_middle_of_a_run_reuses_nothing_older(reuse, change, refused):
    pipe, options = tiny.made(tiny.stable_diffusion_3)
    full, described = full_plan(pipe, options).replace(abscissa="step"), blocks.describe(pipe.transformer)

    def longer(pipe, step, timestep, given):
        texts = given["prompt_embeds"]
        return {"prompt_embeds": torch.cat([texts, texts], dim=1) if step == change else texts}

    asked = options | {"callback_on_step_end": longer, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with Planned(pipe, full):
        np.testing.assert_allclose(tiny.call(pipe, asked), tiny.call(pipe, asked), atol=1e-4)
    with Planned(pipe, Plan.deepcache(3, described.branch(0), full, reuse)):
        if refused is None:
            images = tiny.call(pipe, asked)
        else:
            with pytest.raises(PlanError, match=f"at step {refused} the text, or the image, is of another length"):
                tiny.call(pipe, asked)
        assert np.isfinite(tiny.call(pipe, options)).all()
    if refused is None:  # of blocks that change text one output is known from step 3 on: a line through it holds
        plan = Plan.deepcache(3, described.branch(0), full, reuse)
        cells = plan.cells
        cells[4:6, :-1][cells[4:6, :-1] == LINE] = HOLD  # the last block changes the image alone
        with Planned(pipe, plan.with_cells(cells)):
            np.testing.assert_array_equal(tiny.call(pipe, asked), images)


def test_timesteps_that_are_told_in_half_precision_find_their_step():
    pipe, options = tiny.made(tiny.flux)
    pipe.to(torch.bfloat16)
    options = {name: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value
               for name, value in options.items()}
    full, plain = full_plan(pipe, options), tiny.call(pipe, options)
    with Planned(pipe, full):
        np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=0.05)


def test_a_shift_by_size_is_the_steps_own():
    assert NoiseSchedule.of(tiny.flow(use_dynamic_shifting=True)) == FlowSchedule(train_timesteps=1000, shift=1.0)


def test_sigmas_of_the_callers_own_are_refused():
    pipe, options = tiny.made(tiny.flux)
    full = full_plan(pipe, options)
    with Planned(pipe, full), pytest.raises(PlanError, match="does not support custom sigmas"):
        tiny.call(pipe, options, sigmas=(np.linspace(1.0, 0.1, tiny.STEPS) ** 2).tolist())


def test_a_block_that_was_recorded_by_another_run_knows_what_it_gives(tapes):
    pipe, options = tiny.made(tiny.flux)
    full, described = full_plan(pipe, options), blocks.describe(pipe.transformer)
    plan = Plan.deepcache(3, described.branch(1), full)
    wanted = []
    for _ in range(4):  # what comes again is recorded, and replayed from then on
        with Planned(pipe, plan):
            wanted.append(tiny.call(pipe, options))
    for images in wanted[1:]:
        np.testing.assert_allclose(images, wanted[0], atol=1e-5)
