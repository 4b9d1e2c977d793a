"""Training: resumes after kill -9 to the same weights, stops at NaN, averages."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from lib.teachers import training
from lib.teachers.training import TrainingDiverged, step_generator, train

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from lib.teachers import data, networks, training
torch.set_num_threads(1)
work, out, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
digits = data.load("digits", 16, 0.25, 0)
torch.manual_seed(0)
model = networks.unet(digits.shape, [8, 8], 1, 4)
inner = networks.denoising_loss(networks.Samples(digits.images), networks.noise_schedule(), 8)
def loss(model, generator, way):
    time.sleep(pause)
    return inner(model, generator, way)
training.train(model, loss, steps=40, lr=1e-3, ema_decay=0.9, seed=0, device="cpu", precision="fp32", work=work,
               save_every=5, warmup=5)
save_file(model.state_dict(), out)
"""


def start(tmp_path, name, out, pause):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, script, tmp_path / name, tmp_path / out, str(pause)],
                            stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_it_ends_in_the_weights_of_an_unbroken_run(tmp_path):
    assert start(tmp_path, "unbroken", "unbroken.safetensors", 0).wait(120) == 0
    process = start(tmp_path, "killed", "killed.safetensors", 0.2)
    state = tmp_path / "killed" / "state" / "state.json"
    for _ in range(600):
        if state.exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed.safetensors").exists()
    process = start(tmp_path, "killed", "killed.safetensors", 0)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming from step" in said
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "unbroken.safetensors").read_bytes()


def fit(model, loss, work, **options):
    settings = {"steps": 20, "lr": 0.1, "ema_decay": 0.5, "seed": 0, "device": "cpu", "precision": "fp32", "work": work,
                "save_every": 4, "warmup": 1}
    return train(model, loss, **settings | options)


def test_trainings_of_one_process_may_differ_in_precision(tmp_path):
    seen = []

    def loss(model, generator, way):
        seen.append(model(torch.ones(1, 4)).dtype)
        return model(torch.ones(1, 4)).float().square().mean()

    for precision in ("bf16", "fp32", "bf16"):
        fit(nn.Linear(4, 4), loss, tmp_path / f"{len(seen)}", steps=1, precision=precision)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_a_resumed_optimisers_moments_lie_as_the_weights_do(tmp_path):
    """The fused optimiser, on CUDA, refuses any other layout."""
    def model():
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def loss(some, generator, _):
        return some(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()

    train(model(), loss, steps=2, lr=1e-3, ema_decay=0.9, seed=0, device="cpu", precision="fp32", work=tmp_path)
    resumed = model()
    optimizer = torch.optim.AdamW(resumed.parameters())
    assert training._resume(tmp_path, resumed, EMAModel(resumed.parameters()), optimizer)[0] == 2
    moments = optimizer.state[resumed.weight]
    assert moments["exp_avg"].abs().sum() > 0
    assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == resumed.weight.stride()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path):
    model, calls = nn.Linear(1, 1), []

    def loss(model, generator, way):
        calls.append(1)
        value = model(torch.ones(1, 1)).square().sum()
        return value * float("nan") if len(calls) == 11 else value

    with pytest.raises(TrainingDiverged, match="the loss is nan, its gradient.s norm nan at step 10. The last good "
                                               "state, step 8, is kept in .* Lower the learning rate"):
        fit(model, loss, tmp_path)
    good = nn.Linear(1, 1)
    fit(good, lambda model, _, __: model(torch.ones(1, 1)).square().sum(), tmp_path)
    assert all(torch.isfinite(p).all() for p in good.parameters())
    assert len(calls) == 11, "it went on from step 8"


def test_a_gradient_that_is_no_number_stops_before_it_spoils_the_weights(tmp_path):
    model = nn.Linear(1, 1)

    def loss(model, generator, way):
        return model(torch.zeros(1, 1)).sub(model.bias).sum().sqrt()  # sqrt(0): finite, its gradient is not

    with pytest.raises(TrainingDiverged, match="the loss is 0.0, its gradient's norm .* No state was saved before"):
        fit(model, loss, tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_states_are_saved_at_every_asked_step_and_at_the_last(tmp_path, monkeypatch):
    saved, save = [], training._save
    monkeypatch.setattr(training, "_save", lambda work, state, *rest: (saved.append(state["step"]),
                                                                       save(work, state, *rest)))
    fit(nn.Linear(1, 1), lambda model, *_: model(torch.ones(1, 1)).square().sum(), tmp_path, steps=730, save_every=200)
    assert saved == [200, 400, 600, 730]


def test_it_learns_and_leaves_the_average_of_the_weights(tmp_path):
    torch.manual_seed(0)
    model, passed = nn.Linear(3, 1, bias=False), []
    wanted = torch.tensor([[1.0, -2.0, 0.5]])

    def loss(model, generator, way):
        passed.append(model.weight.detach().clone())
        x = torch.randn(64, 3, generator=generator)
        return (model(x) - x @ wanted.T).square().mean()

    history = fit(model, loss, tmp_path, steps=305, ema_decay=0.9, lr=0.05)
    assert history[-1]["loss"] < 1e-3 < history[0]["loss"]
    assert [part["step"] for part in history] == [*range(3, 301, 3), 305], "no last mean of fewer steps than the others"
    torch.testing.assert_close(model.weight.detach(), wanted, atol=0.05, rtol=0)
    assert not torch.equal(model.weight.detach(), passed[-1])


def test_a_step_draws_the_same_whenever_it_is_reached():
    draws = [torch.randn(4, generator=step_generator(0, step)) for step in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_a_watched_loss_is_the_loss_and_looks_once_a_stretch_resumed_or_not(tmp_path):
    looked, path = [], tmp_path / "seen.json"

    def loss(model, generator, way):
        if stop and way >= 0.5:
            raise KeyboardInterrupt
        return model(torch.ones(1, 1)).square().sum()

    def look(model):
        looked.append(model.weight.item())
        return looked[-1]

    def trained(work, watched):
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        fit(model, watched, tmp_path / work, steps=20)
        return model.weight.item()

    stop = True
    with pytest.raises(KeyboardInterrupt):
        trained("watched", training.watched(loss, look, 5, path))
    stop = False
    assert len(looked) == 3, "steps 0, 4 and 8"
    assert trained("watched", training.watched(loss, look, 5, path)) == trained("plain", loss)
    assert len(looked) == 5 and json.loads(path.read_text()) == dict(zip("01234", looked))
    assert len(set(looked)) == 5, "each of another state of the weights"
