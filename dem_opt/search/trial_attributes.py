"""The user attributes that Optuna keeps of a trial: one schema for the writer and for every reader.

Each measurement is an attribute of its own with one type, so that Optuna's tables of trials have a column for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from dem_opt.storage.trial_upgrade import NESTED, flattened

EXPECTED_IMPROVEMENT = "expected_improvement"
"""User attribute of a trial: the improvement that its proposer expected, in the objective's unit."""

PART = "part"
"""User attribute of a trial that is a probe: the part of the windows on which it measures its gradient, from 0."""

PARTS = "parts"
"""User attribute of the anchor of probes: the number of parts of the windows, on each of which it has a gradient."""

DRIVER = "driver"
"""User attribute of a trial: token of the driver that has it in hand, where a study may have several."""


@dataclass(frozen=True, kw_only=True)
class TrialAttributes:
    """Measurements of a finished trial beside its objective.

    Most fields have the names of the stored keys; `forwards` is stored as `fe`, `error` as `standard_error`, and a
    mapping as one attribute for each name, `nll.NAME`.  A key that is lacking reads as the default.

    Attributes:
        forward_tokens: Tokens that went through the model.
        scored_tokens: Those of them whose nats count.
        merge_seconds: Seconds of merging.
        score_seconds: Seconds of scoring.
        wait_seconds: Seconds that the worker was idle before.
        batch_tokens: Tokens in one forward call, where memory allowed fewer than the study says; else 0.
        forwards: Forward-equivalents that the trial is charged with.
        propose_seconds: Seconds of proposing it.
        reason: Why it failed; empty where it did not.
        nll: NLL in nats per token by distribution, of the windows that were scored.
        bpb: The same in bits per byte, where the bytes are known.
        violation: Nats per token by which protected corpora exceed their allowance.
        gradient: d penalized objective / d w_i by distribution, in its unit; empty where it was not measured.
        error: Standard error of the objective, in its unit; above 0 where the trial was stopped early.
        objective: Objective without penalty, where Optuna's value is not that: the estimate of a
            trial that was stopped early, and the objective of one that violates a constraint.
        penalized: Value that the search minimizes, for the same trials: objective + PENALTY x violation.
        windows: Windows by distribution that a trial which was stopped early has seen.
    """

    forward_tokens: int = 0
    scored_tokens: int = 0
    merge_seconds: float = 0.0
    score_seconds: float = 0.0
    wait_seconds: float = 0.0
    batch_tokens: int = 0
    forwards: float = 1.0
    propose_seconds: float = 0.0
    reason: str = ""
    nll: Mapping[str, float] = field(default_factory=dict)
    bpb: Mapping[str, float] = field(default_factory=dict)
    violation: float = 0.0
    gradient: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    objective: float | None = None
    penalized: float | None = None
    windows: Mapping[str, int] = field(default_factory=dict)

    def to_stored(self) -> dict[str, Any]:
        """The user attributes of the trial."""
        stored: dict[str, Any] = {
            "forward_tokens": self.forward_tokens,
            "scored_tokens": self.scored_tokens,
            "merge_seconds": self.merge_seconds,
            "score_seconds": self.score_seconds,
            "wait_seconds": self.wait_seconds,
            "propose_seconds": self.propose_seconds,
            "fe": self.forwards,
        }
        rare = {
            "batch_tokens": self.batch_tokens,
            "reason": self.reason,
            "violation": self.violation,
            "standard_error": self.error,
        }
        stored |= {key: value for key, value in rare.items() if value}
        if self.reason:
            return stored
        stored["estimate"] = self.error > 0
        if self.objective is not None:
            stored["objective"] = self.objective
        if self.penalized is not None:
            stored["penalized"] = self.penalized
        for kind in _BY_NAME:
            stored |= {f"{kind}.{name}": value for name, value in getattr(self, kind).items()}
        return stored

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """The measurements among the user attributes of a trial, of this release or an earlier one.

        Attributes of other programs, or of users, may have the same keys: those of another type are passed over.
        """
        if NESTED in stored:
            stored = {**stored, **flattened(stored[NESTED])}
        numbers = {key: value for key, value in stored.items() if type(value) in (int, float)}
        by_name: dict[str, dict[str, Any]] = {kind: {} for kind in _BY_NAME}
        for key, value in numbers.items():
            kind, dot, name = key.partition(".")
            if dot and kind in by_name:
                by_name[kind][name] = value
        return cls(
            forward_tokens=numbers.get("forward_tokens", 0),
            scored_tokens=numbers.get("scored_tokens", 0),
            merge_seconds=numbers.get("merge_seconds", 0.0),
            score_seconds=numbers.get("score_seconds", 0.0),
            wait_seconds=numbers.get("wait_seconds", 0.0),
            batch_tokens=numbers.get("batch_tokens", 0),
            forwards=float(numbers.get("fe", 1.0)),
            propose_seconds=numbers.get("propose_seconds", 0.0),
            reason=str(stored.get("reason", "")),
            violation=numbers.get("violation", 0.0),
            error=float(numbers.get("standard_error", 0.0)) if stored.get("estimate") is True else 0.0,
            objective=numbers.get("objective"),
            penalized=numbers.get("penalized"),
            **by_name,
        )


_BY_NAME = ("nll", "bpb", "gradient", "windows")
"""Fields of `TrialAttributes` that are mappings by distribution."""
