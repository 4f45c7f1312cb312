"""Laws of the coefficient space, over dimensions, totals, bounds, and free totals."""

import json
import pickle
from collections.abc import Mapping
from itertools import permutations, product
from math import comb

import numpy as np
import pytest
from scipy.optimize import minimize

from dem_opt.errors import InputError
from dem_opt.simplex import UNIT, Coefficients, Family, FamilyLimits, Polytope, Space, project

NAMES = ("code", "math", "prose", "records", "web", "law", "chat", "news")
PLAIN = [Space(NAMES[:dimension], total) for dimension in (1, 2, 3, 4, 8) for total in (1.0, 0.5, 2.0)]
A_TO_D = tuple("abcd")
FREE = Space(tuple("abc"), 2.0, 0.0)
BOUNDED = Space(A_TO_D, bounds=(("a", 0.0, 0.3), ("b", 0.1, 0.5)))
FIXED = Space(tuple("abc"), bounds=(("b", 0.3, 0.3),))
BOTH = Space(A_TO_D, 1.5, 0.5, (("a", 0.1, 0.4), ("b", 0.2, 0.2)))
THIRDS = Space(tuple("abc"), bounds=(("a", 0.0, 0.35), ("b", 0.0, 0.35), ("c", 0.0, 0.35)))
SETTLED = Space(tuple("ab"), bounds=(("a", 0.4, 0.4),))
LONELY = Space(("a",), 2.0, 0.0)
SCALED = Space(tuple("ab"), 1.2, 0.7, (("a", 0.05, 1.0), ("b", 0.0, 0.25)))
PAIR = Space(A_TO_D, families=(Family("ab", ("a", "b"), 0.0, 0.4),))
PAIRS = Space(
    A_TO_D, 1.5, 0.5, (("a", 0.1, 0.3),), (Family("ab", ("a", "b"), 0.3, 0.6), Family("cd", ("c", "d"), 0.0, 0.8))
)
SPLIT = Space(A_TO_D, families=(Family("ac", ("a", "c"), 0.3, 0.3), Family("bd", ("b", "d"), 0.0, 0.9)))
LEAST = Space(tuple("abc"), 1.0, None, (("c", 0.2, 0.9),), (Family("ab", ("a", "b"), 0.5, 1.0),))
FAMILIES = [PAIR, PAIRS, SPLIT, LEAST]
SPECIAL = [FREE, BOUNDED, FIXED, BOTH, THIRDS, SETTLED, LONELY, SCALED, *FAMILIES]
SPACES = PLAIN + SPECIAL
OPEN = [space for space in SPACES if not space.is_point]


def points(space: Space, count: int = 100) -> list[Coefficients]:
    rng = np.random.default_rng(0)
    return [space.sample(rng) for _ in range(count)] + space.landmarks() + list(space.lattice(3))


def at(space: Space, **weights: float) -> Coefficients:
    return space.from_units([round(weights.get(name, 0) * UNIT) for name in space.names])


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_point_is_in_the_space_in_whole_units(space):
    bounds = {name: (lower, upper) for name, lower, upper in space.bounds}
    least = space.total if space.least is None else space.least
    for point in points(space):
        assert space.contains(point)
        assert round(least * UNIT) <= sum(point.units.values()) <= round(space.total * UNIT)
        for name, units in point.pairs:
            lower, upper = bounds.get(name, (0.0, space.total))
            assert round(lower * UNIT) <= units <= round(upper * UNIT)
        for family in space.families:
            assert round(family.lower * UNIT) <= sum(point.units[n] for n in family.names) <= round(family.upper * UNIT)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_point_comes_back_from_its_shares_and_from_its_weights(space):
    for point in points(space):
        assert space.at(space.shares(point)) == point
        assert space.nearest(space.point(point)) == point
        assert space.check(point.weights) == point


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_coefficients_are_a_mapping_of_names_to_floats(space):
    for point in points(space, 10):
        assert isinstance(point, Mapping) and list(point) == list(space.names) and len(point) == space.dimension
        assert json.loads(json.dumps(dict(point))) == point.weights == {name: point[name] for name in point}
        assert [*point.values()] == [units / UNIT for units in point.units.values()]
        assert space.check(point) == point and space.check(dict(point.items())) == point
        assert hash(point) == hash(space.check(point)) and pickle.loads(pickle.dumps(point)) == point
        with pytest.raises(KeyError):
            point["no such distribution"]


def test_coefficients_show_their_numbers():
    assert repr(Coefficients((("a", UNIT // 4), ("b", 3 * UNIT // 4)))) == "Coefficients({'a': 0.25, 'b': 0.75})"


@pytest.mark.parametrize("space", OPEN, ids=str)
def test_shares_sum_to_one_within_their_caps_and_jacobian_is_their_slope(space):
    jacobian, caps = space.jacobian(), space.caps_F
    first = space.landmarks()[0]
    for point in points(space):
        shares = space.shares(point)
        assert shares.sum() == pytest.approx(1, abs=1e-12)
        assert (shares >= 0).all() and (shares <= caps).all()
        moved = jacobian @ (shares - space.shares(first))
        assert space.point(point) - space.point(first) == pytest.approx(moved, abs=1e-12)


@pytest.mark.parametrize("space", OPEN, ids=str)
def test_rounding_moves_a_point_by_little_more_than_a_unit(space):
    rng = np.random.default_rng(1)
    for _ in range(100):
        exact = space.polytope.project(rng.dirichlet(np.ones(len(space.caps_F))))
        assert np.abs(space.jacobian() @ (space.shares(space.at(exact)) - exact)).max() < 1.01e-9


@pytest.mark.parametrize(
    ("space", "outside"),
    [
        (PLAIN[6], {"code": 0.5, "math": 0.4}),
        (PLAIN[6], {"code": 1.5, "math": -0.5}),
        (PLAIN[6], {"code": 0.5, "maths": 0.5}),
        (FREE, {"a": 1.5, "b": 0.6}),
        (BOUNDED, {"a": 0.4, "b": 0.1, "c": 0.5}),
        (BOUNDED, {"a": 0.1, "c": 0.9}),
        (FIXED, {"a": 0.6, "b": 0.4}),
        (BOTH, {"a": 0.1, "b": 0.2}),
        (PAIR, {"a": 0.25, "b": 0.2, "c": 0.55}),
        (PAIRS, {"a": 0.1, "b": 0.1, "c": 0.8}),
        (SPLIT, {"a": 0.1, "b": 0.3, "c": 0.3, "d": 0.3}),
    ],
)
def test_what_is_outside_is_not_contained(space, outside):
    whole = {**dict.fromkeys(space.names, 0.0), **outside}
    assert not space.contains(Coefficients(tuple(sorted((name, round(w * UNIT)) for name, w in whole.items()))))


def test_what_leaves_no_choice_is_a_point():
    assert [space for space in SPACES if space.is_point] == [*PLAIN[:3], SETTLED]
    assert at(SETTLED, a=0.4, b=0.6) == SETTLED.sample(np.random.default_rng(0)) == SETTLED.centroid()
    assert SETTLED.landmarks() == list(SETTLED.lattice(5)) == [SETTLED.centroid()] and SETTLED.lattice_size(5) == 1


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("divisions", [1, 3, 7, 10])
def test_the_lattice_has_all_its_points_once(dimension, divisions):
    space = Space(NAMES[:dimension])
    lattice = list(space.lattice(divisions))
    assert len(lattice) == len(set(lattice)) == space.lattice_size(divisions)
    assert space.lattice_size(divisions) == comb(divisions + dimension - 1, dimension - 1)
    for point in lattice:
        assert sum(units for _, units in point.pairs) == UNIT
        steps = np.array([units for _, units in point.pairs]) * divisions / UNIT
        assert np.abs(steps - steps.round()).max() < 1e-7


@pytest.mark.parametrize("space", SPECIAL, ids=str)
@pytest.mark.parametrize("divisions", [1, 4, 6])
def test_a_lattice_within_bounds_is_what_they_leave_of_all_steps(space, divisions):
    """By brute force over all shares that are multiples of 1 / divisions."""
    lattice, caps = list(space.lattice(divisions)), space.caps_F
    steps = product(range(divisions + 1), repeat=len(caps))
    shares = [np.array(step) / divisions for step in steps if sum(step) == divisions or not len(caps)]
    families = space.polytope.families
    expected = {
        space.at(share)
        for share in shares
        if (share <= caps + 1e-12).all()
        and all(family.least - 1e-12 <= family.sum(share) <= family.most + 1e-12 for family in families)
    }
    assert set(lattice) == expected and len(lattice) == len(expected) == space.lattice_size(divisions)
    assert all(space.contains(point) for point in lattice)


def test_the_step_of_a_tenth_has_286_points_and_an_exact_base():
    # C(10 + 4 - 1, 4 - 1) = C(13, 3) = 286; in floats 1 - sum(w) is 1e-16 on 30 of them.
    lattice = list(Space(NAMES[:4]).lattice(10))
    assert len(lattice) == 286
    assert all(point.base_units == 0 for point in lattice)
    assert {units % (UNIT // 10) for point in lattice for _, units in point.pairs} == {0}


def test_lattice_vertices_and_centroid_are_the_same_points_however_they_are_made():
    space = Space(NAMES[:3])
    assert set(space.landmarks()) <= set(space.lattice(3))


def test_landmarks_are_the_base_where_it_belongs_then_the_vertices_then_the_centroid():
    third = 1 / 3
    assert [str(point) for point in PLAIN[6].landmarks()] == [
        "code 1.000, math 0.000, prose 0.000",
        "code 0.000, math 1.000, prose 0.000",
        "code 0.000, math 0.000, prose 1.000",
        "code 0.333, math 0.333, prose 0.333",
    ]
    corners = [at(FREE), at(FREE, a=1), at(FREE, b=1), at(FREE, c=1)]
    assert FREE.landmarks() == [*corners, FREE.nearest(np.full(3, third)), FREE.nearest(np.full(3, 2 * third))]
    assert LONELY.landmarks() == [at(LONELY), at(LONELY, a=1), at(LONELY, a=2)]
    assert FIXED.landmarks() == [at(FIXED, a=0.7, b=0.3), at(FIXED, b=0.3, c=0.7), at(FIXED, a=0.35, b=0.3, c=0.35)]
    assert at(BOUNDED, b=0.1, c=0.9) in BOUNDED.landmarks() and BOUNDED.centroid() == at(
        BOUNDED, **dict.fromkeys(A_TO_D, 0.25)
    )
    for space in SPACES:
        assert len(set(space.landmarks())) == len(space.landmarks())


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_vertices_and_centroid_are_the_nearest_points_to_the_plain_ones(space):
    """Nearest in the shares, which count the slack: no other point of a fine lattice is nearer."""
    total = min(max(1.0, space.least_units / UNIT), space.total)
    free = [i for i, name in enumerate(space.names) if name not in {n for n, low, up in space.bounds if low == up}]
    corners = [np.eye(space.dimension)[i] * total for i in free] if not space.is_point or space.dimension == 1 else []
    others = points(space, 30)
    for wanted in [*corners, np.full(space.dimension, total / space.dimension)]:
        nearest = space.nearest(wanted)
        assert nearest in space.landmarks()
        assert apart(space, nearest, wanted) <= min(apart(space, other, wanted) for other in others) + 1e-8


def apart(space, point, wanted):
    difference = space.point(point) - wanted
    slack = -difference.sum() if space.least is not None else 0.0
    return np.hypot(np.linalg.norm(difference), slack)


@pytest.mark.parametrize("order", list(permutations(("a", "b", "c"))), ids="".join)
def test_the_order_of_names_changes_nothing(order):
    assert Space(order) == Space(("a", "b", "c"))
    assert Space(order, bounds=(("c", 0.0, 0.9), ("a", 0.0, 0.3))) == Space(
        ("a", "b", "c"), bounds=(("a", 0.0, 0.3), ("c", 0.0, 0.9))
    )
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


@pytest.mark.parametrize("space", [BOUNDED, BOTH, THIRDS, PAIR, PAIRS, LEAST], ids=str)
def test_samples_are_uniform_within_limits(space):
    """Against the draws of the whole simplex that lie within the limits: means, and correlations of the shares."""
    rng = np.random.default_rng(7)
    free = rng.dirichlet(np.ones(len(space.caps_F)), 40_000)
    kept = free[(free <= space.caps_F).all(axis=1)]
    for family in space.polytope.families:
        sums = kept[:, family.members_n].sum(axis=1)
        kept = kept[(family.least <= sums) & (sums <= family.most)]
    draws = np.array([space.shares(space.sample(rng)) for _ in range(1_000)])
    error = np.sqrt(draws.var(axis=0) / len(draws) + kept.var(axis=0) / len(kept))
    assert (np.abs(draws.mean(axis=0) - kept.mean(axis=0)) < 4 * error).all()
    assert np.abs(draws.std(axis=0) / kept.std(axis=0) - 1).max() < 0.1
    assert np.abs(np.corrcoef(draws.T) - np.corrcoef(kept.T)).max() < 0.13


@pytest.mark.parametrize("dimension", [1, 2, 5, 8])
def test_the_projection_is_the_nearest_point(dimension):
    # The projection p of x is characterised by <x - p, q - p> <= 0 for every q of the simplex; vertices suffice.
    rng = np.random.default_rng(3)
    for _ in range(100):
        point = rng.normal(size=dimension) * 3
        projected = project(point, np.ones(dimension))
        assert projected.sum() == pytest.approx(1.0) and projected.min() >= 0
        assert ((np.eye(dimension) - projected) @ (point - projected)).max() < 1e-9


@pytest.mark.parametrize("caps", [[0.3, 0.5, 1.0], [0.4, 0.4, 0.4], [0.1, 0.2, 0.3, 0.4, 1.0], [0.5, 0.5]], ids=str)
def test_the_capped_projection_is_the_nearest_point(caps):
    """Against scipy's quadratic programming; and rows are projected as points are."""
    rng, caps = np.random.default_rng(3), np.array(caps)
    rows = rng.normal(size=(30, len(caps))) * np.geomspace(0.1, 3, 30)[:, None] + 1 / len(caps)
    projected = project(rows, caps)
    for row, point in zip(rows, projected, strict=True):
        assert point.sum() == pytest.approx(1, abs=1e-12) and (point >= 0).all() and (point <= caps).all()
        assert (project(row, caps) == point).all()
        best = minimize(
            lambda p, row=row: ((p - row) ** 2).sum(),
            np.clip(caps / caps.sum(), 0, caps),
            jac=lambda p, row=row: 2 * (p - row),
            method="SLSQP",
            bounds=[(0, cap) for cap in caps],
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-14},
        )
        assert point == pytest.approx(best.x, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_projection_within_limits_of_families_is_the_nearest_point(seed):
    """Against scipy's quadratic programming, at random limits: ranges, equalities, idle ones."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 9))
    inside = rng.dirichlet(np.ones(size))
    caps = np.minimum(inside + rng.choice([0.05, 0.3, 1.0], size), 1.0)
    places, families = rng.permutation(size), []
    for members in np.split(places, np.sort(rng.integers(1, size, 2)))[: int(rng.integers(1, 3))]:
        if len(members):
            low, high = rng.choice([0.0, 0.02, 0.2, 1.0], 2)
            total = inside[members].sum()
            families.append(FamilyLimits(members, max(total - low, 0.0), total + high))
    polytope = Polytope(caps, tuple(families))
    rows = rng.normal(size=(30, size)) * np.geomspace(0.03, 3, 30)[:, None] + 1 / size
    constraints = [{"type": "eq", "fun": lambda p: p.sum() - 1}]
    for each in families:
        constraints += [{"type": "ineq", "fun": lambda p, each=each: each.sum(p) - each.least}]
        constraints += [{"type": "ineq", "fun": lambda p, each=each: each.most - each.sum(p)}]
    for row, point in zip(rows, polytope.project(rows), strict=True):
        assert point.sum() == pytest.approx(1, abs=1e-12) and (point >= 0).all() and (point <= caps).all()
        assert all(each.least - 1e-12 <= each.sum(point) <= each.most + 1e-12 for each in families)
        assert (polytope.project(row) == point).all()
        assert polytope.project(point) == pytest.approx(point, abs=1e-12)
        best = minimize(
            lambda p, row=row: ((p - row) ** 2).sum(),
            inside,
            method="SLSQP",
            bounds=[(0, cap) for cap in caps],
            constraints=constraints,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        # scipy may end early where limits are degenerate, but it never finds a nearer point.
        assert ((point - row) ** 2).sum() <= ((best.x - row) ** 2).sum() + 1e-9
        assert not best.success or point == pytest.approx(best.x, abs=1e-5)


def test_a_projected_point_stays_and_a_far_one_reaches_the_exact_corner():
    caps = np.array([0.3, 0.5, 1.0])
    assert project(np.array([0.3, 0.5, 0.2]), caps).tolist() == [0.3, 0.5, 0.2]
    assert project(np.array([9.0, 0.0, -9.0]), caps)[:2].tolist() == [0.3, 0.5]
    assert project(np.array([0.0, 0.0, 9.0]), caps).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("space", "weights", "said"),
    [
        (PLAIN[6], {"code": -0.1, "math": 1.1}, "weights.code = -0.1"),
        (PLAIN[6], {"code": 0.5, "math": 0.4}, "sums to 0.9; coefficients must sum to 1"),
        (PLAIN[6], {"code": 0.5, "mathe": 0.5}, "did you mean 'math'?"),
        (PLAIN[6], {"code": float("nan"), "math": 0.5}, "weights.code = nan"),
        (PLAIN[6], {}, "sums to 0"),
        (FREE, {"a": 1.5, "b": 0.6}, "sums to 2.1; coefficients must sum to at least 0 and at most 2"),
        (BOTH, {"a": 0.1, "b": 0.2}, "sums to 0.3; coefficients must sum to at least 0.5 and at most 1.5"),
        (BOUNDED, {"a": 0.4, "b": 0.1, "c": 0.5}, "weights.a = 0.4: the study file bounds it to 0 .. 0.3"),
        (BOUNDED, {"a": 0.1, "c": 0.9}, "weights.b = 0.0: the study file bounds it to 0.1 .. 0.5"),
        (FIXED, {"a": 0.6, "b": 0.4}, "weights.b = 0.4: the study file bounds it to 0.3 .. 0.3"),
        (PAIR, {"a": 0.25, "b": 0.2, "c": 0.55}, "sums to 0.45; the study file bounds the sum of ab to 0 .. 0.4"),
    ],
)
def test_what_is_no_point_is_refused_with_its_name(space, weights, said):
    with pytest.raises(InputError, match="weights") as refusal:
        space.check(weights)
    assert said in str(refusal.value)


def test_what_is_nearly_a_point_is_rounded_to_one():
    assert BOUNDED.check({"a": 0.3000001, "b": 0.1, "c": 0.6}) == at(BOUNDED, a=0.3, b=0.1, c=0.6)
    assert FREE.check({"a": 2.0000001}) == at(FREE, a=2)
    assert FREE.check({}) == at(FREE)
