"""How results are put into words, for text and figures alike; loads no plotting library."""

from dem_opt.errors import shorten
from dem_opt.evaluation.objective import objective_words
from dem_opt.simplex import Coefficients
from dem_opt.types import BITS_PER_BYTE, Summary

ABSENT = "-"
"""Shown for a value that was not measured."""


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
        f"Coefficients of the optimum, 95% intervals over resampled windows: {intervals}.",
        f"Chosen on {precision.windows} other windows of each corpus, they would cost {precision.regret:.5f} "
        f"{summary.unit_words} on average, and {precision.high:.5f} or more in one case of 20; with four times the "
        f"windows, {4 * precision.windows}, about {precision.regret_with(4):.5f}.",
    ]


def cost_line(summary: Summary) -> str:
    """Say what the study has cost, everything included, and how that is made up; empty where nothing was measured."""
    if not summary.costs:
        return ""
    parts = ", ".join(f"{cost.part} {cost.forwards:,.1f}" for cost in summary.costs)
    return f"The whole study has cost {summary.forwards:,.1f} forward-equivalents: {parts}."
