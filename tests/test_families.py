"""The identities on the other families: text-conditioned UNets and transformers, guided in one pass and in two."""

import copy

import numpy as np
import pytest
import reference
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from lib.grid import blocks, cost, sampling
from lib.grid.model import Conditions, Model
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.judging import analysis
from lib.methods import diffnas, dipgo
from lib.teachers import data, networks

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


class Words(torch.nn.Module):
    """A text encoder that knows three words."""

    def __init__(self):
        super().__init__()
        self.register_buffer("known", torch.cat([torch.zeros(1, 5, 12), texts(0)["encoder_hidden_states"]]))

    def tokens(self, prompts):
        return torch.tensor([["", "one", "two", "three"].index(word) for word in prompts])

    def read(self, tokens):
        return self.known[tokens]

    def forward(self, prompts):
        return {"encoder_hidden_states": self.read(self.tokens(prompts))}


CONDITIONS = {text_unet: (texts(0), texts(1)),
              dit: ({"class_labels": torch.tensor([1, 2, 3])}, {"class_labels": torch.full((COUNT,), 10)})}


@pytest.fixture(params=[text_unet, dit], ids=["text UNet", "DiT"], scope="module")
def family(request):
    torch.manual_seed(0)
    network = request.param().eval().requires_grad_(False)
    for weight in network.parameters():  # zero-initialised layers would hide every difference
        if not weight.any():
            weight.normal_(std=0.05)
    given, null = CONDITIONS[request.param]
    said = {"text": Words(), "prompts": ("one", "two", "three")} if request.param is text_unet else {}
    model = Model(network, networks.noise_schedule(), **said, guidance=2.0)
    return model, blocks.describe(network), Conditions(given, null, scale=2.0)


@pytest.fixture
def full(family, schedule):
    _, described, _ = family
    fits = NoiseSchedule.of(schedule)
    return Plan.full(trailing(8, fits.train_timesteps), fits, described)


@pytest.mark.parametrize("apart", [False, True])
def test_recorded_steps_give_what_unrecorded_ones_give(family, full, schedule, noise, apart, request):
    model, _, conditions = family
    guided = Conditions(conditions.given, conditions.null, conditions.scale, apart)
    plans = [Plan.random(share, 0, full) for share in (0.3, 0.7)]
    wanted = [sampling.sample(model, plan, noise, guided) for plan in plans]
    tapes = request.getfixturevalue("tapes")
    for _ in range(3):
        for plan, images in zip(plans, wanted, strict=True):
            assert torch.equal(sampling.sample(model, plan, noise, guided), images)
    assert tapes


@pytest.mark.parametrize("seed", range(4))
def test_any_plan_gives_what_replacing_gives_guided_in_one_pass_or_two(family, full, schedule, noise, seed):
    model, _described, conditions = family
    plan = Plan.random(0.2 + 0.2 * seed, seed, full)
    wanted = reference.sample(model.network, plan, noise, conditions)
    for apart in (False, True):
        guided = Conditions(conditions.given, conditions.null, conditions.scale, apart)
        images = sampling.sample(model, plan, noise, guided)
        torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        torch.testing.assert_close(sampling.sample(model, plan, noise, guided, batch_size=2), images,
                                   rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_scale_of_one_is_no_guidance(family, full, schedule, noise):
    model, _, conditions = family
    plain = sampling.sample(model, full, noise, Conditions(conditions.given))
    one = sampling.sample(model, full, noise, Conditions(conditions.given, conditions.null, 1.0))
    torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    two = sampling.sample(model, full, noise, conditions)
    assert (two - plain).abs().max() > 0.01 * plain.abs().max()


def test_gates_of_0_and_1_are_the_plan(family, full, schedule, noise):
    model, _, conditions = family
    plan = Plan.random(0.5, 1, full)
    with torch.no_grad():
        gates = torch.from_numpy(plan.computes).float()
        soft = dipgo.SuperNet(model, full).images(noise, gates, "none", conditions)
        each = torch.stack([gates, *[torch.ones_like(gates)] * (len(noise) - 1)], dim=-1)  # an image's own
        mixed = dipgo.SuperNet(model, full).images(noise, each, "none", conditions)
    hard, teachers = (sampling.sample(model, one, noise, conditions) for one in (plan, full))
    close = {"rtol": 1e-3, "atol": 1e-3 * float(hard.abs().max())}
    torch.testing.assert_close(soft, hard, **close)
    torch.testing.assert_close(mixed, torch.cat([hard[:1], teachers[1:]]), **close)
    assert len(noise) > 1
    with pytest.raises(ValueError, match="checkpoints True: must be one of none, steps, nested"):
        dipgo.SuperNet(model, full).images(noise, gates, True, conditions)


def test_a_gradient_reaches_every_gate(family, full, schedule, noise):
    model, described, conditions = family
    gates = torch.full((full.steps, len(described)), 0.7, requires_grad=True)
    dipgo.SuperNet(model, full).images(noise, gates, "nested", conditions).square().mean().backward()
    assert (gates.grad[1:] != 0).all()


def test_costs_are_of_live_cells_and_of_calls(family, full):
    model, described, _ = family
    costs = cost.count_model(model)
    assert costs.passes == 2 and costs.executed(full) == 16 * costs.call, "both passes"
    alternate = full.with_cells(np.repeat(np.arange(8)[:, None] % 2 == 0, len(described), axis=1))
    resting = 8 * costs.rest if described.cache == "residual" else 0  # a transformer's stem and head run all the same
    assert costs.executed(alternate) == 8 * costs.call + resting
    alone = cost.count_model(model.replace(guidance=1.0))
    assert alone.passes == 1 and alone.call == costs.call and alone.executed(full) == 8 * costs.call


def test_the_teacher_analysis_runs_on_it(family, full, schedule, noise):
    model, described, conditions = family
    alike = analysis.similarity(model, full, noise)
    assert alike.shape == (8, len(described)) and np.isfinite(alike[1:]).all()
    damage = analysis.sensitivity(model, full, noise, [2, 5])
    assert damage.shape == (2, len(described)) and (damage > 0).all()
    plan = Plan.deepcache(2, described.branch(0), full)
    latency = cost.measure(model, [full, plan], noise, precision="fp32", repeats=1)
    assert latency.of(plan) > 0
    seconds = cost.block_seconds(model.network, noise, 1, conditions.given)
    assert set(seconds) == {*described.names, "stem and head"}


def test_elastic_blocks_fit_text_conditioned_unets(schedule, noise, tmp_path):
    torch.manual_seed(0)
    model = text_unet().eval().requires_grad_(False)
    space, given, t = diffnas.FormSpace((1, 3), (1.0, 1.5)), texts(0), torch.tensor([10, 500, 900])
    supernet = diffnas.supernet(model, space)
    torch.testing.assert_close(supernet(noise, t, **given).sample, model(noise, t, **given).sample)
    seen, _ = diffnas.observe(model, noise, t, **given)
    table = diffnas.level_table(supernet, space, [seen], "up1", tmp_path)
    assert len(table) == 8**2 and diffnas.pick(table, diffnas.forms(model))["loss"] < 1e-10
    small = diffnas.student(supernet, diffnas.forms(model) | table.sort_values("macs")["forms"].iloc[0])
    assert cost.count(small).call < cost.count(model).call
    assert diffnas.joint_loss(small, model, noise, t, noise, 0.5, **given) > 0
    networks.save(tmp_path / "student", Model(small, schedule))
    again = networks.load(tmp_path / "student").network
    assert isinstance(again, diffnas.ConditionStudent)
    assert torch.equal(again(noise, t, **given).sample, small(noise, t, **given).sample)


def test_branches_of_a_transformer_are_its_leading_blocks():
    described = blocks.describe(dit())
    assert described.names == ("block0", "block1", "block2", "block3") and described.branches == 3
    assert list(described.branch(1)) == [True, True, False, False]
    with pytest.raises(ValueError, match=r"branch 3: this network has branches 0\.\.2"):
        described.branch(3)


def test_the_papers_models_cost_what_papers_print():
    models, rows = analysis.published_costs()
    for row in models.itertuples():
        assert {"with": row.gmacs_with, "without": row.gmacs_without}[row.of] == pytest.approx(row.published, rel=0.01)
    millions = models.set_index("model")["parameters_millions"]
    assert millions["CIFAR-10 DDPM"] == pytest.approx(35.7, abs=0.1)
    assert millions["Stable Diffusion 1.5"] == pytest.approx(859.5, abs=0.1)
    assert rows.groupby("model")["gmacs"].sum()["DiT-XL/2"] < models.set_index("model")["gmacs_with"]["DiT-XL/2"]
    assert (models["partial_0"] < models["partial_3"]).all()


def test_a_class_conditional_network_draws_its_labels_from_the_noise(schedule):
    torch.manual_seed(0)
    model = Model(networks.transformer((1, 16, 16), 16, 3, 2, 4, 10).eval().requires_grad_(False), schedule)
    noise = sampling.noise("report", 0, 0, 2000, (1, 16, 16))
    labels = model.labels(noise)
    shares = torch.bincount(labels, minlength=10) / len(labels)
    assert len(shares) == 10 and (shares - 0.1).abs().max() < 0.03
    assert torch.equal(model.asked(noise[7:9]).given["class_labels"], labels[7:9])
    described = blocks.describe(model.network)
    full = Plan.full(trailing(5, 1000), model.noise_schedule, described)
    plan, few = Plan.deepcache(2, described.branch(1), full), noise[:4]
    said = Conditions({"class_labels": labels[:4]})
    assert torch.equal(sampling.sample(model, plan, few), sampling.sample(model, plan, few, said))
    guided = model.replace(guidance=2.0)
    said = Conditions(said.given, {"class_labels": torch.full((4,), 10)}, 2.0)
    assert torch.equal(sampling.sample(guided, plan, few), sampling.sample(model, plan, few, said))
    assert not model.replace(network=text_unet()).asked(few).given


def test_a_models_digest_is_of_all_that_decides_an_image(family):
    model, _, _ = family
    other = copy.deepcopy(model.network)
    next(other.parameters()).add_(1)
    digests = {model.digest, model.replace(network=other).digest, model.replace(guidance=3.0).digest,
               model.replace(prompts=("one",)).digest, model.replace(latents=torch.nn.Linear(1, 1)).digest}
    assert len(digests) == 5 and model.replace(network=copy.deepcopy(model.network)).digest == model.digest


def test_a_transformer_learns_with_one_label_in_ten_unsaid(schedule):
    torch.manual_seed(0)
    model = networks.transformer((1, 16, 16), 16, 2, 2, 4, 10)
    labels, seen = torch.arange(50) % 10, []
    samples = networks.Samples(torch.randn(50, 1, 16, 16), Conditions({"class_labels": labels},
                                                                      {"class_labels": torch.full((50,), 10)}))
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["class_labels"]), with_kwargs=True)
    loss = networks.denoising_loss(samples, schedule, 400)
    loss(model, torch.Generator().manual_seed(0), 0.0).backward()
    unsaid = seen[0] == 10
    assert 0.05 < unsaid.float().mean() < 0.15
    again = loss(model, torch.Generator().manual_seed(0), 0.0)
    assert torch.equal(seen[0], seen[1]) and torch.equal(again, loss(model, torch.Generator().manual_seed(0), 0.0))


def test_samples_are_encoded_and_said(family, schedule):
    model, _, _ = family
    shape = model.shape
    prompts = tuple(("one", "two", "three")[i % 3] for i in range(12))
    data_set = data.DataSet("x", torch.randn(12, *shape), torch.arange(12) % 10, torch.arange(9), torch.arange(9, 12),
                            prompts)
    samples = networks.Samples.of(model, data_set, data_set.held_out)
    assert torch.equal(samples.x_0, data_set.images[9:])
    x_t, t, noise, given = samples.noisy(schedule, 600, torch.Generator().manual_seed(0), model.device)
    assert x_t.shape == noise.shape == (600, *shape) and t.shape == (600,)
    (name, said), = given.items()
    null = (said == samples.conditions.null[name][0]).flatten(1).all(dim=1) if said.ndim > 1 else said == 10
    assert 0.07 < null.float().mean() < 0.13, "one in ten goes unsaid"
    rows = torch.randint(3, (600,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(said[~null], samples.conditions.given[name][rows][~null]), "the others go with their image"
    assert networks.denoising_loss(samples, schedule, 6)(model.network, torch.Generator().manual_seed(0), 0.0) > 0


def test_two_passes_are_told_apart(family, full, noise):
    model, *_ = family
    rows = analysis.two_passes(model, full, noise)
    assert len(rows) == full.steps and rows.iloc[0].isna().sum() == 3 and rows.iloc[1:].notna().all(axis=None)
    assert (rows["difference"] > 0).all() and rows["alike"].between(-1, 1).all()
    x_t, asked = noise, model.asked(noise)
    t = torch.tensor(full.timesteps[0]).expand(len(noise))
    given, null = (model.network(x_t, timestep=t, **said).sample[:, :x_t.shape[1]].flatten(1)
                   for said in (asked.given, asked.null))
    assert rows["alike"][0] == pytest.approx(float(torch.cosine_similarity(given, null).mean()), abs=1e-4)
