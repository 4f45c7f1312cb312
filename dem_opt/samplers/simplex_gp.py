"""Bayesian optimization on the simplex: where a Gaussian process expects the greatest improvement."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr
from threadpoolctl import threadpool_limits

from dem_opt.samplers import gp
from dem_opt.samplers.history import Trial
from dem_opt.simplex import Coefficients, Space, project

Array = NDArray[np.float64]

OBSERVATIONS = 200
"""Most observations that the process is fitted to: beyond them, half the best and half the most recent."""

APART = 1e-6
"""Points closer than this in every coefficient, as shares of the total, count as the same."""

_STARTS = 64
_STEPS = 60

_LONGEST = 1e3
"""Longest step before projection: it reaches every corner, and loses few digits when it is projected."""


@dataclass(frozen=True)
class SimplexGP:
    """Known composites first, then the greatest expected improvement over the shares w / total.

    The first proposals are the points that the study begins with, the vertices and the centroid.  Running
    trials are believed to come out at the posterior mean; failed ones count as the worst value seen.  One thread
    is enough for matrices of this size, competes with no resident, and gives the same bits however many there are.
    """

    space: Space

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Coefficients:
        """The next point."""
        taken = {trial.coefficients for trial in trials}
        for point in (*begin, *self.space.landmarks()):
            if point not in taken:
                return point
        if all(trial.objective is None for trial in trials):
            return self.space.sample(rng)
        taken_NK = self._shares(trials)
        with threadpool_limits(1, "blas"):
            candidates_MK = self._improving(trials, rng)
        for share_K in candidates_MK:
            if np.abs(taken_NK - share_K).max(axis=1).min() > APART:
                return self.space.nearest(share_K * self.space.total)
        return self.space.sample(rng)

    def _improving(self, trials: Sequence[Trial], rng: np.random.Generator) -> Array:
        """Local maxima of the expected improvement as shares, the greatest first."""
        told = _thin([trial for trial in trials if trial.state != "running"])
        running = [trial for trial in trials if trial.state == "running"]
        values_N = _values(told)
        process = gp.fit(self._shares(told), values_N).believing(self._shares(running))
        best = float(process.mean(process.points_NK).min())
        return maximize(
            lambda shares_MK: log_expected_improvement(process, best, shares_MK),
            _starts(self._shares(told)[np.argsort(values_N, kind="stable")], rng),
        )

    def _shares(self, trials: Iterable[Trial]) -> Array:
        points = [self.space.point(trial.coefficients) / self.space.total for trial in trials]
        return np.array(points).reshape(-1, self.space.dimension)


def _thin(told: Sequence[Trial]) -> list[Trial]:
    """At most OBSERVATIONS trials: the best half of that number, and the most recent of the others."""
    if len(told) <= OBSERVATIONS:
        return list(told)
    ranked = sorted(told, key=lambda trial: (np.inf if trial.objective is None else trial.objective, trial.number))
    best, others = ranked[: OBSERVATIONS // 2], ranked[OBSERVATIONS // 2 :]
    recent = sorted(others, key=lambda trial: trial.number)[-(OBSERVATIONS - len(best)) :]
    return sorted([*best, *recent], key=lambda trial: trial.number)


def _values(told: Sequence[Trial]) -> Array:
    """Objectives; a failed trial's is the worst of the others."""
    worst = max(trial.objective for trial in told if trial.objective is not None)
    return np.array([worst if trial.objective is None else trial.objective for trial in told])


def log_expected_improvement(process: gp.GaussianProcess, best: float, shares_MK: Array) -> tuple[Array, Array]:
    """log E[max(best - f, 0)] = log h(z) + log sigma  with  z = (best - mean) / sigma, and its gradient.

    Ament et al. (2023), "Unexpected improvements to expected improvement for Bayesian optimization".
    """
    posterior = process.posterior(shares_MK)
    sigma_M = np.sqrt(posterior.variance_M)
    z_M = (best - posterior.mean_M) / sigma_M
    log_h_M, slope_M = log_h(z_M)
    by_mean_M = -slope_M / sigma_M
    by_variance_M = (1 - slope_M * z_M) / (2 * posterior.variance_M)
    gradient_MK = (
        by_mean_M[:, None] * posterior.mean_gradient_MK + by_variance_M[:, None] * posterior.variance_gradient_MK
    )
    return log_h_M + np.log(sigma_M), gradient_MK


def log_h(z_M: Array) -> tuple[Array, Array]:
    """log h(z),  h(z) = phi(z) + z Phi(z),  and its derivative Phi(z) / h(z), for any z.

    Below -1 through Mills' ratio r = Phi / phi, as h = phi (1 + z r); below -300, where the sum would cancel,
    by the first terms of its expansion,  1 + z r = z^-2 - 3 z^-4 + 15 z^-6.
    """
    near_M, far_M = np.maximum(z_M, -1.0), np.minimum(z_M, -300.0)
    h_M = _density(near_M) + near_M * ndtr(near_M)
    middle_M = np.clip(z_M, -300.0, -1.0)
    mills_M = np.sqrt(np.pi / 2) * erfcx(-middle_M / np.sqrt(2))
    reduced_M = 1 + middle_M * mills_M
    expanded_M = far_M**-2 * (1 - 3 * far_M**-2 + 15 * far_M**-4)
    log_phi_M = -0.5 * z_M**2 - 0.5 * np.log(2 * np.pi)
    cases = [z_M > -1, z_M > -300]
    value_M = np.select(cases, [np.log(h_M), log_phi_M + np.log(reduced_M)], log_phi_M + np.log(expanded_M))
    slope_M = np.select(cases, [ndtr(near_M) / h_M, mills_M / reduced_M], -far_M - 2 / far_M)
    return value_M, slope_M


def _density(z_M: Array) -> Array:
    density_M: Array = np.exp(-0.5 * z_M**2) / np.sqrt(2 * np.pi)
    return density_M


def _starts(ranked_NK: Array, rng: np.random.Generator) -> Array:
    """Where to climb from: uniform points, sparse points, and the best points shaken a little."""
    dimension = ranked_NK.shape[1]
    uniform_MK = rng.dirichlet(np.ones(dimension), 4 * _STARTS)
    sparse_MK = rng.dirichlet(np.full(dimension, 0.3), 4 * _STARTS)
    best_MK = np.resize(ranked_NK[:4], (_STARTS, dimension))
    radius_M1 = np.exp(rng.uniform(np.log(1e-4), np.log(0.1), (_STARTS, 1)))
    shaken_MK = best_MK + radius_M1 * rng.normal(size=best_MK.shape)
    return project(np.concatenate([uniform_MK, sparse_MK, shaken_MK]), 1.0)


def maximize(function: Callable[[Array], tuple[Array, Array]], starts_MK: Array) -> Array:
    """Local maxima over the unit simplex of a function that gives values and gradients, the greatest first.

    Projected gradient ascent with Barzilai and Borwein's step, shortened until Armijo's condition holds, from
    the most promising starts, all in one batch.  The projection reaches faces and corners exactly.
    """
    value_M = function(starts_MK)[0]
    points_MK = starts_MK[np.argsort(-value_M, kind="stable")[:_STARTS]]
    value_M, gradient_MK = _along(function, points_MK)
    step_M = 0.1 / _norm(gradient_MK)
    for _ in range(_STEPS):
        step_M = np.minimum(step_M, _LONGEST / _norm(gradient_MK))
        moved_MK = project(points_MK + step_M[:, None] * gradient_MK, 1.0)
        new_value_M, new_gradient_MK = _along(function, moved_MK)
        change_MK = moved_MK - points_MK
        accepted_M = new_value_M >= value_M + 1e-4 * (gradient_MK * change_MK).sum(axis=1)
        curvature_M = -(change_MK * (new_gradient_MK - gradient_MK)).sum(axis=1)
        squared_M = (change_MK**2).sum(axis=1)
        newton_M = np.divide(squared_M, curvature_M, out=10 * step_M, where=curvature_M > 1e-300)
        step_M = np.where(accepted_M, np.clip(newton_M, 0.1 * step_M, 10 * step_M), 0.2 * step_M)
        points_MK = np.where(accepted_M[:, None], moved_MK, points_MK)
        gradient_MK = np.where(accepted_M[:, None], new_gradient_MK, gradient_MK)
        value_M = np.where(accepted_M, new_value_M, value_M)
    return points_MK[np.argsort(-value_M, kind="stable")]


def _along(function: Callable[[Array], tuple[Array, Array]], points_MK: Array) -> tuple[Array, Array]:
    """The function's values and its gradients along the plane of constant sum."""
    value_M, gradient_MK = function(points_MK)
    return value_M, gradient_MK - gradient_MK.mean(axis=1, keepdims=True)


def _norm(gradient_MK: Array) -> Array:
    norm_M: Array = np.maximum(np.linalg.norm(gradient_MK, axis=1), 1e-12)
    return norm_M
