"""An exact Gaussian process in float64 over shares, from values and gradients: its fit and its posterior.

A *row* is one scalar observation: first the N values, then of each point with a gradient its D derivatives along the
plane of constant sum.  Values are standardised by their own mean and deviation; derivatives are divided by the same
deviation.

Shape suffixes beside the project's: N points with a value, G of them with a gradient, M query points, F shares,
D = F - 1 directions in the plane of constant sum, S = G D derivatives, R = N + G D rows.  Points may have shares of
vectors that the space has not (`Observations.others`): F counts these too, and D does not.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

from dem_opt.search.samplers.covariance import CURVATURE, Array, Kernel
from dem_opt.simplex import plane

NOISE_FLOOR = 1e-8
"""Least variance of the noise, in standardised values: keeps the covariance matrix invertible."""

VARIANCE_FLOOR = 1e-14
"""Least posterior variance, in standardised values: at an observed point rounding can make it negative."""

_LENGTHSCALE, _BELL, _BOWL, _NOISE = (0.0, 0.5), (0.0, 1.0), (-2.0, 1.0), (np.log(1e-6), 2.0)
"""Means and standard deviations of the normal priors of log l, log s, log b, and of the logarithm of the noise's
variance above its floor: chosen on merge losses (dev/LOG.md)."""

_SLOPE_NOISE = (np.log(0.1), 0.7)
"""Mean and standard deviation of the normal prior of log r, the relative error of gradients of few windows: it was 0.07
to 0.08 for an eighth of 64 windows (dev/LOG.md)."""

_QUADRATIC = (-2.0, 0.0)
"""log s and log b of a function that is nearly a quadratic."""

MANY = 128
"""Rows beyond which one mode is left, a quadratic's."""

_TOLERANCE = 1e-7
"""Relative decrease of -log p(theta | y) at which L-BFGS-B ends: about 1e-4 of its unit, a nat, from the minimum."""

_REACH = 3.0
"""Bounds of the hyperparameters in standard deviations of their priors: Cholesky never fails inside."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Observations:
    """Measurements of f on {p : sum p = 1}.

    Attributes:
        points_NF: Shares.
        values_N: f there.
        variances_N: Known variance of each value's noise; 0 where all windows were scored.
        steep_G: Indices of the points that have a gradient.
        gradients_GF: df/dp there; the part across the plane of constant sum does not count.
        errors_G: Standard error of a gradient's components along the plane where their relative error is 1; 0 where all
            windows were scored.
        offset: Subtracted from values to standardise them.
        scale: Divisor of the values then, and of gradients.
        others: Number of the last shares along which no gradient is known: those of vectors that the space has not.
    """

    points_NF: Array
    values_N: Array
    variances_N: Array
    steep_G: NDArray[np.int64]
    gradients_GF: Array
    errors_G: Array
    offset: float
    scale: float
    others: int = 0

    @cached_property
    def directions_FD(self) -> Array:
        """An orthonormal basis of the plane of constant sum, in the shares of the space."""
        return np.pad(plane(self.points_NF.shape[1] - self.others), ((0, self.others), (0, 0)))

    @property
    def curvature(self) -> float:
        """Prior variance of the curvature that all directions share: 0 without gradients, from which it is learned."""
        return CURVATURE if len(self.steep_G) else 0.0

    @property
    def slopes(self) -> int:
        """G D, the number of observed derivatives."""
        return len(self.steep_G) * int(self.directions_FD.shape[1])

    @cached_property
    def standard_R(self) -> Array:
        """Values, then derivatives along the directions point by point, standardised."""
        slopes_GD = self.gradients_GF @ self.directions_FD
        return np.concatenate([self.values_N - self.offset, slopes_GD.ravel()]) / self.scale

    @property
    def has_noisy_slopes(self) -> bool:
        """True if a gradient is of few windows."""
        return bool(self.errors_G.any())

    @cached_property
    def variances_R(self) -> Array:
        """Known variance of the noise of each row, standardised."""
        return np.pad(self.variances_N / self.scale**2, (0, self.slopes))

    @cached_property
    def slope_variances_R(self) -> Array:
        """Variance of the noise of each row where gradients have a relative error of 1, standardised."""
        directions = self.directions_FD.shape[1]
        return np.pad(np.repeat((self.errors_G / self.scale) ** 2, directions), (len(self.values_N), 0))

    def split(self, rows_MR: Array) -> tuple[Array, Array]:
        """Weights of rows [M, R] as weights of values [M, N] and of gradients' components [M, G, F].

        A derivative along d_k is  sum_f d_fk df/dp_f , so its weight goes to the components in proportion to d_fk.
        """
        values_MN, slopes_MS = np.split(rows_MR, [len(self.values_N)], axis=1)
        slopes_MGD = slopes_MS.reshape(len(rows_MR), len(self.steep_G), self.directions_FD.shape[1])
        return values_MN, slopes_MGD @ self.directions_FD.T

    def covariance(self, kernel: Kernel, points_MF: Array) -> Array:
        """cov(f(x), row) at points x, [M, R]."""
        slopes_MGF = kernel.slope(points_MF, self.points_NF[self.steep_G])
        slopes_MS = (slopes_MGF @ self.directions_FD).reshape(len(points_MF), self.slopes)
        return np.concatenate([kernel.value(points_MF, self.points_NF), slopes_MS], axis=1)

    def own_covariance(self, kernel: Kernel) -> Array:
        """cov(row, row), [R, R], without noise."""
        steep_GF, count = self.points_NF[self.steep_G], len(self.values_N)
        curve_GGDD = self.directions_FD.T @ kernel.curve(steep_GF, steep_GF) @ self.directions_FD
        # [[values x values, values x slopes], [slopes x values, slopes x slopes]]
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
    errors_G: Array | None = None,
    others: int = 0,
) -> Observations:
    """Observations, standardised by their own mean and deviation; by default without noise and gradients."""
    count, shares = points_NF.shape
    return Observations(
        points_NF=points_NF,
        values_N=values_N,
        variances_N=np.zeros(count) if variances_N is None else variances_N,
        steep_G=np.zeros(0, dtype=np.int64) if steep_G is None else steep_G,
        gradients_GF=np.zeros((0, shares)) if gradients_GF is None else gradients_GF,
        errors_G=np.zeros(0 if steep_G is None else len(steep_G)) if errors_G is None else errors_G,
        offset=float(values_N.mean()),
        scale=float(values_N.std()) or 1.0,  # equal values everywhere have no deviation
        others=others,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior:
    """Mean and variance of f at M points, with their gradients by shares, in the units of the values."""

    mean_M: Array
    variance_M: Array
    mean_gradient_MF: Array
    variance_gradient_MF: Array


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """f ~ GP(0, k),  row = f or df/dp + noise.

    Rasmussen and Williams (2006), "Gaussian Processes for Machine Learning": algorithm 2.1, and section 9.4 for
    derivative observations.  Derivatives of a Gaussian process are jointly Gaussian with its values, so they are rows
    like values, with derivatives of the kernel as covariances.
    """

    observations: Observations
    kernel: Kernel

    @cached_property
    def _inverse_factor_RR(self) -> Array:
        """inv(L) of the rows' covariance  C = L L'.

        Formed once, because the acquisition function asks for the posterior at hundreds of points in turn.
        """
        factor_RR = _factor(self.observations, self.kernel, self.observations.own_covariance(self.kernel))
        inverse_RR: Array = solve_triangular(factor_RR, np.eye(len(factor_RR)), lower=True)
        return inverse_RR

    @cached_property
    def _dual_R(self) -> Array:
        """inv(C) y."""
        dual_R: Array = self._inverse_factor_RR.T @ (self._inverse_factor_RR @ self.observations.standard_R)
        return dual_R

    def mean(self, points_MF: Array) -> Array:
        """The posterior mean  k' inv(C) y."""
        standard_M = self.observations.covariance(self.kernel, points_MF) @ self._dual_R
        mean_M: Array = self.observations.offset + self.observations.scale * standard_M
        return mean_M

    def mean_weights(self, points_MF: Array) -> Array:
        """The weight of each observed value in the posterior mean, k' inv(C), [M, N], without gradients' weights.

        The mean is linear in the values, so this gives it for other values at the same points.
        """
        covariance_MR = self.observations.covariance(self.kernel, points_MF)
        weights_MR: Array = covariance_MR @ self._inverse_factor_RR.T @ self._inverse_factor_RR
        return weights_MR[:, : len(self.observations.values_N)]

    def posterior(self, points_MF: Array) -> Posterior:
        """Mean  k' inv(C) y  and variance  k(x, x) - k' inv(C) k,  with their gradients."""
        covariance_MR = self.observations.covariance(self.kernel, points_MF)
        solved_MR = covariance_MR @ self._inverse_factor_RR.T
        prior_M, prior_gradient_MF = self.kernel.variance(points_MF)
        # k' inv(C) k = |inv(L) k|^2, a sum of squares, which loses fewer digits than the quadratic form.
        variance_M = np.maximum(prior_M - (solved_MR**2).sum(axis=1), VARIANCE_FLOOR)
        pull_MF = self._pull(points_MF, solved_MR @ self._inverse_factor_RR)
        return Posterior(
            mean_M=self.observations.offset + self.observations.scale * (covariance_MR @ self._dual_R),
            variance_M=self.observations.scale**2 * variance_M,
            mean_gradient_MF=self.observations.scale * self._pull(points_MF, self._dual_R[None, :]),
            variance_gradient_MF=self.observations.scale**2 * (prior_gradient_MF - 2 * pull_MF),
        )

    def _pull(self, points_MF: Array, rows_MR: Array) -> Array:
        """d/dx of  sum_r rows_r cov(f(x), row r),  [M, F]."""
        values_MN, slopes_MGF = self.observations.split(rows_MR)
        pull_MF = self.kernel.pull(points_MF, self.observations.points_NF, values_MN)
        return pull_MF + self.kernel.pull_slopes(
            points_MF, self.observations.points_NF[self.observations.steep_G], slopes_MGF
        )

    def believing(self, points_MF: Array) -> "GaussianProcess":
        """This process after its own posterior mean was observed at points that are still being evaluated.

        Offset and scale stay, so these observations change no other prediction of the mean: they only take the variance
        away around the points ("kriging believer", Ginsbourger, Le Riche and Carraro 2010).
        """
        observations = replace(
            self.observations,
            points_NF=np.concatenate([self.observations.points_NF, points_MF]),
            values_N=np.concatenate([self.observations.values_N, self.mean(points_MF)]),
            variances_N=np.pad(self.observations.variances_N, (0, len(points_MF))),
        )
        return GaussianProcess(observations, self.kernel)


def _factor(observations: Observations, kernel: Kernel, own_RR: Array) -> Array:
    """L of the rows' covariance with its noise,  C = L L'."""
    noise_R = kernel.noise + NOISE_FLOOR + observations.variances_R
    if kernel.slope_noise:
        noise_R = noise_R + kernel.slope_noise * observations.slope_variances_R
    factor_RR: Array = cholesky(own_RR + np.diag(noise_R), lower=True)
    return factor_RR


def _inverse(factor_RR: Array) -> Array:
    """inv(C) of  C = L L', in a third of the operations of solving for the columns of the unit matrix."""
    lower_RR, _ = dpotri(factor_RR, lower=True)  # and zeros above the diagonal, as in L
    inverse_RR: Array = lower_RR + lower_RR.T
    np.fill_diagonal(inverse_RR, np.diag(lower_RR))
    return inverse_RR


def fit(observations: Observations) -> GaussianProcess:
    """The process with the most probable hyperparameters (MAP), found by L-BFGS-B.

    From a quadratic's, and from the priors' means: few rows can leave a mode at each.
    """
    loss = NegativeLogPosterior(observations)
    quadratic = loss.prior_mean.copy()
    shares = observations.points_NF.shape[1]
    quadratic[shares : shares + 2] = _QUADRATIC
    starts = [loss.prior_mean, quadratic]
    if len(observations.standard_R) > MANY:
        del starts[0]
    options = {"ftol": _TOLERANCE}
    optima = [
        minimize(loss, start, jac=True, method="L-BFGS-B", bounds=loss.bounds, options=options) for start in starts
    ]
    best = min(optima, key=lambda optimum: float(optimum.fun))
    return GaussianProcess(observations, Kernel.of(best.x, shares, observations.curvature))


class NegativeLogPosterior:
    """-log p(y | theta) - log p(theta) + const, with its gradient, as a function of theta (see Kernel.of).

    -log p(y | theta) = y' a / 2 + log det(C) / 2 + const  with  a = inv(C) y,  and its derivative is
    -tr(S dC/dtheta) / 2,  S = a a' - inv(C)  (Rasmussen and Williams 2006, equations 5.8 and 5.9).
    """

    def __init__(self, observations: Observations) -> None:
        self._observations = observations
        count = observations.points_NF.shape[1]
        priors = [_LENGTHSCALE] * count + [_BELL, _BOWL, _NOISE]
        priors += [_SLOPE_NOISE] if observations.has_noisy_slopes else []
        self.prior_mean, self._deviation = np.array(priors).T
        # Constant, curvature and bowl depend on theta through a factor at most: their matrices are made once.
        flat = Kernel(precision_F=np.ones(count), bell=0.0, bowl=0.0, curvature=observations.curvature)
        self._flat_RR = observations.own_covariance(flat)
        self._bowl_RR = observations.own_covariance(replace(flat, bowl=1.0)) - self._flat_RR

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The box that theta is searched in."""
        reach = _REACH * self._deviation
        return list(zip(self.prior_mean - reach, self.prior_mean + reach, strict=True))

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """Value, and gradient by theta."""
        kernel = Kernel.of(theta, self._observations.points_NF.shape[1], self._observations.curvature)
        bell_RR = self._observations.own_covariance(replace(kernel, bowl=0.0)) - self._flat_RR
        factor_RR = _factor(self._observations, kernel, bell_RR + kernel.bowl * self._bowl_RR + self._flat_RR)
        inverse_RR = _inverse(factor_RR)
        dual_R = inverse_RR @ self._observations.standard_R
        away = (theta - self.prior_mean) / self._deviation
        # log det(C) / 2 = sum log diag(L)
        loss = 0.5 * self._observations.standard_R @ dual_R + np.log(np.diag(factor_RR)).sum() + 0.5 * away @ away
        surplus_RR = np.outer(dual_R, dual_R) - inverse_RR
        # theta are logarithms: d bell / d log s = 2 bell, d bowl / d log b = 2 bowl, d noise / d log noise = noise.
        by_scale = -np.array([(surplus_RR * bell_RR).sum(), kernel.bowl * (surplus_RR * self._bowl_RR).sum()])
        by_noise = [-0.5 * kernel.noise * np.trace(surplus_RR)]
        if kernel.slope_noise:  # r^2: d / d log r = 2 r^2
            by_noise += [-kernel.slope_noise * (np.diag(surplus_RR) @ self._observations.slope_variances_R)]
        gradient = np.concatenate([self._by_lengthscale(kernel, surplus_RR), by_scale, by_noise])
        return float(loss), gradient + away / self._deviation

    def _by_lengthscale(self, kernel: Kernel, surplus_RR: Array) -> Array:
        """q_f times d/dq_f of  sum S C  over pairs of values, of a value and a slope, and of slopes."""
        observations, count = self._observations, len(self._observations.values_N)
        points_NF, directions_FD = observations.points_NF, observations.directions_FD
        steep_GF = points_NF[observations.steep_G]
        values_NN, slopes_NGF = observations.split(surplus_RR[:count])
        _, curve_GDGF = observations.split(surplus_RR[count:])
        curve_GDGF = curve_GDGF.reshape(len(steep_GF), directions_FD.shape[1], *curve_GDGF.shape[1:])
        curve_GGFF = np.einsum("fd,gdhe->ghfe", directions_FD, curve_GDGF, optimize=True)
        by_values_F = kernel.by_precision(points_NF, points_NF, values_NN)
        by_slopes_F = kernel.by_precision(points_NF, steep_GF, slopes_NGF)
        by_curves_F = kernel.by_precision(steep_GF, steep_GF, curve_GGFF)
        # S is symmetric: the block of values and slopes counts twice.
        by_lengthscale_F: Array = by_values_F + 2 * by_slopes_F + by_curves_F
        return kernel.precision_F * by_lengthscale_F
