"""DiffNAS: the teacher's forms are the teacher, students are what the supernet runs, levels are judged alone."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMPipeline

from lib.grid import blocks, cost, sampling
from lib.grid.model import Model
from lib.grid.plan import Plan
from lib.methods import diffnas
from lib.methods.diffnas import Form, FormSpace, Student
from lib.teachers import networks

SPACE = FormSpace((1, 3, 5), (0.5, 0.8, 1.0, 1.2))


@pytest.fixture(scope="module")
def supernet(unet):
    torch.manual_seed(0)
    return diffnas.supernet(unet, SPACE).eval()


@pytest.fixture
def batch(noise):
    return noise, torch.tensor([10, 500, 900])


def drawn(unet, seed):
    return diffnas.draw(unet, SPACE, torch.Generator().manual_seed(seed))


def test_forms_round_to_the_norms_groups_and_merge(unet):
    block = diffnas.residuals(unet)["mid_block.resnets.0"]  # 16 channels in 4 groups
    assert {form.width for form in SPACE.of(block)} == {8, 12, 16, 20}
    assert len(SPACE.of(block)) == 36 == len(set(SPACE.of(block)))
    narrow = diffnas.residuals(unet)["down_blocks.0.resnets.0"]  # 8 channels: one a group is too few, 9.6 round to 8
    assert {form.width for form in SPACE.of(narrow)} == {8}
    with pytest.raises(ValueError, match="kernels: must be odd"):
        FormSpace((2,), (1.0,))


def test_residual_blocks_come_in_the_order_in_which_they_run(unet):
    found = list(diffnas.residuals(unet))
    assert found[0].startswith("down_blocks.0") and found[-1].startswith("up_blocks.2") and len(found) == 11
    assert found.index("mid_block.resnets.0") < found.index("up_blocks.0.resnets.0")


def test_in_the_teachers_forms_the_supernet_is_the_teacher(unet, supernet, batch):
    diffnas.choose(supernet, diffnas.forms(unet))
    torch.testing.assert_close(supernet(*batch).sample, unet(*batch).sample)
    losses = diffnas.level_losses(supernet, diffnas.observe(unet, *batch)[0])
    assert set(losses) == set(blocks.describe(unet).levels) and max(losses.values()) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_a_student_gives_what_the_supernet_gives_in_its_forms(unet, supernet, batch, seed):
    architecture = drawn(unet, seed)
    diffnas.choose(supernet, architecture)
    made = diffnas.student(supernet, architecture)
    assert diffnas.forms(made) == architecture
    torch.testing.assert_close(made(*batch).sample, supernet(*batch).sample)


def test_a_student_survives_saving(unet, supernet, batch, tmp_path):
    made = diffnas.student(supernet, drawn(unet, 3))
    made.save_pretrained(tmp_path)
    again = Student.from_pretrained(tmp_path, use_safetensors=True)
    assert diffnas.forms(again) == diffnas.forms(made) and again.config.architecture == made.config.architecture
    torch.testing.assert_close(again(*batch).sample, made(*batch).sample, rtol=0, atol=0)


def test_a_student_is_sampled_like_a_teacher(unet, supernet, schedule, teacher, noise, tmp_path):
    made = diffnas.student(supernet, drawn(unet, 3)).eval()
    networks.save(tmp_path, Model(made, schedule))
    again = networks.load(tmp_path)
    assert isinstance(again.network, Student) and diffnas.forms(again.network) == diffnas.forms(made)
    assert isinstance(DDIMPipeline.from_pretrained(tmp_path, use_safetensors=True).unet, Student)
    plan = Plan.random(0.5, 0, teacher)  # the teacher's plan: a student has the same blocks
    assert torch.equal(sampling.sample(again, plan, noise), sampling.sample(Model(made, schedule), plan, noise))


def test_a_student_of_the_teachers_shape_gives_the_teachers_images(unet, supernet, schedule, teacher, noise):
    same = diffnas.student(supernet, diffnas.forms(unet)).eval()
    torch.testing.assert_close(sampling.sample(Model(same, schedule), teacher, noise),
                               sampling.sample(Model(unet, schedule), teacher, noise), rtol=1e-4, atol=1e-3)


def test_a_student_is_costed_and_described_as_it_is(unet, supernet):
    same, small = (diffnas.student(supernet, diffnas.forms(unet) | change) for change in
                   ({}, {"mid_block.resnets.0": Form(1, 3, 8)}))
    assert cost.count(same) == cost.count(unet)
    before, after = cost.count(unet), cost.count(small)
    assert blocks.describe(small).names == blocks.describe(unet).names
    assert {name for name in before.blocks if before.blocks[name] != after.blocks[name]} == {"mid"}
    assert before.blocks["mid"] - after.blocks["mid"] == 4 * 4 * (16 * 16 * 9 - 16 * 8 + 16 * 16 * 9 - 8 * 16 * 9) + (
        32 * 16 - 32 * 8)


def test_a_wider_block_begins_as_the_teachers(unet, batch):
    wide = diffnas.supernet(unet, SPACE).eval()
    own = diffnas.forms(unet)["mid_block.resnets.0"]
    diffnas.choose(wide, {"mid_block.resnets.0": Form(5, 5, own.width)})
    torch.testing.assert_close(wide(*batch).sample, unet(*batch).sample, rtol=1e-4, atol=1e-5)


def test_the_narrowest_blocks_still_hear_the_time(unet, supernet):
    torch.manual_seed(0)
    made = diffnas.student(supernet, {path: min(SPACE.of(block), key=lambda form: form.width)
                                      for path, block in diffnas.residuals(unet).items()})
    for path, block in diffnas.residuals(made).items():
        hidden, times = torch.randn(1, block.in_channels, 8, 8), torch.randn(2, 1, block.time_emb_proj.in_features)
        assert (block(hidden, times[0]) - block(hidden, times[1])).abs().max() > 0.01, path


def test_a_worse_form_costs_its_own_level_alone(unet, supernet, batch):
    diffnas.choose(supernet, diffnas.forms(unet) | {"up_blocks.1.resnets.0": Form(1, 1, 8)})
    losses = diffnas.level_losses(supernet, diffnas.observe(unet, *batch)[0])
    assert losses["up1"] > 1e-4 and max(loss for level, loss in losses.items() if level != "up1") < 1e-10


def test_paths_of_a_level(unet):
    assert len(list(diffnas.candidates(unet, SPACE, "down0"))) == 9
    assert len(list(diffnas.candidates(unet, SPACE, "mid"))) == 36**2


def test_an_architecture_for_other_blocks_is_refused(unet):
    config = dict(unet.config) | {"architecture": {"up_blocks.9.resnets.0": {"kernel_1": 3, "kernel_2": 3, "width": 8}}}
    with pytest.raises(ValueError, match=r"up_blocks.9.resnets.0 is no residual block; there are: down_blocks.0"):
        Student.from_config(config)


def test_forms_cost_what_students_cost(unet, supernet):
    own, at, found = diffnas.forms(unet), diffnas.resolutions(unet), diffnas.residuals(supernet)
    architecture = drawn(unet, 5)
    difference = sum(diffnas.form_macs(found[path], own[path], at[path])
                     - diffnas.form_macs(found[path], architecture[path], at[path]) for path in own)
    assert cost.count(unet).call - cost.count(diffnas.student(supernet, architecture)).call == difference


@pytest.fixture(scope="module")
def tables(unet, supernet, noise, tmp_path_factory):
    space = FormSpace((1, 3), (0.5, 1.0))
    seen = [diffnas.observe(unet, noise, torch.tensor(ts))[0] for ts in ([10, 500, 900], [5, 50, 999])]
    work = tmp_path_factory.mktemp("judged")
    return {level: diffnas.level_table(supernet, space, seen, level, work) for level in ("down0", "mid", "up2")}, seen


def test_shared_prefixes_change_no_loss(supernet, tables):
    found, seen = tables
    assert len(found["mid"]) == 8**2
    for row in found["mid"].iloc[[0, 9, 33, 63]].itertuples():
        diffnas.choose(supernet, row.forms)
        with torch.no_grad():
            alone = sum(torch.stack(diffnas.level_errors(supernet.mid_block, one["mid"])) for one in seen) / 2
        assert (row.loss, row.raw) == pytest.approx(tuple(alone.tolist()), rel=1e-4, abs=1e-9)


def test_shared_prefixes_run_once(supernet, tables, tmp_path):
    _, seen = tables
    ran = []
    handles = [supernet.mid_block.resnets[place].conv1.register_forward_hook(lambda *_, place=place: ran.append(place))
               for place in (0, 1)]
    once = diffnas.level_table(supernet, FormSpace((1, 3), (0.5, 1.0)), seen[:1], "mid", tmp_path)
    for handle in handles:
        handle.remove()
    assert [ran.count(place) for place in (0, 1)] == [8, 64]
    again = diffnas.level_table(supernet, FormSpace((1, 3), (0.5, 1.0)), [], "mid", tmp_path)
    pd.testing.assert_frame_equal(again, once)


def test_the_local_rule_takes_the_cheapest_within_tolerance(unet, tables):
    found, _ = tables
    found = {level: table.assign(loss=table["loss"] + 0.01) for level, table in found.items()}  # a trained reference
    own = diffnas.forms(unet)
    assert diffnas.local_search(found, own, 1.0) == {path: own[path] for table in found.values()
                                                      for path in table["forms"].iloc[0]}
    loose = diffnas.local_search(found, own, 1e9)
    assert all(form == min(form, Form(1, 1, form.width)) for form in loose.values()), "all as cheap as can be"
    for table in found.values():
        assert diffnas.pick(table, loose)["macs"] == table["macs"].min()


@pytest.mark.parametrize("by", ["loss", "raw"])
def test_the_knapsack_is_the_best_of_all_combinations(tables, by):
    found, _ = tables
    few = {level: table.iloc[::5].reset_index(drop=True) for level, table in found.items()}
    budget = int(sum(table["macs"].median() for table in few.values()))
    chosen = diffnas.global_search(few, budget, by)

    def value(level):
        row = diffnas.pick(few[level], chosen)
        return row[by], row["macs"]

    loss, macs = (sum(part) for part in zip(*map(value, few)))
    best = min(sum(few[level][by][i] for level, i in zip(few, places))
               for places in itertools.product(*(range(len(table)) for table in few.values()))
               if sum(few[level]["macs"][i] for level, i in zip(few, places)) <= budget)
    assert macs <= budget and loss == pytest.approx(best)
    with pytest.raises(ValueError, match="no architecture costs at most 1 MACs"):
        diffnas.global_search(few, 1, by)


def test_the_smallest_tolerance_is_the_smallest(unet, tables):
    found, _ = tables
    found = {level: table.assign(loss=table["loss"] + 0.01) for level, table in found.items()}
    own = {path: diffnas.forms(unet)[path] for table in found.values() for path in table["forms"][0]}

    def macs(architecture):
        return diffnas.searched_macs(unet, architecture)

    budget = round(0.6 * macs(own))
    tolerance = diffnas.smallest_tolerance(found, own, lambda one: macs(one) <= budget)
    assert macs(diffnas.local_search(found, own, tolerance)) <= budget
    assert macs(diffnas.local_search(found, own, tolerance * (1 - 1e-6))) > budget
    with pytest.raises(ValueError, match="not even the cheapest"):
        diffnas.smallest_tolerance(found, own, lambda _: False)


def test_the_local_rule_may_go_by_another_price(unet, tables):
    found = {level: table.assign(loss=table["loss"] + 0.01, seconds=-table["macs"])
             for level, table in tables[0].items()}
    own = diffnas.forms(unet)
    slow = diffnas.local_search(found, own, 1e9, "seconds")
    for table in found.values():
        assert diffnas.pick(table, slow)["macs"] == table["macs"].max()
    tolerance = diffnas.smallest_tolerance(found, own, lambda one: one == slow, "seconds")
    assert diffnas.local_search(found, own, tolerance, "seconds") == slow


def test_forms_are_timed_each_by_itself_and_once(unet, tmp_path, monkeypatch):
    timed, at = [], diffnas.resolutions(unet)

    def interleave(runs, repeats, title):
        for form, run in runs.items():
            block = run.func
            assert diffnas.form_of(block) == form
            timed.append((block.in_channels, form, tuple(run().shape[-2:])))
        return {form: [3.0 * form.width, 1.0 * form.width, 2.0 * form.width] for form in runs}

    monkeypatch.setattr(cost, "interleave", interleave)
    arguments = {"images": 2, "repeats": 3, "precision": "fp32", "kept": tmp_path / "seconds.json"}
    table = diffnas.form_seconds(unet, SPACE, **arguments)
    found = diffnas.residuals(unet)
    assert timed == [(found[path].in_channels, form, at[path]) for path in found for form in SPACE.of(found[path])]
    assert table == {path: {form: 2.0 * form.width for form in SPACE.of(block)} for path, block in found.items()}
    assert diffnas.form_seconds(unet, SPACE, **arguments) == table and len(timed) == sum(map(len, table.values()))


def test_the_thin_network_is_the_thinnest_that_is_no_smaller(unet):
    call, model = cost.count(unet).call, Model(unet, networks.noise_schedule())
    for least in (0.3 * call, 0.6 * call, call):
        made = diffnas.thin(model, least)
        widths = list(made.config.block_out_channels)
        assert cost.count(made).call >= least and all(a <= b for a, b in zip(widths, unet.config.block_out_channels))
    assert widths == list(unet.config.block_out_channels), "for all of its MACs, the teacher itself"
    with pytest.raises(ValueError, match="the teacher has fewer than"):
        diffnas.thin(model, call + 1)


def test_a_reference_that_others_beat_spoils_no_tolerance(unet, tables):
    found, _ = tables
    own = {path: diffnas.forms(unet)[path] for table in found.values() for path in table["forms"][0]}
    worst = {level: table.assign(loss=np.where(table.index == diffnas.pick(table, own).name, 9.0, table["loss"] + 0.01))
             for level, table in found.items()}
    for share in (0.9, 0.6, 0.3):
        budget = round(share * diffnas.searched_macs(unet, own))
        assert diffnas.smallest_tolerance(worst, own, lambda one, budget=budget:
                                          diffnas.searched_macs(unet, one) <= budget) >= 1


def test_a_levels_feature_counts_once(unet, batch):
    seen, _ = diffnas.observe(unet, *batch)
    assert [len(seen[level].outputs) for level in ("down0", "down2", "mid", "up1")] == [2, 1, 1, 1]


def test_random_search_keeps_the_budget_and_differs_by_seed(unet):
    budget = round(0.4 * diffnas.searched_macs(unet, diffnas.forms(unet)))
    found = [diffnas.random_search(unet, SPACE, budget, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(0.7 * budget < diffnas.searched_macs(unet, one) <= budget for one in found)
    with pytest.raises(ValueError, match=r"cost at least \d+ MACs: raise the budget of 1"):
        diffnas.random_search(unet, SPACE, 1, torch.Generator())


def test_the_joint_loss_weighs_both_parts(unet, supernet, batch):
    made = diffnas.student(supernet, drawn(unet, 1))
    noise = torch.zeros_like(batch[0])
    blocks_only, half, noise_only = (float(diffnas.joint_loss(made, unet, *batch, noise, beta).detach())
                                     for beta in (0, 0.5, 1))
    assert half == pytest.approx((blocks_only + noise_only) / 2)
    assert noise_only == pytest.approx(float(made(*batch).sample.detach().square().mean()))
    same = diffnas.student(supernet, diffnas.forms(unet))
    assert diffnas.joint_loss(same, unet, *batch, noise, 0) < 1e-10
    assert diffnas.joint_loss(same, unet, *batch, noise, 1, target="teacher") < 1e-10


def test_beta_rises():
    for name, beta in diffnas.BETAS.items():
        values = [beta(way / 10) for way in range(11)]
        assert values == sorted(values) and values[0] >= 0 and values[-1] <= 1, name
    assert [diffnas.BETAS[name](0.25) for name in ("linear", "cosine")] == pytest.approx([0.5, 0.5])


def test_supernet_training_reaches_every_form(unet, schedule):
    model = diffnas.supernet(unet, SPACE)
    samples = networks.Samples(torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    loss = diffnas.supernet_loss(unet, samples, schedule, 4, SPACE)
    for step in range(40):
        loss(model, torch.Generator().manual_seed(step), 0.0).backward()
    assert not [f"{path}.{name}" for path, block in diffnas.residuals(model).items()
                for name, weight in block.named_parameters() if weight.grad is None]


def test_retraining_changes_its_loss_on_the_way(unet, supernet, schedule):
    made = diffnas.student(supernet, drawn(unet, 1))
    samples = networks.Samples(torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    loss = diffnas.retraining_loss(unet, samples, schedule, 4, diffnas.BETAS["linear"])
    x_t, t, noise, _ = samples.noisy(schedule, 4, torch.Generator().manual_seed(0), made.device)
    for way, beta in ((0.0, 0.0), (0.25, 0.5), (0.8, 1.0)):
        expected = diffnas.joint_loss(made, unet, x_t, t, noise, beta)
        torch.testing.assert_close(loss(made, torch.Generator().manual_seed(0), way), expected)
