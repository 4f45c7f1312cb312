"""The objective that a study minimizes, and the violation of its constraints, both in the objective's unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

from dem_opt.config.objective_function import ObjectiveFunction
from dem_opt.errors import shorten
from dem_opt.types import BITS_PER_BYTE, NATS_PER_TOKEN, Score

MOST_NAMED = 4
"""Corpora that the words for an objective name one by one."""


def mean_nll(scores: Mapping[str, Score], weights: Mapping[str, float], unit: str = NATS_PER_TOKEN) -> float:
    """Weighted mean of NLL over distributions, in this unit:  sum_i weight_i NLL_i / sum_i weight_i .

    Weights need not sum to 1.  Distributions of weight 0 need no score.
    """
    positive = {name: weight for name, weight in weights.items() if weight}
    return fsum(weight * scores[name].loss(unit) for name, weight in positive.items()) / fsum(positive.values())


@dataclass(frozen=True)
class Objective:
    """The objective: the weighted mean of NLL over distributions, or the largest regret.

        mean:  sum_i weight_i NLL_i / sum_i weight_i        worst:  max_i (NLL_i - NLL_i of fine-tune i)

    Attributes:
        weights: Weight of each distribution; they need not sum to 1, and distributions of weight 0 are ignored.
        own: For the largest regret, the score of each distribution's own fine-tune on it; None for the mean.
        function: A custom objective of the scores, in the place of both.
        unit: Unit of NLL, nats per token or bits per byte.
    """

    weights: Mapping[str, float]
    own: Mapping[str, Score] | None = None
    function: ObjectiveFunction | None = None
    unit: str = NATS_PER_TOKEN

    def shares(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """Return  d objective / d NLL_i  by distribution.

        Normalized weights for the mean; for the largest regret, a subgradient: 1 for the distribution that attains it.
        """
        positive = {name: weight for name, weight in self.weights.items() if weight}
        if self.own is None:
            total = fsum(positive.values())
            return {name: weight / total for name, weight in positive.items()}
        regrets = {name: self._regret(scores, self.own, name) for name in positive if name in self.own}
        return {max(regrets, key=lambda name: regrets[name]): 1.0}

    def _regret(self, scores: Mapping[str, Score], own: Mapping[str, Score], name: str) -> float:
        return scores[name].loss(self.unit) - own[name].loss(self.unit)

    def __call__(self, scores: Mapping[str, Score]) -> float:
        """Return the objective of scores by distribution.

        Raises:
            EvaluationError: A custom objective is not finite.
        """
        if self.function is not None:
            return self.function(scores)
        if self.own is None:
            return mean_nll(scores, self.weights, self.unit)
        return fsum(self._regret(scores, self.own, name) for name in self.shares(scores))


def objective_words(
    weights: Mapping[str, float], worst: bool = False, function: str = "", unit: str = NATS_PER_TOKEN
) -> str:
    """Name the quantity that is minimized, and the corpora that it is of where these are not all.

    "mean NLL", "mean NLL of code, math", "weighted mean NLL (german 4, perl 2)", "largest regret", "objective my:f";
    in bits per byte "mean BPB" and so on.
    """
    if function:
        return f"objective {function}"
    counted = {name: weight for name, weight in weights.items() if weight}
    is_equal = worst or len(set(counted.values())) == 1
    loss = "BPB" if unit == BITS_PER_BYTE else "NLL"
    kind = "largest regret" if worst else f"mean {loss}" if is_equal else f"weighted mean {loss}"
    if is_equal and len(counted) == len(weights):
        return kind
    if len(counted) > MOST_NAMED:
        return kind if len(counted) == len(weights) else f"{kind} of {len(counted)} of {len(weights)} corpora"
    if is_equal:
        return f"{kind} of {', '.join(shorten(name, 22) for name in counted)}"
    return f"{kind} ({', '.join(f'{shorten(name, 22)} {weight:.3g}' for name, weight in counted.items())})"


def violation(
    scores: Mapping[str, Score], base: Mapping[str, Score], protect: Mapping[str, float], unit: str = NATS_PER_TOKEN
) -> float:
    """Sum over protected corpora of  max(0, NLL - NLL_base - allowance) , in this unit; 0 is feasible.

    Corpora without a score of the composite or of the base are ignored.
    """
    scored = [name for name in protect if name in scores and name in base]
    return fsum(max(0.0, scores[name].loss(unit) - base[name].loss(unit) - protect[name]) for name in scored)
