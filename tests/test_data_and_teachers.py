"""Data and teachers: splits, files, what is refused."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lib import data, paths, sampling, teachers
from lib.plan import Plan


def test_digits_keep_their_pixels_at_their_own_resolution():
    images, labels = data.digits(8)
    np.testing.assert_allclose((images[:, 0].numpy() + 1) * 8, load_digits().images, atol=1e-5)
    assert labels.tolist() == load_digits().target.tolist()


def test_the_split_is_of_the_seed_and_in_proportion():
    one, same, other = (data.load("digits", 16, 0.25, seed) for seed in (0, 0, 1))
    assert torch.equal(one.held_out, same.held_out) and not torch.equal(one.held_out, other.held_out)
    assert sorted(torch.cat([one.train, one.held_out]).tolist()) == list(range(1797))
    shares = torch.bincount(one.labels[one.held_out]) / torch.bincount(one.labels)
    assert (shares - 0.25).abs().max() < 0.01
    assert one.shape == (1, 16, 16) and one.images.min() >= -1 and one.images.max() <= 1


def test_images_become_bytes_by_rounding_and_clipping():
    assert data.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="unknown data set 'digit'. Known: digits"):
        data.load("digit", 16, 0.25, 0)


def test_a_teacher_comes_back_from_its_folder(unet, schedule, teacher, noise, tmp_path):
    teachers.save(tmp_path, unet, schedule)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))
    model, again = teachers.load(tmp_path)
    plan = Plan.random(0.5, 0, teacher)
    assert torch.equal(sampling.sample(model, again, plan, noise), sampling.sample(unet, schedule, plan, noise))
    with pytest.raises(FileNotFoundError, match="no teacher in .* 00_teacher_training makes it"):
        teachers.load(tmp_path / "none")


def test_the_loss_is_zero_for_a_model_that_knows_the_noise(schedule):
    images = torch.zeros(4, 1, 16, 16)

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_t, t):
            self.t = t
            scale = (1 - schedule.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)  # x_0 is zero: x_t is scaled noise
            return type("Output", (), {"sample": x_t / scale})

    oracle = Oracle()
    loss = teachers.denoising_loss(images, schedule, 7)(oracle, torch.Generator().manual_seed(0), 0.0)
    assert loss < 1e-8
    assert (oracle.t[:3] + oracle.t[4:]).tolist() == [999] * 3, "timesteps come in antithetic pairs"


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot make the folder .*file"):
        paths.writable(tmp_path / "file" / "folder")
    monkeypatch.setattr(paths.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"is not writable. Mend its permissions \(chmod u\+w\)"):
        paths.writable(tmp_path / "folder")
