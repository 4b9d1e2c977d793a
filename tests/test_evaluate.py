"""Scores: torch-fidelity's numbers, and intervals that mean what they say."""

import copy

import numpy as np
import pytest
import torch
import torch_fidelity

from lib.grid.plan import Plan
from lib.judging import evaluate, extractor
from lib.judging.evaluate import Bank, Judge, distance, interval, jackknife
from lib.teachers import data


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("extractor")
    extractor.save(folder, extractor.Classifier(1, 16, 10))
    return extractor.load(folder)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", 16, 0.25, 0)


class Pixels(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = data.to_uint8(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row]


def test_distance_and_the_rest_are_torch_fidelitys(classifier, digits):
    a, b = digits.images[:900], digits.images[900:]
    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(a), input2=Pixels(b), cuda=False, feature_extractor=classifier.name, fid=True, kid=True, prc=True,
        kid_subsets=20, kid_subset_size=897, save_cpu_ram=True, verbose=False)
    first, second = (extractor.embed(classifier, part) for part in (a, b))
    ours = Judge(second, "it").further(first)
    assert distance(first, second) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid_x1e3"] == pytest.approx(1e3 * theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])


def test_the_distance_of_two_gaussians_is_the_formulas():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(mean + scale * rng.standard_normal((200_000, 2))) for mean, scale in ((0, 1), (1, 2)))
    assert distance(a, b) == pytest.approx(2 * 1**2 + 2 * (1 - 2) ** 2, rel=0.02)


def test_the_jackknifes_interval_of_a_mean_is_the_textbooks():
    sample = torch.from_numpy(np.random.default_rng(1).gamma(9.0, 1.0, (2000, 1)))
    estimate = interval(jackknife(lambda s: float(s.mean()), sample))
    half = 2.093 * float(sample.std()) / np.sqrt(2000)  # t with 19 degrees of freedom
    assert estimate.value == pytest.approx(float(sample.mean()))
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.4)


def test_intervals_of_paired_ratios_cover_the_truth():
    """Two generators whose true distances are 1 and 2, from common noise: of 40 intervals about 38 hold the ratio 2."""
    rng, hits = np.random.default_rng(2), 0
    judge = Judge(torch.from_numpy(rng.standard_normal((50_000, 2))), "it")
    one = torch.tensor([1.0, 0.0])
    for _ in range(40):
        noise = torch.from_numpy(rng.standard_normal((1000, 2)))
        ratio = judge.ratio(noise + np.sqrt(2) * one, noise + one)
        hits += ratio.low <= 2 <= ratio.high
    assert hits >= 34


def test_a_ratio_to_itself_is_one_and_pairs_beat_independent_noise():
    rng = np.random.default_rng(3)
    real, a = (torch.from_numpy(rng.standard_normal((2000, 3))) for _ in range(2))
    a = a + 0.5
    judge = Judge(real, "it")
    same = judge.ratio(a, a)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    paired = judge.ratio(a * 1.01, a)
    apart = judge.ratio(a[torch.randperm(2000)] * 1.01, a)
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_an_interpolated_control_lies_between_its_two_plans():
    rng = np.random.default_rng(4)
    real = torch.from_numpy(rng.standard_normal((2000, 2)))
    near, far = real + 0.5, real + 1.0
    judge = Judge(real, "it")
    middle = judge.compare([(near, 0.5), (far, 0.5)], [(near, 1.0)])
    assert middle.value == pytest.approx(np.sqrt(distance(far, real) / distance(near, real)), rel=1e-6)


def test_a_bank_samples_once_and_keeps_features(unet, schedule, teacher, classifier, tmp_path, monkeypatch):
    def bank(**options):
        return Bank("report", unet, schedule, classifier, count=5, seed=0, precision="fp32", work=tmp_path, **options)

    plan = Plan.few_steps(2, "uniform", teacher)
    features = bank().features(plan)
    assert torch.equal(features, extractor.embed(classifier, bank().images(plan, 5)))
    first = bank()
    first.features(plan)
    first.save(tmp_path / "features.safetensors")
    monkeypatch.setattr(evaluate.sampling, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert torch.equal(bank().features(plan), features), "from the work folder"
    for file in tmp_path.glob("report-*/*"):
        file.unlink()
    known = [tmp_path / "features.safetensors"]
    assert torch.equal(bank(known=known).features(plan), features), "from an earlier stage"
    other = Bank("report", unet, schedule, classifier, count=5, seed=1, precision="fp32", work=tmp_path, known=known)
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        other.features(plan)


def test_the_extractor_comes_back_from_its_folder_and_rounds_to_pixels(classifier, digits, tmp_path):
    trained_on_cuda = copy.deepcopy(classifier).to(memory_format=torch.channels_last)
    extractor.save(tmp_path, trained_on_cuda)
    again = extractor.load(tmp_path)
    assert again.name == classifier.name
    images = digits.images[:50]
    assert torch.equal(extractor.embed(again, images), extractor.embed(classifier, data.to_uint8(images)))
    with pytest.raises(FileNotFoundError, match="00_teacher_training makes it"):
        extractor.load(tmp_path / "none")


def test_a_shrunk_covariance_is_sound_where_a_plain_one_is_not():
    """40 samples of 64 features: nearer to the truth (the unit matrix), and no direction of no variance."""
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    plain, shrunk = (evaluate.statistics(features, shrink)["sigma"] for shrink in (False, True))
    assert np.linalg.norm(shrunk - np.eye(64)) < np.linalg.norm(plain - np.eye(64)) / 3
    assert np.linalg.eigvalsh(shrunk).min() > 0.1 > np.linalg.eigvalsh(plain).min()


@pytest.mark.parametrize("kind", evaluate.KINDS)
def test_imitation_is_nothing_for_the_teacher_and_grows_with_the_distance(kind):
    generator = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(200, 64, generator=generator) for _ in range(2))
    errors = [evaluate.imitation(teacher + scale * noise, teacher, kind) for scale in (0, 0.5, 1)]
    assert errors[0] == pytest.approx(0, abs=1e-6) and errors[0] < errors[1] < errors[2]


def test_paired_distance_is_the_mean_squared_gap():
    teacher = torch.zeros(10, 4)
    assert evaluate.imitation(teacher + 2, teacher, "paired") == 16


def test_rank_agreement_is_1_for_the_same_order_and_falls_with_fewer_images():
    generator = torch.Generator().manual_seed(0)
    real, teacher = (torch.randn(500, 8, generator=generator) for _ in range(2))
    shifts = np.linspace(0, 0.6, 8)
    plans = [torch.randn(500, 8, generator=generator) + float(shift) for shift in shifts]
    found = evaluate.rank_agreement(plans, shifts, Judge(real, "it"), teacher, [10, 500], seed=0)
    tau = found.set_index(["kind", "images"])["tau"]
    assert set(found["kind"]) == {*evaluate.KINDS, "score"}
    assert tau["rfid", 500] == pytest.approx(1) == tau["score", 500] and tau["rfid, shrunk", 10] < 0.99
