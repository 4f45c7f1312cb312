"""The coefficient space: check, lattice, vertices, centroid, uniform sampling, shares of a unit simplex.

Coefficients are counted in *units* of 1e-9 as Python integers, so that a sum of coefficients is exact: in
floats 1 - sum(w) comes out as 1e-16 on 30 of the 286 points of the step-0.1 lattice of four distributions.

A coefficient vector has three forms, each with its way to `Coefficients` and back:

    mapping of names to floats   `Space.check`       `Coefficients.weights`    study files, command line, messages
    point w_K, an array          `Space.nearest`     `Space.point`             geometry in coefficient space
    shares p_F, an array         `Space.at`          `Space.shares`            samplers, on the unit simplex

Shape suffixes: K distributions, F free shares (with the slack's), M points, E breakpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dem_opt.errors import InputError, nearest
from dem_opt.simplex.polytope import FamilyLimits, Polytope

UNIT = 10**9
"""Units in a coefficient of 1."""

TOLERANCE = 1e-6
"""Largest distance from the total at which a sum of coefficients written by a user is accepted."""


@dataclass(frozen=True, repr=False)
class Coefficients(Mapping[str, float]):
    """Coefficients of the distribution vectors: a mapping of names, in ascending order, to floats.

    `dict(coefficients)` is JSON, and what `Study.score` and `Study.merge` take.

    Attributes:
        pairs: Names with their coefficients in units of 1e-9, which are exact.
    """

    pairs: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        assert list(self.pairs) == sorted(self.pairs), f"names out of order: {self.pairs}"

    def __getitem__(self, name: str) -> float:
        return self.units[name] / UNIT

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def units(self) -> dict[str, int]:
        """Units of 1e-9 by name."""
        return dict(self.pairs)

    @property
    def weights(self) -> dict[str, float]:
        """The coefficients as floats by name, in a dictionary."""
        return {name: units / UNIT for name, units in self.pairs}

    @property
    def base_units(self) -> int:
        """The base's own coefficient 1 - sum(w), in units: exactly 0 on the unit simplex."""
        return UNIT - sum(units for _, units in self.pairs)

    def __repr__(self) -> str:
        return f"Coefficients({self.weights})"

    def __str__(self) -> str:
        return ", ".join(f"{name} {weight:.3f}" for name, weight in self.weights.items())


@dataclass(frozen=True, order=True)
class Family:
    """Coefficients whose sum is bounded, as those of several kept steps of one fine-tune.

    Attributes:
        name: What messages and study files call it.
        names: Its coefficients; no other family has them.
        lower: Least sum.
        upper: Greatest sum.
    """

    name: str
    names: tuple[str, ...]
    lower: float
    upper: float


@dataclass(frozen=True)
class Space:
    """The coefficients  {w : lower_i <= w_i <= upper_i, least <= sum_i w_i <= total}  over named distributions.

    Every space is a simplex to samplers: with the rest  R = total - sum_i lower_i , the *shares*

        p_i = (w_i - lower_i) / R   of the free coefficients,    p_slack = (total - sum_i w_i) / R   where least < total

    are at least 0, at most their caps, and sum to 1.  So corners, faces and an exact sum mean the same everywhere; the
    slack is the part of the base beyond 1 - total.  Sums of families may be bounded too: `polytope` has all limits.

    Attributes:
        names: Distributions, kept in ascending order, so the order of a study file changes nothing.
        total: Greatest sum of the coefficients.
        least: Least sum, where that is not the total itself.
        bounds: (name, lower, upper) where not 0 to total; a fixed coefficient has lower = upper.
        families: Coefficients whose sum is bounded; none is in two of them.
    """

    names: tuple[str, ...]
    total: float = 1.0
    least: float | None = None
    bounds: tuple[tuple[str, float, float], ...] = ()
    families: tuple[Family, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(self.names)))
        object.__setattr__(self, "bounds", tuple(sorted(self.bounds)))
        object.__setattr__(self, "families", tuple(sorted(self.families)))

    @property
    def dimension(self) -> int:
        """Number of distributions."""
        return len(self.names)

    @property
    def is_point(self) -> bool:
        """The space is a single point: no coefficient is free."""
        return len(self.caps_F) < 2

    @property
    def total_units(self) -> int:
        """The greatest total in units of 1e-9."""
        return round(self.total * UNIT)

    @property
    def least_units(self) -> int:
        """The least total in units of 1e-9."""
        return self.total_units if self.least is None else round(self.least * UNIT)

    @cached_property
    def _given(self) -> dict[str, tuple[int, int]]:
        """Lower and upper bound of every coefficient in units, as they are given."""
        bounds = {name: (round(lower * UNIT), round(upper * UNIT)) for name, lower, upper in self.bounds}
        return {name: bounds.get(name, (0, self.total_units)) for name in self.names}

    @cached_property
    def _parts(self) -> list[tuple[list[int], int, int]]:
        """Places of the coefficients of each part, with the least and the greatest sum in units: families, then others.

        The sums are the tightest that families and bounds allow, whatever the total.
        """
        box = list(self._given.values())
        parts = []
        for family in self.families:
            places = [self.names.index(name) for name in family.names]
            low, high = (sum(box[place][end] for place in places) for end in (0, 1))
            parts.append((places, max(round(family.lower * UNIT), low), min(round(family.upper * UNIT), high)))
        bounded = {name for family in self.families for name in family.names}
        return parts + [([place], *box[place]) for place, name in enumerate(self.names) if name not in bounded]

    @property
    def reach(self) -> tuple[int, int] | None:
        """Least and greatest sum that bounds and families allow, in units; None where they contradict each other."""
        if any(least > most for _, least, most in self._parts):
            return None
        return sum(least for _, least, _ in self._parts), sum(most for _, _, most in self._parts)

    @property
    def is_empty(self) -> bool:
        """No coefficients are within the bounds and have an allowed sum."""
        reach = self.reach
        return reach is None or reach[0] > self.total_units or reach[1] < self.least_units

    @cached_property
    def _tight_parts(self) -> list[tuple[list[int], int, int]]:
        """`_parts` with the tightest sums that the total allows."""
        least, most = (sum(low for _, low, _ in self._parts), sum(high for _, _, high in self._parts))
        return [
            (places, max(low, self.least_units - (most - high)), min(high, self.total_units - (least - low)))
            for places, low, high in self._parts
        ]

    @cached_property
    def _box_K2(self) -> NDArray[np.int64]:
        """Lower and upper bound of every coefficient in units: the tightest that families and the total allow."""
        box_K2 = np.array(list(self._given.values()), dtype=np.int64)
        for places, least, most in self._tight_parts:
            low_n, high_n = box_K2[places].T
            box_K2[places] = np.stack(
                [
                    np.maximum(low_n, least - (high_n.sum() - high_n)),
                    np.minimum(high_n, most - (low_n.sum() - low_n)),
                ],
                axis=1,
            )
        return box_K2

    @cached_property
    def _free_K(self) -> NDArray[np.bool_]:
        free_K: NDArray[np.bool_] = self._box_K2[:, 0] < self._box_K2[:, 1]
        return free_K

    @cached_property
    def _rest_units(self) -> int:
        """R in units: the part of the total above the lower bounds."""
        return self.total_units - int(self._box_K2[:, 0].sum())

    @cached_property
    def _cap_units_F(self) -> NDArray[np.int64]:
        """Greatest share in units: of each free coefficient in the order of `names`, then of the slack."""
        widths_F = (self._box_K2[:, 1] - self._box_K2[:, 0])[self._free_K]
        slack = self.total_units - self.least_units
        return np.append(widths_F, slack) if slack else widths_F

    @property
    def caps_F(self) -> NDArray[np.float64]:
        """The greatest share of each free coefficient in the order of `names`, then of the slack where there is any."""
        return np.asarray(self._cap_units_F / max(self._rest_units, 1))

    @cached_property
    def _share_limits(self) -> list[tuple[NDArray[np.int64], int, int]]:
        """Places of each family's free shares, with the least and the greatest sum in units."""
        limits = []
        for places, least, most in self._tight_parts[: len(self.families)]:
            fixed = int(self._box_K2[places, 0].sum())
            free_n = np.cumsum(self._free_K)[[place for place in places if self._free_K[place]]] - 1
            if len(free_n):
                limits.append((free_n, least - fixed, most - fixed))
        return limits

    @cached_property
    def _outside_families(self) -> NDArray[np.int64]:
        """Places of the shares that are in no family."""
        inside = {share for free_n, _, _ in self._share_limits for share in free_n.tolist()}
        return np.array([share for share in range(len(self.caps_F)) if share not in inside], dtype=np.int64)

    @cached_property
    def polytope(self) -> Polytope:
        """All limits of the shares."""
        rest = max(self._rest_units, 1)
        families = (FamilyLimits(free_n, least / rest, most / rest) for free_n, least, most in self._share_limits)
        return Polytope(self.caps_F, tuple(families))

    def shares(self, coefficients: Coefficients, others: Sequence[str] = ()) -> NDArray[np.float64]:
        """Coefficients as shares, which are at least 0, at most `caps_F`, and sum to 1.

        Args:
            coefficients: A point of the space; or one outside of it, where shares may be beyond these limits.
            others: Names that the space has not, whose shares follow; 0 where the coefficients have them not.
        """
        units = coefficients.units
        above_K = np.array([units[name] for name in self.names]) - self._box_K2[:, 0]
        shares_F = above_K[self._free_K]
        if self.least_units < self.total_units:
            shares_F = np.append(shares_F, self.total_units - sum(units.values()))
        shares_F = np.append(shares_F, [units.get(name, 0) for name in others])
        return np.asarray(shares_F / max(self._rest_units, 1))

    def at(self, shares_F: NDArray[np.float64]) -> Coefficients:
        """The coefficients nearest to shares: projected, then rounded to units with an exact total.

        Sums of families are rounded first, with whatever is in none, then the shares of each family.
        """
        units_K = self._box_K2[:, 0].copy()
        if len(shares_F):
            projected_F = self.polytope.project(np.asarray(shares_F, dtype=np.float64))
            # Thousandths of a unit are dropped first, so that 0.3, which is no binary fraction, comes out as 0.3.
            units_F = self._rounded(np.round(projected_F * self._rest_units, 3))
            units_K[self._free_K] += units_F[: int(self._free_K.sum())]
        return self.from_units(units_K.tolist())

    def _rounded(self, exact_F: NDArray[np.float64]) -> NDArray[np.int64]:
        """Shares in units as whole ones, within all limits."""
        caps_F, limits = self._cap_units_F, self._share_limits
        if not limits:
            return apportion(exact_F, caps_F, self._rest_units)
        alone_n = self._outside_families
        sums_P = [float(np.clip(exact_F[free_n].sum(), least, most)) for free_n, least, most in limits]
        most_P = np.array([most for _, _, most in limits], dtype=np.int64)
        parts_P = apportion(np.append(exact_F[alone_n], sums_P), np.append(caps_F[alone_n], most_P), self._rest_units)
        units_F = np.zeros(len(exact_F), dtype=np.int64)
        units_F[alone_n] = parts_P[: len(alone_n)]
        for (free_n, _, _), units in zip(limits, parts_P[len(alone_n) :].tolist(), strict=True):
            units_F[free_n] = apportion(exact_F[free_n], caps_F[free_n], units)
        return units_F

    def jacobian(self) -> NDArray[np.float64]:
        """d w / d p, [K, F]:  R for a free coefficient's own share, 0 elsewhere."""
        jacobian_KF = np.zeros((self.dimension, len(self.caps_F)))
        jacobian_KF[np.flatnonzero(self._free_K), np.arange(int(self._free_K.sum()))] = self._rest_units / UNIT
        return jacobian_KF

    def from_units(self, units: Sequence[int]) -> Coefficients:
        """Coefficients of whole units in the order of `names`, which must lie in the space."""
        assert len(units) == self.dimension and self.least_units <= sum(units) <= self.total_units, units
        assert self._is_within(np.asarray(units, dtype=np.int64)), units
        return Coefficients(tuple(zip(self.names, (int(unit) for unit in units), strict=True)))

    def contains(self, coefficients: Coefficients) -> bool:
        """The space has these coefficients."""
        units = coefficients.units
        if units.keys() != set(self.names) or not self.least_units <= sum(units.values()) <= self.total_units:
            return False
        return self._is_within(np.array([units[name] for name in self.names], dtype=np.int64))

    def _is_within(self, units_K: NDArray[np.int64]) -> bool:
        """Whole units are within the bounds of coefficients and families."""
        within_K = (self._box_K2[:, 0] <= units_K) & (units_K <= self._box_K2[:, 1])
        return bool(within_K.all()) and all(
            least <= int(units_K[places].sum()) <= most
            for places, least, most in self._tight_parts[: len(self.families)]
        )

    def nearest(self, point_K: NDArray[np.float64]) -> Coefficients:
        """The coefficients nearest to a point w_K."""
        above_K = np.asarray(point_K, dtype=np.float64) * UNIT - self._box_K2[:, 0]
        shares_F = above_K[self._free_K]
        if self.least_units < self.total_units:
            shares_F = np.append(shares_F, self._rest_units - above_K.sum())
        return self.at(shares_F / max(self._rest_units, 1))

    def point(self, coefficients: Coefficients) -> NDArray[np.float64]:
        """Coefficients as an array in the order of `names`."""
        units = coefficients.units
        return np.array([units[name] / UNIT for name in self.names])

    def check(self, weights: Mapping[str, float], where: Path | None = None, field: str = "weights") -> Coefficients:
        """The coefficients that a user wrote; names left out are 0.

        Args:
            weights: Coefficients by name.
            where: Study file, for messages.
            field: Option or field that they came from, for messages.

        Raises:
            InputError: A name is unknown, a coefficient not finite or out of bounds, or the sum off the total.
        """
        for name, weight in weights.items():
            if name not in self.names:
                raise InputError(where, f"{field}.{name}", weight, f"no such distribution; {nearest(name, self.names)}")
            if not isfinite(weight) or weight < 0:
                raise InputError(where, f"{field}.{name}", weight, "a coefficient is a number of at least 0")
        total, least = sum(weights.values()), self.least_units / UNIT
        if not least - TOLERANCE <= total <= self.total + TOLERANCE:
            wanted = f"{self.total:g}" if self.least is None else f"at least {least:g} and at most {self.total:g}"
            raise InputError(where, field, dict(weights), f"sums to {total:g}; coefficients must sum to {wanted}")
        for name, lower, upper in self.bounds:
            if not lower - TOLERANCE <= weights.get(name, 0.0) <= upper + TOLERANCE:
                mend = f"the study file bounds it to {lower:g} .. {upper:g}"
                raise InputError(where, f"{field}.{name}", weights.get(name, 0.0), mend)
        for family in self.families:
            part = {name: weights.get(name, 0.0) for name in family.names}
            if not family.lower - TOLERANCE <= sum(part.values()) <= family.upper + TOLERANCE:
                mend = f"the study file bounds the sum of {family.name} to {family.lower:g} .. {family.upper:g}"
                raise InputError(where, field, part, f"sums to {sum(part.values()):g}; {mend}")
        return self.nearest(np.array([weights.get(name, 0.0) for name in self.names]))

    @property
    def _ordinary_total(self) -> float:
        """The allowed total nearest to 1; at a total of 1 a vertex is a fine-tune as it is."""
        return min(max(1.0, self.least_units / UNIT), self.total)

    def vertices(self) -> list[Coefficients]:
        """For each free distribution the point nearest to the corner that has all of the total on it."""
        corners_KK = np.eye(self.dimension) * self._ordinary_total
        return [self.nearest(corner_K) for corner_K, free in zip(corners_KK, self._free_K, strict=True) if free]

    def centroid(self) -> Coefficients:
        """The uniform average, with coefficients equal to a unit, or the point of the space nearest to it."""
        return self.nearest(np.full(self.dimension, self._ordinary_total / self.dimension))

    def landmarks(self) -> list[Coefficients]:
        """Points scored before the search: the base where the space has it, vertices and centroid, each once.

        In a range of totals the last is the centroid of the greatest total, which is the sum of all vectors where that
        is their number: with base and centroid it tells how far up the optimum is (`benchmarks/totals.py`).
        """
        base = Coefficients(tuple((name, 0) for name in self.names))
        points = [*self.vertices(), self.centroid()]
        if self.least_units < self.total_units:
            points.append(self.nearest(np.full(self.dimension, self.total / self.dimension)))
        if self.contains(base):
            points.insert(0, base)
        return list(dict.fromkeys(points))

    def lattice(self, divisions: int) -> Iterator[Coefficients]:
        """All points whose shares are multiples of 1/divisions: C(divisions + F - 1, F - 1) of them without caps.

        Shares above the lower bounds are Cornell's pseudo-components (Experiments with Mixtures, 2002, chapter 3).
        """
        most_F, limits = self._most_stars(divisions), self._family_stars(divisions)
        for parts in compositions(divisions, len(most_F)) if len(most_F) else [()]:
            stars_F = np.array(parts, dtype=np.int64)
            if (stars_F <= most_F).all() and all(low <= stars_F[free_n].sum() <= most for free_n, low, most in limits):
                yield self.at(stars_F / divisions)

    def lattice_size(self, divisions: int) -> int:
        """Number of lattice points, counted share by share without making them."""
        if not len(self.caps_F):
            return 1
        most_F, limits = self._most_stars(divisions), self._family_stars(divisions)
        alone_n = self._outside_families.tolist()
        ways = _ways([1] + [0] * divisions, most_F[alone_n].tolist())
        for free_n, least, most in limits:
            own = _ways([1] + [0] * divisions, most_F[free_n].tolist())
            ways = [
                sum(ways[stars - taken] * own[taken] for taken in range(least, min(most, stars) + 1))
                for stars in range(divisions + 1)
            ]
        return ways[divisions]

    def _most_stars(self, divisions: int) -> NDArray[np.int64]:
        """Most steps of each share on the lattice."""
        return np.asarray(self._cap_units_F * divisions // max(self._rest_units, 1))

    def _family_stars(self, divisions: int) -> list[tuple[NDArray[np.int64], int, int]]:
        """Least and most steps of each family on the lattice."""
        rest = max(self._rest_units, 1)
        return [
            (free_n, -(-least * divisions // rest), most * divisions // rest)
            for free_n, least, most in self._share_limits
        ]

    def sample(self, rng: np.random.Generator) -> Coefficients:
        """Draw a point uniformly over the shares."""
        return self.at(self.polytope.sample(rng))


def apportion(exact_n: NDArray[np.float64], caps_n: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Whole numbers next to others, at most their caps, with a given sum: Hamilton's method.

    Rounds down, then adds 1 to the largest remainders, lower index first, until the sum is exact.
    """
    floor_n = np.floor(exact_n).astype(np.int64)
    missing = total - int(floor_n.sum())
    # What is at its cap can't take another: -1 sorts behind every remainder.
    remainders_n = np.where(floor_n < caps_n, exact_n - floor_n, -1)
    floor_n[np.argsort(-remainders_n, kind="stable")[:missing]] += 1
    return floor_n


def _ways(ways: list[int], most: Sequence[int]) -> list[int]:
    """Numbers of ways to reach each sum, after shares that add 0 to so many steps each."""
    for steps in most:
        ways = [sum(ways[max(0, total - steps) : total + 1]) for total in range(len(ways))]
    return ways


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` integers of at least 0, in ascending order.

    Stars and bars: each is a choice of parts - 1 bars among total + parts - 1 places.
    """
    places = total + parts - 1
    for bars in combinations(range(places), parts - 1):
        yield tuple(right - left - 1 for left, right in pairwise((-1, *bars, places)))


def plane(count: int) -> NDArray[np.float64]:
    """An orthonormal basis of the plane of constant sum, [F, F - 1]: Helmert's contrasts."""
    helmert_FF = np.triu(np.ones((count, count)), 1) - np.diag(np.arange(count))
    basis_FD: NDArray[np.float64] = helmert_FF[:, 1:] / np.linalg.norm(helmert_FF[:, 1:], axis=0)
    return basis_FD
