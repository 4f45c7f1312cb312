"""Data that passes between packages: composites, windows, scores, requests to workers, trials, results.

Shape suffixes here and in every module with tensors: B batch rows, T tokens of a window, W windows of a corpus,
N stored checkpoints (base and fine-tunes), P parameters, K distributions, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from hashlib import sha256
from math import exp, fsum, inf, isfinite, log, sqrt
from operator import mul
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dem_opt.errors import EvaluationError
from dem_opt.grouping import GroupedCoefficients, Grouping, GroupResult
from dem_opt.pareto import Front
from dem_opt.simplex import UNIT, Coefficients

SEARCH = "search"
"""The split that proposals and the choice of the winner see."""

HELD_OUT = "held_out"
"""The split that is only reported."""

SPLITS = (SEARCH, HELD_OUT)

NATS_PER_TOKEN = "nats_per_token"
"""Unit of losses: nats over scored tokens."""

BITS_PER_BYTE = "bits_per_byte"
"""Unit of losses that compares across tokenizers: bits over UTF-8 bytes of the scored text."""

UNITS = {NATS_PER_TOKEN: "nats per token", BITS_PER_BYTE: "bits per byte"}
"""Units of an objective, in words."""

DOCUMENTS = "documents"
"""The unit that intervals take to be sampled; "windows" in databases that do not name the documents of windows."""


Terms = tuple[tuple[str, int], ...]
"""Content hashes of checkpoints with their coefficients in units of 1e-9, which sum to 1; sorted, without zeros."""


@dataclass(frozen=True)
class Composite:
    """A composite model by content: {content hash of a checkpoint: its coefficient in units of 1e-9}.

    The right-hand form of  Theta_D = (1 - sum w) Theta + sum_i w_i Theta_i : the base is one term among the
    others, zero terms are left out, and terms are sorted by content hash.  So the base is {Theta: 1}, a single
    fine-tune {Theta_i: 1}, and names and order of the distributions change nothing.

    Where groups of parameters have coefficients of their own, those with the same terms are one part, and the terms of
    most parameters are those of the composite: so names of groups change nothing, and groups that all have the same
    coefficients make the composite of these coefficients.

    Attributes:
        terms: Terms of all parameters that no part has.
        parts: Parameters in ascending order with their terms; in ascending order themselves.
    """

    terms: Terms
    parts: tuple[tuple[tuple[str, ...], Terms], ...] = ()

    @classmethod
    def of(cls, contents: Mapping[str, int]) -> "Composite":
        """The composite of units by content hash."""
        assert sum(contents.values()) == UNIT, f"a right-hand form sums to 1: {contents}"
        return cls(tuple(sorted((content, units) for content, units in contents.items() if units != 0)))

    @classmethod
    def edited(cls, base: str, fine_tunes: Mapping[str, str], coefficients: Coefficients) -> "Composite":
        """The composite of coefficients by distribution, from content hashes of the base and the fine-tunes by name."""
        contents = {base: coefficients.base_units}
        for name, units in coefficients.pairs:
            contents[fine_tunes[name]] = contents.get(fine_tunes[name], 0) + units
        return cls.of(contents)

    @classmethod
    def grouped(
        cls, base: str, fine_tunes: Mapping[str, str], grouping: Grouping, coefficients: Mapping[str, Coefficients]
    ) -> "Composite":
        """The composite of coefficients by group, then by distribution."""
        parameters: dict[Terms, list[str]] = {}
        for group, members in grouping.groups:
            terms = cls.edited(base, fine_tunes, coefficients[group]).terms
            parameters.setdefault(terms, []).extend(members)
        rest = min(parameters, key=lambda terms: (-len(parameters[terms]), terms))
        parts = ((tuple(sorted(members)), terms) for terms, members in parameters.items() if terms != rest)
        return cls(rest, tuple(sorted(parts)))

    @classmethod
    def single(cls, content: str) -> "Composite":
        """One checkpoint as it is."""
        return cls.of({content: UNIT})

    @property
    def is_single(self) -> bool:
        """True if the composite is one checkpoint as it is."""
        return len(self.contents) == 1

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """Content hashes of all checkpoints that it takes, in ascending order."""
        terms = (self.terms, *(terms for _, terms in self.parts))
        return tuple(sorted({content for row in terms for content, _ in row}))

    @cached_property
    def _terms_by_parameter(self) -> dict[str, Terms]:
        return {parameter: terms for parameters, terms in self.parts for parameter in parameters}

    def terms_of(self, parameter: str) -> Terms:
        """Terms of a parameter."""
        return self._terms_by_parameter.get(parameter, self.terms)

    @property
    def key(self) -> str:
        """Key in the ledger: SHA-256 of the terms, and of the parts where there are any."""
        return sha256(repr((self.terms, self.parts) if self.parts else self.terms).encode()).hexdigest()


@dataclass(frozen=True)
class CorpusLayout:
    """Text and documents of a corpus's windows.

    Attributes:
        bytes_W: UTF-8 bytes of the text that is scored in each window.
        documents_W: Scored tokens of each document in each window, by the document's number in the split; a document
            that is cut stands in several windows.
    """

    bytes_W: tuple[int, ...]
    documents_W: tuple[Mapping[int, int], ...]


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one corpus in their fixed order.

    Positions restart at 0 where a document starts, which keeps packed documents apart.  A scored token is
    predicted from the tokens before it in its own document; a document's first token, prompts and padding are
    not scored.  Padding is at the end of a window, has position 0 and is never scored.  For an
    encoder-decoder a document's tokens before its first scored one are the source, the others the target.

    Attributes:
        ids_WT: Token ids.
        positions_WT: Positions.
        scored_WT: Which tokens are scored.
        documents_WT: Number of each token's document in the seeded order of its split; -1 for padding.  None where it
            is not needed, as in training.
        bytes_WT: UTF-8 bytes of the text that each scored token stands for, 0 for others.  None where they were not
            counted.
    """

    ids_WT: NDArray[np.int64]
    positions_WT: NDArray[np.int64]
    scored_WT: NDArray[np.bool_]
    documents_WT: NDArray[np.int64] | None = None
    bytes_WT: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        assert self.ids_WT.shape == self.positions_WT.shape == self.scored_WT.shape
        assert all(each is None or each.shape == self.ids_WT.shape for each in (self.documents_WT, self.bytes_WT))

    def __len__(self) -> int:
        return len(self.ids_WT)

    def take(self, chosen: Sequence[int]) -> "Windows":
        """Some of the windows."""
        chosen_W = np.array(chosen, dtype=np.int64)
        return Windows(
            self.ids_WT[chosen_W],
            self.positions_WT[chosen_W],
            self.scored_WT[chosen_W],
            None if self.documents_WT is None else self.documents_WT[chosen_W],
            None if self.bytes_WT is None else self.bytes_WT[chosen_W],
        )

    @cached_property
    def tokens_W(self) -> tuple[int, ...]:
        """Scored tokens of each window."""
        return tuple(int(count) for count in self.scored_WT.sum(axis=1))

    @cached_property
    def bytes_W(self) -> tuple[int, ...]:
        """UTF-8 bytes of the text that is scored in each window; empty where they were not counted."""
        return () if self.bytes_WT is None else tuple(self.bytes_WT.sum(axis=1).tolist())

    @cached_property
    def layout(self) -> CorpusLayout | None:
        """Bytes and documents of each window, where they are known."""
        if self.bytes_WT is None or self.documents_WT is None:
            return None
        return CorpusLayout(self.bytes_W, tuple(self._documents_W(self.documents_WT)))

    def _documents_W(self, documents_WT: NDArray[np.int64]) -> Iterator[dict[int, int]]:
        for documents_T, scored_T in zip(documents_WT, self.scored_WT, strict=True):
            numbers, tokens = np.unique(documents_T[scored_T], return_counts=True)
            yield dict(zip(numbers.tolist(), tokens.tolist(), strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, positions and scored tokens, which decide the nats."""
        digest = sha256(repr(self.ids_WT.shape).encode())
        for array in (self.ids_WT, self.positions_WT, self.scored_WT):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Windows of one split of a distribution or general corpus; `key` hashes windows and tokenizer."""

    distribution: str
    split: str
    key: str
    windows: Windows


def perplexity(nll: float) -> float:
    """exp(NLL) of nats per token; infinite from 709 on, where exp overflows float64."""
    return exp(nll) if nll < 709 else inf


@dataclass(frozen=True)
class Score:
    """Loss of one composite on one corpus, or on the first of its windows.

    Attributes:
        nats_W: Negative log-likelihood summed over the scored tokens of each window, in nats (float64).
        tokens_W: Scored tokens of each window.
        bytes_W: UTF-8 bytes of the text that is scored in each window; empty where they are not known.

    Raises:
        EvaluationError: A window's nats are not finite: NaN is never a score.
    """

    nats_W: tuple[float, ...]
    tokens_W: tuple[int, ...]
    bytes_W: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.nats_W) == len(self.tokens_W) and sum(self.tokens_W) > 0
        assert len(self.bytes_W) in (0, len(self.nats_W))
        for window, nats in enumerate(self.nats_W):
            if not isfinite(nats):
                raise EvaluationError(f"the loss of window {window} is {nats}")

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(self.tokens_W)

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats per token:  sum_W nats / sum_W tokens."""
        return fsum(self.nats_W) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(NLL)."""
        return perplexity(self.nll)

    @property
    def bytes(self) -> int | None:
        """UTF-8 bytes of the scored text, where they are known."""
        return sum(self.bytes_W) if self.bytes_W else None

    @property
    def bits_per_byte(self) -> float | None:
        """sum_W nats / (ln 2 sum_W bytes); None where the bytes are not known, or there are none."""
        return fsum(self.nats_W) / (log(2) * self.bytes) if self.bytes else None

    def sizes_W(self, unit: str) -> tuple[float, ...]:
        """What nats are divided by to give a loss in this unit: tokens, or  ln 2 bytes , of each window.

        Raises:
            EvaluationError: The unit is bits per byte, and the bytes are not known or there are none.
        """
        if unit == NATS_PER_TOKEN:
            return self.tokens_W
        if not self.bytes:
            raise EvaluationError("a loss in bits per byte needs the number of bytes, which is not known or 0")
        return tuple(log(2) * count for count in self.bytes_W)

    def loss(self, unit: str) -> float:
        """The loss in this unit:  sum_W nats / sum_W sizes ."""
        return self.nll if unit == NATS_PER_TOKEN else fsum(self.nats_W) / fsum(self.sizes_W(unit))


def weighted_sum(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """The score with  sum_n weight_n nats_n  on every window, of scores of the same windows."""
    nats_WN = zip(*(score.nats_W for score in scores), strict=True)
    summed_W = (fsum(map(mul, nats_N, weights)) for nats_N in nats_WN)
    return Score(tuple(summed_W), scores[0].tokens_W, scores[0].bytes_W)


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
    """

    ticket: int
    composite: Composite
    corpora: tuple[str, ...]
    known: Mapping[str, Score] = dataclass_field(default_factory=dict)
    race: StoppingRule | None = None
    gradient: bool = False
    folds: Mapping[str, Folds] = dataclass_field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A worker's answer: a score for each corpus of the request, and its cost.

    Attributes:
        scores: By corpus key; short where the trial was stopped, with what the request knew.
        forward_tokens: Tokens that went forward through the model, scored or not.
        merge_seconds: Time to merge the composite.
        score_seconds: Time of the forward (and backward) passes.
        gradients: By corpus key, where the request asked for them.
        fold_gradients: By corpus key, then by the windows of a fold, where the request asked for folds.
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
    scored_tokens: int = 0
    wait_seconds: float = 0.0
    batch_tokens: int = 0
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """A request that gave no scores, and the reason."""

    reason: str


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint or adapter folder and the hash of its content.

    Attributes:
        content: Hash of its tensors.
        base: For an adapter, the content of its base.
        field: Field of the study file that named the folder, for messages.
        configuration: Fields of its config.json that compute, as JSON, where composites take theirs from it.
        vocabulary: For a checkpoint with another number of tokens, the content of the base whose rows it gets.
    """

    path: Path
    content: str
    base: str | None = None
    field: str = dataclass_field(default="checkpoint", compare=False)
    configuration: str = ""
    vocabulary: str | None = None


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


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One finished trial.

    Attributes:
        study: Name of the Optuna study.
        objective: On the search split in `unit`; None where the trial failed.
        scores: By distribution or general corpus, on the search split; short where the trial was stopped.
        propose_seconds: Time the sampler took to propose the coefficients.
        reason: Why the trial failed, or "".
        violation: Amount by which protected corpora exceed their allowance, on the search split; 0: feasible.
        forwards: Forward-equivalents that the trial stands for: 1 for all windows of the search split, measured or
            known.
        error: Standard error of the objective; above 0 where the trial was stopped.
        estimates: Estimated objective of a stopped trial at each interim analysis, by the number of windows seen of the
            corpus that has most of them.
        gradient: d penalized / d w_i by distribution, where it was measured.
        unit: Unit of these, a key of `UNITS`.
        losses: The two losses whose front is searched, by name; the objective is their mean.
    """

    study: str
    number: int
    coefficients: Coefficients
    objective: float | None
    scores: Mapping[str, Score] = dataclass_field(default_factory=dict)
    evaluation: Evaluation = dataclass_field(default_factory=lambda: Evaluation(scores={}))
    propose_seconds: float = 0.0
    reason: str = ""
    violation: float = 0.0
    forwards: float = 1.0
    error: float = 0.0
    estimates: Mapping[int, float] = dataclass_field(default_factory=dict)
    gradient: Mapping[str, float] = dataclass_field(default_factory=dict)
    unit: str = NATS_PER_TOKEN
    losses: Mapping[str, float] = dataclass_field(default_factory=dict)

    @property
    def unit_words(self) -> str:
        """The objective's unit in words."""
        return UNITS[self.unit]

    @property
    def is_partial(self) -> bool:
        """The trial was stopped early: its objective is an estimate, and it never wins."""
        return self.error > 0

    @property
    def penalized(self) -> float | None:
        """The value that is minimized: objective + PENALTY x violation."""
        return None if self.objective is None else self.objective + PENALTY * self.violation

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sort key of whole trials, the best first: feasible ones by objective, then the others by violation."""
        return self.violation, inf if self.objective is None else self.objective, self.number

    @property
    def measured(self) -> bool:
        """At least one window was scored for this trial; the ledger did not have every score."""
        return self.evaluation.forward_tokens > 0


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A row of the results table: a composite with its scores, and the cost of finding it.

    Attributes:
        label: Name of the row.
        role: "base", "single" (a fine-tune as it is), "uniform" (the centroid), "sum" (of all vectors, each with the
            coefficient 1), "best" (of an algorithm), "top", or "without" (the winner without one distribution).
        algorithm: Algorithm whose best this is; "" for baselines.
        coefficients: None for the base.
        scores: By split, then by distribution.
        objective: By split, in the study's unit.
        evaluations: Composites evaluated, each counted once, also where the ledger had its scores.
        forwards: Forward-equivalents of these evaluations.
        forward_tokens: Tokens through the model of these evaluations.
        seconds: Wall time of these evaluations.
        violation: Amount by which protected corpora exceed their allowance, on the search split, in the study's unit.
        run: Search whose best this is; "" for baselines.
        groups: Coefficients by group of parameters; `coefficients` are the global ones then.
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
    groups: GroupedCoefficients | None = None

    @property
    def merged(self) -> Coefficients | GroupedCoefficients | None:
        """Coefficients that the composite is merged with; None for the base."""
        return self.coefficients if self.groups is None else self.groups


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Rival minus winner in the objective, in its unit (positive: the winner is better), with a 95% interval.

    Attributes:
        rival: Label of the rival's row.
        split: Split.
        mean: The margin.
        low: Lower end; infinite, as the upper one, where all windows of a distribution are of one document.
        high: Upper end.
        sampled: Unit that the interval takes to be sampled: "documents", or "windows" where documents are unknown.
        violation: Excess of protected corpora over their allowances, beyond the winner's, where it is compared.
    """

    rival: str
    split: str
    mean: float
    low: float
    high: float
    sampled: str = DOCUMENTS
    violation: float = 0.0

    @property
    def penalized(self) -> float:
        """The margin in what a search minimizes."""
        return self.mean + PENALTY * self.violation

    @property
    def is_better(self) -> bool:
        """True if the rival is better than the winner beyond its interval, the violation counted."""
        return self.high + PENALTY * self.violation < 0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another use of the search's windows and compute, which the winner is compared with.

    Attributes:
        kind: "random" or "permuted": the winner of the same search over placebos of the distribution vectors; "base" or
            "uniform": the base or the uniform average, trained on the search split.
        objective: By split, in nats per token.
        margins: Rival minus winner, of the splits on which both are scored.
        coefficients: Of a placebo's winner, by distribution.
        trials: Trials of a placebo's search.
        steps: Optimizer steps of a training.
        flops: Floating-point operations of the search or the training.
    """

    kind: str
    objective: Mapping[str, float]
    margins: tuple[Margin, ...]
    coefficients: Mapping[str, float]
    trials: int
    steps: int
    flops: float

    @property
    def is_placebo(self) -> bool:
        """The rival was searched for, not trained."""
        return self.steps == 0

    @property
    def held_out(self) -> Margin | None:
        """The margin on the held-out split."""
        return next((margin for margin in self.margins if margin.split == HELD_OUT), None)


@dataclass(frozen=True, kw_only=True)
class TotalPrice:
    """Cost of the constraint on the sum of coefficients, on the search split (see `analysis.total_price`).

    Attributes:
        total: Sum of the winner's coefficients.
        slope: Derivative of the objective by the total at the winner, the constraint's multiplier, in the objective's
            unit for each unit of the total; below 0, a greater total is better.
        low: Lower end of its 95% interval; None of a gradient.
        high: Upper end.
        basis: "step" (a composite with a total a tenth greater was scored) or "gradient".
        optimum: Total at which the winner, scaled, is expected to be best; that of the step where this proved better.
        rivals: Composites of other totals minus the winner: "scaled", the winner scaled to `optimum`, and "sum", the
            sum of all vectors, as far as they are scored; below 0 and without violation, the winner is worse.
        mend: Range of totals to search, where one of them is clearly better than the winner.
    """

    total: float
    slope: float
    low: float | None
    high: float | None
    basis: str
    optimum: float
    rivals: tuple[Margin, ...]
    mend: tuple[float, float] | None

    @property
    def best(self) -> Margin | None:
        """The better of the rivals."""
        return min(self.rivals, key=lambda margin: margin.penalized, default=None)


@dataclass(frozen=True)
class VectorGeometry:
    """The distribution vectors  v_i = Theta_i - Theta , by their inner products over all stored parameters.

    Attributes:
        names: Distributions.
        inner: < v_i , v_j > , a row for each of `names`.
    """

    names: tuple[str, ...]
    inner: tuple[tuple[float, ...], ...]

    @property
    def norms(self) -> tuple[float, ...]:
        """|v_i|."""
        return tuple(sqrt(max(row[place], 0.0)) for place, row in enumerate(self.inner))

    def cosine(self, i: int, j: int) -> float | None:
        """< v_i , v_j > / (|v_i| |v_j|), within -1 and 1; None where a vector is zero."""
        norms = self.norms
        if not norms[i] or not norms[j]:
            return None
        # Rounding of the three sums can carry the quotient of parallel vectors past 1.
        return min(1.0, max(-1.0, self.inner[i][j] / (norms[i] * norms[j])))


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A Gaussian process fitted to the penalized objective of the trials of all searches.

    Attributes:
        optimum: Coefficients at which its mean is lowest.
        mean: Mean at the optimum, in the objective's unit.
        deviation: Standard deviation at the optimum, in the objective's unit.
        names: Distributions that vary over `points`: all of up to three, else the three with the largest coefficients
            at the optimum, while the others keep theirs.
        points: A lattice over `names`.
        means: Mean at each point, in the objective's unit.
        trials: Number of trials it was fitted to.
    """

    optimum: Coefficients
    mean: float
    deviation: float
    names: tuple[str, ...]
    points: tuple[Coefficients, ...]
    means: tuple[float, ...]
    trials: int


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How well a study's windows determine its coefficients.

    Attributes:
        windows: Windows of each corpus of the search split.
        composites: Composites scored on all of them that the estimate rests on.
        regret: Nats per token by which coefficients chosen on other windows would miss the optimum, on average.
        high: 95% quantile of that regret.
        intervals: 95% interval of each coefficient, by distribution.
        error: Standard error of the difference between the best of the composites and another, in the objective's
            unit: paired, median over the others.
        sampled: Unit that is taken to be sampled: "documents", or "windows" where documents are unknown.
    """

    windows: int
    composites: int
    regret: float
    high: float
    intervals: Mapping[str, tuple[float, float]]
    error: float
    sampled: str = DOCUMENTS

    def regret_with(self, factor: float) -> float:
        """The expected regret with so many times the windows, in the objective's unit: it falls with their number."""
        return self.regret / factor


@dataclass(frozen=True, kw_only=True)
class Expense:
    """The cost of one evaluation.

    Attributes:
        study: The study that asked for it.
        part: The part of the study, see `Cost`.
        windows: Windows that went through a model, each GRADIENT_FORWARDS times where gradients were measured.
        seconds: Seconds of merging and scoring, in a worker.
    """

    study: str
    part: str
    windows: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a part of a study.

    Attributes:
        part: A run of its search, by its label, or "baselines", "final table", "export" ...
        evaluations: Evaluations that went through a model.
        forwards: Their forward-equivalents.
        seconds: Seconds of merging and scoring, in workers.
    """

    part: str
    evaluations: int
    forwards: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of a study: everything that figures, tables and the report are made from.

    Attributes:
        weights: The objective's weight of each distribution and general corpus, in the study file's order.
        results: Results table, the base first, the winner last.
        margins: Of the winner over every other row, on both splits.
        trials: By search, in the order of their numbers: NAME of an algorithm, NAME@SEED of one with another seed.
        facts: Labels and values to reproduce the study: hashes, versions, commands.
        top: Best composites of the search split, the best first.
        stopped: By search, why it ended.
        worst: The objective is the largest regret, not the weighted mean.
        function: Name of the custom objective; empty where there is none.
        unit: Unit of the objective, a key of `UNITS`.
        left_out: The winner without one of its distributions, the others scaled up to its total; named by the
            distribution that is left out.
        costs: What the study has spent since it began, by part.
        rivals: Placebos and models trained on the search split, as far as they have been compared.
        total_price: What the constraint on the sum of coefficients costs, where it was measured.
        front: The front between the two losses of a study that searches for one.
        groups: The search of coefficients by group, where the study asks for it and it has ended.
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
    function: str = ""
    unit: str = NATS_PER_TOKEN
    left_out: tuple[ResultRow, ...] = ()
    vectors: VectorGeometry | None = None
    surrogate: Surrogate | None = None
    precision: Precision | None = None
    rivals: tuple[Rival, ...] = ()
    costs: tuple[Cost, ...] = ()
    total_price: TotalPrice | None = None
    front: Front | None = None
    groups: GroupResult | None = None

    @property
    def forwards(self) -> float:
        """Forward-equivalents of the whole study, everything included."""
        return sum(cost.forwards for cost in self.costs)

    @property
    def is_mean(self) -> bool:
        """True if the objective is the weighted mean of NLL, in either unit."""
        return not self.worst and not self.function

    @property
    def unit_words(self) -> str:
        """The objective's unit in words."""
        return UNITS[self.unit]

    @property
    def distributions(self) -> tuple[str, ...]:
        """The names that have a coefficient, in the study file's order; all names where no row has coefficients."""
        named = next((row.coefficients.weights for row in self.results if row.coefficients is not None), self.weights)
        return tuple(name for name in self.weights if name in named)

    @property
    def winner(self) -> ResultRow:
        """The best composite of the search split."""
        return self.results[-1]

    @property
    def global_winner(self) -> ResultRow:
        """The best composite with one coefficient for each distribution."""
        return next((row for row in reversed(self.results) if row.groups is None), self.winner)
