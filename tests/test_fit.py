"""A budget in, a plan out: on tiny stock pipelines, killed and resumed, from the command line."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from diffusers import (
    DDIMPipeline,
    DDPMScheduler,
    FlowMatchHeunDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    StableDiffusionPipeline,
)
from PIL import Image

from lib.apply import Planned
from lib.fit import Budget, fit
from lib.grid.pipelines import Requests
from lib.grid.plan import Plan, PlanError
from lib.judging import pairs
from lib.judging.estimates import Contrast, Estimate
from lib.methods import fitting
from lib.methods.fitting import Effort, Fitting, Timing
from lib.study import certificate, paths
from lib.teachers import files

SMALL = Effort(steps=10, trials=6, population=4, search_images=2, select_images=2, report_images=3, rounds=2)
PROMPTS = ["a digit", "digit", "a", "a a digit"]


def options_of(options, *left_out):
    """A tiny pipeline's options without those that a fit gives itself."""
    return {name: value for name, value in options.items() if name not in ("output_type", *left_out)}


def requests_of(pipe, options, said=(), batch=1):
    return {bank: Requests(pipe, said, options, batch) for bank in ("search", "select", "report")}


@pytest.mark.parametrize(("kind", "prompts", "batch", "guided"), [
    (tiny.stable_diffusion, PROMPTS, 2, True), (tiny.stable_diffusion_xl, [], 1, True),
    (tiny.ddim_pixels, [], 2, False), (tiny.dit, [3, 5], 2, False), (tiny.stable_diffusion_3, [], 1, True),
    (tiny.flux, [], 1, False)])
def test_a_plan_for_a_budget(kind, prompts, batch, guided, tmp_path, monkeypatch):
    monkeypatch.setattr(Fitting, "_time", steady)
    pipe, options = tiny.made(kind)
    own = options_of(options, "prompt", "class_labels")
    own |= {"guidance_scale": 4.0} if guided else {}
    out = tmp_path / "plan.json"
    plan = fit(pipe, "2.5x", out, prompts=prompts, options=own, batch=batch, effort=SMALL)
    assert plan == Plan.load(out) and len(plan.grid) == SMALL.steps
    found = json.loads((tmp_path / "plan.certificate.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["fitted plan"]["macs"] < rows["full run"]["macs"]
    fewer, = (name for name in rows if name.startswith("fewer steps"))
    controls = set(" = ".join(found["beside"]).split(" = "))
    assert {"fewer steps", "searched steps"} <= controls, "alone, or as one"
    costs = [(row["steps"], row["macs"], row["PSNR"]) for name, row in rows.items() if name in found["beside"]]
    assert len(set(costs)) == len(costs), "no control stands twice"
    for name in found["beside"]:
        assert Plan.load(out.with_suffix(certificate.control_suffix(name))).steps == rows[name]["steps"]
    assert {"PSNR", "SSIM", "pyramid"} <= set(rows[fewer])
    assert "full run" in " ".join(found["verdict"]) and "<img" in (tmp_path / "plan.html").read_text()
    assert not list(tmp_path.glob("*.unfinished")) and not pipe.scheduler.__class__.__name__.startswith("_")
    with Planned(pipe, plan):
        assert np.isfinite(tiny.call(pipe, options, **({"guidance_scale": 4.0} if guided else {}))).all()


def test_a_killed_fit_goes_on_to_the_same_plan(tmp_path, monkeypatch):
    pipe, options = tiny.made(tiny.stable_diffusion)
    own = options_of(options, "prompt") | {"guidance_scale": 4.0}
    monkeypatch.setattr(Fitting, "_time", steady)

    def run(name):
        return fit(pipe, "0.3", tmp_path / f"{name}.json", prompts=PROMPTS, options=own, batch=2, effort=SMALL)

    whole, calls, real = run("whole"), [], fitting.Distance.__call__

    def killed(self, plan):
        calls.append(plan.key)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(self, plan)

    def seeing(self, plan):
        if self.bank == "search":
            seen.append(plan.key)
        return real(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Distance, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    assert list(tmp_path.glob("broken.unfinished/*/search.journal"))
    seen = []
    monkeypatch.setattr(fitting.Distance, "__call__", seeing)
    assert run("broken").key == whole.key
    steps = set(calls[:SMALL.trials // 2])
    assert steps and not steps & set(seen), "what was evaluated is not evaluated again"


def steady(self, plans):
    """Seconds that are the same at each run: what the live cells are."""
    patterns = {pattern for plan in plans for pattern in fitting.cost.patterns(plan)}
    seconds = {pattern: 0.001 * (1 + pattern.count("1")) for pattern in patterns}
    return Timing(fitting.cost.Latency(seconds, 1, "float32"), 0.002)


def test_the_fit_is_within_its_budget_and_no_worse_than_its_starts(tmp_path, monkeypatch):
    pipe, options = tiny.made(tiny.ddim_pixels)
    monkeypatch.setattr(Fitting, "_time", steady)
    asked = requests_of(pipe, options_of(options), batch=2)
    made = Fitting(asked, SMALL, tmp_path)
    timing = made.profile()
    seconds = timing.of(made.full) / 2
    found = made.fit(seconds, tmp_path / "journal")
    assert timing.of(found.plan) <= seconds
    assert all(timing.of(plan) >= 0.99 * seconds for plan in found.controls.values()), "controls get no less time"
    affordable = [plan for plan in found.controls.values() if timing.of(plan) <= seconds]
    assert all(found.distances[found.plan.key] <= found.distances[plan.key] for plan in affordable)
    with pytest.raises(ValueError, match="buy 0 full steps, 2 are the least: the full run takes"):
        made.fit(0.001, tmp_path / "other")


def test_images_of_a_number_are_the_same_whatever_the_batch():
    pipe, _ = tiny.made(tiny.stable_diffusion)
    plan = Fitting.full_of(pipe, 10)
    few, many = (Requests(pipe, PROMPTS, {"guidance_scale": 4.0}, batch).images(plan, "report", range(5))
                 for batch in (2, 5))
    torch.testing.assert_close(few, many, atol=1e-4, rtol=1e-4)
    others = Requests(pipe, PROMPTS, {"guidance_scale": 4.0}, 5).images(plan, "select", range(5))
    assert (few - others).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_the_pipelines_own_run_is_asked_for_the_same_images():
    pipe, _ = tiny.made(tiny.ddim_pixels)
    asked = Requests(pipe, batch=2)
    full = Fitting.full_of(pipe, 10).replace(order=1)
    torch.testing.assert_close(asked.images(full, "report", range(3)), asked.plain("report", range(3), 10), atol=1e-4,
                               rtol=1e-4)


def test_costs_are_those_of_the_calls_that_the_pipeline_makes(tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    sizes = {}
    for side in (16, 32):
        own = {"guidance_scale": 4.0, "height": side, "width": side}
        sizes[side] = Fitting(requests_of(pipe, own, PROMPTS, 2), SMALL, tmp_path)
    assert sizes[32].costs.passes == 2 and sizes[32].guided
    assert sizes[32].costs.call > 3.5 * sizes[16].costs.call
    alone = Fitting(requests_of(pipe, {"guidance_scale": 1.0}, PROMPTS, 2), SMALL, tmp_path)
    assert alone.costs.passes == 1 and not alone.guided


@pytest.mark.parametrize(("text", "share", "seconds"), [("4x", 0.25, None), ("0.25", 0.25, None), ("2.5s", None, 2.5),
                                                       (0.25, 0.25, None)])
def test_budgets(text, share, seconds):
    assert Budget.of(text) == Budget(share, seconds)


@pytest.mark.parametrize(("text", "message"), [
    ("four", "write 4x .times faster., 0.25"), ("-4x", "is none"), ("0", "is none"), ("nan", "is none"),
    ("1x", "no less than the full run"), ("5", "no less than the full run: write 4x, 0.25, or 5s for seconds")])
def test_budgets_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Budget.of(text)


def test_bad_requests_say_what_to_do(tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    with pytest.raises(ValueError, match="a StableDiffusionPipeline draws what it is asked for: give it prompts"):
        fit(pipe, "2x", tmp_path / "plan.json")
    pixels, _ = tiny.made(tiny.ddim_pixels)
    with pytest.raises(ValueError, match="takes neither prompts nor classes"):
        fit(pixels, "2x", tmp_path / "plan.json", prompts=["a"])
    with pytest.raises(ValueError, match="name it .json"):
        fit(pixels, "2x", tmp_path / "plan")
    for options, message in (({"height": 8}, "a DDIMPipeline takes no height: leave it out"),
                             ({"generator": torch.Generator()}, "generator: is given by number here")):
        with pytest.raises(ValueError, match=message):
            fit(pixels, "2x", tmp_path / "plan.json", options=options)
    for said in ("a", "a digit"):
        with pytest.raises(ValueError, match="said: give a list of prompts, not one string"):
            fit(pipe, "2x", str(tmp_path / "plan.json"), prompts=said)
    with pytest.raises(ValueError, match="the options say what to draw, as prompts or classes do: give one of the two"):
        fit(pipe, "2x", tmp_path / "plan.json", prompts=["a digit"], options={"prompt": "a digit"})
    with pytest.raises(PlanError, match="no plan fits a .*: LatteTransformer3DModel is not supported"):
        Requests(latte())
    with pytest.raises(ValueError, match="budget: 1000s is no less than the full run, which takes"):
        fit(pixels, "1000s", tmp_path / "plan.json", effort=SMALL)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds none: write one a line"):
        files.lines(tmp_path / "empty.txt")


@pytest.mark.parametrize(("changed", "message"), [
    ({"rounds": 0}, "rounds: 0, must be 1 or more"), ({"search_images": 0}, "search-images: 0, must be 1 or more"),
    ({"population": 1}, "population: 1, must be 2 or more"), ({"report_images": 1}, "report-images: 1, must be 2"),
    ({"steps": 2}, "steps: 2, must be 3 or more"), ({"trials": -4}, "trials: -4")])
def test_an_effort_that_is_none_is_refused_before_any_work(changed, message):
    with pytest.raises(ValueError, match=message):
        Effort(**changed)


def test_requests_that_cannot_be_drawn_are_refused_before_any_work(tmp_path):
    classes, _ = tiny.made(tiny.dit)
    assert Requests(classes, ["3", 5]).said == (3, 5)
    many = classes.transformer.config.num_embeds_ada_norm
    for said in ("a cat", str(many), -1):
        with pytest.raises(ValueError, match=f"{said!r} is no class of this model: give numbers from 0 to {many - 1}"):
            Requests(classes, [said])
    words, _ = tiny.made(tiny.stable_diffusion)
    assert Requests(words, [7], batch=2).said == ("7",)
    with pytest.raises(ValueError, match="batch: 0 images a call"):
        Requests(words, ["a digit"], batch=0)
    letters = StableDiffusionPipeline.from_pretrained(paths.DATA / "shipped" / "letters")
    with pytest.raises(ValueError, match="prompt 'a red fox': .* cannot read it; use other words than fox"):
        Requests(letters, ["a red bold serif R on yellow", "a red fox"])
    pixels, _ = tiny.made(tiny.ddim_pixels)
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ValueError, match="plan.json is a folder"):
        fit(pixels, "2x", tmp_path / "plan.json", effort=SMALL)


def test_prompts_are_read_as_editors_write_them(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red fox\r\n\r\n a cat \r\n".encode())
    assert files.lines(tmp_path / "prompts.txt") == ["a red fox", "a cat"]


def test_an_unfinished_fit_of_another_pipeline_is_not_gone_on_from(tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)

    def folder():
        return Fitting(requests_of(pipe, {"guidance_scale": 4.0}, ("a digit",)), SMALL, tmp_path).work

    folders = [folder()]
    assert folder() == folders[0]
    for change in (lambda: pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5), pipe.disable_freeu,
                   lambda: pipe.vae.decoder.conv_out.bias.data.add_(0.1),
                   lambda: pipe.text_encoder.final_layer_norm.bias.data.add_(0.1),
                   lambda: setattr(pipe, "scheduler", DDPMScheduler.from_config(pipe.scheduler.config))):
        change()
        folders.append(folder())
    assert folders[2] == folders[0] and len(set(folders)) == len(folders) - 1


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_pipeline_offloaded_layer_by_layer_is_refused(part, tmp_path):
    pipe, _ = tiny.made(tiny.stable_diffusion)
    accelerate.cpu_offload(getattr(pipe, part), torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        Fitting(requests_of(pipe, {}, PROMPTS), SMALL, tmp_path)


def test_a_fit_is_known_again_by_other_processes(tmp_path):
    told = ("import sys; sys.path.insert(0, 'tests'); from lib.fit import fit; from test_fit import *;"
            "pipe, _ = tiny.made(tiny.stable_diffusion); pipe.scheduler = DDPMScheduler(clip_sample=False);"
            f"print(Fitting(requests_of(pipe, {{}}, ('a digit',)), SMALL, paths.Path({str(tmp_path)!r})).key)")
    keys = [subprocess.run([sys.executable, "-c", told], cwd=paths.ROOT, check=True, capture_output=True, text=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout.split()[-1] for seed in ("1", "2")]
    assert keys[0] == keys[1]


def test_a_scheduler_that_calls_the_network_twice_a_step_is_fitted_over_its_steps(tmp_path):
    pipe, options = tiny.made(tiny.stable_diffusion_3)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    made = Fitting(requests_of(pipe, options_of(options) | {"guidance_scale": 1.0}), SMALL, tmp_path)
    assert made.full.steps == SMALL.steps


def latte():
    network = LatteTransformer3DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
                                      sample_size=8, patch_size=2, caption_channels=12, cross_attention_dim=16)
    return LattePipeline(None, None, tiny.vae(), network, tiny.ddim())


def test_images_that_are_not_numbers_end_a_fit(tmp_path):
    pipe, _ = tiny.made(tiny.ddim_pixels)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the full run's images are not numbers: give the weights in fp32 or bf16"):
        fit(pipe, "2x", tmp_path / "plan.json", effort=SMALL)


def test_a_budget_just_above_many_steps_reaches_as_many():
    full = SimpleNamespace(steps=200, timesteps=range(200), at=len)
    profiled = SimpleNamespace(full=full, timing=lambda: SimpleNamespace(of=lambda steps: 0.005 * steps, around=0.0))
    for seconds in np.linspace(0.02, 1.1, 500):
        most, reach = Fitting._reach(profiled, seconds)
        assert most <= reach <= 200 and 0.005 * most <= seconds
        assert reach == 200 or 0.005 * reach >= fitting.ALMOST * seconds - 1e-9


def test_a_plan_whose_images_are_not_numbers_is_the_farthest_there_is():
    pipe, options = tiny.made(tiny.ddim_pixels)
    asked = Requests(pipe, (), options_of(options))
    plan = Fitting.full_of(pipe, 10)
    black = fitting.Distance(asked, "search", torch.zeros_like(asked.images(plan, "search", [0])), "")
    assert 0 < black(plan) < 1
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    assert black(plan) == float("inf")


@pytest.mark.parametrize(("ratio", "longer", "sentence"), [
    ((0.8, 0.7, 0.9), 0.0, ""),
    ((1.0, 0.98, 1.02), 0.0, "Fewer steps do as well here: fewer steps may be taken in "
     "the plan's place (each is a plan in a file beside it, whose name ends in .fewer_steps.json)."),
    ((0.9, 0.7, 1.1), 0.0, "What is not told apart may be with more images"),
    ((1.3, 1.2, 1.4), 0.2, "Fewer steps come as near or nearer, but take longer than the plan. Where that time may be "
     "spent, take them, or fit again with the budget 1.21s, by prediction 20% more than the plan takes")])
def test_a_verdict_says_what_was_found(ratio, longer, sentence):
    rows = pd.DataFrame([{"name": "fitted plan", "seconds": 1.0, "predicted": 1.0, "steps": 9},
                         {"name": "fewer steps", "seconds": 1.0, "predicted": 1 + longer, "steps": 10},
                         {"name": "full run", "seconds": 4.0, "predicted": 3.9, "steps": 50}])
    rows = rows.assign(faster=4.0, faster_low=3.9, faster_high=4.1, PSNR=30.0, PSNR_low=29.0, PSNR_high=31.0,
                       reuses=True)
    contrast = Contrast(Estimate(*ratio), Estimate(0.0, -1.0, 1.0), 0.05, 32)
    said = certificate.verdict(rows.set_index("name"), {"fewer steps": contrast})
    assert ("4.00 [3.90, 4.10] times less than the full run, which takes 4 s. The prediction was 1 s, 3.90 times less; "
            "at the speed of these rounds that is 1.03 s, 3% more than measured.") in said[0]
    assert f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] times as far, over 32 images." in said[1]
    assert ("1 s: 0% longer, by prediction 20% longer" in said[1]) == bool(longer)
    assert (sentence in said[-1]) if sentence else len(said) == 2
    slowed = rows.assign(seconds=1.5 * rows["seconds"], steps=9).set_index("name")
    slowed = certificate.verdict(slowed, {"fewer steps": contrast})
    assert "The prediction was 1 s, 3.90 times less; at the speed of these rounds that is 1.54 s, 3% more" in slowed[0]
    assert "The full run took 54% longer in these rounds than predicted" in slowed[1]
    alone = rows.assign(seconds=[1.3, 1.0, 4.0]).set_index("name")
    assert "It takes longer than it was fitted to: 27%." in certificate.verdict(alone, {"fewer steps": contrast})
    full_steps = certificate.verdict(rows.assign(reuses=False).set_index("name"), {"fewer steps": contrast})
    assert "It reuses nothing: it is 9 full steps. So fewer steps are the answer" in full_steps[1]


def test_a_fit_knows_pictures_by_their_pixels():
    one, other = (torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)).numpy() for seed in (0, 1))
    same = fitting._fingerprint({"image": Image.fromarray((255 * one).astype("uint8"))})
    assert same == fitting._fingerprint({"image": Image.fromarray((255 * one).astype("uint8"))})
    assert same != fitting._fingerprint({"image": Image.fromarray((255 * other).astype("uint8"))})


def test_the_command_line(tmp_path):
    pipe = DDIMPipeline(tiny.plain_unet(in_channels=3, out_channels=3), tiny.ddim())
    pipe.save_pretrained(tmp_path / "pipe")
    command = [sys.executable, "-m", "lib.fit", "--model", str(tmp_path / "pipe"), "--budget", "0.9", "--steps", "6",
               "--trials", "3", "--search-images", "2", "--select-images", "2", "--report-images", "2", "--rounds", "1",
               "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "plan.json")]
    subprocess.run(command, cwd=paths.ROOT, check=True, capture_output=True)
    assert Plan.load(tmp_path / "plan.json").blocks
    wrong = subprocess.run([*command, "--prompts", str(tmp_path / "none.txt")], cwd=paths.ROOT, capture_output=True,
                           text=True)
    assert wrong.returncode == 1 and wrong.stderr.strip().splitlines()[-1].startswith("error: ")


def test_distances_of_pairs():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=draw)
    noisy = (images + 0.1 * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    assert (pairs.psnr(images, images) == pairs.HIGHEST).all() and (pairs.pyramid(images, images) == 0).all()
    torch.testing.assert_close(pairs.ssim(images, images), torch.ones(4))
    torch.testing.assert_close(pairs.psnr(noisy, images), -10 * (noisy - images).square().mean((1, 2, 3)).log10())
    worse = (images + 0.3 * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    assert (pairs.ssim(worse, images) < pairs.ssim(noisy, images)).all()
    assert pairs.nearer(noisy, worse, images).word == "better" and pairs.nearer(worse, noisy, images).word == "worse"
    assert pairs.nearer(noisy, noisy, images).word == "as good"
