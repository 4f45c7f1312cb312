"""Schedule of a race's interim analyses: how many windows of each corpus every one of them has seen.

The order of a corpus's windows was drawn at random once, so the first k windows of all corpora are a stratified sample.
Apart from `racing` because batching and planning need the schedule without the statistics, which import scipy.
"""

from collections.abc import Mapping

from dem_opt.types import Score, StoppingRule

INTERIM_ANALYSES = 8
"""Most analyses of a race, the final one included: after each eighth of every corpus's windows."""


def windows_by_analysis(windows: int) -> tuple[int, ...]:
    """Windows of a corpus seen by each analysis:  ceil(W n / 8) , n = 1..8 , without repetitions; the last is W."""
    counts = (-(-windows * number // INTERIM_ANALYSES) for number in range(1, INTERIM_ANALYSES + 1))
    return tuple(dict.fromkeys(counts))


def analysis_count(windows: Mapping[str, int]) -> int:
    """Analyses of corpora with so many windows each, the final one included."""
    return max(len(windows_by_analysis(count)) for count in windows.values())


def windows_at(windows: Mapping[str, int], analysis: int) -> dict[str, int]:
    """Windows of each corpus seen by an analysis, counted from 1; a corpus of fewer analyses ends earlier."""
    return {key: windows_by_analysis(count)[:analysis][-1] for key, count in windows.items()}


def scores_at(scores: Mapping[str, Score], windows: Mapping[str, int], analysis: int) -> dict[str, Score] | None:
    """Cut scores to the windows that an analysis has seen; None where a corpus has fewer."""
    needed = windows_at(windows, analysis)
    if any(key not in scores or len(scores[key].nats_W) < count for key, count in needed.items()):
        return None
    return {key: first_windows(scores[key], count) for key, count in needed.items()}


def replay(
    rule: StoppingRule | None, scores: Mapping[str, Score], windows: Mapping[str, int]
) -> dict[str, Score] | None:
    """Return the scores with which a race ends; None where `scores` do not reach that far.

    A race ends at the first analysis that stops the trial, else at the final one; without a rule at the final one.
    """
    final = analysis_count(windows)
    for analysis in range(1, final):
        interim = scores_at(scores, windows, analysis)
        if interim is None or (rule is not None and rule.is_over(interim)):
            return interim
    return scores_at(scores, windows, final)


def first_windows(score: Score, count: int) -> Score:
    """Cut a score to its first windows."""
    return Score(score.nats_W[:count], score.tokens_W[:count], score.bytes_W[:count])
