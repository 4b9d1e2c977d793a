"""No silent wrong image: plans on stock pipelines of every kind, by both doors, beside the slow reference."""

from functools import partial

import numpy as np
import pytest
import reference
import tiny
import torch
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from doors import check, full_plan, plans, random_plan

from lib.apply import Planned
from lib.grid import blocks, sampling
from lib.grid.engine import Engine
from lib.grid.model import Conditions, Model
from lib.grid.plan import Learned, NoiseSchedule, Plan, PlanError, trailing
from lib.grid.solvers import noise_levels


@pytest.mark.parametrize("kind", tiny.ALL, ids=lambda kind: kind.__name__)
def test_every_kind_of_pipeline_gives_what_the_reference_gives(kind):
    pipe, options = tiny.made(kind)
    if kind is tiny.ddpm:
        pipe.scheduler = tiny.ddim()
    for plan in plans(pipe).values():
        check(pipe, plan, lambda: tiny.call(pipe, options))


# ---- what other code does to a block's tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny.three_levels, tiny.three_levels_xl])
def test_freeu_writes_into_no_cache(kind):
    pipe, options = tiny.made(kind)
    described, plain = blocks.describe(pipe.unet), tiny.call(pipe, options)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert np.abs(tiny.call(pipe, options) - plain).max() > 1e-3
    for branch in range(described.branches):
        check(pipe, Plan.deepcache(3, described.branch(branch), full_plan(pipe)), lambda: tiny.call(pipe, options))
    for seed in range(3):
        check(pipe, random_plan(full_plan(pipe), seed), lambda: tiny.call(pipe, options))


def test_hooks_and_callbacks_that_write_in_place_reach_no_cache():
    pipe, options = tiny.made(tiny.three_levels)

    def scaled(module, inputs):
        inputs[0].mul_(1.05)  # what a block gets is what another one gave

    for block in pipe.unet.up_blocks:
        for layer in block.resnets:
            layer.register_forward_pre_hook(scaled)

    def dimmed(pipe, step, t, kept):
        kept["latents"].mul_(0.98)
        return kept

    for plan in plans(pipe).values():
        check(pipe, plan, lambda: tiny.call(pipe, options, callback_on_step_end=dimmed))


# ---- placeholders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"guess_mode": True}, {"controlnet_conditioning_scale": 0.4},
                                  {"control_guidance_start": 0.3, "control_guidance_end": 0.7}])
def test_control_adds_to_whatever_a_plan_left_out(more):
    pipe, options = tiny.made(tiny.controlled)
    for plan in plans(pipe).values():
        check(pipe, plan, lambda: tiny.call(pipe, options, **more))


@pytest.mark.parametrize("size", [(15, 13), (10, 6), (7, 7), (9, 16)])
def test_sizes_that_do_not_halve_evenly(size):
    torch.manual_seed(0)
    model = tiny.text_unet(3).eval()
    full = Plan.full(trailing(6, 1000), NoiseSchedule.of(tiny.ddim()), blocks.describe(model).names)
    noise, texts = torch.randn(2, 4, *size), {"encoder_hidden_states": torch.randn(2, 5, 16)}
    for seed in range(6):
        plan = random_plan(full, seed)
        images = sampling.sample(Model(model, tiny.ddim()), plan, noise, Conditions(texts))
        wanted = reference.sample(model, plan, noise, Conditions(texts))
        torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_adapters_are_refused_unless_all_computes():
    pipe, _ = tiny.made(tiny.stable_diffusion)
    full, described = full_plan(pipe), blocks.describe(pipe.unet)
    x_t, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    features = {"down_intrablock_additional_residuals": [torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)]}
    old = {"down_block_additional_residuals": tuple(features["down_intrablock_additional_residuals"])}
    for given in (features, old):
        with Engine(pipe.unet, Plan.deepcache(2, described.branch(0), full), full.schedule) as engine, pytest.raises(
                PlanError, match="an adapter adds to what blocks give inside the levels"):
            engine(x_t, 0, encoder_hidden_states=texts, **given)
    with Engine(pipe.unet, full, full.schedule) as engine:
        adapted = engine(x_t, 0, encoder_hidden_states=texts,
                         down_intrablock_additional_residuals=[part.clone() for part in next(iter(features.values()))])
    assert not torch.equal(adapted, pipe.unet(x_t, 999, texts).sample)
    with Engine(pipe.unet, full, full.schedule) as engine:
        engine.counted = 50
        with pytest.raises(PlanError, match="counts 50 steps, .* call it with num_inference_steps=10"):
            engine(x_t, 0, encoder_hidden_states=texts, **features)
    with Planned(pipe, full.at(trailing(5, 1000))):
        for asked in (5, 10):
            pipe.scheduler.set_timesteps(asked)
            assert pipe.scheduler.engine.counted == asked


# ---- which column a call belongs to ----------------------------------------------------------------------------------


def ran_of(pipe, plan, run):
    """Which columns of a plan ran, told by the timesteps that the network heard."""
    heard = []
    handle = tiny.network(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: heard.append(int(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)
                                                                 ).flatten()[0])), with_kwargs=True)
    try:
        with Planned(pipe, plan):
            run()
    finally:
        handle.remove()
    return [plan.timesteps.index(t) for t in heard]


@pytest.mark.parametrize("kind", [tiny.image_to_image, tiny.inpaint, tiny.inpaint_nine_channels])
@pytest.mark.parametrize("strength", [0.5, 0.8, 0.1])
def test_a_run_that_begins_in_the_middle_runs_the_columns_there(kind, strength):
    pipe, options = tiny.made(kind)
    for plan in plans(pipe).values():
        def run():
            return tiny.call(pipe, options, strength=strength)

        check(pipe, plan, run)
    assert ran_of(pipe, plan, run) == list(range(tiny.STEPS - round(strength * tiny.STEPS), tiny.STEPS))


@pytest.mark.parametrize("options", [{"denoising_end": 0.6}, {"denoising_end": 0.25}])
def test_a_run_that_ends_in_the_middle(options):
    pipe, own = tiny.made(tiny.stable_diffusion_xl)
    for plan in plans(pipe).values():
        check(pipe, plan, lambda: tiny.call(pipe, own | {"output_type": "latent"}, **options))


def test_a_plan_of_fewer_steps_is_called_with_its_own_number_where_a_run_begins_in_the_middle():
    pipe, options = tiny.made(tiny.image_to_image)
    full = full_plan(pipe)
    few = full.at(trailing(5, 1000))  # on a grid of 10
    assert len(few.grid) == 10
    with Planned(pipe, few):
        for strength in (0.8, 0.5):
            with pytest.raises(PlanError, match="call it with num_inference_steps=5"):
                tiny.call(pipe, options, strength=strength)
        whole = tiny.call(pipe, options)
        assert np.array_equal(tiny.call(pipe, options, num_inference_steps=5), whole)
    for strength, begins in ((0.8, 799), (0.5, 399)):
        run = partial(tiny.call, pipe, options, strength=strength, num_inference_steps=5)
        check(pipe, few, run)
        assert few.timesteps[ran_of(pipe, few, run)[0]] == begins


def refiner():
    pipe, options = tiny.stable_diffusion_xl()
    kept = {name: part for name, part in pipe.components.items() if "encoder" not in name and "feature" not in name}
    made = StableDiffusionXLImg2ImgPipeline(**kept | {"text_encoder": None, "text_encoder_2": None},
                                            add_watermarker=False)
    return made, {name: value for name, value in options.items() if name not in ("height", "width")} | {
        "image": tiny.picture()}


@pytest.mark.parametrize("more", [{"strength": 0.5}, {"denoising_start": 0.5}, {"strength": 1.0, "denoising_end": 0.7},
                                  {"denoising_start": 0.3, "denoising_end": 0.8}])
def test_a_refiner_takes_over_where_the_base_left_off(more):
    pipe, options = tiny.made(refiner)
    for plan in plans(pipe).values():
        check(pipe, plan, lambda: tiny.call(pipe, options, **more))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler])
def test_latents_are_handed_over_in_the_units_of_the_pipelines_scheduler(scheduler):
    pipe, base = tiny.made(tiny.stable_diffusion_xl)
    base = base | {"output_type": "latent", "denoising_end": 0.5}
    second, options = tiny.made(refiner)
    plan = full_plan(pipe)
    alpha, _ = noise_levels(plan.timesteps[5:6], plan.schedule)

    def both(kind):
        pipe.scheduler, second.scheduler = kind(), kind()
        with Planned(pipe, plan), Planned(second, plan):
            latents = tiny.call(pipe, base)
            return latents, tiny.call(second, options | {"image": latents, "denoising_start": 0.5})

    (latents, image), (divided, other) = both(tiny.ddim), both(lambda: scheduler(**tiny.NOISE))
    torch.testing.assert_close(divided * float(alpha), latents, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other, image, atol=1e-3)
    at_half = {"image": tiny.picture(), "strength": 0.5}  # which adds the noise by itself
    second.scheduler = tiny.ddim()
    with Planned(second, plan):
        image = tiny.call(second, options | at_half)
    second.scheduler = scheduler(**tiny.NOISE)
    with Planned(second, plan):
        np.testing.assert_allclose(tiny.call(second, options | at_half), image, atol=1e-3)


def test_timesteps_between_the_integers_walk_in_any_schedulers_units():
    pipe, options = tiny.made(tiny.stable_diffusion)
    few = full_plan(pipe).at([999.0, 700.3, 400.1, 99.7])  # as learned steps lie; single precision rounds them
    with Planned(pipe, few):
        wanted = tiny.call(pipe, options)
    pipe.scheduler = EulerDiscreteScheduler(**tiny.NOISE)
    with Planned(pipe, few):
        np.testing.assert_allclose(tiny.call(pipe, options), wanted, atol=1e-3)


@pytest.mark.parametrize("end", ["denoising_start", "denoising_end"])
def test_a_call_between_two_timesteps_takes_no_plan_of_other_timesteps(end, monkeypatch):
    pipe, options = tiny.made(refiner)
    few = full_plan(pipe).at(trailing(5, 1000))
    with Planned(pipe, few):
        for steps in (5, 10):
            with pytest.raises(PlanError, match="runs the steps between two timesteps"):
                tiny.call(pipe, options, num_inference_steps=steps, **{end: 0.5})
        tiny.call(pipe, options, num_inference_steps=5)
    monkeypatch.delattr(StableDiffusionXLImg2ImgPipeline, "denoising_end")  # an adapter's pipeline has none
    Planned(pipe, full_plan(pipe))
    with pytest.raises(PlanError, match="nobody can see at which timestep"):
        Planned(pipe, few)


def test_a_strength_that_leaves_no_step_is_refused():
    pipe, options = tiny.made(tiny.image_to_image)
    plan = full_plan(pipe)
    with Planned(pipe, plan):
        with pytest.raises(PlanError, match="begins at step 10, and the plan has 10, from 0 on: call it with"):
            tiny.call(pipe, options, strength=0.05)
        with pytest.raises(PlanError, match="num_inference_steps=10, not 7"):
            tiny.call(pipe, options, num_inference_steps=7)


@pytest.mark.parametrize("solver", ["pndm", "learned"])
def test_solvers_that_cannot_begin_in_the_middle_say_so(solver):
    pipe, options = tiny.made(tiny.image_to_image)
    full = full_plan(pipe)
    rows = ((1.0,),) * 10
    plan = {"pndm": lambda: full.at(full.timesteps[:2] + full.timesteps[1:], solver="pndm", order=4),
            "learned": lambda: full.replace(solver="learned", table=Learned(quantity="data", a=(0.5,) * 10, b=rows))
            }[solver]()
    with Planned(pipe, plan), pytest.raises(PlanError, match=f"solver .{solver}. can only be walked from its"):
        tiny.call(pipe, options, strength=0.5, num_inference_steps=plan.steps)


# ---- batches and passes that change in the middle of a run -----------------------------------------------------------


def unguided_from(step):
    """A callback that switches guidance off, as the documentation of diffusers has it."""
    def callback(pipe, number, t, kept):
        if number == step - 1:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
                if name in kept:
                    kept[name] = kept[name].chunk(2)[-1]
        return kept

    return callback


@pytest.mark.parametrize(("kind", "names"), [
    (tiny.stable_diffusion, ["prompt_embeds"]), (tiny.image_to_image, ["prompt_embeds"]),
    (tiny.stable_diffusion_xl, ["prompt_embeds", "add_text_embeds", "add_time_ids"])])
def test_guidance_that_is_switched_off_on_the_way(kind, names):
    pipe, options = tiny.made(kind)

    def run(step=4):
        images = tiny.call(pipe, options, guidance_scale=4.0, callback_on_step_end=unguided_from(step),
                           callback_on_step_end_tensor_inputs=["latents", *names])
        assert len(images) == 1
        return images

    for plan in plans(pipe).values():
        for step in (3, 4, 9):
            check(pipe, plan, partial(run, step))


def test_guidance_that_is_switched_on_and_off_on_the_way():
    pipe, options = tiny.made(tiny.stable_diffusion)
    rows = {}

    def callback(pipe, number, t, kept):
        rows.setdefault("both", kept["prompt_embeds"])
        guided = number not in (2, 3, 6)
        pipe._guidance_scale = 4.0 if guided else 0.0
        kept["prompt_embeds"] = rows["both"] if guided else rows["both"].chunk(2)[-1]
        return kept

    for plan in plans(pipe).values():
        rows.clear()
        check(pipe, plan, lambda: tiny.call(pipe, options, guidance_scale=4.0, callback_on_step_end=callback,
                                            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]))


@pytest.mark.parametrize("change", [{"num_images_per_prompt": 3}, {"height": 32, "width": 16}, {"guidance_scale": 1.0}])
def test_the_next_call_may_be_of_another_shape(change):
    pipe, options = tiny.made(tiny.stable_diffusion)
    for plan in plans(pipe).values():
        def run(plan=plan):
            return [tiny.call(pipe, options), tiny.call(pipe, options, **change), tiny.call(pipe, options)]

        check(pipe, plan, run)


def test_guidance_that_is_switched_off_under_a_plan_of_two_passes():
    pipe, options = tiny.made(tiny.stable_diffusion)
    full, described = full_plan(pipe), blocks.describe(pipe.unet)
    one = Plan.deepcache(3, described.branch(0), full)

    def run():
        return tiny.call(pipe, options, guidance_scale=4.0, callback_on_step_end=unguided_from(4),
                         callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], output_type="latent")

    with Planned(pipe, one.guided()):
        two_passes = run()
    with Planned(pipe, one):
        torch.testing.assert_close(two_passes, run(), rtol=1e-3, atol=1e-3)
    with Planned(pipe, one.guided(every=2)):
        assert len(run()) == 1 and run().isfinite().all()


@pytest.mark.parametrize("kind", [tiny.dit, tiny.stable_diffusion])
def test_an_engine_alone_does_not_guess_whose_rows_they_are(kind):
    pipe, options = tiny.made(kind)
    plan = full_plan(pipe).guided((0, 4))
    with Engine(tiny.network(pipe), plan, plan.schedule), pytest.raises(
            PlanError, match="nobody says which rows of this batch are of which pass"):
        tiny.call(pipe, options)


def test_three_passes_are_right_or_refused():
    pipe, options = tiny.made(tiny.instructed)
    with Planned(pipe, full_plan(pipe).guided(every=2)):
        for more in ({}, {"num_images_per_prompt": 2}):
            with pytest.raises(PlanError, match="call the pipeline with guidance, or take a plan of one pass"):
                tiny.call(pipe, options, **more)


def test_rows_of_one_call_lie_at_one_timestep():
    pipe, _ = tiny.made(tiny.ddim_pixels)
    plan, x_t = full_plan(pipe), torch.randn(2, 4, 8, 8)
    with Engine(pipe.unet, plan, plan.schedule):
        with pytest.raises(PlanError, match="the rows of one call lie at different timesteps"):
            pipe.unet(x_t, torch.tensor([999, 899]))
        pipe.unet(x_t, torch.tensor([999, 999]))


def test_tensors_that_hide_their_passes_are_refused_under_a_plan_of_two():
    pipe, options = tiny.made(tiny.stable_diffusion)
    plan = full_plan(pipe)
    more = {"cross_attention_kwargs": {"gligen": {"objs": torch.randn(2, 3, 4)}}}
    with Planned(pipe, plan.guided(every=2)), pytest.raises(PlanError, match="nobody can say which of their rows"):
        tiny.call(pipe, options, **more)


def test_processors_that_may_look_at_the_halves_of_a_batch_are_refused_under_a_plan_of_two():
    pipe, options = tiny.made(tiny.stable_diffusion)

    class Foreign(AttnProcessor2_0):
        pass

    own = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Foreign())
    with Planned(pipe, full_plan(pipe)):
        tiny.call(pipe, options)
    two = Planned(pipe, full_plan(pipe).guided(every=2))
    with pytest.raises(PlanError, match="an attention processor of its own"):
        two.enable()
    pipe.unet.set_attn_processor(own)
    with two:
        tiny.call(pipe, options)
        pipe.unet.set_attn_processor(Foreign())
        with pytest.raises(PlanError, match="an attention processor of its own"):
            tiny.call(pipe, options)


def test_two_networks_in_turn_are_refused():
    pipe, _ = tiny.made(tiny.flux)
    plan = full_plan(pipe)
    pipe.transformer_2 = None
    Planned(pipe, plan)
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(PlanError, match="with a transformer_2 runs two networks in turn"):
        Planned(pipe, plan)


def test_a_transformers_rows_may_change_too():
    pipe, _ = tiny.made(tiny.dit)
    model = pipe.transformer
    for plan in plans(pipe).values():
        with Engine(model, plan, plan.schedule) as engine, torch.inference_mode():
            x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            labels = torch.tensor([3, 1000])
            for step in range(4):
                engine(x_t, step, class_labels=labels)
            changed = [engine(x_t[:1], step, class_labels=labels[:1]) for step in range(4, 10)]
        begun = plan.refreshed(4)
        with Engine(model, begun, plan.schedule) as engine, torch.inference_mode():
            for step, output in zip(range(4, 10), changed):
                assert torch.equal(output, engine(x_t[:1], step, class_labels=labels[:1]))


def test_a_picture_may_change_its_size_on_the_way():
    torch.manual_seed(0)
    model = tiny.plain_unet().eval()
    full = Plan.full(trailing(6, 1000), NoiseSchedule.of(tiny.ddim()), blocks.describe(model).names)
    plan = Plan.deepcache(3, blocks.describe(model).branch(0), full)
    small, large = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 12, 8)
    with Engine(model, plan, plan.schedule) as engine, torch.inference_mode():
        outputs = [engine(small, 0), engine(large, 1), engine(large, 2)]
    assert torch.equal(outputs[1], model(large, plan.timesteps[1]).sample)
    with Engine(model, plan.refreshed(1), plan.schedule) as engine, torch.inference_mode():
        engine(large, 1)
        assert torch.equal(outputs[2], engine(large, 2))


# ---- calls that fail and are made again ------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["mid_block", "up_blocks.1.resnets.1", "conv_out", "down_blocks.0"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_call_that_failed_may_be_made_again(broken, recorded, request):
    pipe, _ = tiny.made(tiny.ddim_pixels)
    if recorded:
        request.getfixturevalue("tapes")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, plan in plans(pipe).items():
        assert torch.equal(walked(pipe, plan, noise, broken), walked(pipe, plan, noise)), name


def walked(pipe, plan, x_t, broken=None):
    """A loop of one's own, in which the module that is named fails once, at step 3, and the step is made again."""
    failing = [False]

    def stop(*_):
        if failing[0]:
            failing[0] = False
            raise torch.OutOfMemoryError("no memory")

    handle = pipe.unet.get_submodule(broken or "").register_forward_hook(stop)
    try:
        with torch.inference_mode(), Planned(pipe, plan):
            pipe.scheduler.set_timesteps(tiny.STEPS)
            for step, t in enumerate(pipe.scheduler.timesteps):
                failing[0] = bool(broken) and step == 3
                try:
                    output = pipe.unet(x_t, t).sample
                except torch.OutOfMemoryError:
                    output = pipe.unet(x_t, t).sample
                x_t = pipe.scheduler.step(output, t, x_t).prev_sample
    finally:
        handle.remove()
    return x_t
