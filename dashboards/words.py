"""How results are put into words, for text and figures alike; loads no plotting library."""

from dem_opt.errors import shorten
from dem_opt.evaluation.objective import objective_words
from dem_opt.simplex import Coefficients
from dem_opt.types import Summary

ABSENT = "-"
"""Shown for a value that was not measured."""


def objective_name(summary: Summary) -> str:
    """Name the quantity that the study minimizes, which is in nats per token."""
    return objective_words(summary.weights, summary.worst, summary.function)


def is_base(coefficients: Coefficients) -> bool:
    """Return whether all coefficients are 0, so that the composite is the base."""
    return not any(coefficients.units.values())


def coefficients_text(coefficients: Coefficients | None) -> str:
    """List the non-zero coefficients on one line of plain text."""
    if coefficients is None or is_base(coefficients):
        return "base only"
    return ", ".join(f"{shorten(name, 16)} {weight:.3f}" for name, weight in coefficients.items() if weight)
