"""Generations of a study: a changed identity begins a new one, which starts from the ledger's composites.

An identity that the study had before goes on with the trials that it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

import numpy as np

from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.objective import Objective
from dem_opt.grouping import same_search
from dem_opt.progress import Progress
from dem_opt.search.trials import coefficients_of, exceeded, objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity, changes, refuse_other_scoring
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger, StudyRow
from dem_opt.types import SEARCH, Score

CARRIED_OVER = 10
"""Composites of earlier generations that a new one begins with, where all their scores are known."""

SCORED_ANEW = 6
"""Composites that it begins with where each costs a pass over every new corpus."""


def enter(
    name: str,
    identity: StudyIdentity,
    ledger: Ledger,
    lease: Lease,
    confirm: Callable[[], None],
    where: Path | None,
    progress: Progress,
) -> tuple[int, list[Coefficients]]:
    """Write down a study's first run, or a change of its identity; `confirm` raises where the turn to do so was lost.

    Returns:
        The study's generation, and the points that it begins with.

    Raises:
        InputError: Where new scores would not compare with those that the study has, and where other drivers are at
            work on the identity that it had before.
    """
    identity_fields, scoring_fields = identity.identity_fields(), identity.scoring_fields()
    row = ledger.study(name)
    if row is None:
        confirm()
        ledger.enter_study(StudyRow(name, 1, scoring_fields, identity_fields))
        return 1, []
    refuse_other_scoring(where, row.scoring, scoring_fields)
    change = changes(row.identity, identity_fields)
    if change and (others := lease.others()):
        mend = f"{change}, while it is driven by {' and '.join(others.values())}; stop them first"
        raise InputError(where, "name", name, mend)
    known = _find_search(ledger, name, identity_fields)
    generation = known or max(ledger.generations(name)) + 1
    confirm()
    ledger.enter_study(StudyRow(name, generation, row.scoring | scoring_fields, identity_fields))
    start = carried_over(ledger, identity) if generation > 1 else []
    if change and generation == row.generation:
        progress.note(f"{name} has changed ({change}): the search of global coefficients stays")
    elif change:
        course = "goes on" if known else f"begins {describe_reuse(ledger, identity, start)}"
        progress.note(f"{name} has changed ({change}): generation {generation} {course}")
    return generation, start


def find_generation(ledger: Ledger, name: str, identity_fields: Mapping[str, str]) -> int | None:
    """Number of a study's generation with these identity fields, the present one or an earlier one, or None."""
    generations = ledger.generations(name)
    return next((number for number in sorted(generations) if generations[number] == identity_fields), None)


def _find_search(ledger: Ledger, name: str, identity_fields: Mapping[str, str]) -> int | None:
    """Number of a study's generation with this search of global coefficients, whatever its groups, or None."""
    generations = ledger.generations(name)
    return next((number for number in sorted(generations) if same_search(generations[number], identity_fields)), None)


@dataclass(frozen=True, kw_only=True, order=True)
class CarriedOver:
    """A composite of the ledger that is a point of the study's space; the most useful sorts first.

    Attributes:
        missing: Corpora of the search split that it has no scores on.
        violation: Violation over the scored corpora, in the objective's unit.
        objective: Objective over the scored corpora, in the objective's unit.
        key: The composite's key, which orders equals.
        coefficients: The point.
    """

    missing: int
    violation: float
    objective: float
    key: str
    coefficients: Coefficients = field(compare=False)


def carried_over(ledger: Ledger, identity: StudyIdentity) -> list[Coefficients]:
    """The best composites of the ledger that the study's space still contains, as its coefficients.

    A composite of an earlier generation is a point of this one where it uses no other checkpoint: the face w_new = 0 of
    a simplex that has grown, or the rest of one that has shrunk.  Those with the most corpora scored come first, by
    their violation and objective over these (the mean, while regrets are not known).  Where corpora are missing, only
    they are measured: on the best of those, and on the points that are farthest from all chosen ones, since near the
    best the old corpora say little that is new.
    """
    ranked = sorted(_candidates(ledger, identity))
    if not ranked or ranked[0].missing == 0:
        return [candidate.coefficients for candidate in ranked[:CARRIED_OVER]]
    most_scored = [candidate.coefficients for candidate in ranked if candidate.missing == ranked[0].missing]
    others = [candidate.coefficients for candidate in ranked if candidate.missing != ranked[0].missing]
    return (farthest_first(most_scored, SCORED_ANEW) + others)[:SCORED_ANEW]


def _candidates(ledger: Ledger, identity: StudyIdentity) -> list[CarriedOver]:
    """The ledger's composites in the study's space that have a score on some corpus of the objective."""
    objective = objectives(ledger, identity).get(SEARCH, Objective(identity.weights, unit=identity.unit))
    candidates = []
    for composite in ledger.composites(identity.scoring):
        point = coefficients_of(identity, composite)
        scores = {} if point is None else recall(ledger, identity, composite, SEARCH)
        weights = {name: identity.weights[name] for name in scores}
        if point is not None and any(weights.values()):
            candidates.append(
                CarriedOver(
                    missing=len(identity.corpora[SEARCH]) - len(scores),
                    violation=exceeded(ledger, identity, scores),
                    objective=_ranking(identity, replace(objective, weights=weights), scores),
                    key=composite.key,
                    coefficients=point,
                )
            )
    return candidates


def _ranking(identity: StudyIdentity, objective: Objective, scores: Mapping[str, Score]) -> float:
    """Return the objective over the scored corpora; a custom one needs all of them, so the mean until then."""
    is_whole = scores.keys() == identity.corpora[SEARCH].keys()
    try:
        return (objective if is_whole else replace(objective, function=None))(scores)
    except EvaluationError:
        return inf


def describe_reuse(ledger: Ledger, identity: StudyIdentity, start: Sequence[Coefficients]) -> str:
    """The part of a sentence that says what a new generation takes over from the ledger, and why that holds."""
    if not start:
        return "nothing that is measured is a composite of it"
    scores = [recall(ledger, identity, identity.composite(point), SEARCH) for point in start]
    kept = [name for name in identity.corpora[SEARCH] if all(name in by_name for by_name in scores)]
    new = [name for name in identity.corpora[SEARCH] if name not in kept]
    why = (
        f"with {len(start)} composites whose checkpoints and windows are the same, so scores on {', '.join(kept)} hold"
    )
    return f"{why}; of these only {', '.join(new)} is scored" if new else f"{why}; none of these is scored again"


def farthest_first(ranked: Sequence[Coefficients], most: int) -> list[Coefficients]:
    """Farthest-first traversal (Gonzalez 1985): the first point, then always the one farthest from those chosen.

    The distance is the greatest difference of a coefficient; of equals the first is chosen.
    """
    units_NK = np.array([[units for _, units in point.pairs] for point in ranked]).reshape(len(ranked), -1)
    chosen, distance_N = list[int](), np.full(len(ranked), np.inf)
    while len(chosen) < min(most, len(ranked)) and distance_N.max() > 0:
        chosen.append(int(distance_N.argmax()))
        distance_N = np.minimum(distance_N, np.abs(units_NK - units_NK[chosen[-1]]).max(axis=1))
    return [ranked[place] for place in chosen]
