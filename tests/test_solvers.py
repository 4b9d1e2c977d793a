"""Solvers as tables: each is diffusers' own scheduler on the same timesteps, and differentiable in them."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from lib.grid import solvers
from lib.grid.plan import FlowSchedule, Learned, NoiseSchedule, Plan, PlanError, quadratic, trailing
from lib.teachers import networks

BETAS = networks.noise_schedule().config
FLOW = FlowSchedule(train_timesteps=1000, shift=3.0)


def network(x, t):
    """A smooth stand-in for a network, in float64."""
    return torch.sin(1.3 * x + 0.002 * float(t)) + 0.1 * x


def theirs(scheduler, x):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def ours(table, timesteps, x):
    state = ()
    for step, t in enumerate(timesteps):
        x, state = solvers.advance(table, step, x, network(x, t), state)
    return x


def schedule(prediction="epsilon", **more):
    return DDIMScheduler.from_config(BETAS, prediction_type=prediction, **more)


@pytest.fixture
def x():
    return torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def near(a, b):
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("final_sigma", "to_one"), [("zero", True), ("sigma_min", False)])
def test_ddim(x, prediction, final_sigma, to_one):
    scheduler = schedule(prediction, set_alpha_to_one=to_one)
    scheduler.set_timesteps(10)
    timesteps = trailing(10, 1000)
    table = solvers.coefficients("ddim", timesteps, NoiseSchedule.of(scheduler), order=1, final_sigma=final_sigma)
    near(ours(table, timesteps, x), theirs(scheduler, x))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
@pytest.mark.parametrize("timesteps", [trailing(9, 1000), quadratic(17, 1000), (999, 700, 650, 20), (999,)], ids=len)
def test_dpm_solver_on_any_list_of_timesteps(x, prediction, order, final_sigma, timesteps):
    scheduler = DPMSolverMultistepScheduler.from_config(
        schedule(prediction).config, algorithm_type="dpmsolver++", solver_order=order, final_sigmas_type=final_sigma,
        lower_order_final=True)
    scheduler.set_timesteps(timesteps=list(timesteps))
    table = solvers.coefficients("dpmsolver++", timesteps, NoiseSchedule.of(schedule(prediction)), order=order,
                                 final_sigma=final_sigma)
    near(ours(table, timesteps, x), theirs(scheduler, x))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
def test_unipc(x, order, steps, final_sigma):
    scheduler = UniPCMultistepScheduler.from_config(schedule().config, solver_order=order, solver_type="bh2",
                                                    timestep_spacing="trailing", final_sigmas_type=final_sigma)
    scheduler.set_timesteps(steps)
    timesteps = tuple(scheduler.timesteps.tolist())
    table = solvers.coefficients("unipc", timesteps, NoiseSchedule.of(schedule()), order=order,
                                 final_sigma=final_sigma)
    near(ours(table, timesteps, x), theirs(scheduler, x))


@pytest.mark.parametrize(("to_one", "final_sigma"), [(True, "zero"), (False, "sigma_min")])
@pytest.mark.parametrize("steps", [5, 10, 50])
def test_pndm_calls_once_more_than_it_has_steps(x, steps, to_one, final_sigma):
    config = {name: BETAS[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
    scheduler = PNDMScheduler(**config, skip_prk_steps=True, set_alpha_to_one=to_one)
    scheduler.set_timesteps(steps)
    timesteps = tuple(scheduler.timesteps.tolist())
    assert len(timesteps) == steps + 1 and timesteps[1] == timesteps[2]
    table = solvers.coefficients("pndm", timesteps, NoiseSchedule.of(schedule()), order=4, final_sigma=final_sigma)
    near(ours(table, timesteps, x), theirs(scheduler, x))


def test_plms_of_order_1_is_ddim_and_its_weights_are_adams_and_bashforths(x):
    timesteps, fits = trailing(10, 1000), NoiseSchedule.of(schedule())
    plms, ddim = (solvers.coefficients(name, timesteps, fits, order=1) for name in ("plms", "ddim"))
    near(ours(plms, timesteps, x), ours(ddim, timesteps, x))
    table = solvers.coefficients("plms", timesteps, fits, order=4)
    for weights in table.b / table.b.sum(1, keepdim=True):
        order = int((weights != 0).sum())
        powers = -torch.arange(order, dtype=torch.float64)  # exact for polynomials of degree order - 1 over one step
        for degree in range(order):
            assert float((weights[:order] * powers**degree).sum()) == pytest.approx(1 / (degree + 1))


def test_euler_of_flow_matching(x):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    timesteps = tuple(scheduler.timesteps.tolist())
    assert timesteps[0] == 1000
    fits = NoiseSchedule.of(scheduler)
    assert fits == FLOW
    near(ours(solvers.coefficients("euler", timesteps, fits, order=1), timesteps, x), theirs(scheduler, x))
    scheduler.set_timesteps(7)
    near(ours(solvers.coefficients("ddim", timesteps, fits, order=1), timesteps, x), theirs(scheduler, x))
    with pytest.raises(PlanError, match="euler walks flow matching"):
        solvers.coefficients("euler", (999, 3), NoiseSchedule.of(schedule()), order=1)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("unipc", 2),
                                               ("plms", 4)])
def test_gradients_flow_into_the_timesteps(x, solver, order):
    fits = NoiseSchedule.of(schedule())

    def value(timesteps):
        return ours(solvers.coefficients(solver, timesteps, fits, order=order), [500] * len(timesteps), x).sum()

    t = torch.tensor([999.0, 801.3, 612.7, 420.2, 99.6], dtype=torch.float64, requires_grad=True)
    value(t).backward()
    for place in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[place] = 1e-4
        slope = (value(t.detach() + step) - value(t.detach() - step)) / 2e-4 if place else None
        if place:
            assert float(t.grad[place]) == pytest.approx(float(slope), rel=1e-4, abs=1e-8)


def test_every_solver_converges_to_the_same_image(x):
    """With smooth outputs more steps come nearer, the higher orders sooner."""
    fits = NoiseSchedule.of(schedule())
    exact = ours(solvers.coefficients("ddim", trailing(1000, 1000), fits, order=1), trailing(1000, 1000), x)

    def error(solver, order):
        timesteps = trailing(50, 1000)
        return float((ours(solvers.coefficients(solver, timesteps, fits, order=order), timesteps, x) - exact).norm())

    ddim = error("ddim", 1)
    assert all(error(solver, order) < ddim for solver, order in [("dpmsolver++", 2), ("unipc", 2), ("plms", 4)])


def test_timesteps_between_the_integers_lie_on_a_line_in_log_snr():
    fits = NoiseSchedule.of(schedule())
    alpha, sigma = solvers.noise_levels([400, 400.25, 401], fits)
    kept = schedule().alphas_cumprod.double()
    np.testing.assert_allclose(alpha[[0, 2]] ** 2, kept[[400, 401]], rtol=1e-12)
    half = (alpha / sigma).log()
    assert float((half[1] - half[0]) / (half[2] - half[0])) == pytest.approx(0.25)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1)


def test_a_learned_solver_keeps_its_own_table(x):
    fits, timesteps = NoiseSchedule.of(schedule()), (999, 640.5, 300, 20.25)
    table = solvers.coefficients("dpmsolver++", timesteps, fits, order=2)
    plan = Plan.full(timesteps, fits, ("a", "b"), order=2)
    kept = Learned(quantity="data", a=tuple(table.a.tolist()), b=tuple(map(tuple, table.b.tolist())))
    learned = plan.replace(solver="learned", table=kept)
    assert learned.key != plan.key
    near(ours(solvers.of(learned), timesteps, x), ours(solvers.of(plan), timesteps, x))


@pytest.mark.parametrize(("fields", "fault"), [
    ({"table": None}, "table: goes with solver learned"),
    ({"b": ((1.0,), (1.0, 0.5))}, "must be as wide as each other"),
    ({"B": ((1.0,), (1.0,))}, "A and B go together"),
    ({"a": (1.0,)}, "table.a: 1 rows for 2 timesteps"),
    ({"quantity": "velocity"}, "velocity is of flow matching alone")])
def test_a_learned_table_that_does_not_fit_is_refused(fields, fault):
    plan = Plan.full((999, 300), NoiseSchedule.of(schedule()), ("a", "b"))
    table = {"quantity": "data", "a": (1.0, 1.0), "b": ((1.0,), (1.0,))}
    with pytest.raises(PlanError, match=fault):
        plan.replace(solver="learned", table=fields["table"] if "table" in fields else Learned(**table | fields))


def test_coefficients_that_are_not_finite_are_refused():
    flow = Plan.full((1000, 500, 20), FLOW, ("a", "b"), solver="ddim")
    assert solvers.of(flow).b.isfinite().all()
    twice = flow.at(quadratic(30, 1000)[-20:], order=3, final_sigma="sigma_min", solver="dpmsolver++",
                    schedule=NoiseSchedule.of(schedule()), grid=(999, 0))
    for plan in (flow.replace(solver="plms", order=4), twice):
        with pytest.raises(PlanError, match="has no finite coefficients at these steps"):
            solvers.of(plan)
    with pytest.raises(PlanError, match="timesteps: must lie above 0 and up to 1000"):
        flow.at((1000, 500, 0))
    with pytest.raises(PlanError, match="for flow matching take the scheduler's own"):
        Plan.few_steps(4, "uniform", flow)


def test_a_forecast_is_the_polynomial_through_what_is_known():
    assert solvers.forecast(3.0, [2.0]) == [1.0]
    for known in ([5.0, 2.0], [5.0, 2.5, 1.0]):
        weights = solvers.forecast(0.3, known)
        for degree in range(len(known)):
            assert sum(w * k**degree for w, k in zip(weights, known)) == pytest.approx(0.3**degree)
