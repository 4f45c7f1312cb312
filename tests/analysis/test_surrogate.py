"""Laws of the surrogate: it finds the lowest point of a quadratic, and its slice lies in the space."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dem_opt.analysis.surrogate import FEWEST, MOST, predict, surrogate_of
from dem_opt.simplex import UNIT, Family, Space
from dem_opt.types import PENALTY, Score, TrialRecord


def trials_of(space: Space, lowest: Sequence[float], count: int = 40) -> list[TrialRecord]:
    """Random trials of  3 + |w - lowest|^2 ."""
    rng = np.random.default_rng(0)
    points = [*space.landmarks(), *(space.sample(rng) for _ in range(count))]
    losses = [3 + float(((space.point(point) - np.array(lowest)) ** 2).sum()) for point in points]
    return [
        TrialRecord(study="s", number=number, coefficients=point, objective=loss)
        for number, (point, loss) in enumerate(zip(points, losses, strict=True))
    ]


CASES = {
    "two": (Space(("a", "b")), (0.3, 0.7)),
    "three": (Space(("a", "b", "c")), (0.2, 0.5, 0.3)),
    "an edge": (Space(("a", "b", "c")), (0.4, 0.6, 0.0)),
    "four": (Space(("a", "b", "c", "d")), (0.4, 0.1, 0.3, 0.2)),
    "half": (Space(("a", "b", "c"), 0.5), (0.1, 0.15, 0.25)),
    "a range": (Space(("a", "b", "c"), 1.5, 0.5), (0.2, 0.5, 0.3)),
    "bounds": (Space(("a", "b", "c"), bounds=(("a", 0.1, 0.6),)), (0.2, 0.5, 0.3)),
    "a sum": (Space(("a", "b", "c"), families=(Family("ab", ("a", "b"), 0.2, 0.9),)), (0.2, 0.5, 0.3)),
}
cases = pytest.mark.parametrize(("space", "lowest"), CASES.values(), ids=CASES)


@cases
def test_the_optimum_is_where_the_loss_is_lowest(space: Space, lowest: Sequence[float]) -> None:
    result = surrogate_of(space, trials_of(space, lowest))
    assert result is not None
    assert space.point(result.optimum) == pytest.approx(lowest, abs=0.02)
    assert result.mean == pytest.approx(3.0, abs=2e-3) and 0 <= result.deviation < 0.02


@cases
def test_the_slice_lies_in_the_space_and_keeps_the_other_coefficients(space: Space, lowest: Sequence[float]) -> None:
    result = surrogate_of(space, trials_of(space, lowest))
    assert result is not None and len(result.names) == min(space.dimension, 3)
    assert len(result.points) == len(result.means) >= 50
    others = {name: units for name, units in result.optimum.units.items() if name not in result.names}
    for point, mean in zip(result.points, result.means, strict=True):
        assert space.contains(point) and others.items() <= point.units.items()
        exact = 3 + float(((space.point(point) - np.array(lowest)) ** 2).sum())
        assert mean == pytest.approx(exact, abs=0.03)


@cases
@pytest.mark.parametrize("slopes", [False, True], ids=["values", "gradients"])
def test_the_optimum_is_where_a_protected_corpus_reaches_its_limit(
    space: Space, lowest: Sequence[float], slopes: bool
) -> None:
    """The limit is a sphere around another point: the optimum is halfway.  Penalties of up to 30 nats are predicted."""
    limit, other = 2.0, space.point(space.centroid())
    allowed = float(((np.array(lowest) - other) ** 2).sum()) / 4
    trials = trials_of(space, lowest)
    away = [float(((space.point(trial.coefficients) - other) ** 2).sum()) - allowed for trial in trials]
    for place, (trial, excess) in enumerate(zip(trials, away, strict=True)):
        excess *= 3.0 / max(away)
        slope_K = 2 * (space.point(trial.coefficients) - lowest) * (1 + PENALTY * (excess > 0))
        gradient = dict(zip(space.names, slope_K.tolist(), strict=True)) if slopes else {}
        scores = {"general": Score((limit + excess,), (1,))}
        trials[place] = replace(trial, scores=scores, violation=max(excess, 0.0), gradient=gradient)
    result = surrogate_of(space, trials, {"general": limit})
    assert result is not None
    assert space.point(result.optimum) == pytest.approx((np.array(lowest) + other) / 2, abs=0.02)
    assert result.mean == pytest.approx(3 + allowed, abs=0.02)
    worst = max(trials, key=lambda trial: trial.violation)
    prediction = predict(space, trials, worst.coefficients, {"general": limit})
    assert prediction is not None and prediction.mean == pytest.approx(worst.penalized, rel=0.02)


def test_four_distributions_leave_out_the_one_of_which_the_optimum_has_least() -> None:
    space, lowest = CASES["four"]
    result = surrogate_of(space, trials_of(space, lowest))
    assert result is not None and result.names == ("a", "c", "d")


def test_the_same_trials_give_the_same_belief() -> None:
    space, lowest = CASES["four"]
    assert surrogate_of(space, trials_of(space, lowest)) == surrogate_of(space, trials_of(space, lowest))


def test_nothing_is_believed_of_few_trials_failed_ones_and_a_point() -> None:
    space, lowest = CASES["three"]
    trials = trials_of(space, lowest)
    assert surrogate_of(space, trials[: FEWEST - 1]) is None
    assert (
        surrogate_of(
            space,
            [
                TrialRecord(study="s", number=0, coefficients=trial.coefficients, objective=None, reason="nan")
                for trial in trials
            ],
        )
        is None
    )
    assert surrogate_of(Space(("a",)), trials_of(Space(("a",)), (1.0,), 5)) is None
    same = [
        TrialRecord(study="s", number=number, coefficients=trials[0].coefficients, objective=3.0) for number in range(9)
    ]
    assert surrogate_of(space, same) is None, "one composite, however often"


def test_many_trials_are_thinned_and_keep_the_best() -> None:
    space, lowest = CASES["three"]
    result = surrogate_of(space, trials_of(space, lowest, 3 * MOST))
    assert result is not None and result.trials == MOST
    assert space.point(result.optimum) == pytest.approx(lowest, abs=0.02)
    assert sum(result.optimum.units.values()) == UNIT
