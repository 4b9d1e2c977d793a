r"""Solvers as tables of numbers: everything that turns network outputs into the next image, worked out beforehand.

Every solver here is linear in what the network gave. With :math:`m_i` the output at step i, turned into the solver's
own quantity (the data, the noise or the velocity) by the x and the timestep of that step,

.. math:: y_i = A_i y_{i-1} + \sum_j B_{ij} m_{i-j} \quad\text{(a corrector; else } y_i = x_i\text{)}, \qquad
          x_{i+1} = a_i y_i + \sum_j b_{ij} m_{i-j}.

So one walk (`advance`) serves all of them, in sampling as in training through the run, and two solvers are compared by
their tables. Tables are in float64 and differentiable in the timesteps, which may lie between the integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lib.grid.plan import BetaSchedule, NoiseSchedule, Plan, PlanError

QUANTITIES = {"ddim": "data", "dpmsolver++": "data", "unipc": "data", "plms": "noise", "pndm": "noise",
              "euler": "velocity"}
"""What each solver is linear in."""
ADAMS_BASHFORTH = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
                   4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
FEW = 15
"""With fewer steps than this diffusers' DPM-Solver++ ends in lower orders."""

State = tuple[Tensor, ...]
"""What a solver remembers between steps: y, then m of the last steps, the newest first."""


@dataclass(frozen=True)
class Table:
    """A solver's numbers over S steps; J is how many outputs it looks back on.

    Attributes
    ----------
    from_x, from_output : Tensor, (S,): m_i = from_x_i x_i + from_output_i output_i
    a : Tensor, (S,)
    b : Tensor, (S, J)
    A : Tensor, (S,), and B : Tensor, (S, J), of the corrector; None where there is none. Row 0 is not read.
    """

    from_x: Tensor
    from_output: Tensor
    a: Tensor
    b: Tensor
    A: Tensor | None = None
    B: Tensor | None = None


def advance(table: Table, step: int, x: Tensor, output: Tensor, before: State = ()) -> tuple[Tensor, State]:
    """Make one step.

    Parameters
    ----------
    x : Tensor, (B, ...), before the step
    output : Tensor, (B, ...), of the network, guided
    before : State that the last step gave; () at the first

    Returns
    -------
    x, state : after the step; nothing is changed in place, so a checkpoint may make the step again
    """
    m = table.from_x[step] * x + table.from_output[step] * output
    history = (m, *before[1:])[:table.b.shape[1]]
    y = x
    if table.A is not None and step:
        y = table.A[step] * before[0] + sum(weight * past for weight, past in zip(table.B[step], history))
    following = table.a[step] * y + sum(weight * past for weight, past in zip(table.b[step], history))
    return following, (y, *history)


@lru_cache
def _log_snr_of(schedule: BetaSchedule) -> Tensor:
    """Give log(alpha / sigma) at every training timestep, as diffusers has it."""
    kept = DDIMScheduler(num_train_timesteps=schedule.train_timesteps, beta_start=schedule.beta_start,
                         beta_end=schedule.beta_end, beta_schedule=schedule.beta_schedule).alphas_cumprod.double()
    return (kept / (1 - kept)).log() / 2


def noise_levels(timesteps: Sequence[float] | Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    r"""Give alpha and sigma of x_t = alpha x_0 + sigma noise at timesteps; between the integers log-SNR is a line.

    Returns
    -------
    alpha, sigma : Tensor, (S,), float64
    """
    t = torch.as_tensor(timesteps, dtype=torch.float64)
    if not isinstance(schedule, BetaSchedule):  # flow matching: the timestep is the noise's share
        return 1 - t / schedule.train_timesteps, t / schedule.train_timesteps
    known = _log_snr_of(schedule)
    left = t.detach().floor().clamp(0, len(known) - 2).long()
    half = torch.lerp(known[left], known[left + 1], t - left)
    return torch.sigmoid(2 * half).sqrt(), torch.sigmoid(-2 * half).sqrt()


def abscissae(timesteps: Sequence[float], schedule: NoiseSchedule, kind: str) -> Tensor:
    """Give the numbers over which forecasts are drawn, (S,), float64.

    Parameters
    ----------
    kind : "log_snr", "timestep" or "step" (the number of the step in the plan)
    """
    if kind == "log_snr":
        alpha, sigma = noise_levels(timesteps, schedule)
        return 2 * (alpha / sigma).log()
    return torch.arange(len(timesteps), dtype=torch.float64) if kind == "step" else torch.tensor(
        timesteps, dtype=torch.float64)


def forecast(at: float, known: Sequence[float]) -> list[float]:
    """Give the weights of the polynomial through values at `known`, read off at `at` (Lagrange).

    One value is held, two make a line, three a parabola (TaylorSeer, arXiv 2503.06923, as a state of a cell).

    >>> forecast(3.0, [2.0, 1.0])
    [2.0, -1.0]
    """
    weights = []
    for i, own in enumerate(known):
        weight = 1.0
        for j, other in enumerate(known):
            if i != j:
                weight *= (at - other) / (own - other)
        weights.append(weight)
    return weights


def coefficients(solver: str, timesteps: Sequence[float] | Tensor, schedule: NoiseSchedule, *, order: int,
                 final_sigma: str = "zero") -> Table:
    """Work a solver's table out.

    Parameters
    ----------
    solver : a key of `QUANTITIES`
        "ddim" (Song et al. 2021, eta 0; DPM-Solver++ of order 1), "dpmsolver++" (Lu et al. 2022, order 1 to 3,
        midpoint), "plms" (Liu et al. 2022: Adams-Bashforth on the noise, with rising order up to `order`), "pndm" (the
        same as diffusers walks it: the second timestep is repeated), "unipc" (Zhao et al. 2023, bh2, order 1 or 2, with
        its corrector), "euler" (of flow matching)
    timesteps : (S,), falling; gradients flow into a Tensor
    order : int
    final_sigma : "zero" or "sigma_min": where the last step lands

    Raises
    ------
    PlanError
        If the solver does not go with the schedule.
    """
    t = torch.as_tensor(timesteps, dtype=torch.float64)
    alpha, sigma = noise_levels(t, schedule)
    if final_sigma == "zero":
        end = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    else:
        end = noise_levels([0.0], schedule)
    alpha, sigma = torch.cat([alpha, end[0]]), torch.cat([sigma, end[1]])
    if solver == "euler" and isinstance(schedule, BetaSchedule):
        raise PlanError("solver euler walks flow matching; for a schedule of betas take ddim or dpmsolver++.")
    from_x, from_output = _conversion(QUANTITIES[solver], schedule.prediction, alpha[:-1], sigma[:-1])
    if solver == "euler":
        return Table(from_x, from_output, torch.ones_like(from_x), (sigma[1:] - sigma[:-1])[:, None])
    if solver in ("plms", "pndm"):
        return Table(from_x, from_output, *_adams_bashforth(alpha, sigma, order, repeated=solver == "pndm"))
    if solver == "unipc":
        return Table(from_x, from_output, *_unipc(alpha, sigma, order))
    return Table(from_x, from_output, *_dpm_solver(alpha, sigma, order))


def of(plan: Plan) -> Table:
    """Give the table of a plan's solver.

    Raises
    ------
    PlanError
        If it is not finite: where a timestep holds no noise, or nothing else.
    """
    if plan.table is None:
        table = coefficients(plan.solver, plan.timesteps, plan.schedule, order=plan.order,
                             final_sigma=plan.final_sigma)
        if not all(part.isfinite().all() for part in vars(table).values() if part is not None):
            raise PlanError(f"solver {plan.solver} of order {plan.order} has no finite coefficients at these steps: "
                            "leave pure noise and the clean image out, or take another solver.")
        return table
    numbers = {name: torch.tensor(getattr(plan.table, name), dtype=torch.float64) for name in
               ("a", "b") + ("A", "B") * bool(plan.table.A)}
    alpha, sigma = noise_levels(plan.timesteps, plan.schedule)
    return Table(*_conversion(plan.table.quantity, plan.schedule.prediction, alpha, sigma), **numbers)


def _conversion(quantity: str, prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Give how x and the output make the quantity: m = from_x x + from_output output."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {("data", "epsilon"): (1 / alpha, -sigma / alpha), ("data", "v_prediction"): (alpha, -sigma),
            ("data", "sample"): (zero, one), ("data", "flow"): (one, -sigma),
            ("noise", "epsilon"): (zero, one), ("noise", "v_prediction"): (sigma, alpha),
            ("noise", "sample"): (1 / sigma, -alpha / sigma), ("noise", "flow"): (one, alpha),
            ("velocity", "flow"): (zero, one)}[quantity, prediction]


def _rows(rows: Sequence[Sequence[Tensor | float]], width: int) -> Tensor:
    """Stack rows of numbers, filled up with zeros to a width; gradients flow."""
    return torch.stack([torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in
                                     (*row, *[0.0] * (width - len(row)))]) for row in rows])


def _dpm_solver(alpha: Tensor, sigma: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """DPM-Solver++, data prediction (Lu et al. 2022b, eq. 10 and algorithm 2; midpoint form), with diffusers' ends."""
    steps, rows, a = len(alpha) - 1, [], sigma[1:] / sigma[:-1]
    half = (alpha / sigma.clamp(min=1e-300)).log()  # lambda = log(alpha / sigma)
    for i in range(steps):
        here = min(order, i + 1)
        if i == steps - 1 and (float(sigma[-1].detach()) == 0 or steps < FEW):
            here = 1
        elif i == steps - 2 and steps < FEW:
            here = min(here, 2)
        if here == 1:  # alpha' (1 - e^-h), without the exponent, which is infinite where sigma' is 0
            rows.append([alpha[i + 1] - sigma[i + 1] / sigma[i] * alpha[i]])
            continue
        h = half[i + 1] - half[i]
        first = -alpha[i + 1] * torch.expm1(-h)
        r_0 = (half[i] - half[i - 1]) / h
        if here == 2:
            rows.append([first * (1 + 0.5 / r_0), -first * 0.5 / r_0])
            continue
        r_1 = (half[i - 1] - half[i - 2]) / h
        second = alpha[i + 1] * (torch.expm1(-h) / h + 1)
        third = -alpha[i + 1] * ((torch.expm1(-h) + h) / h**2 - 0.5)
        bend = r_0 / (r_0 + r_1)
        newer = second * (1 + bend) + third / (r_0 + r_1)  # of (m_0 - m_1) / r_0
        older = -second * bend - third / (r_0 + r_1)  # of (m_1 - m_2) / r_1
        rows.append([first + newer / r_0, older / r_1 - newer / r_0, -older / r_1])
    return a, _rows(rows, order)


def _adams_bashforth(alpha: Tensor, sigma: Tensor, order: int, repeated: bool) -> tuple[Tensor, Tensor]:
    """Mix the last noises by Adams and Bashforth's weights, then go one DDIM step with the mixture (PLMS, eq. 12).

    diffusers' PNDM calls the network once more at the second timestep, to mend the first step by the mean of both
    noises, and leaves that call out of the history.
    """
    a, rows = alpha[1:] / alpha[:-1], []
    along = sigma[1:] - sigma[:-1] * a
    for i in range(len(a)):
        calls = i - 1 if repeated and i > 1 else i
        weights = list(ADAMS_BASHFORTH[min(order, calls + 1)])
        if repeated and i == 1:
            rows.append([along[0] / 2, -along[0] / 2])
            continue
        if repeated and 2 <= i <= order:
            weights.insert(i - 1, 0.0)  # the repeated call is i - 1 steps back
        rows.append([along[i] * weight for weight in weights])
    return a, _rows(rows, order + repeated)


def _unipc(alpha: Tensor, sigma: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """UniPC with B(h) = e^h - 1, data prediction (Zhao et al. 2023, algorithms 1 and 2), orders 1 and 2."""
    steps, half = len(alpha) - 1, (alpha / sigma.clamp(min=1e-300)).log()
    orders = [min(order, i + 1, steps - i) for i in range(steps)]
    a, b, B = sigma[1:] / sigma[:-1], [], [[0.0]]
    for i in range(steps):
        first = alpha[i + 1] - a[i] * alpha[i]  # -alpha' (e^-h - 1)
        if orders[i] == 1:
            b.append([first])
        else:
            r = (half[i - 1] - half[i]) / (half[i + 1] - half[i])
            b.append([first - first * 0.5 / r, first * 0.5 / r])
    for i in range(1, steps):  # the corrector goes from step i - 1 to i once more, knowing m_i
        first = alpha[i] - a[i - 1] * alpha[i - 1]
        if orders[i - 1] == 1:
            B.append([first / 2, first / 2])
            continue
        h = half[i] - half[i - 1]
        r = (half[i - 2] - half[i - 1]) / h
        phi = torch.expm1(-h)
        second = -phi / h - 1
        right = second / phi, 2 * (-second / h - 0.5) / phi
        past = (right[1] - right[0]) / (r - 1)
        now = right[0] - past
        B.append([first * now, first * (1 - now - past / r), first * past / r])
    A = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
    width = max(map(len, (*b, *B)))
    return a, _rows(b, width), A, _rows(B, width)
