"""The plan: which solver walks which timesteps, and which blocks compute at each of them.

A plan is a grid of cells, executed steps down, blocks across. A cell computes its block or reuses what the block gave
last; a timestep that is not in the plan is a *null* step and costs nothing. Fewer steps, DeepCache, Flexiffusion and
DiP-GO are all plans; the constructors below make them.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

VERSION = 1

Name = Annotated[str, Field(min_length=1)]


class PlanError(ValueError):
    """A plan, or a file that should hold one, is not right; the message says what to do."""


class NoiseSchedule(BaseModel):
    """The noise schedule that a plan's timesteps index; a plan fits only models trained with the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    train_timesteps: int = Field(ge=1)
    beta_start: float = Field(gt=0, lt=1)
    beta_end: float = Field(gt=0, lt=1)
    beta_schedule: Name
    prediction: Literal["epsilon", "v_prediction", "sample"]

    @classmethod
    def of(cls, scheduler) -> Self:
        """Read it from a diffusers scheduler.

        Raises
        ------
        PlanError
            If the scheduler does what a plan cannot say: clipping, its own betas, rescaled betas.
        """
        config = scheduler.config
        for option in ("clip_sample", "thresholding", "trained_betas", "rescale_betas_zero_snr"):
            given = config.get(option)
            if given is not None and given is not False:
                raise PlanError(f"the noise schedule has {option}={str(given)[:40]}, which plans do not know. Where "
                                f"the model allows, pass {type(scheduler).__name__}.from_config(config, {option}="
                                f"{None if option == 'trained_betas' else False}).")
        return cls(train_timesteps=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end,
                   beta_schedule=config.beta_schedule, prediction=config.prediction_type)


class Plan(BaseModel):
    """Which solver walks which timesteps, and which cells compute.

    Attributes
    ----------
    solver : "dpmsolver++"
        The multistep solver of Lu et al. 2022. Order 1 is DDIM with eta 0.
    order : 1 or 2
    final_sigma : "zero" or "sigma_min"
        Where the last step lands.
    timesteps : tuple of int, (S,), strictly falling
        The timesteps at which the plan does anything.
    grid : tuple of int, (T,), strictly falling
        The teacher's timesteps. Where the plan walks on them, those not in `timesteps` are null steps.
    schedule : NoiseSchedule
    blocks : tuple of str, (N,), the network's layers, in the order in which they run
    cache : "output" or "residual"
        What a reused cell reuses: its block's last output, or the last change from input to output.
    compute : tuple of tuple of bool, (S, N)
        True where the cell computes. The first step computes all.
    provenance : dict
        Where the plan comes from; part of no comparison.

    Raises
    ------
    PlanError
        From every constructor and from `load`, if the parts do not make a plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = VERSION
    solver: Literal["dpmsolver++"] = "dpmsolver++"
    order: Literal[1, 2]
    final_sigma: Literal["zero", "sigma_min"] = "zero"
    timesteps: tuple[int, ...] = Field(min_length=1)
    grid: tuple[int, ...] = Field(min_length=1)
    schedule: NoiseSchedule
    blocks: tuple[Name, ...] = Field(min_length=1)
    cache: Literal["output", "residual"] = "output"
    compute: tuple[tuple[bool, ...], ...]
    provenance: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise PlanError(_say(error)) from None

    @field_validator("timesteps", "grid")
    @classmethod
    def _falling(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(a <= b for a, b in pairwise(steps)):
            raise ValueError("must fall strictly, from noise to image: sort them and drop repeated ones")
        return steps

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError("blocks: a name stands twice")
        last = self.schedule.train_timesteps - 1
        for field in ("timesteps", "grid"):
            steps = getattr(self, field)
            if steps[-1] < 0 or steps[0] > last:
                raise ValueError(f"{field}: must lie in 0..{last}, the schedule's training timesteps")
        if len(self.compute) != len(self.timesteps):
            raise ValueError(f"compute: {len(self.compute)} rows for {len(self.timesteps)} timesteps")
        for step, row in enumerate(self.compute):
            if len(row) != len(self.blocks):
                raise ValueError(f"compute: row {step} has {len(row)} cells for {len(self.blocks)} blocks")
        if not all(self.compute[0]):
            raise ValueError("compute: the first step must compute every block, for nothing is cached before it")
        return self

    # ---- the grid -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """S, the number of executed steps."""
        return len(self.timesteps)

    @property
    def cells(self) -> np.ndarray:
        """`compute` as an array, (S, N), bool."""
        return np.array(self.compute, dtype=bool)

    @property
    def key(self) -> str:
        """A hash of all that changes an image (so not of grid and provenance): equal keys, equal images."""
        content = self.model_dump(mode="json", exclude={"provenance", "grid"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_cells(self, cells: np.ndarray, **provenance) -> Self:
        """Give the same walk with other cells, (S, N)."""
        return type(self)(**self._parts() | {"compute": _rows(cells), "provenance": provenance})

    def _parts(self) -> dict:
        return {name: getattr(self, name) for name in type(self).model_fields}

    # ---- constructors ---------------------------------------------------------------------------------------------

    @classmethod
    def full(cls, timesteps: Sequence[int], schedule: NoiseSchedule, blocks: Sequence[str], order: int = 1,
             grid: Sequence[int] | None = None, cache: str = "output", **provenance) -> Self:
        """Compute every cell at the given timesteps: the teacher, or any list of fewer steps."""
        compute = ((True,) * len(blocks),) * len(timesteps)
        return cls(order=order, timesteps=tuple(timesteps), grid=tuple(grid or timesteps), schedule=schedule,
                   blocks=tuple(blocks), cache=cache, compute=compute, provenance={"method": "full"} | provenance)

    @classmethod
    def few_steps(cls, steps: int, spacing: str, teacher: Self, order: int = 1) -> Self:
        """Take `steps` full steps with uniform (trailing) or quadratic spacing instead of the teacher's."""
        timesteps = SPACINGS[spacing](steps, teacher.schedule.train_timesteps)
        return cls.full(timesteps, teacher.schedule, teacher.blocks, order, teacher.grid, teacher.cache,
                        method="few steps", steps=steps, spacing=spacing)

    @classmethod
    def deepcache(cls, interval: int, shallow: np.ndarray, teacher: Self, **provenance) -> Self:
        """Compute all blocks at every `interval`-th step and only the shallow ones between (DeepCache, uniform 1:N).

        Parameters
        ----------
        interval : int, N >= 1
        shallow : (N blocks,), bool
            The blocks that a partial step runs: `lib.grid.blocks.Blocks.branch`.
        """
        if interval < 1:
            raise PlanError(f"interval: must be at least 1, got {interval}")
        cells = np.tile(np.asarray(shallow, dtype=bool), (teacher.steps, 1))
        cells[::interval] = True
        return teacher.with_cells(cells, method="DeepCache", interval=interval, **provenance)

    @classmethod
    def segments(cls, segments: Sequence[tuple[int, np.ndarray]], teacher: Self, **provenance) -> Self:
        """Cut the teacher's steps into equal segments of one full step, partial steps and null steps (Flexiffusion).

        Parameters
        ----------
        segments : sequence of (active, shallow)
            For each segment the number of steps that run at all (1..length, the first of them full) and the blocks
            that its partial steps run, (N,), bool. With S segments the length is ceil(T / S), the last one shorter.
        """
        steps = teacher.steps
        length = -(-steps // len(segments))
        timesteps, rows = [], []
        for number, (active, shallow) in enumerate(segments):
            first = number * length
            if first >= steps:
                raise PlanError(f"segments: {len(segments)} segments of {length} steps do not fit {steps} steps")
            if not 1 <= active <= length:
                raise PlanError(f"segments: segment {number} has {active} active steps, must be 1..{length}")
            for step in range(first, min(first + active, steps)):
                timesteps.append(teacher.timesteps[step])
                rows.append(np.ones(len(teacher.blocks), bool) if step == first else np.asarray(shallow, bool))
        parts = teacher._parts() | {"timesteps": tuple(timesteps), "compute": _rows(np.stack(rows))}
        return cls(**parts | {"provenance": {"method": "segments"} | provenance})

    @classmethod
    def from_gates(cls, gates: np.ndarray, teacher: Self, **provenance) -> Self:
        """Take keep / reuse gates, (T, N), bool, as they are (DiP-GO)."""
        if np.shape(gates) != (teacher.steps, len(teacher.blocks)):
            raise PlanError(f"gates: shape {np.shape(gates)}, must be {(teacher.steps, len(teacher.blocks))}")
        return teacher.with_cells(np.asarray(gates, dtype=bool), **{"method": "gates"} | provenance)

    @classmethod
    def random(cls, keep: float, seed: int, teacher: Self) -> Self:
        """Compute each cell with probability `keep`; for one seed, a higher `keep` keeps a superset of cells."""
        cells = np.random.default_rng(seed).random((teacher.steps, len(teacher.blocks))) < keep
        cells[0] = True
        return teacher.with_cells(cells, method="random cells", keep=keep, seed=seed)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one line of 1 and 0 a step."""
        content = self.model_dump(mode="json")
        content["compute"] = ["".join("01"[cell] for cell in row) for row in self.compute]
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan.

        Raises
        ------
        PlanError
            If the file is missing, is no JSON, comes from a newer version, or does not hold a plan.
        """
        try:
            content = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise PlanError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:  # unreadable; not UTF-8 or not JSON
            raise PlanError(f"{path}: cannot be read as JSON ({error}). Was it cut off? Make it again.") from None
        try:
            return cls(**_from_json(content))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

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


def _rows(cells: np.ndarray) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(bool(cell) for cell in row) for row in cells)


def _from_json(content: Any) -> dict:
    """Turn JSON's lists into tuples and its strings of 0 and 1 into cells."""
    if not isinstance(content, dict):
        raise PlanError(f"holds a {type(content).__name__}, not a plan")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise PlanError(f"written by a newer version of this project (plan version {version}, this one reads {VERSION})"
                        ". Update the project.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    if isinstance(values.get("schedule"), dict):
        try:
            values["schedule"] = NoiseSchedule(**values["schedule"])
        except ValidationError as error:
            raise PlanError(_say(error, "schedule")) from None
    rows = values.get("compute")
    if isinstance(rows, tuple):
        if not all(isinstance(row, str) and set(row) <= {"0", "1"} for row in rows):
            raise PlanError("compute: each step must be a string of 0 and 1")
        values["compute"] = tuple(tuple(cell == "1" for cell in row) for row in rows)
    return values


def _say(error: ValidationError, within: str = "") -> str:
    """Put pydantic's first fault into one sentence with its place and value."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in ((within,) if within else ()) + fault["loc"])
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and not place:
        return text
    return f"{place}: {text}" + ("" if fault["type"] == "missing" else f" (got {fault['input']!r:.60})")
