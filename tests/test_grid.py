"""The grid against its slow reference: any plan, with all states and passes, on every family."""

import dataclasses

import numpy as np
import pytest
import reference
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel

from lib.grid import blocks, cost, graphs, sampling, solvers
from lib.grid.blocks import lives, wiring
from lib.grid.engine import Engine
from lib.grid.model import Conditions, Model
from lib.grid.plan import (
    DROP,
    GIVEN,
    LINE,
    NULL,
    PARABOLA,
    Learned,
    NoiseSchedule,
    Plan,
    PlanError,
    quadratic,
    trailing,
)
from lib.teachers import networks

STEPS, COUNT, EACH = 7, 2, 65
SOLVERS = [("ddim", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("plms", 4), ("unipc", 2)]


def pixel_unet():
    return networks.unet((1, 8, 8), [8, 8], 1, 4), None


def attention_unet():
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=2, norm_num_groups=4,
                       block_out_channels=(8, 16), attention_head_dim=4,
                       down_block_types=("AttnDownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "AttnUpBlock2D")), None


def text_unet():
    model = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    texts = [{"encoder_hidden_states": torch.randn(COUNT, 5, 12, generator=torch.Generator().manual_seed(seed),
                                                   dtype=torch.float64)} for seed in (0, 1)]
    return model, Conditions(*texts, scale=2.0)


def dit():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2,
                                  num_layers=4, sample_size=8, patch_size=4, num_embeds_ada_norm=10)
    return model, Conditions({"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.full((COUNT,), 10)}, 2.0)


FAMILIES = [pixel_unet, attention_unet, text_unet, dit]


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__, scope="module")
def family(request):
    torch.manual_seed(0)
    model, conditions = request.param()
    for weight in model.parameters():  # zero-initialised layers would hide every difference
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval().requires_grad_(False).double(), conditions


@pytest.fixture(scope="module")
def start():
    return torch.randn(COUNT, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def base(model, rng, passes=(GIVEN,)):
    """A full plan with a solver, timesteps and fields drawn."""
    described = blocks.describe(model)
    solver, order = SOLVERS[rng.integers(len(SOLVERS))]
    timesteps = (trailing, quadratic)[rng.integers(2)](STEPS, 1000)
    if rng.random() < 0.3:  # between the integers
        timesteps = tuple(np.sort(rng.uniform(1, 999, STEPS))[::-1].tolist())
    plan = Plan.full(timesteps, NoiseSchedule.of(networks.noise_schedule()), described.names, order,
                     cache=described.cache, solver=solver, passes=passes)
    return plan.replace(abscissa=rng.choice(["log_snr", "timestep", "step"]).item(),
                        null_holds=rng.choice(["output", "difference"]).item(),
                        final_sigma=rng.choice(["zero", "sigma_min"]).item())


def drawn(plan, rng):
    """Any cells: all four states, whole outputs of their own, a pass that begins late or is left out in between."""
    shape = (len(plan.passes), plan.steps, len(plan.blocks))
    shares = rng.dirichlet([1.0, 1.5, 1.0, 1.0])
    cells = rng.choice([0, 1, 2, 3], size=shape, p=shares)
    cells[:, 0] = 1
    if rng.random() < 0.4 and len(plan.passes) == 1:
        return plan.with_cells(cells)
    net = rng.choice([0, 1, 2, 3], size=shape[:2], p=[0.15, 0.55, 0.15, 0.15])
    net[:, 0] = 1
    for number, name in enumerate(plan.passes):
        if name != GIVEN and rng.random() < 0.6:
            net[number][rng.random(plan.steps) < 0.4] = DROP
            cells[number, net[number] == DROP] = 0
            if (net[number] != DROP).any():
                first = int(np.argmax(net[number] != DROP))
                cells[number, first], net[number, first] = 1, 1
    return plan.with_cells(cells, net)


def structured(plan, described, rng):
    """The constructors' plans, with any way of reuse."""
    reuse = int(rng.choice([0, LINE, PARABOLA]))
    shallow = described.branch(int(rng.integers(described.branches)))
    kind = rng.integers(4)
    if kind == 0:
        return Plan.deepcache(int(rng.integers(1, 5)), shallow, plan, reuse)
    if kind == 1:
        count = int(rng.choice([1, 2, 4, 7]))
        length = -(-plan.steps // count)
        return Plan.segments([(int(rng.integers(1, length + 1)), shallow) for _ in range(count)], plan, reuse)
    if kind == 2:
        return Plan.random(0.5, int(rng.integers(1000)), plan, reuse)
    gates = rng.random((plan.steps, len(described))) < 0.6
    gates[0] = True
    return Plan.from_gates(gates, plan, reuse)


def same(images, wanted):
    assert (images - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("seed", range(EACH))
def test_any_plan_is_the_slow_reference(family, start, seed):
    """Two comparisons each: 520 in all, with one pass and with two, in one batch and call by call."""
    model, conditions = family
    rng = np.random.default_rng(seed)
    described, schedule = blocks.describe(model), networks.noise_schedule()
    for make in (lambda plan: drawn(plan, rng), lambda plan: structured(plan, described, rng)):
        guided = conditions is not None and seed % 3 > 0
        null = conditions.null if guided else None
        own = conditions and Conditions(conditions.given, null, 2.0, apart=bool(seed % 2))
        plan = make(base(model, rng, (NULL, GIVEN) if guided and seed % 3 == 2 else (GIVEN,)))
        if len(plan.passes) > 1 and rng.random() < 0.3:
            plan = plan.replace(passes=(GIVEN,), states=plan.states[1:], net=plan.net[1:]).guided(
                (int(rng.integers(0, 3)), int(rng.integers(3, plan.steps))) if plan.steps > 3 else None,
                every=int(rng.integers(1, 4)), reuse=int(rng.choice([0, 2, 3])), null_holds=plan.null_holds)
        images = sampling.sample(Model(model, schedule), plan, start, own)
        assert images.isfinite().all()
        same(images, reference.sample(model, plan, start, own))


@pytest.mark.parametrize("seed", range(6))
def test_recordings_are_the_eager_engine_with_all_states_and_both_passes(family, start, seed, request):
    model, conditions = family
    rng = np.random.default_rng(100 + seed)
    plan = base(model, rng, (NULL, GIVEN) if conditions else (GIVEN,))
    plan = drawn(plan, rng) if seed else Plan.deepcache(2, blocks.describe(model).branch(0), plan, PARABOLA)
    graphs._shelves.clear()  # what other plans have recorded
    conditions = conditions and Conditions(conditions.given, conditions.null, 2.0, apart=bool(seed % 2))
    wanted = sampling.sample(Model(model, networks.noise_schedule()), plan, start, conditions)
    tapes = request.getfixturevalue("tapes")
    for _ in range(3):
        assert torch.equal(sampling.sample(Model(model, networks.noise_schedule()), plan, start, conditions), wanted)
    assert tapes


def liveness_of_version_1(reads, compute):
    """As it was when cells could only hold."""
    last = compute.shape[1] - 1
    live, stored = np.zeros_like(compute), np.zeros_like(compute)
    later = np.zeros(last + 1, dtype=bool)
    for step in range(len(compute) - 1, -1, -1):
        row, needed = compute[step], later.copy()
        needed[last] |= row[last]
        for i in range(last, -1, -1):
            if row[i] and needed[i]:
                live[step, i], stored[step, i] = True, later[i]
                needed[reads[i]] = True
        if live[step].any():
            needed[last] = True
        later = needed & ~row
    return live, stored


def test_with_holding_only_liveness_is_that_of_version_1():
    models = [make()[0] for make in FAMILIES]
    for number in range(1000):
        described, rng = blocks.describe(models[number % 4]), np.random.default_rng(number)
        compute = rng.random((rng.integers(1, 12), len(described))) < rng.random()
        compute[0] = True
        life = described.life(compute)
        if described.cache == "output":
            live, stored = liveness_of_version_1(described.reads, compute)
        else:
            live, stored = compute, np.concatenate([compute[:-1] & ~compute[1:], np.zeros_like(compute[:1])])
        assert (life.live == live).all() and ((life.live & (life.keep > 0)) == stored).all()
        assert (life.called == (live.any(axis=1) | (described.cache == "residual"))).all()


@pytest.mark.parametrize("seed", range(250))
def test_dead_cells_change_no_bit(family, start, seed):
    """1,000 random plans: what nobody reads may be turned off, and no forecast asks for more outputs than there are."""
    model, conditions = family
    rng = np.random.default_rng(1000 + seed)
    plan = drawn(base(model, rng, (NULL, GIVEN) if conditions and seed % 2 else (GIVEN,)), rng)
    settled = plan.replace(states=tuple(tuple(map(tuple, life.settled.tolist())) for life in plan.life),
                           net=tuple(tuple(life.net.tolist()) for life in plan.life))
    assert settled.key == plan.key
    assert all((life.settled == np.array(states)).all() for life, states in zip(settled.life, settled.states))
    whole = Model(model, networks.noise_schedule())
    images = [sampling.sample(whole, one, start, conditions) for one in (plan, settled)]
    assert torch.equal(*images)


@pytest.mark.parametrize("seed", range(200))
def test_no_live_cell_is_spare_and_no_value_is_missing(seed):
    """By names instead of numbers: what the solver sees hangs on every live cell, and on no dead one."""
    rng = np.random.default_rng(seed)
    names = blocks.describe((pixel_unet, dit)[seed % 2]()[0]).names
    reads, cache = wiring(names), ("output", "residual")[seed % 2]
    cells = rng.choice([0, 1, 2, 3], size=(5, len(names)))
    net = rng.choice([0, 1, 2, 3], size=5)
    cells[0], net[0] = 1, 1
    life = lives(reads, cache, cells, net)

    def seen(runs):
        outputs, whole, shown = {i: [] for i in range(len(names))}, [], []
        for step in range(5):
            values = {}
            for i in range(len(names)):
                inputs = tuple(values[j] for j in reads[i])
                if cells[step, i] == 1:
                    own = (step, i, inputs) if runs[step, i] else "not run"
                    outputs[i].append(own)
                else:
                    own = (int(cells[step, i]), tuple(outputs[i][::-1][:max(1, cells[step, i])]))
                values[i] = (own, inputs) if cache == "residual" else own
            if net[step] == 1:
                whole.append(values[len(names) - 1])
            shown.append(whole[-1] if net[step] == 1 else (int(net[step]), tuple(whole[::-1][:max(1, net[step])])))
        return shown

    wanted = seen(life.live)
    assert "not run" not in str(wanted)
    assert (cells == 1)[life.live].all()
    for step, i in np.argwhere(life.live):
        without = life.live.copy()
        without[step, i] = False
        assert seen(without) != wanted, (step, names[i])


def test_the_engine_keeps_no_more_than_a_plan_says(family, start):
    model, _ = family
    rng = np.random.default_rng(5)
    plan = drawn(base(model, rng), rng)
    costs, most = cost.count(model), 0
    sizes = {**dict(enumerate(costs.outputs[name] for name in plan.blocks)), -1: costs.outputs["net"]}
    with torch.inference_mode(), Engine(model, plan, plan.schedule) as engine:
        conditions = blocks.example_conditions(model, COUNT, "cpu")
        for step in range(plan.steps):
            engine(start, step, **{name: rows.double() if rows.is_floating_point() else rows
                                   for name, rows in conditions.items()})
            engine.at(step + 1)
            memory, = engine._cache.values()
            most = max(most, sum(len(pairs) * sizes[place] for place, pairs in memory.kept.items()))
    assert most * 4 == costs.kept(plan) and costs.kept(plan, torch.bfloat16) == most * 2


def test_a_call_that_failed_is_made_again_to_the_bit(family, start):
    model, _ = family
    rng = np.random.default_rng(8)
    plan = drawn(base(model, rng), rng)
    conditions = {name: rows.double() if rows.is_floating_point() else rows
                  for name, rows in blocks.example_conditions(model, COUNT, "cpu").items()}
    busy = next(step for step in range(3, plan.steps) if plan.life[0].called[step])

    def walk(break_at):
        outputs = []
        with torch.inference_mode(), Engine(model, plan, plan.schedule) as engine:
            for step in range(plan.steps):
                if step == break_at:
                    head = list(model.children())[-1]
                    handle = head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
                    with pytest.raises(MemoryError):
                        engine(start, step, **conditions)
                    handle.remove()
                outputs.append(engine(start * (1 + step), step, **conditions))
        return torch.stack(outputs)

    assert torch.equal(walk(busy), walk(None))


def test_nothing_of_the_cache_is_lent(family, start):
    """Code that writes in place into what blocks give, and into the whole output, changes no later step."""
    model, _ = family
    described = blocks.describe(model)
    plan = Plan.deepcache(3, described.branch(0), base(model, np.random.default_rng(2)), LINE)
    plan = plan.with_cells(plan.cells, [1, 0, 1, 1, 2, 0, 1])
    conditions = {name: rows.double() if rows.is_floating_point() else rows
                  for name, rows in blocks.example_conditions(model, COUNT, "cpu").items()}

    def walk(spoil):
        outputs = []
        with torch.inference_mode(), Engine(model, plan, plan.schedule) as engine:
            for step in range(plan.steps):
                output = engine(start, step, **conditions)
                outputs.append(output.clone())
                if spoil:
                    output.zero_()
        return torch.stack(outputs)

    assert torch.equal(walk(True), walk(False))


# ---- guidance -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided():
    torch.manual_seed(0)
    model, conditions = text_unet()
    return model.eval().requires_grad_(False).double(), conditions


def test_outside_an_interval_the_scale_is_1_and_the_null_pass_costs_nothing(guided, start):
    model, conditions = guided
    full = base(model, np.random.default_rng(0))
    full = full.replace(solver="ddim", order=1)
    plan = full.guided((2, 4))
    assert plan.key != full.key
    calls = []
    handle = model.conv_in.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    images = sampling.sample(Model(model, networks.noise_schedule()), plan, start, conditions)
    handle.remove()
    assert calls == [COUNT] * 2 + [2 * COUNT] * 3 + [COUNT] * 2
    costs = cost.count(model)
    assert costs.executed(plan) == 10 * costs.call
    guided = dataclasses.replace(costs, passes=2)
    assert guided.executed(full) == 14 * costs.call, "a plan of one pass, guided, runs each sheet twice"
    assert guided.executed(plan) == 10 * costs.call
    with pytest.raises(PlanError, match="the network was called for given with"):
        sampling.sample(Model(model, networks.noise_schedule()), plan, start, Conditions(conditions.given))
    with pytest.raises(PlanError, match="drops a pass at some steps: give `net` with the cells"):
        Plan.deepcache(2, blocks.describe(model).branch(0), plan)
    unguided = Conditions(conditions.given)
    with torch.inference_mode(), Engine(model, full, full.schedule) as engine:
        x_t, state = start, ()
        for step in range(STEPS):
            predict = (conditions if 2 <= step <= 4 else unguided).predict
            x_t, state = solvers.advance(engine.solver, step, x_t, predict(engine, x_t, step), state)
    same(images, x_t)


def test_passes_that_lie_in_no_batch_are_refused(guided, start):
    model, conditions = guided
    plan = base(model, np.random.default_rng(0)).guided(every=2, null_holds="difference")
    with torch.inference_mode(), Engine(model, plan, plan.schedule) as engine:
        with pytest.raises(PlanError, match="has passes null, given, and none called 'third'"):
            engine(start, 0, ("third",), **conditions.given)
        with pytest.raises(PlanError, match="a batch of 2 cannot hold 3 passes"):
            engine(start, 0, ("null", "given", "null"), **conditions.given)
        with pytest.raises(PlanError, match="the pass 'null' is made of the given pass's output, which comes after"):
            engine(start, 0, (NULL,), **conditions.null)
        engine.reset()
        both = {name: torch.cat([conditions.null[name], rows]) for name, rows in conditions.given.items()}
        engine(torch.cat([start, start]), 0, (NULL, GIVEN), **both)
        with pytest.raises(PlanError, match="step 2 was asked for after step 0"):
            engine(torch.cat([start, start]), 2, (NULL, GIVEN), **both)
        half = engine(start, 1, (NULL, GIVEN), **conditions.given)  # other rows: all is computed
    with torch.inference_mode():
        torch.testing.assert_close(half, model(start, timestep=plan.timesteps[1], **conditions.given).sample)


# ---- what a plan with forecasts is ----------------------------------------------------------------------------------


def test_a_forecast_of_order_0_is_a_held_one(family, start):
    """With one computed output a line and a parabola hold it."""
    model, _ = family
    described, full = blocks.describe(model), base(model, np.random.default_rng(4))
    cells = np.tile(np.where(described.branch(0), 1, 0), (STEPS, 1))
    cells[0] = 1
    held = full.with_cells(cells)
    for reuse in (LINE, PARABOLA):
        assert full.with_cells(np.where(cells == 0, reuse, cells)).key == held.key


def test_a_linear_forecast_of_the_whole_output_is_a_multistep_step(start):
    """Under DDIM, over a stretch of k sub-steps: weights that are a left Riemann sum of the line in sigma / alpha."""
    torch.manual_seed(0)
    model = pixel_unet()[0].eval().requires_grad_(False).double()
    schedule = networks.noise_schedule()
    names, fits = blocks.describe(model).names, NoiseSchedule.of(schedule)
    full = Plan.full(trailing(12, 1000), fits, names, solver="ddim")
    net = np.array([1, 0, 0, 1, 2, 2, 1, 2, 2, 1, 2, 2])
    cells = np.repeat((net == 1)[:, None], len(names), axis=1)
    plan = full.with_cells(cells, net)
    images = sampling.sample(Model(model, schedule), plan, start)
    alpha, sigma = (part.numpy() for part in solvers.noise_levels((*full.timesteps,), fits))
    ratio = np.append(sigma / alpha, 0.0)  # d(x / alpha) = epsilon d(sigma / alpha), exactly, while epsilon is held
    place = 2 * np.log(alpha / sigma)
    x = start / alpha[0]
    known = []
    with torch.inference_mode():
        for first in (0, 3, 6, 9):
            t = torch.tensor(full.timesteps[first]).expand(2)
            known.insert(0, (place[first], model(x * alpha[first], t).sample))
            steps = np.diff(ratio)[first:first + 3]
            if len(known) == 1:
                x = x + steps.sum() * known[0][1]
                continue
            (p_0, e_0), (p_1, e_1) = known[:2]
            slope = ((place[first:first + 3] - p_0) / (p_0 - p_1) * steps).sum()  # the left Riemann sum
            x = x + (steps.sum() + slope) * e_0 - slope * e_1
    same(images, x)


def test_flow_matching_walks_too(start):
    torch.manual_seed(0)
    model = pixel_unet()[0].eval().requires_grad_(False).double()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    full = Plan.full(scheduler.timesteps.tolist(), NoiseSchedule.of(scheduler), blocks.describe(model),
                     solver="euler")
    x_t = start
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x_t = scheduler.step(model(x_t, t).sample, t, x_t).prev_sample
    images = sampling.sample(Model(model, scheduler), full, start)
    torch.testing.assert_close(images, x_t, rtol=1e-4, atol=1e-4)
    with pytest.raises(PlanError, match="log_snr is infinite at pure noise"):
        Plan.deepcache(2, blocks.describe(model).branch(0), full, LINE)
    by_time = full.replace(abscissa="timestep")
    plan = Plan.deepcache(2, blocks.describe(model).branch(0), by_time, LINE)
    same(sampling.sample(Model(model, scheduler), plan, start), reference.sample(model, plan, start))


def test_stock_pndm_and_a_learned_solver_walk_forecasts_too(family, start):
    model, conditions = family
    described, full = blocks.describe(model), base(model, np.random.default_rng(3))
    own = conditions and Conditions(conditions.given)
    timesteps = (999, 800, 800, 600, 400, 200, 1)
    pndm = full.at(timesteps, solver="pndm", order=4, abscissa="step")
    with pytest.raises(PlanError, match="pndm walks one timestep twice; forecast over step"):
        Plan.deepcache(2, described.branch(0), pndm.replace(abscissa="log_snr"), LINE)
    table = solvers.coefficients("unipc", full.timesteps, full.schedule, order=2)
    kept = {name: tuple(map(tuple, part.tolist())) if part.ndim > 1 else tuple(part.tolist())
            for name, part in vars(table).items() if name in ("a", "b", "A", "B")}
    learned = full.replace(solver="learned", order=2, table=Learned(quantity="data", **kept))
    for plan in (pndm, learned):
        plan = Plan.deepcache(3, described.branch(0), plan, LINE)
        images = sampling.sample(Model(model, networks.noise_schedule()), plan, start, own)
        same(images, reference.sample(model, plan, start, own))


def test_a_plan_of_unet_blocks_is_wired_by_its_names():
    for make in FAMILIES:
        described = blocks.describe(make()[0])
        reads = [[described.index[name] for name in block.reads if name != blocks.STEM] for block in described]
        assert wiring(described.names) == reads


def test_the_engine_on_the_cpu_records_nothing(start):
    model = pixel_unet()[0].eval().double()
    plan = base(model, np.random.default_rng(0))
    assert type(graphs.engine(model, plan, plan.schedule)) is Engine
