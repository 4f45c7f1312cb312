"""Paired bootstrap intervals for the difference of two composites, over windows.

Shape suffixes beside the project's: R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from dem_opt.errors import EvaluationError
from dem_opt.evaluation.objective import Objective
from dem_opt.types import NATS_PER_TOKEN, Score

RESAMPLES = 4000
"""Resamples: the 2.5% and 97.5% quantiles then rest on 100 of them on either side."""


@dataclass(frozen=True)
class Difference:
    """Mean NLL of one composite minus another's, in nats per token, with a 95% interval."""

    mean: float
    low: float
    high: float


def difference(
    left: Mapping[str, Score], right: Mapping[str, Score], objective: Objective, seed: int = 0
) -> Difference:
    """Objective of `left` minus objective of `right`, both scored on the same windows.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13), paired and stratified: windows are drawn with
    replacement within each distribution, the same draws for both composites, since the losses of two composites on one
    window go up and down together.  In resample r the NLL of distribution i is a ratio of sums,

        sum_j x_{i, r(j)} / sum_j t_{i, r(j)}        x nats and t tokens of window r(j), or ln 2 times its bytes .

    The interval covers the choice of windows, and nothing else.
    """
    left_R, right_R = resampled_objectives([left, right], objective, RESAMPLES, seed)
    difference_R = left_R - right_R
    finite_R = difference_R[np.isfinite(difference_R)]  # all of them, unless a custom objective has gaps
    low, high = np.quantile(finite_R, [0.025, 0.975]) if len(finite_R) else (nan, nan)
    return Difference(objective(left) - objective(right), float(low), float(high))


def resampled_objectives(
    composites: Sequence[Mapping[str, Score]], objective: Objective, resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """The objective of each composite in each resample of the windows, [N, R] for N composites.

    All composites are scored on the same windows, and have the same draws.
    """
    rng = np.random.default_rng(seed)
    is_custom = objective.function is not None
    names = sorted(name for name, weight in objective.weights.items() if weight or is_custom)
    nll_NKR = np.empty((len(composites), len(names), resamples))
    for k, name in enumerate(names):
        # A custom objective makes what it likes of scores, which it gets back from NLL in nats per token.
        sizes_W = np.array(composites[0][name].sizes_W(NATS_PER_TOKEN if is_custom else objective.unit))
        draws_RW = rng.integers(len(sizes_W), size=(resamples, len(sizes_W)))
        sizes_R = sizes_W[draws_RW].sum(axis=1)
        for n, scores in enumerate(composites):
            assert scores[name].tokens_W == composites[0][name].tokens_W, f"{name}: scored on different windows"
            nll_NKR[n, k] = _nats(scores[name], objective, name)[draws_RW].sum(axis=1) / sizes_R
    return np.array([_combine(nll_KR, objective, names, composites[0]) for nll_KR in nll_NKR])


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
