"""Requests to workers, and their answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Protocol

from dem_opt.types.composites import Composite, StoredModel
from dem_opt.types.scores import Corpus, Score

GRADIENT_FORWARDS = 3.0
"""Forward-equivalents of an evaluation with its gradient: by FLOPs a backward pass is two forward passes."""

PENALTY = 10.0
"""Amount added to the objective that is minimized for each unit of violation.

An exact penalty: where a nat of violation buys less than 10 nats of objective, the minimum of the sum is feasible,
so the surrogate need not know the constraint.
"""


class StoppingRule(Protocol):
    """Decision at each interim analysis whether to stop a trial (racing)."""

    def is_over(self, scores: Mapping[str, Score]) -> bool:
        """Stop the trial, of which these scores are known."""


Gradient = Mapping[str, float]
"""By content of each fine-tune i:  < d nats / d Theta_D , Theta_i - Theta > , nats summed over a corpus's windows."""

ParameterGradient = Mapping[str, Gradient]
"""The same for each parameter by its name: sums over parameters are the gradient of any groups of them."""

Folds = tuple[tuple[int, ...], ...]
"""Windows of each fold of a corpus."""


@dataclass(frozen=True)
class PartGradient:
    """A measurement on some windows of a corpus.

    Attributes:
        score: Nats of these windows.
        gradient: That of their sum.
    """

    score: Score
    gradient: Gradient


@dataclass(frozen=True, kw_only=True)
class Request:
    """One evaluation for a worker: a composite's nats on the named corpora.

    Attributes:
        ticket: Number that comes back with the answer, unchanged.
        corpora: Keys of the corpora to score.
        known: Scores measured before, by corpus; a short one is continued, a whole one repeated.
        race: Stopping rule; scoring ends at the first interim analysis at which the trial is lost.
        gradient: Measure the gradient too.
        folds: With a gradient, the windows of each fold of each corpus, by its key: the gradient is measured by fold
            and by parameter then.
        parts: With a gradient, the windows of parts of each corpus, by its key: the gradient is measured by part then.
    """

    ticket: int
    composite: Composite
    corpora: tuple[str, ...]
    known: Mapping[str, Score] = dataclass_field(default_factory=dict)
    race: StoppingRule | None = None
    gradient: bool = False
    folds: Mapping[str, Folds] = dataclass_field(default_factory=dict)
    parts: Mapping[str, tuple[range, ...]] = dataclass_field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A worker's answer: a score for each corpus of the request, and its cost.

    Attributes:
        scores: By corpus key; short where the trial was stopped, with what the request knew; none of a corpus of which
            not all parts were asked for.
        forward_tokens: Tokens that went forward through the model, scored or not.
        merge_seconds: Time to merge the composite.
        score_seconds: Time of the forward (and backward) passes.
        gradients: By corpus key, where the request asked for them.
        fold_gradients: By corpus key, then by the windows of a fold, where the request asked for folds.
        part_gradients: By corpus key, then by the windows of a part, where the request asked for parts.
        scored_tokens: Forward tokens whose nats count; the others are padding, prompts, first tokens.
        wait_seconds: Time the worker was idle before, since its last evaluation.
        batch_tokens: Most tokens in one forward call, where memory allowed fewer than the study file says; else 0.
        note: One line for the user about this evaluation, or "".
    """

    scores: Mapping[str, Score]
    forward_tokens: int = 0
    merge_seconds: float = 0.0
    score_seconds: float = 0.0
    gradients: Mapping[str, Gradient] = dataclass_field(default_factory=dict)
    fold_gradients: Mapping[str, Mapping[tuple[int, ...], ParameterGradient]] = dataclass_field(default_factory=dict)
    part_gradients: Mapping[str, Mapping[range, PartGradient]] = dataclass_field(default_factory=dict)
    scored_tokens: int = 0
    wait_seconds: float = 0.0
    batch_tokens: int = 0
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """A request that gave no scores, and the reason."""

    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkerSpec:
    """Everything a worker holds for life: stored checkpoints, corpora, settings of the evaluation.

    Attributes:
        base: Gives architecture, parameter dtypes and tokenizer; a term of the composites whose coefficient of it
            is not 0.
        dtype: Dtype of the forward pass as torch names it ("float32", "bfloat16").
        batch_tokens: Most tokens in one forward call (at least one window).
        vectors: "exact", fine-tunes as they are stored; "int8", their distribution vectors in int8.
        streamed: Contents of checkpoints that stay in their files.
        devices: Devices that the model's layers are divided over.
    """

    base: StoredModel
    fine_tunes: tuple[StoredModel, ...]
    corpora: tuple[Corpus, ...]
    dtype: str = "float32"
    batch_tokens: int = 4096
    vectors: str = "exact"
    streamed: tuple[str, ...] = ()
    devices: int = 1
