"""The network as blocks: names, branches, liveness."""

import numpy as np
import pytest
from diffusers import AutoencoderKL, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.grid import blocks


def test_blocks_read_what_the_unet_wires(described):
    reads = {block.name: block.reads for block in described}
    assert reads == {
        "down0.0": ("stem",), "down0.down": ("down0.0",), "down1.0": ("down0.down",), "down1.down": ("down1.0",),
        "down2.0": ("down1.down",), "mid": ("down2.0",),
        "up0.0": ("mid", "down2.0"), "up0.1": ("up0.0", "down1.down"), "up0.up": ("up0.1",),
        "up1.0": ("up0.up", "down1.0"), "up1.1": ("up1.0", "down0.down"), "up1.up": ("up1.1",),
        "up2.0": ("up1.up", "down0.0"), "up2.1": ("up2.0", "stem")}


def test_an_attention_belongs_to_the_layer_before_it():
    model = UNet2DModel(sample_size=16, block_out_channels=(32, 32),
                        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "AttnUpBlock2D"), layers_per_block=2)
    described = {block.name: block for block in blocks.describe(model)}
    assert described["down0.1"].modules == ("down_blocks.0.resnets.1", "down_blocks.0.attentions.1")
    assert described["up1.2"].modules == ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2")


def test_the_shallowest_branch_runs_the_last_block_and_the_deepest_all_but_the_middle(described):
    names = np.array(described.names)
    assert list(names[described.branch(0)]) == ["up2.1"]
    assert list(names[described.branch(1)]) == ["down0.0", "up2.0", "up2.1"]
    assert list(names[~described.branch(5)]) == ["mid"]
    with pytest.raises(ValueError, match=r"branch 6: this network has branches 0\.\.5"):
        described.branch(6)


def outputs(described, compute, runs):
    """What the head sees at each step, as nested names: a cell that runs is new, another gives what it gave last."""
    values, seen = {}, []
    for step in range(len(compute)):
        for place, reads in enumerate(described.reads):
            if runs[step, place]:
                values[place] = (step, place, tuple(values.get(read) for read in reads))
        seen.append(values[len(described) - 1])
    return seen


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.integers(1, 6))
@settings(max_examples=60)
def test_live_cells_are_enough_and_none_is_spare(described, seed, keep, steps):
    compute = np.random.default_rng(seed).random((steps, len(described))) < keep
    compute[0] = True
    life = described.life(compute)
    live, stored = life.live, life.live & (life.keep > 0)
    wanted = outputs(described, compute, compute)
    assert not (live & ~compute).any() and not (stored & ~live).any()
    assert outputs(described, compute, live) == wanted
    for step, place in np.argwhere(live):
        if step == 0 and place == len(described) - 1:
            continue  # without it there is nothing to see at all
        without = live.copy()
        without[step, place] = False
        assert outputs(described, compute, without) != wanted


def test_the_middle_under_a_reused_up_block_is_dead(described):
    compute = np.ones((2, len(described)), dtype=bool)
    compute[1, described.index["up0.0"]] = False
    live = described.life(compute).live
    assert not live[1, described.index["mid"]]
    assert live[1, described.index["down1.down"]], "its skip connection is still read"


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="AutoencoderKL is not supported. Supported: UNet2DModel"):
        blocks.describe(AutoencoderKL())
    with pytest.raises(TypeError, match="time_embedding_type fourier is not supported"):
        blocks.describe(UNet2DModel(sample_size=16, block_out_channels=(32, 32), time_embedding_type="fourier",
                                    down_block_types=("DownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "UpBlock2D")))
    with pytest.raises(TypeError, match="a level of type SkipDownBlock2D is not supported"):
        blocks.describe(UNet2DModel(sample_size=16, block_out_channels=(32, 32),
                                    down_block_types=("SkipDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "SkipUpBlock2D")))
