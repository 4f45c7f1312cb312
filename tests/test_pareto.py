"""Fronts and hypervolumes are those of brute force, ties and values that are no numbers included."""

import numpy as np
import pytest

from dem_opt.pareto import MEAN, Front, FrontPoint, Gap, front_of, hypervolume, joint_weights, make_axis, non_dominated
from dem_opt.simplex import Space

SPACE = Space(("a", "b"))


def clouds():
    """Random points: of floats, with many ties, with duplicates, with values that are not finite, few or none."""
    rng = np.random.default_rng(0)
    unusual = rng.normal(size=(40, 2))
    unusual[::7, 0], unusual[::5, 1], unusual[3] = np.nan, np.inf, -np.inf
    yield from (rng.normal(size=(count, 2)) for count in (0, 1, 2, 60))
    yield from (rng.integers(0, 5, size=(count, 2)).astype(float) for count in (10, 60))
    yield from (np.repeat(rng.normal(size=(9, 2)), 3, axis=0), unusual, np.full((5, 2), np.nan), np.ones((4, 2)))


CLOUDS = list(clouds())


def is_dominated(point, points):
    return any((other <= point).all() and (other < point).any() for other in points)


@pytest.mark.parametrize("values", CLOUDS, ids=lambda values: str(values.shape))
def test_the_front_is_what_no_point_dominates(values):
    finite = values[np.isfinite(values).all(axis=1)]
    expected = [bool(np.isfinite(point).all()) and not is_dominated(point, finite) for point in values]
    assert non_dominated(values).tolist() == expected
    front = front_of(values)
    assert set(map(tuple, front)) == set(map(tuple, values[expected]))
    assert (np.diff(front[:, 0]) > 0).all() and (np.diff(front[:, 1]) < 0).all()


@pytest.mark.parametrize("values", CLOUDS, ids=lambda values: str(values.shape))
@pytest.mark.parametrize("reference", [(1.0, 1.0), (0.0, 5.0), (6.0, 6.0), (-9.0, -9.0)])
def test_the_hypervolume_is_that_of_counted_cells(values, reference):
    """The plane is divided at every coordinate; a cell counts if a point is below and left of it."""
    finite = values[np.isfinite(values).all(axis=1)]
    edges = [np.unique([*finite[:, axis][finite[:, axis] < reference[axis]], reference[axis]]) for axis in (0, 1)]
    area = sum(
        (right - left) * (above - below)
        for left, right in zip(edges[0], edges[0][1:], strict=False)
        for below, above in zip(edges[1], edges[1][1:], strict=False)
        if (finite <= (left, below)).all(axis=1).any()
    )
    assert hypervolume(values, reference) == pytest.approx(area, abs=1e-12)


def test_the_lowest_joint_mean_is_on_the_front():
    rng = np.random.default_rng(1)
    weights = {"a": 3.0, "b": 1.0, "c": 0.0}
    axes = make_axis(MEAN, weights), make_axis("c", weights)
    assert axes[0].weights == {"a": 0.75, "b": 0.25} and axes[1].weights == {"c": 1.0}
    joint = joint_weights(axes, list(weights))
    for _ in range(20):
        losses = rng.normal(size=(30, 3))
        values = np.array([losses @ [axis.weights.get(name, 0.0) for name in weights] for axis in axes]).T
        assert non_dominated(values)[np.argmin(losses @ list(joint.values()))]


def test_a_corpus_named_mean_hides_the_mean():
    assert make_axis(MEAN, {MEAN: 0.0, "a": 1.0}).weights == {MEAN: 1.0}


def a_front(losses):
    gaps = (Gap(0.0, 0.0, 0.0, "documents"), Gap(0.0, -np.inf, np.inf, "documents"))
    points = tuple(FrontPoint(coefficients=SPACE.centroid(), search=each, gaps=gaps) for each in losses)
    return Front(
        names=("a", "b"),
        unit="nats per token",
        points=points,
        dominated=(),
        baselines={},
        reference=(2.0, 2.0),
    )


@pytest.mark.parametrize(
    ("losses", "knee"),
    [
        ([(0.0, 1.0), (0.2, 0.3), (1.0, 0.0)], 1),  # 1 - 0.2 - 0.3 below the line
        ([(0.0, 10.0), (0.2, 3.0), (0.3, 2.9), (1.0, 0.0)], 1),  # scaled: the same beside a point that is nearer
        ([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)], None),  # on the line
        ([(0.0, 1.0), (0.9, 0.8), (1.0, 0.0)], None),  # above it
        ([(0.0, 1.0), (1.0, 0.0)], None),
        ([(0.0, 0.0)] * 3, None),  # ties: no range to scale by
    ],
)
def test_the_knee_is_farthest_below_the_line_between_the_ends(losses, knee):
    front = a_front(losses)
    assert front.knee is (None if knee is None else front.points[knee])
    lowest = front.points.index(front.lowest_mean)
    assert sum(losses[lowest]) == min(map(sum, losses))
    assert {row["note"] for row in front.rows()} <= {"", "knee", "lowest mean", "lowest mean, knee"}


def test_points_that_are_dominated_held_out_are_not_confirmed():
    held_out = [(0.0, 1.0), (0.5, 1.5), None, (0.9, 0.1)]
    points = tuple(
        FrontPoint(coefficients=SPACE.centroid(), search=(float(place), -float(place)), held_out=losses)
        for place, losses in enumerate(held_out)
    )
    front = Front(
        names=("a", "b"), unit="nats per token", points=points, dominated=(), baselines={}, reference=(9.0, 9.0)
    )
    assert len(front.held_out) == 3 and front.confirmed == 2
    assert a_front([(0.0, 1.0)]).confirmed == 0
