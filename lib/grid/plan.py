"""The plan: which solver walks which timesteps, and which blocks compute at each of them.

A plan is a grid of cells: executed steps across, blocks up, one such sheet for each pass of the network that guidance
makes a step. A cell *computes* its block, *holds* what the block computed last, or *forecasts* it: the line or the
parabola through what the block computed last. A timestep that is not in the plan is a *null* step and costs nothing.
Fewer steps, DeepCache, Flexiffusion, DiP-GO, guidance intervals and forecasting caches are all plans; the constructors
below make them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib.grid.blocks import Blocks, Life, default_net, lives, wiring

VERSION = 2

Name = Annotated[str, Field(min_length=1)]

COMPUTE, HOLD, LINE, PARABOLA, DROP = 1, 0, 2, 3, -1
"""The states of a cell. `DROP` is for a whole pass at one step alone: the others go on without it."""
STATES = {"0": HOLD, "1": COMPUTE, "2": LINE, "3": PARABOLA, "-": DROP}
"""How files write them."""
GIVEN, NULL = "given", "null"
"""The pass with the condition, which is never dropped, and the one without."""
ORDERS = {"ddim": 1, "dpmsolver++": 3, "plms": 4, "pndm": 4, "unipc": 2, "euler": 1, "learned": 9}
"""The solvers and their highest orders."""
OWN_WAYS = ("CMStochasticIterativeScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler",
            "LCMScheduler", "RePaintScheduler", "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Schedulers of betas whose networks, or walks, are of another kind: consistency models, inversions, repainting."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers of flow matching."""


class PlanError(ValueError):
    """A plan, or a file that should hold one, is not right; the message says what to do."""


class _Part(BaseModel):
    """What cannot be changed, has no other fields, and says its faults in one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, /, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise PlanError(_say(error)) from None


class NoiseSchedule(_Part):
    """The noise schedule that a plan's timesteps index; a plan fits only models trained with the same."""

    train_timesteps: int = Field(ge=1)

    @staticmethod
    def of(scheduler) -> "BetaSchedule | FlowSchedule":
        """Read it off a diffusers scheduler.

        Raises
        ------
        PlanError
            If the scheduler does what a plan cannot say: clipping, its own betas, rescaled betas.
        """
        NoiseSchedule.check_kind(scheduler)
        config, kind = scheduler.config, type(scheduler).__name__
        flow = _is_one_of(FLOWS, scheduler)
        for option in ("clip_sample", "thresholding", "trained_betas", "rescale_betas_zero_snr", "invert_sigmas",
                       *([] if flow else ["use_dynamic_shifting"])):
            given = config.get(option)
            if given is not None and given is not False:
                raise PlanError(f"the noise schedule has {option}={str(given)[:40]}, which plans do not know. Where "
                                f"the model allows, pass {kind}.from_config(config, {option}="
                                f"{None if option == 'trained_betas' else False}).")
        if config.get("timestep_type", "discrete") != "discrete":
            raise PlanError(f"the noise schedule has timestep_type={config.timestep_type}, whose network reads other "
                            "numbers than the timesteps that plans know.")
        if flow or config.get("use_flow_sigmas"):
            shift = config.get("shift", config.get("flow_shift", 1.0))
            if config.get("use_dynamic_shifting"):  # by the image's size: the plan's steps are where they are
                shift = 1.0
            return FlowSchedule(train_timesteps=config.num_train_timesteps, shift=float(shift))
        try:
            return BetaSchedule(train_timesteps=config.num_train_timesteps, beta_start=config.beta_start,
                                beta_end=config.beta_end, beta_schedule=config.beta_schedule,
                                prediction=config.get("prediction_type", "epsilon"))
        except PlanError as error:
            raise PlanError(f"a {kind}'s noise schedule is none that plans know: {error}") from None


    @staticmethod
    def check_kind(scheduler) -> None:
        """Refuse a diffusers scheduler that walks in a way that no plan knows.

        Raises
        ------
        PlanError
        """
        config, kind = scheduler.config, type(scheduler).__name__
        betas = all(name in config for name in ("beta_start", "beta_end", "beta_schedule"))
        flow = config.get("prediction_type") == "flow_prediction"
        known = betas or _is_one_of(FLOWS, scheduler)
        if _is_one_of(OWN_WAYS, scheduler) or not known or flow != bool(config.get("use_flow_sigmas")):
            raise PlanError(f"a {kind} walks in a way of its own, which plans do not know. They know schedules of "
                            "betas (DDIMScheduler, DPMSolverMultistepScheduler, ...) and of flow matching "
                            "(FlowMatchEulerDiscreteScheduler).")


def _is_one_of(names: Sequence[str], scheduler) -> bool:
    """Say whether a scheduler is of, or made from, a class of one of these names."""
    return any(kind.__name__ in names for kind in type(scheduler).__mro__)


class BetaSchedule(NoiseSchedule):
    """The noise schedule of a diffusion process: betas at its training timesteps, and what the network predicts."""

    beta_start: float = Field(gt=0, lt=1)
    beta_end: float = Field(gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    prediction: Literal["epsilon", "v_prediction", "sample"]


class FlowSchedule(NoiseSchedule):
    """Flow matching: x_t = (1 - s) x_0 + s noise with s = t / train_timesteps, and the network predicts noise - x_0."""

    shift: float = Field(gt=0)
    prediction: Literal["flow"] = "flow"


Numbers = tuple[Annotated[tuple[float, ...], Field(min_length=1)], ...]


class Learned(_Part):
    """The table of a learned solver, as `lib.grid.solvers.Table` has it: a row a step.

    Attributes
    ----------
    quantity : what the solver is linear in
    a : (S,); b : (S, J); and of a corrector A : (S,), B : (S, J), or both empty
    """

    quantity: Literal["data", "noise", "velocity"]
    a: tuple[float, ...]
    b: Numbers
    A: tuple[float, ...] = ()
    B: Numbers = ()


Steps = Annotated[tuple[float, ...], Field(min_length=1)]


class Plan(_Part):
    """Which solver walks which timesteps, and which cells compute.

    Attributes
    ----------
    solver : "ddim", "dpmsolver++" (order 1 is DDIM), "plms", "pndm", "unipc", "euler" or "learned"
        See `lib.grid.solvers.coefficients`.
    order : int, from 1 to the solver's highest (`ORDERS`)
    table : Learned, where the solver is learned
    final_sigma : "zero" or "sigma_min"
        Where the last step lands.
    timesteps : tuple of int or float, (S,), strictly falling (but that pndm walks the second one twice)
        The timesteps at which the plan does anything; they may lie between the integers.
    grid : tuple of int or float, (T,), falling alike
        The teacher's timesteps. Where the plan walks on them, those not in `timesteps` are null steps.
    schedule : BetaSchedule or FlowSchedule
    blocks : tuple of str, (N,), the network's layers, in the order in which they run
    cache : "output" or "residual"
        What a cell holds or forecasts: its block's output, or its change from input to output.
    passes : tuple of str, (P,)
        The network's passes in the order in which a batch holds them. A plan of one pass holds for all passes alike.
    null_holds : "output" or "difference"
        What of the other passes is held or forecast: the output, or its difference from the given pass's.
    abscissa : "log_snr", "timestep" or "step"
        Over what forecasts are drawn.
    states : tuple of tuple of tuple of int, (P, S, N)
        0 holds, 1 computes, 2 and 3 forecast by the line and the parabola through the block's last two and three
        computed outputs, or by as many as there are.
    net : tuple of tuple of int, (P, S)
        The same of the network's whole output; -1 drops the pass at that step (its scale is 1 there).
    provenance : dict
        Where the plan comes from; part of no comparison.

    Raises
    ------
    PlanError
        From every constructor and from `load`, if the parts do not make a plan.
    """

    version: Literal[2] = VERSION
    solver: Literal["ddim", "dpmsolver++", "plms", "pndm", "unipc", "euler", "learned"] = "dpmsolver++"
    order: int = Field(ge=1)
    table: Learned | None = None
    final_sigma: Literal["zero", "sigma_min"] = "zero"
    timesteps: Steps
    grid: Steps
    schedule: BetaSchedule | FlowSchedule
    blocks: tuple[Name, ...] = Field(min_length=1)
    cache: Literal["output", "residual"] = "output"
    passes: tuple[Name, ...] = (GIVEN,)
    null_holds: Literal["output", "difference"] = "output"
    abscissa: Literal["log_snr", "timestep", "step"] = "log_snr"
    states: tuple[tuple[tuple[int, ...], ...], ...]
    net: tuple[tuple[int, ...], ...]
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("order", "timesteps", "grid", mode="before")
    @classmethod
    def _python(cls, value: Any) -> Any:
        """Take numpy's numbers for Python's."""
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        return tuple(map(cls._python, value)) if isinstance(value, tuple) else value

    @field_validator("timesteps", "grid")
    @classmethod
    def _plain(cls, steps: tuple[float, ...]) -> tuple[int | float, ...]:
        return tuple(int(t) if t == int(t) else t for t in steps)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.order > ORDERS[self.solver]:
            raise ValueError(f"order: {self.solver} has orders up to {ORDERS[self.solver]} (got {self.order})")
        if (self.solver == "learned") != (self.table is not None):
            raise ValueError("table: goes with solver learned, and only with it")
        if self.table is not None:
            for name in ("a", "b") + ("A", "B") * bool(self.table.A):
                if len(getattr(self.table, name)) != len(self.timesteps):
                    raise ValueError(f"table.{name}: {len(getattr(self.table, name))} rows for {self.steps} timesteps")
            table = self.table
            if len({len(row) for row in (*table.b, *table.B)}) != 1 or bool(table.A) != bool(table.B):
                raise ValueError("table: all rows of b and B must be as wide as each other, and A and B go together")
            if (self.table.quantity == "velocity") > isinstance(self.schedule, FlowSchedule):
                raise ValueError("table.quantity: velocity is of flow matching alone")
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError("blocks: a name stands twice")
        flow, train = isinstance(self.schedule, FlowSchedule), self.schedule.train_timesteps
        for field in ("timesteps", "grid"):
            steps = getattr(self, field)
            repeats = (field == "grid" or self.solver == "pndm") and len(steps) > 2 and steps[1] == steps[2]
            if any(a <= b and not (repeats and i == 1) for i, (a, b) in enumerate(pairwise(steps))):
                raise ValueError(f"{field}: must fall strictly, from noise to image: sort them and drop repeated ones")
            if flow and not 0 < steps[-1] <= steps[0] <= train:
                raise ValueError(f"{field}: must lie above 0 and up to {train}, the schedule's training timesteps")
            if not flow and (steps[-1] < 0 or steps[0] > train - 1):
                raise ValueError(f"{field}: must lie in 0..{train - 1}, the schedule's training timesteps")
        if self.solver == "pndm" and len(self.timesteps) > 1 and not (
                len(self.timesteps) > 2 and self.timesteps[1] == self.timesteps[2]):
            raise ValueError("timesteps: pndm walks the second timestep twice; take plms for the solver that does not")
        self._check_cells()
        forecasts = any(state > 1 for sheet in (*self.states, self.net) for row in sheet for state in row)
        if forecasts and flow and self.abscissa == "log_snr" and self.timesteps[0] >= train:
            raise ValueError("abscissa: log_snr is infinite at pure noise, where this plan begins: take timestep")
        if forecasts and self.solver == "pndm" and self.abscissa != "step":
            raise ValueError("abscissa: pndm walks one timestep twice; forecast over step")
        return self

    def _check_cells(self) -> None:
        if GIVEN not in self.passes or len(set(self.passes)) != len(self.passes):
            raise ValueError(f"passes: must be different names, one of them {GIVEN!r}")
        for field, sheets in (("cells", self.states), ("net", self.net)):
            if len(sheets) != len(self.passes):
                raise ValueError(f"{field}: {len(sheets)} passes, must be {len(self.passes)}")
            for sheet in sheets:
                if len(sheet) != len(self.timesteps):
                    raise ValueError(f"{field}: {len(sheet)} rows for {len(self.timesteps)} timesteps")
        for name, sheet, net in zip(self.passes, self.states, self.net):
            for step, row in enumerate(sheet):
                if len(row) != len(self.blocks):
                    raise ValueError(f"cells: row {step} has {len(row)} cells for {len(self.blocks)} blocks")
            if not {state for row in sheet for state in row} <= {HOLD, COMPUTE, LINE, PARABOLA}:
                raise ValueError("cells: a cell is 0 (holds), 1 (computes), 2 or 3 (forecasts)")
            if not set(net) <= set(STATES.values()):
                raise ValueError("net: a state is 0, 1, 2, 3, or -1 where the pass is dropped")
            if name == GIVEN and DROP in net:
                raise ValueError("net: the given pass cannot be dropped")
            first = next((step for step, state in enumerate(net) if state != DROP), None)
            if first is not None and not (net[first] == COMPUTE and all(state == COMPUTE for state in sheet[first])):
                raise ValueError("cells: the first step must compute every block, for nothing is cached before it" +
                                 ("" if name == GIVEN else f" (pass {name}, step {first})"))
            if any(state == DROP and set(row) != {HOLD} for state, row in zip(net, sheet)):
                raise ValueError(f"cells: where the pass {name} is dropped nothing of it runs: they must be 0 there")

    # ---- the grid -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """S, the number of executed steps."""
        return len(self.timesteps)

    @property
    def asked_steps(self) -> int:
        """The number of steps that a pipeline is asked for.

        The full run's, and no fewer than the plan takes: some pipelines keep something for each. Of flow matching it is
        the full run's, as some pipelines give its timesteps.
        """
        most = len(self.grid)
        return most if isinstance(self.schedule, FlowSchedule) else max(most, self.steps)

    @cached_property
    def sheets(self) -> np.ndarray:
        """`states` as an array, (P, S, N), int8."""
        return np.array(self.states, dtype=np.int8)

    @property
    def cells(self) -> np.ndarray:
        """The states of the given pass, (S, N), int8; a copy."""
        return self.sheets[self.passes.index(GIVEN)].copy()

    @property
    def computes(self) -> np.ndarray:
        """Which cells of the given pass compute, (S, N), bool."""
        return self.cells == COMPUTE

    @property
    def live(self) -> np.ndarray:
        """Which cells of the given pass have to run, (S, N), bool."""
        return self.life[self.passes.index(GIVEN)].live

    @cached_property
    def life(self) -> tuple[Life, ...]:
        """What of each pass's cells has to run and to be kept, (P,); see `lib.grid.blocks.lives`."""
        reads = wiring(self.blocks)
        return tuple(lives(reads, self.cache, sheet, np.array(net)) for sheet, net in zip(self.sheets, self.net))

    @property
    def way(self) -> tuple[np.ndarray, list[float]]:
        """How much of the way lies behind each timestep, and behind the image, evenly from 0 to 1; and these, (S + 1).

        What places steps along a schedule that has a spacing of its own (flow matching) interpolates between them.
        """
        return np.linspace(0, 1, self.steps + 1), [*self.timesteps, 0.0]

    def pass_of(self, name: str) -> int:
        """Give the place of a pass of this name; a plan of one pass holds for all.

        Raises
        ------
        PlanError
            If the plan has several passes and none of this name.
        """
        if len(self.passes) == 1:
            return 0
        if name not in self.passes:
            raise PlanError(f"the plan has passes {', '.join(self.passes)}, and none called {name!r}.")
        return self.passes.index(name)

    @cached_property
    def key(self) -> str:
        """A hash of all that changes an image (so not of grid, provenance and dead cells): equal keys, equal images."""
        content = self.model_dump(mode="json", exclude={"provenance", "grid", "version", "states", "net"})
        content["states"] = [[life.settled.tolist(), life.net.tolist()] for life in self.life]
        if self.solver == "dpmsolver++" and self.order == 1:
            content["solver"] = "ddim"
        if not any((life.settled > COMPUTE).any() or (life.net > COMPUTE).any() for life in self.life):
            content["abscissa"] = None
        others = [life.net for name, life in zip(self.passes, self.life) if name != GIVEN]
        if not any(np.isin(net, (HOLD, LINE, PARABOLA)).any() for net in others):  # computed or dropped throughout
            content["null_holds"] = None
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_cells(self, cells: np.ndarray, net: np.ndarray | None = None, **provenance) -> Self:
        """Give the same walk with other cells.

        Parameters
        ----------
        cells : (S, N), for all passes alike, or (P, S, N); states, or bool (True computes)
        net : (S,) or (P, S), states of the whole output
            If it is not given, the network is called where any of its cells has to run or its last block forecasts, and
            always where blocks cache residual changes.
        """
        if net is None and any(DROP in row for row in self.net):
            raise PlanError("this plan drops a pass at some steps: give `net` with the cells, or guide it afterwards.")
        sheets = _states(cells, (len(self.passes), self.steps, len(self.blocks)), "cells")
        if net is None:
            reads = wiring(self.blocks)
            nets = [default_net(reads, self.cache, sheet) for sheet in sheets]
        else:
            nets = _states(net, (len(self.passes), self.steps), "net")
        return self.replace(states=tuple(map(_rows, sheets)), net=_rows(np.stack(nets)), provenance=provenance)

    def replace(self, **fields) -> Self:
        """Give the plan with other fields."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | fields)

    # ---- constructors ---------------------------------------------------------------------------------------------

    @classmethod
    def full(cls, timesteps: Sequence[float], schedule: NoiseSchedule, blocks: Blocks | Sequence[str], order: int = 1,
             grid: Sequence[float] | None = None, cache: str = "output", *, solver: str = "dpmsolver++",
             passes: Sequence[str] = (GIVEN,), **provenance) -> Self:
        """Compute every cell at the given timesteps: the teacher, or any list of fewer steps.

        Parameters
        ----------
        blocks : of the network (which say what they cache), or their names alone, and `cache`
        """
        if isinstance(blocks, Blocks):
            blocks, cache = blocks.names, blocks.cache
        return cls(solver=solver, order=order, timesteps=tuple(timesteps),
                   grid=tuple(timesteps if grid is None else grid),
                   schedule=schedule, blocks=tuple(blocks), cache=cache, passes=tuple(passes),
                   states=(((COMPUTE,) * len(blocks),) * len(timesteps),) * len(passes),
                   net=((COMPUTE,) * len(timesteps),) * len(passes), provenance={"method": "full"} | provenance)

    @classmethod
    def few_steps(cls, steps: int, spacing: str, teacher: Self, order: int = 1) -> Self:
        """Take `steps` full steps with uniform (trailing) or quadratic spacing instead of the teacher's."""
        if isinstance(teacher.schedule, FlowSchedule):
            raise PlanError("spacings are of diffusion's timesteps; for flow matching take the scheduler's own, as "
                            "teacher.at(timesteps).")
        timesteps = SPACINGS[spacing](steps, teacher.schedule.train_timesteps)
        return teacher.at(timesteps, solver="dpmsolver++", order=order, table=None,
                          provenance={"method": "few steps", "steps": steps, "spacing": spacing})

    @classmethod
    def deepcache(cls, interval: int, shallow: np.ndarray, teacher: Self, reuse: int = HOLD, **provenance) -> Self:
        """Compute all blocks at every `interval`-th step and only the shallow ones between (DeepCache, uniform 1:N).

        Parameters
        ----------
        interval : int, N >= 1
        shallow : (N blocks,), bool
            The blocks that a partial step runs: `lib.grid.blocks.Blocks.branch`.
        reuse : 0, 2 or 3
            What the others do: hold (as in the paper), or forecast by a line or a parabola.
        """
        if interval < 1:
            raise PlanError(f"interval: must be at least 1, got {interval}")
        cells = np.tile(_reusing(shallow, reuse), (teacher.steps, 1))
        cells[::interval] = COMPUTE
        return teacher.with_cells(cells, method="DeepCache", interval=int(interval), reuse=int(reuse), **provenance)

    @classmethod
    def segments(cls, segments: Sequence[tuple[int, np.ndarray]], teacher: Self, reuse: int | Sequence[int] = HOLD,
                 **provenance) -> Self:
        """Cut the teacher's steps into equal segments of one full step, partial steps and null steps (Flexiffusion).

        Parameters
        ----------
        segments : sequence of (active, shallow)
            For each segment the number of steps that run at all (1..length, the first of them full) and the blocks
            that its partial steps run, (N,), bool. With S segments the length is ceil(T / S), the last one shorter.
        reuse : 0, 2 or 3, as `deepcache` takes it, for all segments or one for each
        """
        steps = teacher.steps
        length = -(-steps // len(segments))
        reuses = np.broadcast_to(reuse, len(segments))
        timesteps, rows = [], []
        for number, (active, shallow) in enumerate(segments):
            first = number * length
            if first >= steps:
                raise PlanError(f"segments: {len(segments)} segments of {length} steps do not fit {steps} steps")
            if not 1 <= active <= length:
                raise PlanError(f"segments: segment {number} has {active} active steps, must be 1..{length}")
            for step in range(first, min(first + active, steps)):
                timesteps.append(teacher.timesteps[step])
                rows.append(np.ones(len(teacher.blocks), np.int8) if step == first else
                            _reusing(shallow, int(reuses[number])))
        return teacher.at(timesteps).with_cells(np.stack(rows), **{"method": "segments"} | provenance)

    @classmethod
    def from_gates(cls, gates: np.ndarray, teacher: Self, reuse: int = HOLD, **provenance) -> Self:
        """Take keep / reuse gates, (T, N), bool, as they are (DiP-GO); `reuse` as `deepcache` takes it."""
        if np.shape(gates) != (teacher.steps, len(teacher.blocks)):
            raise PlanError(f"gates: shape {np.shape(gates)}, must be {(teacher.steps, len(teacher.blocks))}")
        if not np.isin(gates, (0, 1)).all():
            raise PlanError("gates: must be 0 or 1: compare them with a threshold first")
        return teacher.with_cells(_reusing(gates, reuse), **{"method": "gates"} | provenance)

    @classmethod
    def random(cls, keep: float, seed: int, teacher: Self, reuse: int = HOLD) -> Self:
        """Compute each cell with probability `keep`; for one seed, a higher `keep` keeps a superset of cells."""
        cells = np.random.default_rng(seed).random((teacher.steps, len(teacher.blocks))) < keep
        cells[0] = True
        return teacher.with_cells(_reusing(cells, reuse), method="random cells", keep=keep, seed=seed)

    def guided(self, interval: tuple[int, int] | None = None, *, every: int = 1, reuse: int = HOLD,
               null_holds: str = "output") -> Self:
        """Give this plan two passes, the null one of which runs less often.

        Parameters
        ----------
        interval : (first, last) steps, guided ones; outside them the null pass is dropped (a guidance interval,
            Kynkaanniemi et al. 2024). None guides all steps.
        every : int
            Inside, the null pass is computed at every so many-th step.
        reuse : 0, 2 or 3
            Between, its output is held or forecast (adaptive guidance, a cache of guidance).
        null_holds : "output" or "difference" (from the given pass's)
        """
        _check_reuse(reuse)
        first, last = interval or (0, self.steps - 1)
        if not 0 <= first <= last < self.steps:
            raise PlanError(f"interval: must lie in 0..{self.steps - 1}, got {interval}")
        if every < 1:
            raise PlanError(f"every: must be at least 1, got {every}")
        sheet, net = self.cells, np.array(self.net[self.passes.index(GIVEN)], np.int8)
        null, own = sheet.copy(), net.copy()
        for step in range(self.steps):
            if not first <= step <= last:
                null[step], own[step] = HOLD, DROP
            elif (step - first) % every:
                null[step], own[step] = HOLD, reuse
            elif step == first:
                null[step], own[step] = COMPUTE, COMPUTE
        guidance = {"interval": [first, last], "every": every, "reuse": reuse}
        return self.replace(passes=(NULL, GIVEN), states=(_rows(null), _rows(sheet)), net=_rows(np.stack([own, net])),
                            null_holds=null_holds, provenance=self.provenance | {"guidance": guidance})

    def alone(self) -> Self:
        """Give the plan of the given pass by itself: without guidance."""
        number = self.passes.index(GIVEN)
        return self.replace(passes=(GIVEN,), states=(self.states[number],), net=(self.net[number],))

    def refreshed(self, step: int) -> Self:
        """Give the plan with every block computed at a step: from there on nothing from before it is read.

        (Of a pass that is dropped there, at the next step at which it is not.) So a run may begin there, or go on
        though what was cached fits no longer.
        """
        states, nets = [], []
        for sheet, net in zip(self.states, self.net):
            here = next((i for i in range(step, self.steps) if net[i] != DROP), None)
            if here is not None:
                sheet = (*sheet[:here], (COMPUTE,) * len(self.blocks), *sheet[here + 1:])
                net = (*net[:here], COMPUTE, *net[here + 1:])
            states.append(sheet)
            nets.append(net)
        return self.replace(states=tuple(states), net=tuple(nets))

    @property
    def title(self) -> str:
        """What messages call it: key, method and number of steps."""
        return f"plan {self.key} ({self.provenance.get('method', 'no method named')}, {self.steps} steps)"

    def at(self, timesteps: Sequence[float], **fields) -> Self:
        """Give the full plan at other timesteps, all else as it is but for some fields."""
        full = ((COMPUTE,) * len(self.blocks),) * len(timesteps)
        return self.replace(timesteps=tuple(timesteps), states=(full,) * len(self.passes),
                            net=((COMPUTE,) * len(timesteps),) * len(self.passes), **fields)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one line of states a step."""
        sign = {state: letter for letter, state in STATES.items()}
        dropped = {"states", "net", "provenance"} | ({"table"} if self.table is None else set())
        content = self.model_dump(mode="json", exclude=dropped) | {"provenance": self.provenance}
        content["cells"] = {name: ["".join(sign[state] for state in row) for row in sheet]
                            for name, sheet in zip(self.passes, self.states)}
        content["net"] = {name: "".join(sign[state] for state in net) for name, net in zip(self.passes, self.net)}
        Path(path).write_text(json.dumps(content, indent=1, default=_of_numpy) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan; one of version 1 means what it always meant.

        Raises
        ------
        PlanError
            If the file is missing, is no JSON, comes from a newer version, or does not hold a plan.
        """
        try:
            content = json.loads(Path(path).read_text(), object_pairs_hook=_only_once)
        except FileNotFoundError:
            raise PlanError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:  # unreadable; not UTF-8 or not JSON
            raise PlanError(f"{path}: cannot be read as JSON ({error}). Was it cut off? Make it again.") from None
        try:
            try:
                values = _from_json(content)
            except (LookupError, TypeError, AttributeError) as error:
                raise PlanError(f"does not hold a plan ({error!r}): make it again with Plan.save") from None
            return cls(**values)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None
        except RecursionError:
            raise PlanError(f"{path}: is nested deeper than any plan") from None

    def check_fits(self, blocks: Sequence[str], schedule: NoiseSchedule) -> None:
        """Refuse a model with other blocks or another noise schedule.

        Raises
        ------
        PlanError
            With the first difference.
        """
        if tuple(blocks) != self.blocks:
            strange = sorted(set(self.blocks) ^ set(blocks)) or ["their order"]
            raise PlanError(f"the plan is for another network: {len(self.blocks)} blocks, the model has {len(blocks)}; "
                            f"they differ in {', '.join(strange[:5])}. Make a plan from this model's blocks.")
        if type(schedule) is not type(self.schedule):
            raise PlanError(f"the plan is for a {type(self.schedule).__name__}, the model has a "
                            f"{type(schedule).__name__}. Make a plan for this schedule.")
        for name, wanted in self.schedule:
            if getattr(schedule, name) != wanted:
                raise PlanError(f"the plan is for another noise schedule: {name} is {wanted}, the model's is "
                                f"{getattr(schedule, name)}. Make a plan for this schedule.")


def trailing(steps: int, train_timesteps: int) -> tuple[int, ...]:
    """Space timesteps evenly, the first at pure noise (diffusers' "trailing"; Lin et al. 2023, table 2)."""
    _check_steps(steps, train_timesteps)
    return tuple(int(t) - 1 for t in np.round(np.arange(train_timesteps, 0, -train_timesteps / steps))[:steps])


def quadratic(steps: int, train_timesteps: int) -> tuple[int, ...]:
    """Space timesteps quadratically, denser near the image (Song et al. 2021, appendix D.2), from pure noise."""
    _check_steps(steps, train_timesteps)
    wanted = np.round(np.linspace(0, np.sqrt(train_timesteps), steps + 1)[1:] ** 2).astype(int) - 1
    for i in range(len(wanted) - 2, -1, -1):  # rounding may make neighbours equal: move the noisier one apart
        wanted[i] = min(wanted[i], wanted[i + 1] - 1)
    wanted = np.maximum(wanted, np.arange(steps))
    return tuple(int(t) for t in wanted[::-1])


SPACINGS = {"uniform": trailing, "quadratic": quadratic}


def _check_steps(steps: int, train_timesteps: int) -> None:
    if not 1 <= steps <= train_timesteps:
        raise PlanError(f"steps: must be 1..{train_timesteps}, got {steps}")


def _reusing(computes: np.ndarray, reuse: int) -> np.ndarray:
    """Give states of cells: those that compute, and what the others do."""
    _check_reuse(reuse)
    return np.where(np.asarray(computes, dtype=bool), COMPUTE, reuse).astype(np.int8)


def _check_reuse(reuse: int) -> None:
    if reuse not in (HOLD, LINE, PARABOLA):
        raise PlanError(f"reuse: must be {HOLD} (hold), {LINE} (line) or {PARABOLA} (parabola), got {reuse}")


def _states(given: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Give states as an array with the passes first; what has none holds for all passes."""
    given = np.asarray(given)
    if given.shape not in (shape, shape[1:]):
        raise PlanError(f"{what}: shape {given.shape}, must be {shape[1:]}" +
                        (f", or {shape}" if shape[0] > 1 else ""))
    return np.broadcast_to(given, shape).astype(np.int8)


def _rows(cells: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, np.asarray(cells).tolist()))


def _of_numpy(value: Any) -> Any:
    """Make JSON of what numpy made."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a plan's provenance holds a {type(value).__name__}, which JSON does not know")


def _only_once(pairs: list[tuple[str, Any]]) -> dict:
    """Give an object of JSON; one that says something twice (a bad merge) is none."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return content


def _from_json(content: Any) -> dict:
    """Turn JSON's lists into tuples and its strings into states; what version 1 wrote becomes version 2."""
    if not isinstance(content, dict):
        raise PlanError(f"holds a {type(content).__name__}, not a plan")
    content, version = dict(content), content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise PlanError(f"written by a newer version of this project (plan version {version}, this one reads {VERSION})"
                        ". Update the project.")
    if version == 1:
        content |= {"version": VERSION, "passes": [GIVEN], "cells": {GIVEN: content.pop("compute", None)}}
    values = {name: _tuples(value) for name, value in content.items() if name not in ("cells", "net")}
    if isinstance(values.get("schedule"), dict):
        kind = FlowSchedule if values["schedule"].get("prediction") == "flow" else BetaSchedule
        values["schedule"] = _within("schedule", kind, values["schedule"])
    if isinstance(values.get("table"), dict):
        values["table"] = _within("table", Learned, {k: _tuples(v) for k, v in values["table"].items()})
    passes = values.get("passes", (GIVEN,))
    rows = _sheets(content, "cells", passes)
    if version == 1 and any("2" in row or "3" in row for row in rows[0]):
        raise PlanError("cells: each step must be a string of 0 and 1")
    values["states"] = tuple(tuple(tuple(STATES[cell] for cell in row) for row in sheet) for sheet in rows)
    if version == 1:
        values["net"] = (_net_of_version_1(values),)
    else:
        values["net"] = tuple(tuple(STATES[state] for state in net) for net in _sheets(content, "net", passes))
    return values


def _net_of_version_1(values: dict) -> tuple[int, ...]:
    sheet, blocks = values["states"][0], values.get("blocks")
    if not isinstance(blocks, tuple) or any(len(row) != len(blocks) for row in sheet):
        return (COMPUTE,) * len(sheet)  # is refused later, with its reason
    return tuple(default_net(wiring(blocks), values.get("cache", "output"), np.array(sheet)).tolist())


def _sheets(content: Mapping, field: str, passes: Any) -> list:
    """Read one field that has an entry a pass: a list of strings, or (net) one string."""
    sheets = content.get(field)
    if not isinstance(sheets, dict) or not isinstance(passes, tuple) or sorted(sheets) != sorted(map(str, passes)):
        raise PlanError(f"{field}: must have an entry for each of the passes")
    found = [sheets[name] for name in passes]
    for sheet in found:
        rows = sheet if field == "cells" else [sheet]
        letters = set(STATES) - ({"-"} if field == "cells" else set())
        if not isinstance(rows, list) or not all(isinstance(row, str) and set(row) <= letters for row in rows):
            raise PlanError(f"{field}: each step must be a string of 0 and 1" +
                            (", 2 and 3" if field == "cells" else ", 2, 3 and -"))
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _within(place: str, kind: type[_Part], values: dict) -> _Part:
    try:
        return kind(**values)
    except PlanError as error:
        raise PlanError(f"{place}.{error}") from None
    except TypeError as error:  # a key that is no word
        raise PlanError(f"{place}: {error}") from None


def _say(error: ValidationError) -> str:
    """Put pydantic's first fault into one sentence with its place and value."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and not place:
        return text
    return f"{place}: {text}" + ("" if fault["type"] == "missing" else f" (got {fault['input']!r:.60})")
