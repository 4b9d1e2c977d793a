"""Several processes under `accelerate launch` do what one does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib.grid import sampling
from lib.grid.model import Model
from lib.grid.plan import Plan
from lib.teachers import networks
from lib.teachers.data import to_uint8

TRAINING = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from lib.teachers import data, networks, training
torch.set_num_threads(1)
digits = data.load("digits", 16, 0.25, 0)
torch.manual_seed(0)
model = networks.unet(digits.shape, [8, 8], 1, 4)
loss = networks.denoising_loss(networks.Samples(digits.images), networks.noise_schedule(), 8)
training.train(model, loss, steps=12, lr=1e-3, ema_decay=0.5, seed=0, device="cpu", precision="fp32",
               work=Path(sys.argv[1]) / "work", save_every=5, warmup=5)
save_file(model.state_dict(), Path(sys.argv[1]) / "weights.safetensors")
print("share", training.own_share(torch.arange(6)).tolist(), flush=True)
"""


def launch(processes, *command):
    """Run a script, or a module after -m, by several processes; give what the first one printed."""
    start = [sys.executable]
    if processes > 1:  # --multi_gpu also starts several on the CPU, without MPI
        start += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
                  "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend",
                  "no", "--main_process_port", "0"]
    done = subprocess.run([*start, *map(str, command)], capture_output=True, text=True, timeout=280,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        said = launch(processes, tmp_path / "script.py", tmp_path / name)
        shares = {"one": ["[0, 1, 2, 3, 4, 5]"], "two": ["[0, 2, 4]", "[1, 3, 5]"]}[name]
        assert all(f"share {share}" in said for share in shares), "each makes its part, not the whole"
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    torch.manual_seed(0)
    start = networks.unet((1, 16, 16), [8, 8], 1, 4).state_dict()
    moved = max(float((one[key] - start[key]).abs().max()) for key in one)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 0.02 * moved


@pytest.mark.parametrize("processes", [1, 2])
def test_two_processes_sample_the_images_of_one(tmp_path, unet, schedule, teacher, described, processes):
    networks.save(tmp_path / "model", Model(unet, schedule))
    plan = Plan.deepcache(2, described.branch(0), teacher)
    plan.save(tmp_path / "plan.json")
    said = launch(processes, "-m", "lib.apply", "--model", tmp_path / "model", "--plan", tmp_path / "plan.json",
                  "--out", tmp_path / "out", "--count", 5, "--seed", 3)
    assert said.startswith(f"5 images in {tmp_path / 'out'}") and "PSNR" in said
    assert f"beside all 10 steps, on {(5, 3)[processes - 1]} images: 1.65 times fewer executed MACs" in said
    images = sampling.sample(Model(unet, schedule), plan, sampling.noise("report", 3, 0, 5, (1, 16, 16)))
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(5)]
    for file, image in zip(files, to_uint8(images)):
        assert np.abs(np.asarray(Image.open(file), dtype=int) - image[0].int().numpy()).max() <= 1  # rounding


def test_two_processes_share_a_fit(tmp_path, unet, schedule):
    networks.save(tmp_path / "model", Model(unet, schedule))
    launch(2, "-m", "lib.fit", "--model", tmp_path / "model", "--budget", "0.8", "--out", tmp_path / "plan.json",
           "--steps", 8, "--trials", 6, "--search-images", 2, "--select-images", 2, "--report-images", 2, "--rounds", 1,
           "--batch", 2, "--device", "cpu")
    assert Plan.load(tmp_path / "plan.json").steps < 8
    written = {path.name for path in tmp_path.glob("plan*")}
    assert {"plan.json", "plan.certificate.json", "plan.html"} < written, "and the controls, as plans"
    assert not [name for name in written if "unfinished" in name]


def test_what_cannot_be_sampled_is_refused(tmp_path, unet, schedule, teacher):
    networks.save(tmp_path / "model", Model(unet, schedule))
    teacher.save(tmp_path / "plan.json")
    for model, plan, message in ((tmp_path / "none", tmp_path / "plan.json", "no teacher in"),
                                 (tmp_path / "model", tmp_path / "none.json", "no such file")):
        done = subprocess.run([sys.executable, "-m", "lib.apply", "--model", model, "--plan", plan, "--out",
                               tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
