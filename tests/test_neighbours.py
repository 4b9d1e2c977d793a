"""Plans beside other code that holds on to a pipeline, its network or its scheduler: right, or refused by name."""

import copy
import functools
import threading

import numpy as np
import pytest
import reference
import tiny
import torch
from accelerate import cpu_offload
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
from diffusers.hooks import (
    HookRegistry,
    PyramidAttentionBroadcastConfig,
    apply_group_offloading,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import AttnProcessor2_0
from doors import by_reference, check, full_plan, plans, random_plan, same, watched
from torch._dynamo.utils import counters

from lib.apply import Planned
from lib.grid import blocks, cost, sampling
from lib.grid.engine import Engine
from lib.grid.model import Model
from lib.grid.plan import NoiseSchedule, Plan, PlanError
from lib.methods.fitting import Fitting

# ---- what holds on to network, scheduler or pipeline -----------------------------------------------------------------


@pytest.fixture
def cheap():
    pipe, options = tiny.made(tiny.stable_diffusion)
    return pipe, options, Plan.deepcache(3, blocks.describe(pipe.unet).branch(0), full_plan(pipe))


def test_copies_of_a_scheduler_are_of_the_pipelines_own(cheap):
    pipe, options, plan = cheap
    plain, own = tiny.call(pipe, options), pipe.scheduler
    with Planned(pipe, plan):
        rebuild, arguments = pipe.scheduler.__reduce_ex__(4)  # what a copy in another process is made by
        for made in (copy.copy(pipe.scheduler), copy.deepcopy(pipe.scheduler), rebuild(*arguments)):
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


def test_a_pipeline_that_outlives_the_block_with_the_plans_scheduler_says_so(cheap):
    pipe, options, plan = cheap
    with Planned(pipe, plan):
        made = type(pipe)(**pipe.components, requires_safety_checker=False)
    with pytest.raises(PlanError, match="is no longer on this network, but its scheduler is still on this pipeline"):
        tiny.call(made, options)


def test_a_second_thread_is_refused_and_the_first_one_told(cheap):
    pipe, options, plan = cheap
    told = []

    def other():
        with pytest.raises(PlanError, match="two threads sample with it at once"):
            pipe.unet(torch.randn(2, 4, 8, 8), plan.timesteps[3], torch.randn(2, 5, 16))
        told.append("other")

    def intruding(pipe, step, t, kept):
        if step == 2:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return kept

    def restart():
        thread = threading.Thread(target=lambda: pipe.scheduler.set_timesteps(tiny.STEPS))
        thread.start()
        thread.join()

    def restarting(pipe, step, t, kept):
        if step == 2:
            restart()
        return kept

    def restarting_in_the_last_call(module, arguments):
        calls.append(1)
        if len(calls) == tiny.STEPS:
            restart()

    with Planned(pipe, plan):
        images = tiny.call(pipe, options)
        assert same(tiny.call(pipe, options, callback_on_step_end=intruding), images) and told
        with pytest.raises(PlanError, match="two threads sample with it at once"):
            tiny.call(pipe, options, callback_on_step_end=restarting)
        calls, handle = [], pipe.unet.conv_out.register_forward_pre_hook(restarting_in_the_last_call)
        with pytest.raises(PlanError, match="two threads sample with it at once"):
            tiny.call(pipe, options)
        handle.remove()
        found = []
        worker = threading.Thread(target=lambda: found.append(tiny.call(pipe, options)))
        worker.start()
        worker.join()
        assert same(found[0], images)


def test_a_second_thread_is_refused_by_an_engine_alone(cheap):
    pipe, _, plan = cheap
    x_t, texts, told = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), []

    def other():
        with pytest.raises(PlanError, match="two threads sample with it at once"):
            pipe.unet(x_t, plan.timesteps[1], texts)
        told.append(1)

    with Engine(pipe.unet, plan, plan.schedule):
        pipe.unet(x_t, plan.timesteps[0], texts)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert told


@pytest.mark.parametrize("given", [{"timesteps": [900, 500, 3]}, {"sigmas": [3.0, 1.0]}])
def test_timesteps_of_the_callers_own_are_refused(cheap, given):
    pipe, options, plan = cheap
    with Planned(pipe, plan), pytest.raises(ValueError, match="does not support custom"):
        tiny.call(pipe, options, **given)


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


@pytest.mark.parametrize("kind", [tiny.ddim_pixels, tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.dit,
                                  tiny.pixart, tiny.stable_diffusion_3, tiny.flux])
def test_blocks_compile_without_a_break_under_a_plan(kind):
    pipe, options = tiny.made(kind)
    full = full_plan(pipe) if kind not in tiny.FLOWS else Fitting.full_of(pipe, tiny.STEPS, list(range(1000, 0, -100)))
    plan = Plan.deepcache(3, blocks.describe(tiny.network(pipe)).branch(0), full)
    with Planned(pipe, plan):
        plain = tiny.call(pipe, options)
    counters.clear()
    with Planned(pipe, plan, compiling={"fullgraph": True, "backend": "eager"}):
        np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 1 and not counters["graph_break"]  # blocks of a kind share one
    torch.compiler.reset()


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
    ran = []

    def counting(graph, _):
        return lambda *inputs: ran.append(1) or graph(*inputs)

    next(iter(own.children())).compile(backend="eager")  # in place; no block of the plan's
    for module in (own, *(own.down_blocks if part == "unet" else own.transformer_blocks)):
        module.compile(backend=counting)
    np.testing.assert_allclose(tiny.call(pipe, options), plain, atol=1e-5)
    assert ran
    ran.clear()
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, options), wanted)
    assert not ran
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


def test_hooks_that_are_put_on_in_the_block_stay(cheap):
    pipe, options, plan = cheap
    plain, ran = tiny.call(pipe, options), []

    class Counting(AccelerateHook):
        def pre_forward(self, module, *args, **kwargs):
            ran.append(1)
            return args, kwargs

    class Beside(DiffusersHook):
        def pre_forward(self, module, *args, **kwargs):
            ran.append(1)
            return args, kwargs

    for name in ("accelerate", "diffusers"):
        with Planned(pipe, plan):
            images = tiny.call(pipe, options)
            if name == "accelerate":
                add_hook_to_module(pipe.unet, Counting())
            else:
                HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Beside(), "beside")
            ran.clear()
            assert same(tiny.call(pipe, options), images) and len(ran) == tiny.STEPS
            assert same(tiny.call(pipe, options), images)
        ran.clear()
        assert same(tiny.call(pipe, options), plain) and len(ran) == tiny.STEPS
        with Planned(pipe, plan):
            assert same(tiny.call(pipe, options), images)
        if name == "accelerate":
            remove_hook_from_module(pipe.unet)
        else:
            pipe.unet._diffusers_hook.remove_hook("beside")
        assert same(tiny.call(pipe, options), plain)


@pytest.mark.parametrize("block", ["mid_block", "up_blocks.1.resnets.0", "up_blocks.0", ""])
def test_a_hook_that_is_taken_from_beneath_leaves_the_plan_in_force(block):
    pipe, options = tiny.made(tiny.three_levels)
    plain, found = tiny.call(pipe, options), plans(pipe)
    for plan in (found["deepcache 2"], found["held columns"], found["random 0"]):
        with Planned(pipe, plan):
            images = tiny.call(pipe, options)
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet.get_submodule(block))
        for where in ("between", "in a run"):
            registry.register_hook(DiffusersHook(), "beside")

            def taken(pipe, step, t, kept, where=where, registry=registry):
                if where == "in a run" and step == 3:
                    registry.remove_hook("beside")
                return kept

            with Planned(pipe, plan):
                if where == "between":
                    registry.remove_hook("beside")
                if block or where == "between":
                    assert same(tiny.call(pipe, options, callback_on_step_end=taken), images)
                else:  # at the network's own door nobody is left to notice, but its blocks are
                    with pytest.raises(PlanError, match="one of its blocks was called by itself|was not called"):
                        tiny.call(pipe, options, callback_on_step_end=taken)
                assert same(tiny.call(pipe, options), images)
            assert same(tiny.call(pipe, options), plain)
            assert "forward" not in vars(pipe.unet.get_submodule(block)) and not registry.hooks


def test_a_hook_that_replaces_a_forward_in_the_block_stays(cheap):
    pipe, options, plan = cheap

    class Half(DiffusersHook):
        def new_forward(self, module, *args, **kwargs):
            return 0.5 * self.fn_ref.original_forward(*args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(pipe.unet.mid_block).register_hook(Half(), "half")
    halved = tiny.call(pipe, options)
    pipe.unet.mid_block._diffusers_hook.remove_hook("half")
    with Planned(pipe, plan):
        pipe.unet.mid_block._diffusers_hook.register_hook(Half(), "half")
    assert same(tiny.call(pipe, options), halved)


def test_a_module_that_is_replaced_in_the_block_is_named_and_leaving_works(cheap):
    pipe, options, plan = cheap
    plain, other = tiny.call(pipe, options), copy.deepcopy(pipe.unet.mid_block)
    with Planned(pipe, plan):
        pipe.unet.mid_block = other
        with pytest.raises(PlanError, match="mid_block is another module than when plan .* was put on"):
            tiny.call(pipe, options)
    assert same(tiny.call(pipe, options), plain)
    assert not any(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}) for module in pipe.unet.modules())


@pytest.mark.parametrize("seed", range(3))
def test_weights_that_lie_elsewhere_between_their_uses(cheap, seed):
    """Sequential offloading: parameters are on the meta device but while their module runs."""
    pipe, options, _ = cheap
    plan = random_plan(full_plan(pipe), seed)
    with Planned(pipe, plan):
        images = tiny.call(pipe, options)
    cpu_offload(pipe.unet, torch.device("cpu"))
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, options), images)


def test_layerwise_casting_keeps_its_computing_precision():
    torch.manual_seed(0)
    model = tiny.plain_unet().eval()
    plan = full_plan(tiny.DDIMPipeline(model, tiny.ddim()), 4)
    noise = torch.randn(1, 4, 8, 8)
    wanted = sampling.sample(Model(model, tiny.ddim()), plan, noise)
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    images = sampling.sample(Model(model, tiny.ddim()), plan, noise)
    torch.testing.assert_close(images, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize(("options", "works"), [
    ({"offload_type": "block_level", "num_blocks_per_group": 2}, False), ({"offload_type": "leaf_level"}, True)])
def test_group_offloading_works_leaf_by_leaf(cheap, options, works):
    pipe, called, plan = cheap
    with Planned(pipe, plan):
        images = tiny.call(pipe, called)
    apply_group_offloading(pipe.unet, torch.device("cpu"), torch.device("cpu"), **options)
    if not works:
        with pytest.raises(PlanError, match="group offloading is on .*, and a plan may skip the block that loads"):
            Planned(pipe, plan).enable()
    else:
        with Planned(pipe, plan):
            assert same(tiny.call(pipe, called), images)


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
        helper.enable()
        with pytest.raises(PlanError, match=r"something has replaced the forward of .* \(another cache\?\)"):
            tiny.call(pipe, options)
        helper.disable()
    pipe, options = tiny.made(tiny.pixart)
    plan = full_plan(pipe)
    apply_pyramid_attention_broadcast(pipe.transformer, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks",)))
    with pytest.raises(PlanError, match="the cache 'pyramid_attention_broadcast' is on transformer_blocks"):
        Planned(pipe, plan).enable()


@pytest.mark.parametrize("recorded", [False, True])
def test_a_cache_in_the_forward_of_a_class_is_refused_where_it_leaves_out_live_blocks(recorded, request, monkeypatch):
    """As TeaCache is put on: every second call gives the last output again."""
    if recorded:
        request.getfixturevalue("tapes")
    pipe, options = tiny.made(tiny.pixart)
    kind, calls = type(pipe.transformer), []
    own = kind.forward

    def cached(self, *arguments, **named):
        calls.append(own(self, *arguments, **named) if len(calls) % 2 == 0 else calls[-1])
        return calls[-1]

    monkeypatch.setattr(kind, "forward", functools.wraps(own)(cached))
    tiny.call(pipe, options)
    with Planned(pipe, full_plan(pipe)), pytest.raises(PlanError, match="forward left it out .another cache"):
        for _ in range(3):
            tiny.call(pipe, options)


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


class Scaled(AttnProcessor2_0):
    """A processor with a scale in a list, as IP adapters' have theirs."""

    def __init__(self):
        super().__init__()
        self.scale = [1.0]

    def __call__(self, *arguments, **options):
        return self.scale[0] * super().__call__(*arguments, **options)


Scaled.__module__ = AttnProcessor2_0.__module__


class Tabled(AttnProcessor2_0):
    """A processor whose module holds a scale by name, as a LoRA's layer does."""

    def __call__(self, attention, *arguments, **options):
        return attention.scaling["style"] * super().__call__(attention, *arguments, **options)


Tabled.__module__ = AttnProcessor2_0.__module__


@pytest.mark.parametrize("what", ["a number", "a list", "a dict"])
def test_recordings_hear_of_what_a_callback_changes(what, tapes):
    pipe, options = tiny.made(tiny.three_levels)
    plan = Plan.deepcache(3, blocks.describe(pipe.unet).branch(3), full_plan(pipe))
    processor, block = Tabled() if what == "a dict" else Scaled(), pipe.unet.mid_block.resnets[1]
    pipe.unet.set_attn_processor(processor)
    scaling = {"style": 1.0}
    for module in pipe.unet.modules():
        if hasattr(module, "set_processor"):
            module.scaling = scaling

    def put(number):
        if what == "a list":
            processor.scale[0] = number
        elif what == "a dict":
            scaling["style"] = number
        else:
            block.output_scale_factor = number

    def changing(pipe, step, t, kept):
        if step == 3:
            put(3.0)
        return kept

    def run():
        put(1.0)
        return tiny.call(pipe, options, callback_on_step_end=changing)

    wanted = by_reference(pipe, plan, run)
    with Planned(pipe, plan):
        for _ in range(3):
            with watched(pipe.unet) as outputs:
                run()
            for one, other in zip(outputs, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert tapes


def test_a_network_with_hooks_that_replays_would_not_run_is_not_recorded(tapes):
    pipe, options = tiny.made(tiny.three_levels)
    ran = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with Planned(pipe, full_plan(pipe)):
        for _ in range(3):
            tiny.call(pipe, options)
    assert len(ran) == 3 * tiny.STEPS and not tapes


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_recordings_of_a_network_that_has_changed_are_made_anew(change, tapes):
    pipe, options = tiny.made(tiny.three_levels)
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
        images = tiny.call(pipe, called)
    torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
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
    torch.testing.assert_close(sampling.sample(Model(model, pipe.scheduler), plan, noise), wanted, rtol=1e-3, atol=1e-3)
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


def test_schedulers_whose_timesteps_are_of_another_kind_are_refused():
    pipe, _ = tiny.made(tiny.stable_diffusion)
    plan = full_plan(pipe)
    pipe.scheduler = EulerDiscreteScheduler(**tiny.NOISE, timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(PlanError, match="timestep_type=continuous, whose network reads other numbers"):
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
    full = Plan.full(pipe.scheduler.timesteps.tolist(), fits, described, solver="euler")
    plan = Plan.deepcache(2, described.branch(0), full)
    check(pipe, plan, lambda: tiny.call(pipe, options, num_inference_steps=6))
    with Planned(pipe, plan):
        wanted = tiny.call(pipe, options, num_inference_steps=6)
    pipe.scheduler = scheduler
    with Planned(pipe, plan):
        assert same(tiny.call(pipe, options, num_inference_steps=6), wanted)
