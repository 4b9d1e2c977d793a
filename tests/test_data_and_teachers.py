"""Data and teachers: splits, files, what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits

from lib.grid import blocks, cost, sampling
from lib.grid.model import Model
from lib.grid.plan import Plan, trailing
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


@pytest.mark.parametrize("names", [[f"train_{i}" for i in range(6)] + [f"test_{i}" for i in range(6)],
                                   [f"val-{i}" for i in range(12)], [f"a[{i}]*" for i in range(12)],
                                   [f"train/{i}" for i in range(6)] + [f"test/{i}" for i in range(6)],
                                   [f"run [v1]/{i}" for i in range(12)], [f"deep/train/x/{i}" for i in range(12)]])
def test_all_files_of_a_folder_are_read_whatever_their_names(names, tmp_path, capsys):
    for i, name in enumerate(names):
        path = tmp_path / "run [v1]" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 20 * i, np.uint8)).save(path)
    (tmp_path / "run [v1]" / "._hidden.png").write_bytes(b"no image")
    (tmp_path / "run [v1]" / "notes.pdf").write_text("words")
    found = data.load(str(tmp_path / "run [v1]"), 8, 0.25, 0)
    values = sorted(data.to_uint8(found.images[:, 0, 0, 0]).tolist())
    assert values == [20 * i for i in range(12)]
    assert "12 of 13 files are images" in capsys.readouterr().out


def test_parquet_files_are_read_whatever_their_names(folder, tmp_path):
    (tmp_path / "run [v1]").mkdir()
    for i, name in enumerate(("train-0", "test-[1]")):
        parquet(tmp_path / "run [v1]" / f"{name}.parquet", {"image": encoded(folder)[6 * i:6 * i + 6],
                                                            "labels": [i] * 6})
    found = data.load(str(tmp_path / "run [v1]"), 8, 0.25, 0)
    assert len(found.images) == 12 and torch.bincount(found.labels).tolist() == [6, 6]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    for i in range(10):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    found = data.load(str(tmp_path), 8, 0.2, 0)
    assert len(found.images[0].unique()) == 64
    np.testing.assert_allclose((found.images[0, 0].numpy() + 1) / 2, ramp / 65535, atol=1 / 255)
    Image.fromarray(ramp.astype(np.float32) / 65535).save(tmp_path / "0.tiff")
    with pytest.raises(ValueError, match=r"0\.tiff: no image that can be read \(grey values that are no whole numbers"):
        data.load(str(tmp_path), 8, 0.2, 0)


@pytest.mark.parametrize("colourful", [0, 19])
def test_one_image_in_colour_makes_all_be_read_in_colour(colourful, tmp_path):
    for i in range(20):
        grey = np.full((9, 9), 10 * i, np.uint8)
        picture = np.stack([grey, 0 * grey, grey], -1) if i == colourful else grey
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    found = data.load(str(tmp_path), 8, 0.2, 0)
    assert found.images.shape == (20, 3, 8, 8)
    for i in range(20):
        wanted = [10 * i, 0 if i == colourful else 10 * i, 10 * i]
        assert data.to_uint8(found.images[i, :, 4, 4]).tolist() == wanted


@pytest.mark.parametrize(("mode", "pixel", "seen"), [
    ("RGBA", (0, 100, 200, 0), [255, 255, 255]), ("RGBA", (0, 100, 200, 255), [0, 100, 200]), ("LA", (0, 0), [255]),
    ("LA", (40, 255), [40]), ("P", 1, [255, 255, 255])])
def test_what_is_transparent_shows_white(mode, pixel, seen, tmp_path):
    picture = Image.new(mode, (9, 9), pixel)
    if mode == "P":
        picture.putpalette([0, 0, 0, 10, 20, 30])
    for i in range(10):
        picture.save(tmp_path / f"{i}.png", **({"transparency": 1} if mode == "P" else {}))
    found = data.load(str(tmp_path), 8, 0.2, 0)
    assert data.to_uint8(found.images[0, :, 4, 4]).tolist() == seen


@pytest.mark.parametrize(("labels", "message"), [
    ([-1] * 12, r"row 0 .*: the label is -1, must lie in 0\.\.11: number the classes from 0 on"),
    ([0] * 11 + [10**10], r"row 11 .*: the label is 10000000000, must lie in 0\.\.11"),
    ([1] * 5 + [None] + [0] * 6, r"row 5 .*: no label, where the first image has one: give all images a label or none"),
    ([None] + [3] * 11, r"row 1 .*: the label is 3, where the first image has none"),
    ([0.5] * 12, r"row 0 .*: the label is 0.5, must be a whole number")])
@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_that_name_no_class_are_refused(labels, message, column, folder, tmp_path):
    records = {"image": encoded(folder), column: pd.array(labels, dtype="Int64") if None in labels else labels}
    with pytest.raises(ValueError, match=message):
        data.load(parquet(tmp_path / "all.parquet", records), 8, 0.25, 0)


def test_a_digest_is_of_all_that_a_source_holds(folder, tmp_path):
    known = {data.digest(str(folder)), data.digest("digits"), data.digest(f"hub:a/b@{'c' * 40}"),
             data.digest(f"hub:a/b@{'d' * 40}:test")}
    picture = folder / "cats" / "00.png"
    picture.rename(folder / "cats" / "x.png")
    known.add(data.digest(str(folder)))
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(folder / "cats" / "x.png")
    known.add(data.digest(str(folder)))
    known.add(data.digest(parquet(tmp_path / "all.parquet", {"image": encoded(folder)})))
    assert len(known) == 7 and data.digest(str(folder)) in known


def test_the_hub_is_asked_for_the_revision_that_nobody_named(monkeypatch):
    asked = []

    def info(_, name, repo_type, revision):
        asked.append((name, repo_type, revision))
        if len(asked) == 5:
            raise OSError("no network")
        return SimpleNamespace(sha=f"revision {len(asked)}")

    monkeypatch.setattr(data.HfApi, "repo_info", info)
    assert data.digest("hub:a/b:test") != data.digest("hub:a/b:test"), "the repository has moved on"
    assert data.digest("hub:a/b@main") != data.digest("hub:a/b"), "a branch moves"
    with pytest.raises(ValueError, match="which revision hub:a/b is .OSError.: name one, hub:a/b@REVISION"):
        data.digest("hub:a/b", "model")
    assert asked == [("a/b", "dataset", None), ("a/b", "dataset", None), ("a/b", "dataset", "main"),
                     ("a/b", "dataset", None), ("a/b", "model", None)]


def captions(folder, rows, name="metadata.jsonl"):
    if name.endswith("csv"):
        pd.DataFrame(rows).to_csv(folder / name, index=False)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_captions_gives_a_prompt_each(name, folder, tmp_path):
    files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.png"))]
    rows = captions(folder, [{"file_name": file, "text": f"picture {i}, framed"} for i, file in enumerate(files)][::-1],
                    name)
    found = data.load(str(folder), 8, 0.25, 0)
    assert found.prompts == tuple(f"picture {i}, framed" for i in range(12)) and found.labels.any()
    records = {"image": encoded(folder), "caption": [row["text"] for row in rows[::-1]]}
    assert data.load(parquet(tmp_path / "all.parquet", records), 8, 0.25, 0).prompts == found.prompts


@pytest.mark.parametrize(("change", "message"), [
    (lambda rows: rows.pop(), r"11.png: no prompt, where the first image has one: give all images a prompt or none"),
    (lambda rows: rows[3].update(file_name="9.png"), r"metadata.jsonl, row 3: there is no .*9.png. Mend the row"),
    (lambda rows: rows.append(rows[3] | {"text": "another"}),
     r"metadata.jsonl, row 12: .*3.png has a prompt already, 'a picture'. Leave one of them"),
    (lambda rows: rows[4].update(file_name=f"./{rows[3]['file_name']}"), "row 4: .*3.png has a prompt already"),
    (lambda rows: rows[4].update(text=4), "the prompt is 4, must be text"),
    (lambda rows: rows[4].update(text=" "), "the prompt is ' ', must be text"),
    (lambda rows: rows[0].update(title=rows[0].pop("text")), "metadata.jsonl must have file_name and one of text, "),
    (lambda rows: rows.clear(), "metadata.jsonl must have file_name and one of text, prompt, caption in each row")])
def test_captions_that_cannot_be_read_are_refused(change, message, folder):
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    rows = [{"file_name": str(file.relative_to(folder)), "text": "a picture"} for file in files]
    change(rows)
    captions(folder, rows)
    with pytest.raises(ValueError, match=message):
        data.load(str(folder), 8, 0.25, 0)


def test_an_image_with_captions_in_two_files_is_refused(folder):
    rows = [{"file_name": str(file.relative_to(folder)), "text": "a picture"} for file in folder.rglob("*.png")]
    captions(folder, rows)
    captions(folder, rows, "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 0: .*png has a prompt already"):
        data.load(str(folder), 8, 0.25, 0)


def test_no_label_at_all_is_none(folder, tmp_path):
    records = {"image": encoded(folder), "label": pd.array([None] * 12, dtype="Int64")}
    assert not data.load(parquet(tmp_path / "all.parquet", records), 8, 0.25, 0).labels.any()


def test_what_a_study_cannot_show_is_refused_in_a_sentence(folder):
    with pytest.raises(ValueError, match="class 0 has 6 images, and the study wants 12 of each"):
        data.load(str(folder), 8, 0.25, 0).check_enough()
    few = data.load("digits", 8, 0.005, 0)
    with pytest.raises(ValueError, match="9 images are held out, and the study wants 16: raise held_out"):
        few.check_enough()


def test_what_is_no_data_set_is_refused_by_name(folder, tmp_path):
    pictures = encoded(folder)
    broken = [*pictures[:7], {"bytes": pictures[7]["bytes"][:40], "path": "7.png"}, *pictures[8:]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    refused = {
        "digit": "none of 'digits', 'letters', a file or folder that exists. A data set of the Hugging Face hub",
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
    networks.save(tmp_path, Model(unet, schedule))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))
    again = networks.load(tmp_path)
    plan = Plan.random(0.5, 0, teacher)
    assert torch.equal(sampling.sample(again, plan, noise), sampling.sample(Model(unet, schedule), plan, noise))
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
    loss = networks.denoising_loss(networks.Samples(images), schedule, 7)(oracle, torch.Generator().manual_seed(0), 0.0)
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
    loaded = networks.load(tmp_path / "ddpm")
    described = blocks.describe(loaded.network)
    teacher = Plan.full(trailing(8, 1000), loaded.noise_schedule, described)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert analysis.similarity(loaded, teacher, noise).shape[1] == len(described)
    costs = cost.count_model(loaded)
    plan = Plan.deepcache(3, described.branch(2), teacher)
    assert costs.executed(plan) < costs.executed(teacher)
    assert sampling.sample(loaded, plan, noise).shape == (2, 3, 16, 16)


def test_pipelines_of_other_things_are_refused(tmp_path):
    for parts, message in (({"_class_name": "Thing", "vae": ["diffusers", "AutoencoderKL"]}, "a Thing without unet"),
                           ({"unet": ["os", "system"]}, "its unet is a system of os; only models and schedulers of"),
                           ({"unet": ["diffusers", "DDIMScheduler"]}, "its unet is a DDIMScheduler of diffusers; only"),
                           ({"unet": ["diffusers", "logging"]}, "its unet is a logging of diffusers; only models")):
        (tmp_path / "model_index.json").write_text(json.dumps(parts))
        with pytest.raises(ValueError, match=message):
            networks.load(tmp_path)
