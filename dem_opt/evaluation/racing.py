"""Racing: a paired sequential test that stops a trial which will not beat the incumbent, after some of its windows.

The difference between trial and control is estimated window by window (common random numbers), as a ratio estimator of
a stratified sample without replacement, and tested at each interim analysis at a corrected level.

Array suffix: k windows of a corpus seen so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum, inf, isfinite, sqrt
from typing import Self

import numpy as np
from scipy.special import stdtrit

from dem_opt.evaluation.interim_analyses import analysis_count
from dem_opt.evaluation.objective import mean_nll
from dem_opt.types import NATS_PER_TOKEN, Score

ERROR = 0.01
"""Largest probability of stopping a trial that would have won, over all interim analyses together."""

MARGIN = 1e-4
"""Nats per token: a trial that gains less than this counts as no better."""

CLEAR = 2.0
"""Standard errors from the goal at which a trial that can be completed later is set aside."""


@dataclass(frozen=True)
class Estimate:
    """Estimated objective of a trial minus the goal, from some of its windows.

    Attributes:
        difference: In the objective's unit.
        error: Its standard error in the objective's unit; infinite where a corpus has only one window.
        freedom: Degrees of freedom of the t distribution that  difference / error  follows.
    """

    difference: float
    error: float
    freedom: float


def satterthwaite(variances: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum of independent parts and its degrees of freedom, from each part's variance and freedom.

    freedom = (sum v)^2 / sum(v^2 / freedom)   (Satterthwaite 1946); infinite without an error, or a bound on it.
    """
    variance = sum(part for part, _ in variances)
    is_defined = 0 < variance < inf
    freedom = variance**2 / fsum(part**2 / freedom for part, freedom in variances) if is_defined else inf
    return sqrt(variance), freedom


@dataclass(frozen=True)
class Race:
    """The stopping rule of a trial that is compared with a control, window by window.

    Attributes:
        control: Scores on all windows by corpus, as close to the trial's as can be known before it is scored: those of
            the incumbent, or a weighted sum of several complete trials'.
        weights: The objective's weight of each corpus that has one.
        goal: The incumbent's objective.
        clear: Standard errors from the goal, on either side, at which the trial is set aside; infinite where a stopped
            trial is never completed.
        unit: Unit of the objective.
    """

    control: Mapping[str, Score]
    weights: Mapping[str, float]
    goal: float
    clear: float = inf
    unit: str = NATS_PER_TOKEN

    @classmethod
    def against(cls, incumbent: Mapping[str, Score], weights: Mapping[str, float], unit: str = NATS_PER_TOKEN) -> Self:
        """Make a race whose control is the incumbent itself."""
        return cls(incumbent, weights, mean_nll(incumbent, weights, unit), unit=unit)

    def estimate(self, scores: Mapping[str, Score]) -> Estimate:
        """Estimate the trial's objective minus the goal, with the control as a control variate of coefficient 1.

            difference = mean_i(NLL_i of the control) + mean_i(d_i) - goal      (means with the objective's weights)
            d_i = sum_j (x_ij - y_ij) / sum_j t_ij                              (ratio estimator of corpus i)

        over the first k_i of its W_i windows, with nats x of the trial and y of the control, and sizes t (scored
        tokens, or ln 2 times bytes).  The variance of a ratio estimator with the finite population's correction is, for
        each corpus,

            (1 - k / W)  sum_j r_j^2 / (k - 1)  k / (sum_j t_j)^2 ,     r_j = x_j - y_j - d t_j

        (Cochran 1977, Sampling Techniques, sections 2.6 and 6.4).  Variances add up with squared weights.

        What is estimated is the trial's mean over the W windows at hand, and these come in an order that was drawn at
        random: so the windows seen are a simple random sample of all, and the variance is unbiased whatever the windows
        have in common.  Documents that several windows share widen intervals for other texts (`analysis.sampling`), but
        not this error.
        """
        total = fsum(self.weights.values())
        parts = [(weight / total, *self._part(key, scores[key])) for key, weight in self.weights.items()]
        lead = mean_nll(self.control, self.weights, self.unit) - self.goal
        difference = fsum([lead, *(weight * mean for weight, mean, _, _ in parts)])
        error, freedom = satterthwaite([(weight**2 * variance, freedom) for weight, _, variance, freedom in parts])
        return Estimate(difference, error, freedom)

    def beginning_with(self, windows: Mapping[str, range]) -> Self:
        """Make the race whose control's first windows are these of each corpus: another sample that is as random."""
        return replace(self, control={key: _reordered(score, windows[key]) for key, score in self.control.items()})

    def loss(self, key: str, score: Score) -> float:
        """Estimate a corpus's NLL from its first windows, in the objective's unit."""
        return self.control[key].loss(self.unit) + self._part(key, score)[0]

    def _part(self, key: str, score: Score) -> tuple[float, float, float]:
        """Return d, its variance and degrees of freedom for one corpus."""
        control, seen = self.control[key], len(score.nats_W)
        sizes_k = np.array(score.sizes_W(self.unit))
        difference_k = np.subtract(score.nats_W, control.nats_W[:seen])
        mean = float(difference_k.sum() / sizes_k.sum())
        if seen == len(control.nats_W):
            return mean, 0.0, inf  # the whole population: no sampling error
        if seen == 1:
            return mean, inf, 1.0  # one window says nothing about the spread
        residual_k = difference_k - mean * sizes_k
        variance = (
            (1 - seen / len(control.nats_W)) * float((residual_k**2).sum()) / (seen - 1) * seen / sizes_k.sum() ** 2
        )
        return mean, float(variance), float(seen - 1)

    @cached_property
    def _interim_analyses(self) -> int:
        """Analyses before the final one, at which the race may be stopped."""
        return max(analysis_count({key: len(self.control[key].nats_W) for key in self.weights}) - 1, 1)

    def is_over(self, scores: Mapping[str, Score]) -> bool:
        """Return whether the trial is stopped: it is lost, or clearly on one side of the goal."""
        estimate = self.estimate(scores)
        return abs(estimate.difference) > self.clear * estimate.error or self.is_lost(estimate)

    def is_lost(self, estimate: Estimate) -> bool:
        """Test whether the trial gains no more than MARGIN.

        A one-sided t test at level  ERROR / (number of interim analyses) : by Bonferroni's inequality all of them
        together stop a trial that would win with probability at most ERROR, as far as means of windows are normal.
        """
        if not isfinite(estimate.error):
            return False
        quantile = -float(stdtrit(estimate.freedom, ERROR / self._interim_analyses)) if estimate.error else 0.0
        return estimate.difference - quantile * estimate.error > -MARGIN


def _reordered(score: Score, first: range) -> Score:
    """Put some windows of a score before the others."""
    order = [*first, *(window for window in range(len(score.nats_W)) if window not in first)]
    nats_W, tokens_W, bytes_W = (
        tuple(row[n] for n in order) if row else () for row in (score.nats_W, score.tokens_W, score.bytes_W)
    )
    return Score(nats_W, tokens_W, bytes_W)
