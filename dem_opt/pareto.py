"""The front between two losses: the composites of which none is better in one loss without being worse in the other.

Both losses are minimized.  Shape suffixes beside the project's: N points with a value on each of the two axes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dem_opt.simplex import Coefficients

MEAN = "mean"
"""Name of the axis that is the study's weighted mean; a corpus of this name hides it."""

SLACK = 1e-9
"""Distance below the line between the ends, as a share of the front's range, that rounding may cause."""

FEWEST = 3
"""Points of a front that can have a knee."""


@dataclass(frozen=True)
class Axis:
    """One of the two losses: a weighted mean of corpora's losses.

    Attributes:
        name: A distribution or general corpus, or MEAN.
        weights: Share of each corpus in the loss; they sum to 1.
    """

    name: str
    weights: Mapping[str, float]


Axes = tuple[Axis, Axis]


def make_axis(name: str, weights: Mapping[str, float]) -> Axis:
    """The axis of a name.

    Args:
        name: A key of `weights`, or MEAN.
        weights: The study's weight of each distribution and general corpus.
    """
    if name in weights:
        return Axis(name, {name: 1.0})
    assert name == MEAN, name
    total = sum(weights.values())
    return Axis(name, {corpus: weight / total for corpus, weight in weights.items() if weight})


def joint_weights(axes: Axes, corpora: Sequence[str]) -> dict[str, float]:
    """The weights of the mean of both losses, by corpus, up to a factor.

    Where that mean is lowest, no composite is better in both losses, so the point is on the front.
    """
    return {name: sum(axis.weights.get(name, 0.0) for axis in axes) for name in corpora}


def non_dominated(values_N2: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points are on the front: no other is at most as high in both values and lower in one.

    Equal points are on the front together; one with a value that is not finite never is.  O(N log N): in the order of
    the first value, a point is on the front if its second value is lower than all before.
    """
    on_front_N = np.zeros(len(values_N2), dtype=np.bool_)
    lowest, last = np.inf, (np.nan, np.nan)
    for place in np.lexsort((values_N2[:, 1], values_N2[:, 0])):
        point = (float(values_N2[place, 0]), float(values_N2[place, 1]))
        if np.isfinite(point).all() and (point[1] < lowest or point == last):
            on_front_N[place], lowest, last = True, point[1], point
    return on_front_N


def front_of(values_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """The different points of the front, the first value ascending and so the second descending."""
    return np.unique(values_N2[non_dominated(values_N2)], axis=0)


def hypervolume(values_N2: NDArray[np.float64], reference: Sequence[float]) -> float:
    """Area of what the points dominate up to the reference point; points beyond it add nothing.

        sum_i (a_{i+1} - a_i) (r_2 - b_i)        (a_i, b_i) the front in ascending order of a,  a_{n+1} = r_1

    Zitzler and Thiele (1998), "Multiobjective optimization using evolutionary algorithms", in two dimensions.
    """
    within_N = (values_N2 < np.asarray(reference)).all(axis=1)
    front_N2 = front_of(values_N2[within_N])
    widths_N = np.diff(np.append(front_N2[:, 0], reference[0]))
    return float(widths_N @ (reference[1] - front_N2[:, 1]))


@dataclass(frozen=True)
class Gap:
    """Loss of a composite minus the lowest on the front, with a 95% interval, which is paired.

    `sampled` is the unit that the interval takes to be sampled: "documents", or "windows" where these are unknown.
    """

    mean: float
    low: float
    high: float
    sampled: str


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A composite with its two losses.

    Attributes:
        coefficients: Its coefficients; None for the base.
        search: Losses on the search split, in the front's unit.
        held_out: Losses on the held-out split, where both are measured.
        gaps: On each axis the loss above that of the front's best, on the search split; none for baselines.
        violation: Excess of protected corpora over their allowances, in the front's unit.
    """

    coefficients: Coefficients | None
    search: tuple[float, float]
    held_out: tuple[float, float] | None = None
    gaps: tuple[Gap, ...] = ()
    violation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Front:
    """The front between two losses over all composites of a study's space that are scored on both.

    Attributes:
        names: Names of the axes.
        unit: Unit of the losses, in words.
        points: The front, the first loss ascending.
        dominated: Losses of the other composites on the search split.
        baselines: Base and fine-tunes by name, as far as they are scored.
        reference: Reference point of the hypervolume: on each axis the worst of the baselines.
    """

    names: tuple[str, str]
    unit: str
    points: tuple[FrontPoint, ...]
    dominated: tuple[tuple[float, float], ...]
    baselines: Mapping[str, FrontPoint]
    reference: tuple[float, float]

    @cached_property
    def hypervolume(self) -> float:
        """Area between front and reference point on the search split, in the unit squared."""
        return hypervolume(np.array([point.search for point in self.points]), self.reference)

    @property
    def lowest_mean(self) -> FrontPoint:
        """The point with the lowest mean of the two losses."""
        return min(self.points, key=lambda point: sum(point.search))

    @cached_property
    def knee(self) -> FrontPoint | None:
        """The point farthest below the line between the front's ends, both axes scaled to the front's range.

        Das (1999), "On characterizing the 'knee' of the Pareto curve based on normal-boundary intersection".  None
        where no point is below the line.
        """
        losses_N2 = np.array([point.search for point in self.points])
        ranges_2 = np.ptp(losses_N2, axis=0)
        if len(self.points) < FEWEST or not ranges_2.all():
            return None
        scaled_N2 = (losses_N2 - losses_N2.min(axis=0)) / ranges_2
        below_N = 1 - scaled_N2.sum(axis=1)
        deepest = int(below_N.argmax())
        return self.points[deepest] if below_N[deepest] > SLACK else None

    @property
    def held_out(self) -> tuple[FrontPoint, ...]:
        """The points that are scored on the held-out split."""
        return tuple(point for point in self.points if point.held_out is not None)

    @property
    def confirmed(self) -> int:
        """Number of these of which none of the others is better on the held-out split."""
        losses = [point.held_out for point in self.held_out]
        return int(non_dominated(np.array(losses, dtype=np.float64)).sum()) if losses else 0

    def note(self, point: FrontPoint) -> str:
        """The marks of a point: "knee", "lowest mean", both, or none."""
        special = {"lowest mean": self.lowest_mean, "knee": self.knee}
        return ", ".join(words for words, other in special.items() if other is point)

    def rows(self) -> list[dict[str, Any]]:
        """The points as flat rows, for tables and data frames.

        Columns: `w.NAME` the coefficients, `SPLIT.AXIS` the losses (None where not measured), `search.AXIS.gap` with
        `.gap_low` and `.gap_high` the loss above the front's lowest and its 95% interval, `violation`, `note`.
        """
        return [self._row(point) for point in self.points]

    def _row(self, point: FrontPoint) -> dict[str, Any]:
        row: dict[str, Any] = {f"w.{name}": weight for name, weight in (point.coefficients or {}).items()}
        for split, losses in (("search", point.search), ("held_out", point.held_out or (None, None))):
            row |= {f"{split}.{name}": loss for name, loss in zip(self.names, losses, strict=True)}
        for name, gap in zip(self.names, point.gaps, strict=True):
            ends = {end: value if np.isfinite(value) else None for end, value in (("low", gap.low), ("high", gap.high))}
            row |= {f"search.{name}.gap": gap.mean, **{f"search.{name}.gap_{end}": ends[end] for end in ends}}
        return row | {"violation": point.violation, "note": self.note(point)}
