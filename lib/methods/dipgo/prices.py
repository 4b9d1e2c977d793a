"""What gates cost: the MACs that they make a model execute, and what each of them frees."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from lib.grid.blocks import Blocks, Life
from lib.grid.cost import Costs
from lib.grid.plan import COMPUTE, HOLD, Plan


def grouping(blocks: Blocks, kind: str) -> np.ndarray:
    """Say which gate of a column each block follows, (N,), int.

    Parameters
    ----------
    kind : "layers" (a gate a block), "levels" (a gate a level, as in the paper) or "columns" (one gate: fewer steps)
    """
    levels = list(blocks.levels)
    return {"layers": np.arange(len(blocks)), "levels": np.array([levels.index(block.level) for block in blocks]),
            "columns": np.zeros(len(blocks), dtype=int)}[kind]


@dataclass(frozen=True, eq=False)
class Prices:
    """What gates cost.

    Attributes
    ----------
    blocks : Blocks
    costs : Costs of the model
    groups : (N,), int, from `grouping`
    reuse : 0 (hold), 2 (line) or 3 (parabola): what a cell does whose gate is off
    """

    blocks: Blocks
    costs: Costs
    groups: np.ndarray
    reuse: int = HOLD

    @cached_property
    def _macs(self) -> np.ndarray:
        return np.array([self.costs.blocks[name] for name in self.blocks.names])

    def cells(self, gates: np.ndarray) -> np.ndarray:
        """Give the cells of gates: (T, groups) to (T, N), bool; the first step computes all."""
        cells = np.asarray(gates, dtype=bool)[:, self.groups]
        cells[0] = True
        return cells

    def kept(self, gates: np.ndarray) -> float:
        """Give the executed MACs over the full plan's."""
        return float(self._executed(self.cells(gates)).sum() / self.costs.call / len(gates))

    def life(self, cells: np.ndarray) -> Life:
        """Say what of cells, (T, N), bool, has to run."""
        return self.blocks.life(np.where(cells, COMPUTE, self.reuse))

    def _executed(self, cells: np.ndarray) -> np.ndarray:
        life = self.life(cells)
        return life.live @ self._macs + life.called * self.costs.rest

    @property
    def gates(self) -> int:
        """The number of gates a column."""
        return int(self.groups.max()) + 1

    @property
    def total(self) -> float:
        """The sum of a full column's static weights."""
        return float(self.weights("static", np.ones((1, self.gates), bool)).sum())

    @lru_cache(maxsize=4096)  # noqa: B019 (prices live as long as a training)
    def _column(self, row: bytes) -> np.ndarray:
        """Give for one column what each gate saves if it is off, or costs if it is on, as a share of a full call."""
        gates = np.frombuffer(row, dtype=bool)

        def macs(gates: np.ndarray) -> float:
            column = np.stack([np.ones(len(self.groups), bool), gates[self.groups]])
            return self._executed(column)[1] / self.costs.call

        saved = np.zeros(len(gates))
        for group in range(len(gates)):
            on, off = gates.copy(), gates.copy()
            on[group], off[group] = True, False
            saved[group] = macs(on) - macs(off)
        return saved

    def weights(self, kind: str, gates: np.ndarray) -> np.ndarray:
        """Give gamma, (T, groups): each gate's weight, the share of a call's MACs that it frees, cascade included.

        Parameters
        ----------
        kind : "static" (from the full column, as in the paper), "marginal" (given the other gates of the column as they
            are now; what a later column reads from the cache is not seen), or "none" (all alike: the paper's ablation)
        gates : (T, groups), bool
        """
        if kind not in ("static", "marginal", "none"):
            raise ValueError(f"weights {kind!r}: must be one of static, marginal, none")
        if kind == "none":
            return np.ones(gates.shape)
        rows = np.ones_like(gates) if kind == "static" else gates
        return np.stack([self._column(np.ascontiguousarray(row, dtype=bool).tobytes()) for row in rows])


def outside_columns(plan: Plan, costs: Costs) -> float:
    """Give the share of the reused MACs that lies in columns where some cell computes: 0 is a plan of whole steps."""
    live = plan.live
    reused = ~live @ np.array([costs.blocks[name] for name in plan.blocks])
    return float(reused[live.any(axis=1)].sum() / max(1, reused.sum()))
