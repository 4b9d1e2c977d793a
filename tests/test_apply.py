"""Plans on stock pipelines: real classes, saved and loaded as users do, called as ever."""

from contextlib import nullcontext

import numpy as np
import pytest
import reference
import tiny
import torch
from diffusers import CacheMixin, DDIMPipeline, DDIMScheduler, DDPMScheduler, PNDMScheduler
from tiny import STEPS, ddim

from lib.apply import Planned
from lib.grid import blocks
from lib.grid.model import Conditions
from lib.grid.plan import NoiseSchedule, Plan, PlanError, trailing


@pytest.fixture(scope="module", params=tiny.ALL, ids=lambda kind: kind.__name__)
def pipeline(request):
    pipe, options = tiny.made(request.param)
    return pipe, tiny.network(pipe), lambda **more: tiny.call(pipe, options, **more)


@pytest.fixture
def full(pipeline):
    pipe, model, _ = pipeline
    described, fits = blocks.describe(model), NoiseSchedule.of(pipe.scheduler)
    return Plan.full(trailing(STEPS, fits.train_timesteps), fits, described)


def test_a_full_plan_gives_the_pipelines_own_images(pipeline, full):
    pipe, _, call = pipeline
    own, plain = pipe.scheduler, call()
    with Planned(pipe, full) as planned:
        images = planned and call()
    if not isinstance(own, DDPMScheduler):  # which adds noise at every step
        np.testing.assert_allclose(images, plain, atol=1e-4)
    assert pipe.scheduler is own and np.array_equal(call(), plain), "the pipeline is as it was"


def test_a_cheap_plan_runs_the_cells_that_it_says(pipeline, full):
    pipe, model, call = pipeline
    described, ran = blocks.describe(model), []
    plan = Plan.deepcache(3, described.branch(0), full)
    last = described.blocks[-2 if described.cache == "output" else -1]
    module = model.get_submodule(last.modules[0])
    probe = next(iter(module.children())).register_forward_hook(lambda *_: ran.append(last.name))
    use = Planned(pipe, plan)
    use.enable()
    images = call()
    assert len(ran) == plan.computes[:, described.index[last.name]].sum() < STEPS
    assert np.array_equal(call(), images), "the second call gives what the first gave"
    use.disable()
    probe.remove()
    assert not np.array_equal(call(), images)


def test_an_interrupted_call_leaves_nothing_behind(pipeline, full, monkeypatch):
    pipe, model, call = pipeline
    with Planned(pipe, Plan.deepcache(3, blocks.describe(model).branch(0), full)):
        images, step, calls = call(), pipe.scheduler.step, []

        def stopped(*arguments, **options):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(pipe.scheduler), "step", lambda self, *a, **o: stopped(*a, **o))
            call()
        assert np.array_equal(call(), images)


def test_what_does_not_fit_is_refused(pipeline, full):
    pipe, _, call = pipeline
    with Planned(pipe, full), pytest.raises(PlanError, match=r"num_inference_steps=10, not 7"):
        call(num_inference_steps=7)
    own = pipe.scheduler
    pipe.scheduler = DDIMScheduler(num_train_timesteps=500, clip_sample=False)
    with pytest.raises(PlanError, match="schedule"):
        Planned(pipe, full)
    pipe.scheduler = own
    if isinstance(pipe, DDIMPipeline):
        with Planned(pipe, full), pytest.raises(PlanError, match="eta=0, not 0.5"):
            call(eta=0.5)


def test_passes_in_calls_of_their_own_have_caches_of_their_own_if_they_are_named():
    torch.manual_seed(0)
    pipe = DDIMPipeline(tiny.plain_unet(), ddim())
    described, fits = blocks.describe(pipe.unet), NoiseSchedule.of(pipe.scheduler)
    full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, described)
    plan, noises = Plan.deepcache(3, described.branch(0), full), torch.randn(2, 1, 4, 8, 8)

    def apart(x_t):
        with Planned(pipe, plan):
            pipe.scheduler.set_timesteps(STEPS)
            for t in pipe.scheduler.timesteps:
                x_t = pipe.scheduler.step(pipe.unet(x_t, t).sample, t, x_t).prev_sample
        return x_t

    with torch.inference_mode():
        alone, both = [apart(x_t) for x_t in noises], list(noises)
        with Planned(pipe, plan):
            pipe.scheduler.set_timesteps(STEPS)
            for t in pipe.scheduler.timesteps:  # two images as two passes of one step, one solver each
                predicted = []
                for x_t, name in zip(both, ("uncond", "cond")):
                    with CacheMixin.cache_context(pipe.unet, name):
                        predicted.append(pipe.unet(x_t, t).sample)
                x_t = pipe.scheduler.step(torch.cat(predicted), t, torch.cat(both)).prev_sample
                both = list(x_t[:, None])
    for one, other in zip(alone, both):
        torch.testing.assert_close(one, other)
    with torch.inference_mode(), Planned(pipe, plan):
        pipe.scheduler.set_timesteps(STEPS)
        pipe.unet(noises[0], plan.timesteps[0])
        with pytest.raises(PlanError, match="called twice for the pass 'given': which pass is the second call?"):
            pipe.unet(noises[1], plan.timesteps[0])


def test_calls_of_one_step_at_the_same_latents_are_told_apart_by_their_order():
    pipe, _ = tiny.made(tiny.stable_diffusion)
    described, fits = blocks.describe(pipe.unet), NoiseSchedule.of(pipe.scheduler)
    plan = Plan.deepcache(3, described.branch(0), Plan.full(trailing(STEPS, fits.train_timesteps), fits, described))
    noise, texts = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 5, pipe.unet.config.cross_attention_dim)

    def sampled(names, guided=range(STEPS)):
        x_t = noise
        with torch.inference_mode(), Planned(pipe, plan):
            pipe.scheduler.set_timesteps(STEPS)
            for step, t in enumerate(pipe.scheduler.timesteps):
                predicted = []
                for text, name in list(zip(texts, names))[:2 if step in guided else 1]:
                    with CacheMixin.cache_context(pipe.unet, name) if name else nullcontext():
                        predicted.append(pipe.unet(x_t, t, encoder_hidden_states=text).sample)
                x_t = pipe.scheduler.step(predicted[0] + 2 * (predicted[0] - predicted[-1]), t, x_t).prev_sample
        return x_t

    assert torch.equal(sampled((None, None)), sampled(("cond", "uncond")))
    with pytest.raises(PlanError, match="it comes anew"):
        sampled((None, None), guided=range(3, STEPS))
    with pytest.raises(PlanError, match="step 4 made fewer calls of the network than the step before"):
        sampled((None, None), guided=range(4))


@pytest.mark.parametrize(("interval", "every", "reuse", "null_holds"), [
    ((2, 7), 1, 0, "output"), (None, 2, 0, "difference"), (None, 3, 2, "output"), ((1, 8), 2, 2, "difference")])
def test_a_stock_pipelines_guidance_is_the_plans(interval, every, reuse, null_holds):
    pipe, options = tiny.made(tiny.stable_diffusion)
    described, fits = blocks.describe(pipe.unet), NoiseSchedule.of(pipe.scheduler)
    full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, described, order=2)
    plan = Plan.deepcache(2, described.branch(0), full, 2).guided(interval, every=every, reuse=reuse,
                                                                  null_holds=null_holds)
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(3))
    options = options | {"prompt": ["a digit", "digit"], "num_inference_steps": STEPS, "latents": latents,
                "output_type": "latent"}
    with torch.inference_mode():
        texts = [{"encoder_hidden_states": rows} for rows in pipe.encode_prompt(options["prompt"], "cpu", 1, True)]
    with Planned(pipe, plan):
        images = pipe(**options, guidance_scale=4.0).images
        again = pipe(**options, guidance_scale=4.0).images
        with pytest.raises(PlanError, match="call the pipeline with guidance, or take a plan of one pass"):
            pipe(**options, guidance_scale=1.0)
    assert torch.equal(images, again)
    wanted = reference.sample(pipe.unet, plan, latents, Conditions(*texts, scale=4.0))
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_the_walk_adds_noise_as_the_pipelines_scheduler_does():
    pipe, _ = tiny.made(tiny.dit)
    described, fits = blocks.describe(pipe.transformer), NoiseSchedule.of(pipe.scheduler)
    full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, described)
    with pytest.raises(PlanError, match="DiTPipeline makes batches in which nobody can say which rows are of which"):
        Planned(pipe, full.guided())
    with Planned(pipe, full) as planned:
        x_0, noise = torch.randn(2, 3, 4, 8, 8).unbind()
        steps = torch.tensor([999, 500, 3])
        torch.testing.assert_close(planned.scheduler.add_noise(x_0, noise, steps), ddim().add_noise(x_0, noise, steps))


def test_stable_diffusions_own_scheduler_takes_a_plan():
    pipe, options = tiny.made(tiny.stable_diffusion)
    pipe.scheduler = PNDMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                   beta_schedule="scaled_linear", skip_prk_steps=True)
    fits = NoiseSchedule.of(pipe.scheduler)
    plan = Plan.full(trailing(STEPS, fits.train_timesteps), fits, blocks.describe(pipe.unet), order=2)
    with Planned(pipe, plan):
        images = pipe(**options, num_inference_steps=STEPS, generator=torch.manual_seed(1)).images
    assert np.isfinite(images).all() and images.shape[0] == 1
