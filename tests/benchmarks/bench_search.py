"""How much faster two workers of one thread each search than one: `make bench`."""

import time
from statistics import median

import torch

from lib.grid import blocks, cost
from lib.grid.model import Model
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.judging import evaluate, extractor
from lib.judging.banks import Bank
from lib.methods.flexiffusion import SegmentSpace
from lib.methods.search import search
from lib.study import params
from lib.teachers import networks

TRIALS, TURNS = 300, 2


def test_two_workers_against_one(tmp_path):
    """The digits study's space, images a candidate and budget, on a teacher with random weights."""
    p = params.load("digits")
    training, searching = p["00_teacher_training"], p["04_schedule_search"]
    torch.manual_seed(0)
    unet = networks.unet((1, 16, 16), training.widths, training.layers, training.norm_groups).eval()
    schedule = networks.noise_schedule()
    classifier = extractor.Extractor("classes", 1, 16, [10]).eval().requires_grad_(False)
    fits, described = NoiseSchedule.of(schedule), blocks.describe(unet)
    teacher = Plan.full(trailing(searching.teacher_steps, fits.train_timesteps), fits, described)
    space = SegmentSpace(teacher, described, tuple(searching.segment_counts), tuple(searching.branches))
    macs = cost.count(unet).executed
    rate = {}
    for turn in range(TURNS):
        for workers in (1, 2):
            torch.set_num_threads(workers)  # they share them: one each
            bank = Bank("search", Model(unet, schedule), [classifier], count=searching.search_images, seed=0,
                        precision="bf16", work=tmp_path / f"{turn}-{workers}")
            bank.features(teacher)
            start = time.perf_counter()
            found = search(space, evaluate.Imitation(bank, teacher), macs, trials=TRIALS, population=20, seed=0,
                           storage=tmp_path / f"{turn}-{workers}.journal", budget=int(0.2 * macs(teacher)),
                           start=space.known(), workers=workers)
            rate.setdefault(workers, []).append(60 * len(found) / (time.perf_counter() - start))
    ratios = [two / one for one, two in zip(rate[1], rate[2], strict=True)]
    print(f"\ntrials a minute, the start of processes included: one worker {median(rate[1]):.0f}, two "
          f"{median(rate[2]):.0f}; ratio {median(ratios):.2f}, least and greatest {min(ratios):.2f}, {max(ratios):.2f}")
