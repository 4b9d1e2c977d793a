"""Networks, pipelines and files as people have them: counted, loaded, sampled, or refused in a sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatteTransformer3DModel,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from doors import full_plan, plans
from PIL import Image

from lib import apply
from lib.apply import Planned
from lib.grid import blocks, cost, sampling
from lib.grid.model import Conditions, Model
from lib.grid.pipelines import Requests
from lib.grid.plan import NoiseSchedule, Plan, PlanError
from lib.study import paths
from lib.teachers import networks

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
    images = sampling.sample(Model(model, tiny.ddim()), full, noise, conditions)
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
            said = Conditions(given, null, 3.0, apart)
            images = sampling.sample(Model(pipe.unet, pipe.scheduler), plan, latents, said)
            torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_transformers_that_walk_frames_are_refused():
    model = LatteTransformer3DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
                                    sample_size=8, patch_size=2, caption_channels=12, cross_attention_dim=16)
    with pytest.raises(TypeError, match="LatteTransformer3DModel is not supported. Supported: UNet2DModel"):
        blocks.describe(model)


def test_a_network_without_a_size_says_so():
    with pytest.raises(ValueError, match=r"this UNet2DConditionModel names no sample_size: set it in its config\.json"):
        cost.count(tiny.text_unet(sample_size=None))


# ---- the command line ------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lib.apply", *map(str, arguments)])
    apply.main()


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
def test_the_command_line_writes_pictures(kind, size, tmp_path, monkeypatch):
    command(monkeypatch, *saved(kind, tmp_path))
    found = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [(picture.mode, picture.size) for picture in found] == [("RGB", size)] * 2


def test_the_command_line_draws_prompts_as_the_pipeline_does(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a digit\n\ndigit\n")
    command(monkeypatch, *saved(tiny.stable_diffusion, tmp_path), "--prompts", tmp_path / "prompts.txt", "--guidance",
            4, "--size", 32)
    assert "times fewer executed MACs" in capsys.readouterr().out
    found = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    pipe = networks.pipeline(tmp_path / "pipe")
    options = {"guidance_scale": 4.0, "height": 32, "width": 32}
    plan = Plan.load(tmp_path / "plan.json")
    wanted = Requests(pipe, ["a digit", "digit"], options, 2).images(plan, "report", [0, 1])
    for image, own in zip(found, wanted.permute(0, 2, 3, 1).numpy()):
        assert image.shape == (32, 32, 3) and np.abs(image - 255 * own).max() <= 1
    assert np.abs(found[0].astype(int) - found[1]).max() > 5


def test_the_command_line_takes_a_plan_of_stock_pndm(tmp_path, monkeypatch, capsys):
    """It walks the second timestep twice; the grid need not say so."""
    arguments = saved(tiny.stable_diffusion, tmp_path)
    full = Plan.load(tmp_path / "plan.json")
    doubled = full.timesteps[:2] + full.timesteps[1:]
    for grid in (full.grid, doubled):
        full.at(doubled, solver="pndm", order=4, abscissa="step").replace(grid=grid).save(tmp_path / "plan.json")
        command(monkeypatch, *arguments, "--prompt", "a digit")
        assert "1.00 times fewer executed MACs" in capsys.readouterr().out


def test_the_command_line_refuses_blocks_that_it_does_not_know(tmp_path, monkeypatch):
    arguments = saved(tiny.dit, tmp_path)
    known = tiny.plain_unet(in_channels=3, out_channels=3)
    unknown = type(known).from_config(known.config, down_block_types=["ResnetDownsampleBlock2D"] * len(
        known.config.down_block_types))
    tiny.DDIMPipeline(unknown, tiny.ddim()).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="error: no plan fits .*other"):
        command(monkeypatch, *("--model", tmp_path / "other", *arguments[2:]))


@pytest.mark.parametrize(("kind", "message"), [
    (tiny.stable_diffusion, "reads encoder_hidden_states: say what to draw, by --prompt or --prompts FILE"),
    (tiny.stable_diffusion_xl, "reads added_cond_kwargs, encoder_hidden_states: say what to draw"),
    (tiny.ddim_pixels, "draws 4 channels, which is no picture, and names no vae to decode them")])
def test_the_command_line_refuses_in_a_sentence(kind, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(monkeypatch, *saved(kind, tmp_path))
    assert not (tmp_path / "out").exists()


# ---- pipelines as they were saved ------------------------------------------------------------------------------------


SAVED = [(DPMSolverMultistepScheduler, {"solver_type": "heun"}), (EulerDiscreteScheduler, {}), (PNDMScheduler, {}),
         (UniPCMultistepScheduler, {}), (DDPMScheduler, {"clip_sample": False}), (HeunDiscreteScheduler, {}),
         (DDIMScheduler, {"clip_sample": False})]


@pytest.mark.parametrize(("kind", "options"), SAVED)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pipelines_are_loaded_as_they_were_saved(kind, options, prediction, tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    pipe.scheduler = kind(**tiny.NOISE | {"beta_end": 0.015}, prediction_type=prediction, **options)
    pipe.save_pretrained(tmp_path)
    schedule = networks.load(tmp_path).schedule
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
            Plan.full(np.array([999, 500, 3]), full.schedule, described, np.int64(2)),
            Plan.full(np.array([999.0, 500.5]), full.schedule, described, seed=np.int64(3)),
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
    text = (paths.ROOT / "lib" / "README.md").read_text()
    example = text.split("```python\n")[-1].split("```")[0]
    assert example.index("lib.apply") < example.index("diffusers")
    tiny.DDIMPipeline(tiny.plain_unet(), tiny.ddim()).save_pretrained(tmp_path / "my-ddim-pipeline")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "times fewer executed MACs" in done.stdout, done.stderr
