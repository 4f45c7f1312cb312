"""Laws of the coefficient space, over dimensions and totals."""

from itertools import permutations
from math import comb

import numpy as np
import pytest

from dem_opt.errors import InputError
from dem_opt.simplex import UNIT, Space, project

NAMES = ("code", "math", "prose", "records", "web", "law", "chat", "news")
SPACES = [Space(NAMES[:dimension], total) for dimension in (1, 2, 3, 4, 8) for total in (1.0, 0.5, 2.0)]


def points(space: Space) -> list:
    rng = np.random.default_rng(0)
    return [space.sample(rng) for _ in range(200)] + space.landmarks()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_point_sums_exactly_and_is_not_negative(space):
    for point in points(space):
        assert sum(units for _, units in point.items) == round(space.total * UNIT)
        assert all(units >= 0 for _, units in point.items)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_rounding_moves_a_point_by_less_than_a_unit(space):
    rng = np.random.default_rng(1)
    for _ in range(200):
        exact = rng.dirichlet(np.ones(space.dimension)) * space.total
        assert np.abs(space.point(space.nearest(exact)) - exact).max() < 1.01e-9


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_point_is_its_own_nearest(space):
    for point in points(space):
        assert space.nearest(space.point(point)) == point


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("divisions", [1, 3, 7, 10])
def test_the_lattice_has_all_its_points_once(dimension, divisions):
    space = Space(NAMES[:dimension])
    lattice = list(space.lattice(divisions))
    assert len(lattice) == len(set(lattice)) == space.lattice_size(divisions)
    assert space.lattice_size(divisions) == comb(divisions + dimension - 1, dimension - 1)
    for point in lattice:
        assert sum(units for _, units in point.items) == UNIT
        steps = np.array([units for _, units in point.items]) * divisions / UNIT
        assert np.abs(steps - steps.round()).max() < 1e-7


def test_the_step_of_a_tenth_has_286_points_and_an_exact_base():
    # C(10 + 4 - 1, 4 - 1) = C(13, 3) = 286; in floats 1 - sum(w) is 1e-16 on 30 of them.
    lattice = list(Space(NAMES[:4]).lattice(10))
    assert len(lattice) == 286
    assert all(point.base_units == 0 for point in lattice)
    assert {units % (UNIT // 10) for point in lattice for _, units in point.items} == {0}


def test_lattice_vertices_and_centroid_are_the_same_points_however_they_are_made():
    space = Space(NAMES[:3])
    assert set(space.landmarks()) <= set(space.lattice(3))


@pytest.mark.parametrize("order", list(permutations(("a", "b", "c"))), ids="".join)
def test_the_order_of_names_changes_nothing(order):
    assert Space(order) == Space(("a", "b", "c"))
    weights = {name: {"a": 0.2, "b": 0.3, "c": 0.5}[name] for name in order}
    assert Space(order).check(weights).units == {"a": 200_000_000, "b": 300_000_000, "c": 500_000_000}


def test_samples_are_uniform_on_the_simplex():
    # Uniform on the simplex is Dirichlet(1, ..., 1): mean 1/K, variance (K - 1)/(K^2 (K + 1)), covariance
    # -1/(K^2 (K + 1)).  For K = 4: 3/80 = 0.0375 and -1/80 = -0.0125.
    space, rng = Space(NAMES[:4]), np.random.default_rng(7)
    draws = np.array([space.point(space.sample(rng)) for _ in range(6_000)])
    covariance = np.cov(draws.T)
    assert draws.mean(axis=0) == pytest.approx(np.full(4, 0.25), abs=0.01)
    assert np.diag(covariance) == pytest.approx(np.full(4, 0.0375), abs=0.003)
    assert covariance[~np.eye(4, dtype=bool)] == pytest.approx(np.full(12, -0.0125), abs=0.003)


@pytest.mark.parametrize("dimension", [1, 2, 5, 8])
def test_the_projection_is_the_nearest_point(dimension):
    # The projection p of x is characterised by <x - p, q - p> <= 0 for every q of the simplex; vertices suffice.
    rng = np.random.default_rng(3)
    for _ in range(100):
        point = rng.normal(size=dimension) * 3
        projected = project(point, 1.0)
        assert projected.sum() == pytest.approx(1.0) and projected.min() >= 0
        assert ((np.eye(dimension) - projected) @ (point - projected)).max() < 1e-9


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"code": -0.1, "math": 1.1}, "weights.code = -0.1"),
        ({"code": 0.5, "math": 0.4}, "sums to 0.9"),
        ({"code": 0.5, "mathe": 0.5}, "did you mean 'math'?"),
        ({"code": float("nan"), "math": 0.5}, "weights.code = nan"),
        ({}, "sums to 0"),
    ],
)
def test_what_is_no_point_is_refused_with_its_name(weights, said):
    with pytest.raises(InputError, match="weights") as refusal:
        Space(NAMES[:3]).check(weights)
    assert said in str(refusal.value)
