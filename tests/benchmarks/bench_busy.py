"""Beside another busy process: how much longer sampling and training take, with threads that wait passively or not."""

import os
import subprocess
import sys

import numpy as np
import pytest

SAMPLING = """
import time
import torch
from lib.grid import blocks, sampling
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.teachers import networks
torch.set_num_threads(2)
torch.manual_seed(0)
unet, schedule = networks.unet((1, 16, 16), [16, 32, 32], 1, 2).eval(), networks.noise_schedule()
fits = NoiseSchedule.of(schedule)
plan = Plan.full(trailing(10, fits.train_timesteps), fits, blocks.describe(unet).names)
noise = torch.randn(64, 1, 16, 16)
sampling.sample(unet, schedule, plan, noise)
for _ in range(5):
    begun = time.perf_counter()
    sampling.sample(unet, schedule, plan, noise)
    print(time.perf_counter() - begun)
"""
TRAINING = """
import time
import torch
import torch.nn.functional as F
from lib.teachers import networks
torch.set_num_threads(2)
torch.manual_seed(0)
unet = networks.unet((1, 16, 16), [16, 32, 32], 1, 2).train()
compiled, noisy, times = torch.compile(unet), torch.randn(128, 1, 16, 16), torch.randint(0, 1000, (128,))
for step in range(8):
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(compiled(noisy, times).sample.float(), noisy)
    loss.backward()
    if step > 2:
        print(time.perf_counter() - begun)
"""
WAITING = {"threads that wait passively": {"OMP_WAIT_POLICY": "PASSIVE"}, "as the library has it": {}}
BUSY = {"alone": None, "one busy process": "while True: pass",
        "a light one": "import time\nwhile True:\n    sum(range(20_000))\n    time.sleep(0.005)"}


def seconds(work, policy, neighbour):
    """The median time of one run or step, in a process of its own."""
    beside = subprocess.Popen([sys.executable, "-c", neighbour]) if neighbour else None
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | policy
    try:
        done = subprocess.run([sys.executable, "-c", work], env=own, check=True, capture_output=True, text=True)
    finally:
        if beside:
            beside.kill()
            beside.wait()
    return float(np.median([float(line) for line in done.stdout.split()]))


@pytest.mark.parametrize("work", [SAMPLING, TRAINING], ids=["a run of sampling", "a step of compiled training"])
def test_a_busy_machine(work):
    found = {(how, name): seconds(work, policy, neighbour) for how, policy in WAITING.items()
             for name, neighbour in BUSY.items()}
    print()
    for (how, name), time in found.items():
        print(f"{how}, {name}: {time:.3f} s, {time / found[how, 'alone']:.2f} times as long as alone, "
              f"{time / found['as the library has it', 'alone']:.2f} times as long as unset and alone")
