"""No silent wrong image: plans on stock pipelines of every kind, by both doors, beside the slow reference."""

import contextlib
import copy
import json
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import reference
import tiny
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from DeepCache import DeepCacheSDHelper
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    TCDScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from lib.apply import Planned
from lib.grid import blocks, cost, sampling
from lib.grid.engine import Engine
from lib.grid.plan import LINE, Learned, NoiseSchedule, Plan, PlanError, trailing
from lib.grid.sampling import Conditions
from lib.study import paths
from lib.teachers import networks


def full_plan(pipe, steps=tiny.STEPS, order=1):
    described, fits = blocks.describe(tiny.network(pipe)), NoiseSchedule.of(pipe.scheduler)
    return Plan.full(trailing(steps, fits.train_timesteps), fits, described.names, order, cache=described.cache)


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


@pytest.mark.parametrize("kind", tiny.ALL, ids=lambda kind: kind.__name__)
def test_every_kind_of_pipeline_gives_what_the_reference_gives(kind):
    pipe, options = tiny.made(kind)
    if kind is tiny.ddpm:
        pipe.scheduler = tiny.ddim()
    for plan in plans(pipe).values():
        check(pipe, plan, lambda: tiny.call(pipe, options))


# ---- what other code does to a block's tensors -----------------------------------------------------------------------


def three_levels():
    return tiny.StableDiffusionPipeline(**tiny.text_parts(unet=tiny.text_unet(3))), tiny.PROMPT


def three_levels_xl():
    pipe, options = tiny.stable_diffusion_xl()
    pipe.register_modules(unet=tiny.text_unet(
        3, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36))
    return pipe, options


@pytest.mark.parametrize("kind", [three_levels, three_levels_xl])
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
    pipe, options = tiny.made(three_levels)

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
        images = sampling.sample(model, tiny.ddim(), plan, noise, Conditions(texts))
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


# ---- what holds on to network, scheduler or pipeline -----------------------------------------------------------------


@pytest.fixture
def cheap():
    pipe, options = tiny.made(tiny.stable_diffusion)
    return pipe, options, Plan.deepcache(3, blocks.describe(pipe.unet).branch(0), full_plan(pipe))


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_copies_of_a_scheduler_are_of_the_pipelines_own(cheap):
    pipe, options, plan = cheap
    plain, own = tiny.call(pipe, options), pipe.scheduler
    with Planned(pipe, plan):
        for made in (copy.copy(pipe.scheduler), copy.deepcopy(pipe.scheduler),
                     pickle.loads(pickle.dumps(pipe.scheduler))):
            assert type(made) is DDIMScheduler and made.config == own.config
        anew = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert type(anew) is DDIMScheduler and anew.config == DDIMScheduler.from_config(own.config).config
        assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config == own.config
    pipe.scheduler = made
    assert same(tiny.call(pipe, options), plain)


def test_a_network_under_a_plan_cannot_be_copied_or_counted(cheap):
    pipe, options, plan = cheap
    with Planned(pipe, plan):
        images = tiny.call(pipe, options)
        for attempt in (copy.deepcopy, cost.count):
            with pytest.raises(PlanError, match=f"plan {plan.key} .* is on this network, which cannot be"):
                attempt(pipe.unet)
        again = copy.copy(pipe.unet)
        assert same(tiny.call(pipe, options), images)
    x_t, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    assert torch.equal(again(x_t, 5, texts).sample, pipe.unet(x_t, 5, texts).sample)
    assert torch.equal(copy.deepcopy(pipe.unet)(x_t, 5, texts).sample, pipe.unet(x_t, 5, texts).sample)


def test_calls_from_elsewhere_are_refused_by_name(cheap):
    pipe, options, plan = cheap
    plain, own = tiny.call(pipe, options), pipe.scheduler
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    named = f"plan {plan.key} .DeepCache, 10 steps. is on this"
    x_t, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with Planned(pipe, plan):
        images = tiny.call(pipe, options)
        for call in (lambda: tiny.call(other, options), lambda: pipe.unet(x_t, 999, texts)):
            with pytest.raises(PlanError, match=named):
                call()
        for attempt in (lambda: Planned(pipe, plan), lambda: Planned(other, plan).enable(),
                        lambda: Engine(pipe.unet, plan, plan.schedule).__enter__()):
            with pytest.raises(PlanError, match=named):
                attempt()
        assert same(tiny.call(pipe, options), images)
        with pytest.raises(PlanError, match="one of its blocks was called by itself"):
            pipe.unet.up_blocks[0].resnets[0](torch.randn(1, 32, 4, 4), torch.randn(1, 32))
        sharing = type(pipe)(**pipe.components, requires_safety_checker=False)  # with the plan's scheduler
        sharing.set_progress_bar_config(disable=True)
        assert same(tiny.call(sharing, options), images)
        pipe.scheduler = tiny.ddim()
        with pytest.raises(PlanError, match=named):
            tiny.call(pipe, options)
    assert pipe.scheduler is own
    assert same(tiny.call(pipe, options), plain) and same(tiny.call(other, options), plain)


def test_another_scheduler_in_the_middle_of_a_run_is_refused(cheap):
    pipe, options, plan = cheap

    def swapped(pipe, step, t, kept):
        if step == 3:
            pipe.scheduler = tiny.ddim()
            pipe.scheduler.set_timesteps(tiny.STEPS)
        return kept

    with Planned(pipe, plan), pytest.raises(PlanError, match="is another scheduler or pipeline at work"):
        tiny.call(pipe, options, callback_on_step_end=swapped)


def test_another_network_in_the_block_is_refused(cheap):
    pipe, options, plan = cheap
    own = pipe.unet
    with Planned(pipe, plan):
        pipe.unet = tiny.text_unet()
        with pytest.raises(PlanError, match="its network was not called: was unet or transformer replaced"):
            tiny.call(pipe, options)
    assert pipe.unet is own


def test_enabling_twice_and_disabling_twice(cheap):
    pipe, options, plan = cheap
    plain, use = tiny.call(pipe, options), Planned(pipe, plan)
    second = Planned(pipe, plan.refreshed(1))
    use.disable()
    use.enable()
    for attempt in (use.enable, second.enable):
        with pytest.raises(PlanError, match="is on this pipeline"):
            attempt()
    second.disable()
    images = tiny.call(pipe, options)
    use.disable()
    use.disable()
    assert same(tiny.call(pipe, options), plain) and not same(images, plain)


def test_saving_in_the_block_saves_the_pipeline(cheap, tmp_path):
    pipe, options, plan = cheap
    plain = tiny.call(pipe, options)
    pipe.save_pretrained(tmp_path / "before")
    with Planned(pipe, plan):
        pipe.save_pretrained(tmp_path / "inside")
    pipe.save_pretrained(tmp_path / "after")
    before = (tmp_path / "before" / "model_index.json").read_text()
    for name in ("inside", "after"):
        assert (tmp_path / name / "model_index.json").read_text() == before
        assert (tmp_path / name / "scheduler" / "scheduler_config.json").read_text() == (
            tmp_path / "before" / "scheduler" / "scheduler_config.json").read_text()
        loaded = type(pipe).from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(tiny.call(loaded, options), plain, atol=1e-5)


@pytest.mark.parametrize("kind", [tiny.stable_diffusion, tiny.dit])
def test_compiled_networks_run_as_they_are_under_a_plan(kind):
    pipe, options = tiny.made(kind)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    own, plan = getattr(pipe, part), Plan.deepcache(3, blocks.describe(tiny.network(pipe)).branch(0), full_plan(pipe))
    plain = tiny.call(pipe, options)
    with Planned(pipe, plan):
        wanted = tiny.call(pipe, options)
    assert not same(wanted, plain)
    compiled = torch.compile(own, backend="eager")
    setattr(pipe, part, compiled)
    np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=1e-5)
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, options), wanted)
    assert getattr(pipe, part) is compiled
    np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=1e-5)
    with pytest.raises(TypeError, match=r"take its own, model\._orig_mod"):
        Engine(compiled, plan, plan.schedule)
    setattr(pipe, part, own)
    for module in (own, next(iter(own.children()))):
        module.compile(backend="eager")  # in place
    for block in (own.down_blocks if part == "unet" else own.transformer_blocks):
        block.compile(backend="eager")
    np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=1e-5)
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, options), wanted)
    assert own._compiled_call_impl is not None
    np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=1e-5)


def test_hooks_that_come_and_go_between_two_calls(cheap):
    """What offloading does at the end of each call: its hooks are taken off with the forward below them, and put on."""
    pipe, options, plan = cheap
    plain = tiny.call(pipe, options)
    with Planned(pipe, plan):
        images = tiny.call(pipe, options)
    add_hook_to_module(pipe.unet, AccelerateHook())
    with Planned(pipe, plan):
        for _ in range(3):
            assert same(tiny.call(pipe, options), images)
            remove_hook_from_module(pipe.unet, recurse=True)
            add_hook_to_module(pipe.unet, AccelerateHook())
    assert same(tiny.call(pipe, options), plain)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert same(tiny.call(pipe, options), plain)


def test_other_caches_are_refused(cheap):
    pipe, options, plan = cheap
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    with pytest.raises(PlanError, match=r"something has replaced the forward of .* \(another cache\?\)"):
        Planned(pipe, plan).enable()
    helper.disable()
    with Planned(pipe, plan):
        tiny.call(pipe, options)
    pipe, options = tiny.made(tiny.pixart)
    plan = full_plan(pipe)
    apply_pyramid_attention_broadcast(pipe.transformer, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks",)))
    with pytest.raises(PlanError, match="the cache 'pyramid_attention_broadcast' is on transformer_blocks"):
        Planned(pipe, plan).enable()


# ---- recordings ------------------------------------------------------------------------------------------------------


CHANGES = {
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5),
    "another norm": lambda pipe: setattr(pipe.unet.up_blocks[0].resnets[0].norm1, "eps", 0.5),
    "another activation": lambda pipe: setattr(pipe.unet.mid_block.resnets[0], "nonlinearity", torch.nn.Tanh()),
    "a hook": lambda pipe: pipe.unet.mid_block.resnets[0].register_forward_hook(lambda _, __, output: 0.5 * output),
    "processors": lambda pipe: pipe.unet.set_attn_processor(Halved()),
    "a scale": lambda pipe: setattr(pipe.unet.mid_block.resnets[1], "output_scale_factor", 2.0),
}


class Halved(AttnProcessor2_0):
    def __call__(self, *arguments, **options):
        return 0.5 * super().__call__(*arguments, **options)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_recordings_of_a_network_that_has_changed_are_made_anew(change, tapes):
    pipe, options = tiny.made(three_levels)
    plan = Plan.deepcache(3, blocks.describe(pipe.unet).branch(3), full_plan(pipe))
    use = Planned(pipe, plan)
    with use:
        old = [tiny.call(pipe, options) for _ in range(3)]
        assert tapes and same(old[0], old[2])
        change(pipe)
        new = [tiny.call(pipe, options) for _ in range(3)]
    assert same(new[0], new[1]) and same(new[0], new[2]) and not same(new[0], old[0])
    wanted = by_reference(pipe, plan, lambda: tiny.call(pipe, options))
    with use, watched(pipe.unet) as outputs:
        tiny.call(pipe, options)
    for one, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


# ---- options of the pipeline's scheduler -----------------------------------------------------------------------------

OPTIONS = [
    (DPMSolverMultistepScheduler, {"solver_type": "heun", "algorithm_type": "dpmsolver++"}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    (DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_spacing": "linspace"}),
    (EulerAncestralDiscreteScheduler, {}),
    (UniPCMultistepScheduler, {"solver_type": "bh1", "disable_corrector": [0]}),
    (HeunDiscreteScheduler, {}),
    (LMSDiscreteScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_the_plans_own_solver_walks_whatever_the_scheduler_says(kind, options):
    pipe, called = tiny.made(tiny.stable_diffusion)
    plan, latents = full_plan(pipe, order=2), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    called = called | {"latents": latents, "output_type": "latent", "guidance_scale": 3.0}
    with Planned(pipe, plan):
        wanted = tiny.call(pipe, called)
    pipe.scheduler = own = kind(**tiny.NOISE, **options)
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, called), wanted)
    assert pipe.scheduler is own and NoiseSchedule.of(own) == plan.schedule
    tiny.call(pipe, called)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["learned_range", "fixed_small"])
def test_a_learned_variance_is_left_out(channels, kind):
    torch.manual_seed(0)
    learned = kind == "learned_range"
    model = tiny.plain_unet(in_channels=channels, out_channels=channels * (1 + learned)).eval()
    pipe = tiny.DDPMPipeline(model, tiny.DDPMScheduler(**tiny.NOISE, clip_sample=False, variance_type=kind))
    pipe.set_progress_bar_config(disable=True)
    plan = Plan.deepcache(2, blocks.describe(model).branch(0), full_plan(pipe))
    noise = torch.randn(1, channels, 8, 8, generator=torch.manual_seed(1))
    wanted = reference.sample(model, plan, noise)
    torch.testing.assert_close(sampling.sample(model, pipe.scheduler, plan, noise), wanted, rtol=1e-3, atol=1e-3)
    with Planned(pipe, plan):
        images = tiny.call(pipe, {"output_type": "np"})
    np.testing.assert_allclose(images, (wanted / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-3)


REFUSED = [EDMEulerScheduler(), EDMDPMSolverMultistepScheduler(), LCMScheduler(), TCDScheduler(),
           DDIMInverseScheduler(), CMStochasticIterativeScheduler(), ScoreSdeVeScheduler(), IPNDMScheduler(),
           UnCLIPScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True), FlowMatchLCMScheduler(),
           RePaintScheduler()]


@pytest.mark.parametrize("scheduler", REFUSED, ids=lambda scheduler: type(scheduler).__name__)
def test_schedulers_that_walk_in_ways_of_their_own_are_refused(scheduler):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    plan = full_plan(pipe)
    pipe.scheduler = scheduler
    with pytest.raises(PlanError, match="walks in a way of its own, which plans do not know"):
        Planned(pipe, plan)


@pytest.mark.parametrize(("option", "value"), [
    ("clip_sample", True), ("thresholding", True), ("trained_betas", [0.1] * 1000), ("rescale_betas_zero_snr", True)])
def test_options_that_change_the_schedule_are_refused_with_advice(option, value):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    plan = full_plan(pipe)
    pipe.scheduler = DDIMScheduler(**tiny.NOISE | {"clip_sample": False} | {option: value})
    with pytest.raises(PlanError, match=rf"has {option}=.*which plans do not know. Where the model allows, pass DDIM"):
        Planned(pipe, plan)
    pipe.scheduler = DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)
    with pytest.raises(PlanError, match="a DDPMScheduler's noise schedule is none that plans know: beta_schedule"):
        Planned(pipe, plan)


class Flow(FlowMatchEulerDiscreteScheduler):
    """What PixArt's pipeline asks of a scheduler beside."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample, timestep):
        return sample


@pytest.mark.parametrize("scheduler", [
    FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler(shift=3.0),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)])
def test_flow_matching_works(scheduler):
    pipe, options = tiny.made(tiny.pixart)
    pipe.scheduler = Flow(shift=3.0)
    described, fits = blocks.describe(pipe.transformer), NoiseSchedule.of(scheduler)
    pipe.scheduler.set_timesteps(6)
    full = Plan.full(pipe.scheduler.timesteps.tolist(), fits, described.names, cache="residual", solver="euler")
    plan = Plan.deepcache(2, described.branch(0), full)
    check(pipe, plan, lambda: tiny.call(pipe, options, num_inference_steps=6))
    with Planned(pipe, plan):
        wanted = tiny.call(pipe, options, num_inference_steps=6)
    pipe.scheduler = scheduler
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, options, num_inference_steps=6), wanted)


# ---- the networks that diffusers has ---------------------------------------------------------------------------------

UNETS = {
    "x4 upscaler": {"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": (True, False)},
    "timestep": {"class_embed_type": "timestep"},
    "identity": {"class_embed_type": "identity"},
    "identity, other width": {"class_embed_type": "identity", "time_embedding_dim": 24},
    "projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
    "simple projection": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    "text through a projection": {"encoder_hid_dim": 20},
    "text of two widths": {"cross_attention_dim": (16, 16)},
    "text and image": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_image_proj",
                       "addition_embed_type": "text_image"},
    "image": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
    "image and hint": {"in_channels": 8, "encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj",
                       "addition_embed_type": "image_hint"},
    "text, added": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "SDXL": {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 36},
    "oblong": {"sample_size": (8, 12)},
}


def counted(model):
    costs = cost.count(model)
    full = Plan.full((999, 500), NoiseSchedule.of(tiny.ddim()), blocks.describe(model).names,
                     cache=blocks.describe(model).cache)
    assert costs.executed(full) == 2 * costs.call and min(costs.blocks.values()) > 0
    shape = blocks.input_shape(model)
    noise = torch.randn(2, *shape)
    conditions = Conditions(blocks.example_conditions(model, 2, "cpu"))
    images = sampling.sample(model, tiny.ddim(), full, noise, conditions)
    assert images.shape == noise.shape and images.isfinite().all()
    return costs


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_every_kind_of_condition_is_counted_and_sampled(config):
    torch.manual_seed(0)
    model = tiny.text_unet(**config).eval()
    if config.get("in_channels") == 7:  # the upscaler sees a picture of few pixels beside the latents
        assert cost.count(model).call > cost.count(tiny.text_unet()).call
    else:
        counted(model)


@pytest.mark.parametrize("config", [{}, {"use_additional_conditions": True}])
def test_pixart_is_counted_and_sampled(config):
    torch.manual_seed(0)
    counted(tiny.PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                                          num_layers=2, sample_size=8, patch_size=2, caption_channels=12,
                                          cross_attention_dim=24, **config).eval())


@pytest.mark.parametrize("config", [{"class_embed_type": "timestep"}, {"class_embed_type": "identity"},
                                    {"num_class_embeds": 5}])
def test_pixel_unets_with_labels_are_counted_and_sampled(config):
    torch.manual_seed(0)
    counted(tiny.plain_unet(**config).eval())


def test_nested_conditions_are_guided_in_one_batch_and_apart():
    pipe, options = tiny.made(tiny.stable_diffusion_xl)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    given, null = ({"encoder_hidden_states": options[f"{which}prompt_embeds"],
                    "added_cond_kwargs": {"text_embeds": options[pooled], "time_ids": ids}}
                   for which, pooled in (("", "pooled_prompt_embeds"), ("negative_", "negative_pooled_prompt_embeds")))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for plan in plans(pipe).values():
        with Planned(pipe, plan):
            wanted = tiny.call(pipe, options, latents=latents, guidance_scale=3.0, output_type="latent")
        for apart in (False, True):
            images = sampling.sample(pipe.unet, pipe.scheduler, plan, latents, Conditions(given, null, 3.0, apart))
            torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_network_without_a_size_says_so():
    with pytest.raises(ValueError, match=r"this UNet2DConditionModel names no sample_size: set it in its config\.json"):
        cost.count(tiny.text_unet(sample_size=None))


# ---- the command line ------------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "lib.apply", *map(str, arguments)], capture_output=True, text=True,
                          cwd=paths.ROOT)


def saved(kind, folder):
    pipe, _ = tiny.made(kind)
    plan = full_plan(pipe, 4)
    pipe.save_pretrained(folder / "pipe")
    plan.save(folder / "plan.json")
    return "--model", folder / "pipe", "--plan", folder / "plan.json", "--out", folder / "out", "--count", 2


def pixels():
    model = tiny.plain_unet(in_channels=3, out_channels=3, sample_size=(8, 12))
    return tiny.DDIMPipeline(model, tiny.ddim()), {}


@pytest.mark.parametrize(("kind", "size"), [(tiny.dit, (16, 16)), (pixels, (12, 8))])
def test_the_command_line_writes_pictures(kind, size, tmp_path):
    done = command(*saved(kind, tmp_path))
    assert done.returncode == 0, done.stderr
    found = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [(picture.mode, picture.size) for picture in found] == [("RGB", size)] * 2


@pytest.mark.parametrize(("kind", "message"), [
    (tiny.stable_diffusion, "reads encoder_hidden_states, and the command line has none to give"),
    (tiny.stable_diffusion_xl, "reads added_cond_kwargs, encoder_hidden_states, and the command line has none"),
    (tiny.ddim_pixels, "draws 4 channels, which is no picture, and names no vae to decode them")])
def test_the_command_line_refuses_in_a_sentence(kind, message, tmp_path):
    done = command(*saved(kind, tmp_path))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---- pipelines as they were saved ------------------------------------------------------------------------------------


SAVED = [*OPTIONS[:1], (EulerDiscreteScheduler, {}), (UniPCMultistepScheduler, {}), (PNDMScheduler, {}),
         (DDPMScheduler, {"clip_sample": False}), (HeunDiscreteScheduler, {}), (DDIMScheduler, {"clip_sample": False})]


@pytest.mark.parametrize(("kind", "options"), SAVED)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pipelines_are_loaded_as_they_were_saved(kind, options, prediction, tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    pipe.scheduler = kind(**tiny.NOISE | {"beta_end": 0.015}, prediction_type=prediction, **options)
    pipe.save_pretrained(tmp_path)
    _, schedule = networks.load(tmp_path)
    assert NoiseSchedule.of(schedule) == NoiseSchedule.of(pipe.scheduler)
    x_0, noise, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([400])
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t),
                               DDIMScheduler(**tiny.NOISE | {"beta_end": 0.015}).add_noise(x_0, noise, t))


@pytest.mark.parametrize("scheduler", [LCMScheduler(), EDMEulerScheduler()])
def test_pipelines_that_no_plan_fits_are_refused_when_they_are_loaded(scheduler, tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="walks in a way of its own"):
        networks.load(tmp_path)


@pytest.mark.parametrize("named", [["diffusers", "logging"], ["diffusers", "DDIMScheduler"], ["os", "system"],
                                   ["diffusers", "utils"], [None, None], ["diffusers", "no_such_class"],
                                   ["diffusers", "AutoPipelineForText2Image"]])
def test_only_models_of_diffusers_are_loaded(named, tmp_path):
    pipe, _ = tiny.made(tiny.ddim_pixels)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for part in ("unet", "scheduler"):
        if (part, named[1]) != ("scheduler", "DDIMScheduler"):
            (tmp_path / "model_index.json").write_text(json.dumps(index | {part: named}))
            with pytest.raises(ValueError, match=f"its {part} is a .*only models and schedulers of diffusers"):
                networks.load(tmp_path)


# ---- numbers and files -----------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_saved(tmp_path):
    pipe, _ = tiny.made(tiny.ddim_pixels)
    full, described = full_plan(pipe), blocks.describe(pipe.unet)
    made = [Plan.deepcache(np.int64(3), described.branch(np.int64(0)), full, np.int64(2), note=np.float32(0.5)),
            Plan.full(np.array([999, 500, 3]), full.schedule, described.names, np.int64(2)),
            Plan.full(np.array([999.0, 500.5]), full.schedule, described.names, seed=np.int64(3)),
            Plan.few_steps(np.int64(4), "quadratic", full, np.int64(2)),
            Plan.random(np.float64(0.5), np.int64(1), full),
            Plan.from_gates(np.ones((10, len(described)), np.float32), full, scores=np.ones(3)),
            full.guided((np.int64(1), np.int64(5)), every=np.int64(2))]
    for plan in made:
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").key == plan.key


def test_gates_between_0_and_1_are_refused():
    pipe, _ = tiny.made(tiny.ddim_pixels)
    full = full_plan(pipe)
    for gates in (np.full((10, len(full.blocks)), 0.3), np.full((10, len(full.blocks)), np.nan)):
        with pytest.raises(PlanError, match="gates: must be 0 or 1"):
            Plan.from_gates(gates, full)


@pytest.mark.parametrize("field", ["provenance", "timesteps", "cells", "net", "blocks", "schedule", "table"])
def test_files_nested_beyond_sense_are_refused(field, tmp_path):
    pipe, _ = tiny.made(tiny.ddim_pixels)
    full_plan(pipe).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    for depth in (300, 5000, 200_000):
        for left, right in (("[", "]"), ('{"a":', "}")):
            content[field] = "HERE"
            text = json.dumps(content).replace('"HERE"', left * depth + "1" + right * depth)
            (tmp_path / "deep.json").write_text(text)
            try:
                Plan.load(tmp_path / "deep.json").save(tmp_path / "again.json")
            except PlanError:
                continue
            assert field == "provenance"


def test_the_readmes_example_runs_in_a_fresh_interpreter(tmp_path):
    text = (paths.ROOT / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    assert example.index("lib.apply") < example.index("diffusers")
    tiny.DDIMPipeline(tiny.plain_unet(), tiny.ddim()).save_pretrained(tmp_path / "my-ddim-pipeline")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "times fewer executed MACs" in done.stdout, done.stderr
