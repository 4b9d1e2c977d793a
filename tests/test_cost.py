"""MACs counted by hand, and those that papers print."""

import copy

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DModel

from lib.grid import cost
from lib.grid.model import Model
from lib.grid.pipelines import Requests
from lib.grid.plan import Plan
from lib.methods.fitting import Fitting


def conv(given, made, size, kernel=3):
    return given * made * kernel**2 * size**2


def test_blocks_cost_what_a_hand_count_says(unet):
    """Widths 8, 8, 16 on 16 x 16 pixels; the time embedding has 4 x 8 = 32 channels."""
    costs = cost.count(unet)
    assert costs.blocks["down0.0"] == 2 * conv(8, 8, 16) + 32 * 8
    assert costs.blocks["down0.down"] == conv(8, 8, 8)
    assert costs.blocks["down2.0"] == conv(8, 16, 4) + conv(16, 16, 4) + conv(8, 16, 4, kernel=1) + 32 * 16
    assert costs.blocks["up1.up"] == conv(8, 8, 16)
    assert costs.blocks["up2.1"] == conv(16, 8, 16) + conv(8, 8, 16) + conv(16, 8, 16, kernel=1) + 32 * 8
    assert costs.attention["mid"] == 2 * 16 * 16 * 16  # 16 pixels see 16 pixels, 16 channels, twice
    assert costs.blocks["mid"] == 4 * conv(16, 16, 4) + 2 * 32 * 16 + 4 * 16 * 16 * 16 + costs.attention["mid"]
    assert costs.rest == 2 * conv(1, 8, 16) + 8 * 32 + 32 * 32
    assert costs.call - costs.call_without_attention == costs.attention["mid"]
    assert sum(costs.parameters.values()) + costs.rest_parameters == unet.num_parameters()


def test_precision_changes_no_count(unet):
    assert cost.count(copy.deepcopy(unet).bfloat16()) == cost.count(unet)


def test_the_cifar10_ddpm_costs_what_papers_print():
    """6.1 G without and 6.2 G with attention's products, 35.7 M parameters (arXiv 2312.00858, 2305.10924)."""
    model = UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
                        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
                        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    costs = cost.count(model)
    assert costs.call_without_attention / 1e9 == pytest.approx(6.1, abs=0.05)
    assert costs.call / 1e9 == pytest.approx(6.22, abs=0.01)
    assert model.num_parameters() / 1e6 == pytest.approx(35.75, abs=0.01)


def test_a_plan_costs_its_live_cells_and_the_stem_and_head_of_each_call(unet, teacher, described):
    costs = cost.count(unet)
    assert costs.executed(teacher) == teacher.steps * costs.call
    partial = costs.blocks["up2.1"] + costs.rest
    plan = Plan.deepcache(5, described.branch(0), teacher)
    assert costs.executed(plan) == 2 * costs.call + 8 * partial
    columns = np.repeat([[True]] + [[False]] * 9, len(described), axis=1)
    assert costs.executed(teacher.with_cells(columns)) == costs.call


def test_a_dead_cell_costs_nothing(unet, teacher, described):
    costs = cost.count(unet)
    cells = teacher.computes
    cells[4, described.index["up0.0"]] = False  # so nobody reads the middle at step 4, nor the level before it
    saved = costs.executed(teacher) - costs.executed(teacher.with_cells(cells))
    assert saved == costs.blocks["up0.0"] + costs.blocks["mid"] + costs.blocks["down2.0"]


def test_costs_come_back_from_their_file(unet, tmp_path):
    costs = cost.count(unet)
    costs.save(tmp_path / "costs.json")
    assert cost.Costs.load(tmp_path / "costs.json") == costs


def test_interleaving_takes_turns_and_ratios_have_an_interval():
    turns = []
    seconds = cost.interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=3, warmup=1)
    assert turns == ["a", "b"] * 4 and len(seconds["a"]) == 3
    ratio, low, high = cost.median_ratio([2.0, 2.1, 1.9, 2.0], [1.0, 1.0, 1.1, 1.0])
    assert low <= ratio == 2.0 <= high


def test_a_plans_time_is_the_sum_over_its_columns(unet, schedule, teacher, described, noise, tmp_path):
    plan = Plan.deepcache(5, described.branch(1), teacher)
    latency = cost.measure(Model(unet, schedule), [plan], noise, precision="fp32", repeats=2)
    live = plan.live
    full, part = ("".join("01"[runs] for runs in row.astype(int)) + "1" for row in live[:2])
    assert set(latency.seconds) == {full, part} and latency.batch == len(noise)
    assert latency.of(plan) == pytest.approx(2 * latency.seconds[full] + 8 * latency.seconds[part])
    latency.save(tmp_path / "latency.json")
    assert cost.Latency.load(tmp_path / "latency.json") == latency
    other = Plan.deepcache(5, described.branch(0), teacher)
    with pytest.raises(KeyError, match="measure a plan that holds it"):
        latency.of(other)


def test_speed_ups_are_of_the_first_run_and_beside_macs():
    runs = {"slow": lambda: torch.randn(300, 300) @ torch.randn(300, 300), "fast": lambda: torch.randn(10, 10)}
    table = cost.speed_ups(runs, {"slow": 10, "fast": 2}, images=4, repeats=5)
    assert table["name"].tolist() == ["slow", "fast"] and table["times fewer MACs"].tolist() == [1, 5]
    assert table["times faster"][0] == 1 < table["times faster"][1]
    assert (table["measured / MACs"] * table["times fewer MACs"] - table["times faster"]).abs().max() < 1e-9
    assert (table["low"] <= table["times faster"]).all() and (table["times faster"] <= table["high"]).all()
    assert table["ms an image"][0] / table["ms an image"][1] == pytest.approx(table["times faster"][1])
    assert table["peak MB"].tolist() == pytest.approx([3 * 300 * 300 * 4e-6, 10 * 10 * 4e-6])


def test_peak_memory_counts_what_lives_at_one_time():
    def run():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        b.view(10, 100).add_(1)  # no new memory
        del a, b
        return torch.zeros(1500)  # 6,000

    assert cost.peak_memory(run) == 8000
    kept = torch.zeros(1000)
    assert cost.peak_memory(lambda: kept.mul_(2)) == 0, "what was there before"


def test_requests_are_counted_of_any_run():
    pipe, _ = tiny.made(tiny.stable_diffusion)
    asked, full = Requests(pipe, ["a digit"], {"guidance_scale": 4.0}), Fitting.full_of(pipe, 10)
    doubled = full.timesteps[:2] + full.timesteps[1:]
    pndm = full.at(doubled, solver="pndm", order=4, abscissa="step").replace(grid=doubled)
    runs = [full, full.at(full.timesteps[:1]).replace(grid=full.timesteps[:1]), pndm.at(pndm.grid)]
    assert len({(costs.call, costs.passes) for costs in (cost.count_requests(asked, run) for run in runs)}) == 1
    assert Plan.few_steps(3, "uniform", pndm).steps == 3


def test_a_network_that_reads_the_numbers_of_its_masks_is_counted_where_it_lies(monkeypatch):
    network, run = tiny.made(tiny.stable_diffusion)[0].unet, cost._counted

    def no_meta(network, described, x_t, given):
        if x_t.is_meta:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return run(network, described, x_t, given)

    on_meta = cost.count(network)
    monkeypatch.setattr(cost, "_counted", no_meta)
    there = cost.count(network)
    assert (there.blocks, there.outputs, there.call) == (on_meta.blocks, on_meta.outputs, on_meta.call)
    assert not network.down_blocks[0].resnets[0]._forward_hooks
