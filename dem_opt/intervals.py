"""How sure a difference of two composites is: paired bootstrap intervals over windows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dem_opt.records import Score, mean_nll

RESAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """Mean NLL of one composite minus another's, in nats per token, with a 95% interval."""

    mean: float
    low: float
    high: float


def difference(
    left: Mapping[str, Score], right: Mapping[str, Score], weights: Mapping[str, float], seed: int = 0
) -> Difference:
    """Objective of `left` minus objective of `right`, both scored on the same windows.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13), paired and stratified: windows are drawn with
    replacement within each distribution, the same draws for both composites, since the losses of two composites
    on one window go up and down together.  What the interval covers is the choice of windows, and nothing else.
    """
    rng = np.random.default_rng(seed)
    total = sum(weights.values())
    means_R = np.zeros(RESAMPLES)
    for name in sorted(name for name, weight in weights.items() if weight):
        assert left[name].tokens_W == right[name].tokens_W, f"{name}: scored on different windows"
        nats_W = np.subtract(left[name].nats_W, right[name].nats_W)
        tokens_W = np.array(left[name].tokens_W)
        draws_RW = rng.integers(len(nats_W), size=(RESAMPLES, len(nats_W)))
        means_R += weights[name] / total * nats_W[draws_RW].sum(axis=1) / tokens_W[draws_RW].sum(axis=1)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Difference(mean_nll(left, weights) - mean_nll(right, weights), float(low), float(high))
