"""Cost and quality of merging fine-tunes against training on data mixtures.

Floating-point operations of P parameters and T tokens, by the usual count (Kaplan et al. 2020, arXiv:2001.08361,
section 2.1):

    forward   2 P T        a training step, forward and backward   (4 P + 2 P_trained) T ,  6 P T where all are trained

since frozen weights need no gradient of their own.  Attention scores and the optimizer's operations are left out, for
all methods alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, nan

import numpy as np

from dem_opt.analysis.bootstrap import Difference
from dem_opt.analysis.order_statistics import expected_best
from dem_opt.types import HELD_OUT, NATS_PER_TOKEN, SEARCH, UNITS


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Tokens through models in training and in scoring, floating-point operations of each, and seconds of work."""

    trained_tokens: int = 0
    training_flops: float = 0.0
    forward_tokens: int = 0
    forward_flops: float = 0.0
    seconds: float = 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations of training and scoring together."""
        return self.training_flops + self.forward_flops

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            trained_tokens=self.trained_tokens + other.trained_tokens,
            training_flops=self.training_flops + other.training_flops,
            forward_tokens=self.forward_tokens + other.forward_tokens,
            forward_flops=self.forward_flops + other.forward_flops,
            seconds=self.seconds + other.seconds,
        )


def training_cost(parameters: int, trained: int, tokens: int, seconds: float) -> Cost:
    """Cost of training a model of so many parameters, some of which are trained, on so many tokens."""
    flops = (4.0 * parameters + 2.0 * trained) * tokens
    return Cost(trained_tokens=tokens, training_flops=flops, seconds=seconds)


def forward_cost(parameters: int, tokens: int, seconds: float) -> Cost:
    """Cost of scoring so many tokens with a model of so many parameters."""
    return Cost(forward_tokens=tokens, forward_flops=2.0 * parameters * tokens, seconds=seconds)


@dataclass(frozen=True)
class BaseScore:
    """The base, from which all methods start.

    Attributes:
        objective: Objective by split, in its unit.
        nll: NLL by split and corpus, in nats per token.
        difference: Its held-out objective minus the composite's.
    """

    objective: Mapping[str, float]
    nll: Mapping[str, Mapping[str, float]]
    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureResult:
    """A model trained on a mixture.

    Attributes:
        budget: "all": as many tokens as all single fine-tunes together; "one": as many as one of them.
        shares: Shares of the tokens by distribution.
        objective: Objective by split, in its unit.
        nll: NLL by split and corpus, in nats per token.
        cost: Cost of training it, and of scoring it on the search split.
        difference: Its held-out objective minus the composite's, with its interval over documents.
    """

    budget: str
    shares: Mapping[str, float]
    objective: Mapping[str, float]
    nll: Mapping[str, Mapping[str, float]]
    cost: Cost
    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class ProposedResult:
    """A model trained on the shares that the study proposed.

    Attributes:
        folder: Name of its folder among those of mixtures.
        start: "base" or "composite", which its training began with.
        shares: Shares of the tokens by distribution.
        objective: Objective by split, in its unit.
        nll: NLL by split and corpus, in nats per token.
        cost: Cost of training it and of scoring it on the search split, without the fine-tunes and the search.
        difference: Its held-out objective minus the composite's, with its interval over documents.
    """

    folder: str
    start: str
    shares: Mapping[str, float]
    objective: Mapping[str, float]
    nll: Mapping[str, Mapping[str, float]]
    cost: Cost
    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A composite with its scores and its cost.

    Attributes:
        label: Its label in the results table.
        coefficients: Coefficients by distribution.
        objective: Objective by split, in its unit.
        nll: NLL by split and corpus, in nats per token.
        training: Cost of training every fine-tune once.
        search: Cost of the search.
    """

    label: str
    coefficients: Mapping[str, float]
    objective: Mapping[str, float]
    nll: Mapping[str, Mapping[str, float]]
    training: Cost
    search: Cost

    @property
    def cost(self) -> Cost:
        """Training and search together."""
        return self.training + self.search


@dataclass(frozen=True)
class ExpectedBest:
    """The best of k mixtures, chosen on the search split: expectation over the choice of the k.

    Attributes:
        mixtures: k.
        flops: Floating-point operations of k mixtures.
        objective: Expected objective by split, in the objective's unit.
    """

    mixtures: int
    flops: float
    objective: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class BudgetComparison:
    """The composite against mixtures of one budget.

    Ratios are the mixtures' floating-point operations over the composite's.

    Attributes:
        budget: "all" or "one" (see `MixtureResult`).
        curve: Expected best by the number of mixtures tried, from 1 on.
        ratio: Ratio of all mixtures.
        equal_quality: Fewest mixtures whose expected best is as good on the held-out split; None where none are.
        equal_ratio: Ratio of that many.
        equal_cost: Most mixtures that cost no more than the composite; 0 where one costs more.
    """

    budget: str
    curve: tuple[ExpectedBest, ...]
    ratio: float
    equal_quality: int | None
    equal_ratio: float | None
    equal_cost: int

    @property
    def mixtures(self) -> int:
        """Number of mixtures."""
        return len(self.curve)


@dataclass(frozen=True, kw_only=True)
class MixingComparison:
    """Result of `dem-opt compare --data-mixing`.

    Attributes:
        study: Name of the study.
        weights: The objective's weights by distribution.
        parameters: Parameters of the model.
        edited: The composite.
        mixed: The models trained on mixtures.
        base: The base.
        unit: Unit of objectives, in words.
        proposed: The models trained on proposed shares.
    """

    study: str
    weights: Mapping[str, float]
    parameters: int
    edited: MergeResult
    mixed: tuple[MixtureResult, ...]
    base: BaseScore
    unit: str = UNITS[NATS_PER_TOKEN]
    proposed: tuple[ProposedResult, ...] = ()

    @property
    def against(self) -> tuple[BudgetComparison, ...]:
        """The composite against each budget's mixtures."""
        by_budget: dict[str, list[MixtureResult]] = {}
        for mixture in self.mixed:
            by_budget.setdefault(mixture.budget, []).append(mixture)
        return tuple(_against(self.edited, mixtures) for mixtures in by_budget.values())

    def total_cost(self, proposed: ProposedResult) -> Cost:
        """Cost of a proposed mixture's model with everything that led to it: fine-tunes, search, one training."""
        return self.edited.cost + proposed.cost

    def rivals_of(self, proposed: ProposedResult) -> list[MixtureResult]:
        """The mixtures that were trained on as many tokens as a proposed one, the best on the search split first."""
        tokens = proposed.cost.trained_tokens
        rivals = (mixture for mixture in self.mixed if mixture.cost.trained_tokens == tokens)
        return sorted(rivals, key=lambda mixture: mixture.objective[SEARCH])

    def kept(self, budget: str) -> float:
        """The composite's gain over the base on the held-out split, as a part of the gain of a budget's best mixture.

        (base - composite) / (base - mixture) ;  not finite where the mixture gains nothing.
        """
        base, best = self.base.objective[HELD_OUT], self.best(budget).objective[HELD_OUT]
        return (base - self.edited.objective[HELD_OUT]) / (base - best) if best < base else nan

    def best(self, budget: str) -> MixtureResult:
        """The best of a budget's mixtures, chosen on the search split."""
        mixtures = (mixture for mixture in self.mixed if mixture.budget == budget)
        return min(mixtures, key=lambda mixture: mixture.objective[SEARCH])


def curve(mixtures: Sequence[MixtureResult]) -> tuple[ExpectedBest, ...]:
    """Expected best of 1, 2, ... of the mixtures and its cost, on average over all orders of trying them."""
    ranked = sorted(mixtures, key=lambda mixture: mixture.objective[SEARCH])
    mean_flops = fsum(mixture.cost.flops for mixture in mixtures) / len(mixtures)
    tried_S = np.arange(1, len(ranked) + 1)
    by_split = {
        split: expected_best([mixture.objective[split] for mixture in ranked], tried_S).tolist()
        for split in (SEARCH, HELD_OUT)
    }
    return tuple(
        ExpectedBest(tried, tried * mean_flops, {split: expected[tried - 1] for split, expected in by_split.items()})
        for tried in tried_S.tolist()
    )


def _against(composite: MergeResult, mixtures: Sequence[MixtureResult]) -> BudgetComparison:
    points, flops = curve(mixtures), composite.cost.flops
    as_good = next((point for point in points if point.objective[HELD_OUT] <= composite.objective[HELD_OUT]), None)
    return BudgetComparison(
        budget=mixtures[0].budget,
        curve=points,
        ratio=points[-1].flops / flops,
        equal_quality=None if as_good is None else as_good.mixtures,
        equal_ratio=None if as_good is None else as_good.flops / flops,
        equal_cost=max((point.mixtures for point in points if point.flops <= flops), default=0),
    )


def verdict(comparison: MixingComparison, budget: BudgetComparison) -> list[str]:
    """The outcome for one budget, in sentences; every ratio stands with its number of mixtures."""
    composite, count = comparison.edited, f"{budget.mixtures} mixtures"
    best = comparison.best(budget.budget)
    gap = _gap(best.objective[HELD_OUT] - composite.objective[HELD_OUT], comparison.unit)
    outcome = f"{gap} on the held-out split{_interval(best.difference)}."
    times = f"{budget.ratio:.2f} times the floating-point operations of the fine-tunes and the search"
    single = budget.mixtures == 1
    sentences = [
        f"The mixture takes {times}, and is {outcome}"
        if single
        else f"All {count} take {times}; the best of them is {outcome}"
    ]
    if isfinite(kept := comparison.kept(budget.budget)):
        sentences.append(f"The composite's gain over the base is {kept:.0%} of that mixture's.")
    if single:
        return sentences
    if budget.equal_quality is None:
        sentences.append(
            f"At equal quality: no number of them is expected to be as good as the composite, up to {count}."
        )
    else:
        verb = "is" if budget.equal_quality == 1 else "are"
        sentences.append(
            f"At equal quality: {budget.equal_quality} of the {count} {verb} expected to be as good, for "
            f"{budget.equal_ratio:.2f} times the operations."
        )
    if budget.equal_cost == 0:
        sentences.append("At equal cost: not one mixture.")
    else:
        expected = budget.curve[budget.equal_cost - 1].objective[HELD_OUT] - composite.objective[HELD_OUT]
        sentences.append(
            f"At equal cost: {budget.equal_cost} of the {count}, whose best is expected to be "
            f"{_gap(expected, comparison.unit)}."
        )
    return sentences


def proposed_name(comparison: MixingComparison, proposed: ProposedResult) -> str:
    """A proposed mixture by its start and tokens, and by its shares where others have these."""
    name = f"proposed mixture from the {proposed.start}, {proposed.cost.trained_tokens:,} tokens"
    alike = [
        other
        for other in comparison.proposed
        if (other.start, other.cost.trained_tokens) == (proposed.start, proposed.cost.trained_tokens)
    ]
    return name if len(alike) == 1 else f"{name} ({shares_text(proposed.shares, '.3g')})"


def shares_text(shares: Mapping[str, float], digits: str = "g") -> str:
    """Shares in words, those of 0 left out."""
    return ", ".join(f"{name} {share:{digits}}" for name, share in shares.items() if share)


def proposed_verdict(comparison: MixingComparison, proposed: ProposedResult) -> str:
    """The outcome of a training on proposed shares, in sentences."""
    value, name = proposed.objective[HELD_OUT], proposed_name(comparison, proposed)
    sentences = [
        f"{name[0].upper()}{name[1:]}: {value:.4f} {comparison.unit} on the "
        f"held-out split, {_gap(value - comparison.edited.objective[HELD_OUT], comparison.unit)} than the composite"
        f"{_interval(proposed.difference)}."
    ]
    if rivals := comparison.rivals_of(proposed):
        flops = comparison.total_cost(proposed).flops / sum(mixture.cost.flops for mixture in rivals)
        gap = value - rivals[0].objective[HELD_OUT]
        sentences.append(
            f"It is {_gap(gap, comparison.unit)} than the best of {len(rivals)} mixtures with as many tokens, for "
            f"{flops:.2f} times their operations, fine-tunes and search included."
        )
    return " ".join(sentences)


def _interval(apart: Difference | None) -> str:
    """The interval of a difference to the composite, in words."""
    if apart is None:
        return ""
    return f" (model minus composite, 95% interval over {apart.sampled} {apart.low:+.4f} to {apart.high:+.4f})"


def _gap(difference: float, unit: str) -> str:
    return f"{abs(difference):.4f} {unit} {'worse' if difference > 0 else 'better'}"
