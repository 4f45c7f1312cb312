"""Laws of paired intervals."""

import numpy as np
import pytest

from dem_opt.intervals import difference
from dem_opt.records import Score

WEIGHTS = {"a": 1.0, "b": 1.0}


def scores(seed: int, shift: float, noise: float, windows: int = 32) -> dict[str, Score]:
    rng = np.random.default_rng(seed)
    made = {}
    for index, name in enumerate(WEIGHTS):
        level_W = 3.0 + np.random.default_rng(index).normal(size=windows)
        nll_W = level_W + shift + noise * rng.normal(size=windows)
        made[name] = Score(tuple((nll_W * 100).tolist()), (100,) * windows)
    return made


def test_a_constant_shift_has_no_width():
    # Every window is worse by 0.5 nats per token, so every resample is.
    gap = difference(scores(0, 0.5, 0.0), scores(0, 0.0, 0.0), WEIGHTS)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))


def test_turning_the_pair_round_turns_the_interval_round():
    left, right = scores(1, 0.1, 0.3), scores(2, 0.0, 0.3)
    there, back = difference(left, right, WEIGHTS), difference(right, left, WEIGHTS)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 95% by construction; the percentile bootstrap of 64 windows is a little narrow, so between 88% and 99%.
    covered = 0
    for seed in range(120):
        gap = difference(scores(2 * seed, 0.2, 0.5), scores(2 * seed + 1, 0.0, 0.5), WEIGHTS)
        covered += gap.low <= 0.2 <= gap.high
    assert 0.88 <= covered / 120 <= 0.99


def test_distributions_of_weight_zero_are_not_looked_at():
    left, right = scores(1, 0.1, 0.3), scores(2, 0.0, 0.3)
    alone = difference({"a": left["a"]}, {"a": right["a"]}, {"a": 1.0})
    assert difference(left, right, {"a": 1.0, "b": 0.0}) == alone
