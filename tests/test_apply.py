"""Plans on stock pipelines: real classes, saved and loaded as users do, called as ever."""

import json

import numpy as np
import pytest
import reference
import torch
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMTextToImagePipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib.apply import Planned
from lib.grid import blocks, sampling
from lib.grid.plan import NoiseSchedule, Plan, PlanError, trailing

STEPS = 10
NOISE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def ddim():
    return DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")


def unet(kind, **more):
    return kind(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
                norm_num_groups=4, **more)


def plain_unet():
    return unet(UNet2DModel, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)


def text_unet():
    return unet(UNet2DConditionModel, cross_attention_dim=16, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def vae():
    return AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)


def ddpm_pipeline(_):
    scheduler = DDPMScheduler(**NOISE, clip_sample=False, timestep_spacing="trailing")
    return DDPMPipeline(plain_unet(), scheduler), {"output_type": "np"}


def ddim_pipeline(_):
    return DDIMPipeline(plain_unet(), ddim()), {"output_type": "np"}


def dit_pipeline(_):
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                        num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=1000)
    return DiTPipeline(transformer, vae(), ddim()), {"class_labels": [3], "output_type": "np"}


def stable_diffusion_pipeline(folder):
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "digit</w>", "a", "d", "i", "g", "t"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16,
                                        num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=8,
                                        bos_token_id=0, eos_token_id=1, pad_token_id=1))
    tokens = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    pipe = StableDiffusionPipeline(vae=vae(), text_encoder=text, tokenizer=tokens, unet=text_unet(), scheduler=ddim(),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return pipe, {"prompt": "a digit", "output_type": "np"}


def latent_text_pipeline(folder):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "digit"]))
    text = LDMBertModel(LDMBertConfig(vocab_size=7, d_model=16, encoder_layers=1, encoder_ffn_dim=16,
                                      encoder_attention_heads=2, head_dim=8, max_position_embeddings=77))
    codes = VQModel(block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                    up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, num_vq_embeddings=8)
    pipe = LDMTextToImagePipeline(vqvae=codes, bert=text, tokenizer=BertTokenizer(str(folder / "vocab.txt")),
                                  unet=text_unet(), scheduler=ddim())
    return pipe, {"prompt": "a digit", "output_type": "np", "guidance_scale": 3.0}


@pytest.fixture(scope="module", params=[ddpm_pipeline, ddim_pipeline, dit_pipeline, stable_diffusion_pipeline,
                                        latent_text_pipeline], ids=lambda make: make.__name__)
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    pipe, options = request.param(folder)
    model = getattr(pipe, "unet", None) or pipe.transformer
    for weight in model.parameters():  # zero-initialised layers would hide every difference
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    pipe.save_pretrained(folder / "saved")
    pipe = type(pipe).from_pretrained(folder / "saved")
    pipe.set_progress_bar_config(disable=True)

    def call(**more):
        return pipe(**options, **{"num_inference_steps": STEPS, "generator": torch.manual_seed(1)} | more).images

    return pipe, getattr(pipe, "unet", None) or pipe.transformer, call


@pytest.fixture
def full(pipeline):
    pipe, model, _ = pipeline
    described, fits = blocks.describe(model), NoiseSchedule.of(pipe.scheduler)
    return Plan.full(trailing(STEPS, fits.train_timesteps), fits, described.names, cache=described.cache)


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
    pipe = DDIMPipeline(plain_unet(), ddim())
    described, fits = blocks.describe(pipe.unet), NoiseSchedule.of(pipe.scheduler)
    full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, described.names)
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
        pipe.unet(noises[0], STEPS)
        with pytest.raises(PlanError, match="called twice for the pass 'given': which pass is the second call?"):
            pipe.unet(noises[1], STEPS)



@pytest.mark.parametrize(("interval", "every", "reuse", "null_holds"), [
    ((2, 7), 1, 0, "output"), (None, 2, 0, "difference"), (None, 3, 2, "output"), ((1, 8), 2, 2, "difference")])
def test_a_stock_pipelines_guidance_is_the_plans(tmp_path, interval, every, reuse, null_holds):
    torch.manual_seed(0)
    pipe, options = stable_diffusion_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    described, fits = blocks.describe(pipe.unet), NoiseSchedule.of(pipe.scheduler)
    full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, described.names, order=2)
    plan = Plan.deepcache(2, described.branch(0), full, 2).guided(interval, every=every, reuse=reuse,
                                                                  null_holds=null_holds)
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(3))
    options |= {"prompt": ["a digit", "digit"], "num_inference_steps": STEPS, "latents": latents,
                "output_type": "latent"}
    with torch.inference_mode():
        texts = [{"encoder_hidden_states": rows} for rows in pipe.encode_prompt(options["prompt"], "cpu", 1, True)]
    with Planned(pipe, plan):
        images = pipe(**options, guidance_scale=4.0).images
        again = pipe(**options, guidance_scale=4.0).images
        with pytest.raises(PlanError, match="call the pipeline with guidance, or take a plan of one pass"):
            pipe(**options, guidance_scale=1.0)
    assert torch.equal(images, again)
    wanted = reference.sample(pipe.unet, plan, latents, sampling.Conditions(*texts, scale=4.0))
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_pipelines_that_begin_in_the_middle_or_hide_their_passes_are_refused(tmp_path):
    torch.manual_seed(0)
    pipe, _ = dit_pipeline(None)
    described, fits = blocks.describe(pipe.transformer), NoiseSchedule.of(pipe.scheduler)
    full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, described.names, cache="residual")
    with pytest.raises(PlanError, match="DiTPipeline walks both passes' rows as images"):
        Planned(pipe, full.guided())
    with Planned(pipe, full) as planned:
        planned.scheduler.set_timesteps(STEPS)
        with pytest.raises(PlanError, match="begins at step 4, and plans are walked from their first step"):
            planned.scheduler.set_begin_index(4)
        with pytest.raises(PlanError, match="the pipeline begins at timestep 499, the plan at 999"):
            planned.scheduler.step(torch.zeros(1, 4, 8, 8), torch.tensor(499), torch.zeros(1, 4, 8, 8))
        x_0, noise = torch.randn(2, 3, 4, 8, 8).unbind()
        steps = torch.tensor([999, 500, 3])
        torch.testing.assert_close(planned.scheduler.add_noise(x_0, noise, steps), ddim().add_noise(x_0, noise, steps))


def test_stable_diffusions_own_scheduler_takes_a_plan(tmp_path):
    torch.manual_seed(0)
    pipe, options = stable_diffusion_pipeline(tmp_path)
    pipe.scheduler = PNDMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                   beta_schedule="scaled_linear", skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    fits = NoiseSchedule.of(pipe.scheduler)
    plan = Plan.full(trailing(STEPS, fits.train_timesteps), fits, blocks.describe(pipe.unet).names, order=2)
    with Planned(pipe, plan):
        images = pipe(**options, num_inference_steps=STEPS, generator=torch.manual_seed(1)).images
    assert np.isfinite(images).all() and images.shape[0] == 1
