"""Bayesian optimization on the simplex: where a Gaussian process expects the greatest improvement."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr
from threadpoolctl import threadpool_limits

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.history import Trial, latest, thin, values_of
from dem_opt.search.samplers.sampler import Choice, first_new, first_points
from dem_opt.simplex import Coefficients, Space, project

Array = NDArray[np.float64]

ROWS = 300
"""Most derivatives that the process is fitted to."""

OBSERVATIONS = 200
"""Most observations that the process is fitted to: beyond them, half the best and half the most recent."""

APART = 1e-6
"""Points closer than this in every coefficient, as shares of the total, count as the same."""

RECENT = 8
"""Of how many latest trials the mean is what a new one is expected to cost."""

_STARTS = 64
_STEPS = 60

_LONGEST = 1e3
"""Longest step before projection: it reaches every corner, and loses few digits when it is projected."""


@dataclass(frozen=True)
class SimplexGP:
    """Known composites first, then the greatest expected improvement over the shares for what it costs.

    trials, forwards  the search's budgets: its last trial completes the best estimate

    The first proposals are the points that the study begins with, the vertices and the centroid.  Running
    trials are believed to come out at the posterior mean; failed ones count as the worst value seen.  A stopped trial's
    estimate has its standard error; gradients are derivative observations.  One thread is enough for matrices of this
    size, competes with no worker, and gives the same bits however many there are.

    A stopped trial is proposed again, to be completed, where the improvement on the best whole trial that is expected
    of it is greater, for each forward-equivalent that is missing, than that of a new trial for each that it will take.
    """

    space: Space
    trials: int | None = None
    forwards: float | None = None

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Choice:
        """The next point."""
        if (known := first_new(first_points(self.space, begin), trials)) is not None:
            return known
        if self.space.is_point or all(trial.objective is None for trial in trials):
            return Choice(self.space.sample(rng))
        with threadpool_limits(1, "blas"):
            process = self._process(trials)
            new = self._new(process, trials, rng)
            stopped = self._stopped(process, trials)
        if stopped is not None and (self._is_last(trials) or stopped.worth >= new.worth):
            return Choice(stopped.coefficients, stopped.expected)
        return Choice(new.coefficients, new.expected)

    def _process(self, trials: Sequence[Trial]) -> gp.GaussianProcess:
        """What is believed of the loss, running trials included."""
        running = [trial for trial in trials if trial.state == "running"]
        seen = self._observations(thin(latest(trials), OBSERVATIONS))
        return gp.fit(seen).believing(self._shares(running))

    def _new(self, process: gp.GaussianProcess, trials: Sequence[Trial], rng: np.random.Generator) -> "_Promise":
        """The greatest expected improvement on the best posterior mean, apart from all trials; else a draw."""
        seen, taken_NF = process.seen, self._shares(trials)
        best = float(process.mean(seen.points_NF).min())
        ranked_NF = seen.points_NF[np.argsort(seen.values_N, kind="stable")]
        candidates_MF, expected_M = maximize(
            lambda shares_MF: log_expected_improvement(process, best, shares_MF),
            project(_starts(ranked_NF, rng), self.space.caps_F),
            self.space.caps_F,
        )
        for shares_F, expected in zip(candidates_MF, expected_M, strict=True):
            if np.abs(taken_NF - shares_F).max(axis=1, initial=0).min() > APART:
                return _Promise(self.space.at(shares_F), float(expected), self._cost(trials))
        return _Promise(self.space.sample(rng), float(expected_M[0]), self._cost(trials))

    def _stopped(self, process: gp.GaussianProcess, trials: Sequence[Trial]) -> "_Promise | None":
        """The stopped trial that is most worth to be completed; None where none may improve on the whole ones."""
        running = {trial.coefficients for trial in trials if trial.state == "running"}
        told = [trial for trial in latest(trials) if trial.objective is not None]
        stopped = [trial for trial in told if trial.error and trial.coefficients not in running]
        best = min((trial.objective for trial in told if not trial.error and trial.objective is not None), default=inf)
        if not stopped or best == inf:
            return None
        log_expected_M, _ = log_expected_improvement(process, best, self._shares(stopped))
        found = zip(stopped, np.exp(log_expected_M).tolist(), strict=True)
        promises = [_Promise(one.coefficients, gain, 1 - one.forwards) for one, gain in found]
        return max((one for one in promises if one.expected > 0), key=lambda one: one.worth, default=None)

    def _cost(self, trials: Sequence[Trial]) -> float:
        """Forward-equivalents that a new trial may take: the mean of the latest ones that completed no other."""
        landmarks = set(self.space.landmarks())
        raced = [one for one in trials if one.coefficients not in landmarks and (one.error or one.forwards >= 1)]
        told = [trial.forwards for trial in raced if trial.state != "running"][-RECENT:]
        return float(np.mean(told)) if told else 1.0

    def _is_last(self, trials: Sequence[Trial]) -> bool:
        """Whether the budget is spent with the next trial."""
        spent = sum(trial.forwards for trial in trials)
        return (self.trials is not None and len(trials) + 1 >= self.trials) or (
            self.forwards is not None and spent + 1 >= self.forwards
        )

    def _observations(self, told: Sequence[Trial]) -> gp.Observations:
        """What the trials measured; gradients of the best and the latest ones, as many as ROWS allow."""
        most = max(ROWS // max(len(self.space.caps_F) - 1, 1), 1)
        steep = {trial.number for trial in thin([one for one in told if one.gradient], most)}
        steep_G = np.array([i for i, trial in enumerate(told) if trial.number in steep], dtype=np.int64)
        slopes_GK = [[told[i].gradient[name] for name in self.space.names] for i in steep_G]
        gradients_GF = np.array(slopes_GK).reshape(-1, self.space.dimension) @ self.space.jacobian()
        variances_N = np.array([trial.error for trial in told]) ** 2
        return gp.observe(self._shares(told), np.array(values_of(told)), variances_N, steep_G, gradients_GF)

    def _shares(self, trials: Iterable[Trial]) -> Array:
        shares = [self.space.shares(trial.coefficients) for trial in trials]
        return np.array(shares).reshape(-1, len(self.space.caps_F))


@dataclass(frozen=True)
class _Promise:
    """What may be proposed: the improvement that is expected of it in nats, and the forward-equivalents it may take."""

    coefficients: Coefficients
    expected: float
    cost: float

    @property
    def worth(self) -> float:
        """Nats that are expected for each forward-equivalent."""
        return self.expected / max(self.cost, 1e-3)


def log_expected_improvement(process: gp.GaussianProcess, best: float, shares_MF: Array) -> tuple[Array, Array]:
    """log E[max(best - f, 0)] = log h(z) + log sigma  with  z = (best - mean) / sigma, and its gradient.

    Ament et al. (2023), "Unexpected improvements to expected improvement for Bayesian optimization".
    """
    posterior = process.posterior(shares_MF)
    sigma_M = np.sqrt(posterior.variance_M)
    z_M = (best - posterior.mean_M) / sigma_M
    log_h_M, slope_M = log_h(z_M)
    by_mean_M = -slope_M / sigma_M
    by_variance_M = (1 - slope_M * z_M) / (2 * posterior.variance_M)
    gradient_MF = (
        by_mean_M[:, None] * posterior.mean_gradient_MF + by_variance_M[:, None] * posterior.variance_gradient_MF
    )
    return log_h_M + np.log(sigma_M), gradient_MF


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


def _starts(ranked_NF: Array, rng: np.random.Generator) -> Array:
    """Where to climb from: uniform points, sparse points, and the best points shaken a little."""
    shares = ranked_NF.shape[1]
    uniform_MF = rng.dirichlet(np.ones(shares), 4 * _STARTS)
    sparse_MF = rng.dirichlet(np.full(shares, 0.3), 4 * _STARTS)
    best_MF = np.resize(ranked_NF[:4], (_STARTS, shares))
    radius_M1 = np.exp(rng.uniform(np.log(1e-4), np.log(0.1), (_STARTS, 1)))
    return np.concatenate([uniform_MF, sparse_MF, best_MF + radius_M1 * rng.normal(size=best_MF.shape)])


def maximize(function: Callable[[Array], tuple[Array, Array]], starts_MF: Array, caps_F: Array) -> tuple[Array, Array]:
    """Local maxima over the capped unit simplex of a log function that gives values and gradients, the greatest first.

    Returns the points and the exponentials of their values.

    Projected gradient ascent with Barzilai and Borwein's step, shortened until Armijo's condition holds, from
    the most promising starts, all in one batch.  The projection reaches faces and corners exactly.
    """
    value_M = function(starts_MF)[0]
    points_MF = starts_MF[np.argsort(-value_M, kind="stable")[:_STARTS]]
    value_M, gradient_MF = _along(function, points_MF)
    step_M = 0.1 / _norm(gradient_MF)
    for _ in range(_STEPS):
        step_M = np.minimum(step_M, _LONGEST / _norm(gradient_MF))
        moved_MF = project(points_MF + step_M[:, None] * gradient_MF, caps_F)
        new_value_M, new_gradient_MF = _along(function, moved_MF)
        change_MF = moved_MF - points_MF
        accepted_M = new_value_M >= value_M + 1e-4 * (gradient_MF * change_MF).sum(axis=1)
        curvature_M = -(change_MF * (new_gradient_MF - gradient_MF)).sum(axis=1)
        squared_M = (change_MF**2).sum(axis=1)
        newton_M = np.divide(squared_M, curvature_M, out=10 * step_M, where=curvature_M > 1e-300)
        step_M = np.where(accepted_M, np.clip(newton_M, 0.1 * step_M, 10 * step_M), 0.2 * step_M)
        points_MF = np.where(accepted_M[:, None], moved_MF, points_MF)
        gradient_MF = np.where(accepted_M[:, None], new_gradient_MF, gradient_MF)
        value_M = np.where(accepted_M, new_value_M, value_M)
    order_M = np.argsort(-value_M, kind="stable")
    return points_MF[order_M], np.exp(value_M[order_M])


def _along(function: Callable[[Array], tuple[Array, Array]], points_MF: Array) -> tuple[Array, Array]:
    """The function's values and its gradients along the plane of constant sum."""
    value_M, gradient_MF = function(points_MF)
    return value_M, gradient_MF - gradient_MF.mean(axis=1, keepdims=True)


def _norm(gradient_MF: Array) -> Array:
    norm_M: Array = np.maximum(np.linalg.norm(gradient_MF, axis=1), 1e-12)
    return norm_M
