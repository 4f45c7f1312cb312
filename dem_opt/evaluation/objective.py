"""What is minimized: a weighted mean of NLL or the largest regret, and by how much what is protected is violated."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

from dem_opt.types import Score


def mean_nll(scores: Mapping[str, Score], weights: Mapping[str, float]) -> float:
    """The weighted mean over distributions of NLL, in nats per token.

    Weights need not sum to 1.  Distributions of weight 0 are not looked at.
    """
    used = {name: weight for name, weight in weights.items() if weight}
    return fsum(weight * scores[name].nll for name, weight in used.items()) / fsum(used.values())


@dataclass(frozen=True)
class Objective:
    """What is minimized, in nats per token: the weighted mean of NLL over distributions, or the largest regret.

    weights  need not sum to 1; distributions of weight 0 are not looked at
    own      of each distribution, the score of its own fine-tune: given, the objective is the largest regret

        mean:  sum_i weight_i NLL_i / sum_i weight_i        worst:  max_i (NLL_i - NLL_i of the fine-tune on i)
    """

    weights: Mapping[str, float]
    own: Mapping[str, Score] | None = None

    def shares(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """d objective / d NLL by distribution: normalized weights, or 1 for the distribution that is worst off."""
        used = {name: weight for name, weight in self.weights.items() if weight}
        if self.own is None:
            total = fsum(used.values())
            return {name: weight / total for name, weight in used.items()}
        regrets = {name: scores[name].nll - self.own[name].nll for name in used if name in self.own}
        return {max(regrets, key=lambda name: regrets[name]): 1.0}

    def __call__(self, scores: Mapping[str, Score]) -> float:
        """The objective of these scores."""
        if self.own is None:
            return mean_nll(scores, self.weights)
        return fsum(scores[name].nll - self.own[name].nll for name in self.shares(scores))


def violation(scores: Mapping[str, Score], base: Mapping[str, Score], protect: Mapping[str, float]) -> float:
    """sum over protected corpora of max(0, NLL - NLL_base - allowance), in nats per token.

    0 means feasible.  Corpora that one of the two has no score on are not looked at.
    """
    known = [name for name in protect if name in scores and name in base]
    return fsum(max(0.0, scores[name].nll - base[name].nll - protect[name]) for name in known)
