"""Typed, range-checked parameters: what a notebook's `parameters` cell or a study's params file may say.

``params/<study>.yaml`` has a section `common` and one a notebook; a notebook's parameters are both together, flat.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lib.study import paths

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class ParamsError(ValueError):
    """A parameter, or a params file, is not right; the message says what to do."""


def _data(source: str) -> str:
    drawn = re.fullmatch("digits|letters(:[1-9][0-9]*)?", source)
    if not drawn and not source.startswith("hub:") and not (paths.ROOT / source).exists():
        raise ValueError("must be digits, letters or letters:COUNT, a file or folder that exists, or hub:OWNER/NAME")
    return source


def _checkpoint(source: str) -> str:
    if source and not source.startswith("hub:") and not (paths.ROOT / source / "model_index.json").exists():
        raise ValueError("must be empty, the folder of a diffusers pipeline, or hub:OWNER/NAME")
    return source


def _judge(task: str) -> str:
    if task not in ("denoising", "rotation") and not task.startswith(("torch-fidelity:", "clip:")):
        raise ValueError("must be denoising, rotation, torch-fidelity:NAME, such as torch-fidelity:dinov2-vit-s-14, or "
                         "clip:SOURCE, such as clip:hub:openai/clip-vit-base-patch16")
    return task


class Common(BaseModel):
    """What every notebook of a study shares."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    study: str = Field(min_length=1)
    data: Annotated[str, AfterValidator(_data)]  # what `lib.teachers.data.load` takes
    resolution: int = Field(ge=8, le=1024, multiple_of=8)  # pixels a side
    held_out: float = Field(gt=0, lt=1)  # fraction of the images that no training sees
    seed: int = Field(ge=0, lt=2**31)
    report_seed: int = Field(ge=0, lt=2**31)  # of the noise behind every final score; nothing is chosen on it
    second_task: Annotated[str, AfterValidator(_judge)]  # the second judge's task, torch-fidelity:NAME or clip:SOURCE
    device: Literal["cpu", "cuda"]
    threads: Positive  # CPU threads, fewer if others are busy; another number changes the last bits of results
    precision: Literal["fp32", "bf16", "auto"]  # of the network, in training and sampling; auto becomes one of the two
    teacher_steps: int = Field(ge=2, le=1000)  # T
    guidance: float = Field(ge=1)  # scale of classifier-free guidance; 1 is none
    score_images: int = Field(ge=100)  # n of every final score

    @field_validator("precision")
    @classmethod
    def _quicker(cls, precision: str, others: ValidationInfo) -> str:
        if precision != "auto":
            return precision
        return "bf16" if others.data.get("device") == "cuda" or _reckons_in_bf16() else "fp32"

    @property
    def smoke(self) -> bool:
        """Whether the study only shows that all runs: its numbers mean nothing."""
        return self.study.startswith("smoke")

    @classmethod
    def bind(cls, namespace: Mapping[str, Any]) -> Self:
        """Take the parameters out of a notebook's namespace.

        Studies for trying out (`smoke...`) may be changed at will. Where another study's name alone was written into
        the parameters cell, its file gives the rest.

        Parameters
        ----------
        namespace : the notebook's ``globals()``

        Raises
        ------
        ParamsError
            If one is missing, of another type, out of range, or other than in the file of its study.
        """
        found = cls._checked({name: namespace[name] for name in cls.model_fields if name in namespace}, "notebook")
        if found.study == "smoke":
            return found
        notebook = next(name for name, kind in NOTEBOOKS.items() if kind is cls)
        if notebook not in notebooks(found.study):
            raise ParamsError(f"study {found.study} has no {notebook}: see `only` in params/{found.study}.yaml")
        wanted = load(found.study)[notebook]
        if found.model_copy(update={"study": "smoke"}) == load("smoke")[notebook]:
            print(f"The other parameters are taken from params/{found.study}.yaml, not from the cell above.")
            return wanted
        if found.smoke:
            return found
        if changed := [name for name, value in wanted if value != getattr(found, name)]:
            raise ParamsError(f"notebook: {', '.join(changed)}: not as in params/{found.study}.yaml. Change that file, "
                              "or write a params file, and so a study, of your own")
        return found

    @classmethod
    def _checked(cls, values: dict[str, Any], source: str) -> Self:
        try:
            params = cls(**values)
        except ValidationError as error:
            faults = [_say(fault, cls) for fault in error.errors()]
            raise ParamsError(f"{source}: " + "; ".join(faults)) from None
        if params.device == "cuda":
            _require_cuda(source)
        return params


class TeacherTraining(Common):
    """Parameters of 00_teacher_training."""

    checkpoint: Annotated[str, AfterValidator(_checkpoint)]  # a pipeline to take instead of training; "" trains
    latent_channels: int = Field(ge=0)  # of an autoencoder's latents; 0: the network draws the images themselves
    autoencoder_steps: int = Field(ge=0)  # of its training
    text_width: int = Field(ge=0)  # of what the network reads of each word of a prompt; 0: it reads none
    widths: list[Positive] = Field(min_length=2)  # channels of each level, from full resolution down
    layers: Positive  # residual blocks a level
    norm_groups: Positive  # divides every width
    training_steps: Positive
    batch_size: Positive
    learning_rate: float = Field(gt=0, lt=1)
    ema_decay: float = Field(ge=0, lt=1)
    save_every: Positive  # steps between two states to resume from
    extractor_steps: Positive
    step_counts: list[Positive] = Field(min_length=2)  # DDIM step counts whose images and scores are shown

    @model_validator(mode="after")
    def _trains_what_it_needs(self) -> Self:
        if not self.checkpoint and bool(self.latent_channels) != bool(self.autoencoder_steps):
            raise ValueError(f"latent_channels is {self.latent_channels}, autoencoder_steps {self.autoencoder_steps}: "
                             "latents need an autoencoder that is trained; set both, or both to 0")
        if not self.checkpoint and self.guidance != 1 and not self.text_width:
            raise ValueError(f"guidance is {self.guidance:g}, and the network reads nothing by which to guide it: set "
                             "text_width, or guidance to 1")
        return self

    @property
    def recipe(self) -> dict[str, Any]:
        """What `lib.teachers.networks.fit` takes of them."""
        return self.model_dump(include={"training_steps", "batch_size", "learning_rate", "ema_decay", "save_every",
                                        "seed", "device", "precision"})

    @property
    def machine(self) -> dict[str, Any]:
        """Where and how all that learns in this notebook runs."""
        return self.model_dump(include={"seed", "device", "precision"})

    @property
    def architecture(self) -> dict[str, Any]:
        """What `lib.teachers.networks.untrained` takes of them."""
        return self.model_dump(include={"widths", "layers", "norm_groups", "latent_channels", "text_width", "seed",
                                        "device"})


class TeacherAnalysis(Common):
    """Parameters of 01_teacher_analysis."""

    similarity_images: Positive
    sensitivity_images: int = Field(ge=2)
    sensitivity_stride: Positive  # every so many steps one row of the map
    latency_batch: Positive
    latency_repeats: int = Field(ge=5)
    ddim_steps: list[Positive] = Field(min_length=2)  # step counts on the front, uniform spacing, order 1
    quadratic_steps: list[Positive] = Field(min_length=1)  # step counts on the front, quadratic spacing, order 1
    dpm_steps: list[Positive] = Field(min_length=2)  # step counts on the front, DPM-Solver++ of order 2
    cache_intervals: list[Positive] = Field(min_length=1)  # DeepCache's N
    cache_branches: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)  # DeepCache's skip connections
    forecast_interval: int = Field(ge=2)  # steps between computed outputs where forecasts are held against the truth
    forecast_steps: list[Annotated[int, Field(ge=2)]] = Field(min_length=1)  # step counts under DeepCache
    forecast_intervals: list[Annotated[int, Field(ge=2)]]  # DeepCache's N at each of them
    forecast_orders: list[Literal[1, 2]]  # the solver's order at each of them
    guidance_scales: list[Annotated[float, Field(ge=1)]]  # that are compared, where the study guides its teacher
    select_images: int = Field(ge=70)  # images on which the best solver and the strongest control are chosen
    search_images: int = Field(ge=10)  # images a candidate of searched steps
    trials: Positive  # candidates of searched steps
    population: int = Field(ge=2)  # of that search

    @model_validator(mode="after")
    def _bases(self) -> Self:
        if not len(self.forecast_steps) == len(self.forecast_intervals) == len(self.forecast_orders):
            raise ValueError("forecast_steps, forecast_intervals and forecast_orders must be as long as each other")
        return self


def _different(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("one stands twice")
    return values


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_different), Field(min_length=1)]


def _holds(needed: Any, why: str) -> AfterValidator:
    def check(values: list) -> list:
        if needed not in values:
            raise ValueError(f"add {needed}, {why}")
        return values
    return AfterValidator(check)


Beta = Literal["noise only", "blocks only", "fixed", "linear", "cosine", "step"]
"""Schedules of the joint loss (`lib.methods.diffnas.BETAS`)."""


class BlockSearch(Common):
    """Parameters of 02_block_search."""

    kernels: Annotated[list[Literal[1, 3, 5, 7]], AfterValidator(_different),
                       _holds(3, "the teacher's own")]  # choices for each convolution
    widths: Annotated[list[Annotated[float, Field(gt=0, le=4)]], AfterValidator(_different),
                      _holds(1.0, "the teacher's own")]  # choices for the channels between them, of the block's own
    supernet_steps: Positive
    supernet_rate: float = Field(gt=0, lt=1)
    retraining_steps: Positive  # of a student
    retraining_rate: float = Field(gt=0, lt=1)
    batch_size: Positive
    ema_decay: float = Field(ge=0, lt=1)
    save_every: Positive  # steps between two states to resume from
    beta: Beta  # how the noise loss's weight rises
    candidate_images: int = Field(ge=2)  # held-out images a batch
    candidate_batches: Positive  # that judge a candidate
    tolerances: list[Annotated[float, Field(ge=1)]] = Field(min_length=1)  # of the reference's loss, for the sweep
    budgets: Annotated[list[Fraction], AfterValidator(_different)] = Field(
        min_length=1)  # shares of the teacher's MACs and parameters for which students are trained
    prices: Annotated[list[Literal["macs", "seconds"]], AfterValidator(_different),
                      _holds("macs", "the paper's")]  # by which the cheapest candidate is chosen
    training_seeds: Seeds  # trainings of each student and control
    select_images: int = Field(ge=70)  # images on which the student that goes on is chosen
    score_steps: int = Field(ge=2, le=1000)  # of DPM-Solver++, which samples every model
    latency_batch: Positive
    latency_repeats: int = Field(ge=5)


class JointLossAblation(Common):
    """Parameters of 03_joint_loss_ablation; rates and batches are notebook 02's."""

    schedules: Annotated[list[Beta], AfterValidator(_different),
                         _holds("noise only", "with which all are compared")]  # of beta
    choices: Annotated[list[Literal["global", "random", "torch-pruning", "thin"]],
                       AfterValidator(_different)]  # other ways to choose a student
    starts: Annotated[list[Literal["teacher", "fresh"]], AfterValidator(_different)]  # other weights to begin with
    targets: list[Literal["teacher"]]  # other targets of the noise loss
    beta: Beta  # the schedule where something else is compared
    retraining_steps: Positive  # optimiser steps of each training
    training_seeds: Seeds  # of each schedule
    other_seeds: Seeds  # of everything else
    gradient_images: int = Field(ge=2)  # a batch where gradients are compared
    curve_points: int = Field(ge=2, le=1000)  # held-out losses taken on the way of a training


class ScheduleSearch(Common):
    """Parameters of 04_schedule_search."""

    segment_counts: list[Positive] = Field(min_length=1)  # choices of S in the paper's space
    branches: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)  # choices of a segment's skip connection
    full_steps: list[Positive] = Field(min_length=1)  # choices of the number of full steps in the extended space
    partials: Positive  # most partial steps of a segment in the extended space
    reuses: Annotated[list[Literal[0, 2, 3]], AfterValidator(_different), _holds(0, "to hold")
                      ]  # choices of what partial steps reuse in the extensions: 0 holds, 2 a line, 3 a parabola
    base_steps: int = Field(ge=2, le=1000)  # of the short DPM-Solver++ base
    base_segment_counts: list[Positive] = Field(min_length=1)  # choices of S on the short base
    base_budgets: list[Fraction] = Field(min_length=1)  # of the short base's executed MACs
    trials: Positive  # candidates of each search, besides the known schedules that it begins with
    population: int = Field(ge=2)
    workers: Positive  # processes of a search; results repeat exactly with one alone
    search_images: int = Field(ge=10)  # images a candidate
    budgets: list[Fraction] = Field(min_length=1)  # of the teacher's executed MACs
    claim_steps: list[Annotated[int, Field(ge=2, le=1000)]]  # T of other teachers, the claims' own
    claim_solvers: list[Literal["ddim", "plms"]]  # of each
    claim_guidance: list[Annotated[float, Field(ge=1)]]  # of each, its scale
    claim_lengths: list[Annotated[int, Field(ge=2)]] = Field(min_length=1)  # of a segment there
    claim_budgets: list[Fraction] = Field(min_length=1)  # of such a teacher's executed MACs
    learned_updates: Positive  # optimiser steps of each learning of timesteps
    learned_images: Positive  # images that are imitated
    finalists: Positive  # best of the search that meet again on the second bank
    select_images: int = Field(ge=70)
    rank_plans: int = Field(ge=5)  # candidates on which rFID is held against the final score
    rank_images: int = Field(ge=70)  # images of that final score
    rank_sizes: list[Annotated[int, Field(ge=10)]] = Field(min_length=1)  # images behind rFID there
    dividend_steps: list[Positive] = Field(min_length=1)  # full steps at which one partial step each is added
    latency_batch: Positive
    latency_repeats: int = Field(ge=5)

    @model_validator(mode="after")
    def _settings(self) -> Self:
        if not len(self.claim_steps) == len(self.claim_solvers) == len(self.claim_guidance):
            raise ValueError("claim_steps, claim_solvers and claim_guidance must be as long as each other")
        if any((scale == 1) != (self.guidance == 1) for scale in self.claim_guidance):
            raise ValueError("claim_guidance: guided and unguided runs do not mix in a study; keep all at 1, or none")
        return self


class PrunerTraining(Common):
    """Parameters of 05_pruner_training."""

    pruners: Annotated[list[Literal["DiP-GO", "columns", "annealed", "annealed columns"]],
                       AfterValidator(_different), _holds("DiP-GO", "with which all are compared")]  # what is trained
    kind: Literal["table", "queries", "encoder"]  # of pruner
    updates: Positive  # of a training
    batch_size: Positive  # images an update
    learning_rate: float = Field(gt=0)  # of SGD, with a cosine
    annealed_rate: float = Field(gt=0)  # root mean square of a step of the annealed pruners' logits
    look_every: int = Field(ge=0)  # updates between two looks by which a training stops; 0 for none
    patience: Positive  # looks without a better one that end a training
    alpha: float = Field(ge=0)  # weight of the sparsity loss
    stop: Fraction  # tau, kept fraction of the MACs below which sparsity no longer counts
    memory_steps: Annotated[list[Annotated[int, Field(ge=2)]], AfterValidator(_different)] = Field(
        min_length=2)  # T at which a training's memory is measured
    keeps: list[Fraction] = Field(min_length=1)  # kept fractions of the teacher's MACs at which plans are scored
    family: list[Fraction] = Field(min_length=1)  # kept fractions at which plans are saved
    search_images: int = Field(ge=10)  # images a candidate of the searches
    search_share: float = Field(gt=0)  # network calls of a search, over those of a training
    population: int = Field(ge=2)  # of the genetic searches
    learned_updates: Positive  # optimiser steps of each learning of timesteps, a control
    learned_images: Positive  # images that are imitated there
    select_images: int = Field(ge=70)  # images on which variants are compared
    ablations: list[Literal["loss", "alpha", "weights", "noise", "rate", "pruner", "gates", "annealing",
                            "backup"]]  # parts to vary
    rates: list[Annotated[float, Field(gt=0)]]  # other learning rates, for the part rate
    base_steps: int = Field(ge=2, le=1000)  # of the short DPM-Solver++ base
    base_keeps: list[Fraction]  # kept fractions of the short base's executed MACs
    plms_keeps: list[Fraction]  # kept fractions of the executed MACs of T steps of PLMS
    latency_batch: Positive
    latency_repeats: int = Field(ge=5)


class Comparison(Common):
    """Parameters of 06_comparison."""

    keeps: list[Fraction] = Field(min_length=1)  # kept fractions of the teacher's MACs for composed plans
    prices: Annotated[list[Literal["macs", "seconds"]], AfterValidator(_different),
                      _holds("macs", "the papers'")]  # what the joint search keeps within the kept fraction
    partials: Positive  # most partial steps of a segment
    branches: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)  # choices of a segment's skip connection
    reuses: Annotated[list[Literal[0, 2, 3]], AfterValidator(_different), _holds(0, "to hold")
                      ]  # choices of what is reused: 0 holds, 2 a line, 3 a parabola
    trials: Positive  # candidates of each search
    learned_updates: Positive  # optimiser steps of each learning of timesteps, a control
    learned_images: Positive  # images that are imitated there
    population: int = Field(ge=2)
    search_images: int = Field(ge=10)  # images a candidate
    finalists: Positive  # candidates that meet again on a second bank
    select_images: int = Field(ge=70)  # images of the second bank
    updates: Positive  # of a pruner's training
    batch_size: Positive  # images an update
    annealed_rate: float = Field(gt=0)  # root mean square of a step of the pruner's logits
    latency_batch: Positive
    latency_repeats: int = Field(ge=5)


class Transformer(Common):
    """Parameters of 07_transformer."""

    width: Positive  # channels of a token
    layers: int = Field(ge=2)  # transformer blocks
    heads: Positive  # of attention
    patch: Positive  # pixels a side of a token
    training_steps: Positive
    batch_size: Positive
    learning_rate: float = Field(gt=0, lt=1)
    ema_decay: float = Field(ge=0, lt=1)
    save_every: Positive  # steps between two states to resume from
    fewer_steps: list[Annotated[int, Field(ge=1, le=1000)]]  # among which the fewest that are as good as T are sought
    keep: Fraction  # kept fraction of the teacher's MACs for every method
    segment_counts: list[Positive] = Field(min_length=1)  # choices of S in Flexiffusion's space
    branches: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)  # choices of a segment's leading blocks
    full_steps: list[Positive] = Field(min_length=1)  # choices of the number of full steps in the extended space
    partials: Positive  # most partial steps of a segment in the extended space
    reuses: Annotated[list[Literal[0, 2, 3]], AfterValidator(_different), _holds(0, "to hold")
                      ]  # choices of what is reused: 0 holds, 2 a line, 3 a parabola
    trials: Positive  # candidates of each search
    learned_updates: Positive  # optimiser steps of each learning of timesteps, a control
    learned_images: Positive  # images that are imitated there
    population: int = Field(ge=2)
    search_images: int = Field(ge=10)  # images a candidate
    select_images: int = Field(ge=70)  # images on which the best solver and the strongest control are chosen
    updates: Positive  # of a pruner's training
    pruner_batch: Positive  # images an update
    pruner_rate: float = Field(gt=0)  # of SGD, with a cosine
    annealed_rate: float = Field(gt=0)  # root mean square of a step of the annealed pruner's logits
    claim_steps: list[Annotated[int, Field(ge=4, le=1000)]]  # T of the runs on which DiP-GO's claim is tested
    claim_keeps: list[Fraction] = Field(min_length=1)  # kept fractions of their MACs
    claim_rates: Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_different),
                           Field(min_length=1)]  # learning rates, of which the best on the select bank counts
    thresholds: list[Annotated[float, Field(gt=0)]]  # of the caches that decide while they run
    intervals: list[Annotated[int, Field(ge=2)]]  # of TaylorSeer, steps between two full ones
    dividend_steps: list[Positive] = Field(min_length=1)  # full steps at which one partial step each is added
    latency_batch: Positive
    latency_repeats: int = Field(ge=5)


NOTEBOOKS: dict[str, type[Common]] = {
    "00_teacher_training": TeacherTraining, "01_teacher_analysis": TeacherAnalysis, "02_block_search": BlockSearch,
    "03_joint_loss_ablation": JointLossAblation, "04_schedule_search": ScheduleSearch,
    "05_pruner_training": PrunerTraining, "06_comparison": Comparison, "07_transformer": Transformer}
"""Which notebook takes which parameters."""


def section(notebook: str) -> str:
    """Give the name of a notebook's section in a params file: its stem without the number."""
    return notebook.partition("_")[2]


def studies() -> list[str]:
    """Give the names of all studies that have a params file."""
    return sorted(path.stem for path in paths.PARAMS.glob("*.yaml"))


def notebooks(study: str) -> list[str]:
    """Give the notebooks that a study runs: all, or those whose sections its params file names under `only`.

    Raises
    ------
    ParamsError
        As `load` does.
    """
    return _read(study)[0]


def load(study: str) -> dict[str, Common]:
    """Read a study's params file.

    Returns
    -------
    params : dict of notebook stem to its parameters

    Raises
    ------
    ParamsError
        If the study is unknown, or a section or key is unknown, missing, of another type or out of range.
    """
    runs, content = _read(study)
    return {notebook: NOTEBOOKS[notebook]._checked(
        {"study": study} | content["common"] | content[section(notebook)],
        f"params/{study}.yaml, common and {section(notebook)}") for notebook in runs}


def _read(study: str) -> tuple[list[str], dict]:
    """Read a study's notebooks, and the sections of its params file."""
    path = paths.PARAMS / f"{study}.yaml"
    if study not in studies():  # nor any path
        raise ParamsError(f"unknown study {study!r}: no params/{study}.yaml. There are: {', '.join(studies())}.")
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text())  # YAML 1.2: 1e-4 is a number
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"params/{path.name} is no YAML: {error}") from None
    content = content if isinstance(content, dict) else {}
    every = {section(notebook): notebook for notebook in NOTEBOOKS}
    only = content.pop("only", list(every))
    first = next(iter(every))
    if not isinstance(only, list) or not set(map(str, only)) <= set(every) or first not in only:
        raise ParamsError(f"params/{path.name}, only: must be a list of sections, {first} among them. There are: "
                          f"{', '.join(every)}.")
    sections = {"common", *only}
    if set(content) != sections:
        raise ParamsError(f"params/{path.name}: sections missing: {sorted(sections - set(content)) or 'none'}; "
                          f"unknown: {sorted(map(str, set(content) - sections)) or 'none'}.")
    for name, values in content.items():
        if not isinstance(values, dict):
            raise ParamsError(f"params/{path.name}: section {name} must hold keys and values")
    return [notebook for name, notebook in every.items() if name in only], content


def _reckons_in_bf16() -> bool:
    """Say whether the processor has instructions for bf16; without them fp32 is far quicker."""
    import torch  # parameters know nothing of torch but this and the next

    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _require_cuda(source: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ParamsError(f"{source}: device is cuda, but this machine has no CUDA device. Set device: cpu, or run "
                          "on a machine with one.")


def _say(fault: Mapping[str, Any], kind: type[Common]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{name} is no parameter here; known: {', '.join(kind.model_fields)}"
    if fault["type"] == "missing":
        return f"{name} is missing"
    return f"{name}: {fault['msg']} (got {fault['input']!r:.60})"
