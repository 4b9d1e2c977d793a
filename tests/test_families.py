"""The identities on the other families: text-conditioned UNets and transformers, guided in one pass and in two."""

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from lib import blocks, cost, dipgo, sampling
from lib.plan import NoiseSchedule, Plan, trailing
from lib.sampling import Conditions

COUNT = 3


def text_unet():
    return UNet2DConditionModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def dit():
    return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2,
                                 num_layers=4, sample_size=16, patch_size=4, num_embeds_ada_norm=10)


def texts(seed):
    return {"encoder_hidden_states": torch.randn(COUNT, 5, 12, generator=torch.Generator().manual_seed(seed))}


CONDITIONS = {text_unet: (texts(0), texts(1)),
              dit: ({"class_labels": torch.tensor([1, 2, 3])}, {"class_labels": torch.full((COUNT,), 10)})}


@pytest.fixture(params=[text_unet, dit], ids=["text UNet", "DiT"], scope="module")
def family(request):
    torch.manual_seed(0)
    model = request.param().eval().requires_grad_(False)
    for weight in model.parameters():  # zero-initialised layers would hide every difference
        if not weight.any():
            weight.normal_(std=0.05)
    given, null = CONDITIONS[request.param]
    return model, blocks.describe(model), Conditions(given, null, scale=2.0)


@pytest.fixture
def full(family, schedule):
    _, described, _ = family
    fits = NoiseSchedule.of(schedule)
    return Plan.full(trailing(8, fits.train_timesteps), fits, described.names, cache=described.cache)


def by_replacing(model, described, schedule, plan, noise, conditions):
    """Sample without the engine: every block runs, and what a reused one gives is put in its place."""
    last, step = {}, 0

    def replace(place):
        def hook(module, inputs, output):
            now = output[0] if isinstance(output, tuple) else output
            base = inputs[0] if described.cache == "residual" else torch.zeros(())
            if plan.compute[step][place]:
                last[place] = now - base
            else:
                now = last[place] + base
            return (now,) if isinstance(output, tuple) else now
        return hook

    handles = [model.get_submodule(block.modules[-1]).register_forward_hook(replace(place))
               for place, block in enumerate(described)]
    scheduler, x_t = sampling.solver(plan, schedule), noise
    both = {name: torch.cat([conditions.null[name], rows]) for name, rows in conditions.given.items()}
    with torch.inference_mode():
        for step, t in enumerate(scheduler.timesteps):  # noqa: B007 (the hooks read it)
            predicted = model(torch.cat([x_t, x_t]), t.expand(2 * len(x_t)), **both).sample[:, :1]
            null, given = predicted.chunk(2)
            x_t = scheduler.step(null + conditions.scale * (given - null), t, x_t).prev_sample
    for handle in handles:
        handle.remove()
    return x_t


@pytest.mark.parametrize("seed", range(4))
def test_any_plan_gives_what_replacing_gives_guided_in_one_pass_or_two(family, full, schedule, noise, seed):
    model, described, conditions = family
    plan = Plan.random(0.2 + 0.2 * seed, seed, full)
    wanted = by_replacing(model, described, schedule, plan, noise, conditions)
    for passes in (1, 2):
        guided = Conditions(conditions.given, conditions.null, conditions.scale, passes)
        images = sampling.sample(model, schedule, plan, noise, guided)
        torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        torch.testing.assert_close(sampling.sample(model, schedule, plan, noise, guided, batch_size=2), images,
                                   rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_scale_of_one_is_no_guidance(family, full, schedule, noise):
    model, _, conditions = family
    plain = sampling.sample(model, schedule, full, noise, Conditions(conditions.given))
    one = sampling.sample(model, schedule, full, noise, Conditions(conditions.given, conditions.null, 1.0))
    torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    two = sampling.sample(model, schedule, full, noise, conditions)
    assert (two - plain).abs().max() > 0.01 * plain.abs().max()


def test_gates_of_0_and_1_are_the_plan(family, full, schedule, noise):
    model, _, conditions = family
    plan = Plan.random(0.5, 1, full)
    with torch.no_grad():
        gates = torch.from_numpy(plan.cells).float()
        soft = dipgo.SuperNet(model, full, schedule).images(noise, gates, False, conditions)
    hard = sampling.sample(model, schedule, plan, noise, conditions)
    torch.testing.assert_close(soft, hard, rtol=1e-3, atol=1e-3 * float(hard.abs().max()))


def test_a_gradient_reaches_every_gate(family, full, schedule, noise):
    model, described, conditions = family
    gates = torch.full((full.steps, len(described)), 0.7, requires_grad=True)
    dipgo.SuperNet(model, full, schedule).images(noise, gates, True, conditions).square().mean().backward()
    assert (gates.grad[1:] != 0).all()


def test_costs_are_of_live_cells_and_of_calls(family, full):
    model, described, _ = family
    costs = cost.count(model)
    assert cost.executed(model, costs, full) == 8 * costs.call
    alternate = full.with_cells(np.repeat(np.arange(8)[:, None] % 2 == 0, len(described), axis=1))
    resting = 4 * costs.rest if described.cache == "residual" else 0  # a transformer's stem and head run all the same
    assert cost.executed(model, costs, alternate) == 4 * costs.call + resting


def test_branches_of_a_transformer_are_its_leading_blocks():
    described = blocks.describe(dit())
    assert described.names == ("block0", "block1", "block2", "block3") and described.branches == 3
    assert list(described.branch(1)) == [True, True, False, False]
    with pytest.raises(ValueError, match=r"branch 3: this network has branches 0\.\.2"):
        described.branch(3)


def stable_diffusion():
    return UNet2DConditionModel(sample_size=64, in_channels=4, out_channels=4, cross_attention_dim=768,
                                attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280))


def dit_xl():
    return DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
                                 num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000)


def test_large_models_cost_what_papers_print():
    with torch.device("meta"):
        unet, transformer = stable_diffusion(), dit_xl()
    assert cost.count(unet).call_without_attention / 1e9 == pytest.approx(338.8, abs=0.2)
    assert sum(weight.numel() for weight in unet.parameters()) / 1e6 == pytest.approx(859.5, abs=0.1)
    assert cost.count(transformer).call / 1e9 == pytest.approx(118.6, abs=0.1)
