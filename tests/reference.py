"""The slow reference: the stock network computes everything, and a hook puts in a block's place what a cell stands for.

It knows nothing of liveness, batches of passes, or what may be skipped; what the engine gives must be the same.
"""

import numpy as np
import torch

from lib.grid import blocks, solvers
from lib.grid.plan import GIVEN


def combined(at, known):
    """The value at `at` of the polynomial through (place, value) pairs, by solving for its weights."""
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

        def replace(module, inputs, output):
            now = output[0] if isinstance(output, tuple) else output
            base = inputs[0] if residual else torch.zeros(())
            if self.states[step][place] == 1:
                self.computed.setdefault(place, []).append((self.places[step], now - base))
                return None
            now = self.stands_for(place, self.states[step][place], step) + base
            return (now,) if isinstance(output, tuple) else now

        return replace

    def output(self, x_t, step, given, conditions):
        """The pass's output at a step; `given` is the given pass's, None while that is made."""
        if self.net[step] == -1:
            return given
        handles = [self.model.get_submodule(block.modules[-1]).register_forward_hook(self.hook(place, step))
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
