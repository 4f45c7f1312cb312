"""Whether a search measures gradients, and on which part of the windows."""

from dem_opt.config import StudyConfig
from dem_opt.evaluation.parts import part_count

GRADIENTS_FROM = 7
"""Free shares from which on gradients are worth their cost, fine-tunes for the report included (docs/search.md)."""

PROBES_FROM = 4
"""Free shares from which on they are in a search that begins with nothing, where each sees a part of the windows."""


def parts_of(config: StudyConfig) -> int:
    """Number of parts of the windows, on one of which a probe's gradient is measured; 0 where a study has no probes."""
    # Parts are judged as races are, by paired means.
    return part_count(config.evaluation.windows) if config.search.racing else 0


def measures_gradients(config: StudyConfig, fits: bool, *, is_new: bool) -> bool:
    """True if trials of `simplex-gp` are measured with their gradient.

    Args:
        config: The study.
        fits: Memory allows it.
        is_new: The search begins with nothing.  Where much was scored before, values of a few composites tell more for
            their cost than the anchor of probes, in small spaces.
    """
    if config.search.gradients != "auto":
        return config.search.gradients
    least = PROBES_FROM if is_new and parts_of(config) else GRADIENTS_FROM
    return fits and config.has_gradients and len(config.space.caps_F) >= least
