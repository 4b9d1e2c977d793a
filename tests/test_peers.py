"""Peers: torch-pruning makes a network that costs what was asked, out of the teacher's own channels."""

import pytest
import torch

from lib import blocks, cost, peers, sampling


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
