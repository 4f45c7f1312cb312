"""When a trial may be stopped: a paired sequential test against the incumbent, on the windows scored so far.

Windows stand in a fixed order that was drawn at random, so the first k of every corpus are a stratified sample of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf, isfinite, sqrt

import numpy as np

from dem_opt.records import Referee, Score

LOOKS = 8
"""How often a race is looked at at most, the end included: after each eighth of every corpus's windows."""

ERROR = 0.01
"""The most probability with which a trial that would have won is stopped, over all looks at it together."""

MARGIN = 1e-4
"""Nats per token: a trial that will not win by more than this will not win."""


def stops(windows: int) -> tuple[int, ...]:
    """How many of a corpus's windows each look has seen, in ascending order, the last one all of them."""
    return tuple(dict.fromkeys(-(-windows * look // LOOKS) for look in range(1, LOOKS + 1)))


def looks(windows: Mapping[str, int]) -> int:
    """How many looks there are at corpora of so many windows, the end included."""
    return max(len(stops(whole)) for whole in windows.values())


def seen(windows: Mapping[str, int], number: int) -> dict[str, int]:
    """How many windows of each corpus look `number`, from 1 on, has seen.

    A corpus of fewer stops than the others is through earlier.
    """
    return {key: stops(whole)[:number][-1] for key, whole in windows.items()}


def look(scores: Mapping[str, Score], windows: Mapping[str, int], number: int) -> dict[str, Score] | None:
    """Scores of the corpora of so many windows, as look `number` sees them; None where they do not reach that far."""
    asked = seen(windows, number)
    if any(key not in scores or len(scores[key].nats_W) < most for key, most in asked.items()):
        return None
    return {key: first(scores[key], most) for key, most in asked.items()}


def replay(referee: Referee | None, known: Mapping[str, Score], windows: Mapping[str, int]) -> dict[str, Score] | None:
    """The scores with which a race over corpora of so many windows ends; None where too little is known to tell.

    It ends at the first look at which the trial is lost, else, as without a referee, at the last one.
    """
    last = looks(windows)
    for number in range(1, last):
        scores = look(known, windows, number)
        if scores is None or (referee is not None and referee.is_lost(scores)):
            return scores
    return look(known, windows, last)


def first(score: Score, most: int) -> Score:
    """The score of the first `most` windows."""
    return Score(score.nats_W[:most], score.tokens_W[:most])


@dataclass(frozen=True)
class Estimate:
    """Objective of a trial minus its rival's in nats per token, from some windows, and its standard error."""

    difference: float
    error: float
    freedom: float


@dataclass(frozen=True)
class Race:
    """A trial's rival.

    rival    the incumbent's whole scores by corpus
    weights  the objective's weight of each corpus, of those that have any
    """

    rival: Mapping[str, Score]
    weights: Mapping[str, float]

    def estimate(self, scores: Mapping[str, Score]) -> Estimate:
        """The control-variate estimate: on the windows seen, trial minus rival, weighted over corpora.

        d_i = sum_j (x_ij - y_ij) / sum_j t_ij  over the first k_i of a corpus's W_i windows, x and y nats of trial and
        rival, t tokens.  Its variance is that of a ratio estimator with the finite population's correction,
        (1 - k/W) sum_j r_j^2 / (k - 1) * k / (sum_j t_j)^2,  r = x - y - d t  (Cochran 1977, sections 2.6 and 6.4); the
        degrees of freedom are Satterthwaite's.  A corpus of which one window was seen makes the error infinite.
        """
        total = fsum(self.weights.values())
        parts = [(weight / total, *self._part(key, scores[key])) for key, weight in self.weights.items()]
        difference = fsum(weight * mean for weight, mean, _, _ in parts)
        variances = [(weight**2 * variance, freedom) for weight, _, variance, freedom in parts]
        variance = sum(part for part, _ in variances)
        known = 0 < variance < inf
        freedom = variance**2 / fsum(part**2 / freedom for part, freedom in variances) if known else inf
        return Estimate(difference, sqrt(variance), freedom)

    def _part(self, key: str, score: Score) -> tuple[float, float, float]:
        """Difference, its variance and degrees of freedom on one corpus."""
        rival, seen = self.rival[key], len(score.nats_W)
        tokens_k = np.array(score.tokens_W)
        difference_k = np.subtract(score.nats_W, rival.nats_W[:seen])
        mean = float(difference_k.sum() / tokens_k.sum())
        if seen == len(rival.nats_W):
            return mean, 0.0, inf
        if seen == 1:
            return mean, inf, 1.0
        rest_k = difference_k - mean * tokens_k
        variance = (1 - seen / len(rival.nats_W)) * float((rest_k**2).sum()) / (seen - 1) * seen / tokens_k.sum() ** 2
        return mean, float(variance), float(seen - 1)

    @cached_property
    def _looks(self) -> int:
        """Looks before the end at which the race may be stopped."""
        return max(looks({key: len(self.rival[key].nats_W) for key in self.weights}) - 1, 1)

    def is_lost(self, scores: Mapping[str, Score]) -> bool:
        """Whether the trial will not win: its difference is no gain, and beyond doubt no gain of more than MARGIN.

        One-sided t tests whose error is divided by the number of looks (Bonferroni), so that all of them together stop
        a trial that would win with a probability of at most ERROR, as far as means of windows are normal.
        """
        from scipy.special import stdtrit

        found = self.estimate(scores)
        if found.difference < 0 or not isfinite(found.error):
            return False
        bound = -float(stdtrit(found.freedom, ERROR / self._looks)) if found.error else 0.0
        return found.difference - bound * found.error > -MARGIN
