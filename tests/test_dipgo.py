"""DiP-GO: soft gates are the engine's cells, gradients are right, plans cost what was asked, kills lose nothing."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from lib.grid import cost, sampling
from lib.grid.model import Model
from lib.grid.plan import NoiseSchedule, Plan, trailing
from lib.methods import dipgo
from lib.methods.dipgo import learning


@pytest.fixture(scope="module")
def prices(unet, described):
    return dipgo.Prices(described, cost.count(unet), dipgo.grouping(described, "layers"))


def gates_of(cells):
    return torch.from_numpy(cells).float()


@pytest.mark.parametrize("reuse", [0, 2, 3])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmsolver++", 2), ("plms", 4), ("unipc", 2)])
@pytest.mark.parametrize("keep", [1.0, 0.6, 0.2])
def test_gates_of_0_and_1_are_the_engines_cells(unet, schedule, teacher, noise, solver, order, keep, reuse):
    base = Plan.full(teacher.timesteps, teacher.schedule, teacher.blocks, order, solver=solver)
    base = base.replace(final_sigma="sigma_min", abscissa="timestep")
    plan = Plan.random(keep, 3, base, reuse)
    model, noise = copy.deepcopy(unet).double(), noise.double()
    with torch.no_grad():
        gates = gates_of(plan.computes).double()
        net = dipgo.SuperNet(Model(model, schedule), base, reuse=reuse)
        soft = net.images(noise, gates)
        mixed = net.images(noise, torch.stack([gates, *[torch.ones_like(gates)] * (len(noise) - 1)], dim=-1))
    wanted = sampling.sample(Model(model, schedule), plan, noise)
    assert (soft - wanted).abs().max() <= 1e-8 * wanted.abs().max()
    full = sampling.sample(Model(model, schedule), base, noise)
    wanted = torch.cat([wanted[:1], full[1:]])  # each image may have gates of its own
    assert len(noise) > 1 and (mixed - wanted).abs().max() <= 1e-8 * wanted.abs().max()


@pytest.mark.parametrize("reuse", [0, 2, 3])
def test_plans_that_forecast_cost_what_their_prices_say(unet, teacher, described, prices, reuse):
    own = dipgo.Prices(described, prices.costs, prices.groups, reuse)
    scores = np.random.default_rng(3).random((teacher.steps, own.gates))
    plan = dipgo.prune(scores, own, 0.4, teacher)
    gates = dipgo.by_threshold(scores, own, 0.4)
    assert own.kept(gates) == pytest.approx(own.costs.executed(plan) / (teacher.steps * own.costs.call))
    assert plan.key == Plan.from_gates(own.cells(gates), teacher, reuse).key and own.kept(gates) <= 0.4


def test_the_hooks_are_taken_off(unet, schedule, teacher, noise):
    gates = torch.ones(teacher.steps, len(teacher.blocks), requires_grad=True)
    dipgo.SuperNet(Model(unet, schedule), teacher).images(noise, gates).sum().backward()
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.fixture(scope="module")
def short(teacher, schedule, described):
    return Plan.full(trailing(5, 1000), NoiseSchedule.of(schedule), described, order=2)


@pytest.mark.parametrize("reuse", [0, 2, 3])
def test_a_gates_gradient_is_the_finite_difference(unet, schedule, short, noise, reuse):
    model, noise = unet.double(), noise.double()
    try:
        gates = torch.rand(short.steps, len(short.blocks), dtype=torch.float64,
                           generator=torch.Generator().manual_seed(0)).requires_grad_()

        def value(gates):
            return (net.images(noise, gates) * weight).sum()

        weight = torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        net = dipgo.SuperNet(Model(model, schedule), short, reuse=reuse)
        value(gates).backward()
        for cell in [(1, 0), (2, 5), (3, 12), (4, 13)]:
            step = torch.zeros_like(gates)
            step[cell] = 1e-4
            with torch.no_grad():
                slope = (value(gates + step) - value(gates - step)) / 2e-4
            assert float(gates.grad[cell]) == pytest.approx(float(slope), rel=1e-3, abs=1e-6)
    finally:
        unet.float()


def test_checkpoints_change_no_gradient(unet, schedule, teacher, noise):
    found = []
    for checkpoints in ("none", "steps", "nested"):
        gates = torch.full((teacher.steps, len(teacher.blocks)), 0.7, requires_grad=True)
        dipgo.SuperNet(Model(unet, schedule), teacher).images(noise, gates, checkpoints).square().mean().backward()
        found.append(gates.grad)
    torch.testing.assert_close(found[1:], found[:1] * 2)
    assert found[0][0].abs().max() == 0 < found[0][1:].abs().max()


@pytest.mark.parametrize("kind", ["table", "queries", "encoder"])
def test_a_pruner_begins_by_computing_all_and_every_gate_can_move(kind):
    pruner = dipgo.Pruner(kind, 6, 4, width=16)
    logits = pruner()
    assert logits.shape == (6, 4, 2) and (dipgo.straight_through(logits) == 1).all()
    dipgo.straight_through(logits).sum().backward()
    assert (pruner.bias.grad.abs().sum(dim=-1) > 0).all()
    assert kind == "table" or (pruner.output.grad.abs().sum(dim=(-1, -2)) > 0).all(), "each gate's own head learns"


def test_the_encoder_lets_queries_of_a_step_see_each_other():
    pruner = dipgo.Pruner("encoder", 3, 4, width=16)
    with torch.no_grad():
        pruner.output.normal_(generator=torch.Generator().manual_seed(0))
        before = pruner()
        pruner.queries[1, 2] += 1
        moved = (pruner() - before).abs().sum(dim=-1) > 1e-6
    assert moved[1].all() and not moved[[0, 2]].any()


def test_groups(described):
    assert dipgo.grouping(described, "layers").tolist() == list(range(len(described)))
    assert set(dipgo.grouping(described, "columns")) == {0}
    levels = dipgo.grouping(described, "levels")
    assert len(set(levels)) == 7 and levels[described.index["up1.0"]] == levels[described.index["up1.up"]]


def test_prices_are_executed_macs(prices, unet, teacher):
    gates = np.random.default_rng(0).random((10, len(teacher.blocks))) < 0.6
    plan = teacher.with_cells(prices.cells(gates))
    costs = prices.costs
    assert prices.kept(gates) == pytest.approx(costs.executed(plan) / (10 * costs.call))
    assert prices.kept(np.ones_like(gates)) == 1


def test_a_weight_is_what_switching_the_gate_off_frees(prices, described):
    gates = np.ones((3, len(described)), bool)
    static = prices.weights("static", gates)
    one = gates.copy()
    one[1, described.index["up0.0"]] = False  # with it fall the middle and the level before
    freed = (prices.kept(gates) - prices.kept(one)) * 3
    assert static[1, described.index["up0.0"]] == pytest.approx(freed)
    assert freed > prices.costs.blocks["up0.0"] / prices.costs.call
    assert prices.weights("marginal", one)[1, described.index["mid"]] == 0  # it is dead already
    assert (prices.weights("none", gates) == 1).all()


@pytest.mark.parametrize("method", list(dipgo.PRUNE))
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.7])
def test_a_plan_costs_what_was_asked(prices, unet, schedule, described, method, keep):
    teacher = Plan.full(trailing(50, 1000), NoiseSchedule.of(schedule), described)
    scores = np.random.default_rng(round(10 * keep)).random((50, len(described)))
    plan = dipgo.prune(scores, prices, keep, teacher, method)
    assert prices.costs.executed(plan) / (50 * prices.costs.call) == pytest.approx(keep, abs=0.0125)


@pytest.mark.parametrize("kind", ["ssim", "l1", "l2", "ssim+l1"])
def test_consistency_is_0_for_the_same_images_and_grows(kind, noise):
    images = noise.clamp(-1, 1)
    values = [float(dipgo.consistency(images + shift, images, kind)) for shift in (0, 0.2, 0.5)]
    assert values[0] == pytest.approx(0, abs=1e-5) and values[0] < values[1] < values[2]


@pytest.fixture(autouse=True)
def _saves_at_each_update(monkeypatch):
    monkeypatch.setattr(learning, "SAVE_EVERY", -1)


def run(unet, schedule, short, prices, work, kill=99, bad=99, start=None, watch=None, **changes):
    recipe = dipgo.Recipe(**{"updates": 12, "batch": 2, "learning_rate": 20.0} | changes)
    pruner = dipgo.Pruner("table", short.steps, len(set(prices.groups)), start=start)

    def bank(first, count):
        if first >= kill:
            raise KeyboardInterrupt
        return sampling.noise("search", 0, first, count, (1, 16, 16)) * (float("nan") if first >= bad else 1)

    histories = dipgo.train({"one": dipgo.Training(pruner, prices, recipe, watch)},
                            dipgo.SuperNet(Model(unet, schedule), short), bank, work=work)
    return pruner, histories["one"]


@pytest.mark.parametrize("reuse", [0, 2])
def test_pruners_trained_in_one_batch_are_those_trained_alone(unet, schedule, short, described, prices, tmp_path,
                                                              reuse):
    """Rules, gates, rates, noise and lengths differ; one training is watched and ends first."""
    def trainings(names):
        by_levels = dipgo.Prices(described, prices.costs, dipgo.grouping(described, "levels"), reuse)
        by_layers = dipgo.Prices(described, prices.costs, prices.groups, reuse)
        made = {"paper": (by_levels, "queries", {"learning_rate": 3.0}),
                "same noise": (by_levels, "table", {"fresh": False, "loss": "l2", "learning_rate": 20.0}),
                "annealed": (by_layers, "table", {"annealed": True, "learning_rate": 0.3, "batch": 1, "updates": 5}),
                "watched": (by_layers, "table", {"learning_rate": 30.0})}
        looks = iter([2.0, 1.0, 3.0])
        watch = dipgo.Watch(lambda pruner: next(looks), every=1, patience=1)
        return {name: dipgo.Training(dipgo.Pruner(kind, short.steps, own.gates, width=8), own,
                                     dipgo.Recipe(**{"updates": 4, "batch": 2} | changes),
                                     watch if name == "watched" else None)
                for name, (own, kind, changes) in made.items() if name in names}

    asked = []

    def bank(first, count, kill=99):
        asked.append((first, count))
        if first >= kill:
            raise KeyboardInterrupt
        return sampling.noise("search", 0, first, count, (1, 16, 16)).double()

    model = copy.deepcopy(unet).double()
    net = dipgo.SuperNet(Model(model, schedule), short, reuse=reuse)
    names = ("paper", "same noise", "annealed", "watched")
    with pytest.raises(KeyboardInterrupt):  # after "watched" has ended
        dipgo.train(trainings(names), net, partial(bank, kill=6), work=tmp_path / "together")
    asked.clear()
    together = trainings(names)
    histories = dipgo.train(together, net, bank, work=tmp_path / "together")
    assert set(asked) == {(6, 2), (0, 2), (3, 1), (4, 1)}, "it goes on where it was"
    assert [len(histories[name]) for name in names] == [4, 4, 5, 3]
    for name in names:
        alone = trainings([name])
        history = dipgo.train(alone, net, bank, work=tmp_path / name)[name]
        assert [row["gates"] for row in histories[name]] == [row["gates"] for row in history]
        assert [row["consistency"] for row in histories[name]] == pytest.approx([row["consistency"] for row in history])
        begun = trainings([name])[name].pruner.state_dict()
        for part, tensor in alone[name].pruner.state_dict().items():
            torch.testing.assert_close(together[name].pruner.state_dict()[part], tensor, rtol=1e-4, atol=1e-5)
        assert any((tensor != begun[part]).any() for part, tensor in alone[name].pruner.state_dict().items())


def test_a_killed_training_goes_on_to_the_same_gates(unet, schedule, short, prices, tmp_path):
    whole, history = run(unet, schedule, short, prices, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(unet, schedule, short, prices, tmp_path / "broken", kill=22)
    again, told = run(unet, schedule, short, prices, tmp_path / "broken")
    assert torch.equal(whole.bias, again.bias) and told == history
    assert history[0]["kept"] == 1 and history[0]["sparsity"] == pytest.approx(1)
    assert min(row["kept"] for row in history) < 1


@pytest.mark.parametrize("kill", [99, 5, 9, 13])
def test_a_watched_training_ends_with_its_best_look(unet, schedule, short, prices, tmp_path, kill):
    seen = []

    def look(pruner):  # 3, 1, 2, 3, ...: the second look is the best
        seen.append(pruner.bias.detach().clone())
        return {1: 3.0, 2: 1.0}.get(len(seen), float(len(seen)))

    watch = dipgo.Watch(look, every=2, patience=2)
    if kill < 99:
        with pytest.raises(KeyboardInterrupt):
            run(unet, schedule, short, prices, tmp_path, kill=kill, updates=40, watch=watch)
    pruner, history = run(unet, schedule, short, prices, tmp_path, updates=40, watch=watch)
    assert [row["look"] for row in history if "look" in row] == [3.0, 1.0, 3.0, 4.0] and len(history) == 8
    assert torch.equal(pruner.bias, seen[1])
    assert run(unet, schedule, short, prices, tmp_path, updates=40, watch=watch)[1] == history, "and is over for good"


@pytest.mark.parametrize(("looks", "over"), [
    ([], False), ([2, 2, 2, 2], False), ([2, 1, 3], False), ([2, 1, 3, 3], True), ([1, 2, 1, 2], False)])
def test_looks_that_stay_the_same_do_not_end_a_training(looks, over):
    assert dipgo.Watch(None, 1, 2).over(looks) == over


def test_levels_and_marginal_weights_train_too(unet, schedule, short, described, prices, tmp_path):
    levels = dipgo.Prices(described, prices.costs, dipgo.grouping(described, "levels"))
    _, history = run(unet, schedule, short, levels, tmp_path, weights="marginal", loss="l2", updates=3)
    assert len(history) == 3 and len(history[0]["gates"][0]) == 7


def test_a_gradient_that_is_no_number_stops_and_keeps_what_was_good(unet, schedule, short, prices, tmp_path):
    with pytest.raises(FloatingPointError, match="update 10 is no number. Lower the learning rate"):
        run(unet, schedule, short, prices, tmp_path, bad=20)
    with pytest.raises(KeyboardInterrupt):
        run(unet, schedule, short, prices, tmp_path, kill=20)
    pruner, history = run(unet, schedule, short, prices, tmp_path)
    assert pruner.bias.isfinite().all() and len(history) == 12


def test_annealed_gates_follow_a_falling_budget(unet, schedule, short, prices, tmp_path):
    recipe = dipgo.Recipe(12, 2, 0.1, annealed=True, stop=0.3)
    pruner, history = run(unet, schedule, short, prices, tmp_path, learning_rate=0.1, stop=0.3, annealed=True,
                          start=dipgo.evenly(short.steps))
    kept, budgets = [row["kept"] for row in history], [recipe.budget(update) for update in range(12)]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == pytest.approx(0.3) and budgets[0] < 0.5
    assert all(0 <= budget - cost < 0.1 for cost, budget in zip(kept, budgets))
    begun = dipgo.Pruner("table", short.steps, len(short.blocks), start=dipgo.evenly(short.steps))
    moved = (pruner.bias - begun.bias)[1:].detach().square().mean().sqrt()
    assert 0.1 < moved < 1.2, "each of twelve steps is at most 0.1 long"
    with pytest.raises(ValueError, match="annealed gates need a table of logits, not queries"):
        dipgo.Training(dipgo.Pruner("queries", 5, 14), prices, recipe)


def test_evenly_spaced_steps():
    scores = dipgo.evenly(9)[:, 0]
    assert scores[0] == 1 and len(set(scores)) == 9 and scores.min() > 0
    kept = [sorted(np.argsort(-scores)[:count].tolist()) for count in (1, 2, 3, 4)]
    assert kept == [[0], [0, 5], [0, 5, 7], [0, 3, 5, 7]]


def test_scores_are_a_genome(prices, unet, teacher):
    space = dipgo.ScoreSpace(prices, teacher, 0.4)
    scores = np.random.default_rng(0).random((teacher.steps, len(teacher.blocks)))
    genome = space.encode(scores)
    assert set(genome) == set(space.distributions()) and len(genome) == (teacher.steps - 1) * len(teacher.blocks)
    plan = space.decode(genome)
    assert plan.key == dipgo.prune(scores, prices, 0.4, teacher).key
    assert prices.costs.executed(plan) <= 0.4 * teacher.steps * prices.costs.call


def test_known_scores_and_the_same_shaken_fill_a_population(prices, teacher):
    space = dipgo.ScoreSpace(prices, teacher, 0.4)
    scores = np.random.default_rng(0).normal(3, 5, (teacher.steps, len(teacher.blocks)))
    learnt = [scores, dipgo.evenly(teacher.steps).repeat(len(teacher.blocks), 1)]
    genomes = space.known(learnt, 6, seed=1)
    assert len(genomes) == 6 and all(set(genome) == set(space.distributions()) for genome in genomes)
    assert all(0 <= gene <= 1 for genome in genomes for gene in genome.values())
    assert [space.decode(genome).key for genome in genomes[:2]] == [
        dipgo.prune(known, prices, 0.4, teacher).key for known in learnt], "ranks keep the order, so the plan"
    moved = [np.subtract(list(genomes[2 + i].values()), list(genomes[i % 2].values())) for i in range(4)]
    assert all(0.05 < np.abs(far).mean() < 0.12 for far in moved) and not np.allclose(moved[0], moved[2])
    assert space.known(learnt, 6, seed=1) == genomes != space.known(learnt, 6, seed=2)
    assert space.known(learnt, 1, seed=1) == genomes[:1]


def test_what_lies_outside_whole_columns(described, teacher, prices):
    cells = np.ones((teacher.steps, len(teacher.blocks)), bool)
    cells[3] = False
    steps_only = teacher.with_cells(cells)
    assert dipgo.outside_columns(steps_only, prices.costs) == 0
    assert dipgo.outside_columns(teacher, prices.costs) == 0
    cells[5] = described.branch(0)
    mixed = dipgo.outside_columns(teacher.with_cells(cells), prices.costs)
    one, two = (sum(prices.costs.blocks[name] for name, on in zip(described.names, row) if not on)
                for row in (cells[3], cells[5]))
    assert mixed == pytest.approx(two / (one + two))


def test_nested_checkpoints_hold_little_more_for_many_steps(unet, schedule, described):
    def peak(steps, checkpoints):
        full = Plan.full(trailing(steps, 1000), NoiseSchedule.of(schedule), described)
        net, gates = dipgo.SuperNet(Model(unet, schedule), full), torch.ones(steps, len(described), requires_grad=True)
        start = sampling.noise("search", 0, 0, 1, (1, 16, 16))
        return (cost.peak_memory(lambda: net.images(start, gates, checkpoints).mean().backward()),
                net.kept(start, gates.detach()))

    few, many = {kind: peak(10, kind) for kind in ("steps", "nested")}, peak(50, "nested")
    assert many[0] < 1.6 * few["nested"][0]
    all_kept = peak(20, "none")
    assert all_kept[1] == pytest.approx(all_kept[0], rel=0.3)
    assert all_kept[1] == pytest.approx(2 * few["steps"][1], rel=0.01)
    assert few["steps"][0] < 0.6 * all_kept[0]


def test_a_training_takes_checkpoints_where_memory_is_short(unet, schedule, short, prices, tmp_path, monkeypatch):
    taken = []
    images = dipgo.SuperNet.images

    def spied(net, noise, gates, checkpoints):
        taken.append(checkpoints)
        return images(net, noise, gates, checkpoints)

    monkeypatch.setattr(dipgo.SuperNet, "images", spied)
    free = [run(unet, schedule, short, prices, tmp_path / "much", updates=2)]
    monkeypatch.setattr(learning, "_free", lambda device: 100_000 if device == next(unet.parameters()).device else 0)
    free.append(run(unet, schedule, short, prices, tmp_path / "little", updates=2))
    assert taken == ["none"] * 2 + ["none", "nested"] * 2
    torch.testing.assert_close(free[0][0].bias, free[1][0].bias)
