"""Paired intervals for the difference of two composites; documents are what was sampled (see `sampling`).

Shape suffixes beside the project's: R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from dem_opt.analysis.sampling import Documents, Sampling, sampled_unit
from dem_opt.errors import EvaluationError
from dem_opt.evaluation.objective import Objective
from dem_opt.evaluation.racing import satterthwaite
from dem_opt.types import NATS_PER_TOKEN, Score

RESAMPLES = 4000
"""Resamples: the 2.5% and 97.5% quantiles then rest on 100 of them on either side."""


@dataclass(frozen=True)
class Difference:
    """Objective of one composite minus another's, in its unit, with a 95% interval.

    Attributes:
        mean: The difference.
        low: Lower end; infinite, as the upper one, where all windows of a corpus are of one document, which says
            nothing about others.
        high: Upper end.
        sampled: Unit that was sampled: "documents", or "windows" where documents are unknown.
    """

    mean: float
    low: float
    high: float
    sampled: str


def difference(
    left: Mapping[str, Score],
    right: Mapping[str, Score],
    objective: Objective,
    documents: Mapping[str, Documents] | None = None,
    seed: int = 0,
) -> Difference:
    """Objective of `left` minus objective of `right`, both scored on the same windows.

    Paired, since the losses of two composites on one window go up and down together, and stratified by distribution.
    For a weighted mean the interval is  difference -+ t * standard error , where variances of distributions add up with
    squared weights; for other objectives it is between quantiles of resamples.  It covers the choice of documents, and
    nothing else.

    Args:
        left: Scores by distribution.
        right: Scores by distribution.
        objective: The objective.
        documents: Documents of the windows by distribution; where they are unknown, windows count as independent.
        seed: Seed of the resamples.
    """
    mean = objective(left) - objective(right)
    samplings = samplings_of(left, objective, documents)
    sampled = sampled_unit(samplings.values())
    if not all(sampling.is_defined for sampling in samplings.values()):
        return Difference(mean, -inf, inf, sampled)
    if objective.function is None and objective.own is None:
        half = _half_width(left, right, objective, samplings)
        return Difference(mean, mean - half, mean + half, sampled)
    left_R, right_R = resampled_objectives([left, right], objective, samplings, RESAMPLES, seed, tails=True)
    difference_R = left_R - right_R
    finite_R = difference_R[np.isfinite(difference_R)]  # all of them, unless a custom objective has gaps
    low, high = np.quantile(finite_R, [0.025, 0.975]) if len(finite_R) else (nan, nan)
    return Difference(mean, float(low), float(high), sampled)


def samplings_of(
    scores: Mapping[str, Score], objective: Objective, documents: Mapping[str, Documents] | None
) -> dict[str, Sampling]:
    """The windows of each distribution that the objective looks at, as samples of documents."""
    known = documents or {}
    # A custom objective makes what it likes of scores, which it gets back from NLL in nats per token.
    unit = objective.unit if objective.function is None else NATS_PER_TOKEN
    return {name: Sampling.of(scores[name].sizes_W(unit), known.get(name)) for name in _names(objective)}


def resampled_objectives(
    composites: Sequence[Mapping[str, Score]],
    objective: Objective,
    samplings: Mapping[str, Sampling],
    resamples: int,
    seed: int = 0,
    tails: bool = False,
) -> NDArray[np.float64]:
    """The objective of each composite in each resample of the documents, [N, R] for N composites.

    All composites are scored on the same windows, and have the same draws.

    Args:
        composites: Scores of each by distribution.
        objective: The objective.
        samplings: The windows of each distribution.
        resamples: Number of resamples R.
        seed: Seed of the draws.
        tails: See `Sampling.errors`.
    """
    rng = np.random.default_rng(seed)
    names = _names(objective)
    nll_NKR = np.empty((len(composites), len(names), resamples))
    for k, name in enumerate(names):
        sampling = samplings[name]
        assert len({scores[name].tokens_W for scores in composites}) == 1, f"{name}: scored on different windows"
        nats_NW = np.array([_nats(scores[name], objective, name) for scores in composites])
        errors_NR = sampling.errors(np.array([sampling.residuals(nats_W) for nats_W in nats_NW]), resamples, rng, tails)
        nll_NKR[:, k] = nats_NW.sum(axis=1, keepdims=True) / sampling.sizes_W.sum() + errors_NR
    return np.array([_combine(nll_KR, objective, names, composites[0]) for nll_KR in nll_NKR])


def _names(objective: Objective) -> list[str]:
    """The distributions that the objective looks at."""
    is_custom = objective.function is not None
    return sorted(name for name, weight in objective.weights.items() if weight or is_custom)


def _half_width(
    left: Mapping[str, Score], right: Mapping[str, Score], objective: Objective, samplings: Mapping[str, Sampling]
) -> float:
    """Half of the 95% interval of a weighted mean's difference."""
    parts = []
    for name, share in objective.shares(left).items():
        variance = samplings[name].variance(np.subtract(left[name].nats_W, right[name].nats_W))
        parts.append((share**2 * variance, samplings[name].freedom))
    error, freedom = satterthwaite(parts)
    return -float(stdtrit(freedom, 0.025)) * error if error else 0.0


def _nats(score: Score, objective: Objective, name: str) -> NDArray[np.float64]:
    """Nats of each window; where the objective is the largest regret, beyond those of the distribution's fine-tune."""
    nats_W = np.array(score.nats_W)
    return nats_W if objective.own is None else nats_W - objective.own[name].nats_W


def _custom(objective: Objective, nll_by_name: Mapping[str, float], scores: Mapping[str, Score]) -> float:
    """A custom objective of one resample; NaN where it is not finite."""
    try:
        return objective({name: _with_nll(scores[name], nll) for name, nll in nll_by_name.items()})
    except EvaluationError:
        return nan


def _with_nll(score: Score, nll: float) -> Score:
    """One window with this NLL, and with the tokens and bytes of all windows of a score."""
    return Score((nll * score.tokens,), (score.tokens,), (score.bytes,) if score.bytes else ())


def _combine(
    nll_KR: NDArray[np.float64], objective: Objective, names: Sequence[str], scores: Mapping[str, Score]
) -> NDArray[np.float64]:
    """The objective of each resample, [R]: the weighted mean of NLL, or the largest regret.

    `scores` are of the same windows: they have the tokens and bytes that a custom objective sees.
    """
    if objective.function is not None:
        # A resample as the function sees it: on each corpus one window with the resample's NLL.
        resamples = (dict(zip(names, nll_K.tolist(), strict=True)) for nll_K in nll_KR.T)
        return np.array([_custom(objective, by_name, scores) for by_name in resamples])
    if objective.own is not None:
        worst_R: NDArray[np.float64] = nll_KR.max(axis=0)
        return worst_R
    weights_K = np.array([objective.weights[name] for name in names])
    mean_R: NDArray[np.float64] = weights_K / weights_K.sum() @ nll_KR
    return mean_R
