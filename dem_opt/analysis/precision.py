"""How well a study's coefficients are known: the choice of the winner, repeated on resampled windows.

The windows of the search split are a sample, and other windows of the same data would have chosen other coefficients.
With the surrogate's mean m over the coefficients, and m_r the same for resample r of the windows (drawn with
replacement within each corpus, the same for all composites),

    w_r = argmin m_r ,    regret_r = m(w_r) - min m  >= 0        nats per token

estimate where the choice falls and what it costs (Efron and Tibshirani 1993, chapter 6).  Near the optimum m is a
quadratic and the error of its slope falls with the square root of the number of windows, so the regret falls with the
number itself: four times the windows leave a quarter of it.

Shape suffixes beside the project's: N composites, R resamples, M candidate points, F shares.
"""

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
from threadpoolctl import threadpool_limits

from dem_opt.analysis.bootstrap import resampled_objectives
from dem_opt.analysis.surrogate import optimum
from dem_opt.evaluation.objective import Objective
from dem_opt.search.samplers import gp
from dem_opt.search.samplers.covariance import Array
from dem_opt.search.trials import objectives
from dem_opt.simplex import Space, project
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import PENALTY, SEARCH, Precision, TrialRecord

RESAMPLES = 400
"""Resamples of the windows: a 95% quantile rests on 20 of them."""

FEWEST = 8
"""Composites scored on all windows below which nothing is said: a quadratic in three coefficients has ten terms."""

MOST = 64
"""Best composites that the surrogate is fitted to; those far from the optimum say nothing about its place."""

SCALES = np.geomspace(1.0, 0.005, 10)
"""Distances, in shares, at which candidates lie around the optimum."""

CANDIDATES = 300
"""Candidates at each distance."""


def study_precision(
    ledger: Ledger, identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]]
) -> Precision | None:
    """Estimate how well a study's coefficients are known, from the trials of all its runs."""
    objective = objectives(ledger, identity).get(SEARCH)
    if objective is None:
        return None
    return precision_of(identity.space, [record for records in trials.values() for record in records], objective)


def precision_of(space: Space, trials: Sequence[TrialRecord], objective: Objective) -> Precision | None:
    """Estimate how well the coefficients are known; None for a single point and where too few composites are whole."""
    whole = {trial.coefficients: trial for trial in trials if trial.objective is not None and not trial.is_partial}
    chosen = sorted(whole.values(), key=lambda trial: trial.rank)[:MOST]
    if space.is_point or len(chosen) < FEWEST:
        return None
    values_N = np.array([trial.penalized for trial in chosen], dtype=np.float64)
    resampled_NR = resampled_objectives([trial.scores for trial in chosen], objective, RESAMPLES)
    resampled_NR += PENALTY * np.array([trial.violation for trial in chosen])[:, None]
    resampled_NR = resampled_NR[:, np.isfinite(resampled_NR).all(axis=0)]  # a custom objective may have gaps
    if not resampled_NR.size:
        return None
    with threadpool_limits(1, "blas"):
        process = gp.fit(gp.observe(np.array([space.shares(trial.coefficients) for trial in chosen]), values_N))
        points_MF = _candidates(space.shares(optimum(space, process, chosen)), process, space.caps_F)
        weights_MN = process.mean_weights(points_MF)
        # What all composites share in a resample says nothing about which is best, but the process would notice it.
        centred_NR = resampled_NR - resampled_NR.mean(axis=0)
        choice_R = (weights_MN @ centred_NR).argmin(axis=0)
        mean_M = weights_MN @ (values_N - values_N.mean())
    regret_R = (mean_M - mean_M.min())[choice_R]
    points_RK = np.array([space.point(space.at(points_MF[choice])) for choice in choice_R])
    low_K, high_K = np.quantile(points_RK, [0.025, 0.975], axis=0)
    return Precision(
        windows=min(len(score.nats_W) for score in chosen[0].scores.values()),
        composites=len(chosen),
        regret=float(regret_R.mean()),
        high=float(np.quantile(regret_R, 0.95)),
        intervals={name: (float(low), float(high)) for name, low, high in zip(space.names, low_K, high_K, strict=True)},
    )


def _candidates(best_F: Array, process: gp.GaussianProcess, caps_F: Array) -> Array:
    """The composites themselves, and points around the optimum at all scales, projected: faces are among them."""
    rng = np.random.default_rng(0)
    steps_MF = np.concatenate([scale * rng.normal(size=(CANDIDATES, len(best_F))) for scale in SCALES])
    around_MF = project(best_F + steps_MF, caps_F)
    points_MF: Array = np.concatenate([best_F[None, :], process.observations.points_NF, around_MF])
    return points_MF


def windows_for(precision: Precision, regret: float) -> int:
    """Number of windows of each corpus that would leave this expected regret, in nats per token; a multiple of 8."""
    return 8 * ceil(precision.windows * precision.regret / regret / 8)
