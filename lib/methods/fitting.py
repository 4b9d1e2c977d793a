"""Fitting a plan to a pipeline and a budget of seconds: profile, known schedules, two searches, a choice.

What is looked for is what comes nearest to the images of the pipeline's own full run, noise by noise, prompt by prompt.
The first search places full steps alone (the control that any cache has to beat); the second begins where the first
ended and has partial steps, forecasts and guidance passes too. `lib.fit` is the door to it.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lib.grid import blocks, cost, solvers
from lib.grid.pipelines import Requests, network_of
from lib.grid.plan import HOLD, LINE, PARABOLA, FlowSchedule, NoiseSchedule, Plan, PlanError, trailing
from lib.grid.saving import write_json, write_tensors
from lib.judging import pairs
from lib.methods import learned
from lib.methods.flexiffusion import FreeSpace
from lib.methods.guidance import GuidedSpace
from lib.methods.search import Found, Space, search

FEWEST = 2
"""Plans have so many full steps at least."""
SPAN = 3
"""Full steps that are searched: as many as the budget allows, down to so many times fewer."""
ALMOST = 0.99
"""A control of this share of the budget's seconds takes no less time."""
ALONE = 1.6
"""Of a guided network, whose null pass may be left out, up to so many times more."""
PARTIALS = 2
"""The most partial steps behind a full one."""
BRANCHES = 3
"""Branches at which partial steps may begin, from the shallowest on."""
INTERVALS = (2, 3, 5)
"""Of the controls that are DeepCache."""
DRAWN = 300
"""Genomes that are drawn to see which columns a space's plans have."""
FINALISTS = 4
"""Plans of each search that are compared on fresh noise."""
SAME = 0.003
"""Images of one pipeline differ by no more, in two runs of one machine: the root mean square over an image."""
PATHS = 8
"""Images along whose way steps are placed beforehand."""


@dataclass(frozen=True)
class Effort:
    """How much a fit may take, each number with its *help*. Search, choice and report have a bank of noise each."""

    steps: int = field(default=50, metadata={"help": "T, of the full run"})
    trials: int = field(default=120, metadata={"help": "plans tried beside known ones, half of full steps alone"})
    population: int = field(default=16, metadata={"help": "of the evolutionary search"})
    search_images: int = field(default=16, metadata={"help": "for each plan that is tried"})
    select_images: int = field(default=32, metadata={"help": "for each plan of the choice among the found"})
    report_images: int = field(default=32, metadata={"help": "for each plan of the certificate"})
    rounds: int = field(default=7, metadata={"help": "of each timing"})
    seed: int = field(default=0, metadata={"help": "of noise and search"})

    def __post_init__(self):
        least = {"steps": FEWEST + 1, "population": 2, "report_images": 2, "seed": 0}
        for name, value in asdict(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name.replace('_', '-')}: {value}, must be {least.get(name, 1)} or more")


@dataclass(frozen=True)
class Timing:
    """What a call of a pipeline takes, in seconds.

    Attributes
    ----------
    columns : Latency, of each kind of column
    around : float, of all beside the steps: text encoder, decoder, what happens once
    """

    columns: cost.Latency
    around: float

    def of(self, plan: Plan) -> float:
        """Predict the seconds of a call; a column that was not met takes as long as the least that runs all of it."""
        return self.around + sum(self._column(pattern) for pattern in cost.patterns(plan))

    def _column(self, pattern: str) -> float:
        seconds = self.columns.seconds
        pattern *= len(next(iter(seconds))) // len(pattern)  # a plan of one pass holds for all
        return seconds[pattern] if pattern in seconds else min(
            time for known, time in seconds.items() if all(there >= cell for there, cell in zip(known, pattern)))


@dataclass(frozen=True)
class Price:
    """What a search pays for a plan, in microseconds: at least the budget, for nothing is gained by staying below it.

    Attributes
    ----------
    timing : Timing
    budget : float, seconds of a call
    """

    timing: Timing
    budget: float

    def __call__(self, plan: Plan) -> int:
        """Predict."""
        return round(1e6 * max(self.timing.of(plan), self.budget))


@dataclass(frozen=True)
class Distance:
    """How far a plan's images lie from wanted ones: the root mean squared difference, meaned over images.

    Attributes
    ----------
    requests : Requests
    bank : str, of their noise
    wanted : Tensor, (n, C, H, W), the full run's
    key : str, of all that it hangs on
    """

    requests: Requests
    bank: str
    wanted: Tensor
    key: str

    def __call__(self, plan: Plan) -> float:
        """Sample the plan's images and compare them; infinite where they are not numbers."""
        made = self.requests.images(plan, self.bank, range(len(self.wanted)))
        return float(pairs.root_mean_square(made, self.wanted).mean()) if made.isfinite().all() else math.inf


@dataclass(frozen=True)
class Fitted:
    """What a budget buys.

    Attributes
    ----------
    plan : Plan, the chosen one
    controls : dict of name to Plan: the best of each family, chosen on the same images, of no fewer seconds (searched
        steps may take fewer). Where two families have the same best, one entry: "fewer steps = searched steps".
    distances : dict of name to float, of all that were compared on those images
    """

    plan: Plan
    controls: dict[str, Plan]
    distances: dict[str, float]


class Fitting:
    """A pipeline's full run, what its parts cost, and what a budget buys. All that takes time is kept in a folder.

    Parameters
    ----------
    requests : dict of bank ("search", "select", "report") to Requests, each with prompts of its own
    effort : Effort
    work : Path, of what a killed fit goes on from

    Attributes
    ----------
    full : Plan, the full run: T even steps of DPM-Solver++
    costs : Costs of the network as the pipeline calls it
    guided : bool, whether the pipeline makes a null and a given pass that plans can tell apart
    """

    def __init__(self, requests: Mapping[str, Requests], effort: Effort, work: Path):
        self.requests, self.effort = dict(requests), effort
        pipe = self.requests["search"].pipe
        _, self.network = network_of(pipe)
        parts = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, torch.nn.Module)}
        if any(weight.is_meta for part in parts.values() for weight in part.parameters()):
            raise ValueError("a part of the pipeline is offloaded layer by layer, and a fit looks at weights: offload "
                             "whole networks (enable_model_cpu_offload), or none")
        self.blocks, self.full = blocks.describe(self.network), self.full_of(pipe, effort.steps, self._own_steps())
        self.costs = cost.count_requests(self.requests["search"], self.full)
        drawn, self.guided = self._two_steps()
        asked = [[bank, list(request.said), _fingerprint(request.options), request.batch, request.seed]
                 for bank, request in self.requests.items()]
        weights = {name: _fingerprint(part.state_dict()) for name, part in parts.items()}
        about = [type(pipe).__name__, self.full.key, asdict(effort), asked, weights, str(self.network.dtype),
                 pipe.scheduler.to_json_string(), self.network.device.type, torch.get_num_threads()]
        self.key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self.work = self._folder(work, drawn)

    @staticmethod
    def full_of(pipe: DiffusionPipeline, steps: int, own: Sequence[float] = ()) -> Plan:
        """Give a pipeline's full run: so many steps of DPM-Solver++ of order 2, even ones or its own."""
        _, network = network_of(pipe)
        described, fits = blocks.describe(network), NoiseSchedule.of(pipe.scheduler)
        flow = {"abscissa": "timestep"} if isinstance(fits, FlowSchedule) else {}  # pure noise has no log-SNR
        return Plan.full(own or trailing(steps, fits.train_timesteps), fits, described, 2).replace(**flow)

    def _own_steps(self) -> list[float]:
        """Give the timesteps that a pipeline of flow matching takes by itself; of betas none."""
        asked = self.requests["search"]
        if not isinstance(NoiseSchedule.of(asked.pipe.scheduler), FlowSchedule):
            return []
        asked.plain("search", range(asked.batch), self.effort.steps)
        return list(dict.fromkeys(asked.pipe.scheduler.timesteps.tolist()))  # some call the network twice at each

    def spaced(self, count: int, power: int = 1) -> Plan:
        """Give so many full steps, spaced evenly or (power 2) quadratically; of flow matching along its own way."""
        if isinstance(self.full.schedule, FlowSchedule):
            behind = 1 - (1 - np.arange(count) / count) ** power
            return self.full.at(np.interp(behind, *self.full.way).tolist())
        return Plan.few_steps(count, {1: "uniform", 2: "quadratic"}[power], self.full, self.full.order)

    def _two_steps(self) -> tuple[Tensor, bool]:
        """Give the images of two steps, and whether the pipeline's passes can be told apart."""
        asked, few = self.requests["search"], self.full.at(self.full.timesteps[:2])
        try:
            return asked.images(few.guided(), "search", range(asked.batch)), True
        except PlanError:
            return asked.images(few, "search", range(asked.batch)), False

    def _folder(self, work: Path, drawn: Tensor) -> Path:
        """Give the folder of what was worked out for this pipeline: one that draws the same images in two steps.

        What changes images and is no weight (FreeU, the scale of an adapter) is seen in that alone.
        """
        for number in itertools.count():
            folder = work / f"{self.key}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (seen := folder / "two_steps.safetensors").exists():
                write_tensors(seen, {"images": drawn})
            known = load_file(seen)["images"]
            if pairs.root_mean_square(known.nan_to_num(), drawn.nan_to_num()).max() <= SAME:
                self.key = folder.name
                return folder
            print(f"{folder}: the pipeline draws other images than when that was begun: begun anew")

    # ---- profile --------------------------------------------------------------------------------------------------

    def profile(self) -> Timing:
        """Work out what the searches need, and give what calls take."""
        self.wanted("search", self.effort.search_images)
        self.placed([1])
        return self.timing()

    def wanted(self, bank: str, count: int) -> Tensor:
        """Give the full run's images of a bank's first numbers, (count, C, H, W)."""
        path = self.work / f"{bank}.safetensors"
        if not path.exists():
            made = self.requests[bank].images(self.full, bank, range(count), title=f"full run, {bank}")
            if not made.isfinite().all():
                raise ValueError("the full run's images are not numbers: give the weights in fp32 or bf16")
            write_tensors(path, {"images": made})
        return load_file(path)["images"]

    def placed(self, counts: Sequence[int]) -> dict[int, Plan]:
        """Place few steps along the full run's own way, by the shortest path (`lib.methods.learned.along`)."""
        path = self.work / "prices.safetensors"
        if not path.exists():
            told: dict[int, list[Tensor]] = {}
            asked = self.requests["search"]
            asked.images(self.full, "search", range(PATHS), lambda step, *seen: told.setdefault(step, []).append(
                torch.stack([part.cpu() for part in seen])))
            way, outputs = torch.stack([torch.cat(told[step], dim=1) for step in sorted(told)]).unbind(1)
            table, state = solvers.of(self.full), ()
            for step, (x_t, output) in enumerate(zip(way, outputs)):
                x_0, state = solvers.advance(table, step, x_t, output, state)
            write_tensors(path, {"prices": torch.from_numpy(learned.prices(self.full, [*way, x_0], list(outputs)))})
        return learned.along(self.full, counts, 2, load_file(path)["prices"].numpy())

    def timing(self) -> Timing:
        """Time all kinds of columns that a search may meet, in runs of a few plans in turn."""
        path = self.work / "timing.json"
        if not path.exists():
            write_json(path, asdict(self._time(self._columns())))
        known = json.loads(path.read_text())
        return Timing(cost.Latency(**known["columns"]), known["around"])

    def _columns(self) -> list[Plan]:
        """Give few plans that hold all the columns of plans that are drawn at random."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        draw = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.effort.seed))
        space = self.space(range(3, 8))
        plans = [space.decode(draw.ask(dict(space.distributions())).params) for _ in range(DRAWN)]
        held = [cost.patterns(plan) for plan in plans]
        missing, behind = {pattern for all_of in held for pattern in all_of}, [set(all_of[1:]) for all_of in held]
        few = self.spaced(6)
        chosen = [few.guided()] if self.guided else [few]
        missing -= set(cost.patterns(chosen[0]))
        while missing:
            best = max(range(len(plans)), key=lambda number: len(missing & behind[number]))
            if not missing & behind[best]:
                break  # what is met in first columns alone, of which nobody can say what belongs to the call
            chosen.append(plans[best])
            missing -= behind[best]
        return chosen

    def _time(self, plans: Sequence[Plan]) -> Timing:
        asked = self.requests["search"]
        seconds: dict[str, list[float]] = {}
        whole: list[list[float]] = [[] for _ in plans]
        for turn in tqdm(range(self.effort.rounds + 1), desc="timing columns", unit="round"):
            for number, plan in enumerate(plans):
                ends: list[float] = []
                begun = cost.now()
                asked.images(plan, "search", range(asked.batch), lambda *_, ends=ends: ends.append(cost.now()))
                took = cost.now() - begun
                if turn:
                    whole[number].append(took)
                    for pattern, before, end in zip(cost.patterns(plan)[1:], ends, ends[1:]):
                        seconds.setdefault(pattern, []).append(end - before)
        columns = cost.Latency({pattern: float(np.median(times)) for pattern, times in seconds.items()}, asked.batch,
                               str(self.network.dtype))
        bare = Timing(columns, 0.0)
        around = np.median([float(np.median(times)) - bare.of(plan) for times, plan in zip(whole, plans)])
        return Timing(columns, max(float(around), 0.0))

    # ---- search ---------------------------------------------------------------------------------------------------

    def space(self, counts: Sequence[int]) -> Space:
        """Give the space of all there is: steps, branches, what is reused, and the null pass where there is one."""
        branches = tuple(range(min(BRANCHES, self.blocks.branches)))
        free = FreeSpace(self.full, self.blocks, tuple(counts), branches, PARTIALS, reuses=(HOLD, LINE, PARABOLA))
        return GuidedSpace(free, reuses=(HOLD, LINE)) if self.guided else free

    def fit(self, seconds: float, storage: Path | str) -> Fitted:
        """Find what a call of so many seconds may do best: search, and choose on fresh noise and prompts.

        Parameters
        ----------
        storage : as `lib.methods.search.search` takes it
        """
        steps, everything = self.search(seconds, storage)
        return self._choose(seconds, steps, everything)

    def _reach(self, seconds: float) -> tuple[int, int]:
        """Give how many full steps a call of so many seconds may make, and how many are not less than that.

        Raises
        ------
        ValueError
            If they are less than `FEWEST`.
        """
        timing = self.timing()
        times = [timing.of(self.full.at(self.full.timesteps[:count])) for count in range(1, self.full.steps + 1)]
        most = sum(time <= seconds for time in times)
        if most < FEWEST:
            raise ValueError(f"budget: {seconds:.3g} s a call buy {most} full steps, {FEWEST} are the least: the full "
                             f"run takes {times[-1]:.3g} s, of which {timing.around:.3g} s are not steps. Ask for "
                             f"{times[FEWEST - 1]:.3g} s or more.")
        enough = min(sum(time < ALMOST * seconds for time in times) + 1, self.full.steps)
        return most, max(most, enough)

    def search(self, seconds: float, storage: Path | str) -> tuple[list[Found], list[Found]]:
        """Search full steps alone, then all there is. Several processes may share a storage.

        Raises
        ------
        ValueError
            If the budget buys less than `FEWEST` full steps.
        """
        timing, (most, reach) = self.timing(), self._reach(seconds)
        asked = self.requests["search"]
        distance = Distance(asked, "search", self.wanted("search", self.effort.search_images), self.key)
        counts = tuple(range(max(FEWEST, most // SPAN), reach + 1))

        def found(space: Space, seconds: float, trials: int, start: list[dict], title: str) -> list[Found]:
            return search(space, distance, Price(timing, seconds), trials=trials, population=self.effort.population,
                          seed=self.effort.seed, storage=storage, budget=round(1e6 * seconds), start=start, title=title)

        few = FreeSpace(self.full, self.blocks, counts, (0,), 0)
        starts = [few.encode(reach, 1), *(few.encode_steps(plan.timesteps, 2) for count in {most, reach}
                                          for plan in self._few_steps(count))]
        longest = max(timing.of(few.decode(genome)) for genome in starts)
        steps = found(few, longest, self.effort.trials // 2, starts, "steps")

        longer = range(reach + 1, min(int(ALONE * most), self.full.steps) + 1) if self.guided else ()
        space = self.space((*counts, *longer))
        affordable = [candidate for candidate in steps if timing.of(candidate.plan) <= seconds]
        lifted = [self._lifted(space, few, candidate.genome) for candidate in _best(affordable)]
        known = self._known(space, timing, seconds)
        everything = found(space, seconds, self.effort.trials - self.effort.trials // 2, [*lifted, *known],
                           "steps, cells and passes" if self.guided else "steps and cells")
        return steps, everything

    def _known(self, space: Space, timing: Timing, seconds: float) -> list[dict]:
        """Give the genomes of known schedules: of each kind the one of the most steps that the budget allows.

        DeepCache, held and forecast, with one partial step and with two; where the network is guided, each of these and
        full steps alone, guided throughout, in the middle, and at every second step.
        """
        free = space.inner if self.guided else space
        kinds = [[free.encode(count, 2, partials, 0, reuse) for count in reversed(free.counts)]
                 for partials in range(1, PARTIALS + 1) for reuse in free.reuses]
        kinds += [[free.encode(count, 2, 1, branch, LINE) for count in reversed(free.counts)]
                  for branch in free.branches[1:]]
        if self.guided:
            shorter = [free.encode(count, 2) for count in reversed(free.counts)]
            kinds = [[space.encode(genome, **way) for genome in kind] for kind in (*kinds, shorter)
                     for way in space.ways]
        found = [next((genome for genome in kind if timing.of(space.decode(genome)) <= seconds), None)
                 for kind in kinds]
        return [genome for genome in found if genome is not None]

    def _few_steps(self, count: int) -> list[Plan]:
        """Give what everybody knows of so many full steps: spaced evenly, quadratically, by the shortest path."""
        return [self.spaced(count), self.spaced(count, 2), self.placed([count])[count]]

    def _lifted(self, space: Space, few: FreeSpace, genome: Mapping) -> dict:
        """Give the genome of full steps alone in the space of all there is."""
        free = space.inner if self.guided else space
        own = free.encode(few.counts[genome["segments"]], genome["order"], reuse=HOLD)
        own |= {gene: value for gene, value in genome.items() if gene != "segments"}
        return space.encode(own) if self.guided else own

    def _choose(self, seconds: float, steps: Sequence[Found], everything: Sequence[Found]) -> Fitted:
        """Compare the best of each kind on fresh noise and prompts; of controls searched steps alone may take less."""
        timing, (most, reach) = self.timing(), self._reach(seconds)
        families = {"fewer steps": self._few_steps(reach),
                    "searched steps": [candidate.plan for candidate in _best(steps)],
                    "DeepCache": self._deepcache(seconds)}
        within = [*self._few_steps(most), *(candidate.plan for candidate in _best(everything)),
                  *(plan for family in families.values() for plan in family)]
        families["fitted"] = [plan for plan in within if timing.of(plan) <= seconds]
        wanted = self.wanted("select", self.effort.select_images)
        distance = Distance(self.requests["select"], "select", wanted, self.key)
        path = self.work / "choice.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        plans = {plan.key: plan for family in families.values() for plan in family}
        for key, plan in tqdm(plans.items(), desc="choosing on fresh noise", unit="plan"):
            if key not in known:
                known[key] = distance(plan)
                write_json(path, known, allow_nan=True)  # a plan may be infinitely far
        chosen = {name: min(family, key=lambda plan: known[plan.key]) for name, family in families.items() if family}
        fitted, controls = chosen.pop("fitted"), {}
        for name, plan in chosen.items():
            controls.setdefault(plan.key, []).append(name)
        return Fitted(fitted, {" = ".join(names): plans[key] for key, names in controls.items()}, known)

    def _deepcache(self, seconds: float) -> list[Plan]:
        """Give DeepCache's plans of the fewest steps that take no less time, a plan an interval."""
        timing, found = self.timing(), []
        for interval in INTERVALS:
            plans = (Plan.deepcache(interval, self.blocks.branch(0), self.spaced(count))
                     for count in range(interval + 1, self.full.steps + 1))
            found += list(islice((plan for plan in plans if timing.of(plan) >= ALMOST * seconds), 1))
        return found


def _best(found: Sequence[Found]) -> list[Found]:
    return sorted(found, key=lambda candidate: candidate.error)[:FINALISTS]


def _fingerprint(values: Mapping[str, Any]) -> str:
    """Give a hash of options or weights; of a tensor, its sum and the sum of its squares: no copy of large weights."""
    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            numbers = value.detach().float()
            return [list(value.shape), float(numbers.sum()), float(numbers.square().sum())]
        if isinstance(value, list | tuple):
            return [told(part) for part in value]
        if isinstance(value, np.ndarray | Image.Image):
            return hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
        return value if isinstance(value, str | int | float | bool | None) else repr(value)

    return hashlib.sha256(json.dumps({name: told(value) for name, value in values.items()}).encode()).hexdigest()
