"""How fast the engine is, as ratios within one run: `make bench`. No test depends on these: machines are busy."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from lib.grid import blocks, cost, sampling
from lib.grid.model import Model
from lib.grid.plan import HOLD, LINE, PARABOLA, NoiseSchedule, Plan, trailing
from lib.methods import diffnas, peers
from lib.study import params
from lib.teachers import networks

PAIRS = 48
BATCH = 64


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def setting(request):
    """The digits teacher's architecture with random weights (time does not depend on them), 50 steps."""
    p = params.load("digits")["00_teacher_training"]
    torch.set_num_threads(p.threads)
    torch.manual_seed(0)
    unet = networks.unet((1, p.resolution, p.resolution), p.widths, p.layers, p.norm_groups).eval()
    schedule = networks.noise_schedule()
    fits, described = NoiseSchedule.of(schedule), blocks.describe(unet)
    teacher = Plan.full(trailing(p.teacher_steps, fits.train_timesteps), fits, described)
    noise = sampling.noise("analysis", 0, 0, BATCH, (1, p.resolution, p.resolution))
    return unet, schedule, described, teacher, noise, request.param


def plain_loop(unet, schedule, noise, steps, precision):
    scheduler = DDIMScheduler.from_config(schedule.config)
    scheduler.set_timesteps(steps)
    x_t = noise
    with torch.inference_mode(), sampling.autocast(noise.device, precision):
        for t in scheduler.timesteps:
            x_t = scheduler.step(unet(x_t, t).sample.float(), t, x_t).prev_sample
    return x_t


def test_full_plan_against_a_plain_diffusers_loop(setting):
    unet, schedule, _, teacher, noise, precision = setting

    def plain():
        return plain_loop(unet, schedule, noise, teacher.steps, precision)

    def ours():
        return sampling.sample(Model(unet, schedule), teacher, noise, precision=precision)

    relative, absolute = (0, 1e-3) if precision == "fp32" else (1e-2, 0.3)
    torch.testing.assert_close(ours(), plain(), rtol=relative, atol=absolute)
    seconds = cost.interleave({"plain": plain, "ours": ours}, PAIRS)
    ratio, low, high = cost.median_ratio(seconds["ours"], seconds["plain"])
    print(f"\n{precision}, batch {BATCH}, {PAIRS} pairs: engine / plain diffusers loop "
          f"{ratio:.3f} [{low:.3f}, {high:.3f}]")


def test_measured_speed_up_over_that_of_executed_macs(setting):
    unet, schedule, described, teacher, noise, precision = setting
    costs = cost.count(unet)
    kept = np.arange(teacher.steps) % 5 == 0
    plans = {"full": teacher, "DeepCache 1:5, shallowest branch": Plan.deepcache(5, described.branch(0), teacher),
             "40 of 50 columns all reused": teacher.with_cells(np.repeat(kept[:, None], len(described), axis=1))}
    runs = {name: (lambda plan=plan: sampling.sample(Model(unet, schedule), plan, noise, precision=precision))
            for name, plan in plans.items()}
    seconds = cost.interleave(runs, PAIRS)
    for name, plan in list(plans.items())[1:]:
        macs = costs.executed(teacher) / costs.executed(plan)
        ratio, low, high = cost.median_ratio(seconds["full"], seconds[name])
        print(f"\n{precision}, {name}: measured {ratio:.2f} [{low:.2f}, {high:.2f}], executed MACs {macs:.2f}, "
              f"measured / MACs {ratio / macs:.2f} [{low / macs:.2f}, {high / macs:.2f}]")


def test_what_a_forecast_costs_in_time(setting):
    """DeepCache 1:2 that forecasts by a line, and by a parabola, against the same that holds: equal MACs, more sums."""
    unet, schedule, described, teacher, noise, precision = setting
    costs = cost.count(unet)
    plans = {"full": teacher} | {name: Plan.deepcache(2, described.branch(0), teacher, reuse)
                                 for name, reuse in (("hold", HOLD), ("line", LINE), ("parabola", PARABOLA))}
    runs = {name: partial(sampling.sample, Model(unet, schedule), plan, noise, precision=precision)
            for name, plan in plans.items()}
    seconds = cost.interleave(runs, PAIRS)
    for name, plan in list(plans.items())[1:]:
        macs = costs.executed(teacher) / costs.executed(plan)
        faster, low, high = cost.median_ratio(seconds["full"], seconds[name])
        print(f"\n{precision}, batch {BATCH}, DeepCache 1:2, {name}: measured {faster:.2f} [{low:.2f}, {high:.2f}], "
              f"executed MACs {macs:.2f}, measured / MACs {faster / macs:.2f}; "
              "over holding's speed-up {:.3f} [{:.3f}, {:.3f}]; ".format(
                  *cost.median_ratio(seconds["hold"], seconds[name])) +
              f"kept {costs.kept(plan) * BATCH / 2**20:.1f} MiB")


def test_deepcache_package_against_our_plan(setting):
    unet, schedule, described, teacher, noise, precision = setting
    plan = Plan.deepcache(5, described.branch(0), teacher)

    def theirs():
        return peers.deepcache(unet, teacher, 5, 0, noise, precision=precision)

    def ours():
        return sampling.sample(Model(unet, schedule), plan, noise, precision=precision)

    assert torch.equal(theirs(), ours())
    seconds = cost.interleave({"theirs": theirs, "ours": ours}, PAIRS)
    ratio, low, high = cost.median_ratio(seconds["theirs"], seconds["ours"])
    memory = cost.peak_memory(theirs) / cost.peak_memory(ours)
    print(f"\n{precision}, batch {BATCH}, 1:5, same images, {PAIRS} pairs: DeepCache package / ours: time {ratio:.3f} "
          f"[{low:.3f}, {high:.3f}], peak memory {memory:.2f}")


@pytest.mark.parametrize("times_wider", [1, 4, 8])
def test_half_width_students_measured_speed_up_over_that_of_macs(times_wider):
    """The teacher's architecture and a student with half the channels in every block, as they are and wider."""
    p = params.load("digits")["00_teacher_training"]
    torch.set_num_threads(p.threads)
    torch.manual_seed(0)
    unet = networks.unet((1, p.resolution, p.resolution), [times_wider * width for width in p.widths], p.layers,
                         p.norm_groups).eval().requires_grad_(False)
    halves = {path: replace(form, width=form.width // 2) for path, form in diffnas.forms(unet).items()}
    student = diffnas.student(diffnas.supernet(unet, diffnas.FormSpace((3,), (0.5, 1.0))), halves).eval()
    macs = cost.count(unet).call / cost.count(student).call
    x_t = sampling.noise("analysis", 0, 0, BATCH, (1, p.resolution, p.resolution))

    def once(model):
        with torch.inference_mode(), sampling.autocast(x_t.device, p.precision):
            model(x_t, 500)

    seconds = cost.interleave({"teacher": partial(once, unet), "student": partial(once, student)}, PAIRS)
    ratio, low, high = cost.median_ratio(seconds["teacher"], seconds["student"])
    print(f"\n{p.precision}, batch {BATCH}, half the width in every block, {times_wider} times as wide: measured "
          f"{ratio:.2f} [{low:.2f}, {high:.2f}], MACs {macs:.2f}, measured / MACs {ratio / macs:.2f}")
