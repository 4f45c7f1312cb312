"""Warn before a search where rounding composites to 16 bits takes much of the vectors."""

from collections.abc import Mapping

from dem_opt.analysis.vector_geometry import sampled_rounding
from dem_opt.dashboards.words import ROUNDED, rounding_line
from dem_opt.types import StoredModel


def rounding_warnings(base: StoredModel, fine_tunes: Mapping[str, StoredModel]) -> list[str]:
    """Return a warning where rounding to nearest values moves the uniform average by much, by some of the weights."""
    if base.rounding != "nearest" or len(fine_tunes) < 2:
        return []
    rounding = sampled_rounding(base, fine_tunes)
    return (
        []
        if rounding is None or rounding < ROUNDED
        else [rounding_line("matrices of the uniform average", f"about {rounding:.2f} of their")]
    )
