"""The user attributes that Optuna keeps of a trial: one schema for the writer and for every reader."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

MEASUREMENTS = "dem_opt"
"""User attribute of a finished trial: `TrialAttributes`, as a JSON object."""

EXPECTED_IMPROVEMENT = "expected_improvement"
"""User attribute of a trial: the improvement that its proposer expected, in the objective's unit."""

DRIVER = "driver"
"""User attribute of a trial: token of the driver that has it in hand, where a study may have several."""


@dataclass(frozen=True, kw_only=True)
class TrialAttributes:
    """Measurements of a finished trial beside its objective.

    Fields have the names of the stored keys.  A key that an earlier release did not write reads as the default.

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
        perplexity: Perplexity by distribution, for people who read the trial in Optuna Dashboard.
        violation: Nats per token by which protected corpora exceed their allowance.
        gradient: d penalized objective / d w_i by distribution, in its unit; empty where it was not measured.
        error: Standard error of the objective, in its unit; above 0 where the trial was stopped early.
        objective: Estimated objective of a trial that was stopped early, without penalty, in the objective's unit.
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
    perplexity: Mapping[str, float] = field(default_factory=dict)
    violation: float = 0.0
    gradient: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    objective: float | None = None
    windows: Mapping[str, int] = field(default_factory=dict)

    def to_stored(self) -> dict[str, Any]:
        """The JSON object under `MEASUREMENTS`."""
        stored: dict[str, Any] = {
            "forward_tokens": self.forward_tokens,
            "scored_tokens": self.scored_tokens,
            "merge_seconds": self.merge_seconds,
            "score_seconds": self.score_seconds,
            "wait_seconds": self.wait_seconds,
            "batch_tokens": self.batch_tokens,
            "forwards": self.forwards,
            "propose_seconds": self.propose_seconds,
        }
        if self.reason:
            return stored | {"reason": self.reason}
        stored["perplexity"] = dict(self.perplexity)
        if self.violation:
            stored["violation"] = self.violation
        if self.gradient:
            stored["gradient"] = dict(self.gradient)
        if self.error:
            # `partial` repeats what `error` says, for readers of the database.
            stored |= {"partial": True, "error": self.error, "objective": self.objective, "windows": dict(self.windows)}
        return stored

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """The attributes of a trial, of this release or an earlier one."""
        return cls(
            forward_tokens=stored.get("forward_tokens", 0),
            scored_tokens=stored.get("scored_tokens", 0),
            merge_seconds=stored.get("merge_seconds", 0.0),
            score_seconds=stored.get("score_seconds", 0.0),
            wait_seconds=stored.get("wait_seconds", 0.0),
            batch_tokens=stored.get("batch_tokens", 0),
            forwards=float(stored.get("forwards", 1.0)),
            propose_seconds=stored.get("propose_seconds", 0.0),
            reason=stored.get("reason", ""),
            perplexity=stored.get("perplexity", {}),
            violation=stored.get("violation", 0.0),
            gradient=stored.get("gradient", {}),
            error=float(stored.get("error", 0.0)),
            objective=stored.get("objective"),
            windows=stored.get("windows", {}),
        )
