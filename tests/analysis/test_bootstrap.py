"""Laws of paired intervals."""

import numpy as np
import pytest

from dem_opt.analysis.bootstrap import difference
from dem_opt.evaluation.objective import Objective
from dem_opt.types import Score

MEAN = Objective({"a": 1.0, "b": 1.0})


def scores(seed: int, shift: float, noise: float, windows: int = 32) -> dict[str, Score]:
    rng = np.random.default_rng(seed)
    made = {}
    for index, name in enumerate(MEAN.weights):
        level_W = 3.0 + np.random.default_rng(index).normal(size=windows)
        nll_W = level_W + shift + noise * rng.normal(size=windows)
        made[name] = Score(tuple((nll_W * 100).tolist()), (100,) * windows)
    return made


def test_a_constant_shift_has_no_width():
    # Every window is worse by 0.5 nats per token, so every resample is.
    gap = difference(scores(0, 0.5, 0.0), scores(0, 0.0, 0.0), MEAN)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))


def test_turning_the_pair_round_turns_the_interval_round():
    left, right = scores(1, 0.1, 0.3), scores(2, 0.0, 0.3)
    there, back = difference(left, right, MEAN), difference(right, left, MEAN)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 95% by construction; the percentile bootstrap of 64 windows is a little narrow, so between 88% and 99%.
    covered = 0
    for seed in range(120):
        gap = difference(scores(2 * seed, 0.2, 0.5), scores(2 * seed + 1, 0.0, 0.5), MEAN)
        covered += gap.low <= 0.2 <= gap.high
    assert 0.88 <= covered / 120 <= 0.99


def test_distributions_of_weight_zero_are_not_looked_at():
    left, right = scores(1, 0.1, 0.3), scores(2, 0.0, 0.3)
    alone = difference({"a": left["a"]}, {"a": right["a"]}, Objective({"a": 1.0}))
    assert difference(left, right, Objective({"a": 1.0, "b": 0.0})) == alone


def test_the_largest_regret_has_an_interval_of_its_own():
    """Own fine-tunes at level 0: "a" is 0.5 worse than its own, "b" 0.1, without noise; the largest regret is 0.5."""
    own, left = scores(0, 0.0, 0.0), scores(0, 0.1, 0.0)
    left["a"] = scores(0, 0.5, 0.0)["a"]
    worst = Objective({"a": 1.0, "b": 3.0}, own)
    gap = difference(left, own, worst)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))
    noisy = difference(scores(1, 0.3, 0.3), own, worst)
    assert noisy.low < noisy.mean < noisy.high
