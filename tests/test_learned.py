"""Learned steps: they begin as the plan they begin with, sample as the plan they end in, and learn; shortest paths."""

import copy
import itertools

import numpy as np
import pytest
import torch

from lib.grid import blocks, sampling, solvers
from lib.grid.model import Conditions, Model
from lib.grid.plan import NoiseSchedule, Plan, PlanError
from lib.methods import learned
from lib.teachers import networks


@pytest.fixture(scope="module")
def noise():
    return sampling.noise("search", 0, 0, 6, (1, 16, 16))


def moved(start, coefficients, seed=0):
    """Steps whose weights are no longer those that they began with."""
    steps, generator = learned.Steps(start, coefficients), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        steps.gaps += 0.3 * torch.randn(steps.gaps.shape, generator=generator)
        if coefficients:
            steps.changes += 0.5 * torch.randn(steps.changes.shape, generator=generator)
    return steps


@pytest.mark.parametrize("order", [1, 2, 3])
def test_they_begin_as_the_plan_they_begin_with(unet, schedule, teacher, noise, order):
    start = Plan.few_steps(5, "uniform", teacher, order)
    steps = learned.Steps(start)
    assert np.allclose(steps.timesteps().detach(), start.timesteps, atol=1e-3)
    images = steps(Model(unet, schedule), noise, "fp32")
    assert torch.allclose(images, sampling.sample(Model(unet, schedule), start, noise), atol=1e-4)


@pytest.mark.parametrize("coefficients", [False, True])
@pytest.mark.parametrize(("solver", "order"), [("dpmsolver++", 2), ("unipc", 2), ("plms", 4)])
def test_they_sample_as_the_plan_that_they_end_in(unet, schedule, teacher, noise, tmp_path, solver, order,
                                                  coefficients):
    steps = moved(teacher.at((999, 700, 400, 200, 50), solver=solver, order=order), coefficients)
    plan = steps.plan()
    plan.save(tmp_path / "plan.json")
    images = sampling.sample(Model(unet, schedule), Plan.load(tmp_path / "plan.json"), noise)
    assert torch.allclose(steps(Model(unet, schedule), noise, "fp32"), images, atol=1e-4)
    assert not torch.allclose(images, sampling.sample(Model(unet, schedule), steps.start, noise), atol=1e-3)
    assert plan.solver == ("learned" if coefficients else solver) and plan.timesteps[0] == 999


def test_they_draw_the_labels_of_a_transformer(schedule):
    noise = sampling.noise("search", 0, 0, 4, (1, 16, 16))
    torch.manual_seed(0)
    dit = networks.transformer((1, 16, 16), 16, 3, 2, 4, 10).eval().requires_grad_(False)
    for last in (dit.proj_out_1, dit.proj_out_2):  # which begin at zero
        torch.nn.init.normal_(last.weight)
    start = Plan.full((999, 700, 400, 100), NoiseSchedule.of(schedule), blocks.describe(dit), 2)
    steps = moved(start, True)
    model = Model(dit, schedule)
    assert torch.allclose(steps(model, noise, "fp32"), sampling.sample(model, steps.plan(), noise), atol=1e-4)


def test_the_gradient_is_that_of_finite_differences(unet, schedule, teacher, noise):
    steps = moved(Plan.few_steps(4, "uniform", teacher, 2), True)
    aim = torch.zeros(6, 1, 16, 16)

    def loss():
        return (steps(Model(unet, schedule), noise, "fp32") - aim).square().mean()

    loss().backward()
    for weight in (steps.gaps, steps.changes):
        for place in range(0, weight.numel(), 3):
            with torch.no_grad():
                flat, values = weight.view(-1), []
                for way in (1, -1):
                    flat[place] += way * 1e-2
                    values.append(float(loss()))
                    flat[place] -= way * 1e-2
            slope = (values[0] - values[1]) / 2e-2
            assert float(weight.grad.view(-1)[place]) == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_the_timesteps_always_make_a_plan(teacher):
    for seed in range(50):
        steps = learned.Steps(Plan.few_steps(8, "uniform", teacher, 2))
        with torch.no_grad():
            steps.gaps.copy_(30 * torch.randn(8, generator=torch.Generator().manual_seed(seed)))
        gaps = -np.diff((*steps.plan().timesteps, 0))
        assert gaps.min() > learned.CLOSEST * 0.99


@pytest.mark.parametrize("coefficients", [False, True])
def test_they_learn_to_look_like_many_steps(unet, schedule, teacher, tmp_path, coefficients):
    start, noise = Plan.few_steps(3, "uniform", teacher, 1), sampling.noise("search", 0, 0, 16, (1, 16, 16))
    recipe = learned.Recipe(updates=25, batch=8, learning_rate=0.05, coefficients=coefficients)
    model = Model(unet, schedule)
    wanted = sampling.sample(model, teacher, noise)
    found = [learned.learn(model, start, noise, wanted, lambda images: (images.flatten(1),), recipe, precision="fp32",
                           work=tmp_path / name) for name in ("one", "two")]
    (plan, history), (again, _) = found
    assert plan.key == again.key and history[-1]["loss"] < history[0]["loss"]
    fresh = sampling.noise("select", 0, 0, 16, (1, 16, 16))
    many, few, better = (sampling.sample(model, one, fresh) for one in (teacher, start, plan))
    assert (better - many).square().mean() < 0.9 * (few - many).square().mean(), "on noise it has not seen, too"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_they_learn_on_cuda(unet, schedule, teacher, noise, tmp_path):
    moved, start = Model(copy.deepcopy(unet).cuda(), schedule), Plan.few_steps(3, "uniform", teacher, 2)
    wanted, recipe = sampling.sample(moved, teacher, noise), learned.Recipe(updates=3, coefficients=True)
    plan, _ = learned.learn(moved, start, noise, wanted, lambda images: (images.flatten(1),), recipe, precision="fp32",
                            work=tmp_path)
    assert plan.timesteps != start.timesteps
    paths = [learned.shortest(one, teacher, (4,), noise, 2, precision="fp32") for one in (Model(unet, schedule), moved)]
    assert paths[0][4].timesteps == paths[1][4].timesteps


@pytest.mark.parametrize(("start", "message"), [
    (lambda plan: plan.with_cells(np.array([[1] * 10] * 9 + [[0] * 10])[:, :1].repeat(len(plan.blocks), 1)), "a full"),
    (lambda plan: plan.at((999,)), "two steps"),
    (lambda plan: plan.at((999, 500, 500, 100), solver="pndm"), "pndm cannot be moved")])
def test_what_cannot_be_learned_is_refused(teacher, start, message):
    with pytest.raises(PlanError, match=message):
        learned.Steps(start(teacher))


@pytest.mark.parametrize("order", [1, 2])
def test_the_price_of_a_jump_is_that_of_sampling(unet, schedule, teacher, noise, order):
    walked = teacher.replace(order=order)
    price = learned.jumps(Model(unet, schedule), walked, noise, "fp32")
    full = [noise]
    with sampling.graphs.engine(unet, walked, walked.schedule) as engine, torch.inference_mode():
        full += list(sampling.walk(engine, noise, Conditions()))
    assert np.isinf(price[np.tril_indices(11)]).all()
    if order == 1:
        assert np.abs(np.diag(price, 1)).max() < 1e-3, "the teacher's own steps cost nothing"
    one = sampling.sample(Model(unet, schedule), teacher.at(teacher.timesteps[:1]), noise)  # one jump to the image
    assert price[0, 10] == pytest.approx(float((one - full[-1]).flatten(1).norm(dim=1).mean()), rel=1e-3)
    with torch.inference_mode():
        output = unet(full[4], teacher.timesteps[4]).sample
    table = solvers.coefficients("ddim", (teacher.timesteps[4], teacher.timesteps[7]), teacher.schedule, order=1)
    there, _ = solvers.advance(table, 0, full[4], output)
    assert price[4, 7] == pytest.approx(float((there - full[7]).flatten(1).norm(dim=1).mean()), rel=1e-3)


def test_shortest_paths_are_those_of_trying_all(unet, schedule, teacher, noise):
    price = learned.jumps(Model(unet, schedule), teacher, noise, "fp32")

    def length(kept):
        return sum(price[a, b] for a, b in itertools.pairwise((*kept, 10)))

    with pytest.raises(ValueError, match=r"1 to 10 can be kept, got \[3, 11\]"):
        learned.shortest(Model(unet, schedule), teacher, (3, 11), noise, 2, precision="fp32")
    found = learned.shortest(Model(unet, schedule), teacher, (5, 1, 2, 3, 10), noise, 2, precision="fp32")
    assert list(found) == [5, 1, 2, 3, 10]
    for steps, plan in found.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, 10), steps - 1)]
        kept = [teacher.timesteps.index(t) for t in plan.timesteps]
        assert length(kept) == pytest.approx(min(map(length, every))) and plan.order == 2 and plan.computes.all()
