"""Generators whose true distance is known: real features, drawn again and again and moved a known way."""

import numpy as np
import torch

from lib.judging.evaluate import Judge, distance

NOISE = 0.7  # standard deviation that "noisy" adds to each feature

MOVES = {"perfect": lambda x, noise: x, "moved a little": lambda x, noise: x + 0.12, "moved": lambda x, noise: x + 0.35,
         "narrowed": lambda x, noise: 0.75 * x, "noisy": lambda x, noise: x + NOISE * noise}
"""What a generator does to features of mean 0 and variance 1."""


def true_distance(name: str, judge: Judge) -> float:
    """Give the distance of a generator's whole distribution, not of a sample."""
    real = judge.real
    moved = MOVES[name](real, torch.zeros_like(real)).numpy()
    sigma = np.cov(moved.T, bias=True) + NOISE**2 * np.eye(real.shape[1]) * (name == "noisy")
    return distance({"mu": moved.mean(axis=0), "sigma": sigma}, judge.statistics)


def simulate(real, names, n, runs, seed=0):
    """Draw n images, `runs` times; every generator moves the same ones.

    Returns
    -------
    true : dict of name to distance
    scores : dict of name to list of Score
    """
    judge, generator = Judge(real, "it"), torch.Generator().manual_seed(seed)
    scores = {name: [] for name in names}
    for _ in range(runs):
        rows = real[torch.randint(len(real), (n,), generator=generator)]
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        for name in names:
            scores[name].append(judge.score(MOVES[name](rows, noise)))
    return {name: true_distance(name, judge) for name in names}, scores


def covered(true, estimates):
    """Give the share of intervals that hold the truth."""
    return float(np.mean([one.low <= true <= one.high for one in estimates]))
