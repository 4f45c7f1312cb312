"""What workers did with their time and their tokens, from the records of trials."""

from collections.abc import Sequence
from dataclasses import dataclass

from dem_opt.types import Evaluation, TrialRecord


@dataclass(frozen=True)
class Usage:
    """Trials of one search that went through a model.

    merging, scoring  seconds in all, in workers
    waiting           seconds in all that workers were idle before these trials, since what they did before
    proposing         seconds in all, beside them
    utilisation       (merging + scoring) / (merging + scoring + waiting) from the second trial on; None without any
    unscored          share of forward tokens whose nats do not count: padding, prompts, first tokens; None if unknown
    batch             the fewest tokens in one forward call to which memory held them; 0 where it did not
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
    made = [record.evaluation for record in measured]
    known = [one for one in made if one.scored_tokens]
    scored, forward = (sum(getattr(one, kind) for one in known) for kind in ("scored_tokens", "forward_tokens"))
    return Usage(
        trials=len(made),
        merging=sum(one.merge_seconds for one in made),
        scoring=sum(one.score_seconds for one in made),
        waiting=sum(one.wait_seconds for one in made),
        proposing=sum(record.propose_seconds for record in measured),
        utilisation=_utilisation(made[1:]),
        unscored=1 - scored / forward if forward else None,
        batch=min((one.batch_tokens for one in made if one.batch_tokens), default=0),
    )


def _utilisation(made: Sequence[Evaluation]) -> float | None:
    busy = sum(one.merge_seconds + one.score_seconds for one in made)
    spent = busy + sum(one.wait_seconds for one in made)
    return busy / spent if spent else None
