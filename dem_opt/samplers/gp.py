"""An exact Gaussian process in float64: its fit to values, its posterior and the posterior's gradient.

Shape suffixes beside the project's: N observations, M query points, K coefficients.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]

NOISE_FLOOR = 1e-8
"""Least variance of the noise, in standardised values: keeps the covariance matrix invertible."""

_CONSTANT = 25.0
"""Prior variance of the constant, in standardised values."""

_PRIOR = (0.0, 1.0)
"""Mean and standard deviation of the normal prior of log l, log s and log b."""

_NOISE_PRIOR = (np.log(1e-6), 2.0)
"""The same of the logarithm of the noise's variance above its floor."""

_REACH = 3.0
"""Bounds of the hyperparameters in standard deviations of their priors: Cholesky never fails inside."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """The covariance of f: a constant, a prior over quadratics about the centroid, and what is neither.

    k(x, y) = c + b^2 (1 + 2 <x - 1/K, y - 1/K>)^2 + s^2 exp(-sum_i (x_i - y_i)^2 / (2 l_i^2))

    A merge's loss is nearly quadratic in the shares x, so the middle term tells most of it from few observations.
    """

    precision_K: Array
    """1 / l_i^2"""
    bell: float
    """s^2"""
    bowl: float
    """b^2"""
    noise: float
    """Variance of an observation's noise; no part of k."""

    @classmethod
    def of(cls, theta: Array) -> Self:
        """From logarithms: K lengthscales l, s, b, and the noise's variance above its floor."""
        *_, bell, bowl = np.exp(2 * theta[:-1])
        noise = float(np.exp(theta[-1])) + NOISE_FLOOR
        return cls(np.exp(-2 * theta[:-3]), float(bell), float(bowl), noise)

    def parts(self, x_MK: Array, y_NK: Array) -> tuple[Array, Array]:
        """The bell  s^2 exp(...)  and the line  1 + 2 <x - 1/K, y - 1/K>,  each [M, N]."""
        squares_MNK = (x_MK[:, None, :] - y_NK[None, :, :]) ** 2
        bell_MN = self.bell * np.exp(-0.5 * squares_MNK @ self.precision_K)
        return bell_MN, 1 + 2 * _centred(x_MK) @ _centred(y_NK).T

    def covariance(self, x_MK: Array, y_NK: Array) -> Array:
        """k(x, y), [M, N]."""
        return self.total(*self.parts(x_MK, y_NK))

    def total(self, bell_MN: Array, line_MN: Array) -> Array:
        """k from its parts."""
        return _CONSTANT + self.bowl * line_MN**2 + bell_MN

    def variance(self, x_MK: Array) -> tuple[Array, Array]:
        """k(x, x) and its gradient  8 b^2 (1 + 2 |x - 1/K|^2) (x - 1/K)."""
        centred_MK = _centred(x_MK)
        line_M1 = 1 + 2 * (centred_MK**2).sum(axis=1, keepdims=True)
        return _CONSTANT + self.bowl * line_M1[:, 0] ** 2 + self.bell, 8 * self.bowl * line_M1 * centred_MK


@dataclass(frozen=True, eq=False)
class Posterior:
    """Mean and variance of f at M points, with their gradients, in the units of the values."""

    mean_M: Array
    variance_M: Array
    mean_gradient_MK: Array
    variance_gradient_MK: Array


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """f ~ GP(0, k),  y = f(x) + noise,  with y = (value - offset) / scale.

    Rasmussen and Williams (2006), algorithm 2.1.
    """

    points_NK: Array
    standard_N: Array
    offset: float
    scale: float
    kernel: Kernel

    @cached_property
    def _inverse_factor_NN(self) -> Array:
        """inv(L) of the observations' covariance  C = L L'."""
        covariance_NN = self.kernel.covariance(self.points_NK, self.points_NK)
        identity_NN = np.eye(len(covariance_NN))
        factor_NN = cholesky(covariance_NN + self.kernel.noise * identity_NN, lower=True)
        inverse_NN: Array = solve_triangular(factor_NN, identity_NN, lower=True)
        return inverse_NN

    @cached_property
    def _dual_N(self) -> Array:
        """inv(C) y."""
        dual_N: Array = self._inverse_factor_NN.T @ (self._inverse_factor_NN @ self.standard_N)
        return dual_N

    def mean(self, points_MK: Array) -> Array:
        """The posterior mean  k' inv(C) y."""
        covariance_MN = self.kernel.covariance(points_MK, self.points_NK)
        mean_M: Array = self.offset + self.scale * (covariance_MN @ self._dual_N)
        return mean_M

    def posterior(self, points_MK: Array) -> Posterior:
        """Mean  k' inv(C) y  and variance  k(x, x) - k' inv(C) k,  with their gradients."""
        bell_MN, line_MN = self.kernel.parts(points_MK, self.points_NK)
        covariance_MN = self.kernel.total(bell_MN, line_MN)
        solved_MN = covariance_MN @ self._inverse_factor_NN.T
        prior_M, prior_gradient_MK = self.kernel.variance(points_MK)

        def differentiate(weights_MN: Array) -> Array:
            """sum_n weights_n dk(x, x_n) / dx."""
            bell_weights_MN = weights_MN * bell_MN
            pull_MK = bell_weights_MN @ self.points_NK - bell_weights_MN.sum(axis=1, keepdims=True) * points_MK
            bowl_MK = 4 * self.kernel.bowl * (weights_MN * line_MN) @ _centred(self.points_NK)
            gradient_MK: Array = pull_MK * self.kernel.precision_K + bowl_MK
            return gradient_MK

        variance_M = np.maximum(prior_M - (solved_MN**2).sum(axis=1), 1e-14)
        variance_gradient_MK = prior_gradient_MK - 2 * differentiate(solved_MN @ self._inverse_factor_NN)
        return Posterior(
            mean_M=self.offset + self.scale * (covariance_MN @ self._dual_N),
            variance_M=self.scale**2 * variance_M,
            mean_gradient_MK=self.scale * differentiate(self._dual_N[None, :]),
            variance_gradient_MK=self.scale**2 * variance_gradient_MK,
        )

    def believing(self, points_MK: Array) -> "GaussianProcess":
        """This process after its own posterior mean was observed at points still being evaluated."""
        believed_M = (self.mean(points_MK) - self.offset) / self.scale
        points_NK = np.concatenate([self.points_NK, points_MK])
        standard_N = np.concatenate([self.standard_N, believed_M])
        return GaussianProcess(points_NK, standard_N, self.offset, self.scale, self.kernel)


def fit(points_NK: Array, values_N: Array) -> GaussianProcess:
    """The process with the most probable hyperparameters (MAP), found by L-BFGS-B from the priors' means."""
    offset, scale = float(values_N.mean()), float(values_N.std()) or 1.0
    standard_N = (values_N - offset) / scale
    loss = NegativeLogPosterior(points_NK, standard_N)
    found = minimize(loss, loss.prior_mean, jac=True, method="L-BFGS-B", bounds=loss.bounds)
    return GaussianProcess(points_NK, standard_N, offset, scale, Kernel.of(found.x))


class NegativeLogPosterior:
    """-log p(y | theta) - log p(theta) + const, with its gradient, as a function of theta (see Kernel.of).

    -log p(y | theta) = y' a / 2 + log det(C) / 2 + const  with  a = inv(C) y,  and its derivative is
    -tr((a a' - inv(C)) dC/dtheta) / 2  (Rasmussen and Williams 2006, equations 5.8 and 5.9).
    """

    def __init__(self, points_NK: Array, standard_N: Array) -> None:
        self._points_NK, self._standard_N = points_NK, standard_N
        self._squares_NNK = (points_NK[:, None, :] - points_NK[None, :, :]) ** 2
        self.prior_mean, self._deviation = np.array([_PRIOR] * (points_NK.shape[1] + 2) + [_NOISE_PRIOR]).T

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The box in which theta is looked for."""
        reach = _REACH * self._deviation
        return list(zip(self.prior_mean - reach, self.prior_mean + reach, strict=True))

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """Value and gradient."""
        kernel = Kernel.of(theta)
        bell_NN, line_NN = kernel.parts(self._points_NK, self._points_NK)
        identity_NN = np.eye(len(bell_NN))
        factor_NN = cholesky(kernel.total(bell_NN, line_NN) + kernel.noise * identity_NN, lower=True)
        inverse_NN = cho_solve((factor_NN, True), identity_NN)
        dual_N = inverse_NN @ self._standard_N
        away = (theta - self.prior_mean) / self._deviation
        loss = 0.5 * self._standard_N @ dual_N + np.log(np.diag(factor_NN)).sum() + 0.5 * away @ away
        surplus_NN = np.outer(dual_N, dual_N) - inverse_NN
        bell_surplus_NN = surplus_NN * bell_NN
        by_lengthscale_K = -0.5 * np.tensordot(bell_surplus_NN, self._squares_NNK, 2) * kernel.precision_K
        by_bowl = -kernel.bowl * (surplus_NN * line_NN**2).sum()
        by_noise = -0.5 * (kernel.noise - NOISE_FLOOR) * np.trace(surplus_NN)
        gradient = np.array([*by_lengthscale_K, -bell_surplus_NN.sum(), by_bowl, by_noise])
        return float(loss), gradient + away / self._deviation


def _centred(points_MK: Array) -> Array:
    centred_MK: Array = points_MK - 1 / points_MK.shape[1]
    return centred_MK
