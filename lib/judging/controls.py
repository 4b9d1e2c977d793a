"""Controls: what else one could do for the same executed MACs, and the one table that shows it.

No cheap plan means anything alone. For any plan the functions here give fewer steps (uniform, quadratic, DPM-Solver++),
DeepCache and random cells at equal executed MACs; where a family has no member of that very cost, two members bracket
it and the score is interpolated on the log.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import pandas as pd

from lib.grid.blocks import Blocks
from lib.grid.plan import Plan
from lib.judging.evaluate import Estimate, Judge, imitation

FEW_STEPS = {"DDIM, uniform": (1, "uniform"), "DDIM, quadratic": (1, "quadratic"),
             "DPM-Solver++, uniform": (2, "uniform"), "DPM-Solver++, quadratic": (2, "quadratic")}


@dataclass(frozen=True)
class Control:
    """One way to spend given MACs: a plan, or two that bracket the cost, with weights that add up to 1."""

    name: str
    plans: tuple[tuple[Plan, float], ...]


def at_equal_macs(target: int, teacher: Plan, blocks: Blocks, macs: Callable[[Plan], int], *, seed: int,
                  branch: int = 0) -> list[Control]:
    """Give every control at `target` executed MACs, over a teacher's steps.

    Parameters
    ----------
    target : int, MACs of all steps
    teacher : Plan, full; its order is DeepCache's and the random cells' too
    macs : callable(plan) -> executed MACs
    seed : int, of the random cells
    branch : int, DeepCache's skip connection

    Returns
    -------
    controls : list of Control
        Without those families that cannot cost so little or so much.
    """
    found = []
    call = macs(Plan.full(teacher.timesteps[:1], teacher.schedule, teacher.blocks, cache=teacher.cache))
    few = [steps for steps in {target // call, target // call + 1} if 1 <= steps <= teacher.schedule.train_timesteps]
    for name, (order, spacing) in FEW_STEPS.items():
        found.append(bracket(name, [Plan.few_steps(steps, spacing, teacher, order) for steps in few], target, macs))
    shallow = blocks.branch(branch)
    found.append(bracket(f"DeepCache, branch {branch}",
                         [Plan.deepcache(interval, shallow, teacher) for interval in range(1, teacher.steps + 1)],
                         target, macs))
    found.append(bracket("random cells", random_cells(target, teacher, macs, seed), target, macs))
    return [control for control in found if control is not None]


def bracket(name: str, family: Iterable[Plan], target: int, macs: Callable[[Plan], int]) -> Control | None:
    """Take the two plans of a family that bracket `target` MACs, or the one that meets it; None if there is none."""
    priced = sorted(((macs(plan), plan) for plan in family), key=lambda pair: pair[0])
    below = [pair for pair in priced if pair[0] <= target]
    above = [pair for pair in priced if pair[0] >= target]
    if not below or not above:
        return None
    (low, cheap), (high, dear) = below[-1], above[0]
    if low == high:
        return Control(name, ((cheap, 1.0),))
    weight = (high - target) / (high - low)
    return Control(name, ((cheap, weight), (dear, 1 - weight)))


def random_cells(target: int, teacher: Plan, macs: Callable[[Plan], int], seed: int) -> list[Plan]:
    """Draw cells at random, twice: just below and just above `target` MACs, found by bisection over nested draws."""
    low, high = 0.0, 1.0
    for _ in range(20):
        keep = (low + high) / 2
        low, high = (keep, high) if macs(Plan.random(keep, seed, teacher)) < target else (low, keep)
    return [Plan.random(keep, seed, teacher) for keep in (low, high)]


def few_steps(teacher: Plan, counts: Mapping[str, Iterable[int]]) -> dict[str, Plan]:
    """Give the few-step plans of each kind in `FEW_STEPS`, named "DDIM, uniform 10"."""
    return {f"{name} {steps}": Plan.few_steps(steps, FEW_STEPS[name][1], teacher, FEW_STEPS[name][0])
            for name, wanted in counts.items() for steps in wanted}


def deepcache(teacher: Plan, blocks: Blocks, intervals: Iterable[int], branches: Iterable[int]) -> dict[str, Plan]:
    """Give uniform DeepCache plans, named "DeepCache, branch 0, 1:5"."""
    return {f"DeepCache, branch {branch}, 1:{interval}": Plan.deepcache(interval, blocks.branch(branch), teacher)
            for branch in branches for interval in intervals}


@dataclass(frozen=True)
class Table:
    """Builds the rows of every quality-cost table.

    Attributes
    ----------
    features : callable(plan) -> Tensor, (n, D), of images from one bank of noise
    macs : callable(plan) -> executed MACs
    judge : Judge
    reference : Plan
        The teacher at T steps under its best solver; ratios are to its score and MACs.
    ddim : Plan
        The teacher at T steps under DDIM, whose ratio stands beside.
    """

    features: Callable
    macs: Callable[[Plan], int]
    judge: Judge
    reference: Plan
    ddim: Plan

    def row(self, control: Control, kind: str) -> dict:
        """Score one way to spend MACs: a plan, or two whose scores are interpolated on the log (the rest linearly).

        `paired` is the squared distance of the features to the reference's from the same noise, `imitation`.
        """
        parts = [(self.features(plan), weight) for plan, weight in control.plans]
        macs = sum(weight * self.macs(plan) for plan, weight in control.plans)
        reference = self.features(self.reference)
        further = [self._further(one) | {"paired": imitation(one, reference, "paired")} for one, _ in parts]
        return {"name": control.name, "kind": kind, "extractor": self.judge.extractor, "n": len(parts[0][0]),
                "steps": "-".join(str(plan.steps) for plan, _ in control.plans), "macs": macs,
                "macs_ratio": self.macs(self.reference) / macs,
                **_columns("score", self.judge.compare(parts, [])),
                **_columns("ratio", self.judge.compare(parts, [(reference, 1.0)])),
                **_columns("ddim_ratio", self.judge.compare(parts, [(self.features(self.ddim), 1.0)])),
                **{name: sum(weight * one[name] for one, (_, weight) in zip(further, parts)) for name in further[0]}}

    @cached_property
    def _further(self) -> Callable:
        """`Judge.further`, once for each plan's features: one plan may stand in many rows."""
        return cache(self.judge.further)

    def rows(self, plans: Mapping[str, Plan], kind: str) -> pd.DataFrame:
        """Score several plans, in their order."""
        return pd.DataFrame([self.row(Control(name, ((plan, 1.0),)), kind) for name, plan in plans.items()])

    def beside(self, name: str, plan: Plan, controls: Iterable[Control]) -> pd.DataFrame:
        """Score controls, each with the plan's score over its own: below 1 the plan is better."""
        own, rows = [(self.features(plan), 1.0)], []
        for control in controls:
            against = self.judge.compare(own, [(self.features(part), weight) for part, weight in control.plans])
            rows.append({"plan": name, "plan_macs": self.macs(plan), **self.row(control, "control"),
                         **_columns("plan_over_control", against),
                         "better": "plan" if against.high < 1 else "control" if against.low > 1 else "tie"})
        return pd.DataFrame(rows)


def best_solver(judge: Judge, features: Callable, teachers: Iterable[Plan]) -> Plan:
    """Give the plan with the best score: the reference among the teacher's solvers."""
    return min(teachers, key=lambda plan: judge.score(features(plan)).value)


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
