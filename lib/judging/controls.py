"""Controls: what else one could do for the same executed MACs, and the one table that shows it.

No cheap plan means anything alone. For any plan the functions here give fewer steps (uniform, quadratic, DPM-Solver++),
DeepCache and random cells at equal executed MACs; where a family has no member of that very cost, two members bracket
it and the score is interpolated on the log (linearly, where one may be 0).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import pandas as pd
from torch import Tensor

from lib.grid.blocks import Blocks
from lib.grid.plan import Plan
from lib.judging.estimates import MARGIN, WORDS, Contrast, columns
from lib.judging.evaluate import Judge, Measure, Nearness, paired

FEW_STEPS = {"DDIM, uniform": (1, "uniform"), "DDIM, quadratic": (1, "quadratic"),
             "DPM-Solver++, uniform": (2, "uniform"), "DPM-Solver++, quadratic": (2, "quadratic")}

SHOWN = ["name", "macs_ratio", "honest_factor", "score", "ratio", "ratio_low", "ratio_high", "ddim_ratio", "precision",
         "recall", "prompt_score"]
BESIDE = ["plan", "name", "score", "prompt_score", "plan_over_control", "plan_over_control_low",
          "plan_over_control_high", "plan_over_control_word", "second_over_control_word", "prompts_over_control_word",
          "nearness_over_control_word", "strongest"]
"""Columns that are shown of `Table.rows`, and of `Table.beside`; files have all."""


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
    features : callable(plan, by=extractor) -> Tensor, (n, D), of images from the report's bank of noise
    select : callable(plan) -> Tensor, (m, D), of images from the bank on which things are chosen
    macs : callable(plan) -> executed MACs
    judge : Judge
    second : Judge, trained on another task, whose word stands beside the first's
    prompts : what `prompts_of` gives of the report's bank; None where nothing is asked for
    reference : Plan
        The teacher at T steps under its best solver; ratios are to its score and MACs.
    ddim : Plan
        The teacher at T steps under DDIM, whose ratio stands beside.
    fewest : Plan, of `fewest`, by whose MACs the honest factor is
    """

    features: Callable
    select: Callable
    macs: Callable[[Plan], int]
    judge: Judge
    second: Judge
    reference: Plan
    ddim: Plan
    fewest: Plan
    prompts: Measure | None = None

    def row(self, control: Control, kind: str) -> dict:
        """Score one way to spend MACs: a plan, or two whose scores are interpolated on the log (the rest linearly).

        `paired` is the squared distance of the features to the reference's from the same noise. Columns of the second
        judge begin with second_. prompt_score is the share of images that show what was asked for (or CLIP's likeness
        of images and prompts), and prompts_ compares what it lacks with the reference's. `macs_ratio` is over the
        reference's MACs, `honest_factor` over those of the fewest steps that are as good.
        """
        macs = sum(weight * self.macs(plan) for plan, weight in control.plans)
        score, second = (judge.blend(self._seen(control, judge)) for judge in (self.judge, self.second))
        further = [self._further(self.features(plan)) for plan, _ in control.plans]
        weights = [weight for _, weight in control.plans]
        return {"name": control.name, "kind": kind, "extractor": self.judge.extractor,
                "second_extractor": self.second.extractor, "n": len(self.features(control.plans[0][0])),
                "steps": "-".join(str(plan.steps) for plan, _ in control.plans), "macs": macs,
                "macs_ratio": self.macs(self.reference) / macs, "honest_factor": self.macs(self.fewest) / macs,
                "raw": score.raw, **columns("score", score.estimate), **columns("second_score", second.estimate),
                **self._against(control, self.reference, self.judge).columns("ratio"),
                **self._against(control, self.reference, self.second).columns("second_ratio"),
                **self._against(control, self.ddim, self.judge).columns("ddim_ratio"), **self._asked(control),
                **{name: sum(weight * one[name] for one, weight in zip(further, weights)) for name in further[0]}}

    def _asked(self, control: Control) -> dict:
        if self.prompts is None:
            return {}
        share = self.prompts.blend(self._seen(control, self.prompts)).estimate
        return {"prompt_score": 1 - share.value, "prompt_score_low": 1 - share.high, "prompt_score_high": 1 - share.low,
                **self._against(control, self.reference, self.prompts).columns("prompts")}

    def _seen(self, control: Control, judge: Measure) -> list[tuple[Tensor, float]]:
        return [(self.features(plan, by=judge.extractor), weight) for plan, weight in control.plans]

    def _against(self, control: Control, plan: Plan, judge: Measure) -> Contrast:
        return judge.compare(self._seen(control, judge), [(self.features(plan, by=judge.extractor), 1.0)])

    @cached_property
    def _nearness(self) -> Nearness:
        return Nearness(self.features(self.reference), self.judge.extractor)

    @cached_property
    def _further(self) -> Callable:
        """What else there is to say of features, once for each plan's: one plan may stand in many rows."""
        def further(features: Tensor) -> dict[str, float]:
            far = paired(features, self.features(self.reference))
            return {**self.judge.further(features), **columns("paired", far)}

        return cache(further)

    def rows(self, plans: Mapping[str, Plan], kind: str) -> pd.DataFrame:
        """Score several plans, in their order."""
        return pd.DataFrame([self.row(Control(name, ((plan, 1.0),)), kind) for name, plan in plans.items()])

    def singles(self, controls: Iterable[Control]) -> pd.DataFrame:
        """Score each plan of controls by itself, once, under a name with its number of steps."""
        found = {f"{control.name}, {plan.steps} steps": (control.name, plan) for control in controls
                 for plan, _ in control.plans}
        rows = self.rows({name: plan for name, (_, plan) in found.items()}, "control")
        return rows.assign(family=[family.removesuffix(", by seconds") for family, _ in found.values()])

    def beside(self, name: str, plan: Plan, controls: Iterable[Control], price: Callable[[Plan], float] | None = None
               ) -> pd.DataFrame:
        """Score controls, each with the plan's score over its own: `plan_over_control` below 1 is better.

        So do second_over_control for the second judge, prompts_over_control for the share of prompts missed, and
        nearness_over_control for the squared distance to the reference's images from the same noise.
        `strongest` is true of that control whose score is least on the bank on which things are chosen (chosen on the
        report's noise, the luckiest would be taken for it), of those that cost at most 5 % more than the plan: to lose
        to what costs more says nothing. Where none is so cheap, it is the cheapest.

        Parameters
        ----------
        price : callable(plan) -> what it costs; the executed MACs unless another is given
        """
        own, price, rows = Control(name, ((plan, 1.0),)), price or self.macs, []
        for control in controls:
            over, second = (judge.compare(self._seen(own, judge), self._seen(control, judge))
                            for judge in (self.judge, self.second))
            asked = {} if self.prompts is None else self.prompts.compare(
                *(self._seen(one, self.prompts) for one in (own, control))).columns("prompts_over_control")
            near = self._nearness.compare(*(self._seen(one, self._nearness) for one in (own, control)))
            chosen = [(self.select(part), weight) for part, weight in control.plans]
            rows.append({"plan": name, "plan_macs": self.macs(plan), **self.row(control, "control"),
                         **over.columns("plan_over_control"), **second.columns("second_over_control"), **asked,
                         **near.columns("nearness_over_control"),
                         "price_ratio": sum(weight * price(part) for part, weight in control.plans) / price(plan),
                         "select_score": self.judge.blend(chosen).estimate.value})
        table = pd.DataFrame(rows)
        affordable = table["price_ratio"] <= max(1 + MARGIN, table["price_ratio"].min())
        least = table["select_score"][affordable].min()
        return table.assign(strongest=affordable & (table["select_score"] == least))


def shown(table: pd.DataFrame, beside: bool = False) -> list[str]:
    """Give the columns of `Table.rows`, or of `Table.beside`, that are shown, as far as a table has them.

    Where all ratios of a kind are NaN, as the score that they are over is at the floor, differences stand in their
    place.
    """
    names = []
    for name in BESIDE if beside else SHOWN:
        if name in table and table[name].isna().all():
            name = re.sub("^(ratio|plan_over_control)", r"\1_difference", name)
        if name in table and not table[name].isna().all():
            names.append(name)
    return names


def summary(beside: pd.DataFrame) -> str:
    """Say how many comparisons `Table.beside` made, how they came out, what chance would give, what would decide."""
    words, needs, n = (beside[name] for name in ("plan_over_control_word", "plan_over_control_needs", "n"))
    counts = ", ".join(f"{(words == word).sum()} {word}" for word in WORDS)
    text = (f"{len(words)} comparisons at n = {n.iloc[0]:,.0f}: {counts}. Were there no differences at all, chance "
            f"would call {len(words) / 20:.1f} better or worse.")
    open_ = needs[words == "undecided"]
    return text + f" Half of the undecided would be decided by n = {open_.median():,.0f}." * bool(open_.notna().any())


def words(beside: pd.DataFrame) -> dict[str, int]:
    """Count the words of `Table.beside`, as flat metrics: "comparisons_better"."""
    found = beside["plan_over_control_word"]
    return {f"comparisons_{word.replace(' ', '_')}": int((found == word).sum()) for word in WORDS}


def by_word(rows: pd.DataFrame) -> str:
    """Name the controls of one plan of `Table.beside`, a line for each word."""
    named = {word: "; ".join(rows["name"][rows["plan_over_control_word"] == word]) for word in WORDS}
    return "\n".join(f"  {word:10s}{names or '-'}" for word, names in named.items())


def best_solver(judge: Judge, features: Callable, teachers: Iterable[Plan]) -> Plan:
    """Give the plan with the best score: the reference among the teacher's solvers.

    Parameters
    ----------
    features : callable(plan) -> Tensor, of images from the bank on which things are chosen
    """
    return min(teachers, key=lambda plan: judge.score(features(plan)).estimate.value)


def fewest(judge: Judge, features: Callable, ladder: Iterable[Plan], best: Plan) -> Plan:
    """Give the plan of the fewest steps that is surely at most 5 % worse than the best; the best, where none is.

    What is cheaper than T steps may be no cheaper than the steps that would have done: factors are honest over these.
    Steps that pass by luck on the report's noise make these too few, and honest factors too small; too few images to
    be sure of any make them too large.

    Parameters
    ----------
    features : callable(plan) -> Tensor, as `Table` takes it
    ladder : plans of fewer steps of the best solver
    """
    kept = [plan for plan in ladder if judge.over(features(plan), features(best)).holds == "yes"]
    return min(kept, key=lambda plan: plan.steps, default=best)


def enough(found: Plan, ladder: Iterable[Plan], best: Plan, n: int) -> str:
    """Say what `fewest` found among a ladder, by scores of n images."""
    if found.steps < best.steps:
        return f"With {found.steps} steps in place of {best.steps} the best teacher's score is surely at most 5 % worse"
    tried = ", ".join(map(str, sorted({plan.steps for plan in ladder})))
    return (f"Of the numbers of steps that were tried ({tried}) none is surely at most 5 % worse than the best "
            f"teacher's {best.steps} at n = {n}, so these count as the fewest; that is not to say that fewer are worse")
