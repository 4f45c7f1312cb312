"""How results are put into words, for text and figures alike; loads no plotting library."""

from math import isfinite

from dem_opt.analysis.power import Power
from dem_opt.analysis.rivals import RIVALS
from dem_opt.analysis.total_price import price_line
from dem_opt.errors import shorten
from dem_opt.evaluation.objective import objective_words
from dem_opt.grouping import GroupResult
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.types import BITS_PER_BYTE, DOCUMENTS, SEARCH, Margin, ResultRow, Rival, Summary

ABSENT = "-"
"""Shown for a value that was not measured."""

ROUNDED = 0.1
"""Error of rounding, as a part of the uniform average's distance from the base, from which on it is told."""


def objective_name(summary: Summary) -> str:
    """Name the quantity that the study minimizes, which is in the summary's unit."""
    return objective_words(summary.weights, summary.worst, summary.function, summary.unit)


def loss_title(summary: Summary) -> str:
    """Name the losses of corpora in the results table, which are in the objective's unit."""
    return f"{'BPB' if summary.unit == BITS_PER_BYTE else 'NLL'} in {summary.unit_words}"


def is_base(coefficients: Coefficients) -> bool:
    """Return whether all coefficients are 0, so that the composite is the base."""
    return not any(coefficients.units.values())


def coefficients_text(coefficients: Coefficients | None) -> str:
    """List the non-zero coefficients on one line of plain text."""
    if coefficients is None or is_base(coefficients):
        return "base only"
    return ", ".join(f"{shorten(name, 16)} {weight:.3f}" for name, weight in coefficients.items() if weight)


def precision_lines(summary: Summary) -> list[str]:
    """Say how well the coefficients are known: their intervals, and what choosing them on other windows would cost."""
    precision = summary.precision
    if precision is None:
        return []
    intervals = ", ".join(
        f"{shorten(name, 16)} {low:.2f} to {high:.2f}" for name, (low, high) in precision.intervals.items()
    )
    return [
        f"Coefficients of the optimum, 95% intervals over resampled {precision.sampled}: {intervals}.",
        f"Chosen on {precision.windows} other windows of each corpus, they would cost {precision.regret:.5f} "
        f"{summary.unit_words} on average, and {precision.high:.5f} or more in one case of 20; with four times the "
        f"windows, {4 * precision.windows}, about {precision.regret_with(4):.5f}.",
        _detection_line(summary),
    ]


def cost_line(summary: Summary) -> str:
    """Say what the study has cost, everything included, and how that is made up; empty where nothing was measured."""
    if not summary.costs:
        return ""
    parts = ", ".join(f"{cost.part} {cost.forwards:,.1f}" for cost in summary.costs)
    return f"The whole study has cost {summary.forwards:,.1f} forward-equivalents: {parts}."


def group_line(groups: GroupResult, unit: str) -> str:
    """Say on one line what coefficients by group have brought on documents that did not choose them.

    Args:
        groups: The search.
        unit: The objective's unit in words.
    """
    count = f"{len(groups.coefficients)} groups"
    cost = f"{groups.gradients} gradients, {groups.forwards:g} forward-equivalents"
    judged = groups.judged
    if judged is None:
        return f"{count}, searched on all search documents: no fold has judged them ({cost})."
    if judged.other >= 0:
        return f"Coefficients of {count} are no better than the global ones on the half that did not choose ({cost})."
    assert groups.optimism is not None
    penalty = f"a penalty of {groups.shrink:.2g}" if groups.shrink else "no penalty"
    return (
        f"Coefficients of {count}: {-judged.other:.4f} {unit} better than the global ones on the half of the search "
        f"documents that did not choose them, with {penalty}; of their gain on the search split "
        f"{groups.optimism:.4f} is optimism ({cost})."
    )


def group_lines(summary: Summary) -> list[str]:
    """Say what coefficients by group have brought, where the study has searched them."""
    return [] if summary.groups is None else [group_line(summary.groups, summary.unit_words)]


def winner_text(row: ResultRow) -> str:
    """The coefficients of a winner on one line; of groups the global ones that they deviate from."""
    if row.coefficients is None:
        return "the base"
    if row.groups is None:
        return str(row.coefficients)
    return f"{row.coefficients}, and up to {row.groups.largest_deviation:.3f} apart by group"


def total_lines(summary: Summary) -> list[str]:
    """Say what the constraint on the sum of coefficients costs, as far as that was measured."""
    if summary.total_price is not None:
        return [price_line(summary.total_price, summary.unit_words)]
    coefficients = summary.winner.coefficients
    if summary.winner.role != "best" or coefficients is None or not coefficients.base_units:
        return []
    return [f"The winner's coefficients sum to {1 - coefficients.base_units / UNIT:.3f}."]


def rounding_lines(summary: Summary) -> list[str]:
    """Say what rounding composites to the base's dtype does to the vectors, where it does much."""
    rounding = summary.vectors.rounding if summary.vectors is not None else None
    if rounding is None or rounding < ROUNDED:
        return []
    return [rounding_line("the uniform average", f"{rounding:.2f} of its")]


def rounding_line(what: str, share: str) -> str:
    """Say what rounding does that moves something by a share of its distance from the base."""
    return (
        f"Rounding to the base's dtype moves {what} by {share} distance from the base: many "
        "steps of the fine-tunes are lost or doubled, and the objective jumps, as where a coefficient passes 0.5. Try "
        "base: {path: ..., rounding: stochastic}, or dtype: float32, a base of twice the size."
    )


def rival_lines(summary: Summary) -> list[str]:
    """Say whether the winner is better than the best placebo, and than what the same compute gives in training."""
    placebos = [rival for rival in summary.rivals if rival.is_placebo]
    lines = []
    if placebos:
        best = min(placebos, key=lambda rival: rival.objective[SEARCH])
        lines += _against(
            best, f"the best placebo ({RIVALS[best.kind]})", "No better than a placebo", summary.unit_words
        )
    for rival in summary.rivals:
        if not rival.is_placebo:
            lines += _against(
                rival, f"{RIVALS[rival.kind]} at equal cost", "No better than training", summary.unit_words
            )
    return lines


def _against(rival: Rival, name: str, otherwise: str, unit: str) -> list[str]:
    """Compare the 95% interval of rival minus winner on the held-out split with 0; nothing until that is scored."""
    margin = rival.held_out
    if margin is None:
        return []
    better, words = margin.low > 0, f"{abs(margin.mean):.4f} {unit}"
    interval = f"held out, 95% interval {interval_text(margin)}"
    if better:
        return [f"Better than {name}: by {words} ({interval})."]
    return [f"{otherwise}: {name} is {words} {'above' if margin.mean > 0 else 'below'} the winner ({interval})."]


def detectable(summary: Summary) -> dict[str, float]:
    """Least difference to the winner that each split's windows detect, in its unit; empty if unknown."""
    if summary.precision is None:
        return {}
    power = Power(summary.precision.noise, summary.precision.windows)
    return {split: power.detectable(windows) for split, windows in _windows(summary.winner).items()}


def _windows(row: ResultRow) -> dict[str, int]:
    """Windows of each corpus that a row was scored on, by split."""
    return {split: min(len(score.nats_W) for score in scores.values()) for split, scores in row.scores.items()}


def _detection_line(summary: Summary) -> str:
    windows = _windows(summary.winner)
    least = ", ".join(
        f"{difference:.2g} on the {split.replace('_', '-')} split ({windows[split]} windows)"
        for split, difference in detectable(summary).items()
    )
    return (
        f"Least difference to the winner that is detected (5%, power 80%), in {summary.unit_words}: {least}; "
        "half of it takes twice the windows."
    )


def margin_text(margin: Margin) -> str:
    """A margin with its interval."""
    ends = f"{margin.low:+.4f}, {margin.high:+.4f}" if isfinite(margin.high - margin.low) else interval_text(margin)
    return f"{margin.mean:+.4f} [{ends}]"


def interval_text(margin: Margin) -> str:
    """A margin's interval; all windows being of one document, other documents could give any margin."""
    if isfinite(margin.high - margin.low):
        return f"{margin.low:+.4f} to {margin.high:+.4f}"
    return "unknown, one document"


def sampled_note(summary: Summary) -> str:
    """The unit that the margins' intervals take to be sampled."""
    if all(margin.sampled == DOCUMENTS for margin in summary.margins):
        return "95% intervals over documents"
    return "95% intervals over windows, as if these were independent: the database does not name their documents"
