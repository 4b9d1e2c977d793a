"""What the scores' intervals cover: simulations with a known truth, in the features of a trained extractor."""

from itertools import combinations

import numpy as np
import pytest
from simulation import MOVES, covered, simulate

from lib.judging import extractor
from lib.judging.estimates import Contrast
from lib.teachers import data

RUNS = 150
CHANCE = 2 * np.sqrt(0.95 * 0.05 / RUNS)  # what a share of so many simulations may be off by


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Features of the digits by the classifier that study `digits` trains."""
    digits = data.load("digits", 16, 0.25, 0)
    made = extractor.fit(digits, "classes", steps=600, seed=0, device="cpu", precision="fp32",
                         work=tmp_path_factory.mktemp("extractor"))
    found = extractor.embed(made, digits.images).double()
    return found - found.mean(dim=0)


def said(true, estimates):
    """Say how often there was such an interval, and how often it held the truth."""
    held = f", covering the truth in {covered(true, estimates):.1%}" if estimates else ""
    return f"in {len(estimates) / RUNS:.0%}{held}"


@pytest.mark.parametrize("n", [700, 3000])
def test_coverage(features, n):
    true, scores = simulate(features, list(MOVES), n, RUNS)
    print(f"\nn = {n}, {RUNS} simulations, 95 % intervals")
    for name, found in scores.items():
        estimates = [one.estimate for one in found]
        raw, score = np.mean([one.raw for one in found]), np.mean([one.value for one in estimates])
        print(f"  {name:15s} true {true[name]:6.3f}, raw {raw:6.3f}, score {score:6.3f}; covers the truth in "
              f"{covered(true[name], estimates):.1%}, holds 0 in {covered(0, estimates):.1%}")
        assert covered(true[name], estimates) >= 0.93 - CHANCE
    for one, other in combinations([name for name in MOVES if name != "perfect"], 2):
        found = [Contrast.of([(a, 1.0)], [(b, 1.0)], n) for a, b in zip(scores[one], scores[other])]
        ratios = [c.ratio for c in found if not np.isnan(c.ratio.value)]
        differences = [c.difference for c in found if np.isnan(c.ratio.value)]
        ratio = true[one] / true[other]
        print(f"  {one} over {other}: true {ratio:.3f}; a ratio {said(ratio, ratios)}; a difference "
              f"{said(true[one] - true[other], differences)}")
        if len(ratios) > RUNS / 2:
            assert covered(ratio, ratios) >= 0.9 - CHANCE
