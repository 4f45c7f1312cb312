"""How sure a difference of two composites is: paired bootstrap intervals over windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dem_opt.evaluation.objective import Objective
from dem_opt.types import Score

RESAMPLES = 4000


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
    replacement within each distribution, the same draws for both composites, since the losses of two composites
    on one window go up and down together.  What the interval covers is the choice of windows, and nothing else.
    """
    rng = np.random.default_rng(seed)
    names = sorted(name for name, weight in objective.weights.items() if weight)
    sides: list[list[NDArray[np.float64]]] = [[], []]
    for name in names:
        assert left[name].tokens_W == right[name].tokens_W, f"{name}: scored on different windows"
        tokens_W = np.array(left[name].tokens_W)
        draws_RW = rng.integers(len(tokens_W), size=(RESAMPLES, len(tokens_W)))
        tokens_R = tokens_W[draws_RW].sum(axis=1)
        for side, scores in zip(sides, (left, right), strict=True):
            nats_W = np.array(scores[name].nats_W)
            if objective.own is not None:
                nats_W -= objective.own[name].nats_W
            side.append(nats_W[draws_RW].sum(axis=1) / tokens_R)
    of_left_R, of_right_R = (_combine(np.array(side), objective, names) for side in sides)
    low, high = np.quantile(of_left_R - of_right_R, [0.025, 0.975])
    return Difference(objective(left) - objective(right), float(low), float(high))


def _combine(nll_KR: NDArray[np.float64], objective: Objective, names: Sequence[str]) -> NDArray[np.float64]:
    """The objective of each resample: the weighted mean of NLL, or the largest regret."""
    if objective.own is not None:
        worst_R: NDArray[np.float64] = nll_KR.max(axis=0)
        return worst_R
    weights_K = np.array([objective.weights[name] for name in names])
    mean_R: NDArray[np.float64] = weights_K / weights_K.sum() @ nll_KR
    return mean_R
