"""Peers: others' caches give the images of our plans; torch-pruning makes a network of the cost that was asked."""

from functools import partial

import pytest
import torch

from lib.grid import blocks, cost, sampling
from lib.grid.model import Model
from lib.grid.plan import LINE, Plan, trailing
from lib.methods import peers
from lib.teachers import networks


def test_a_pruned_network_costs_less_and_is_sampled_like_the_teacher(unet, schedule, teacher, noise):
    samples = networks.Samples(torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    pruned = peers.diff_pruning(Model(unet, schedule), samples, 0.6, seed=0, batch_size=4, threshold=0.99)
    assert cost.count(pruned).call <= 0.6 * cost.count(unet).call < cost.count(unet).call
    assert blocks.describe(pruned).names == blocks.describe(unet).names
    rows = pruned.conv_in.weight.flatten(1)
    assert all((unet.conv_in.weight.flatten(1) == row).all(dim=1).any() for row in rows), "channels of the teacher"
    assert sampling.sample(Model(pruned.eval(), schedule), teacher, noise).shape == noise.shape
    with pytest.raises(ValueError, match="no network of 0%"):
        peers.diff_pruning(Model(unet, schedule), samples, 0.001, seed=0, batch_size=4, threshold=0.99)


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_deepcache_gives_the_images_of_our_plan(unet, schedule, teacher, noise, described, interval, branch):
    theirs = peers.deepcache(unet, teacher, interval, branch, noise)
    ours = sampling.sample(Model(unet, schedule), Plan.deepcache(interval, described.branch(branch), teacher), noise)
    assert torch.equal(theirs, ours)
    plain = sampling.sample(Model(unet, schedule), teacher, noise)
    assert torch.equal(sampling.sample(Model(unet, schedule), teacher, noise), plain), "the model is as it was"
    assert (interval == 1) == torch.equal(ours, plain)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    model = networks.transformer((1, 16, 16), 16, 4, 2, 4, 10).eval().requires_grad_(False)
    for weight in model.parameters():  # blocks that begin as the identity have nothing to reuse
        if not weight.any():
            weight.normal_(std=0.05)
    return Model(model, networks.noise_schedule())


def twenty(dit):
    return Plan.full(trailing(20, 1000), dit.noise_schedule, blocks.describe(dit.network))


@pytest.mark.parametrize("cached", [peers.first_block_caching, peers.dbcache, partial(peers.dbcache, forecast=True)])
def test_what_a_transformers_cache_ran_is_a_plan_of_the_same_images(dit, cached):
    full, noise = twenty(dit), torch.randn(3, 1, 16, 16)
    whole, images = cached(dit, full, 0.0, noise)
    assert whole.computes.all()
    torch.testing.assert_close(images, sampling.sample(dit, full, noise))
    plan, images = cached(dit, full, 0.3, noise)
    assert plan.computes[:, 0].all() and plan.computes[0].all() and not plan.computes.all()
    assert (plan.computes[:, 1:] == plan.computes[:, 1:2]).all(), "the blocks behind the first run all, or none"
    torch.testing.assert_close(images, sampling.sample(dit, plan, noise), rtol=1e-4, atol=1e-4)
    again = sampling.sample(dit, full, noise)
    torch.testing.assert_close(again, cached(dit, full, 0.0, noise)[1])  # the model is as it was


@pytest.mark.parametrize("interval", [2, 5])
def test_taylorseer_is_a_plan_that_forecasts_the_whole_output(dit, interval):
    full, noise = twenty(dit), torch.randn(3, 1, 16, 16)
    plan, images = peers.taylorseer(dit, full, interval, noise)
    computing = [step for step in range(20) if step < 3 or (step - 4) % interval == 0]
    assert plan.computes.all(axis=1).nonzero()[0].tolist() == computing
    assert [step for step in range(20) if plan.net[0][step] != LINE] == computing and plan.abscissa == "step"
    assert cost.count(dit.network).executed(plan) == len(computing) * cost.count(dit.network).call
    torch.testing.assert_close(images, sampling.sample(dit, plan, noise), rtol=1e-4, atol=1e-4)
