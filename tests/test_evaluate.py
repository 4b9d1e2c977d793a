"""Scores: torch-fidelity's numbers, and intervals that mean what they say."""

import copy
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
import torch_fidelity
from safetensors.torch import load_file
from simulation import covered, simulate
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from lib.grid.model import Model
from lib.grid.plan import Plan
from lib.judging import banks, estimates, evaluate, extractor, trainings
from lib.judging.banks import Bank
from lib.judging.estimates import Contrast, Estimate, Score, jackknife, pseudo_values
from lib.judging.evaluate import Judge, distance
from lib.judging.trainings import Trainings
from lib.teachers import data
from lib.teachers.latents import Coder
from lib.teachers.text import Text


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("extractor")
    extractor.save(folder, extractor.Extractor("classes", 1, 16, [10]), extractor.Extractor("denoising", 1, 16, [256]))
    return extractor.load(folder)


@pytest.fixture(scope="module")
def classifier(extractors):
    return extractors[0]


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
    estimate = Estimate.of(pseudo_values(jackknife(lambda s: float(s.mean()), sample)))
    half = 2.093 * float(sample.std()) / np.sqrt(2000)  # t with 19 degrees of freedom
    assert estimate.value == pytest.approx(float(sample.mean()))
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.4)


def test_the_bias_of_a_variance_over_n_is_taken_out():
    """The maximum-likelihood variance is (n - 1) / n of the unbiased one: the jackknife gives just that."""
    sample = torch.from_numpy(np.random.default_rng(1).normal(size=(20, 1)))
    values = jackknife(lambda s: float(s.var(unbiased=False)), sample)
    assert Estimate.of(pseudo_values(values)).value == pytest.approx(float(sample.var()))
    assert estimates.uncorrected(values).value == pytest.approx(float(sample.var(unbiased=False)))


def test_intervals_cover_the_true_distance_and_a_perfect_sampler_is_at_the_floor():
    """From a bootstrap of real features: the whole simulation is in tests/benchmarks/bench_coverage.py."""
    pixels = data.digits(8)[0].flatten(1).double()
    axes = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False).Vh[:8]
    real = (pixels - pixels.mean(0)) @ axes.T
    true, scores = simulate(real / real.std(), ["perfect", "moved", "narrowed", "noisy"], n=200, runs=60)
    for name, found in scores.items():
        assert covered(true[name], [one.estimate for one in found]) >= 0.9, name
        assert np.mean([one.estimate.value for one in found]) == pytest.approx(true[name], abs=0.03), name
    assert np.mean([one.raw for one in scores["perfect"]]) > 0.1, "as it comes"
    assert np.mean([one.above_floor for one in scores["perfect"]]) <= 0.07
    ratios = [compare(a, b, 200).ratio for a, b in zip(scores["noisy"], scores["moved"])]
    given = [one for one in ratios if not np.isnan(one.value)]
    assert len(given) > 50 and covered(true["noisy"] / true["moved"], given) >= 0.87


def compare(mine, theirs, n):
    return Contrast.of([(mine, 1.0)], [(theirs, 1.0)], n)


def scored(value, error, seed=0):
    """A score of a given value whose interval reaches `error` to either side."""
    draws = np.random.default_rng(seed).normal(size=20)
    draws = (draws - draws.mean()) / draws.std(ddof=1)
    return Score(value + 0.3, value + draws * error * np.sqrt(20) / 2.093)


def other(value, error):
    return scored(value, error, seed=1)


@pytest.mark.parametrize(("mine", "theirs", "word", "holds"), [
    (scored(1.0, 0.01), other(1.2, 0.01), "better", "yes"), (scored(1.2, 0.01), other(1.0, 0.01), "worse", "no"),
    (scored(1.02, 0.002), other(1.0, 0.002), "worse", "yes"), (scored(1.0, 0.01), other(1.0, 0.01), "as good", "yes"),
    (scored(1.0, 0.2), other(1.0, 0.2), "undecided", "undecided"),
    (scored(0.0, 0.01), other(0.0, 0.01), "as good", "yes"),  # a margin of 0.05 decides at the floor
    (scored(0.0, 0.1), other(0.01, 0.1), "undecided", "undecided"), (scored(0.5, 0.1), other(0.0, 0.1), "worse", "no")])
def test_words_mean_one_thing(mine, theirs, word, holds):
    found = compare(mine, theirs, 100)
    assert (found.word, found.holds) == (word, holds)
    assert np.isnan(found.ratio.value) == (not (mine.above_floor and theirs.above_floor))
    assert (found.needed <= 100) == (word != "undecided")
    assert (found.needed_to_hold <= 100) == (holds != "undecided")


def test_the_margin_at_the_floor_hangs_on_no_number_of_images():
    generator = torch.Generator().manual_seed(0)
    real = 3 * torch.randn(3000, 4, generator=generator)
    judge = Judge(real, "it")
    found = [judge.over(real[:n], real[:n] + 0.01) for n in (300, 3000)]
    assert all(np.isnan(one.ratio.value) for one in found)
    assert [one.margin for one in found] == pytest.approx(2 * [0.05 * float(real.var(dim=0).mean())])


def test_too_few_images_for_a_judge_are_refused():
    with pytest.raises(ValueError, match="60 images are too few for it's 64 features: raise score_images"):
        Judge(torch.randn(500, 64), "it").score(torch.randn(60, 64))


def test_trainings_say_whether_all_pairs_agree():
    generator = torch.Generator().manual_seed(0)
    real, noise = (torch.randn(2000, 3, generator=generator) for _ in range(2))
    judge, (near, far, there) = Judge(real, "it"), (noise + 0.5, noise + 0.7, noise)
    found = judge.trainings([near, far], [far, far])
    assert found["ratio"] == pytest.approx(np.sqrt(found["least"] * found["greatest"])) and not found["agree"]
    assert judge.trainings([near, near], [far])["agree"]
    for some in ([near, there], [there, near]):
        floor = judge.trainings(some, [far, far])
        assert np.isnan(floor["least"]) and np.isnan(floor["greatest"]), "whichever comes first"
        assert (floor["ratio_word"], floor["agree"]) == ("better", True)
        assert estimates.text(floor, "ratio").endswith("] more") and "nan" not in estimates.text(floor, "ratio")


def test_kinds_of_networks_are_scored_training_by_training(tmp_path):
    generator = torch.Generator().manual_seed(0)
    real, noise = (torch.randn(2000, 3, generator=generator) for _ in range(2))
    first, second = Judge(real, "first"), Judge(real + 0.1, "second")
    shifts = {"mine": [0.5, 0.7], "theirs": [0.6]}
    banks = {name: [Mock(extractors={"first": None, "second": None},
                         features=lambda plan, title, by, shift=shift: (noise + shift) * (2 if by == "second" else 1))
                    for shift in some] for name, some in shifts.items()}
    found = Trainings.of(banks, "plan")
    near, far, between = noise + 0.5, noise + 0.7, noise + 0.6
    single = [first.score(features).estimate.value for features in (near, far)]
    assert found.score("mine", first).estimate.value == pytest.approx(np.sqrt(np.prod(single)))
    assert found.compare("mine", "theirs", first) == first.trainings([near, far], [between])
    assert found.compare("theirs", "mine", second) == second.trainings([2 * between], [2 * near, 2 * far])
    found.save(tmp_path / "features.safetensors")
    saved = load_file(tmp_path / "features.safetensors")
    assert {name: tuple(some.shape) for name, some in saved.items()} == {
        f"{by}/{name}": (len(some), 2000, 3) for by in ("first", "second") for name, some in shifts.items()}
    assert torch.equal(saved["second/mine"][1], 2 * far)


def test_trainings_on_both_sides_decide_nothing():
    rows = [{"ratio_word": word, "agree": agree} for word in ("better", "as good", "worse") for agree in (True, False)]
    assert [trainings.word(row) for row in rows] == ["better", "undecided", "as good", "as good", "worse", "undecided"]


def test_what_is_needed_decides():
    near = compare(scored(1.0, 0.2), other(1.2, 0.2), 100)
    assert near.word == "undecided"
    shrink = np.sqrt(100 / (1.01 * near.needed))
    assert compare(scored(1.0, 0.2 * shrink), other(1.2, 0.2 * shrink), 100).word != "undecided"
    shrink = np.sqrt(100 / (0.97 * near.needed))
    assert compare(scored(1.0, 0.2 * shrink), other(1.2, 0.2 * shrink), 100).word == "undecided"


def test_a_ratio_to_itself_is_one_and_pairs_beat_independent_noise():
    rng = np.random.default_rng(3)
    real, a = (torch.from_numpy(rng.standard_normal((2000, 3))) for _ in range(2))
    a = a + 0.5
    judge = Judge(real, "it")
    same = judge.over(a, a).ratio
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    paired = judge.over(a * 1.01, a).ratio
    apart = judge.over(a[torch.randperm(2000)] * 1.01, a).ratio
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_an_interpolated_control_lies_between_its_two_plans():
    rng = np.random.default_rng(4)
    real = torch.from_numpy(rng.standard_normal((2000, 2)))
    near, far = real + 0.5, real + 1.0
    judge = Judge(real, "it")
    values = [judge.score(one).estimate.value for one in (near, far)]
    middle = judge.blend([(near, 0.5), (far, 0.5)])
    assert middle.estimate.value == pytest.approx(np.sqrt(values[0] * values[1]), rel=1e-6)
    assert judge.compare([(near, 0.5), (far, 0.5)], [(near, 1.0)]).ratio.value == pytest.approx(
        np.sqrt(values[1] / values[0]), rel=1e-6)
    product = judge.compare([(near, 1.0), (far, 1.0)], [(near, 1.0), (near, 1.0)])
    assert product.ratio.value == pytest.approx(values[1] / values[0])
    sums = judge.compare([(real, 1.0), (far, 1.0)], [(near, 1.0), (near, 1.0)])
    assert np.isnan(sums.ratio.value), "no product with what may be 0, and none beside a sum"
    floored = judge.score(real).estimate.value
    assert sums.difference.value == pytest.approx(floored + values[1] - 2 * values[0])
    floor = judge.blend([(real, 0.5), (far, 0.5)]).estimate.value
    assert floor == pytest.approx((judge.score(real).estimate.value + values[1]) / 2), "a sum, where one may be 0"


def test_precision_and_recall_are_a_slow_ones_with_each_block_left_out():
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(150, 4, generator=generator), 1.2 * torch.randn(120, 4, generator=generator)
    for found, name in zip(evaluate.precision_and_recall(made, real), ("precision", "recall")):
        values = jackknife(lambda part: prc_features_to_metric(part, real, verbose=False)[name], made)  # noqa: B023
        slow = estimates.uncorrected(values)
        assert (found.value, found.low, found.high) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-6), name


def test_judges_that_contradict_each_other_are_found():
    a, b, c = scored(1.0, 0.01), other(1.2, 0.01), other(1.0, 0.5)
    found = evaluate.disagreements({"one": (a, b), "two": (b, a), "three": (c, c)}, 100)
    assert found[["better", "worse"]].to_numpy().tolist() == [["one", "two"]]
    assert found["first"][0] == pytest.approx(1 / 1.2) and found["second"][0] == pytest.approx(1.2)


def test_a_bank_samples_once_and_keeps_features(unet, schedule, teacher, extractors, tmp_path, monkeypatch):
    def bank(**options):
        usual = {"count": 5, "seed": 0, "precision": "fp32", "work": tmp_path}
        return Bank("report", Model(unet, schedule), extractors, **usual | options)

    plan, (first_judge, second_judge) = Plan.few_steps(2, "uniform", teacher), extractors
    features = bank().features(plan)
    assert torch.equal(features, extractor.embed(first_judge, bank().images(plan, 5)))
    first = bank()
    first.features(plan)
    first.save(tmp_path / "features.safetensors")
    ended = bank(seed=2, work=tmp_path / "ended")
    shutil.rmtree(tmp_path / "ended")  # as a stage does that ends
    assert len(ended.features(plan)) == 5 and not (tmp_path / "ended").exists()
    monkeypatch.setattr(banks.sampling, "sample", lambda *_, **__: pytest.fail("sampled again"))
    seen = bank().features(plan, by=second_judge.name)
    assert torch.equal(bank().features(plan), features), "from the work folder"
    for file in tmp_path.glob("report-*/*"):
        file.unlink()
    known = [tmp_path / "features.safetensors"]
    assert torch.equal(bank(known=known).features(plan), features), "from an earlier stage"
    assert torch.equal(bank(known=known).features(plan, by=second_judge.name), seen), "both judges'"
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        bank(seed=1, known=known).features(plan)
    monkeypatch.setattr(banks, "version", lambda library: "another")
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        bank(known=known).features(plan)


def test_a_bank_refuses_images_that_are_not_numbers(unet, schedule, teacher, extractors, tmp_path):
    broken = copy.deepcopy(unet)
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("inf"))
    bank = Bank("report", Model(broken, schedule), extractors, count=2, seed=0, precision="fp32", work=tmp_path)
    with pytest.raises(FloatingPointError, match="of 2 steps are not numbers in precision fp32"):
        bank.features(Plan.few_steps(2, "uniform", teacher))


def test_the_extractors_come_back_from_their_folder_and_round_to_pixels(extractors, digits, tmp_path):
    trained_on_cuda = [copy.deepcopy(one).to(memory_format=torch.channels_last) for one in extractors]
    extractor.save(tmp_path, *trained_on_cuda)
    again = extractor.load(tmp_path)
    assert [one.name for one in again] == [one.name for one in extractors]
    assert [one.name.partition("-")[0] for one in again] == ["classifier", "denoiser"]
    images = digits.images[:50]
    for one in again:
        assert torch.equal(extractor.embed(one, images), extractor.embed(one, data.to_uint8(images)))
    with pytest.raises(FileNotFoundError, match="00_teacher_training makes it"):
        extractor.load(tmp_path / "none")


def test_any_of_torch_fidelitys_extractors_may_be_the_second_judge(classifier, digits, tmp_path):
    extractor.save(tmp_path, classifier, f"torch-fidelity:{classifier.name}")
    _, borrowed = extractor.load(tmp_path)
    images = digits.images[:20]
    assert borrowed.name == classifier.name
    assert torch.equal(extractor.embed(borrowed, images), extractor.embed(classifier, images))
    extractor.save(tmp_path, classifier, "torch-fidelity:nonsense")
    with pytest.raises(ValueError, match="no extractor 'nonsense'; it has: .*dinov2-vit-s-14"):
        extractor.load(tmp_path)
    extractor.save(tmp_path, classifier, "torch-fidelity:inception-v3-compat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "create_feature_extractor", Mock(side_effect=OSError("no network")))
        with pytest.raises(ValueError, match="weights of inception-v3-compat cannot be had .no network"):
            extractor.load(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP model in a folder, with tiny.text_parts' words: a digit."""
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip(folder)
    return folder


def test_a_clip_model_may_be_the_second_judge_and_its_features_are_transformers(classifier, clip, digits, tmp_path):
    extractor.save(tmp_path, classifier, f"clip:{clip}")
    _, judge = extractor.load(tmp_path)
    assert judge.name.startswith("clip-") and judge.name == extractor.load(tmp_path)[1].name
    stock = CLIPModel.from_pretrained(clip).eval()
    pixels = data.to_uint8(digits.images[:6])
    with torch.no_grad():
        prepared = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)(
            [image.expand(3, -1, -1) for image in pixels], return_tensors="pt")
        seen = stock.get_image_features(**prepared).pooler_output
        words = AutoTokenizer.from_pretrained(clip)
        tokens = words(["a digit", "digit"], padding=True, return_tensors="pt")
        said = stock.get_text_features(**tokens).pooler_output
    features = extractor.embed(judge, pixels)
    torch.testing.assert_close(features, seen / seen.norm(dim=1, keepdim=True), atol=2e-2, rtol=0)  # 8 bits, resized
    torch.testing.assert_close(judge.read(["a digit", "digit"]), said / said.norm(dim=1, keepdim=True))
    assert judge.read(["a digit " * 50]).shape == (1, 12), "what is too long is cut"
    with pytest.raises(ValueError, match="no CLIP model can be had from .*nowhere"):
        extractor.check_judge(f"clip:{tmp_path / 'nowhere'}", digits)


def test_prompts_without_attributes_are_judged_by_clip(classifier, clip, digits, tmp_path):
    parts = tiny.text_parts()
    text = Text(parts["text_encoder"], parts["tokenizer"])
    model = Model(parts["unet"], parts["scheduler"], Coder(parts["vae"]), text, ("a digit", "digit a"), guidance=2.0)
    judge = extractor.Clip(str(clip)).eval()
    usual = {"count": 40, "seed": 0, "precision": "fp32", "work": tmp_path}
    bank = Bank("report", model, (classifier, judge), **usual)
    measure = evaluate.prompts_of(bank, digits_with(digits, model.prompts))
    features = torch.nn.functional.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    by_hand = [1 - max(0.0, float(one @ said)) for one, said in zip(features, judge.read(model.said(bank.noise())))]
    assert measure.extractor == judge.name
    assert measure.score(features).estimate.value == pytest.approx(np.mean(by_hand))
    perfect = measure.score(judge.read(model.said(bank.noise())))
    assert perfect.estimate.value == pytest.approx(0, abs=1e-6)
    half_a_point = measure.over(features, features)
    assert half_a_point.word == "as good" and half_a_point.margin == pytest.approx(0.005)
    without = Bank("report", model, (classifier,), **usual)
    assert evaluate.prompts_of(without, digits_with(digits, model.prompts)) is None


def digits_with(digits, prompts):
    return replace(digits, prompts=tuple(prompts[row % len(prompts)] for row in range(len(digits.images))))


def test_extractors_learn_their_tasks_and_a_judge_that_cannot_be_is_refused(digits, tmp_path):
    fit = {"steps": 250, "seed": 0, "device": "cpu", "precision": "fp32"}
    unlabelled = data.DataSet("mine", digits.images, torch.full_like(digits.labels, 2), digits.train, digits.held_out)
    made = {task: extractor.fit(unlabelled, task, work=tmp_path / task, **fit) for task in ("classes", "denoising")}
    assert made["classes"].name.startswith("turns"), "without labels, how images were turned"
    with torch.no_grad():
        seen = digits.images[digits.held_out]
        noisy = seen + 0.5 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
        cleaned = made["denoising"](noisy)[1].unflatten(1, seen.shape[1:])
        told = made["classes"](torch.cat([seen.rot90(quarters, (2, 3)) for quarters in range(4)]))[1].argmax(dim=1)
    assert (told.view(4, -1) == torch.arange(4)[:, None]).float().mean() > 0.8, "turns of images that it never saw"
    ignorant = (digits.images[digits.train].mean(0) - seen).square().mean()  # the mean image, whatever it is shown
    assert (cleaned - seen).square().mean() < 0.8 * ignorant
    assert extractor.embed(made["denoising"], seen).var(dim=0).mean() == pytest.approx(1, rel=0.2)
    with pytest.raises(ValueError, match="the first judge learns rotation already"):
        extractor.check_judge("rotation", unlabelled)
    with pytest.raises(ValueError, match="the first judge learns rotation already"):
        extractor.check_judge("rotation", replace(unlabelled, labels=unlabelled.labels + 3))
    extractor.check_judge("rotation", digits)
    with pytest.raises(ValueError, match="no extractor 'nonsense'"):
        extractor.check_judge("torch-fidelity:nonsense", digits)


@pytest.mark.parametrize(("ends", "said"), [
    ((1.59, 1.32, 1.92), "1.59 [1.32, 1.92]"), ((1.0012, 0.9988, 1.0034), "1.001 [0.9988, 1.003]"),
    ((2, 2, 2), "2 [2, 2]"), ((0.0, -0.1, 0.1), "0 [-0.1, 0.1]"), ((-0.5, -0.75, -0.25), "-0.5 [-0.75, -0.25]")])
def test_an_estimate_is_written_so_that_its_ends_differ(ends, said):
    assert estimates.text(dict(zip(("ratio", "ratio_low", "ratio_high"), ends)), "ratio") == said


@pytest.mark.parametrize(("ends", "said"), [
    ((0.5, 0.25, 0.75), "higher by 0.5 [0.25, 0.75]"), ((0.0, -0.1, 0.1), "higher by 0 [-0.1, 0.1]"),
    ((-0.5, -0.75, 0.25), "lower by 0.5 [-0.25, 0.75]")])
def test_a_difference_says_which_way_it_goes(ends, said):
    assert estimates.shift(dict(zip(("gap", "gap_low", "gap_high"), ends)), "gap") == said


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


def test_the_share_of_prompts_missed_is_a_score_with_an_interval():
    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(5, (2000, 3), generator=draw)
    wrong = torch.rand(2000, generator=draw) < 0.2
    told = asked.clone()
    told[wrong, 1] = (told[wrong, 1] + 1) % 5
    score = evaluate.missed(told, asked)
    assert [score.raw, score.estimate.value] == pytest.approx([float(wrong.float().mean())] * 2)
    spread = 1.96 * (0.2 * 0.8 / 2000) ** 0.5
    assert score.estimate.high - score.estimate.low == pytest.approx(2 * spread, rel=0.35)
    assert evaluate.missed(asked, asked).estimate.high == 0
    over = Contrast.of([(score, 1.0)], [(evaluate.missed(asked, asked), 1.0)], 2000)
    assert np.isnan(over.ratio.value) and over.holds == "no" and over.difference.value == pytest.approx(score.raw)
    few = asked.clone()
    few[::50, 0] += 1  # 2 in 100 images
    over = Contrast.of([(evaluate.missed(few, asked), 1.0)], [(evaluate.missed(asked, asked), 1.0)], 2000)
    assert over.holds == "yes" and over.word == "worse"


def test_nearness_to_a_teacher_is_the_paired_distance_and_compares():
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(1000, 4, generator=draw)
    near, far = (teacher + spread * torch.randn(1000, 4, generator=draw) for spread in (0.1, 0.3))
    measure = evaluate.Nearness(teacher, "it")
    assert measure.score(far).estimate.value == pytest.approx(evaluate.paired(far, teacher).value)
    over = measure.over(far, near)
    assert over.word == "worse" and over.ratio.value == pytest.approx(9, rel=0.15)
    assert measure.over(near, near).word == "as good"


def test_a_classifier_tells_each_attribute_from_features():
    torch.manual_seed(0)
    one = extractor.Extractor("classes", 3, 32, [4, 2, 3]).eval()
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    one.scale.fill_(2.5)
    outputs = one(images)[1].split([4, 2, 3], dim=1)
    told = one.told(one(images)[0])
    assert told.tolist() == torch.stack([part.argmax(1) for part in outputs], dim=1).tolist()
    assert extractor.read(one, images).shape == (6, 3)
