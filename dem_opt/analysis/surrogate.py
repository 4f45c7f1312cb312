"""The surrogate of a study: a Gaussian process fitted to all its trials, its minimum, and a slice through that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.observations import Measurement, most_gradients, observe
from dem_opt.search.samplers.simplex_gp import Array, maximize
from dem_opt.simplex import UNIT, Coefficients, Space, project
from dem_opt.types import Surrogate, TrialRecord

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
    """A surrogate's prediction of the penalized objective, in the objective's unit."""

    mean: float
    standard_deviation: float


def process_of(space: Space, trials: Sequence[TrialRecord]) -> gp.GaussianProcess | None:
    """The process over the space's shares, fitted to trials of any runs; None where there are too few."""
    fitted = _fitted(trials)
    return None if space.is_point or len(fitted) < FEWEST else _fit(space, fitted)


def predict(space: Space, trials: Sequence[TrialRecord], coefficients: Coefficients) -> Prediction | None:
    """Predict the objective at a point of the space, from trials of any runs; None where there are too few."""
    with threadpool_limits(1, "blas"):
        process = process_of(space, trials)
        if process is None:
            return None
        posterior = process.posterior(space.shares(coefficients)[None, :])
    return Prediction(float(posterior.mean_M[0]), float(posterior.variance_M[0] ** 0.5))


def surrogate_of(space: Space, trials: Sequence[TrialRecord]) -> Surrogate | None:
    """The process fitted to trials of any searches, the latest of each composite; None where there are too few."""
    fitted = _fitted(trials)
    if space.is_point or len(fitted) < FEWEST:
        return None
    with threadpool_limits(1, "blas"):
        process = _fit(space, fitted)
        lowest = optimum(space, process, fitted)
        posterior = process.posterior(space.shares(lowest)[None, :])
        names, points = _slice(space, lowest)
        means = process.mean(np.array([space.shares(point) for point in points]).reshape(-1, len(space.caps_F)))
    return Surrogate(
        optimum=lowest,
        mean=float(posterior.mean_M[0]),
        deviation=float(posterior.variance_M[0] ** 0.5),
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


def _fit(space: Space, trials: Sequence[TrialRecord]) -> gp.GaussianProcess:
    """The process; estimates enter with their standard errors, and the best trials with their gradients too."""
    measured = [Measurement.of_record(trial) for trial in trials]
    steep = [place for place, each in enumerate(measured) if each.has_gradient(space)]
    anchor = next((place for place in steep if not measured[place].is_probe), None)
    best = sorted(steep, key=lambda place: (place != anchor, measured[place].value))[: most_gradients(space)]
    return gp.fit(observe(space, measured, best, None if anchor is None else measured[anchor]))


def optimum(space: Space, process: gp.GaussianProcess, trials: Sequence[TrialRecord]) -> Coefficients:
    """The minimum of the posterior mean, searched from the best trials and from random points between."""

    def descent(shares_MF: Array) -> tuple[Array, Array]:
        posterior, scale = process.posterior(shares_MF), process.observations.scale
        # `maximize` takes logarithms: the standardised mean keeps their exponentials within floats.
        return -posterior.mean_M / scale, -posterior.mean_gradient_MF / scale

    ranked = sorted(trials, key=_objective)[:STARTS]
    best_NF = np.array([space.shares(trial.coefficients) for trial in ranked])
    draws_MF = np.random.default_rng(0).dirichlet(np.ones(best_NF.shape[1]), STARTS)
    starts_MF = project(np.concatenate([best_NF, draws_MF]), space.caps_F)
    optima_MF, _ = maximize(descent, starts_MF, space.caps_F)
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
