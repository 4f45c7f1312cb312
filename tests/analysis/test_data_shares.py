"""Laws of proposed shares: the least of a known bowl, within limits and bounds, nearer to nature with a penalty."""

from collections.abc import Sequence
from math import log

import numpy as np
import pytest

from dem_opt.analysis.data_shares import (
    KEPT,
    CurvePredictor,
    MergePredictor,
    SharesProposal,
    allowed_shares,
    divergence,
    propose_shares,
)
from dem_opt.analysis.training_curves import TrainingCurve
from dem_opt.simplex import Family, Space
from dem_opt.types import TrialRecord

NAMES = ("a", "b", "c")
NATURAL = {"a": 0.6, "b": 0.3, "c": 0.1}
FREE = dict.fromkeys(NAMES, 1.0)
LOWEST = (0.2, 0.5, 0.3)


def trials_of(space: Space, lowest: Sequence[float] = LOWEST, count: int = 40) -> list[TrialRecord]:
    """Random trials of  3 + |w - lowest|^2 ."""
    rng = np.random.default_rng(0)
    points = [*space.landmarks(), *(space.sample(rng) for _ in range(count))]
    losses = [3 + float(((space.point(point) - np.array(lowest)) ** 2).sum()) for point in points]
    return [
        TrialRecord(study="s", number=number, coefficients=point, objective=loss)
        for number, (point, loss) in enumerate(zip(points, losses, strict=True))
    ]


def proposed(space: Space, total: float, most: dict[str, float] = FREE, **more: float) -> SharesProposal:
    allowed = allowed_shares(space, total, most)
    assert allowed is not None
    lowest = tuple(total * share for share in LOWEST)
    predictor = MergePredictor.of(space, trials_of(space, lowest), total)
    assert predictor is not None
    return propose_shares(predictor, allowed, NATURAL, **more)


SPACES = {
    "the simplex": (Space(NAMES), 1.0),
    "half": (Space(NAMES, 0.5), 0.5),
    "a range": (Space(NAMES, 2.0, 0.0), 1.4),
}
spaces = pytest.mark.parametrize(("space", "total"), SPACES.values(), ids=SPACES)


@spaces
def test_shares_are_those_of_the_best_merge(space: Space, total: float) -> None:
    proposal = proposed(space, total)
    assert list(proposal.shares.values()) == pytest.approx(LOWEST, abs=0.02)
    assert sum(round(share * 10**9) for share in proposal.shares.values()) == 10**9
    assert proposal.predicted == pytest.approx(3, abs=2e-3)
    equal = 3 + total**2 * sum((1 / 3 - share) ** 2 for share in LOWEST)
    assert proposal.at_equal == pytest.approx(equal, abs=0.02)


@spaces
def test_the_region_is_a_ball_of_the_difference(space: Space, total: float) -> None:
    """t^2 |s - s*|^2 <= d  within the plane of sum 1: each share varies by  sqrt(d 2 / 3) / t ."""
    proposal = proposed(space, total, detectable=0.01)
    reach = (0.01 * 2 / 3) ** 0.5 / total
    for share, (low, high) in zip(LOWEST, proposal.region.values(), strict=True):
        expected = (max(share - reach, 0), share + reach)
        assert (low, high) == pytest.approx(expected, abs=0.04 / total)
        assert low <= share + 0.02 and high >= share - 0.02


def test_no_share_is_beyond_its_limit() -> None:
    """With b at most 0.3, the least of the bowl is where the others have their rest in equal parts more."""
    proposal = proposed(Space(NAMES), 1.0, {"a": 1.0, "b": 0.3, "c": 1.0})
    assert list(proposal.shares.values()) == pytest.approx((0.3, 0.3, 0.4), abs=0.02)
    assert proposal.shares["b"] <= 0.3 and proposal.region["b"][1] <= 0.3


def test_bounds_of_the_study_hold() -> None:
    space = Space(NAMES, 0.5, bounds=(("a", 0.0, 0.05), ("c", 0.2, 0.2)))
    proposal = proposed(space, 0.5)
    assert proposal.shares["a"] <= 0.1 + 1e-9 and proposal.shares["c"] == pytest.approx(0.4)


def test_the_bounds_of_a_sum_hold() -> None:
    """The bowl's least is at 0.3 for a and b together, or at the nearer end of what they may be."""
    free = proposed(Space(NAMES, 0.5), 0.5)
    for lower, upper in ((0.0, 0.1), (0.4, 0.45), (0.0, 0.5)):
        shares = proposed(Space(NAMES, 0.5, families=(Family("ab", ("a", "b"), lower, upper),)), 0.5).shares
        wanted = min(max(free.shares["a"] + free.shares["b"], lower / 0.5), upper / 0.5)
        assert shares["a"] + shares["b"] == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("space", "most"),
    [
        (Space(NAMES, families=(Family("ab", ("a", "b"), 0.5, 1.0),)), {"a": 0.2, "b": 0.2, "c": 1.0}),
        (Space(NAMES), {"a": 0.3, "b": 0.3, "c": 0.3}),
        (Space(NAMES, bounds=(("a", 0.5, 1.0),)), {"a": 0.4, "b": 1.0, "c": 1.0}),
        (Space(NAMES, bounds=(("a", 0.0, 0.2),)), {"a": 1.0, "b": 0.5, "c": 0.2}),
    ],
)
def test_limits_that_leave_nothing(space: Space, most: dict[str, float]) -> None:
    assert allowed_shares(space, 1.0, most) is None


def test_limits_that_leave_one_point() -> None:
    proposal = proposed(Space(NAMES), 1.0, {"a": 0.25, "b": 0.25, "c": 0.5})
    assert list(proposal.shares.values()) == pytest.approx((0.25, 0.25, 0.5))


def test_a_penalty_draws_towards_nature() -> None:
    distances = [proposed(Space(NAMES), 1.0, penalty=penalty).divergence for penalty in (0.0, 0.05, 0.5, 50.0)]
    assert distances == sorted(distances, reverse=True) and distances[-1] == pytest.approx(0, abs=1e-3)
    shares = proposed(Space(NAMES), 1.0).shares
    expected = sum(share * log(share / NATURAL[name]) for name, share in shares.items())
    assert divergence(shares, NATURAL) == pytest.approx(expected)
    assert divergence({"a": 1.0, "b": 0.0, "c": 0.0}, NATURAL) == pytest.approx(-log(0.6))


def test_nothing_is_predicted_from_two_trials() -> None:
    assert MergePredictor.of(Space(NAMES), trials_of(Space(NAMES))[:2], 1.0) is None


@pytest.mark.parametrize("steps", [20.0, 200.0, 20000.0])
def test_shares_by_curves_fill_up_to_one_level(steps: float) -> None:
    """Water-filling: the slopes  v_i b_i / (m_i + s_i N)  are equal where s_i > 0, and smaller where it is 0."""
    curves = [TrainingCurve(start=3, gain=gain, scale=scale) for gain, scale in ((0.6, 50.0), (0.8, 7.0), (0.2, 37.0))]
    weights = (0.5, 0.3, 0.2)
    allowed = allowed_shares(Space(NAMES), 1.0, FREE)
    assert allowed is not None
    predictor = CurvePredictor(tuple(curves), weights, steps, np.full(3, 50.0), np.zeros((3, 3)))
    proposal = propose_shares(predictor, allowed, NATURAL)
    rows = zip(curves, weights, proposal.shares.values(), strict=True)
    slopes = [(weight * curve.gain / (curve.scale + share * steps), share) for curve, weight, share in rows]
    level = max(slope for slope, _ in slopes)
    for slope, share in slopes:
        assert slope == pytest.approx(level, rel=0.05) if share > 0.01 else slope <= level * 1.05


def test_the_objective_by_curves_is_their_weighted_mean() -> None:
    curves = (TrainingCurve(start=3, gain=1, scale=10), TrainingCurve(start=2, gain=0, scale=1))
    predictor = CurvePredictor(curves, (0.25, 0.75), 40.0, np.full(2, 50.0), np.zeros((2, 2)))
    predicted = predictor.predict(np.array([[0.5, 0.5], [0.0, 1.0]]))
    assert predicted.tolist() == pytest.approx([0.25 * (3 - log(3)) + 1.5, 0.75 + 1.5])


def test_what_is_forgotten_grows_with_the_others_steps_and_own_ones_keep_it_off() -> None:
    """a loses 0.4 by the 50 steps of b; of 100 steps on both, 20 on a keep three quarters of 80 / 50 * 0.4 off."""
    curves = (TrainingCurve(start=3, gain=0, scale=10), TrainingCurve(start=2, gain=0, scale=1))
    forgotten_KK = np.array([[-9.0, 0.4], [0.0, -9.0]])
    trained_K = np.array([20 / 3 / KEPT, 50.0])
    predictor = CurvePredictor(curves, (0.5, 0.5), 100.0, trained_K, forgotten_KK)
    predicted = predictor.predict(np.array([[0.2, 0.8], [0.0, 1.0], [1.0, 0.0]]))
    assert predicted.tolist() == pytest.approx([2.5 + 0.5 * 0.25 * 1.6 * 0.4, 2.5 + 0.5 * 2 * 0.4, 2.5])


def test_a_distribution_that_would_be_forgotten_gets_a_share() -> None:
    """It is learnt so slowly that curves alone give it none."""
    curves = (TrainingCurve(start=3, gain=0.8, scale=5), TrainingCurve(start=4, gain=0.02, scale=50))
    shares = []
    for lost in (0.0, 0.5):
        forgotten_KK = np.array([[0.0, 0.0], [lost, 0.0]])
        predictor = CurvePredictor(curves, (0.5, 0.5), 100.0, np.full(2, 50.0), forgotten_KK)
        space = Space(("a", "b"))
        shares.append(propose_shares(predictor, space, {"a": 0.5, "b": 0.5}).shares["b"])
    assert shares[0] == 0 and 0.05 < shares[1] < 0.5
