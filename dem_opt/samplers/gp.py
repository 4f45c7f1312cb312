"""An exact Gaussian process in float64: its fit to values, its posterior and the posterior's gradient.

Shape suffixes beside the project's: N observations, M query points, K coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]

NOISE_FLOOR = 1e-8
"""Least variance of the noise, of standardised values: keeps the covariance matrix invertible."""

_CONSTANT = 25.0
"""Prior variance of the constant mean of standardised values."""

_LENGTHSCALE, _SIGNAL, _NOISE = (0.0, 1.0), (0.0, 1.5), (np.log(1e-6), 2.0)
"""Mean and standard deviation of the normal priors of the logarithms: lengthscales, signal's deviation, noise's variance."""


@dataclass(frozen=True)
class Hyperparameters:
    """What the kernel depends on, as logarithms."""

    log_lengthscale_K: Array
    log_signal: float
    log_noise: float

    @classmethod
    def of(cls, theta: Array) -> Self:
        """From one vector (K lengthscales, signal, noise)."""
        return cls(theta[:-2], float(theta[-2]), float(theta[-1]))

    @property
    def precision_K(self) -> Array:
        """1 / l_i^2."""
        precision_K: Array = np.exp(-2 * self.log_lengthscale_K)
        return precision_K

    @property
    def signal(self) -> float:
        """The kernel's variance s^2."""
        return float(np.exp(2 * self.log_signal))

    @property
    def noise(self) -> float:
        """The noise's variance."""
        return float(np.exp(self.log_noise)) + NOISE_FLOOR


def squared_exponential(distance: Array, hyper: Hyperparameters) -> Array:
    """k(x, y) = s^2 exp(-d/2) from the squared distances  d = sum_i (x_i - y_i)^2 / l_i^2."""
    kernel: Array = hyper.signal * np.exp(-0.5 * distance)
    return kernel


@dataclass(frozen=True, eq=False)
class Posterior:
    """Mean and variance at M points, with their gradients, in the units of the values."""

    mean_M: Array
    variance_M: Array
    mean_gradient_MK: Array
    variance_gradient_MK: Array


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """f ~ GP(0, c + k),  y = f(x) + noise,  with y = (value - offset) / scale.

    Rasmussen and Williams (2006), algorithm 2.1, with the constant mean integrated out as a constant kernel c.
    """

    points_NK: Array
    standard_N: Array
    offset: float
    scale: float
    hyper: Hyperparameters

    @cached_property
    def _inverse_factor_NN(self) -> Array:
        """inv(L) of the covariance  L L' = c + k(X, X) + noise."""
        distance_NN = _differences(self.points_NK, self.points_NK) ** 2 @ self.hyper.precision_K
        covariance_NN = squared_exponential(distance_NN, self.hyper) + _CONSTANT
        covariance_NN[np.diag_indices_from(covariance_NN)] += self.hyper.noise
        inverse_NN: Array = solve_triangular(
            cholesky(covariance_NN, lower=True), np.eye(len(covariance_NN)), lower=True
        )
        return inverse_NN

    @cached_property
    def _dual_N(self) -> Array:
        """inv(L L') y."""
        dual_N: Array = self._inverse_factor_NN.T @ (self._inverse_factor_NN @ self.standard_N)
        return dual_N

    def mean(self, points_MK: Array) -> Array:
        """Posterior mean  k' inv(K) y."""
        distance_MN = _differences(points_MK, self.points_NK) ** 2 @ self.hyper.precision_K
        kernel_MN = squared_exponential(distance_MN, self.hyper) + _CONSTANT
        mean_M: Array = self.offset + self.scale * (kernel_MN @ self._dual_N)
        return mean_M

    def posterior(self, points_MK: Array) -> Posterior:
        """Mean  k' inv(K) y  and variance  k(x, x) - k' inv(K) k  of f, not of a noisy observation of it."""
        difference_MNK = _differences(points_MK, self.points_NK)
        kernel_MN = squared_exponential(difference_MNK**2 @ self.hyper.precision_K, self.hyper)
        solved_MN = (kernel_MN + _CONSTANT) @ self._inverse_factor_NN.T
        variance_M = self.hyper.signal + _CONSTANT - (solved_MN**2).sum(axis=1)

        def against(weights_MN: Array) -> Array:
            """sum_n weights_n dk(x, x_n)/dx_i  =  -sum_n weights_n k(x, x_n) (x - x_n)_i / l_i^2."""
            weighted_MN = weights_MN * kernel_MN
            spread_MK = weighted_MN @ self.points_NK - weighted_MN.sum(axis=1, keepdims=True) * points_MK
            gradient_MK: Array = spread_MK * self.hyper.precision_K
            return gradient_MK

        return Posterior(
            mean_M=self.offset + self.scale * ((kernel_MN + _CONSTANT) @ self._dual_N),
            variance_M=self.scale**2 * np.maximum(variance_M, 1e-14),
            mean_gradient_MK=self.scale * against(self._dual_N[None, :]),
            variance_gradient_MK=-2 * self.scale**2 * against(solved_MN @ self._inverse_factor_NN),
        )

    def believing(self, points_MK: Array) -> "GaussianProcess":
        """This process with its own posterior mean observed at points still being evaluated (kriging believer)."""
        if not len(points_MK):
            return self
        believed_M = (self.mean(points_MK) - self.offset) / self.scale
        points_NK = np.concatenate([self.points_NK, points_MK])
        standard_N = np.concatenate([self.standard_N, believed_M])
        return GaussianProcess(points_NK, standard_N, self.offset, self.scale, self.hyper)


def fit(points_NK: Array, values_N: Array) -> GaussianProcess:
    """The process with the most probable hyperparameters (MAP), found by L-BFGS-B from the priors' means."""
    offset, scale = float(values_N.mean()), float(values_N.std()) or 1.0
    standard_N = (values_N - offset) / scale
    loss = NegativeLogPosterior(points_NK, standard_N)
    found = minimize(loss, loss.prior_mean, jac=True, method="L-BFGS-B", bounds=loss.bounds)
    return GaussianProcess(points_NK, standard_N, offset, scale, Hyperparameters.of(found.x))


class NegativeLogPosterior:
    """-log p(y | X, theta) - log p(theta) + const, with its gradient, as a function of theta.

    -log p(y) = y' inv(C) y / 2 + log det(C) / 2;   d/dtheta = -tr((a a' - inv(C)) dC/dtheta) / 2,  a = inv(C) y
    (Rasmussen and Williams 2006, equations 5.8 and 5.9).
    """

    def __init__(self, points_NK: Array, standard_N: Array) -> None:
        self._standard_N = standard_N
        self._squares_NNK = _differences(points_NK, points_NK) ** 2
        priors = np.array([_LENGTHSCALE] * points_NK.shape[1] + [_SIGNAL, _NOISE])
        self.prior_mean, self._deviation = priors.T

    @property
    def bounds(self) -> Sequence[tuple[float, float]]:
        """Four prior standard deviations to each side."""
        reach = 4 * self._deviation
        return list(zip(self.prior_mean - reach, self.prior_mean + reach, strict=True))

    def __call__(self, theta: Array) -> tuple[float, Array]:
        hyper = Hyperparameters.of(theta)
        kernel_NN = squared_exponential(self._squares_NNK @ hyper.precision_K, hyper)
        identity_NN = np.eye(len(kernel_NN))
        factor_NN = cholesky(kernel_NN + _CONSTANT + hyper.noise * identity_NN, lower=True)
        inverse_NN = cho_solve((factor_NN, True), identity_NN)
        dual_N = inverse_NN @ self._standard_N
        surplus_NN = np.outer(dual_N, dual_N) - inverse_NN
        weighted_NN = surplus_NN * kernel_NN
        away = (theta - self.prior_mean) / self._deviation
        loss = 0.5 * self._standard_N @ dual_N + np.log(np.diag(factor_NN)).sum() + 0.5 * away @ away
        by_lengthscale_K = -0.5 * np.tensordot(weighted_NN, self._squares_NNK, 2) * hyper.precision_K
        by_noise = -0.5 * np.trace(surplus_NN) * (hyper.noise - NOISE_FLOOR)
        return float(loss), np.array([*by_lengthscale_K, -weighted_NN.sum(), by_noise]) + away / self._deviation


def _differences(points_MK: Array, points_NK: Array) -> Array:
    """Pairwise x - y, [M, N, K]."""
    return points_MK[:, None, :] - points_NK[None, :, :]
