"""What a way to a model costs and what it gives: merging fine-tunes against training on mixtures.

Floating-point operations of P parameters and T tokens, by the usual count: forward  2 P T ;  a training step's forward
and backward pass  6 P T  where all parameters are trained, else  (4 P + 2 P_trained) T , since frozen weights need no
gradient of their own.  Attention's scores and what optimizers do are left out, for all alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, fsum, isfinite, nan

from dem_opt.types import HELD_OUT, SEARCH


@dataclass(frozen=True)
class Cost:
    """Tokens through models in training and in scoring, the floating-point operations of each, seconds of work."""

    trained_tokens: int = 0
    training_flops: float = 0.0
    forward_tokens: int = 0
    forward_flops: float = 0.0
    seconds: float = 0.0

    @property
    def flops(self) -> float:
        """Both."""
        return self.training_flops + self.forward_flops

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.trained_tokens + other.trained_tokens,
            self.training_flops + other.training_flops,
            self.forward_tokens + other.forward_tokens,
            self.forward_flops + other.forward_flops,
            self.seconds + other.seconds,
        )


def training_cost(parameters: int, trained: int, tokens: int, seconds: float) -> Cost:
    """Of so many tokens through a model with so many parameters, some of which are trained."""
    return Cost(tokens, (4.0 * parameters + 2.0 * trained) * tokens, seconds=seconds)


def forward_cost(parameters: int, tokens: int, seconds: float) -> Cost:
    """Of so many tokens through a model in scoring."""
    return Cost(forward_tokens=tokens, forward_flops=2.0 * parameters * tokens, seconds=seconds)


@dataclass(frozen=True)
class BaseScore:
    """What all ways start from, the base: its objective by split, its NLL by split and corpus."""

    objective: Mapping[str, float]
    nll: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class MixtureResult:
    """A model trained on a mixture.

    budget     "all": as many tokens as all single fine-tunes together; "one": as many as one of them
    shares     of the tokens, by distribution
    objective  by split, nats per token; `nll` by split and corpus
    cost       of its training, and of scoring it on the search split
    """

    budget: str
    shares: Mapping[str, float]
    objective: Mapping[str, float]
    nll: Mapping[str, Mapping[str, float]]
    cost: Cost


@dataclass(frozen=True)
class MergeResult:
    """A composite: which, what it scores, and what it took: every fine-tuning once, and the search."""

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
    """What k mixtures give: expected over which k of all there are, the best of them chosen on the search split."""

    mixtures: int
    flops: float
    objective: Mapping[str, float]


@dataclass(frozen=True)
class BudgetComparison:
    """Composites against mixtures of one budget.  Ratios are mixtures' floating-point operations over composites'.

    curve          by the number of mixtures tried
    ratio          of all of them
    equal_quality  the fewest mixtures whose expected best is as good on the held-out split; None where none are
    equal_ratio    the ratio of so many
    equal_cost     the most mixtures that cost no more than the composite; 0 where one costs more
    """

    budget: str
    curve: tuple[ExpectedBest, ...]
    ratio: float
    equal_quality: int | None
    equal_ratio: float | None
    equal_cost: int

    @property
    def mixtures(self) -> int:
        """How many there are."""
        return len(self.curve)


@dataclass(frozen=True)
class MixingComparison:
    """What `dem-opt compare --data-mixing` found: the composite, the models trained on mixtures, the base."""

    study: str
    weights: Mapping[str, float]
    parameters: int
    edited: MergeResult
    mixed: tuple[MixtureResult, ...]
    base: BaseScore

    @property
    def against(self) -> tuple[BudgetComparison, ...]:
        """The composite against each budget's mixtures."""
        budgets = dict.fromkeys(one.budget for one in self.mixed)
        return tuple(_against(self.edited, [one for one in self.mixed if one.budget == name]) for name in budgets)

    def kept(self, budget: str) -> float:
        """The composite's gain over the base on the held-out split, as a part of what the best of a budget gains.

        (base - composite) / (base - mixture) ;  not finite where the mixture gains nothing.
        """
        base, best = self.base.objective[HELD_OUT], self.best(budget).objective[HELD_OUT]
        return (base - self.edited.objective[HELD_OUT]) / (base - best) if best < base else nan

    def best(self, budget: str) -> MixtureResult:
        """The best of a budget's mixtures, chosen on the search split."""
        return min((one for one in self.mixed if one.budget == budget), key=lambda one: one.objective[SEARCH])


def expected_best(ranked: Sequence[float], tried: int) -> float:
    """The expected value of the best ranked of `tried` that are drawn from all without repetition.

    sum_i value_i C(M - i, k - 1) / C(M, k) ,  i counted from 1: the i-th is the best where the others come after it.
    """
    every = comb(len(ranked), tried)
    return fsum(value * comb(len(ranked) - i, tried - 1) / every for i, value in enumerate(ranked, start=1))


def curve(mixed: Sequence[MixtureResult]) -> tuple[ExpectedBest, ...]:
    """What 1, 2, ... of the mixtures cost and give, on average over all orders of trying them."""
    ranked = sorted(mixed, key=lambda one: one.objective[SEARCH])
    each = fsum(one.cost.flops for one in mixed) / len(mixed)
    return tuple(
        ExpectedBest(
            tried,
            tried * each,
            {split: expected_best([one.objective[split] for one in ranked], tried) for split in (SEARCH, HELD_OUT)},
        )
        for tried in range(1, len(ranked) + 1)
    )


def _against(edited: MergeResult, mixed: Sequence[MixtureResult]) -> BudgetComparison:
    tried, own = curve(mixed), edited.cost.flops
    as_good = next((one for one in tried if one.objective[HELD_OUT] <= edited.objective[HELD_OUT]), None)
    return BudgetComparison(
        mixed[0].budget,
        tried,
        tried[-1].flops / own,
        None if as_good is None else as_good.mixtures,
        None if as_good is None else as_good.flops / own,
        max((one.mixtures for one in tried if one.flops <= own), default=0),
    )


def verdict(found: MixingComparison, one: BudgetComparison) -> list[str]:
    """What a comparison says, in sentences; every ratio stands with its number of mixtures."""
    edited, whole, last = found.edited, f"{one.mixtures} mixtures", one.curve[-1]
    gap = last.objective[HELD_OUT] - edited.objective[HELD_OUT]
    told = [
        f"All {whole} take {one.ratio:.2f} times the floating-point operations of the fine-tunes and the search; the "
        f"best of them is {abs(gap):.4f} nats per token {'worse' if gap > 0 else 'better'} on the held-out split."
    ]
    if isfinite(kept := found.kept(one.budget)):
        told.append(f"The composite's gain over the base is {kept:.0%} of that mixture's.")
    if one.equal_quality is None:
        told.append(f"At equal quality: no number of them is expected to be as good as the composite, up to {whole}.")
    else:
        are = "is" if one.equal_quality == 1 else "are"
        told.append(
            f"At equal quality: {one.equal_quality} of the {whole} {are} expected to be as good, for "
            f"{one.equal_ratio:.2f} times the operations."
        )
    if one.equal_cost == 0:
        told.append("At equal cost: not one mixture.")
    else:
        there = one.curve[one.equal_cost - 1].objective[HELD_OUT] - edited.objective[HELD_OUT]
        told.append(
            f"At equal cost: {one.equal_cost} of the {whole}, whose best is expected to be {abs(there):.4f} nats per "
            f"token {'worse' if there > 0 else 'better'}."
        )
    return told
