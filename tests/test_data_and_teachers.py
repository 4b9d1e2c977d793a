"""Data and teachers: splits, files, what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits

from lib.grid import blocks, cost, sampling
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.judging import analysis
from lib.study import paths
from lib.teachers import data, networks


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


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, 20 x 12 pixels, in the subfolders cats and dogs."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 20, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        path = tmp_path / "pictures" / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return tmp_path / "pictures"


def parquet(path, records):
    pd.DataFrame(records).to_parquet(path)
    return str(path)


def encoded(folder):
    return [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.rglob("*.png"))]


def test_a_folder_of_images_is_cut_resized_and_labelled_by_its_subfolders(folder):
    found = data.load(str(folder), 8, 0.25, 0)
    assert found.images.shape == (12, 3, 8, 8) and -1 <= found.images.min() < found.images.max() <= 1
    assert torch.bincount(found.labels).tolist() == [6, 6] and found.images.is_contiguous()
    first = Image.open(folder / "cats" / "00.png").resize((8, 8), Image.Resampling.BICUBIC, box=(4, 0, 16, 12))
    gap = (data.to_uint8(found.images[0]).permute(1, 2, 0).int() - torch.from_numpy(np.array(first)).int()).abs().max()
    assert gap <= 1


def test_parquet_gives_what_the_folder_gives(folder, tmp_path):
    records = {"img": encoded(folder), "label": [0] * 6 + [1] * 6}
    rows = data.load(parquet(tmp_path / "all.parquet", records), 8, 0.25, 0)
    assert torch.equal(rows.images, data.load(str(folder), 8, 0.25, 0).images)
    assert torch.equal(rows.labels, data.load(str(folder), 8, 0.25, 0).labels)
    unlabelled = data.load(parquet(tmp_path / "plain.parquet", {"image": records["img"]}), 8, 0.25, 0)
    assert not unlabelled.labels.any() and len(unlabelled.held_out) == 3


def test_grey_pictures_stay_grey(tmp_path):
    for i in range(10):
        Image.fromarray(np.full((9, 9), 25 * i, np.uint8)).save(tmp_path / f"{i}.png")
    found = data.load(str(tmp_path), 8, 0.2, 0)
    assert found.images.shape == (10, 1, 8, 8)
    assert torch.allclose(found.images[:, 0, 0, 0], torch.arange(10) * 25 / 127.5 - 1)


def test_what_is_no_data_set_is_refused_by_name(folder, tmp_path):
    pictures = encoded(folder)
    broken = [*pictures[:7], {"bytes": pictures[7]["bytes"][:40], "path": "7.png"}, *pictures[8:]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    refused = {
        "digit": "neither 'digits' nor a file or folder that exists. A data set of the Hugging Face hub is written",
        str(tmp_path / "empty"): "holds neither images nor parquet files",
        str(tmp_path / "cut.parquet"): "cut.parquet cannot be read as a data set",
        parquet(tmp_path / "few.parquet", {"image": pictures[:3]}): "holds 3 images; that is too few",
        parquet(tmp_path / "named.parquet", {"photo": pictures}): r"no column of images \(image or img\); .*: photo",
        parquet(tmp_path / "broken.parquet", {"image": broken}): r"broken.parquet, row 7 \(7.png\): no image that can",
        parquet(tmp_path / "words.parquet", {"image": pictures, "label": ["cat"] * 12}): "row 0 .* the label is 'cat'"}
    for source, message in refused.items():
        with pytest.raises(ValueError, match=message):
            data.load(source, 8, 0.25, 0)


def test_a_teacher_comes_back_from_its_folder(unet, schedule, teacher, noise, tmp_path):
    networks.save(tmp_path, unet, schedule)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))
    model, again = networks.load(tmp_path)
    plan = Plan.random(0.5, 0, teacher)
    assert torch.equal(sampling.sample(model, again, plan, noise), sampling.sample(unet, schedule, plan, noise))
    with pytest.raises(FileNotFoundError, match="no teacher in .* 00_teacher_training makes it"):
        networks.load(tmp_path / "none")


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
    loss = networks.denoising_loss(images, schedule, 7)(oracle, torch.Generator().manual_seed(0), 0.0)
    assert loss < 1e-8
    assert (oracle.t[:3] + oracle.t[4:]).tolist() == [999] * 3, "timesteps come in antithetic pairs"


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot make the folder .*file"):
        paths.writable(tmp_path / "file" / "folder")
    monkeypatch.setattr(paths.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"is not writable. Mend its permissions \(chmod u\+w\)"):
        paths.writable(tmp_path / "folder")


def test_other_peoples_pipelines_are_loaded(tmp_path, schedule, noise):
    torch.manual_seed(0)
    model = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, layers_per_block=2, norm_num_groups=4,
                        block_out_channels=(8, 16), attention_head_dim=4,
                        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "AttnUpBlock2D"))
    DDPMPipeline(model, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ddpm")
    loaded, found = networks.load(tmp_path / "ddpm")
    described, fits = blocks.describe(loaded), NoiseSchedule.of(found)
    teacher = Plan.full(trailing(8, fits.train_timesteps), fits, described.names)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert analysis.similarity(loaded, found, teacher, noise).shape[1] == len(described)
    costs = cost.count(loaded)
    plan = Plan.deepcache(3, described.branch(2), teacher)
    assert costs.executed(plan) < costs.executed(teacher)
    assert sampling.sample(loaded, found, plan, noise).shape == (2, 3, 16, 16)


def test_pipelines_of_other_things_are_refused(tmp_path):
    for parts, message in (({"_class_name": "Thing", "vae": ["diffusers", "AutoencoderKL"]}, "a Thing without unet"),
                           ({"unet": ["os", "system"]}, "its unet is a system of os; only models and schedulers of"),
                           ({"unet": ["diffusers", "DDIMScheduler"]}, "its unet is a DDIMScheduler of diffusers; only"),
                           ({"unet": ["diffusers", "logging"]}, "its unet is a logging of diffusers; only models")):
        (tmp_path / "model_index.json").write_text(json.dumps(parts))
        with pytest.raises(ValueError, match=message):
            networks.load(tmp_path)
