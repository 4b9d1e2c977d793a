"""Choosing an architecture: level by level, by an exact knapsack over sums, at random, or not at all (thin)."""

from bisect import bisect_left
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from lib.grid import cost
from lib.grid.model import Model
from lib.methods.diffnas.levels import form_macs, resolutions
from lib.methods.diffnas.students import Architecture, Form, FormSpace, UNet, residuals
from lib.methods.diffnas.supernets import draw


def local_search(tables: Mapping[str, pd.DataFrame], own: Architecture, tolerance: float, price: str = "macs"
                 ) -> dict[str, Form]:
    """Take in each level, for itself, the cheapest architecture at most `tolerance` times as bad as the reference.

    The reference is the teacher's own architecture with the supernet's weights; `price` is a column of the tables.
    """
    chosen: dict[str, Form] = {}
    for table in tables.values():
        near = table[table["loss"] <= tolerance * pick(table, own)["loss"]]
        chosen |= near.sort_values([price, "loss"])["forms"].iloc[0]
    return chosen


def pick(table: pd.DataFrame, architecture: Architecture) -> pd.Series:
    """Give the row of a level's table that an architecture takes."""
    return table[[all(architecture[path] == form for path, form in forms.items()) for forms in table["forms"]]].iloc[0]


def smallest_tolerance(tables: Mapping[str, pd.DataFrame], own: Architecture,
                       fits: Callable[[Architecture], bool], price: str = "macs") -> float:
    """Give the least tolerance, at least 1, at which `local_search` by a price finds an architecture that fits.

    With a larger tolerance it has a lower price; `fits` should follow that.

    Raises
    ------
    ValueError
        If even the cheapest of all architectures does not fit.
    """
    steps = np.concatenate([table["loss"] / pick(table, own)["loss"] for table in tables.values()])
    steps = np.unique(np.maximum(1.0, steps)) * (1 + 1e-9)  # so that rounding leaves nobody out
    place = bisect_left(steps, True, key=lambda tolerance: fits(local_search(tables, own, tolerance, price)))
    if place == len(steps):
        raise ValueError("not even the cheapest architecture is so small: raise the budget, or widen the space")
    return float(steps[place])


def global_search(tables: Mapping[str, pd.DataFrame], budget: int, by: str) -> dict[str, Form]:
    """Take one architecture a level so that the summed losses are least within a budget: an exact knapsack.

    Parameters
    ----------
    budget : int, MACs of all searched parts
    by : "loss" (relative) or "raw" (whose sum levels of large features rule)

    Raises
    ------
    ValueError
        If nothing costs so little.
    """
    sizes = [len(table) for table in tables.values()]
    losses = np.concatenate([table[by] for table in tables.values()])
    macs = np.concatenate([table["macs"] for table in tables.values()])
    one_each = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(macs / budget, -np.inf, 1)]
    solved = milp(losses / losses.max(), constraints=constraints, integrality=np.ones(len(losses)), bounds=Bounds(0, 1))
    if solved.x is None:
        raise ValueError(f"no architecture costs at most {budget} MACs in its searched parts: raise the budget")
    chosen: dict[str, Form] = {}
    for table, picked in zip(tables.values(), np.split(solved.x > 0.5, np.cumsum(sizes)[:-1])):
        chosen |= table["forms"][picked].iloc[0]
    return chosen


def random_search(model: UNet, space: FormSpace, budget: int, generator: torch.Generator) -> dict[str, Form]:
    """Draw an architecture, then redraw one block after another, where that is cheaper, until the budget is kept.

    Parameters
    ----------
    budget : int, MACs of all searched parts

    Raises
    ------
    ValueError
        If nothing costs so little.
    """
    found, at = residuals(model), resolutions(model)
    prices = {path: {form: form_macs(block, form, at[path]) for form in space.of(block)}
              for path, block in found.items()}
    least = sum(min(forms.values()) for forms in prices.values())
    if least > budget:
        raise ValueError(f"the searched parts cost at least {least} MACs: raise the budget of {budget}")
    chosen, places = draw(model, space, generator), list(found)
    while sum(prices[path][form] for path, form in chosen.items()) > budget:
        path = places[int(torch.randint(len(places), (1,), generator=generator))]
        other = list(prices[path])[int(torch.randint(len(prices[path]), (1,), generator=generator))]
        if prices[path][other] < prices[path][chosen[path]]:
            chosen[path] = other
    return chosen


def thin(teacher: Model, least: int) -> UNet:
    """Build the thinnest UNet of at least so many MACs a call whose widths are the teacher's, scaled alike.

    Widths are multiples of the norm's groups, and at least two channels a group and 0.3 of the teacher's. Weights are
    fresh.

    Raises
    ------
    ValueError
        If the teacher itself is smaller.
    """
    def built(scale: float) -> UNet:
        widths = [groups * max(2, round(scale * width / groups)) for width in own.config.block_out_channels]
        return type(own).from_config(own.config, block_out_channels=tuple(widths))

    own, asked = teacher.network, teacher.asked(torch.zeros(1, *teacher.shape))
    groups, scales = own.config.norm_num_groups, np.arange(0.3, 1.01, 0.01)
    place = bisect_left(scales, least, key=lambda scale: cost.count(built(scale), asked).call)
    if place == len(scales):
        raise ValueError(f"the teacher has fewer than {least} MACs a call")
    return built(scales[place])
