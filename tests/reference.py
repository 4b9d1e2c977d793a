"""The slow reference: the stock network computes everything, and a hook puts in a block's place what a cell stands for.

It knows nothing of liveness, batches of passes, or what may be skipped; what the engine gives must be the same.
"""

import inspect

import numpy as np
import torch

from lib.grid import blocks, solvers
from lib.grid.plan import GIVEN


def combined(at, known):
    """The value at `at` of the polynomial through (place, value) pairs, by solving for its weights."""
    if len(known) == 1:
        return 1.0 * known[0][1]
    places = np.array([place for place, _ in known]) - at
    scale = np.abs(places).max() or 1.0
    weights = np.linalg.solve(np.vander(places / scale).T, np.vander([0.0], len(known))[0])
    return sum(float(weight) * value for weight, (_, value) in zip(weights, known))


class Sheet:
    """One pass: what its blocks and its whole output computed at each step."""

    def __init__(self, model, plan, name):
        number = 0 if len(plan.passes) == 1 else plan.passes.index(name)
        self.model, self.plan, self.states, self.net = model, plan, plan.states[number], plan.net[number]
        self.described = blocks.describe(model)
        self.places = solvers.abscissae(plan.timesteps, plan.schedule, plan.abscissa).tolist()
        self.computed = {}

    def stands_for(self, key, state, step):
        history = self.computed[key][::-1]
        return combined(self.places[step], history[:max(1, state)])

    def hook(self, place, step):
        residual = self.described.cache == "residual"

        def replace(module, args, kwargs, output):
            parts = output if isinstance(output, tuple) else (output,)
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            names = self.described.blocks[place].changes or ("output",)
            made = []
            for name, now in zip(names, parts):
                base = given[name] if residual and now is not None else torch.zeros(())
                if now is not None and self.states[step][place] == 1:
                    self.computed.setdefault((place, name), []).append((self.places[step], now - base))
                elif now is not None:
                    now = self.stands_for((place, name), self.states[step][place], step) + base
                made.append(now)
            return tuple(made) + parts[len(made):] if isinstance(output, tuple) else made[0]

        return replace

    def output(self, x_t, step, given, conditions):
        """The pass's output at a step; `given` is the given pass's, None while that is made."""
        if self.net[step] == -1:
            return given
        handles = [self.model.get_submodule(block.modules[-1]).register_forward_hook(self.hook(place, step),
                                                                                     with_kwargs=True)
                   for place, block in enumerate(self.described)]
        try:
            t = torch.tensor(self.plan.timesteps[step]).expand(len(x_t))
            now = self.model(x_t, timestep=t, **conditions).sample
        finally:
            for handle in handles:
                handle.remove()
        apart = len(self.plan.passes) > 1 and self.plan.null_holds == "difference" and given is not None
        base = given if apart else torch.zeros(())
        if self.net[step] == 1:
            self.computed.setdefault("net", []).append((self.places[step], now - base))
            return now
        return self.stands_for("net", self.net[step], step) + base


@torch.inference_mode()
def sample(model, plan, noise, conditions=None):
    """Images of a plan, guided where conditions are."""
    x_t, table, state = noise, solvers.of(plan), ()
    sheets = {}
    for step in range(plan.steps):
        def output(name, given, rows, x_t=x_t, step=step):
            if name not in sheets:
                sheets[name] = Sheet(model, plan, name)
            return sheets[name].output(x_t, step, given, rows)

        along = output(GIVEN, None, conditions.given if conditions else {})
        if conditions and conditions.null is not None:
            without = output("null", along, conditions.null)
            along = without + conditions.scale * (along - without)
        x_t, state = solvers.advance(table, step, x_t, along[:, :x_t.shape[1]], state)
    return x_t


class Watched:
    """The slow reference on anybody's pipeline, whatever its sampler: a plan of one pass on a stock network, by hooks.

    The timestep of a call says which column it is. Where a run begins, and where a batch of another shape comes,
    everything is computed; a step's second call is another pass. ``outputs`` holds what the pipeline was given at each
    call.
    """

    def __init__(self, model, plan):
        self.model, self.plan, self.outputs, self.step, self.shape = model, plan, [], None, None
        self.described = blocks.describe(model)

    def __enter__(self):
        self.handles = [self.model.register_forward_pre_hook(self.arrive, with_kwargs=True),
                        self.model.register_forward_hook(self.leave)]
        for place, block in enumerate(self.described):
            module = self.model.get_submodule(block.modules[-1])
            self.handles.append(module.register_forward_hook(lambda *a, place=place: self.hook(place)(*a),
                                                             with_kwargs=True))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def arrive(self, module, args, kwargs):
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        t, shape = float(torch.as_tensor(arguments["timestep"]).flatten()[0]), next(iter(arguments.values())).shape
        if type(module).__name__ in blocks.SHARES:
            t *= 1000
        elif type(module).__name__ in blocks.REMAINDERS:
            t = (1 - t) * 1000
        step = int(np.argmin([abs(t - own) for own in self.plan.timesteps]))
        if self.step is None or step < self.step or shape != self.shape:
            self.sheets, self.begun = [], step
        self.call = self.call + 1 if step == self.step and self.sheets else 0  # a step's second call: another pass
        if self.call == len(self.sheets):
            assert step == self.begun, "a pass that comes later than the run's first step"
            self.sheets.append(Sheet(self.model, self.plan.replace(
                states=((*self.plan.states[0][:step], (1,) * len(self.described), *self.plan.states[0][step + 1:]),),
                net=((*self.plan.net[0][:step], 1, *self.plan.net[0][step + 1:]),)), GIVEN))
        self.step, self.shape, self.sheet = step, shape, self.sheets[self.call]

    def hook(self, place):
        return self.sheet.hook(place, self.step)

    def leave(self, module, inputs, output):
        now = output[0]
        if self.sheet.net[self.step] == 1:
            self.sheet.computed.setdefault("net", []).append((self.sheet.places[self.step], now.clone()))
        else:
            now = self.sheet.stands_for("net", self.sheet.net[self.step], self.step)
        self.outputs.append(now.clone())
        return (now,) if isinstance(output, tuple) else type(output)(sample=now)
