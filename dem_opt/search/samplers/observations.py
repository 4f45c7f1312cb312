"""What a Gaussian process is fitted to: trials as values and gradients over the shares.

Shape suffixes beside the project's: N trials, G of them with a gradient, F shares.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, log
from typing import Self

import numpy as np

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.covariance import Array
from dem_opt.search.samplers.history import Trial
from dem_opt.simplex import Coefficients, Space
from dem_opt.types import TrialRecord

DERIVATIVES = 300
"""Derivatives that a process is fitted to at most."""


@dataclass(frozen=True)
class Measurement:
    """A trial as a process sees it.

    Attributes:
        coefficients: Its point.
        value: Penalized objective, in the objective's unit.
        error: Standard error of the value.
        gradient: By distribution; empty where it was not measured.
        is_probe: The gradient is of one part of the windows.
        violation: Amount by which it exceeds what is allowed, in that unit; the value has its penalty.
    """

    coefficients: Coefficients
    value: float
    error: float = 0.0
    gradient: Mapping[str, float] = field(default_factory=dict)
    is_probe: bool = False
    violation: float = 0.0

    @classmethod
    def of_trial(cls, trial: Trial, value: float) -> Self:
        """A trial of a search, with a value for one that failed."""
        # The value of a failed trial is the worst of all, with its penalty.
        violation = inf if trial.objective is None else trial.attributes.violation
        return cls(trial.coefficients, value, trial.error, trial.gradient, trial.part is not None, violation)

    @classmethod
    def of_record(cls, record: TrialRecord) -> Self:
        """A trial that was measured."""
        assert record.penalized is not None
        return cls(record.coefficients, record.penalized, record.error, record.gradient, record.part is not None)

    def has_gradient(self, space: Space) -> bool:
        """True if it has a derivative along every distribution: one of a study that had fewer has not."""
        return self.gradient.keys() >= set(space.names)


def compressed(measured: Sequence[Measurement]) -> list[Measurement]:
    """Measurements with values far above the best brought closer, where some violate a constraint.

    Penalties may be a hundred times all other differences.  A process that has to explain them expects as much
    everywhere, and explores corners that are worse still.  How far off such a point is does not matter, so

        y' = y  up to  b + s ,    y' = b + s (1 + log((y - b) / s))  beyond,    dy'/dy = s / (y - b) ,

    where b is the least value and s the range of those without violation.  Errors and gradients follow by dy'/dy.
    """
    allowed = [each.value for each in measured if not each.violation]
    if len(allowed) == len(measured) or len(allowed) < 2 or (size := max(allowed) - min(allowed)) <= 0:
        return list(measured)
    best = min(each.value for each in measured)

    def closer(each: Measurement) -> Measurement:
        if each.value - best <= size:
            return each
        slope = size / (each.value - best)
        gradient = {name: slope * along for name, along in each.gradient.items()}
        return replace(each, value=best + size * (1 - log(slope)), error=slope * each.error, gradient=gradient)

    return [closer(each) for each in measured]


def most_gradients(space: Space) -> int:
    """Gradients that a process is fitted to at most."""
    return max(DERIVATIVES // max(len(space.caps_F) - 1, 1), 1)


def observe(
    space: Space,
    measured: Sequence[Measurement],
    steep: Iterable[int],
    anchor: Measurement | None = None,
    others: Sequence[str] = (),
) -> gp.Observations:
    """Values of all measurements, and the gradients of some.

    Windows differ in the anchor's gradient and in the way from it.  The former is known, so the error of a probe's
    gradient is in proportion to the latter: to its component along a direction of the plane of constant sum.

    Args:
        space: The coefficients.
        measured: The measurements.
        steep: Places of those whose gradients count.
        anchor: That with the gradient of all windows, if there are probes.
        others: Names beside the space's of which measurements have shares; no gradient is along them.
    """
    steep_G = np.array(sorted(steep), dtype=np.int64)
    gradients_GF = _gradients(space, [measured[place] for place in steep_G])
    errors_G = np.zeros(len(steep_G))
    if anchor is not None and len(steep_G):
        away_GF = gradients_GF - _gradients(space, [anchor])
        away_G = np.linalg.norm(away_GF - away_GF.mean(axis=1, keepdims=True), axis=1)
        is_probe_G = np.array([measured[place].is_probe for place in steep_G], dtype=bool)
        errors_G = np.where(is_probe_G, away_G, 0.0) / np.sqrt(max(gradients_GF.shape[1] - 1, 1))
    shares = [space.shares(each.coefficients, others) for each in measured]
    points_NF = np.array(shares).reshape(-1, len(space.caps_F) + len(others))
    values_N = np.array([each.value for each in measured], dtype=np.float64)
    variances_N = np.array([each.error for each in measured]) ** 2
    padded_GF = np.pad(gradients_GF, ((0, 0), (0, len(others))))
    return gp.observe(points_NF, values_N, variances_N, steep_G, padded_GF, errors_G, len(others))


def _gradients(space: Space, measured: Sequence[Measurement]) -> Array:
    """Gradients by shares, [G, F]."""
    slopes_GK = [[each.gradient[name] for name in space.names] for each in measured]
    gradients_GF: Array = np.array(slopes_GK).reshape(-1, space.dimension) @ space.jacobian()
    return gradients_GF
