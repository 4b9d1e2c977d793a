"""The engine on CUDA, as ratios within one run: `make bench` on a machine with a GPU.

Published architectures with random weights, on which time does not depend. The table goes to reports/cifar10/speed.csv.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from lib.grid import blocks, cost, graphs, sampling
from lib.grid.model import Conditions, Model
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.methods import dipgo, peers
from lib.study import params, paths
from lib.teachers import networks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE, STEPS, ROUNDS = "cuda", 50, 9


def stable_diffusion():
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def dit_xl():
    return DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
                                 num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000)


def cifar_teacher():
    p = params.load("cifar10")["00_teacher_training"]
    return networks.unet((3, p.resolution, p.resolution), p.widths, p.layers, p.norm_groups)


@dataclass
class Case:
    """A network in bf16 on the device, noise for a batch, and the plans that it is timed under."""

    model: torch.nn.Module
    noise: torch.Tensor

    def __post_init__(self):
        self.schedule, self.described = networks.noise_schedule(), blocks.describe(self.model)
        fits = NoiseSchedule.of(self.schedule)
        self.full = Plan.full(trailing(STEPS, fits.train_timesteps), fits, self.described)
        self.costs = cost.count(self.model)
        self.given = {name: rows.to(self.model.dtype) if rows.is_floating_point() else rows for name, rows
                      in blocks.example_conditions(self.model, len(self.noise), DEVICE).items()}
        prices = dipgo.Prices(self.described, self.costs, dipgo.grouping(self.described, "layers"))
        scores = np.random.default_rng(0).random((STEPS, prices.gates))
        self.plans = {"full": self.full, "DiP-GO 0.8, random scores": dipgo.prune(scores, prices, 0.2, self.full)}
        if isinstance(self.model, UNet2DModel | UNet2DConditionModel):
            self.plans["DeepCache 1:5"] = Plan.deepcache(5, self.described.branch(0), self.full)

    def fewer(self, plan):
        return self.costs.executed(self.full) / self.costs.executed(plan)

    def ours(self, plan):
        conditions = Conditions(self.given) if self.given else None
        model = Model(self.model, self.schedule)
        return sampling.sample(model, plan, self.noise, conditions, batch_size=len(self.noise))

    def unrecorded(self, plan):
        with graphs.unrecorded():
            return self.ours(plan)

    @torch.inference_mode()
    def plain(self):
        scheduler = DDIMScheduler.from_config(self.schedule.config)
        scheduler.set_timesteps(STEPS)
        x_t = self.noise.to(DEVICE)
        for t in scheduler.timesteps:
            steps = t.to(DEVICE).expand(len(x_t))
            predicted = self.model(x_t.to(self.model.dtype), steps, **self.given).sample[:, :x_t.shape[1]]
            x_t = scheduler.step(predicted.float(), t, x_t).prev_sample
        return x_t.cpu()

    def deepcache_package(self):
        return peers.deepcache(self.model, self.full, 5, 0, self.noise, **self.given)


CASES = {"SD-1.5, 512 px, batch 1": (stable_diffusion, 1), "DiT-XL/2, 256 px, batch 1": (dit_xl, 1),
         "CIFAR-10 teacher, batch 1": (cifar_teacher, 1), "CIFAR-10 teacher, batch 256": (cifar_teacher, 256)}


@pytest.mark.parametrize("name", CASES)
def test_plans_and_peers(name):
    """Plain diffusers loop, DeepCache package, and our engine with recorded steps and without."""
    build, batch = CASES[name]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False).to(DEVICE, torch.bfloat16).to(memory_format=torch.channels_last)
    side = model.config.sample_size
    case = Case(model, sampling.noise("analysis", 0, 0, batch, (model.config.in_channels, side, side)))
    runs, plans = {("full", "plain diffusers loop"): case.plain}, {"full": case.full}
    for title, plan in case.plans.items():
        plans[title] = plan
        runs[title, "ours"] = partial(case.ours, plan)
        runs[title, "ours, unrecorded"] = partial(case.unrecorded, plan)
        if title == "DeepCache 1:5":
            runs[title, "DeepCache package"] = case.deepcache_package
    images = {way: run() for way, run in runs.items() for _ in range(2)}
    for (title, way), made in images.items():  # to the rounding of bf16, along 50 steps
        gap = float((made - images[title, "ours"]).square().mean().sqrt() / made.std())
        print(f"{name}, {title}, {way}: differs from ours by {gap:.1e} of the images' spread")
        assert gap < 0.1
    seconds = cost.interleave(runs, ROUNDS, title=name)
    rows = []
    for (title, way), times in seconds.items():
        whole = seconds["full", "plain diffusers loop" if way == "DeepCache package" else way]
        plain, full = cost.median_ratio(seconds["full", "plain diffusers loop"], times), cost.median_ratio(whole, times)
        fewer = case.fewer(plans[title])
        rows.append({"network": name, "plan": title, "way": way, "ms an image": 1e3 * float(np.median(times)) / batch,
                     **dict(zip(("times faster than plain", "low", "high"), plain)), "times fewer MACs": fewer,
                     "times faster than the full plan": full[0], "measured / MACs": full[0] / fewer})
    if ("DeepCache 1:5", "ours") in seconds:
        ratio = cost.median_ratio(seconds["DeepCache 1:5", "DeepCache package"], seconds["DeepCache 1:5", "ours"])
        print("{}: DeepCache package / ours {:.2f} [{:.2f}, {:.2f}]".format(name, *ratio))
    table, path = pd.DataFrame(rows), paths.writable(paths.REPORTS / "cifar10") / "speed.csv"
    print(table.to_string(index=False, float_format="%.2f"))
    if path.exists():
        table = pd.concat([(old := pd.read_csv(path))[old["network"] != name], table])
    table.assign(device=torch.cuda.get_device_name(), torch=torch.__version__).to_csv(path, index=False)
