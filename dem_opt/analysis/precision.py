"""How well a study's coefficients are known: the choice of the winner, repeated on resampled documents.

The documents of the search split are a sample, and others of the same data would have chosen other coefficients.  With
the surrogate's mean m over the coefficients, and m_r the same for resample r of the documents (`sampling`; the same
draws for all composites),

    w_r = argmin m_r ,    regret_r = m(w_r) - min m  >= 0        nats per token

estimate where the choice falls and what it costs (Efron and Tibshirani 1993, chapter 6).  The mean of regret_r is over
normal resamples, its quantile and the intervals of w_r are over resamples with Student's tails.  Near the optimum m is
a quadratic and the error of its slope falls with the square root of the number of windows, so the regret falls with the
number itself: four times the windows leave a quarter of it.

Shape suffixes beside the project's: N composites, R resamples, M candidate points, F shares.
"""

from collections.abc import Collection, Mapping, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dem_opt.analysis.bootstrap import resampled_objectives, samplings_of
from dem_opt.analysis.sampling import Documents, Sampling, documents_of, sampled_unit
from dem_opt.analysis.surrogate import Fit, fit, fit_excess, optimum
from dem_opt.evaluation.objective import Objective
from dem_opt.search.samplers import gp
from dem_opt.search.samplers.covariance import Array
from dem_opt.search.trials import exceeded, limits, objectives, recall
from dem_opt.simplex import Coefficients, Polytope, Space
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, Precision, TrialRecord

RESAMPLES = 400
"""Resamples of the documents: a 95% quantile rests on 20 of them."""

FEWEST = 8
"""Composites scored on all windows below which nothing is said: a quadratic in three coefficients has ten terms.  With
probes, which know the quadratic, as many as tell a plane: one more than coefficients."""

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
    records = [record for records in trials.values() for record in records]
    if any(record.part is not None for record in records):
        whole = {record.coefficients for record in records if not record.is_partial}
        records += _landmarks(ledger, identity, objective, whole)
    documents = documents_of(ledger, identity, SEARCH)
    return precision_of(identity.space, records, objective, documents, limits(ledger, identity))


def _landmarks(
    ledger: Ledger, identity: StudyIdentity, objective: Objective, known: Collection[Coefficients]
) -> list[TrialRecord]:
    """Fine-tunes and uniform average as trials, where the final table has scored them.

    Probes leave few whole trials.  They are near the optimum and tell how windows differ there, but not along which
    way; the landmarks do.
    """
    records = []
    for point in identity.space.landmarks():
        scores = recall(ledger, identity, identity.composite(point), SEARCH)
        if point not in known and len(scores) == len(identity.corpora[SEARCH]):
            value, excess = objective(scores), exceeded(ledger, identity, scores)
            row = TrialRecord(study="", number=-1, coefficients=point, objective=value, scores=scores, violation=excess)
            records.append(row)
    return records


def precision_of(
    space: Space,
    trials: Sequence[TrialRecord],
    objective: Objective,
    documents: Mapping[str, Documents] | None = None,
    allowed: Mapping[str, float] | None = None,
) -> Precision | None:
    """Estimate how well the coefficients are known.

    Args:
        space: Coefficient space.
        trials: Finished trials.
        objective: The objective on the search split.
        documents: Documents of its windows by distribution; where they are unknown, windows count as independent.
        allowed: Greatest allowed loss of each protected corpus on the search split, in the objective's unit.

    Returns:
        None for a space of a single point, where too few composites are whole, and where the windows of a distribution
        are all of one document.
    """
    whole = {trial.coefficients: trial for trial in trials if trial.objective is not None and not trial.is_partial}
    chosen = sorted(whole.values(), key=lambda trial: trial.rank)[:MOST]
    has_probes = any(trial.part is not None for trial in trials)
    if space.is_point or len(chosen) < (space.dimension + 1 if has_probes else FEWEST):
        return None
    samplings = samplings_of(chosen[0].scores, objective, documents)
    if not all(sampling.is_defined for sampling in samplings.values()):
        return None
    normal_NR, student_NR = (_resampled(chosen, objective, samplings, tails) for tails in (False, True))
    if not normal_NR.size or not student_NR.size:
        return None
    values_N = np.array([trial.objective for trial in chosen], dtype=np.float64)
    with threadpool_limits(1, "blas"):
        process = gp.fit(gp.observe(np.array([space.shares(trial.coefficients) for trial in chosen]), values_N))
        whole_only = Fit(process, fit_excess(space, chosen, allowed))
        points_MF = _candidates(space.shares(optimum(space, whole_only, chosen)), process, space.polytope)
        weights_MN = process.mean_weights(points_MF)
        # With probes the gradients say most of the mean.
        surrogate = fit(space, trials, allowed) if has_probes else None
        mean_M = (surrogate or whole_only).mean(points_MF)
        normal_R, student_R = (
            _choices(mean_M, weights_MN, resampled_NR - values_N[:, None]) for resampled_NR in (normal_NR, student_NR)
        )
    regret_M = mean_M - mean_M.min()
    points_RK = np.array([space.point(space.at(points_MF[choice])) for choice in student_R])
    low_K, high_K = np.quantile(points_RK, [0.025, 0.975], axis=0)
    return Precision(
        windows=min(len(score.nats_W) for score in chosen[0].scores.values()),
        composites=len(chosen),
        regret=float(regret_M[normal_R].mean()),
        high=float(np.quantile(regret_M[student_R], 0.95)),
        intervals={name: (float(low), float(high)) for name, low, high in zip(space.names, low_K, high_K, strict=True)},
        noise=_noise(space, chosen, normal_NR),
        sampled=sampled_unit(samplings.values()),
    )


def _resampled(
    trials: Sequence[TrialRecord], objective: Objective, samplings: Mapping[str, Sampling], tails: bool
) -> Array:
    """The objective of trials in resamples, [N, R], without those in which a custom one is not finite."""
    scores = [trial.scores for trial in trials]
    resampled_NR = resampled_objectives(scores, objective, samplings, RESAMPLES, tails=tails)
    finite_NR: Array = resampled_NR[:, np.isfinite(resampled_NR).all(axis=0)]
    return finite_NR


def _noise(space: Space, trials: Sequence[TrialRecord], resampled_NR: Array) -> float:
    """error^2 / difference, median over trials that are worse than the best one, of the same objective in resamples.

    The fine-tunes and the uniform average are left out where there are others: few differences are that large.
    """
    values_N = np.array([trial.objective for trial in trials], dtype=np.float64)
    difference_N, error_N = values_N - values_N[0], (resampled_NR - resampled_NR[0]).std(axis=1)
    worse = [row for row, difference in enumerate(difference_N) if difference > 0]
    landmarks = set(space.landmarks())
    others = [row for row in worse if trials[row].coefficients not in landmarks] or worse
    return float(np.median(error_N[others] ** 2 / difference_N[others])) if others else 0.0


def _choices(mean_M: Array, weights_MN: Array, away_NR: Array) -> NDArray[np.int64]:
    """The candidate with the lowest mean in each resample, from how far that moves each composite."""
    # What all composites share in a resample says nothing about which is best, but the process would notice it.
    choice_R: NDArray[np.int64] = (mean_M[:, None] + weights_MN @ (away_NR - away_NR.mean(axis=0))).argmin(axis=0)
    return choice_R


def _candidates(best_F: Array, process: gp.GaussianProcess, polytope: Polytope) -> Array:
    """The composites themselves, and points around the optimum at all scales, projected: faces are among them."""
    rng = np.random.default_rng(0)
    steps_MF = np.concatenate([scale * rng.normal(size=(CANDIDATES, len(best_F))) for scale in SCALES])
    around_MF = polytope.project(best_F + steps_MF)
    points_MF: Array = np.concatenate([best_F[None, :], process.observations.points_NF, around_MF])
    return points_MF


def windows_for(precision: Precision, regret: float) -> int:
    """Number of windows of each corpus that would leave this expected regret, in nats per token; a multiple of 8."""
    return 8 * ceil(precision.windows * precision.regret / regret / 8)
