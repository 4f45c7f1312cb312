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


GIBBS = 30
"""Steps of the Gibbs chain that samples a space with caps, for each share."""


@dataclass(frozen=True)
class Space:
    """The coefficients  {w : lower_i <= w_i <= upper_i, least <= sum_i w_i <= total}  over named distributions.

    Every space is a simplex to samplers: with the rest  R = total - sum_i lower_i , the *shares*

        p_i = (w_i - lower_i) / R   of the free coefficients,    p_slack = (total - sum_i w_i) / R   where least < total

    are at least 0, at most their caps, and sum to 1.  So corners, faces and an exact sum mean the same everywhere; the
    slack is the part of the base beyond 1 - total.

    Attributes:
        names: Distributions, kept in ascending order, so the order of a study file changes nothing.
        total: Greatest sum of the coefficients.
        least: Least sum, where that is not the total itself.
        bounds: (name, lower, upper) where not 0 to total; a fixed coefficient has lower = upper.
    """

    names: tuple[str, ...]
    total: float = 1.0
    least: float | None = None
    bounds: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(self.names)))
        object.__setattr__(self, "bounds", tuple(sorted(self.bounds)))

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
    def _box_K2(self) -> NDArray[np.int64]:
        """Lower and upper bound of every coefficient in units: the tightest that the total allows."""
        bounds = {name: (round(lower * UNIT), round(upper * UNIT)) for name, lower, upper in self.bounds}
        box_K2 = np.array([bounds.get(name, (0, self.total_units)) for name in self.names], dtype=np.int64)
        spare = self.total_units - int(box_K2[:, 0].sum())
        needed_K = box_K2[:, 1] - (int(box_K2[:, 1].sum()) - self.least_units)
        return np.stack([np.maximum(box_K2[:, 0], needed_K), np.minimum(box_K2[:, 1], box_K2[:, 0] + spare)], axis=1)

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

    def shares(self, coefficients: Coefficients) -> NDArray[np.float64]:
        """Coefficients as shares, which are at least 0, at most `caps_F`, and sum to 1."""
        units = coefficients.units
        above_K = np.array([units[name] for name in self.names]) - self._box_K2[:, 0]
        shares_F = above_K[self._free_K]
        if self.least_units < self.total_units:
            shares_F = np.append(shares_F, self.total_units - sum(units.values()))
        return np.asarray(shares_F / max(self._rest_units, 1))

    def at(self, shares_F: NDArray[np.float64]) -> Coefficients:
        """The coefficients nearest to shares: projected, then rounded to units with an exact total.

        Rounds down, then adds a unit to the largest remainders (Hamilton's method), lower index first, until the
        total is exact.
        """
        units_K = self._box_K2[:, 0].copy()
        if len(shares_F):
            # Thousandths of a unit are dropped first, so that 0.3, which is no binary fraction, comes out as 0.3.
            exact_F = np.round(project(np.asarray(shares_F, dtype=np.float64), self.caps_F) * self._rest_units, 3)
            floor_F = np.floor(exact_F).astype(np.int64)
            missing = self._rest_units - int(floor_F.sum())
            # A share at its cap can't take another unit: -1 sorts behind every remainder.
            remainders_F = np.where(floor_F < self._cap_units_F, exact_F - floor_F, -1)
            floor_F[np.argsort(-remainders_F, kind="stable")[:missing]] += 1
            units_K[self._free_K] += floor_F[: int(self._free_K.sum())]
        return self.from_units(units_K.tolist())

    def jacobian(self) -> NDArray[np.float64]:
        """d w / d p, [K, F]:  R for a free coefficient's own share, 0 elsewhere."""
        jacobian_KF = np.zeros((self.dimension, len(self.caps_F)))
        jacobian_KF[np.flatnonzero(self._free_K), np.arange(int(self._free_K.sum()))] = self._rest_units / UNIT
        return jacobian_KF

    def from_units(self, units: Sequence[int]) -> Coefficients:
        """Coefficients of whole units in the order of `names`, which must lie in the space."""
        assert len(units) == self.dimension and self.least_units <= sum(units) <= self.total_units, units
        assert all(low <= unit <= high for unit, (low, high) in zip(units, self._box_K2.tolist(), strict=True)), units
        return Coefficients(tuple(zip(self.names, (int(unit) for unit in units), strict=True)))

    def contains(self, coefficients: Coefficients) -> bool:
        """The space has these coefficients."""
        units = coefficients.units
        if units.keys() != set(self.names) or not self.least_units <= sum(units.values()) <= self.total_units:
            return False
        box = zip(self.names, self._box_K2.tolist(), strict=True)
        return all(low <= units[name] <= high for name, (low, high) in box)

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
        most_F = self._most_stars(divisions)
        for parts in compositions(divisions, len(most_F)) if len(most_F) else [()]:
            stars_F = np.array(parts, dtype=np.int64)
            if (stars_F <= most_F).all():
                yield self.at(stars_F / divisions)

    def lattice_size(self, divisions: int) -> int:
        """Number of lattice points, counted share by share without making them."""
        ways = [1] + [0] * divisions
        for most in self._most_stars(divisions).tolist():
            ways = [sum(ways[max(0, stars - most) : stars + 1]) for stars in range(divisions + 1)]
        return ways[divisions] if len(self.caps_F) else 1

    def _most_stars(self, divisions: int) -> NDArray[np.int64]:
        """Most steps of each share on the lattice."""
        return np.asarray(self._cap_units_F * divisions // max(self._rest_units, 1))

    def sample(self, rng: np.random.Generator) -> Coefficients:
        """Draw a point uniformly over the shares: Dirichlet(1, ..., 1), as normalized exponentials.

        Where caps bind, a Gibbs chain starts from the projected draw: each step draws two shares anew, their sum kept.
        """
        caps_F = self.caps_F
        draws_F = rng.exponential(size=len(caps_F))
        shares_F = draws_F / max(draws_F.sum(), 1e-300)
        if len(caps_F) > 1 and (caps_F < 1).any():
            shares_F = project(shares_F, caps_F)
            for _ in range(GIBBS * len(caps_F)):
                i, j = rng.choice(len(caps_F), size=2, replace=False)
                both = shares_F[i] + shares_F[j]
                least = max(0.0, both - caps_F[j])
                shares_F[i] = rng.uniform(least, max(least, min(caps_F[i], both)))
                shares_F[j] = both - shares_F[i]
        return self.at(shares_F)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` integers of at least 0, in ascending order.

    Stars and bars: each is a choice of parts - 1 bars among total + parts - 1 places.
    """
    places = total + parts - 1
    for bars in combinations(range(places), parts - 1):
        yield tuple(right - left - 1 for left, right in pairwise((-1, *bars, places)))


def project(points_MF: NDArray[np.float64], caps_F: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean projection of points [..., F] onto {0 <= p <= caps, sum p = 1}, whose caps sum to at least 1.

    clip(x - t, 0, caps) with the one t that makes the sum 1 (Held, Wolfe, Crowder 1974): the sum falls with t, and is
    linear between the breakpoints x and x - caps, at which a share meets a bound.  Zeros and caps come out exactly,
    so a projected gradient step reaches faces and corners.
    """
    points_MF = np.asarray(points_MF, dtype=np.float64)
    if (caps_F >= 1).all():
        return _project_uncapped(points_MF)
    breaks_ME = np.sort(np.concatenate([points_MF, points_MF - caps_F], axis=-1), axis=-1)
    sums_ME = np.clip(points_MF[..., None, :] - breaks_ME[..., None], 0, caps_F).sum(axis=-1)
    # The last breakpoint with a sum of at least 1, and the next: between them t is found by linear interpolation.
    left_M1 = np.maximum((sums_ME >= 1).sum(axis=-1, keepdims=True) - 1, 0)
    right_M1 = np.minimum(left_M1 + 1, breaks_ME.shape[-1] - 1)
    low_M1, high_M1 = (np.take_along_axis(sums_ME, at_M1, axis=-1) for at_M1 in (left_M1, right_M1))
    start_M1, end_M1 = (np.take_along_axis(breaks_ME, at_M1, axis=-1) for at_M1 in (left_M1, right_M1))
    part_M1 = np.divide(low_M1 - 1, low_M1 - high_M1, out=np.zeros_like(low_M1), where=low_M1 > high_M1)
    clipped_MF: NDArray[np.float64] = np.clip(points_MF - (start_M1 + part_M1 * (end_M1 - start_M1)), 0, caps_F)
    return clipped_MF


def _project_uncapped(points_MF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Projection where no cap binds: t = (sum of the k largest - 1) / k, k the most shares that all stay above 0."""
    descending_MF = -np.sort(-points_MF, axis=-1)
    excess_MF = np.cumsum(descending_MF, axis=-1) - 1
    counts_F = np.arange(1, points_MF.shape[-1] + 1)
    positive_MF = descending_MF * counts_F > excess_MF
    support_M1 = len(counts_F) - 1 - np.argmax(positive_MF[..., ::-1], axis=-1, keepdims=True)
    threshold_M1 = np.take_along_axis(excess_MF, support_M1, axis=-1) / (support_M1 + 1)
    projected_MF: NDArray[np.float64] = np.maximum(points_MF - threshold_M1, 0.0)
    return projected_MF


def plane(count: int) -> NDArray[np.float64]:
    """An orthonormal basis of the plane of constant sum, [F, F - 1]: Helmert's contrasts."""
    helmert_FF = np.triu(np.ones((count, count)), 1) - np.diag(np.arange(count))
    basis_FD: NDArray[np.float64] = helmert_FF[:, 1:] / np.linalg.norm(helmert_FF[:, 1:], axis=0)
    return basis_FD
