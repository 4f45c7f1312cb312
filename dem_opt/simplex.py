"""The coefficient space: check, lattice, vertices, centroid, uniform sampling, cube <-> simplex chart.

Coefficients are counted in *units* of 1e-9 as Python integers, so that a sum of coefficients is exact: in
floats 1 - sum(w) came out as 1e-16 on 30 of the 286 points of the step-0.1 lattice of four distributions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, isfinite

import numpy as np
from numpy.typing import NDArray

from dem_opt.errors import InputError, nearest

UNIT = 10**9
"""Units in a coefficient of 1."""

TOLERANCE = 1e-6
"""How far from the total a sum of coefficients that a user writes may be, before it is refused."""


@dataclass(frozen=True)
class Coefficients:
    """Weights of the distribution vectors by name, in units of 1e-9, names in ascending order."""

    items: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        assert list(self.items) == sorted(self.items), f"names out of order: {self.items}"

    @property
    def units(self) -> dict[str, int]:
        """Units of 1e-9 by name."""
        return dict(self.items)

    @property
    def weights(self) -> dict[str, float]:
        """The coefficients as floats by name."""
        return {name: units / UNIT for name, units in self.items}

    @property
    def base_units(self) -> int:
        """The base's own coefficient 1 - sum(w), in units: exactly 0 on the unit simplex."""
        return UNIT - sum(units for _, units in self.items)

    def __str__(self) -> str:
        return ", ".join(f"{name} {weight:.3f}" for name, weight in self.weights.items())


@dataclass(frozen=True)
class Space:
    """The simplex  {w : w_i >= 0, sum_i w_i = total}  over named distributions.

    Names are held in ascending order, so the order of a study file changes nothing.
    """

    names: tuple[str, ...]
    total: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(self.names)))

    @property
    def dimension(self) -> int:
        """How many distributions there are."""
        return len(self.names)

    @property
    def total_units(self) -> int:
        """The total in units of 1e-9."""
        return round(self.total * UNIT)

    def from_units(self, units: Sequence[int]) -> Coefficients:
        """Coefficients of whole units in the order of `names`, which must sum to the total."""
        assert len(units) == self.dimension and sum(units) == self.total_units and min(units) >= 0, units
        return Coefficients(tuple(zip(self.names, (int(unit) for unit in units), strict=True)))

    def nearest(self, point_K: NDArray[np.float64]) -> Coefficients:
        """The coefficients nearest to a point: projected on the simplex, rounded to units with an exact total.

        Rounds down and gives what is missing to the largest remainders (Hamilton's method), lower index first.
        Thousandths of a unit are dropped before, so that 0.3, which is no binary fraction, comes out as 0.3.
        """
        exact_K = np.round(project(np.asarray(point_K, dtype=np.float64), self.total) * UNIT, 3)
        floor_K = np.floor(exact_K).astype(np.int64)
        missing = self.total_units - int(floor_K.sum())
        floor_K[np.argsort(floor_K - exact_K, kind="stable")[:missing]] += 1
        return self.from_units(floor_K.tolist())

    def point(self, coefficients: Coefficients) -> NDArray[np.float64]:
        """Coefficients as an array in the order of `names`."""
        units = coefficients.units
        return np.array([units[name] / UNIT for name in self.names])

    def check(self, weights: Mapping[str, float], where: object = None, field: str = "weights") -> Coefficients:
        """Coefficients that a user wrote; names left out are 0.

        Raises InputError for an unknown name, a negative or non-finite weight, and a sum off the total.
        """
        for name, weight in weights.items():
            if name not in self.names:
                raise InputError(where, f"{field}.{name}", weight, f"no such distribution; {nearest(name, self.names)}")
            if not isfinite(weight) or weight < 0:
                raise InputError(where, f"{field}.{name}", weight, "a coefficient is a number of at least 0")
        total = sum(weights.values())
        if abs(total - self.total) > TOLERANCE:
            raise InputError(where, field, dict(weights), f"sums to {total:g}; coefficients must sum to {self.total:g}")
        return self.nearest(np.array([weights.get(name, 0.0) for name in self.names]))

    def vertices(self) -> list[Coefficients]:
        """The corners: all of the total on one distribution, in the order of `names`."""
        return [
            self.from_units([self.total_units * (i == j) for j in range(self.dimension)]) for i in range(self.dimension)
        ]

    def centroid(self) -> Coefficients:
        """Equal coefficients (to a unit): the uniform average."""
        return self.nearest(np.full(self.dimension, self.total / self.dimension))

    def landmarks(self) -> list[Coefficients]:
        """Vertices and centroid, each once: the composites that every study scores first."""
        return list(dict.fromkeys([*self.vertices(), self.centroid()]))

    def lattice(self, divisions: int) -> Iterator[Coefficients]:
        """All points whose coefficients are multiples of total/divisions: C(divisions + K - 1, K - 1) of them.

        Stars and bars: a point is a choice of K - 1 bars among divisions + K - 1 places.
        """
        places = divisions + self.dimension - 1
        for bars in combinations(range(places), self.dimension - 1):
            edges = (-1, *bars, places)
            stars_K = np.diff(edges) - 1
            yield self.nearest(stars_K / divisions * self.total)

    def lattice_size(self, divisions: int) -> int:
        """Number of lattice points, C(divisions + K - 1, K - 1)."""
        return comb(divisions + self.dimension - 1, self.dimension - 1)

    def sample(self, rng: np.random.Generator) -> Coefficients:
        """A point drawn uniformly (Dirichlet with all parameters 1, by way of exponentials)."""
        draws_K = rng.exponential(size=self.dimension)
        return self.nearest(draws_K / draws_K.sum() * self.total)


def project(points_MK: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """The Euclidean projection of points (shape [..., K]) on {w >= 0, sum w = total}.

    max(x - t, 0) with the one t that makes the sum right, found by sorting (Held, Wolfe, Crowder 1974).  Exact
    zeros come out as exact zeros, so a projected gradient step reaches faces and corners.
    """
    descending_MK = -np.sort(-points_MK, axis=-1)
    excess_MK = np.cumsum(descending_MK, axis=-1) - total
    counts_K = np.arange(1, points_MK.shape[-1] + 1)
    positive_MK = descending_MK * counts_K > excess_MK
    support_M1 = len(counts_K) - 1 - np.argmax(positive_MK[..., ::-1], axis=-1, keepdims=True)
    threshold_M1 = np.take_along_axis(excess_MK, support_M1, axis=-1) / (support_M1 + 1)
    projected_MK: NDArray[np.float64] = np.maximum(points_MK - threshold_M1, 0.0)
    return projected_MK
