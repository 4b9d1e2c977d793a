"""Beside another busy process: how much longer sampling and training take, by the number of threads."""

import subprocess
import sys

import numpy as np
import pytest

SAMPLING = """
import sys
import time
import torch
from lib.grid import blocks, sampling
from lib.grid.model import Model
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.teachers import networks
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
unet, schedule = networks.unet((1, 16, 16), [16, 32, 32], 1, 2).eval(), networks.noise_schedule()
fits = NoiseSchedule.of(schedule)
plan = Plan.full(trailing(5, fits.train_timesteps), fits, blocks.describe(unet))
noise = torch.randn(64, 1, 16, 16)
sampling.sample(Model(unet, schedule), plan, noise)
for _ in range(3):
    begun = time.perf_counter()
    sampling.sample(Model(unet, schedule), plan, noise)
    print(time.perf_counter() - begun)
"""
TRAINING = """
import sys
import time
import torch
import torch.nn.functional as F
from lib.teachers import networks
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
unet = networks.unet((1, 16, 16), [16, 32, 32], 1, 2).train()
noisy, times = torch.randn(128, 1, 16, 16), torch.randint(0, 1000, (128,))
for step in range(6):
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(unet(noisy, times).sample.float(), noisy)
    loss.backward()
    if step > 2:
        print(time.perf_counter() - begun)
"""
BESIDE = {"alone": None, "beside a busy process": "while True: pass",
          "beside a light one": "import time\nwhile True:\n    sum(range(20_000))\n    time.sleep(0.005)"}


def seconds(work, threads, neighbour):
    """The median time of one run or step, in a process and a session of its own, as a notebook's kernel is."""
    beside = subprocess.Popen([sys.executable, "-c", neighbour]) if neighbour else None
    try:
        done = subprocess.run([sys.executable, "-c", work, str(threads)], check=True, capture_output=True, text=True,
                              start_new_session=True)
    finally:
        if beside:
            beside.kill()
            beside.wait()
    return float(np.median([float(line) for line in done.stdout.split()]))


@pytest.mark.parametrize("work", [SAMPLING, TRAINING], ids=["a run of sampling", "a step of training"])
def test_a_busy_machine(work):
    found = {(threads, name): seconds(work, threads, neighbour) for threads in (2, 1)
             for name, neighbour in BESIDE.items()}
    print()
    for (threads, name), time in found.items():
        print(f"threads: {threads}, {name}: {time:.3f} s, {time / found[2, 'alone']:.2f} times as long as two alone")
