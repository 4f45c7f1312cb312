"""Bayesian optimization of a front: the point where two Gaussian processes expect the most additional hypervolume.

Shape suffixes beside the project's: N trials, M points, F shares, S strips of the plane of losses; 2 for both losses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from threadpoolctl import threadpool_limits

from dem_opt.pareto import front_of, non_dominated
from dem_opt.search.samplers import gp
from dem_opt.search.samplers.history import Trial, latest, losses_of
from dem_opt.search.samplers.proposer import Proposal, first_new, first_points
from dem_opt.search.samplers.simplex_gp import APART, OBSERVATIONS, log_h, maximize, starts
from dem_opt.simplex import Coefficients, Space

Array = NDArray[np.float64]

MARGIN = 0.1
"""Distance of the reference point beyond the worst losses on the front, as a share of the front's range."""


@dataclass(frozen=True)
class SimplexEHVI:
    """Expected hypervolume improvement (Emmerich, Giannakoglou and Naujoks 2006) over the shares.

    The first proposals are those of `SimplexGP`: the study's starting points, the vertices and the centroid.  Then a
    Gaussian process of its own is fitted to each loss of the finished trials.  Running trials count as observed at
    their posterior means, failed ones as the worst of each loss.

    Improvement counts up to a reference point MARGIN beyond the worst losses on the front that the processes' means
    predict: so points that lengthen the front are worth something, and those far off it nothing.  (Beyond the front
    that was measured, instead, it grew by a tenth of its length a trial.)

    Attributes:
        space: The coefficients to choose from.
    """

    space: Space

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """The next point, without an expected improvement: that of a hypervolume is in no loss's unit."""
        if (proposal := first_new(first_points(self.space, start), trials)) is not None:
            return proposal
        if self.space.is_point or not any(trial.losses for trial in trials):
            return Proposal(self.space.sample(rng))
        with threadpool_limits(1, "blas"):  # as in SimplexGP
            return Proposal(self._most_improving(trials, rng))

    def _most_improving(self, trials: Sequence[Trial], rng: np.random.Generator) -> Coefficients:
        """The point of most expected improvement apart from all trials; else a draw."""
        first, second = self._processes(trials)
        losses_N2 = np.stack([first.observations.values_N, second.observations.values_N], axis=1)
        best_NF = first.observations.points_NF[non_dominated(losses_N2)]
        starts_MF = self.space.polytope.project(starts(best_NF, rng))
        predicted_M2 = np.stack([first.mean(starts_MF), second.mean(starts_MF)], axis=1)
        front_N2, reference = front_of(losses_N2), reference_point(np.concatenate([losses_N2, predicted_M2]))
        points_MF, _ = maximize(
            lambda shares_MF: log_expected_improvement(
                first.posterior(shares_MF), second.posterior(shares_MF), front_N2, reference
            ),
            starts_MF,
            self.space.polytope,
        )
        taken_NF = self._shares(trials)
        for shares_F in points_MF:
            if np.abs(taken_NF - shares_F).max(axis=1).min() > APART:
                return self.space.at(shares_F)
        return self.space.sample(rng)

    def _processes(self, trials: Sequence[Trial]) -> list[gp.GaussianProcess]:
        """A process for each loss, fitted to finished trials, with running ones at their posterior means."""
        observed, running = _thin(latest(trials)), [trial for trial in trials if trial.state == "running"]
        points_NF, losses_N2 = self._shares(observed), losses_of(observed)
        processes = (gp.fit(gp.observe(points_NF, losses_N)) for losses_N in losses_N2.T)
        return [process.believing(self._shares(running)) for process in processes]

    def _shares(self, trials: Iterable[Trial]) -> Array:
        """[N, F]"""
        shares = [self.space.shares(trial.coefficients) for trial in trials]
        return np.array(shares).reshape(-1, len(self.space.caps_F))


def _thin(trials: Sequence[Trial]) -> list[Trial]:
    """At most OBSERVATIONS of finished trials in the order of their numbers: those on the front, and the latest."""
    if len(trials) <= OBSERVATIONS:
        return list(trials)
    on_front_N = non_dominated(losses_of(trials))
    # The sort is stable, so of each kind the latest trials come first.
    ranked = sorted(reversed(range(len(trials))), key=lambda place: not on_front_N[place])
    return [trials[place] for place in sorted(ranked[:OBSERVATIONS])]


def reference_point(losses_N2: Array) -> tuple[float, float]:
    """The worst losses on the front, and beyond them MARGIN of its range; of the range of all, where it has none."""
    front_N2 = front_of(losses_N2)
    ranges_2 = np.ptp(front_N2, axis=0)
    ranges_2 = np.where(ranges_2 > 0, ranges_2, np.ptp(losses_N2, axis=0))
    first, second = front_N2.max(axis=0) + MARGIN * np.where(ranges_2 > 0, ranges_2, 1.0)
    return float(first), float(second)


def log_expected_improvement(
    first: gp.Posterior, second: gp.Posterior, front_N2: Array, reference: Sequence[float]
) -> tuple[Array, Array]:
    """log of the expected hypervolume improvement of points whose two losses X and Y are independent and normal.

    Vertical lines through the front's points (a_i, b_i), a ascending, divide the plane into strips.  With
    a_0 = -inf,  a_{N+1} = r_1  and  b_0 = r_2  a point (x, y) adds in strip i the area  (a_{i+1} - max(x, a_i))^+
    (b_i - y)^+ , and  (a_{i+1} - max(x, a_i))^+ = (a_{i+1} - x)^+ - (a_i - x)^+ . So

        E = sum_{i=0}^N  (EI_X(a_{i+1}) - EI_X(a_i)) EI_Y(b_i) ,   EI_X(c) = E max(c - X, 0) = sigma h((c - mu) / sigma)

    which is the exact formula of Emmerich, Yang, Deutz, Wang and Fonseca (2016), "A multicriteria generalization of
    Bayesian global optimization", in two dimensions (also Yang, Emmerich, Deutz and Baeck 2019).  Everything is in
    logarithms, as in `simplex_gp`, since far from the front E underflows and its gradient with it.

    Args:
        first: Posterior of the first loss at M points.
        second: Of the second.
        front_N2: The front so far, the first loss ascending.
        reference: Losses beyond which nothing counts.

    Returns:
        Values [M] and gradients by shares [M, F].
    """
    inside_N2 = front_N2[(front_N2 < np.asarray(reference)).all(axis=1)]
    edges_S, tops_S = np.append(inside_N2[:, 0], reference[0]), np.append(reference[1], inside_N2[:, 1])
    reach_MS, reach_mean_MS, reach_variance_MS = _log_ei(first, edges_S)
    height_MS, height_mean_MS, height_variance_MS = _log_ei(second, tops_S)
    # log(EI(a_{i+1}) - EI(a_i)) with the ratio of the second to the first, which is 0 in the strip without a left edge.
    gap_MS = np.diff(reach_MS, axis=1, prepend=-np.inf)
    ratio_MS, rest_MS = np.exp(-gap_MS), np.maximum(-np.expm1(-gap_MS), np.finfo(np.float64).tiny)
    terms_MS = reach_MS + np.log(rest_MS) + height_MS
    share_MS = softmax(terms_MS, axis=1)

    def of_width(slope_MS: Array) -> Array:
        left_MS = np.concatenate([np.zeros_like(slope_MS[:, :1]), slope_MS[:, :-1]], axis=1)
        slope_M: Array = ((slope_MS - ratio_MS * left_MS) / rest_MS * share_MS).sum(axis=1)
        return slope_M

    gradient_MF = (
        of_width(reach_mean_MS)[:, None] * first.mean_gradient_MF
        + of_width(reach_variance_MS)[:, None] * first.variance_gradient_MF
        + (share_MS * height_mean_MS).sum(axis=1)[:, None] * second.mean_gradient_MF
        + (share_MS * height_variance_MS).sum(axis=1)[:, None] * second.variance_gradient_MF
    )
    return np.asarray(logsumexp(terms_MS, axis=1)), gradient_MF


def _log_ei(posterior: gp.Posterior, below_S: Array) -> tuple[Array, Array, Array]:
    """log E[max(c - f, 0)] for each c, with its derivatives by the posterior's mean and variance, each [M, S]."""
    variance_M1 = posterior.variance_M[:, None]
    sigma_M1 = np.sqrt(variance_M1)
    z_MS = (below_S - posterior.mean_M[:, None]) / sigma_M1
    log_h_MS, slope_MS = log_h(z_MS)
    return log_h_MS + np.log(sigma_M1), -slope_MS / sigma_M1, (1 - slope_MS * z_MS) / (2 * variance_M1)
