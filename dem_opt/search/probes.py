"""Probes: trials that measure the gradient on one part of the windows, corrected by the anchor's on the same part.

Windows differ, and so does the gradient g of different parts at one point.  Most of the difference is the same at
points that are close together.  So the anchor a, the centroid, is measured on every part p, and a probe at w on one
estimates the gradient of all windows as

    g(w)  =  g_p(w) - g_p(a) + g_all(a)

(stochastic variance-reduced gradients: Johnson and Zhang 2013).  The error that is left is in proportion to the way
from the anchor, and the search learns the factor.  The objective is estimated as a race does it (`Race.estimate`).
"""

from collections.abc import Mapping
from math import fsum

from dem_opt.errors import EvaluationError
from dem_opt.evaluation.parts import counted, one_each, part_windows
from dem_opt.evaluation.racing import Race
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import GRADIENT_FORWARDS, SEARCH, Composite, Gradient, PartGradient, Score


def probed(
    ledger: Ledger, identity: StudyIdentity, composite: Composite, part: int, parts: int
) -> dict[str, PartGradient]:
    """What the ledger has of a composite on one part, by corpus key.

    Raises:
        EvaluationError: It lacks a corpus.
    """
    windows = part_windows(identity.sizes(SEARCH), part, parts)
    measured = ledger.part_gradients(composite, one_each(windows), identity.differentiation)
    if measured.keys() < windows.keys():
        raise EvaluationError("a probe lacks a corpus")
    return {key: measured[key][own] for key, own in windows.items()}


def probe_race(race: Race, identity: StudyIdentity, part: int, parts: int) -> Race:
    """A trial's race, with the windows of a part as the first."""
    return race.beginning_with(part_windows(identity.sizes(SEARCH), part, parts))


def probe_forwards(identity: StudyIdentity, part: int, parts: int) -> float:
    """Forward-equivalents of a probe."""
    sizes = identity.sizes(SEARCH)
    return GRADIENT_FORWARDS * counted(part_windows(sizes, part, parts).values()) / sum(sizes.values())


def corrected(
    ledger: Ledger,
    identity: StudyIdentity,
    probe: Mapping[str, PartGradient],
    part: int,
    parts: int,
) -> dict[str, Gradient]:
    """The estimated gradient of each corpus's loss by key, for each unit of its size, by content of the fine-tunes."""
    anchor = identity.composite(identity.space.centroid())
    common = probed(ledger, identity, anchor, part, parts)
    whole = ledger.gradients(anchor, identity.keys(SEARCH), identity.differentiation)
    scores = ledger.look_up(anchor, identity.keys(SEARCH), identity.scoring)

    def per_unit(gradient: Gradient, score: Score, content: str) -> float:
        return gradient[content] / fsum(score.sizes_W(identity.unit))

    return {
        key: {
            content: per_unit(own.gradient, own.score, content)
            - per_unit(common[key].gradient, common[key].score, content)
            + per_unit(whole[key], scores[key], content)
            for content in identity.fine_tunes.values()
        }
        for key, own in probe.items()
    }
