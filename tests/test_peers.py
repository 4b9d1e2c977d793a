"""Peers: DeepCache gives our plan's images; torch-pruning makes a network of the cost that was asked."""

import pytest
import torch

from lib import blocks, cost, peers, sampling
from lib.plan import Plan


def test_a_pruned_network_costs_less_and_is_sampled_like_the_teacher(unet, schedule, teacher, noise):
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pruned = peers.diff_pruning(unet, images, schedule, 0.6, seed=0, batch_size=4, threshold=0.99)
    assert cost.count(pruned).call <= 0.6 * cost.count(unet).call < cost.count(unet).call
    assert blocks.describe(pruned).names == blocks.describe(unet).names
    rows = pruned.conv_in.weight.flatten(1)
    assert all((unet.conv_in.weight.flatten(1) == row).all(dim=1).any() for row in rows), "channels of the teacher"
    assert sampling.sample(pruned.eval(), schedule, teacher, noise).shape == noise.shape
    with pytest.raises(ValueError, match="no network of 0%"):
        peers.diff_pruning(unet, images, schedule, 0.001, seed=0, batch_size=4, threshold=0.99)


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_deepcache_gives_the_images_of_our_plan(unet, schedule, teacher, noise, described, interval, branch):
    theirs = peers.deepcache(unet, schedule, teacher, interval, branch, noise)
    ours = sampling.sample(unet, schedule, Plan.deepcache(interval, described.branch(branch), teacher), noise)
    assert torch.equal(theirs, ours)
    plain = sampling.sample(unet, schedule, teacher, noise)
    assert torch.equal(sampling.sample(unet, schedule, teacher, noise), plain), "the model is as it was"
    assert (interval == 1) == torch.equal(ours, plain)
