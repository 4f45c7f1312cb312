"""Laws of races: what was seen says what it says, a winner is hardly ever stopped, and a loser soon is."""

from math import inf, sqrt

import numpy as np
import pytest
from scipy.stats import t as student

from dem_opt.evaluation.interim_analyses import (
    INTERIM_ANALYSES,
    analysis_count,
    first_windows,
    replay,
    scores_at,
    windows_at,
    windows_by_analysis,
)
from dem_opt.evaluation.racing import CLEAR, ERROR, MARGIN, Race
from dem_opt.types import Score


@pytest.mark.parametrize("windows", range(1, 70))
def test_stops_ascend_to_the_end_by_blocks_that_are_at_most_the_first(windows):
    stops = (0, *windows_by_analysis(windows))
    blocks = np.diff(stops)
    assert stops[-1] == windows and len(blocks) == min(windows, INTERIM_ANALYSES)
    assert blocks.min() > 0 and blocks.max() == blocks[0] <= blocks.min() + 1


def test_stops_of_known_sizes():
    assert windows_by_analysis(64) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert windows_by_analysis(12) == (2, 3, 5, 6, 8, 9, 11, 12)
    assert windows_by_analysis(3) == (1, 2, 3)


def score(nats, tokens=None):
    return Score(tuple(map(float, nats)), tuple(map(int, [10] * len(nats) if tokens is None else tokens)))


WINDOWS = {"a": 16, "b": 3}


def test_a_look_sees_the_same_share_of_every_corpus_until_it_is_through():
    assert analysis_count(WINDOWS) == INTERIM_ANALYSES
    assert [windows_at(WINDOWS, number) for number in (1, 3, 8)] == [
        {"a": 2, "b": 1},
        {"a": 6, "b": 3},
        {"a": 16, "b": 3},
    ]
    whole = {"a": score(range(16)), "b": score(range(3))}
    assert scores_at(whole, WINDOWS, 3) == {"a": first_windows(whole["a"], 6), "b": whole["b"]}
    assert scores_at(whole | {"c": score([1])}, WINDOWS, 8) == whole
    for short in ({"a": whole["a"]}, whole | {"a": first_windows(whole["a"], 5)}):
        assert scores_at(short, WINDOWS, 3) is None


class LostAt:
    """A rule that stops at the first look that has seen so many windows."""

    def __init__(self, windows):
        self.windows, self.looks = windows, []

    def is_over(self, scores):
        self.looks.append(len(scores["a"].nats_W))
        return self.looks[-1] >= self.windows


@pytest.mark.parametrize("known", [2, 3, 6, 7, 16])
@pytest.mark.parametrize("lost", [1, 2, 6, 14, 16, 99])
def test_a_replay_tells_what_a_race_would_if_enough_is_known(known, lost):
    whole = {"a": score(range(16)), "b": score(range(3))}
    rule = LostAt(lost)
    end = next((stop for stop in windows_by_analysis(16)[:-1] if stop >= lost), 16)
    scores = replay(rule, whole | {"a": first_windows(whole["a"], known)}, WINDOWS)
    if known < end:
        assert scores is None
    else:
        assert scores == {"a": first_windows(whole["a"], end), "b": first_windows(whole["b"], min(end // 2, 3))}
    assert 16 not in rule.looks, "at the end there is nothing to stop"
    assert (replay(None, whole, WINDOWS), replay(None, {}, WINDOWS)) == (whole, None)


def test_an_estimate_of_two_corpora_by_hand():
    """Corpus a: 3 of 4 windows, differences 10, 30, 20 of 10, 20, 20 tokens.  d = 60/50 = 1.2; the rest r = x - y - d t
    is -2, 6, -4, squares 4 + 36 + 16 = 56; variance (1 - 3/4) 56/2 * 3/2500 = 0.0084, 2 degrees of freedom.
    Corpus b: 2 of 6 windows, differences -1, 3 of 10, 10 tokens.  d = 0.1; r = -2, 2; variance (1 - 1/3) 8/1 * 2/400
    = 8/300, 1 degree of freedom.  With weights 3 : 1, d = 0.75 * 1.2 + 0.25 * 0.1 = 0.925, variance 0.5625 * 0.0084 +
    0.0625 * 8/300 = 0.004725 + 1/600; freedom = that squared / (0.004725^2 / 2 + 1/600^2 / 1)."""
    rival = {"a": score([5, 5, 5, 5], [10, 20, 20, 20]), "b": score([1] * 6)}
    trial = {"a": score([15, 35, 25], [10, 20, 20]), "b": score([0, 4])}
    estimate = Race.against(rival, {"a": 3.0, "b": 1.0}).estimate(trial)
    variance = 0.004725 + 1 / 600
    assert estimate.difference == pytest.approx(0.925)
    assert estimate.error == pytest.approx(sqrt(variance))
    assert estimate.freedom == pytest.approx(variance**2 / (0.004725**2 / 2 + 1 / 600**2))


def made(seed=0, windows=24, gain=0.0, noise=0.05, tokens=100):
    """A rival, and a trial that is better by `gain` nats per token on the whole, exactly."""
    rng = np.random.default_rng(seed)
    rival_W = tokens * (3 + 0.5 * rng.standard_normal(windows))
    apart_W = tokens * noise * rng.standard_normal(windows)
    trial_W = rival_W + apart_W - apart_W.mean() - tokens * gain
    return score(rival_W, [tokens] * windows), score(trial_W, [tokens] * windows)


def test_of_all_windows_the_estimate_is_the_difference_without_an_error():
    rival, trial = made(gain=0.3, windows=13)
    estimate = Race.against({"a": rival}, {"a": 2.0}).estimate({"a": trial})
    assert estimate.difference == pytest.approx(trial.nll - rival.nll) and estimate.error == 0


def test_one_window_never_stops_a_trial():
    rival, trial = made(gain=-5)
    race = Race.against({"a": rival, "b": rival}, {"a": 1.0, "b": 1.0})
    assert race.estimate({"a": first_windows(trial, 1), "b": trial}).error == inf
    assert not race.is_over({"a": first_windows(trial, 1), "b": trial})


def test_a_better_trial_is_not_stopped_and_a_twin_is():
    rival, trial = made(gain=0.05)
    race = Race.against({"a": rival}, {"a": 1.0})
    assert not any(race.is_over({"a": first_windows(trial, stop)}) for stop in windows_by_analysis(24))
    assert race.is_over({"a": first_windows(rival, 3)}), "a twin does not win"


@pytest.mark.parametrize(("gain", "lost"), [(0.5 * MARGIN, True), (2 * MARGIN, False)])
def test_a_gain_below_the_margin_is_no_win(gain, lost):
    rival, trial = made(gain=gain, noise=1e-6)
    assert Race.against({"a": rival}, {"a": 1.0}).is_over({"a": first_windows(trial, 3)}) == lost


@pytest.mark.parametrize("stop", windows_by_analysis(24)[:-1])
def test_a_control_that_is_the_trial_tells_all_from_any_windows(stop):
    """Its paired differences are 0, so what is left is its own distance from the goal."""
    rival, trial = made(gain=0.3)
    estimate = Race({"a": trial}, {"a": 1.0}, rival.nll).estimate({"a": first_windows(trial, stop)})
    assert estimate.difference == pytest.approx(trial.nll - rival.nll) and estimate.error == 0


def test_an_error_of_the_control_is_found_in_the_windows():
    """A control that is off by a constant for each token costs nothing."""
    rival, trial = made(gain=0.3)
    control = score(np.add(trial.nats_W, 7.0), trial.tokens_W)
    race = Race({"a": control}, {"a": 1.0}, rival.nll)
    estimate = race.estimate({"a": first_windows(trial, 6)})
    assert estimate.difference == pytest.approx(trial.nll - rival.nll) and estimate.error == pytest.approx(0, abs=1e-9)
    assert race.loss("a", first_windows(trial, 6)) == pytest.approx(trial.nll)


def test_corpora_without_weight_are_not_looked_at():
    rival, trial = made(gain=-0.5)
    other, better = made(gain=9)
    race = Race.against({"a": rival, "b": other}, {"a": 1.0})
    assert race.is_over({"a": first_windows(trial, 6), "b": first_windows(better, 6)})
    assert race.is_over({"a": first_windows(trial, 6)})
    both = Race.against({"a": rival, "b": other}, {"a": 1.0, "b": 1.0})
    assert not both.is_over({"a": first_windows(trial, 6), "b": first_windows(better, 6)})


def stopped_at(race, trial):
    """How many windows of a trial's only corpus the race sees."""
    ended = replay(race, {"a": trial}, {"a": len(trial.nats_W)})
    return len(ended["a"].nats_W)


@pytest.mark.parametrize("windows", [16, 64])
def test_a_trial_that_wins_by_the_margin_is_hardly_ever_stopped(windows):
    """1500 finite populations in random order.  The worst case: the trial is better by exactly the margin.

    The number of wrong stops is at most binomial (n, ERROR): mean 15, 4 standard deviations above it are 30.
    """
    count = 1500
    wrong = 0
    for seed in range(count):
        rival, trial = made(seed, windows, gain=MARGIN)
        wrong += stopped_at(Race.against({"a": rival}, {"a": 1.0}), trial) < windows
    assert wrong <= count * ERROR + 4 * sqrt(count * ERROR * (1 - ERROR))


def test_the_error_is_spent_but_not_all_at_one_look():
    """With a single look the bound is the t quantile of ERROR itself; with eight it is that of a seventh of it.

    Trials at a known number of standard errors above the margin, with 8 of 64 windows seen, lie on either side of it.
    """
    rival, trial = made(windows=64)
    race = Race.against({"a": rival}, {"a": 1.0})
    part = first_windows(trial, 8)
    estimate = race.estimate({"a": part})
    for share, lost in ((0.98, False), (1.02, True)):
        wanted = share * student.isf(ERROR / (INTERIM_ANALYSES - 1), 7) * estimate.error - MARGIN
        shift = 100 * (wanted - estimate.difference)
        assert race.is_over({"a": score([nats + shift for nats in part.nats_W], part.tokens_W)}) == lost


@pytest.mark.parametrize("gain", [0.05, -0.05])
def test_a_trial_that_can_be_completed_is_set_aside_when_it_is_clear(gain):
    """On either side of the goal: the gain is 3 or 1 times the error of what was seen, and 2 is where it is clear."""
    rival, trial = made(windows=64)
    part = first_windows(trial, 8)
    estimate = Race.against({"a": rival}, {"a": 1.0}).estimate({"a": part})
    for times in (1, 3):
        shift = 100 * (times * estimate.error * np.sign(gain) + estimate.difference)
        moved = {"a": score([nats - shift for nats in part.nats_W], part.tokens_W)}
        assert Race({"a": rival}, {"a": 1.0}, rival.nll, CLEAR).is_over(moved) == (times > CLEAR)
        assert not Race({"a": rival}, {"a": 1.0}, rival.nll).is_over(moved)


def test_clearly_worse_trials_are_stopped_early():
    """Worse by a standard deviation of a window's difference, or by half of one.

    The mean of k of 64 windows is then sqrt(k / (1 - k/64)) standard errors off, or half of that: 4.6 after 16 windows,
    3.1 after 24, where t quantiles of 15 and 23 degrees of freedom are 3.5 and 3.3.
    """
    for gain, most in ((-0.05, 18), (-0.025, 32)):
        ends = []
        for seed in range(200):
            rival, trial = made(seed, 64, gain)
            ends.append(stopped_at(Race.against({"a": rival}, {"a": 1.0}), trial))
        assert np.mean(ends) < most and max(ends) < 64
