"""How results are put into words, for text and figures alike; loads no plotting library."""

from dem_opt.analysis.rivals import RIVALS
from dem_opt.errors import shorten
from dem_opt.evaluation.objective import objective_words
from dem_opt.simplex import Coefficients
from dem_opt.types import BITS_PER_BYTE, SEARCH, Rival, Summary

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
    interval = f"held out, 95% interval {margin.low:+.4f} to {margin.high:+.4f}"
    if better:
        return [f"Better than {name}: by {words} ({interval})."]
    return [f"{otherwise}: {name} is {words} {'above' if margin.mean > 0 else 'below'} the winner ({interval})."]
