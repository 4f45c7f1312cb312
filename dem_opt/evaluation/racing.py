"""When a trial may be stopped: a paired sequential test against the incumbent, on the windows scored so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf, isfinite, sqrt
from typing import Self

import numpy as np
from scipy.special import stdtrit

from dem_opt.evaluation.interim_analyses import interim_analyses
from dem_opt.evaluation.objective import mean_nll
from dem_opt.types import Score

ERROR = 0.01
"""The most probability with which a trial that would have won is stopped, over all looks at it together."""

MARGIN = 1e-4
"""Nats per token: a trial that will not win by more than this will not win."""

CLEAR = 2.0
"""Standard errors from the goal at which a trial that can be completed later is set aside."""


@dataclass(frozen=True)
class Estimate:
    """Objective of a trial minus the incumbent's in nats per token, from some windows, and its standard error."""

    difference: float
    error: float
    freedom: float


@dataclass(frozen=True)
class Race:
    """What a trial is held against, window by window.

    control  whole scores by corpus, as like the trial's as can be told before it is measured: those of a rival, or a
             weighted sum of several whole trials'
    weights  the objective's weight of each corpus, of those that have any
    goal     the incumbent's objective in nats per token
    clear    standard errors from the goal at which the trial is set aside, better or worse; infinite where what is
             stopped is never completed
    """

    control: Mapping[str, Score]
    weights: Mapping[str, float]
    goal: float
    clear: float = inf

    @classmethod
    def against(cls, rival: Mapping[str, Score], weights: Mapping[str, float]) -> Self:
        """A race against an incumbent that is the control itself."""
        return cls(rival, weights, mean_nll(rival, weights))

    def estimate(self, scores: Mapping[str, Score]) -> Estimate:
        """The control-variate estimate, weighted over corpora:  control's mean + d - goal  with, of each corpus i,

            d_i = sum_j (x_ij - y_ij) / sum_j t_ij  over the first k_i of its W_i windows, x and y nats of trial and
        control, t tokens.  Its variance is that of a ratio estimator with the finite population's correction,
        (1 - k/W) sum_j r_j^2 / (k - 1) * k / (sum_j t_j)^2,  r = x - y - d t  (Cochran 1977, sections 2.6 and 6.4); the
        degrees of freedom are Satterthwaite's.  A corpus of which one window was seen makes the error infinite.
        """
        total = fsum(self.weights.values())
        parts = [(weight / total, *self._part(key, scores[key])) for key, weight in self.weights.items()]
        lead = mean_nll(self.control, self.weights) - self.goal
        difference = fsum([lead, *(weight * mean for weight, mean, _, _ in parts)])
        variances = [(weight**2 * variance, freedom) for weight, _, variance, freedom in parts]
        variance = sum(part for part, _ in variances)
        known = 0 < variance < inf
        freedom = variance**2 / fsum(part**2 / freedom for part, freedom in variances) if known else inf
        return Estimate(difference, sqrt(variance), freedom)

    def nll(self, key: str, score: Score) -> float:
        """The estimate of a corpus's NLL from its first windows, in nats per token."""
        return self.control[key].nll + self._part(key, score)[0]

    def _part(self, key: str, score: Score) -> tuple[float, float, float]:
        """Difference from the control, its variance and degrees of freedom on one corpus."""
        control, seen = self.control[key], len(score.nats_W)
        tokens_k = np.array(score.tokens_W)
        difference_k = np.subtract(score.nats_W, control.nats_W[:seen])
        mean = float(difference_k.sum() / tokens_k.sum())
        if seen == len(control.nats_W):
            return mean, 0.0, inf
        if seen == 1:
            return mean, inf, 1.0
        rest_k = difference_k - mean * tokens_k
        variance = (1 - seen / len(control.nats_W)) * float((rest_k**2).sum()) / (seen - 1) * seen / tokens_k.sum() ** 2
        return mean, float(variance), float(seen - 1)

    @cached_property
    def _looks(self) -> int:
        """Looks before the end at which the race may be stopped."""
        return max(interim_analyses({key: len(self.control[key].nats_W) for key in self.weights}) - 1, 1)

    def is_over(self, scores: Mapping[str, Score]) -> bool:
        """Whether the trial is stopped: it is lost, or it is clear on which side of the goal it is."""
        found = self.estimate(scores)
        return abs(found.difference) > self.clear * found.error or self.is_lost(found)

    def is_lost(self, found: Estimate) -> bool:
        """Whether the trial will not win: beyond doubt it gains no more than MARGIN.

        One-sided t tests whose error is divided by the number of looks (Bonferroni), so that all of them together stop
        a trial that would win with a probability of at most ERROR, as far as means of windows are normal.
        """
        if not isfinite(found.error):
            return False
        bound = -float(stdtrit(found.freedom, ERROR / self._looks)) if found.error else 0.0
        return found.difference - bound * found.error > -MARGIN
