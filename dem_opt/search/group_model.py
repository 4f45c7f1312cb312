"""A quadratic model of the objective over shares by group, and its minimum on the product of simplices.

    m(x) = f + g' (x - x_b) + (x - x_b)' B (x - x_b) / 2 + shrink |x - c|^2 / 2

x_b is the best point so far, f and g its value and gradient, c the centre: the global coefficients in every group.  B
begins as a block for each group, the global curvature times the group's part of the vectors' squared length.  It is
scaled to what steps show, and takes up differences of gradients by damped BFGS updates (Nocedal and Wright 2006,
procedure 18.2): projected quasi-Newton (Schmidt et al. 2009, PQN).  Minima of the model cost no forward pass.

Shape suffixes: G groups, F shares of a group, n = G F of them together, D = F - 1, M measured points.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh

from dem_opt.simplex import Polytope, plane

Array = NDArray[np.float64]

# The constants below shape the curvature that the model begins with.  A wrong one costs steps, not the result: a step
# that leads up is measured and not taken, what it shows corrects the curvature, and the folds judge what was reached.
# Those without a source are from the descent of the quickstart's models (dev/LOG.md, 2026-11-28).

DAMPING = 0.2
"""Least curvature along a step that an update takes up, in that of the model (Nocedal and Wright, procedure 18.2)."""

LEAST_PART = 1e-4
"""Least part of the curvature that a group begins with: the norms, a part of 0.0003, are not without effect."""

FLATTEST = 0.05
"""Least curvature of a direction of the global coefficients at the beginning, in the largest one.

A quadratic through noisy or few trials may bend down; then the first step in this direction would have no end.
"""

UNKNOWN = 2.0
"""Factor of the curvature before the first step has shown any: a step too short costs less than one too long."""

PRIOR, REACH = 0.3, 4.0
"""Weight of all groups in the factor of one, and its greatest ratio to theirs (see `rescaled`)."""

_STEPS, _STILL = 2000, 1e-8
"""Most steps of a minimization of the model, and the step in shares that ends it."""


@dataclass(frozen=True, eq=False)
class Point:
    """A point that was measured with its gradient.

    Attributes:
        shares_GF: The point.
        value: Penalized objective there, in its unit.
        gradient_GF: Its gradient by shares.
    """

    shares_GF: Array
    value: float
    gradient_GF: Array


def tangential(gradient_GF: Array) -> Array:
    """The part of a gradient along the simplices: moves keep the sum of a group's shares."""
    along_GF: Array = gradient_GF - gradient_GF.mean(axis=1, keepdims=True)
    return along_GF


def global_curvature(shares_MF: Array, values_M: Array) -> Array:
    """Curvature of the objective over global shares, [F, F]: least squares of a quadratic through measured values.

    With fewer than twice as many values as unknowns it is the same in all directions.  Directions across the simplex
    have the mean curvature, which no move along it meets.
    """
    count = shares_MF.shape[1]
    basis_FD = plane(count)
    points_MD = (shares_MF - shares_MF.mean(axis=0)) @ basis_FD
    forms = [_pair(i, j, count - 1) for i in range(count - 1) for j in range(i, count - 1)]
    linear = [np.ones(len(points_MD)), *points_MD.T]
    if len(values_M) < 2 * (len(linear) + len(forms)):
        forms = [np.eye(count - 1)]
    squares = [0.5 * ((points_MD @ form_DD) * points_MD).sum(axis=1) for form_DD in forms]
    solution, *_ = np.linalg.lstsq(np.stack([*linear, *squares], axis=1), values_M, rcond=None)
    curvature_DD = np.tensordot(solution[len(linear) :], np.stack(forms), axes=1)
    values_D, vectors_DD = np.linalg.eigh(curvature_DD)
    largest = max(float(values_D[-1]), 1e-6)
    values_D = np.maximum(values_D, FLATTEST * largest)
    along_FF = basis_FD @ (vectors_DD * values_D) @ vectors_DD.T @ basis_FD.T
    return np.asarray(along_FF + values_D.mean() / count, dtype=np.float64)


def _pair(i: int, j: int, count: int) -> Array:
    """The symmetric matrix A with  x' A x / 2 = x_i x_j ."""
    form_DD = np.zeros((count, count))
    form_DD[i, j] += 1
    form_DD[j, i] += 1
    return form_DD


def block_curvature(curvature_FF: Array, parts_G: Array) -> Array:
    """The curvature that a model begins with, [n, n]: the global one in each group, times the group's part."""
    parts_G = np.maximum(parts_G / parts_G.sum(), LEAST_PART)
    return np.asarray(np.kron(np.diag(parts_G), curvature_FF), dtype=np.float64)


def _blocks(curvature_nn: Array, groups: int) -> Array:
    """The curvature of each group by itself, [G, F, F]."""
    shares = len(curvature_nn) // groups
    blocks_GFF: Array = np.einsum("gfgh->gfh", curvature_nn.reshape(groups, shares, groups, shares))
    return blocks_GFF


def curvature_of(start_nn: Array, points: Sequence[Point]) -> Array:
    """The curvature that measured gradients show, from one that a model begins with."""
    return updated(rescaled(start_nn, points), points)


def rescaled(start_nn: Array, points: Sequence[Point]) -> Array:
    """Each group's block scaled by what steps show of it.

    With  m = sum s'y  over steps s and changes y of the gradient, and  e = sum s'B s  what the blocks expect, of group
    p and of all groups on average, the factor of the group is

        (m_p + PRIOR e r) / (e_p + PRIOR e) ,     r = sum_p m_p / sum_p e_p ,     within r / REACH and r REACH.

    Groups act on each other, so a group's own is drawn to that of all.  On the quickstart r is 3, of a group 1 to 10.
    """
    groups, shares = points[0].shares_GF.shape
    blocks_GFF = _blocks(start_nn, groups)
    measured_G, expected_G = np.zeros(groups), np.zeros(groups)
    for step_GF, change_GF in _changes(points):
        measured_G += (step_GF * change_GF).sum(axis=1)
        expected_G += np.einsum("gf,gfh,gh->g", step_GF, blocks_GFF, step_GF)
    if not expected_G.any():
        return start_nn * UNKNOWN
    ratio = max(float(measured_G.sum() / expected_G.sum()), LEAST_PART)
    weight = PRIOR * expected_G.mean()
    factors_G = np.clip((measured_G + weight * ratio) / (expected_G + weight), ratio / REACH, ratio * REACH)
    roots_n = np.repeat(np.sqrt(factors_G), shares)
    scaled_nn: Array = start_nn * roots_n[:, None] * roots_n
    return scaled_nn


def _changes(points: Sequence[Point]) -> Iterator[tuple[Array, Array]]:
    """Steps from the best point before to each point, and the changes of the gradient along the simplices."""
    for place in range(1, len(points)):
        before = min(points[:place], key=lambda point: point.value)
        yield points[place].shares_GF - before.shares_GF, tangential(points[place].gradient_GF - before.gradient_GF)


def updated(curvature_nn: Array, points: Sequence[Point]) -> Array:
    """The curvature after the differences of gradients between each point and the best before it."""
    for step_GF, change_GF in _changes(points):
        step_n, change_n = step_GF.ravel(), change_GF.ravel()
        pushed_n = curvature_nn @ step_n
        own, measured = float(step_n @ pushed_n), float(step_n @ change_n)
        if own <= 0:
            continue  # no step
        if measured < DAMPING * own:
            keep = (1 - DAMPING) * own / (own - measured)
            change_n = keep * change_n + (1 - keep) * pushed_n
            measured = float(step_n @ change_n)
        curvature_nn = curvature_nn + np.outer(change_n / measured, change_n) - np.outer(pushed_n / own, pushed_n)
    return curvature_nn


@dataclass(frozen=True, eq=False)
class Model:
    """The model about a point.

    Attributes:
        shares_GF: x_b.
        gradient_GF: g.
        curvature_nn: B.
        centre_F: c, in every group.
        polytope: The shares that a group can have.
        shrink: Curvature of the penalty, in shares.
    """

    shares_GF: Array
    gradient_GF: Array
    curvature_nn: Array
    centre_F: Array
    polytope: Polytope
    shrink: float = 0.0

    def change(self, shares_GF: Array) -> float:
        """m(x) - m(x_b)."""
        step_n = (shares_GF - self.shares_GF).ravel()
        curved = 0.5 * step_n @ (self.curvature_nn @ step_n)
        penalty = 0.5 * self.shrink * (self._apart(shares_GF) - self._apart(self.shares_GF))
        return float(self.gradient_GF.ravel() @ step_n + curved + penalty)

    def _apart(self, shares_GF: Array) -> float:
        return float(((shares_GF - self.centre_F) ** 2).sum())

    def minimum(self) -> Array:
        """The point at which the model is least, by accelerated projected gradients with restarts.

        O'Donoghue and Candes 2015 (restart by gradient), Beck and Teboulle 2009 (FISTA).  A group's shares are measured
        in its own steepness, which leaves the projection on its simplex as it is: the curvatures of groups are up to
        1 / LEAST_PART apart, and one step length for all of them takes several times as many steps.
        """
        steepness_G1 = self._steepness()
        at_GF = ahead_GF = self.shares_GF
        momentum = 1.0
        for _ in range(_STEPS):
            next_GF = self.polytope.project(ahead_GF - self._slope(ahead_GF) / steepness_G1)
            if np.abs(next_GF - at_GF).max() < _STILL:
                return next_GF
            if (steepness_G1 * (ahead_GF - next_GF) * (next_GF - at_GF)).sum() > 0:
                momentum = 1.0
                at_GF = ahead_GF = self.polytope.project(at_GF - self._slope(at_GF) / steepness_G1)
                continue
            following = 0.5 * (1 + np.sqrt(1 + 4 * momentum**2))
            ahead_GF = next_GF + (momentum - 1) / following * (next_GF - at_GF)
            at_GF, momentum = next_GF, following
        return at_GF

    def _steepness(self) -> Array:
        """Curvature d of each group, [G, 1], with which  B + shrink <= diag(d) .

        That of the group's block, times the largest eigenvalue of the curvature in these units.
        """
        groups, shares = self.shares_GF.shape
        own_G = np.linalg.eigvalsh(_blocks(self.curvature_nn, groups))[:, -1] + self.shrink
        roots_n = np.repeat(np.sqrt(own_G), shares)
        scaled_nn = (self.curvature_nn + self.shrink * np.eye(len(roots_n))) / roots_n / roots_n[:, None]
        # Lanczos from a vector that is no symmetric one, so that it meets the largest; 1% for its tolerance.
        start_n = np.ones(len(roots_n)) + np.arange(len(roots_n)) % 7
        (largest,) = eigsh(scaled_nn, k=1, which="LA", v0=start_n, tol=1e-3, return_eigenvectors=False)
        return np.asarray(1.01 * float(largest) * own_G[:, None], dtype=np.float64)

    def _slope(self, shares_GF: Array) -> Array:
        """Gradient of the model along the simplices."""
        curved_n = self.curvature_nn @ (shares_GF - self.shares_GF).ravel()
        slope_GF = self.gradient_GF + curved_n.reshape(shares_GF.shape) + self.shrink * (shares_GF - self.centre_F)
        return tangential(slope_GF)
