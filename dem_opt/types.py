"""What travels between rooms: Composite, Windows, Corpus, Score, Request, Evaluation, Failure, WorkerSpec.

Shape suffixes here and in every tensor room: B batch rows, T tokens of a window, W windows of a corpus,
N stored checkpoints (base and experts), P parameters, K distributions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from math import exp, fsum, inf, isfinite
from operator import mul
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dem_opt.errors import EvaluationError
from dem_opt.insight import Surrogate, VectorGeometry
from dem_opt.simplex import UNIT, Coefficients

SEARCH = "search"
"""The split that proposals and the choice of the winner see."""

HELD_OUT = "held_out"
"""The split that only reports."""

SPLITS = (SEARCH, HELD_OUT)


@dataclass(frozen=True)
class Composite:
    """A composite model by content: {content hash of a checkpoint: its coefficient in units of 1e-9}.

    The right-hand form of  Theta_D = (1 - sum w) Theta + sum_i w_i Theta_i : the base is one term among the
    others, zero terms are left out, and terms stand in the order of their content's hash.  So the base is
    {Theta: 1}, a single fine-tune {Theta_i: 1}, and naming or ordering distributions changes nothing.
    """

    terms: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, contents: Mapping[str, int]) -> "Composite":
        """The composite of units by content hash."""
        assert sum(contents.values()) == UNIT, f"a right-hand form sums to 1: {contents}"
        return cls(tuple(sorted((content, units) for content, units in contents.items() if units != 0)))

    @classmethod
    def edited(cls, base: str, fine_tunes: Mapping[str, str], coefficients: Coefficients) -> "Composite":
        """The composite of coefficients by distribution, given content hashes of base and experts by name."""
        contents = {base: coefficients.base_units}
        for name, units in coefficients.items:
            contents[fine_tunes[name]] = contents.get(fine_tunes[name], 0) + units
        return cls.of(contents)

    @classmethod
    def single(cls, content: str) -> "Composite":
        """One checkpoint as it is."""
        return cls.of({content: UNIT})

    @property
    def key(self) -> str:
        """Its name in the ledger: SHA-256 of the terms."""
        return sha256(repr(self.terms).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one corpus in their fixed order.

    Positions restart at 0 where a document starts, which is what keeps packed documents apart.  A scored token
    is predicted from the tokens before it in its own document; a document's first token, prompts and padding
    are not scored.  Padding stands at the end of a window, has position 0 and is never scored.  For an
    encoder-decoder a document's tokens before its first scored one are the source, the others the target.
    """

    ids_WT: NDArray[np.int64]
    positions_WT: NDArray[np.int64]
    scored_WT: NDArray[np.bool_]

    def __post_init__(self) -> None:
        assert self.ids_WT.shape == self.positions_WT.shape == self.scored_WT.shape

    def __len__(self) -> int:
        return len(self.ids_WT)

    @cached_property
    def tokens_W(self) -> tuple[int, ...]:
        """Scored tokens of each window."""
        return tuple(int(count) for count in self.scored_WT.sum(axis=1))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape and contents."""
        digest = sha256(repr(self.ids_WT.shape).encode())
        for array in (self.ids_WT, self.positions_WT, self.scored_WT):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Corpus:
    """One distribution's, or general corpus's, windows of one split.  `key` hashes windows and tokenizer."""

    distribution: str
    split: str
    key: str
    windows: Windows


@dataclass(frozen=True)
class Score:
    """What one composite's forward pass over one corpus measured.

    nats_W   negative log-likelihood summed over the scored tokens of each window, in nats (float64)
    tokens_W scored tokens of each window

    Raises EvaluationError where a window's nats are not finite: NaN is never a score.
    """

    nats_W: tuple[float, ...]
    tokens_W: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.nats_W) == len(self.tokens_W) and sum(self.tokens_W) > 0
        for window, nats in enumerate(self.nats_W):
            if not isfinite(nats):
                raise EvaluationError(f"the loss of window {window} is {nats}")

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(self.tokens_W)

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats per token, weighted by tokens."""
        return fsum(self.nats_W) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(NLL), infinite where that is beyond a float."""
        return exp(self.nll) if self.nll < 709 else inf


def weighted_sum(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """The score with  sum_n weight_n nats_n  on every window, of scores of the same windows."""
    nats_WN = zip(*(score.nats_W for score in scores), strict=True)
    summed_W = (fsum(map(mul, nats_N, weights)) for nats_N in nats_WN)
    return Score(tuple(summed_W), scores[0].tokens_W)


GRADIENT_FORWARDS = 3.0
"""Forward-equivalents of an evaluation with its gradient: by FLOPs a backward pass is two forward passes."""

PENALTY = 10.0
"""Nats per token added to what Optuna is told for each nat per token of violation.

An exact penalty: where a nat of violation buys less than 10 nats of objective, the minimum of the sum is feasible,
so the surrogate need not know the constraint.
"""


class StoppingRule(Protocol):
    """What decides, look by look, whether a trial goes on (racing)."""

    def is_over(self, scores: Mapping[str, Score]) -> bool:
        """Whether a trial of which this much is known is stopped."""


@dataclass(frozen=True)
class Request:
    """What a worker is asked: a composite's nats on the named corpora.  `ticket` comes back unchanged.

    known     scores that need not be measured again, by corpus; a short one is continued
    race      given, scoring stops at the first look at which the trial is lost
    gradient  whether the gradient is asked for too
    """

    ticket: int
    composite: Composite
    corpora: tuple[str, ...]
    known: Mapping[str, Score] = field(default_factory=dict)
    race: StoppingRule | None = None
    gradient: bool = False


Gradient = Mapping[str, float]
"""By content of each expert i:  < d nats / d Theta_D , Theta_i - Theta > , nats summed over a corpus's windows."""


@dataclass(frozen=True)
class Evaluation:
    """A worker's answer: a Score for each corpus key that was asked for, and what it took.

    scores          short where the trial was stopped; what was known stands in them
    forward_tokens  tokens that went forward through the model, scored or not
    gradients       by corpus, where they were asked for
    scored_tokens   of the forward tokens those whose nats count; the others are padding, prompts, first tokens
    wait_seconds    how long the worker was idle before, since its last evaluation
    batch_tokens    tokens in one forward call at most, where memory allowed fewer than the study says; else 0
    note            what people should know of it
    """

    scores: Mapping[str, Score]
    forward_tokens: int = 0
    merge_seconds: float = 0.0
    score_seconds: float = 0.0
    gradients: Mapping[str, Gradient] = field(default_factory=dict)
    scored_tokens: int = 0
    wait_seconds: float = 0.0
    batch_tokens: int = 0
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """A request that gave no scores, and why."""

    reason: str


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint or adapter folder and the hash of its content.

    base  for an adapter: the content of the base that it edits
    """

    path: Path
    content: str
    base: str | None = None


@dataclass(frozen=True, eq=False)
class WorkerSpec:
    """What a worker holds for life: stored checkpoints, corpora by key, the evaluation's settings.

    base         gives architecture, parameter dtypes and tokenizer; one of the terms where its coefficient is not 0
    experts      the fine-tuned checkpoints
    dtype        the evaluation's dtype, as torch names it ("float32", "bfloat16")
    batch_tokens the most tokens in one forward call (at least one window)
    vectors      "exact": experts as they are stored; "int8": their vectors in int8
    streamed     contents of checkpoints that stay in their files
    devices      how many the model's layers are divided over
    """

    base: StoredModel
    fine_tunes: tuple[StoredModel, ...]
    corpora: tuple[Corpus, ...]
    dtype: str = "float32"
    batch_tokens: int = 4096
    vectors: str = "exact"
    streamed: tuple[str, ...] = ()
    devices: int = 1


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial, as observers and trackers see it.

    objective  on the search split in nats per token; None where the trial failed
    scores     by distribution or general corpus, on the search split; short where the trial was stopped
    measured   whether a forward pass was needed; False where the ledger had every score
    violation  nats per token by which protected corpora exceed their allowance, on the search split; 0: feasible
    forwards   forward-equivalents that the trial stands for: 1 for all windows of the search split, measured or known
    error      standard error of the objective in nats per token; above 0 where the trial was stopped
    gradient   d penalized / d w_i in nats per token, by distribution, where it was measured
    """

    study: str
    number: int
    coefficients: Coefficients
    objective: float | None
    scores: Mapping[str, Score] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=lambda: Evaluation({}))
    propose_seconds: float = 0.0
    reason: str = ""
    violation: float = 0.0
    forwards: float = 1.0
    error: float = 0.0
    gradient: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Whether the trial was stopped: its objective is an estimate, and it never wins."""
        return self.error > 0

    @property
    def penalized(self) -> float | None:
        """What is minimized: objective + PENALTY x violation, in nats per token."""
        return None if self.objective is None else self.objective + PENALTY * self.violation

    @property
    def rank(self) -> tuple[float, float, int]:
        """Lower is better among whole trials: feasible ones by objective, then the others by violation."""
        return self.violation, inf if self.objective is None else self.objective, self.number

    @property
    def measured(self) -> bool:
        """Whether any window was scored for this trial."""
        return self.evaluation.forward_tokens > 0


@dataclass(frozen=True)
class ResultRow:
    """One line of the final table: a composite worth knowing, and what finding it cost.

    role            "base", "single" (one fine-tune as it is), "uniform" (the centroid), "best" (of an algorithm), "top"
                    or "without" (the winner without a distribution)
    algorithm       the algorithm whose best it is; "" for baselines
    coefficients    None for the base
    scores          by split, then by distribution
    objective       by split: the weighted mean NLL in nats per token
    evaluations     composites looked at, each counted once, whether or not the ledger had them already
    forwards        forward-equivalents that they stand for
    forward_tokens  tokens through the model that those evaluations stand for
    seconds         wall seconds that were spent on them
    violation       nats per token by which protected corpora exceed their allowance, on the search split
    run             of an algorithm's best: the search that found it
    """

    label: str
    role: str
    algorithm: str
    coefficients: Coefficients | None
    scores: Mapping[str, Mapping[str, Score]]
    objective: Mapping[str, float]
    evaluations: int
    forward_tokens: int
    seconds: float
    violation: float = 0.0
    forwards: float = 1.0
    run: str = ""


@dataclass(frozen=True)
class Margin:
    """Rival minus winner in the objective, nats per token (positive: the winner is better), with a 95% interval."""

    rival: str
    split: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What a study found: all that figures, the table and the report are made from.

    weights   the objective's weight of each distribution and general corpus, in the study file's order
    standings the final table, base first, the winner last
    margins   of the winner over every other standing, on both splits
    trials    by search, in the order of their numbers: NAME of an algorithm, NAME@SEED of one with another seed
    facts     labels and values to reproduce the study: hashes, versions, commands
    top       the best composites of the search split, the best first
    stopped   by search, why it ended
    worst     whether the objective is the largest regret, and not the weighted mean
    left_out  the winner without one of its distributions, the others grown to its total; named by what is left out
    """

    study: str
    weights: Mapping[str, float]
    results: tuple[ResultRow, ...]
    margins: tuple[Margin, ...]
    trials: Mapping[str, tuple[TrialRecord, ...]]
    facts: Mapping[str, str]
    top: tuple[ResultRow, ...] = ()
    stopped: Mapping[str, str] | None = None
    worst: bool = False
    left_out: tuple[ResultRow, ...] = ()
    vectors: VectorGeometry | None = None
    surrogate: Surrogate | None = None

    @property
    def distributions(self) -> tuple[str, ...]:
        """The names that have a coefficient, in the study file's order; all where nothing has coefficients."""
        found = [one.coefficients.weights for one in self.results if one.coefficients is not None]
        return tuple(name for name in self.weights if not found or name in found[0])

    @property
    def winner(self) -> ResultRow:
        """The best composite of the search split."""
        return self.results[-1]
