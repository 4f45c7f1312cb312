"""Shares of training data, proposed where a predicted objective is least.

Two predictors give mixtures an objective m(s), in its unit:

    merges    the surrogate of a study at the coefficients  w = t s , where t is the tokens of the training to come over
              those of a fine-tune: as if every token moved the model equally far
    curves    the weighted mean of  L_i(s_i N)  over the training curves of the fine-tunes, N steps in all

The proposed shares are

    s* = argmin over s of  m(s) + penalty sum_i s_i log(s_i / n_i)

    with   s_i >= 0 ,   sum_i s_i = 1 ,   s_i T <= k N_i ,   t s within the study's bounds

for a budget of T windows, N_i windows of training data, natural shares n_i = N_i / sum N and at most k epochs.  The
*region* of s* has all shares whose value is above the least by less than a difference that the study detects.

Shape suffixes beside the project's: M candidates, F free shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, log
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dem_opt.analysis.surrogate import Fit, fit
from dem_opt.analysis.training_curves import TrainingCurve
from dem_opt.simplex import Space
from dem_opt.types import SEARCH, ResultRow, TrialRecord

Array = NDArray[np.float64]

DRAWS = 2000
"""Random shares that the search begins with; they also trace the region."""

AROUND = 300
"""Candidates at each distance around the best so far."""

DISTANCES = np.geomspace(0.5, 0.001, 12)
"""Distances, in shares, one after the other."""


@dataclass(frozen=True, kw_only=True)
class SharesProposal:
    """Proposed shares of the training data.

    Attributes:
        shares: Shares by distribution, whose sum is exactly 1.
        region: Least and greatest share by distribution of the region.
        predicted: Their predicted objective, in its unit.
        at_equal: The same at equal shares, or the allowed shares nearest to them.
        at_natural: The same at natural shares, likewise.
        divergence: Kullback-Leibler divergence from the natural shares, in nats.
        detectable: Difference that bounds the region, in the objective's unit.
    """

    shares: Mapping[str, float]
    region: Mapping[str, tuple[float, float]]
    predicted: float
    at_equal: float
    at_natural: float
    divergence: float
    detectable: float


def allowed_shares(space: Space, total: float, most: Mapping[str, float]) -> Space | None:
    """The shares within a study's bounds and at most so large; None where no shares are.

    Args:
        space: The study's coefficients.
        total: Sum of the coefficients that shares stand for.
        most: Largest share by distribution, which the repetition limit sets.
    """
    boxes = {name: (lower / total, upper / total) for name, lower, upper in space.bounds}
    bounds = []
    for name in space.names:
        lower, upper = boxes.get(name, (0.0, 1.0))
        bounds.append((name, lower, min(upper, most[name], 1.0)))
    if any(lower > upper for _, lower, upper in bounds):
        return None
    families = (replace(each, lower=each.lower / total, upper=each.upper / total) for each in space.families)
    allowed = Space(space.names, bounds=tuple(bounds), families=tuple(families))
    return None if allowed.is_empty else allowed


class Predictor(Protocol):
    """Predicts the objective of models that are trained on mixtures."""

    def predict(self, shares_MK: Array) -> Array:
        """The predicted objective of shares, whose columns are in ascending order of names: [M], in its unit."""


@dataclass(frozen=True)
class MergePredictor:
    """The surrogate of merges, at coefficients that are `total` times the shares."""

    space: Space
    surrogate: Fit
    total: float

    @classmethod
    def of(
        cls, space: Space, trials: Sequence[TrialRecord], total: float, allowed: Mapping[str, float] | None = None
    ) -> "MergePredictor | None":
        """Fit the surrogate, with the greatest allowed losses of protected corpora; None where trials are too few."""
        surrogate = fit(space, trials, allowed)
        return None if surrogate is None else cls(space, surrogate, total)

    def predict(self, shares_MK: Array) -> Array:
        """m(t s)."""
        merges = [self.space.nearest(self.total * shares_K) for shares_K in shares_MK]
        with threadpool_limits(1, "blas"):
            return self.surrogate.mean(np.array([self.space.shares(merge) for merge in merges]))


KEPT = 0.1
"""Part of a fine-tune's steps, on own data, that halves what training on the others makes a model forget.

Chosen on the 16 mixtures of studies/mix.yaml, where parts from 0.04 to 0.24 rank about as well.
"""


@dataclass(frozen=True, eq=False)
class CurvePredictor:
    """The weighted mean of losses by the fine-tunes' training curves, and of what the others' data make it forget.

        m(s) = sum_i v_i [ L_i(n_i) + r_i / (r_i + n_i)  sum_{j != i} F_ij n_j / T_j ] ,   n_i = s_i N ,  r_i = KEPT T_i

    L_i is the curve of fine-tune i after n_i steps.  F_ij is what fine-tune j, with its T_j steps, has lost on
    distribution i against the base; it grows with the steps on j, and steps on i keep it off.  Without it a
    distribution that is learnt slowly would get no share at all, and be forgotten.

    Attributes:
        curves: Training curves, in ascending order of names.
        weights: Weight of each in the objective, with the factor of its unit; they need not sum to 1.
        steps: N, steps of the training.
        trained_K: T, steps of each fine-tune.
        forgotten_KK: F, in nats per token; below 0 where a fine-tune has gained on another's distribution.
    """

    curves: tuple[TrainingCurve, ...]
    weights: tuple[float, ...]
    steps: float
    trained_K: Array
    forgotten_KK: Array

    def predict(self, shares_MK: Array) -> Array:
        """m(s)."""
        predicted_M: Array = self.losses(shares_MK) @ np.array(self.weights)
        return predicted_M

    def losses(self, shares_MK: Array) -> Array:
        """The losses by distribution, in nats per token."""
        steps_MK = shares_MK * self.steps
        learnt_MK = np.stack([curve.loss(n_M) for curve, n_M in zip(self.curves, steps_MK.T, strict=True)], axis=1)
        others_KK = self.forgotten_KK * (1 - np.eye(len(self.curves)))
        half_K = KEPT * self.trained_K
        forgotten_MK = half_K / (half_K + steps_MK) * (steps_MK / self.trained_K @ others_KK.T)
        return np.asarray(learnt_MK + forgotten_MK)


def forgotten(results: Sequence[ResultRow], names: Sequence[str]) -> Array | None:
    """F of `CurvePredictor` from a study's results on the search split; None where a score is missing."""
    rows = {row.label: row.scores[SEARCH] for row in results if row.role == "single"}
    base = next((row.scores[SEARCH] for row in results if row.role == "base"), {})
    if not all(scores.keys() >= set(names) for scores in (base, *(rows.get(name, {}) for name in names))):
        return None
    return np.array([[rows[tuned][name].nll - base[name].nll for tuned in names] for name in names])


def propose_shares(
    predictor: Predictor,
    allowed: Space,
    natural: Mapping[str, float],
    *,
    penalty: float = 0.0,
    detectable: float = 0.0,
) -> SharesProposal:
    """Propose shares.

    Args:
        predictor: What gives mixtures an objective.
        allowed: The shares to choose from.
        natural: Natural shares by distribution.
        penalty: Weight of the divergence from the natural shares, in the objective's unit for each nat.
        detectable: Difference that bounds the region, in the objective's unit.
    """
    natural_K = np.array([natural[name] for name in allowed.names])
    surface = _Surface(predictor, natural_K, penalty)
    points = [allowed.at(shares_F) for shares_F in _candidates(surface, allowed)]
    shares_MK = np.array([allowed.point(point) for point in points])
    values_M = surface.values(shares_MK)
    best = points[int(np.argmin(values_M))]
    near_MK = shares_MK[values_M <= values_M.min() + detectable]
    equal = allowed.nearest(np.full(allowed.dimension, 1 / allowed.dimension))
    marks = [best, equal, allowed.nearest(natural_K)]
    predicted, at_equal, at_natural = predictor.predict(np.array([allowed.point(mark) for mark in marks])).tolist()
    return SharesProposal(
        shares=best.weights,
        region={
            name: (float(low), float(high))
            for name, low, high in zip(allowed.names, near_MK.min(axis=0), near_MK.max(axis=0), strict=True)
        },
        predicted=predicted,
        at_equal=at_equal,
        at_natural=at_natural,
        divergence=divergence(best.weights, natural),
        detectable=detectable,
    )


def divergence(shares: Mapping[str, float], natural: Mapping[str, float]) -> float:
    """sum_i s_i log(s_i / n_i), in nats."""
    return fsum(share * log(share / natural[name]) for name, share in shares.items() if share)


@dataclass(frozen=True)
class _Surface:
    """The function of shares that is minimized."""

    predictor: Predictor
    natural_K: Array
    penalty: float

    def values(self, shares_MK: Array) -> Array:
        """m(s) + penalty sum_i s_i log(s_i / n_i)."""
        ratios_MK = np.where(shares_MK > 0, shares_MK / self.natural_K, 1.0)
        divergence_M: Array = (shares_MK * np.log(ratios_MK)).sum(axis=1)
        return self.predictor.predict(shares_MK) + self.penalty * divergence_M


def _candidates(surface: _Surface, allowed: Space) -> Array:
    """Shares [M, F] everywhere, then ever nearer to the best so far; faces are among them, since all are projected."""
    free, rng = len(allowed.caps_F), np.random.default_rng(0)
    if free < 2:
        return allowed.shares(allowed.centroid())[None, :]

    def values(shares_MF: Array) -> Array:
        return surface.values(np.array([allowed.point(allowed.at(shares_F)) for shares_F in shares_MF]))

    corners = [allowed.shares(point) for point in (*allowed.vertices(), allowed.centroid())]
    candidates_MF = np.concatenate([corners, allowed.polytope.project(rng.dirichlet(np.ones(free), DRAWS))])
    values_M = values(candidates_MF)
    for distance in DISTANCES:
        best_F = candidates_MF[int(np.argmin(values_M))]
        near_MF = allowed.polytope.project(best_F + distance * rng.normal(size=(AROUND, free)))
        candidates_MF = np.concatenate([candidates_MF, near_MF])
        values_M = np.concatenate([values_M, values(near_MF)])
    return candidates_MF
