"""Workers' time and tokens by use, from the records of trials."""

from collections.abc import Sequence
from dataclasses import dataclass

from dem_opt.types import Evaluation, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Trials of one search that went through a model.

    Attributes:
        trials: Number of them.
        merging: Seconds of merging in all, in workers.
        scoring: Seconds of scoring in all, in workers.
        waiting: Seconds in all that workers were idle before these trials.
        proposing: Seconds of proposing in all, beside the workers.
        utilisation: (merging + scoring) / (merging + scoring + waiting) from the second trial on; None without any.
        unscored: Share of forward tokens whose nats do not count: padding, prompts, first tokens; None if unknown.
        batch: Fewest tokens to which memory limited one forward call; 0 where it never did.
    """

    trials: int
    merging: float
    scoring: float
    waiting: float
    proposing: float
    utilisation: float | None
    unscored: float | None
    batch: int


def usage_of(records: Sequence[TrialRecord]) -> Usage:
    """The usage of a search's trials, in the order of their numbers."""
    measured = [record for record in records if record.measured]
    evaluations = [record.evaluation for record in measured]
    # Trials of earlier releases have no count of scored tokens.
    counted = [evaluation for evaluation in evaluations if evaluation.scored_tokens]
    scored_tokens = sum(evaluation.scored_tokens for evaluation in counted)
    forward_tokens = sum(evaluation.forward_tokens for evaluation in counted)
    return Usage(
        trials=len(evaluations),
        merging=sum(evaluation.merge_seconds for evaluation in evaluations),
        scoring=sum(evaluation.score_seconds for evaluation in evaluations),
        waiting=sum(evaluation.wait_seconds for evaluation in evaluations),
        proposing=sum(record.propose_seconds for record in measured),
        # Before the first trial workers were starting, not waiting.
        utilisation=_utilisation(evaluations[1:]),
        unscored=1 - scored_tokens / forward_tokens if forward_tokens else None,
        batch=min((evaluation.batch_tokens for evaluation in evaluations if evaluation.batch_tokens), default=0),
    )


def _utilisation(evaluations: Sequence[Evaluation]) -> float | None:
    busy = sum(evaluation.merge_seconds + evaluation.score_seconds for evaluation in evaluations)
    spent = busy + sum(evaluation.wait_seconds for evaluation in evaluations)
    return busy / spent if spent else None
