"""What the trials of a study say of places where none was: a Gaussian process's mean, and where it is lowest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.simplex_gp import Array, maximize
from dem_opt.simplex import UNIT, Coefficients, Space, project
from dem_opt.types import Surrogate, TrialRecord

FEWEST = 3
"""Trials below which nothing is believed."""

MOST = 120
"""Trials that the process is fitted to: beyond them, half the best and half the most recent."""

LINE, TRIANGLE = 60, 20
"""Divisions of the lattice over two and over three distributions."""


@dataclass(frozen=True)
class Prediction:
    """A surrogate's prediction of the penalized objective, in nats per token."""

    mean: float
    standard_deviation: float


def predict(space: Space, trials: Sequence[TrialRecord], coefficients: Coefficients) -> Prediction | None:
    """Predict the objective at a point of the space, from trials of any runs; None where there are too few."""
    known = _thinned(list({trial.coefficients: trial for trial in trials if trial.penalized is not None}.values()))
    if space.is_point or len(known) < FEWEST:
        return None
    with threadpool_limits(1, "blas"):
        posterior = _fit(space, known).posterior(space.shares(coefficients)[None, :])
    return Prediction(float(posterior.mean_M[0]), float(posterior.variance_M[0] ** 0.5))


def surrogate_of(space: Space, trials: Sequence[TrialRecord]) -> Surrogate | None:
    """The process fitted to trials of any searches, the latest of each composite; None where there are too few."""
    told = _thinned(list({one.coefficients: one for one in trials if one.penalized is not None}.values()))
    if space.is_point or len(told) < FEWEST:
        return None
    with threadpool_limits(1, "blas"):
        process = _fit(space, told)
        optimum = _optimum(space, process, told)
        belief = process.posterior(space.shares(optimum)[None, :])
        names, points = _slice(space, optimum)
        means = process.mean(np.array([space.shares(point) for point in points]).reshape(-1, len(space.caps_F)))
    return Surrogate(
        optimum=optimum,
        mean=float(belief.mean_M[0]),
        deviation=float(belief.variance_M[0] ** 0.5),
        names=names,
        points=points,
        means=tuple(np.round(means, 6).tolist()),
        trials=len(told),
    )


def _thinned(told: list[TrialRecord]) -> list[TrialRecord]:
    """MOST at most: the best half, and the latest of the others."""
    if len(told) <= MOST:
        return told
    ranked = sorted(told, key=lambda one: one.penalized or 0.0)
    best = ranked[: MOST // 2]
    chosen = {one.coefficients for one in best}
    others = [one for one in told if one.coefficients not in chosen]
    return best + others[-(MOST - len(best)) :]


def _fit(space: Space, told: Sequence[TrialRecord]) -> gp.GaussianProcess:
    points_NF = np.array([space.shares(one.coefficients) for one in told])
    values_N = np.array([one.penalized for one in told], dtype=np.float64)
    return gp.fit(gp.observe(points_NF, values_N, np.array([one.error for one in told]) ** 2))


def _optimum(space: Space, process: gp.GaussianProcess, told: Sequence[TrialRecord]) -> Coefficients:
    """Where the mean is lowest, climbed to from the best trials and from a few places between."""

    def promise(shares_MF: Array) -> tuple[Array, Array]:
        belief = process.posterior(shares_MF)
        scale = process.seen.scale
        return -belief.mean_M / scale, -belief.mean_gradient_MF / scale

    ranked = sorted(told, key=lambda one: one.penalized or 0.0)[:16]
    best_NF = np.array([space.shares(one.coefficients) for one in ranked])
    draws_MF = np.random.default_rng(0).dirichlet(np.ones(best_NF.shape[1]), 16)
    starts_MF = project(np.concatenate([best_NF, draws_MF]), space.caps_F)
    found_MF, _ = maximize(promise, starts_MF, space.caps_F)
    return space.at(found_MF[0])


def _slice(space: Space, optimum: Coefficients) -> tuple[tuple[str, ...], tuple[Coefficients, ...]]:
    """The distributions that vary, in the space's order, and a lattice over what the optimum gives them together."""
    units = optimum.units
    largest = sorted(space.names, key=lambda name: -units[name])[:3]
    names = tuple(name for name in space.names if name in largest)
    rest = sum(units[name] for name in names)
    if len(names) < 2 or not rest:
        return names, ()
    lattice = Space(names, rest / UNIT).lattice(LINE if len(names) == 2 else TRIANGLE)
    points = (Coefficients(tuple((units | point.units).items())) for point in lattice)
    return names, tuple(point for point in points if space.contains(point))
