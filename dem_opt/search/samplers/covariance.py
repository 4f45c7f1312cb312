"""The covariance of a merge's loss over shares, and its derivatives in both arguments.

Shape suffixes beside the project's: M and N points, G points at which a gradient was observed, F shares.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONSTANT = 25.0
"""Prior variance of the constant, in standardised values."""

CURVATURE = 25.0
"""Prior variance of the curvature that all directions share, in standardised values, where gradients are known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """The covariance of f: a constant, a round bowl, a prior over quadratics about the centroid, and a residual.

    k(x, y) = c + d |u|^2 |v|^2 + b^2 L^2 + E,    u = x - 1/F,  v = y - 1/F,  L = 1 + 2 <u, v>,
    E = s^2 exp(-sum_i q_i r_i^2 / 2),  r = x - y

    A merge's loss is nearly quadratic in the shares x, so the term in L (the *bowl*: a polynomial kernel of degree 2,
    Rasmussen and Williams 2006, section 4.2.2) explains most of it from few observations.  E, the *bell*, is the
    squared exponential with a lengthscale for each share (their equation 5.1).

    The term in d is for gradients.  A few of them tell the curvature along a few directions, and the bowl expects none
    along the others, where a search then goes to the corners.  But the vectors of different distributions are nearly
    orthogonal, so that a merge's curvature is about the same in all directions: d is the variance of what they share.

    Attributes:
        precision_F: q_i, one over a lengthscale squared.
        bell: s^2, variance of the residual.
        bowl: b^2, variance of the quadratic.
        noise: Variance of an observation's noise; no part of k.
        curvature: d, variance of the curvature that all directions share.
        slope_noise: r^2, squared relative error of gradients of few windows; no part of k.
    """

    precision_F: Array
    bell: float
    bowl: float
    noise: float = 0.0
    curvature: float = 0.0
    slope_noise: float = 0.0

    @classmethod
    def of(cls, theta: Array, shares: int, curvature: float = 0.0) -> Self:
        """From the logarithms of F lengthscales, of s, of b, of the noise's variance, perhaps of r: [F + 3 or 4]."""
        bell, bowl = np.exp(2 * theta[shares : shares + 2])
        return cls(
            precision_F=np.exp(-2 * theta[:shares]),
            bell=float(bell),
            bowl=float(bowl),
            noise=float(np.exp(theta[shares + 2])),
            curvature=curvature,
            slope_noise=float(np.exp(2 * theta[shares + 3 :]).sum()),
        )

    def parts(self, x_MF: Array, y_NF: Array) -> tuple[Array, Array]:
        """E and L, each [M, N]."""
        squares_MNF = (x_MF[:, None, :] - y_NF[None, :, :]) ** 2
        return self.bell * np.exp(-0.5 * squares_MNF @ self.precision_F), 1 + 2 * centred(x_MF) @ centred(y_NF).T

    def value(self, x_MF: Array, y_NF: Array) -> Array:
        """k(x, y), [M, N]."""
        bell_MN, line_MN = self.parts(x_MF, y_NF)
        return CONSTANT + self.curvature * np.outer(square(x_MF), square(y_NF)) + self.bowl * line_MN**2 + bell_MN

    def slope(self, x_MF: Array, y_GF: Array) -> Array:
        """dk/dy_j = E q_j r_j + 4 b^2 L u_j + 2 d |u|^2 v_j,  [M, G, F]."""
        bell_MG, line_MG = self.parts(x_MF, y_GF)
        steep_MGF = (x_MF[:, None, :] - y_GF[None, :, :]) * self.precision_F
        bowl_MGF = 4 * self.bowl * line_MG[..., None] * centred(x_MF)[:, None, :]
        round_MGF = 2 * self.curvature * square(x_MF)[:, None, None] * centred(y_GF)
        slope_MGF: Array = bell_MG[..., None] * steep_MGF + bowl_MGF + round_MGF
        return slope_MGF

    def curve(self, x_MF: Array, y_GF: Array) -> Array:
        """d2k/dx_i dy_j, [M, G, F, F]:

        E (q_i [i = j] - q_i r_i q_j r_j) + b^2 (8 v_i u_j + 4 L [i = j]) + 4 d u_i v_j .
        """
        bell_MG, line_MG = self.parts(x_MF, y_GF)
        steep_MGF = (x_MF[:, None, :] - y_GF[None, :, :]) * self.precision_F
        same_FF = np.eye(len(self.precision_F))
        bell_MGFF = np.diag(self.precision_F) - steep_MGF[..., :, None] * steep_MGF[..., None, :]
        crossed_MGFF = centred(y_GF)[None, :, :, None] * centred(x_MF)[:, None, None, :]
        bowl_MGFF = 8 * crossed_MGFF + 4 * line_MG[..., None, None] * same_FF
        round_MGFF = 4 * centred(x_MF)[:, None, :, None] * centred(y_GF)[None, :, None, :]
        curve_MGFF: Array = bell_MG[..., None, None] * bell_MGFF + self.bowl * bowl_MGFF + self.curvature * round_MGFF
        return curve_MGFF

    def variance(self, x_MF: Array) -> tuple[Array, Array]:
        """k(x, x) and its gradient  (4 d |u|^2 + 8 b^2 (1 + 2 |u|^2)) u."""
        square_M1 = square(x_MF)[:, None]
        line_M1 = 1 + 2 * square_M1
        variance_M1 = CONSTANT + self.curvature * square_M1**2 + self.bowl * line_M1**2 + self.bell
        return variance_M1[:, 0], (4 * self.curvature * square_M1 + 8 * self.bowl * line_M1) * centred(x_MF)

    def pull(self, x_MF: Array, y_NF: Array, weights_MN: Array) -> Array:
        """d/dx of  sum_n weights_n k(x, y_n),  [M, F]."""
        bell_MN, line_MN = self.parts(x_MF, y_NF)
        pulled_MN = weights_MN * bell_MN
        bell_MF = (pulled_MN @ y_NF - pulled_MN.sum(axis=1, keepdims=True) * x_MF) * self.precision_F
        round_M1 = (weights_MN @ square(y_NF))[:, None]
        bowl_MF = self.bowl * (weights_MN * line_MN) @ centred(y_NF)
        pull_MF: Array = bell_MF + 4 * bowl_MF + 2 * self.curvature * round_M1 * centred(x_MF)
        return pull_MF

    def pull_slopes(self, x_MF: Array, y_GF: Array, weights_MGF: Array) -> Array:
        """d/dx of  sum_gj weights_gj dk(x, y_g)/dy_j,  [M, F].

        E (q_i W_i - q_i r_i t) + b^2 (8 <W, u> v_i + 4 L W_i) + 4 d <W, v> u_i ,  t = sum_j W_j q_j r_j ,
        summed over g.
        """
        bell_MG, line_MG = self.parts(x_MF, y_GF)
        apart_MGF = x_MF[:, None, :] - y_GF[None, :, :]
        along_MG = ((weights_MGF * apart_MGF) @ self.precision_F) * bell_MG
        bell_MF = np.einsum("mg,mgf->mf", bell_MG, np.broadcast_to(weights_MGF, apart_MGF.shape), optimize=True)
        bell_MF = (bell_MF - np.einsum("mg,mgf->mf", along_MG, apart_MGF, optimize=True)) * self.precision_F
        inner_MG = (weights_MGF * centred(x_MF)[:, None, :]).sum(axis=-1)
        bowl_MF = 8 * inner_MG @ centred(y_GF) + 4 * (line_MG[..., None] * weights_MGF).sum(axis=1)
        round_M1 = (weights_MGF * centred(y_GF)).sum(axis=(1, 2))[:, None]
        pull_MF: Array = bell_MF + self.bowl * bowl_MF + 4 * self.curvature * round_M1 * centred(x_MF)
        return pull_MF

    def by_precision(self, x_MF: Array, y_NF: Array, weights: Array) -> Array:
        """d/dq of the bell's part of  sum W k,  sum W_j dk/dy_j  or  sum W_ij d2k/dx_i dy_j  over all pairs, [F].

        The bowl does not depend on q.  weights are [M, N], [M, N, F] or [M, N, F, F].  With  v_i = q_i r_i ,  d/dq_f of
            W E              is  -r_f^2 / 2  times it
            W_j E v_j        is  that, and  E W_f r_f
            W_ij E (q_i [i = j] - v_i v_j)   is  that, and  E (W_ff - r_f sum_j (W_fj + W_jf) v_j)
        """
        bell_MN, _ = self.parts(x_MF, y_NF)
        apart_MNF = x_MF[:, None, :] - y_NF[None, :, :]
        steep_MNF = apart_MNF * self.precision_F
        own_MNF = np.zeros_like(apart_MNF)
        if weights.ndim == 2:
            total_MN = weights
        elif weights.ndim == 3:
            total_MN, own_MNF = (weights * steep_MNF).sum(axis=-1), weights * apart_MNF
        else:
            along_MNF = (weights @ steep_MNF[..., None])[..., 0]
            across_MNF = (steep_MNF[..., None, :] @ weights)[..., 0, :]
            straight_MNF = np.diagonal(weights, axis1=-2, axis2=-1)
            total_MN = straight_MNF @ self.precision_F - (along_MNF * steep_MNF).sum(axis=-1)
            own_MNF = straight_MNF - apart_MNF * (along_MNF + across_MNF)
        by_MNF = own_MNF - 0.5 * apart_MNF**2 * total_MN[..., None]
        by_F: Array = np.einsum("mn,mnf->f", bell_MN, by_MNF, optimize=True)
        return by_F


NUGGET = 1e-6
"""Variance added to each known loss: keeps weights small where points lie close together."""


def usual(shares: int) -> Kernel:
    """The kernel of losses that no parameters are fitted to: the priors' means, and a noise of NUGGET.

    Lengthscales and s are 1, and b is exp(-2).
    """
    return Kernel(precision_F=np.ones(shares), bell=1.0, bowl=float(np.exp(-4.0)), noise=NUGGET)


def interpolate(points_NF: Array, at_F: Array) -> Array:
    """Weights a of known losses in the best linear prediction at a point,  f(x) = sum_n a_n f(x_n) ,  summing to 1.

    a = inv(K + NUGGET I) k(x) , normalized: simple kriging (Cressie 1993, section 3.2).  A merge's loss is as smooth on
    one window as on another, so all windows have the same weights.  The kernel is the usual one.

    Args:
        points_NF: Shares at which the loss is known.
        at_F: Shares at which it is predicted.

    Returns:
        a, [N].
    """
    kernel = usual(len(at_F))
    own_NN = kernel.value(points_NF, points_NF) + NUGGET * np.eye(len(points_NF))
    weights_N = np.asarray(np.linalg.solve(own_NN, kernel.value(points_NF, at_F[None])[:, 0]))
    normalized_N: Array = weights_N / weights_N.sum()
    return normalized_N


def square(points_MF: Array) -> Array:
    """Squared distances to the centroid."""
    square_M: Array = (centred(points_MF) ** 2).sum(axis=1)
    return square_M


def centred(points_MF: Array) -> Array:
    """Shares minus the centroid's."""
    centred_MF: Array = points_MF - 1 / points_MF.shape[1]
    return centred_MF
