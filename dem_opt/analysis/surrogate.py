"""The surrogate of a study: Gaussian processes fitted to all its trials, their minimum, and a slice through that.

The penalized objective has a sharp bend where a protected corpus reaches its limit, and a smooth process through a
sharp bend dips below everything that was measured beside it.  So the objective without penalties and the excess of each
protected corpus over its limit have a process each, and the penalized objective is predicted as

    m(w)  =  m_objective(w) + PENALTY sum_c max(0, m_c(w)) .
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.observations import Measurement, most_gradients, observe
from dem_opt.search.samplers.simplex_gp import Array, maximize
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.types import PENALTY, Surrogate, TrialRecord

FEWEST = 3
"""Trials below which no process is fitted."""

MOST = 120
"""Trials that the process is fitted to at most: the best half, and the latest of the others."""

STARTS = 16
"""Best trials, and as many random points, from which the minimum is searched."""

LINE, TRIANGLE = 60, 20
"""Divisions of the slice's lattice over two and over three distributions."""


@dataclass(frozen=True)
class Prediction:
    """Mean of the penalized objective, and deviation of the objective without penalties, in its unit."""

    mean: float
    standard_deviation: float


@dataclass(frozen=True)
class Fit:
    """Processes over the space's shares.

    Attributes:
        objective: The objective without penalties.
        excess: Loss of each protected corpus minus its limit, of those that some trial is beyond.
    """

    objective: gp.GaussianProcess
    excess: tuple[gp.GaussianProcess, ...] = ()

    def penalty(self, shares_MF: Array) -> Array:
        """The expected penalty, [M]."""
        beyond = (np.maximum(process.mean(shares_MF), 0.0) for process in self.excess)
        return PENALTY * sum(beyond, np.zeros(len(shares_MF)))

    def mean(self, shares_MF: Array) -> Array:
        """The expected penalized objective, [M]."""
        return self.objective.mean(shares_MF) + self.penalty(shares_MF)

    def gradient(self, shares_MF: Array) -> Array:
        """Its gradient by shares, [M, F]."""
        gradient_MF = self.objective.posterior(shares_MF).mean_gradient_MF
        for process in self.excess:
            posterior = process.posterior(shares_MF)
            gradient_MF = gradient_MF + PENALTY * (posterior.mean_M > 0)[:, None] * posterior.mean_gradient_MF
        return gradient_MF

    def at(self, shares_F: Array) -> Prediction:
        """The prediction at a point, with the deviation of the objective."""
        variance = self.objective.posterior(shares_F[None, :]).variance_M
        return Prediction(float(self.mean(shares_F[None, :])[0]), float(variance[0] ** 0.5))


def fit(space: Space, trials: Sequence[TrialRecord], limits: Mapping[str, float] | None = None) -> Fit | None:
    """Fit the processes to trials of any runs; None where there are too few.

    Args:
        space: Coefficient space.
        trials: Finished trials.
        limits: Greatest allowed loss of each protected corpus on the search split, in the objective's unit.
    """
    fitted = _fitted(trials)
    if space.is_point or len(fitted) < FEWEST:
        return None
    return Fit(_fit_objective(space, fitted), fit_excess(space, fitted, limits))


def predict(
    space: Space, trials: Sequence[TrialRecord], coefficients: Coefficients, limits: Mapping[str, float] | None = None
) -> Prediction | None:
    """Predict the objective at a point of the space, from trials of any runs; None where there are too few."""
    with threadpool_limits(1, "blas"):
        surrogate = fit(space, trials, limits)
        return None if surrogate is None else surrogate.at(space.shares(coefficients))


def surrogate_of(
    space: Space, trials: Sequence[TrialRecord], limits: Mapping[str, float] | None = None
) -> Surrogate | None:
    """The surrogate of trials of any searches, the latest of each composite; None where there are too few."""
    fitted = _fitted(trials)
    with threadpool_limits(1, "blas"):
        surrogate = fit(space, fitted, limits)
        if surrogate is None:
            return None
        lowest = optimum(space, surrogate, fitted)
        prediction = surrogate.at(space.shares(lowest))
        names, points = _slice(space, lowest)
        means = surrogate.mean(np.array([space.shares(point) for point in points]).reshape(-1, len(space.caps_F)))
    return Surrogate(
        optimum=lowest,
        mean=prediction.mean,
        deviation=prediction.standard_deviation,
        names=names,
        points=points,
        means=tuple(np.round(means, 6).tolist()),
        trials=len(fitted),
    )


def _objective(trial: TrialRecord) -> float:
    """The penalized objective of a trial that has one, in the objective's unit."""
    assert trial.penalized is not None
    return trial.penalized


def _fitted(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The latest measured trial of each composite, MOST at most: the best half, and the latest of the others."""
    latest = list({trial.coefficients: trial for trial in trials if trial.penalized is not None}.values())
    if len(latest) <= MOST:
        return latest
    best = sorted(latest, key=_objective)[: MOST // 2]
    chosen = {trial.coefficients for trial in best}
    others = [trial for trial in latest if trial.coefficients not in chosen]
    return best + others[-(MOST - len(best)) :]


def _fit_objective(space: Space, trials: Sequence[TrialRecord]) -> gp.GaussianProcess:
    """The objective's process; estimates enter with their standard errors, and the best trials with their gradients."""
    measured = [_unpenalized(trial) for trial in trials]
    steep = [place for place, each in enumerate(measured) if each.has_gradient(space)]
    anchor = next((place for place in steep if not measured[place].is_probe), None)
    best = sorted(steep, key=lambda place: (place != anchor, measured[place].value))[: most_gradients(space)]
    return gp.fit(observe(space, measured, best, None if anchor is None else measured[anchor]))


def _unpenalized(trial: TrialRecord) -> Measurement:
    """A trial with its objective; a gradient that has a penalty in it does not count."""
    assert trial.objective is not None
    measured = replace(Measurement.of_record(trial), value=trial.objective)
    return replace(measured, gradient={}) if trial.violation else measured


def fit_excess(
    space: Space, trials: Sequence[TrialRecord], limits: Mapping[str, float] | None
) -> tuple[gp.GaussianProcess, ...]:
    """Processes of protected corpora that a trial on all windows is beyond the limit of (see `fit`)."""
    whole = [trial for trial in trials if not trial.is_partial]
    points_NF = np.array([space.shares(trial.coefficients) for trial in whole]).reshape(-1, len(space.caps_F))
    excesses = [
        np.array([trial.scores[name].loss(trial.unit) - limit for trial in whole])
        for name, limit in (limits or {}).items()
    ]
    return tuple(gp.fit(gp.observe(points_NF, excess_N)) for excess_N in excesses if (excess_N > 0).any())


def optimum(space: Space, surrogate: Fit, trials: Sequence[TrialRecord]) -> Coefficients:
    """The minimum of the expected penalized objective, searched from the best trials and from random points between."""
    # Differences to the offset: small ones are not lost in rounding.
    observations = surrogate.objective.observations

    def descent(shares_MF: Array) -> tuple[Array, Array]:
        away_M = surrogate.mean(shares_MF) - observations.offset
        return -away_M / observations.scale, -surrogate.gradient(shares_MF) / observations.scale

    ranked = sorted(trials, key=_objective)[:STARTS]
    best_NF = np.array([space.shares(trial.coefficients) for trial in ranked])
    draws_MF = np.random.default_rng(0).dirichlet(np.ones(best_NF.shape[1]), STARTS)
    starts_MF = space.polytope.project(np.concatenate([best_NF, draws_MF]))
    optima_MF, _ = maximize(descent, starts_MF, space.polytope)
    return space.at(optima_MF[0])


def _slice(space: Space, lowest: Coefficients) -> tuple[tuple[str, ...], tuple[Coefficients, ...]]:
    """The three distributions of which the optimum has most, and a lattice over their part of the total.

    Names come in the space's order; all other coefficients stay at the optimum's.
    """
    units = lowest.units
    largest = sorted(space.names, key=lambda name: -units[name])[:3]
    names = tuple(name for name in space.names if name in largest)
    rest = sum(units[name] for name in names)
    if len(names) < 2 or not rest:
        return names, ()
    lattice = Space(names, rest / UNIT).lattice(LINE if len(names) == 2 else TRIANGLE)
    points = (Coefficients(tuple((units | point.units).items())) for point in lattice)
    return names, tuple(point for point in points if space.contains(point))
