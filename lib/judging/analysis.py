"""What a teacher's blocks do from step to step, what reusing one costs, and what the papers' models cost."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import pandas as pd
import torch
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from tqdm import tqdm

from lib.grid import blocks as _blocks
from lib.grid import cost, solvers
from lib.grid.engine import Engine
from lib.grid.model import Model
from lib.grid.plan import GIVEN, HOLD, LINE, NULL, PARABOLA, Plan
from lib.grid.sampling import walk
from lib.judging import controls
from lib.judging.banks import Bank
from lib.judging.evaluate import Judge, Nearness


@contextmanager
def _outputs(network: ModelMixin, changes: bool = False) -> Iterator[dict[str, Tensor]]:
    """Give what each block gave last, by its name, flattened to (n, D); it fills as the network is called.

    Parameters
    ----------
    changes : bool, whether of a transformer's block it is what the block added to its input, which is what cells keep
    """
    now, described = {}, _blocks.describe(network)
    changes = changes and described.cache == "residual"

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            made = output[0] if isinstance(output, tuple) else output
            now[name] = (made - inputs[0] if changes else made).flatten(1).clone()
        return hook

    handles = [network.get_submodule(block.modules[-1]).register_forward_hook(keep(block.name)) for block in described]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def similarity(model: Model, plan: Plan, noise: Tensor) -> np.ndarray:
    """Measure how alike each block's outputs are at neighbouring steps of a full plan.

    Parameters
    ----------
    plan : Plan, (T, N), all cells computing
    noise : Tensor, (n, C, H, W)

    Returns
    -------
    similarity : (T, N), cosine similarity with the step before, mean over images; NaN at the first step
    """
    described = _blocks.describe(model.network)
    values, before = np.full((plan.steps, len(described)), np.nan), {}
    with _outputs(model.network) as now, Engine(model.network, plan, model.noise_schedule) as engine:
        for step, _ in enumerate(walk(engine, noise.to(model.device), model.asked(noise))):
            for name, output in now.items():
                if step:
                    alike = torch.cosine_similarity(output, before[name], dim=1)
                    values[step, described.index[name]] = float(alike.mean())
            before = dict(now)
    return values


@torch.inference_mode()
def two_passes(model: Model, plan: Plan, noise: Tensor) -> pd.DataFrame:
    """Measure how the given pass and the null pass of a guided model differ, along a full run.

    Parameters
    ----------
    plan : Plan, full, of one pass
    noise : Tensor, (n, C, H, W)

    Returns
    -------
    passes : columns step; alike (cosine similarity of the two outputs); difference (norm of given - null over the given
        output's); and of null, given and difference the distance from the step before over the norm: "null, held",
        "given, held", "difference, held"; means over images, NaN at the first step
    """
    outputs: list[Tensor] = []
    handle = model.network.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    rows, before = [], {}
    try:
        with Engine(model.network, plan, model.noise_schedule) as engine:
            for step, _ in enumerate(walk(engine, noise.to(model.device), model.asked(noise))):
                null, given = outputs.pop()[:, :noise.shape[1]].flatten(1).chunk(2)
                parts = {"null": null, "given": given, "difference": given - null}
                row = {"step": step, "alike": torch.cosine_similarity(null, given).mean().item(),
                       "difference": (parts["difference"].norm(dim=1) / given.norm(dim=1)).mean().item()}
                for name, part in parts.items():
                    far = (part - before[name]).norm(dim=1) / part.norm(dim=1) if before else torch.tensor(torch.nan)
                    row[f"{name}, held"] = far.mean().item()
                rows.append(row)
                before = parts
    finally:
        handle.remove()
    return pd.DataFrame(rows)


REUSES = {"hold": HOLD, "line": LINE, "parabola": PARABOLA}
"""What a cell may do that does not compute."""


@torch.inference_mode()
def forecast_errors(model: Model, plan: Plan, noise: Tensor) -> pd.DataFrame:
    """Measure how far held and forecast outputs lie from what each block would give, where a plan's cells reuse.

    On a transformer cells keep what a block adds to its input: there that stands for the output.

    All is computed, so x_t walks as in the full run of the plan's steps: the error of each reuse by itself, not what
    becomes of it.

    Parameters
    ----------
    plan : Plan of one pass; its abscissa, finite at all steps, is the forecasts'
    noise : Tensor, (n, C, H, W)

    Returns
    -------
    errors : columns pass ("null" and "given", or "given" alone), step, block, since (steps since it computed), hold,
        line, parabola: the distance from the block's output over that output's norm, mean over images; NaN where too
        few outputs were computed before
    """
    described, asked = _blocks.describe(model.network), model.asked(noise)
    passes = (GIVEN,) if asked.null is None else (NULL, GIVEN)
    places = solvers.abscissae(plan.timesteps, plan.schedule, plan.abscissa).tolist()
    rows, known = [], {name: [] for name in described.names}  # of each block the last three computed (step, output)
    full = plan.at(plan.timesteps)
    with _outputs(model.network, changes=True) as now, Engine(model.network, full, model.noise_schedule) as engine:
        for step, _ in enumerate(walk(engine, noise.to(model.device), asked)):
            for name, computes in zip(described.names, plan.computes[step]):
                if computes:
                    known[name] = [(step, now[name]), *known[name]][:3]
                    continue
                about = {"step": step, "block": name, "since": step - known[name][0][0]}
                far = [_reuse_errors(now[name], known[name][:depth], places, step, len(passes))
                       if depth <= len(known[name]) else (np.nan,) * len(passes) for depth in (1, 2, 3)]
                rows += [{"pass": which} | about | dict(zip(REUSES, one)) for which, *one in zip(passes, *far)]
    return pd.DataFrame(rows)


def _reuse_errors(output: Tensor, computed: list[tuple[int, Tensor]], places: list[float], step: int, passes: int
                  ) -> tuple[float, ...]:
    """Give the error of reading these computed outputs off at a step, of each pass in a batch of all."""
    weights = solvers.forecast(places[step], [places[k] for k, _ in computed])
    value = sum(weight * past for weight, (_, past) in zip(weights, computed))
    return tuple(float(part.mean()) for part in ((value - output).norm(dim=1) / output.norm(dim=1)).chunk(passes))


def reuse_by_error(plan: Plan, errors: pd.DataFrame) -> Plan:
    """Give a plan in which each cell that does not compute holds or forecasts by what erred least there.

    Parameters
    ----------
    plan : Plan of one pass
    errors : what `forecast_errors` gave of it; where it has two passes, so will the plan
    """
    passes, sheets = tuple(errors["pass"].unique()), []
    for name in passes:
        sheet = plan.cells
        for row in errors[errors["pass"] == name].to_dict("records"):
            best = min((state for state in REUSES if pd.notna(row[state])), key=row.get)
            sheet[row["step"], plan.blocks.index(row["block"])] = REUSES[best]
        sheets.append(tuple(map(tuple, sheet.tolist())))
    return plan.replace(passes=passes, states=tuple(sheets), net=plan.net * len(passes),
                        provenance=plan.provenance | {"reuse": "by error"})


def dividends(bank: Bank, judge: Judge, best: Plan, macs: Callable[[Plan], int], *, counts: Iterable[int],
              branches: Iterable[int], reuses: Iterable[int], images: int) -> pd.DataFrame:
    """Ask where partial steps pay: one half-way after each full step, against more full steps for the same MACs.

    All steps are evenly spaced, under DDIM and DPM-Solver++.

    Parameters
    ----------
    bank : Bank on which both are scored
    best : Plan, full: the best teacher, to whose images both are compared
    macs : callable(plan) -> executed MACs
    counts, branches : numbers of full steps; branches of the partial ones
    reuses : 0 (hold), 2 (line) and 3 (parabola), what the partial ones do
    images : int, of which the likeness is taken

    Returns
    -------
    dividends : columns order, full_steps, branch, reuse (its name); calls (MACs over a full step's), share (of a full
        step's MACs that a partial one executes), alike (mean cosine similarity of neighbouring outputs of the blocks
        that are reused, along these steps run in full); ratio (of scores) and nearness (of distances to the best
        teacher's images): columns of the `Contrast`, below 1 the partial steps pay
    """
    described, names, rows = _blocks.describe(bank.model.network), {state: name for name, state in REUSES.items()}, []
    call, near = macs(best) / best.steps, Nearness(bank.features(best), bank.first)
    for order, full in product((1, 2), counts):
        dense = Plan.few_steps(2 * full, "uniform", best, order)
        likeness = np.nanmean(similarity(bank.model, dense, bank.noise(images)), axis=0)
        ladder = [Plan.few_steps(steps, "uniform", best, order) for steps in range(full, 2 * full + 1)]
        for branch, reuse in product(branches, reuses):
            plan = Plan.deepcache(2, described.branch(branch), dense, reuse)
            rival = controls.bracket("more full steps", ladder, macs(plan), macs)
            pair = ([(bank.features(plan, title="partial steps"), 1.0)],
                    [(bank.features(part, title="full steps"), weight) for part, weight in rival.plans])
            rows.append({"order": order, "full_steps": full, "branch": branch, "reuse": names[reuse],
                         "calls": macs(plan) / call, "share": macs(plan) / call / full - 1,
                         "alike": float(likeness[~described.branch(branch)].mean()),
                         **judge.compare(*pair).columns("ratio"), **near.compare(*pair).columns("nearness")})
    return pd.DataFrame(rows)


@torch.inference_mode()
def sensitivity(model: Model, plan: Plan, noise: Tensor, steps: list[int]) -> np.ndarray:
    """Measure the damage to the final image when one block is reused at one step.

    Under DDIM a run has no memory but its image and its cache: so each run starts one step before the reused cell,
    from the teacher's own x_t, which halves the price.

    Parameters
    ----------
    plan : Plan, (T, N), DDIM, all cells computing
    noise : Tensor, (n, C, H, W)
    steps : steps to try, each in 1..T-1

    Returns
    -------
    damage : (len(steps), N), mean squared difference from the teacher's image over the teacher images' variance
    """
    if plan.solver not in ("ddim", "dpmsolver++") or plan.order != 1 or not plan.computes.all():
        raise ValueError("sensitivity needs a full plan of DDIM, which remembers no step before")
    conditions = model.asked(noise)
    with Engine(model.network, plan, model.noise_schedule) as engine:
        states = [noise, *walk(engine, noise, conditions)]  # states[s]: x_t before step s
    images = states[-1]
    damage = np.zeros((len(steps), len(plan.blocks)))
    cells = [(i, place) for i in range(len(steps)) for place in range(len(plan.blocks))]
    for i, place in tqdm(cells, desc="sensitivity", unit="cell"):
        first = steps[i] - 1
        tail = plan.at(plan.timesteps[first:])
        compute = tail.computes
        compute[1, place] = False
        with Engine(model.network, tail.with_cells(compute), model.noise_schedule) as engine:
            *_, changed = walk(engine, states[first], conditions)
        damage[i, place] = float((changed - images).square().mean() / images.var(dim=0).mean())
    return damage


def cifar10_ddpm() -> UNet2DModel:
    """Build the UNet of google/ddpm-cifar10-32, with fresh weights."""
    return UNet2DModel(sample_size=32, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
                       down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))


def stable_diffusion() -> UNet2DConditionModel:
    """Build the UNet of Stable Diffusion 1.5, with fresh weights."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def dit_xl() -> DiTTransformer2DModel:
    """Build the transformer of facebook/DiT-XL-2-256, with fresh weights."""
    return DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
                                 num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000)


PUBLISHED: dict[str, tuple[Callable[[], ModelMixin], float, str]] = {
    "CIFAR-10 DDPM": (cifar10_ddpm, 6.1, "without"), "Stable Diffusion 1.5": (stable_diffusion, 338.8, "without"),
    "DiT-XL/2": (dit_xl, 118.6, "with")}
"""The papers' models: how to build one, the G MACs that papers print, and whether attention's products are in them."""


def published_costs() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Count the papers' models, without weights.

    Returns
    -------
    models : columns model, parameters_millions, gmacs_without, gmacs_with (attention's products), published, of;
        partial_0 to partial_3: a partial step's share of a full one's MACs at that branch
    blocks : columns model, block, gmacs, parameters
    """
    models, rows = [], []
    for name, (make, published, of) in PUBLISHED.items():
        with torch.device("meta"):
            network = make()
        costs, described = cost.count(network), _blocks.describe(network)
        shares = [(described.branch(branch) @ np.array(list(costs.blocks.values())) + costs.rest) / costs.call
                  for branch in range(4)]
        models.append({"model": name, "parameters_millions": network.num_parameters() / 1e6,
                       "gmacs_without": costs.call_without_attention / 1e9, "gmacs_with": costs.call / 1e9,
                       "published": published, "of": of} | {f"partial_{i}": share for i, share in enumerate(shares)})
        rows += [{"model": name, "block": block, "gmacs": macs / 1e9, "parameters": costs.parameters[block]}
                 for block, macs in costs.blocks.items()]
    return pd.DataFrame(models), pd.DataFrame(rows)
