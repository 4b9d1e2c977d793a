"""Latent models that read prompts: saved as stock pipelines, sampled like them, trained with their text encoder."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from lib.apply import Planned
from lib.grid import blocks, cost, sampling
from lib.grid.engine import Engine
from lib.grid.model import Model
from lib.grid.plan import Plan, trailing
from lib.judging import analysis
from lib.teachers import latents, letters, networks, text

PROMPTS = ("a red serif A on blue", "a blue bold sans 7 on white", "a cyan italic Q on black")


@pytest.fixture(scope="module")
def painter():
    """A model that knows the words of letters, with fresh weights."""
    torch.manual_seed(0)
    prompts = map(letters.prompt, letters.every().tolist())
    words = text.tokenizer([word for prompt in prompts for word in prompt.split()], longest=7)
    reader = text.Text(text.encoder(words, 32, 1).eval().requires_grad_(False), words)
    coder = latents.Coder(latents.PatchAutoencoder(3, 4, (8, 8, 8), (0, 1, 1), (0, 1, 1)).eval().requires_grad_(False))
    network = UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, layers_per_block=1,
                                   block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=32,
                                   attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                   up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval().requires_grad_(False)
    return Model(network, networks.noise_schedule("scaled_linear"), coder, reader, PROMPTS, 3.0)


@pytest.fixture
def plan(painter):
    names = blocks.describe(painter.network).names
    full = Plan.full(trailing(6, 1000), painter.noise_schedule, names, 2)
    return Plan.deepcache(2, blocks.describe(painter.network).branch(0), full)


@pytest.fixture
def folder(painter, tmp_path):
    networks.save(tmp_path, painter)
    return tmp_path


def test_it_comes_back_from_its_folder(painter, plan, folder):
    again = networks.load(folder, prompts=PROMPTS, guidance=3.0)
    noise = sampling.noise("report", 0, 0, 5, painter.shape)
    images = sampling.sample(painter, plan, noise)
    assert images.shape == (5, 3, 16, 16) and again.digest == painter.digest
    assert torch.equal(sampling.sample(again, plan, noise), images)
    with pytest.raises(ValueError, match="cannot be guided .guidance 2.: its network reads neither"):
        networks.load(folder, guidance=2.0)  # without the data's prompts
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pkl"))


def test_a_stock_pipeline_draws_the_same_images_with_and_without_a_plan(painter, plan, folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    noise = sampling.noise("report", 0, 0, 4, painter.shape)
    full = plan.with_cells(np.ones_like(plan.computes))
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "latents": noise, "output_type": "np"}
    for one in (full, plan):
        with Planned(pipe, one):
            theirs = torch.from_numpy(pipe(painter.said(noise), **options).images).permute(0, 3, 1, 2)
        ours = (sampling.sample(painter, one, noise) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with pytest.raises(Exception, match="UNK"):  # stock: tokenizers' own words
        pipe("a pink serif A on blue", **options)


def test_sdxl_is_read_by_both_of_its_text_encoders(tmp_path):
    torch.manual_seed(0)
    stock, _ = tiny.double_text()
    stock.save_pretrained(tmp_path / "stock")
    prompts = ("a digit", "digit")
    networks.save(tmp_path / "ours", networks.load(tmp_path / "stock", prompts=prompts, guidance=3.0))
    model = networks.load(tmp_path / "ours", prompts=prompts, guidance=3.0)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "ours", use_safetensors=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    states, none, sums, no_sums = pipe.encode_prompt(list(prompts), num_images_per_prompt=1)
    for wanted, pooled, said in ((states, sums, prompts), (none, no_sums, ("", ""))):
        found = model.text(said)
        torch.testing.assert_close(found["encoder_hidden_states"], wanted)
        torch.testing.assert_close(found["added_cond_kwargs"]["text_embeds"], pooled)
    assert none.abs().max() == 0 < states.abs().max()
    assert cost.count_model(model).text > 0
    noise = sampling.noise("report", 0, 0, 3, model.shape)
    full = Plan.full(trailing(6, 1000), model.noise_schedule, blocks.describe(model.network), 2)
    for plan in (full, Plan.deepcache(2, blocks.describe(model.network).branch(0), full)):
        with Planned(pipe, plan):
            theirs = pipe(model.said(noise), num_inference_steps=6, guidance_scale=3.0, latents=noise, height=16,
                          width=16, output_type="np").images
        ours = (sampling.sample(model, plan, noise) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2), rtol=1e-3, atol=1e-3)


def test_weights_may_be_rounded_in_the_files_and_come_back_whole(painter, tmp_path):
    networks.save(tmp_path, painter, torch.bfloat16)
    again = networks.load(tmp_path, prompts=PROMPTS, guidance=3.0)
    mine, theirs = ([weight for part in (one.network, one.latents) for weight in part.parameters()]
                    for one in (painter, again))
    for weight, rounded in zip(mine, theirs, strict=True):
        assert torch.equal(weight.bfloat16().float(), rounded) and weight.dtype == torch.float32
    files = sum(file.stat().st_size for part in ("unet", "vae") for file in (tmp_path / part).glob("*.safetensors"))
    assert files < 3 * sum(weight.numel() for weight in mine) + 50_000
    kinds = {name: next(part.parameters()).dtype for name, part in
             StableDiffusionPipeline.from_pretrained(tmp_path).components.items() if isinstance(part, torch.nn.Module)}
    networks.save(tmp_path / "again", again)
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "again").rglob("*.json"))
    assert kinds == dict.fromkeys(("unet", "vae", "text_encoder"), torch.float32), "as a stock pipeline loads them"


def test_of_a_guided_model_each_pass_reuses_by_its_own_errors(painter, plan):
    noise = sampling.noise("report", 0, 0, 4, painter.shape)
    errors = analysis.forecast_errors(painter, plan, noise)
    assert set(errors["pass"]) == {"null", "given"}
    alone = analysis.forecast_errors(painter.replace(guidance=1.0), plan, noise)
    assert set(alone["pass"]) == {"given"} and len(errors) == 2 * len(alone)
    steps = plan.timesteps  # by hand: what the block gives for the prompt, at the noise and after one guided step
    with Engine(painter.network, plan.at(steps), painter.noise_schedule) as engine:
        x_1 = next(iter(sampling.walk(engine, noise, painter.asked(noise))))
    gave = []
    handle = painter.network.mid_block.register_forward_hook(lambda *call: gave.append(call[-1].flatten(1)))
    with torch.inference_mode():
        for x_t, t in ((noise, steps[0]), (x_1, steps[1])):
            painter.network(x_t, t, **painter.asked(noise).given)
    handle.remove()
    far = ((gave[0] - gave[1]).norm(dim=1) / gave[1].norm(dim=1)).mean()
    mid = errors[(errors["step"] == 1) & (errors["block"] == "mid")].set_index("pass")["hold"]
    assert mid["given"] == pytest.approx(float(far), rel=1e-4) != mid["null"]
    made = analysis.reuse_by_error(plan, errors)
    assert made.passes == ("null", "given") and sampling.sample(painter, made, noise).isfinite().all()


def test_prompts_are_drawn_by_their_images_noise(painter):
    noise = sampling.noise("report", 0, 0, 300, painter.shape)
    said = painter.said(noise)
    assert painter.said(noise[7:9]) == said[7:9] and {said.count(one) > 70 for one in PROMPTS} == {True}
    asked = painter.asked(noise[:6])
    states = asked.given["encoder_hidden_states"]
    assert torch.equal(states, painter.text(said[:6])["encoder_hidden_states"])
    assert torch.equal(asked.null["encoder_hidden_states"][0], painter.text([""])["encoder_hidden_states"][0])
    assert asked.scale == 3.0 and painter.replace(guidance=1.0).asked(noise[:6]).null is None


def test_a_word_that_nobody_taught_is_refused_by_name(painter):
    with pytest.raises(ValueError, match="nobody taught this model the word 'pink'. It knows: .*purple"):
        painter.text(["a pink serif A on blue"])
    with pytest.raises(ValueError, match="has 8 tokens; this model reads 7"):
        painter.text(["a red bold bold serif A on blue"])


def test_large_images_are_walked_and_decoded_few_at_a_time(painter, plan, monkeypatch):
    noise = sampling.noise("report", 0, 0, 5, painter.shape)
    positions, calls = noise[0, 0].numel(), []
    whole = sampling.sample(painter, plan, noise)

    def noted(x_0):
        calls.append(len(x_0))
        return decode(x_0)

    decode = painter.latents.decode
    monkeypatch.setattr(painter.latents, "decode", noted)
    monkeypatch.setattr(sampling, "WALKED", 3 * positions)
    monkeypatch.setattr(sampling, "DECODED", 2 * positions - 1)
    torch.testing.assert_close(sampling.sample(painter, plan, noise), whole, rtol=1e-4, atol=1e-4)
    assert calls == [1] * 5
    monkeypatch.setattr(sampling, "DECODED", 2 * positions)
    sampling.sample(painter, plan, noise)
    assert calls[5:] == [2, 1, 2], "of three and of two that were walked"


def test_costs_count_the_models_own_words_both_passes_text_and_decoder(painter, plan):
    costs = cost.count_model(painter)
    stock = cost.count(painter.network)  # with 77 tokens
    assert costs.passes == 2 and costs.call < stock.call and costs.text > 0 and costs.decoder > 0
    assert costs.executed(plan) == 2 * cost.count_model(painter.replace(guidance=1.0)).executed(plan)


def test_an_autoencoder_learns_and_gives_latents_of_deviation_1(tmp_path):
    images = letters.draw(letters.some(64), 16)
    torch.manual_seed(0)
    coder = latents.PatchAutoencoder(3, 4, (8, 16, 16), (0, 1, 1), (0, 1, 1))
    history = latents.fit(coder, images, steps=30, batch_size=16, learning_rate=3e-3, seed=0, device="cpu",
                          precision="fp32", work=tmp_path / "work")
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    coded = coder.encode(images).latent
    assert coded.shape == (64, 4, 4, 4)
    torch.testing.assert_close(coded.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(coded.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    coder.save_pretrained(tmp_path / "saved")
    again = latents.PatchAutoencoder.from_pretrained(tmp_path / "saved", use_safetensors=True).eval()
    assert torch.equal(again.decode(coded).sample, coder.decode(coded).sample)
