"""Which windows of every corpus each look of a race has seen, and at which look a race ends.

Windows stand in a fixed order that was drawn at random, so the first k of every corpus are a stratified sample of all.
"""

from collections.abc import Mapping

from dem_opt.types import Score, StoppingRule

INTERIM_ANALYSES = 8
"""How often a race is looked at at most, the end included: after each eighth of every corpus's windows."""


def stops(windows: int) -> tuple[int, ...]:
    """How many of a corpus's windows each look has seen, in ascending order, the last one all of them."""
    return tuple(dict.fromkeys(-(-windows * look // INTERIM_ANALYSES) for look in range(1, INTERIM_ANALYSES + 1)))


def interim_analyses(windows: Mapping[str, int]) -> int:
    """How many looks there are at corpora of so many windows, the end included."""
    return max(len(stops(whole)) for whole in windows.values())


def seen(windows: Mapping[str, int], number: int) -> dict[str, int]:
    """How many windows of each corpus look `number`, from 1 on, has seen.

    A corpus of fewer stops than the others is through earlier.
    """
    return {key: stops(whole)[:number][-1] for key, whole in windows.items()}


def look(scores: Mapping[str, Score], windows: Mapping[str, int], number: int) -> dict[str, Score] | None:
    """Scores of the corpora of so many windows, as look `number` sees them; None where they do not reach that far."""
    asked = seen(windows, number)
    if any(key not in scores or len(scores[key].nats_W) < most for key, most in asked.items()):
        return None
    return {key: first(scores[key], most) for key, most in asked.items()}


def replay(
    referee: StoppingRule | None, known: Mapping[str, Score], windows: Mapping[str, int]
) -> dict[str, Score] | None:
    """The scores with which a race over corpora of so many windows ends; None where too little is known to tell.

    It ends at the first look at which the trial is stopped, else, as without a referee, at the last one.
    """
    last = interim_analyses(windows)
    for number in range(1, last):
        scores = look(known, windows, number)
        if scores is None or (referee is not None and referee.is_over(scores)):
            return scores
    return look(known, windows, last)


def first(score: Score, most: int) -> Score:
    """The score of the first `most` windows."""
    return Score(score.nats_W[:most], score.tokens_W[:most])
