"""Trials as they were measured, and what a study has spent."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from math import inf

from dem_opt.simplex import Coefficients
from dem_opt.types.evaluations import PENALTY, Evaluation
from dem_opt.types.scores import Score
from dem_opt.types.units import NATS_PER_TOKEN, UNITS


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
        forwards: Forward-equivalents that the trial is charged with: 1 for all windows of the search split, also where
            another search has measured them; less for what was known when the study last changed, and where it was
            stopped early or completes a trial that was.
        error: Standard error of the objective; above 0 where the trial was stopped.
        estimates: Estimated objective of a stopped trial at each interim analysis, by the number of windows seen of the
            corpus that has most of them.
        gradient: d penalized / d w_i by distribution, where it was measured.
        unit: Unit of these, a key of `UNITS`.
        losses: The two losses whose front is searched, by name; the objective is their mean.
        part: The part of the windows that a probe measured; None for other trials.
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
    part: int | None = None

    @property
    def unit_words(self) -> str:
        """The objective's unit in words."""
        return UNITS[self.unit]

    @property
    def is_partial(self) -> bool:
        """The trial was stopped early, or is a probe: its objective is an estimate, and it never wins."""
        return self.error > 0

    @property
    def state(self) -> str:
        """What became of the trial: "failed", "probe", "stopped" (early) or "complete"."""
        if self.objective is None:
            return "failed"
        if self.part is not None:
            return "probe"
        return "stopped" if self.is_partial else "complete"

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
