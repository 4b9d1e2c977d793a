"""The third axis: at which steps a guided network is asked without its condition, searched with all else.

Classifier-free guidance runs the network twice a step. The null pass may be left out at the rim (a guidance interval,
Kynkaanniemi et al. 2024, arXiv 2404.07724), or run at every so many-th step, held or forecast between (adaptive
guidance, Castillo et al. 2023, arXiv 2312.12487; a cache of guidance).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from lib.grid.plan import HOLD, Plan
from lib.methods.search import Space

NULL_HOLDS = ("output", "difference")


@dataclass(frozen=True)
class FixedPlans:
    """The space of some plans, and nothing else."""

    plans: tuple[Plan, ...]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range."""
        return {"plan": CategoricalDistribution(tuple(range(len(self.plans))))}

    def decode(self, genome: Mapping) -> Plan:
        """Give the plan of a genome."""
        return self.plans[genome["plan"]]

    def known(self) -> list[dict]:
        """Give all there is."""
        return [{"plan": number} for number in range(len(self.plans))]


@dataclass(frozen=True)
class GuidedSpace:
    """A space of schedules, and for each at which steps the null pass runs.

    Attributes
    ----------
    inner : a space whose plans have one pass, that knows schedules to begin with
    everies : tuple of int, choices of every how many-th step the null pass is computed
    reuses : tuple of 0 (hold), 2 (line) and 3 (parabola), choices of what it does between
    """

    inner: Space
    everies: tuple[int, ...] = (1, 2, 3)
    reuses: tuple[int, ...] = (HOLD,)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give each gene's range: where guidance begins, and how far it goes from there, as shares of the steps."""
        return dict(self.inner.distributions()) | {
            "guidance_begins": FloatDistribution(0, 1), "guidance_goes": FloatDistribution(0, 1),
            "null_every": CategoricalDistribution(self.everies), "null_reuse": CategoricalDistribution(self.reuses),
            "null_holds": CategoricalDistribution(NULL_HOLDS)}

    def decode(self, genome: Mapping) -> Plan:
        """Make a plan of a genome."""
        plan = self.inner.decode(genome)
        last = plan.steps - 1
        first = round(genome["guidance_begins"] * last)
        interval = first, first + round(genome["guidance_goes"] * (last - first))
        return plan.guided(interval, every=genome["null_every"], reuse=genome["null_reuse"],
                           null_holds=genome["null_holds"])

    @staticmethod
    def encode(genome: Mapping, begins: float = 0.0, goes: float = 1.0, every: int = 1, holds: str = "output") -> dict:
        """Give the genome of a schedule of the inner space whose null pass runs so often."""
        return dict(genome) | {"guidance_begins": begins, "guidance_goes": goes, "null_every": every,
                               "null_reuse": HOLD, "null_holds": holds}

    @property
    def ways(self) -> list[dict]:
        """How everybody guides, as `encode` takes it: throughout, in the middle, and at every second step.

        The middle leaves out the first and the last fifth of the steps.
        """
        return [{}, {"begins": 0.2, "goes": 0.75}] + [{"every": 2, "holds": "difference"}] * (2 in self.everies)

    def known(self) -> list[dict]:
        """Give what everybody knows: the inner space's, guided in each of the `ways`."""
        return [self.encode(genome, **way) for genome in self.inner.known() for way in self.ways]
