"""A plan on a stock diffusers pipeline, which is called as ever: images of numbered noise, under a plan or without."""

import copy
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn
from tqdm import tqdm

from lib.grid import blocks, graphs, solvers
from lib.grid.engine import CLOSE, Engine
from lib.grid.plan import FlowSchedule, NoiseSchedule, Plan, PlanError
from lib.grid.sampling import BANKS
from lib.grid.solvers import State, advance, noise_levels

UNGUIDABLE = ("DiTPipeline", "PAG")
"""Pipelines, by parts of their names, whose batches are no pair of a null and a given pass."""

OWN = {"num_inference_steps", "generator", "latents", "output_type", "return_dict"}
"""What `Requests` gives a call by itself, and what would take the place of its noise."""
BATCHED = ("prompt", "class_labels", "batch_size")
"""What pipelines take that says how many images they make."""


def network_of(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """Give the name and the network that a pipeline runs at each step; of a compiled one its own.

    Raises
    ------
    PlanError
        If it has none, or several that take turns, or no scheduler.
    """
    if second := [name for name in ("transformer_2", "unet_2") if getattr(pipe, name, None) is not None]:
        raise PlanError(f"a {type(pipe).__name__} with a {second[0]} runs two networks in turn, and a plan is for one: "
                        "run it without a plan.")
    part = next((part for part in ("unet", "transformer") if getattr(pipe, part, None) is not None), None)
    if part is None or getattr(pipe, "scheduler", None) is None:
        raise PlanError(f"a {type(pipe).__name__} has no unet and no transformer, or no scheduler: no plan fits it.")
    network = getattr(pipe, part)
    return part, getattr(network, "_orig_mod", network)


class Planned:
    """A stock diffusers pipeline under a plan: inside ``with Planned(pipe, plan):`` it is called as ever, but cheaper.

    `enable` and `disable` do the same without a block of code. Any pipeline will do that has a network of a known
    family (``unet`` or ``transformer``) and walks a scheduler's timesteps; guidance in one pass and in several. The
    plan's solver takes the place of the pipeline's, so the pipeline is deterministic from its first noise on.

    Parameters
    ----------
    pipe : DiffusionPipeline
    plan : Plan
    watch : callable(step, x_t, output), told after each step what the solver was given: x_t, (n, C, ...), before the
        step, and what the network predicted there, guided
    compiling : dict of torch.compile's options, such as {"fullgraph": True}
        Compiles each block by itself: which blocks run is decided in Python, between them. None compiles nothing, and a
        compiled network runs uncompiled for as long.

    Raises
    ------
    PlanError
        If the plan is for other blocks or another noise schedule.
    """

    def __init__(self, pipe: DiffusionPipeline, plan: Plan, watch: Callable[[int, Tensor, Tensor], None] | None = None,
                 compiling: dict[str, Any] | None = None):
        self.pipe, self.plan, self.watch, self.compiling, self._own = pipe, plan, watch, compiling, None
        self._prepare()

    def _prepare(self) -> tuple[Engine, "_Walk"]:
        """Check that the plan fits the pipeline as it is now, and give what walks it."""
        kind, (part, model) = type(self.pipe).__name__, network_of(self.pipe)
        if len(self.plan.passes) > 1 and any(word in kind for word in UNGUIDABLE):
            raise PlanError(f"a {kind} makes batches in which nobody can say which rows are of which pass: take a plan "
                            "of one pass, which holds for all.")
        if isinstance(self.pipe.scheduler, _Walk):
            raise PlanError(f"{self.pipe.scheduler.engine.plan.title} is on this pipeline: leave its block, or "
                            "disable() it, first.")
        self._part, self._model = part, model
        fits = NoiseSchedule.of(self.pipe.scheduler)
        if (self.plan.timesteps != self.plan.grid and not hasattr(type(self.pipe), "denoising_end")
                and "denoising_end" in inspect.signature(type(self.pipe).__call__).parameters):
            raise PlanError(f"nobody can see at which timestep a {kind} stops, and {self.plan.title} may step over it: "
                            "take a plan of all the pipeline's steps.")
        engine = graphs.engine(self._model, self.plan, fits, led=True, compiling=self.compiling)
        return engine, _Walk.in_place_of(self.pipe.scheduler, engine, self.watch, self._is_cut)

    def _is_cut(self) -> bool:
        """Say whether the call that has begun runs a part of the steps, between timesteps (SDXL and its refiner)."""
        return any(getattr(self.pipe, f"_denoising_{end}", None) is not None for end in ("start", "end"))

    def enable(self) -> None:
        """Put the plan on the pipeline."""
        if self._own is not None:
            raise PlanError(f"{self.plan.title} is on this pipeline already.")
        self._engine, walk = self._prepare()
        self._engine.__enter__()
        self._own = {self._part: getattr(self.pipe, self._part), "scheduler": self.pipe.scheduler}
        self._put({self._part: self._model, "scheduler": walk})

    def disable(self) -> None:
        """Take it off again: the pipeline is as it was."""
        if self._own is not None:
            self._put(self._own)
            self._own = None
            self._engine.__exit__()

    def _put(self, parts: dict) -> None:
        for name, part in parts.items():
            setattr(self.pipe, name, part)

    def __enter__(self) -> DiffusionPipeline:
        self.enable()
        return self.pipe

    def __exit__(self, *_) -> None:
        self.disable()


class _Walk:
    """A plan's solver, as a pipeline's scheduler that takes no other timesteps.

    Whoever asks it, saves it or copies it meets the pipeline's own scheduler. Latents come and go in that one's units:
    some schedulers (Euler's, of the kind of x_0 + sigma noise) divide x_t by alpha.
    """

    order = 1

    @classmethod
    def in_place_of(cls, own: SchedulerMixin, engine: Engine, watch: Callable | None, is_cut: Callable[[], bool]
                    ) -> Self:
        """Give a walk of an engine's plan that is of the own scheduler's class too."""
        kind = type(own)
        hidden = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "from_config": kind.from_config}
        walk = object.__new__(type(kind.__name__, (cls, kind), hidden))
        vars(walk).update({name: value for name, value in vars(own).items() if not hasattr(cls, name)})
        walk.own, walk.engine, walk.watch, walk.is_cut, walk._state = own, engine, watch, is_cut, ()
        plan, divides = engine.plan, getattr(own, "init_noise_sigma", 1.0) != 1.0
        walk._divided = [*noise_levels(plan.timesteps, plan.schedule)[0].tolist(), 1.0] if divides else None
        return walk

    def __reduce__(self) -> tuple:
        return copy.copy, (self.own,)

    @property
    def init_noise_sigma(self) -> float:
        return 1 / self._divided[0] if self._divided else 1.0

    @property
    def sigmas(self) -> Tensor:
        """The plan's noise levels, (S + 1,), where they are one with its timesteps: in flow matching."""
        plan = self.engine.plan
        if not isinstance(plan.schedule, FlowSchedule):
            raise PlanError("this pipeline reads its scheduler's sigmas, and a plan's solver is not told by them: run "
                            "it without a plan.")
        device = self.timesteps.device if "timesteps" in vars(self) else None
        return torch.tensor([*plan.timesteps, 0.0], device=device) / plan.schedule.train_timesteps

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
                      sigmas: Sequence[float] | None = None, mu: float | None = None,
                      timesteps: Sequence[float] | None = None) -> None:
        """Begin a run; even sigmas, which some pipelines of flow matching give, and their shift (mu) say nothing."""
        plan = self.engine.plan
        if sigmas is not None or timesteps is not None:
            num_inference_steps = len(timesteps if sigmas is None else sigmas)
            if not (isinstance(plan.schedule, FlowSchedule) and self._are_the_plans(sigmas, mu, timesteps)):
                raise PlanError(f"{plan.title} walks its own timesteps, and does not support custom "
                                f"{'timesteps' if sigmas is None else 'sigmas'}: call the pipeline without them, or, "
                                "where it gives them by itself, make the plan of a run's scheduler.timesteps.")
        if num_inference_steps not in (len(plan.grid), plan.steps):
            raise PlanError(f"the plan is for runs of {len(plan.grid)} steps, of which it takes {plan.steps}: call the "
                            f"pipeline with num_inference_steps={plan.asked_steps}, not {num_inference_steps}.")
        if plan.timesteps != plan.grid and self.is_cut():
            raise PlanError(f"the call runs the steps between two timesteps (denoising_start, denoising_end), and "
                            f"{plan.title} may step over these: take a plan of all the pipeline's steps.")
        if not self.engine.on:
            raise PlanError(f"{plan.title} is no longer on this network, but its scheduler is still on this pipeline, "
                            "which was made meanwhile: give it a scheduler of its own.")
        self.engine.reset()
        self.engine.closed, self.engine.thread = False, threading.get_ident()
        self.engine.counted = num_inference_steps
        self.timesteps, self.num_inference_steps = torch.tensor(plan.timesteps, device=device), num_inference_steps
        self._state: State = ()

    def _are_the_plans(self, sigmas: Sequence[float] | None, mu: float | None, timesteps: Sequence | None) -> bool:
        """Say whether such a call means even steps, or the very ones that the plan was made of."""
        if timesteps is None and np.allclose(sigmas, np.linspace(1.0, 1 / len(sigmas), len(sigmas))):
            return True
        own, plan = copy.deepcopy(self.own), self.engine.plan
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        try:
            own.set_timesteps(**{name: value for name, value in given.items() if value is not None})
        except TypeError:  # some schedulers take none
            return False
        levels = own.sigmas[:-1] * plan.schedule.train_timesteps  # some are told other timesteps than their noise's
        return all(len(told) == len(plan.grid) and np.allclose(told, plan.grid, atol=CLOSE)
                   for told in (own.timesteps, levels))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later step (image to image); see `lib.grid.plan.Plan.refreshed`."""
        plan = self.engine.plan
        if begin_index >= plan.steps:
            raise PlanError(f"the pipeline begins at step {begin_index}, and the plan has {plan.steps}, from 0 on: "
                            f"call it with num_inference_steps={plan.steps} and a greater strength.")
        if begin_index and self.num_inference_steps != plan.steps:
            raise PlanError(f"the plan takes {plan.steps} of {self.num_inference_steps} steps, and the pipeline begins "
                            f"in the middle, which it counts in its own steps: call it with num_inference_steps="
                            f"{plan.steps}.")
        if begin_index and plan.solver in ("pndm", "learned"):
            raise PlanError(f"the pipeline begins at step {begin_index}, and the plan's solver ({plan.solver}) can "
                            "only be walked from its first step: call it with strength 1, or take another solver.")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not len(timesteps):
            raise PlanError(f"the pipeline asks for none of the plan's {self.engine.plan.steps} steps: call it with "
                            f"num_inference_steps={self.engine.plan.steps} and a greater strength.")
        shape = (-1,) + (1,) * (noise.ndim - 1)
        alpha, sigma = (part.to(noise).view(shape) for part in
                        noise_levels(timesteps.cpu(), self.engine.plan.schedule))
        x_t = alpha * original_samples + sigma * noise
        return x_t / alpha if self._divided else x_t

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        if not self._divided:
            return sample
        step = np.abs(np.subtract(self.engine.plan.timesteps, float(timestep))).argmin()  # single precision rounds it
        return sample * self._divided[step]

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, eta: float = 0.0,
             use_clipped_model_output: bool = False, generator: torch.Generator | None = None,
             return_dict: bool = True):
        if eta:
            raise PlanError(f"a plan is walked without noise: call the pipeline with eta=0, not {eta}.")
        engine, given = self.engine, sample.dtype
        engine.check_thread()
        engine.check_passes(len(sample))
        engine.check_order(model_output)
        if not self._state:
            self._begin(engine.step)
        output = model_output[:, :sample.shape[1]].float()
        step, x_t = engine.step, sample.float()
        if self._divided:
            x_t = x_t * self._divided[step]
        sample, self._state = advance(self._solver, step - self._first, x_t, output, self._state)
        if self.watch is not None:
            self.watch(step, x_t, output)
        if self._divided:
            sample = sample / self._divided[step + 1]
        engine.at(step + 1)
        engine.closed = engine.step == engine.plan.steps
        return SchedulerOutput(prev_sample=sample.to(given)) if return_dict else (sample.to(given),)

    def _begin(self, step: int) -> None:
        """Take the solver of a walk that begins at a step."""
        self.set_begin_index(step)
        plan = self.engine.plan
        self._first = step
        self._solver = solvers.of(plan.at(plan.timesteps[step:])) if step else self.engine.solver


@dataclass(frozen=True)
class Requests:
    """What a stock pipeline is asked for, image by image: the same image whatever the batch, the device and the plan.

    Attributes
    ----------
    pipe : DiffusionPipeline, one that can be called
    said : tuple of str or int
        What images are asked to show, prompts or classes; image number i takes the one of number i, and begins again
        behind the last. Empty where the pipeline takes none, or where `options` hold its embeddings.
    options : what each call is given besides, such as guidance_scale, height and width
    batch : int, images of a call
    seed : int, of the noise

    Raises
    ------
    ValueError
        If the pipeline wants to be told what to draw, or cannot be.
    """

    pipe: DiffusionPipeline
    said: Sequence[str | int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    seed: int = 0

    def __post_init__(self):
        kind, by = type(self.pipe).__name__, self._by
        told = by is not None and any(name == by or name.startswith(f"{by}_embeds") for name in self.options)
        if isinstance(self.said, str):
            raise ValueError("said: give a list of prompts, not one string")
        try:
            blocks.describe(network_of(self.pipe)[1])
        except TypeError as error:
            raise PlanError(f"no plan fits a {kind}: {error}") from None
        parameters = inspect.signature(type(self.pipe).__call__).parameters.values()
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if (strange := set(self.options) - self._takes) and not anything:
            raise ValueError(f"a {kind} takes no {', '.join(sorted(strange))}: leave it out.")
        if own := OWN & set(self.options):
            raise ValueError(f"{', '.join(sorted(own))}: is given by number here; leave it out.")
        if not {"num_inference_steps", "generator"} <= self._takes:
            raise ValueError(f"a {kind} cannot be called for images of numbered noise under a plan.")
        if self.said and told:
            raise ValueError("the options say what to draw, as prompts or classes do: give one of the two, not both")
        if self.said and by is None:
            raise ValueError(f"a {kind} takes neither prompts nor classes: give none.")
        if not self.said and not told and by is not None:
            raise ValueError(f"a {kind} draws what it is asked for: give it {by.replace('_', ' ')}s.")
        if self.batch < 1:
            raise ValueError(f"batch: {self.batch} images a call; make it 1 or more")
        if self.batch > 1 and not self.said and "batch_size" not in self._takes:
            raise ValueError(f"a {kind} that is given embeddings makes one image a call: set the batch to 1.")
        read = self._class if by == "class_labels" else self._prompt
        object.__setattr__(self, "said", tuple(map(read, self.said)))

    def _class(self, said: str | int) -> int:
        """Give a class number as a number."""
        config = network_of(self.pipe)[1].config
        classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
        if not str(said).isdecimal() or (classes and int(said) >= classes):
            most = f" from 0 to {classes - 1}" if classes else ""
            raise ValueError(f"{said!r} is no class of this model: give numbers{most}")
        return int(said)

    def _prompt(self, said: str | int) -> str:
        """Give a prompt as text, if the pipeline's tokenizer can read it."""
        said, tokenizer = str(said), getattr(self.pipe, "tokenizer", None)
        try:
            if tokenizer is not None:
                tokenizer(said)
        except Exception as error:  # whatever a tokenizer raises of a word that it does not know
            known = tokenizer.get_vocab()
            strange = ", ".join(word for word in said.split() if word not in known)
            raise ValueError(f"prompt {said!r}: this pipeline's tokenizer cannot read it; use other words than "
                             f"{strange}") from error
        return said

    @property
    def _takes(self) -> set[str]:
        """What the pipeline takes."""
        return set(inspect.signature(type(self.pipe).__call__).parameters)

    @property
    def _by(self) -> str | None:
        """Of that what says what to draw."""
        return next((name for name in BATCHED[:2] if name in self._takes), None)

    def images(self, plan: Plan, bank: str, numbers: Sequence[int], watch: Callable | None = None,
               title: str | None = None) -> Tensor:
        """Give images of some numbers of a bank of noise under a plan, (n, C, H, W), float32 in [0, 1].

        Parameters
        ----------
        bank : str, a key of `lib.grid.sampling.BANKS`
        watch : as `Planned` takes it
        title : of a progress bar; None for none
        """
        with Planned(self.pipe, plan, watch):
            return self.plain(bank, numbers, plan.asked_steps, title)

    def plain(self, bank: str, numbers: Sequence[int], steps: int, title: str | None = None) -> Tensor:
        """Give the images of the pipeline as it is, by its own scheduler in so many steps."""
        made, shows = [], getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(disable=True)
        bar = tqdm(total=len(numbers), desc=title, unit="image", disable=title is None, leave=False)
        try:
            for first in range(0, len(numbers), self.batch):
                own = numbers[first:first + self.batch]
                output = self.pipe(**self._asked(bank, own), num_inference_steps=steps, output_type="np")
                if not hasattr(output, "images"):
                    raise PlanError(f"a {type(self.pipe).__name__} gives no images: put a plan on it by hand "
                                    "(lib.apply.Planned).")
                if any(getattr(output, "nsfw_content_detected", None) or ()):
                    raise ValueError("the safety checker blacked out an image, and nothing can be compared with that: "
                                     "give other prompts, or a pipeline without it (safety_checker=None).")
                made.append(torch.from_numpy(np.asarray(output.images, np.float32)).permute(0, 3, 1, 2))
                bar.update(len(own))
        finally:
            bar.close()
            self.pipe.set_progress_bar_config(**shows)
        return torch.cat(made)

    def _asked(self, bank: str, numbers: Sequence[int]) -> dict:
        """Give what a call for some images is given: what they show, and the noise of each by its number alone."""
        seeds = [np.random.SeedSequence((self.seed, BANKS[bank], number)).generate_state(1)[0] for number in numbers]
        asked = {"generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds]}
        if self.said:
            asked[self._by] = [self.said[number % len(self.said)] for number in numbers]
        elif "batch_size" in self._takes:
            asked["batch_size"] = len(numbers)
        return asked | dict(self.options)
