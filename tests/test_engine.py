"""The engine and the samplers: identities that must hold on every model."""

import numpy as np
import pytest
import reference
import torch
from diffusers import DDIMScheduler

from lib.grid import blocks, sampling
from lib.grid.engine import Engine
from lib.grid.model import Model
from lib.grid.plan import NoiseSchedule, Plan, PlanError, trailing
from lib.teachers import networks


def sample(unet, schedule, plan, noise, **options):
    return sampling.sample(Model(unet, schedule), plan, noise, **options)


def whole_columns(teacher, kept):
    return np.repeat(np.asarray(kept, dtype=bool)[:, None], len(teacher.blocks), axis=1)


def test_all_cells_on_is_the_plain_model_to_the_bit(unet, schedule, teacher, noise):
    with torch.inference_mode(), Engine(unet, teacher, NoiseSchedule.of(schedule)) as engine:
        for step in range(teacher.steps):
            hooked = engine(noise, step)
    with torch.inference_mode():
        assert torch.equal(hooked, unet(noise, teacher.timesteps[-1]).sample)


@pytest.mark.parametrize(("final_sigma", "to_one"), [("zero", True), ("sigma_min", False)])
def test_order_1_is_diffusers_ddim(unet, schedule, teacher, noise, final_sigma, to_one):
    scheduler = DDIMScheduler.from_config(schedule.config, set_alpha_to_one=to_one)
    scheduler.set_timesteps(teacher.steps)
    x_t = noise
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x_t = scheduler.step(unet(x_t, t).sample, t, x_t).prev_sample
    plan = teacher.replace(final_sigma=final_sigma)
    torch.testing.assert_close(sample(unet, schedule, plan, noise), x_t, rtol=1e-4, atol=1e-4)


def test_a_reused_column_is_a_dropped_step_under_order_1(unet, schedule, teacher, noise):
    kept = [True, False, False, True, False, True, True, False, False, False]
    dropped = Plan.full([t for t, keep in zip(teacher.timesteps, kept, strict=True) if keep], teacher.schedule,
                        teacher.blocks)
    reused = teacher.with_cells(whole_columns(teacher, kept))
    torch.testing.assert_close(sample(unet, schedule, reused, noise), sample(unet, schedule, dropped, noise),
                               rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("order", "prediction"), [(2, "epsilon"), (1, "v_prediction")])
def test_and_is_not_under_a_multistep_solver_or_another_prediction(unet, noise, described, order, prediction):
    schedule = DDIMScheduler.from_config(networks.noise_schedule().config, prediction_type=prediction)
    teacher = Plan.full(trailing(10, 1000), NoiseSchedule.of(schedule), described, order)
    dropped = Plan.full(teacher.timesteps[::2], teacher.schedule, teacher.blocks, order)
    reused = teacher.with_cells(whole_columns(teacher, [True, False] * 5))
    gap = (sample(unet, schedule, reused, noise) - sample(unet, schedule, dropped, noise)).abs().max()
    assert gap > 1e-2


def test_a_wholly_reused_column_calls_no_network(unet, schedule, teacher, noise):
    calls = []
    handle = unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    sample(unet, schedule, teacher.with_cells(whole_columns(teacher, [True, False] * 5)), noise)
    handle.remove()
    assert len(calls) == 5


@pytest.mark.parametrize("seed", range(8))
def test_any_plan_gives_what_replacing_outputs_gives(unet, schedule, teacher, noise, seed):
    plan = Plan.random(0.15 + 0.1 * seed, seed, teacher)
    torch.testing.assert_close(sample(unet, schedule, plan, noise), reference.sample(unet, plan, noise),
                               rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("branch", range(6))
def test_every_branch_of_deepcache_too(unet, schedule, teacher, noise, described, branch):
    plan = Plan.deepcache(3, described.branch(branch), teacher)
    torch.testing.assert_close(sample(unet, schedule, plan, noise), reference.sample(unet, plan, noise),
                               rtol=1e-4, atol=1e-3)


def test_a_partial_step_is_deepcache_done_by_hand(unet, schedule, teacher, noise, described):
    """At the shallowest branch a partial step feeds the last layer with the cached input and the new stem skip."""
    plan = Plan.deepcache(2, described.branch(0), teacher)
    t_0, t_1 = teacher.timesteps[:2]
    x_1 = noise * 0.9
    seen = {}
    handle = unet.up_blocks[2].resnets[0].register_forward_hook(lambda m, i, o: seen.update(deep=o))
    with torch.inference_mode():
        unet(noise, t_0)
        handle.remove()
        emb = unet.time_embedding(unet.time_proj(torch.tensor([t_1])))
        last = unet.up_blocks[2].resnets[1](torch.cat([seen["deep"], unet.conv_in(x_1)], dim=1), emb)
        by_hand = unet.conv_out(unet.conv_act(unet.conv_norm_out(last)))
        with Engine(unet, plan, NoiseSchedule.of(schedule)) as engine:
            engine(noise, 0)
            torch.testing.assert_close(engine(x_1, 1), by_hand)


def test_the_second_run_gives_what_the_first_gave_also_after_an_exception(unet, schedule, teacher, noise):
    plan = Plan.random(0.4, 3, teacher)
    first = sample(unet, schedule, plan, noise)

    def fail(*_):
        raise KeyboardInterrupt

    handle = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sample(unet, schedule, plan, noise)
    handle.remove()
    assert torch.equal(sample(unet, schedule, plan, noise), first)


def test_afterwards_the_model_is_as_it_was(unet, schedule, teacher, noise):
    with torch.inference_mode():
        before = unet(noise, 500).sample
        sample(unet, schedule, Plan.random(0.3, 1, teacher), noise)
        assert torch.equal(unet(noise, 500).sample, before)
    assert all(not getattr(m, "_diffusers_hook", None) or not m._diffusers_hook.hooks for m in unet.modules())


def test_the_batch_does_not_change_an_image(unet, schedule, teacher, noise):
    plan = Plan.random(0.5, 2, teacher)
    one_by_one = sample(unet, schedule, plan, noise, batch_size=1)
    torch.testing.assert_close(one_by_one, sample(unet, schedule, plan, noise), rtol=1e-4, atol=1e-4)


def test_a_student_with_the_teachers_shape_and_weights_is_the_teacher(unet, schedule, teacher, noise):
    student = networks.unet((1, 16, 16), [8, 8, 16], 1, 4).eval()
    student.load_state_dict(unet.state_dict())
    plan = Plan.random(0.5, 7, teacher)
    assert torch.equal(sample(student, schedule, plan, noise), sample(unet, schedule, plan, noise))


def test_a_student_with_the_same_blocks_fits_the_plan_and_others_do_not(schedule, teacher, noise):
    plan = Plan.random(0.5, 2, teacher)
    thinner = networks.unet((1, 16, 16), [4, 8, 8], 1, 4).eval()
    assert sample(thinner, schedule, plan, noise).shape == noise.shape
    deeper = networks.unet((1, 16, 16), [8, 8], 2, 4).eval()
    with pytest.raises(PlanError, match="another network"):
        sample(deeper, schedule, plan, noise)
    with pytest.raises(PlanError, match="another noise schedule: beta_schedule is linear, the model's is scaled"):
        sample(thinner, DDIMScheduler.from_config(schedule.config, beta_schedule="scaled_linear"), plan, noise)
    with pytest.raises(PlanError, match="caches each block's residual"):
        sample(thinner, schedule, plan.replace(cache="residual"), noise)


def test_one_call_too_many_is_refused(unet, schedule, teacher, noise):
    plan = Plan.few_steps(1, "uniform", teacher)
    with torch.inference_mode(), Engine(unet, plan, NoiseSchedule.of(schedule)) as engine:
        engine(noise, 0)
        with pytest.raises(PlanError, match="step 0 was called twice for the pass 'given'"):
            engine(noise, 0)
        with pytest.raises(PlanError, match="was called once more"):
            engine(noise, 1)


def test_attention_levels_and_two_layers_run_under_plans_too(schedule, noise):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, layers_per_block=2, norm_num_groups=4,
                        block_out_channels=(8, 16), attention_head_dim=4,
                        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "AttnUpBlock2D")).eval()
    described = blocks.describe(model)
    teacher = Plan.full(trailing(6, 1000), NoiseSchedule.of(schedule), described)
    for seed in range(4):
        plan = Plan.random(0.4, seed, teacher)
        torch.testing.assert_close(sample(model, schedule, plan, noise), reference.sample(model, plan, noise),
                                   rtol=1e-3, atol=1e-2)  # images of an untrained model reach some hundreds


def test_noise_banks_share_nothing_and_split_as_one_likes():
    whole = sampling.noise("report", 3, 0, 6, (1, 4, 4))
    parts = [sampling.noise("report", 3, first, 2, (1, 4, 4)) for first in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    for other in (sampling.noise("search", 3, 0, 6, (1, 4, 4)), sampling.noise("report", 4, 0, 6, (1, 4, 4))):
        assert not (whole.flatten(1)[:, None] == other.flatten(1)[None]).any()
