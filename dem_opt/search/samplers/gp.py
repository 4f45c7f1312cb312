"""An exact Gaussian process in float64 over shares, from values and gradients: its fit and its posterior.

Shape suffixes beside the project's: N points with a value, G of them with a gradient, M query points, F shares,
D = F - 1 directions in the plane of constant sum, R = N + G D rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from dem_opt.search.samplers.kernel import Array, Kernel
from dem_opt.simplex import plane

NOISE_FLOOR = 1e-8
"""Least variance of the noise, in standardised values: keeps the covariance matrix invertible."""

_LENGTHSCALE, _BELL, _BOWL, _NOISE = (0.0, 0.5), (0.0, 1.0), (-2.0, 1.0), (np.log(1e-6), 2.0)
"""Means and standard deviations of the normal priors of log l, log s, log b, and of the logarithm of the noise's
variance above its floor: chosen on merge losses (LOG.md)."""

_QUADRATIC = (-2.0, 0.0)
"""log s and log b of what is nearly a quadratic."""

_REACH = 3.0
"""Bounds of the hyperparameters in standard deviations of their priors: Cholesky never fails inside."""


@dataclass(frozen=True, eq=False)
class Observations:
    """What was measured of f on {p : sum p = 1}.

    points_NF      shares
    values_N       f there
    variances_N    known variance of a value's noise; 0 where it was measured whole
    steep_G        the points that have a gradient
    gradients_GF   df/dp there; what is across the plane of constant sum does not count
    offset, scale  what is taken from values, and what they are divided by then
    """

    points_NF: Array
    values_N: Array
    variances_N: Array
    steep_G: NDArray[np.int64]
    gradients_GF: Array
    offset: float
    scale: float

    @cached_property
    def directions_FD(self) -> Array:
        """An orthonormal basis of the plane of constant sum."""
        return plane(self.points_NF.shape[1])

    @property
    def slopes(self) -> int:
        """G D, how many derivatives were observed."""
        return len(self.steep_G) * (len(self.directions_FD) - 1)

    @cached_property
    def standard_R(self) -> Array:
        """Values, then derivatives along the directions point by point, standardised."""
        slopes_GD = self.gradients_GF @ self.directions_FD
        return np.concatenate([self.values_N - self.offset, slopes_GD.ravel()]) / self.scale

    @cached_property
    def variances_R(self) -> Array:
        """Known variance of the noise of each row, standardised."""
        return np.pad(self.variances_N / self.scale**2, (0, self.slopes))

    def split(self, rows_MR: Array) -> tuple[Array, Array]:
        """Weights of rows [M, R] as weights of values [M, N] and of gradients' components [M, G, F]."""
        values_MN, slopes_MS = np.split(rows_MR, [len(self.values_N)], axis=1)
        return values_MN, slopes_MS.reshape(
            len(rows_MR), len(self.steep_G), len(self.directions_FD) - 1
        ) @ self.directions_FD.T

    def covariance(self, kernel: Kernel, points_MF: Array) -> Array:
        """cov(f(x), row), [M, R]."""
        slopes_MGF = kernel.slope(points_MF, self.points_NF[self.steep_G])
        slopes_MS = (slopes_MGF @ self.directions_FD).reshape(len(points_MF), self.slopes)
        return np.concatenate([kernel.value(points_MF, self.points_NF), slopes_MS], axis=1)

    def own_covariance(self, kernel: Kernel) -> Array:
        """cov(row, row), [R, R], without noise."""
        steep_GF, count = self.points_NF[self.steep_G], len(self.values_N)
        curve_GGDD = self.directions_FD.T @ kernel.curve(steep_GF, steep_GF) @ self.directions_FD
        own_RR = np.empty((len(self.standard_R), len(self.standard_R)))
        own_RR[:count] = self.covariance(kernel, self.points_NF)
        own_RR[count:, :count] = own_RR[:count, count:].T
        own_RR[count:, count:] = curve_GGDD.transpose(0, 2, 1, 3).reshape(own_RR[count:, count:].shape)
        return own_RR


def observe(
    points_NF: Array,
    values_N: Array,
    variances_N: Array | None = None,
    steep_G: NDArray[np.int64] | None = None,
    gradients_GF: Array | None = None,
) -> Observations:
    """Observations, standardised by their own mean and deviation; without noise or gradients where none are given."""
    count, shares = points_NF.shape
    return Observations(
        points_NF,
        values_N,
        np.zeros(count) if variances_N is None else variances_N,
        np.zeros(0, dtype=np.int64) if steep_G is None else steep_G,
        np.zeros((0, shares)) if gradients_GF is None else gradients_GF,
        float(values_N.mean()),
        float(values_N.std()) or 1.0,
    )


@dataclass(frozen=True, eq=False)
class Posterior:
    """Mean and variance of f at M points, with their gradients, in the units of the values."""

    mean_M: Array
    variance_M: Array
    mean_gradient_MF: Array
    variance_gradient_MF: Array


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """f ~ GP(0, k),  row = f or df/dp + noise.  Rasmussen and Williams (2006), algorithm 2.1 and section 9.4."""

    seen: Observations
    kernel: Kernel

    @cached_property
    def _inverse_factor_RR(self) -> Array:
        """inv(L) of the rows' covariance  C = L L'."""
        factor_RR = _factor(self.seen, self.kernel, self.seen.own_covariance(self.kernel))
        inverse_RR: Array = solve_triangular(factor_RR, np.eye(len(factor_RR)), lower=True)
        return inverse_RR

    @cached_property
    def _dual_R(self) -> Array:
        """inv(C) y."""
        dual_R: Array = self._inverse_factor_RR.T @ (self._inverse_factor_RR @ self.seen.standard_R)
        return dual_R

    def mean(self, points_MF: Array) -> Array:
        """The posterior mean  k' inv(C) y."""
        standard_M = self.seen.covariance(self.kernel, points_MF) @ self._dual_R
        mean_M: Array = self.seen.offset + self.seen.scale * standard_M
        return mean_M

    def posterior(self, points_MF: Array) -> Posterior:
        """Mean  k' inv(C) y  and variance  k(x, x) - k' inv(C) k,  with their gradients."""
        covariance_MR = self.seen.covariance(self.kernel, points_MF)
        solved_MR = covariance_MR @ self._inverse_factor_RR.T
        prior_M, prior_gradient_MF = self.kernel.variance(points_MF)
        variance_M = np.maximum(prior_M - (solved_MR**2).sum(axis=1), 1e-14)
        pull_MF = self._pull(points_MF, solved_MR @ self._inverse_factor_RR)
        return Posterior(
            mean_M=self.seen.offset + self.seen.scale * (covariance_MR @ self._dual_R),
            variance_M=self.seen.scale**2 * variance_M,
            mean_gradient_MF=self.seen.scale * self._pull(points_MF, self._dual_R[None, :]),
            variance_gradient_MF=self.seen.scale**2 * (prior_gradient_MF - 2 * pull_MF),
        )

    def _pull(self, points_MF: Array, rows_MR: Array) -> Array:
        """d/dx of  sum_r rows_r cov(f(x), row r),  [M, F]."""
        values_MN, slopes_MGF = self.seen.split(rows_MR)
        pull_MF = self.kernel.pull(points_MF, self.seen.points_NF, values_MN)
        return pull_MF + self.kernel.pull_slopes(points_MF, self.seen.points_NF[self.seen.steep_G], slopes_MGF)

    def believing(self, points_MF: Array) -> "GaussianProcess":
        """This process after its own posterior mean was observed at points still being evaluated."""
        seen = replace(
            self.seen,
            points_NF=np.concatenate([self.seen.points_NF, points_MF]),
            values_N=np.concatenate([self.seen.values_N, self.mean(points_MF)]),
            variances_N=np.pad(self.seen.variances_N, (0, len(points_MF))),
        )
        return GaussianProcess(seen, self.kernel)


def _factor(seen: Observations, kernel: Kernel, own_RR: Array) -> Array:
    """L of the rows' covariance with its noise,  C = L L'."""
    factor_RR: Array = cholesky(own_RR + np.diag(kernel.noise + NOISE_FLOOR + seen.variances_R), lower=True)
    return factor_RR


def fit(seen: Observations) -> GaussianProcess:
    """The process with the most probable hyperparameters (MAP), found by L-BFGS-B.

    From the priors' means, and from a quadratic's: few values can leave a mode at each.
    """
    loss = NegativeLogPosterior(seen)
    starts = [loss.prior_mean, np.concatenate([loss.prior_mean[:-3], _QUADRATIC, loss.prior_mean[-1:]])]
    found = [minimize(loss, start, jac=True, method="L-BFGS-B", bounds=loss.bounds) for start in starts]
    return GaussianProcess(seen, Kernel.of(min(found, key=lambda one: float(one.fun)).x))


class NegativeLogPosterior:
    """-log p(y | theta) - log p(theta) + const, with its gradient, as a function of theta (see Kernel.of).

    -log p(y | theta) = y' a / 2 + log det(C) / 2 + const  with  a = inv(C) y,  and its derivative is
    -tr(S dC/dtheta) / 2,  S = a a' - inv(C)  (Rasmussen and Williams 2006, equations 5.8 and 5.9).
    """

    def __init__(self, seen: Observations) -> None:
        self._seen = seen
        count = seen.points_NF.shape[1]
        self.prior_mean, self._deviation = np.array([_LENGTHSCALE] * count + [_BELL, _BOWL, _NOISE]).T
        flat = Kernel(np.ones(count), bell=0.0, bowl=0.0)
        self._flat_RR = seen.own_covariance(flat)
        self._bowl_RR = seen.own_covariance(replace(flat, bowl=1.0)) - self._flat_RR

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The box in which theta is looked for."""
        reach = _REACH * self._deviation
        return list(zip(self.prior_mean - reach, self.prior_mean + reach, strict=True))

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """Value and gradient."""
        kernel = Kernel.of(theta)
        bell_RR = self._seen.own_covariance(replace(kernel, bowl=0.0)) - self._flat_RR
        factor_RR = _factor(self._seen, kernel, bell_RR + kernel.bowl * self._bowl_RR + self._flat_RR)
        inverse_RR = cho_solve((factor_RR, True), np.eye(len(factor_RR)))
        dual_R = inverse_RR @ self._seen.standard_R
        away = (theta - self.prior_mean) / self._deviation
        loss = 0.5 * self._seen.standard_R @ dual_R + np.log(np.diag(factor_RR)).sum() + 0.5 * away @ away
        surplus_RR = np.outer(dual_R, dual_R) - inverse_RR
        by_scale = -np.array([(surplus_RR * bell_RR).sum(), kernel.bowl * (surplus_RR * self._bowl_RR).sum()])
        by_noise = -0.5 * kernel.noise * np.trace(surplus_RR)
        gradient = np.concatenate([self._by_lengthscale(kernel, surplus_RR), by_scale, [by_noise]])
        return float(loss), gradient + away / self._deviation

    def _by_lengthscale(self, kernel: Kernel, surplus_RR: Array) -> Array:
        """q_f times d/dq_f of  sum S C  over pairs of values, of a value and a slope, and of slopes."""
        seen, count = self._seen, len(self._seen.values_N)
        steep_GF = seen.points_NF[seen.steep_G]
        values_NN, slopes_NGF = seen.split(surplus_RR[:count])
        _, curve_GDGF = seen.split(surplus_RR[count:])
        curve_GDGF = curve_GDGF.reshape(len(steep_GF), len(seen.directions_FD) - 1, *curve_GDGF.shape[1:])
        curve_GGFF = np.einsum("fd,gdhe->ghfe", seen.directions_FD, curve_GDGF, optimize=True)
        by_values_F = kernel.by_precision(seen.points_NF, seen.points_NF, values_NN)
        by_slopes_F = kernel.by_precision(seen.points_NF, steep_GF, slopes_NGF)
        by_curves_F = kernel.by_precision(steep_GF, steep_GF, curve_GGFF)
        by_lengthscale_F: Array = by_values_F + 2 * by_slopes_F + by_curves_F
        return kernel.precision_F * by_lengthscale_F
