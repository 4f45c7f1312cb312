"""Which question a study asks: a change begins a new generation, which starts from what the ledger has."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dem_opt.errors import InputError
from dem_opt.evaluation.objective import Objective
from dem_opt.progress import Progress
from dem_opt.search.trials import exceeded, objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity, changes, refuse_other_scoring
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger, StudyRow
from dem_opt.types import SEARCH

CARRIED_OVER = 10
"""How many composites of an earlier generation a new one begins with where nothing is to be measured of them."""

SCORED_ANEW = 6
"""How many where each costs a pass over every new corpus."""


def enter(
    name: str, identity: StudyIdentity, ledger: Ledger, lease: Lease, where: object, progress: Progress
) -> tuple[int, list[Coefficients]]:
    """A study's generation and the points that it begins with; a first run, or a change, is written down.

    Raises InputError where its scores would not compare with those that the study has, and where other drivers are at
    work on the question that it asked before.
    """
    asked, scored = identity.identity_fields(), identity.scoring_fields()
    row = ledger.study(name)
    if row is None:
        ledger.enter_study(StudyRow(name, 1, scored, asked))
        return 1, []
    refuse_other_scoring(where, row.scoring, scored)
    change = changes(row.identity, asked)
    if change and (others := lease.others()):
        mend = f"{change}, while it is driven by {' and '.join(others.values())}; stop them first"
        raise InputError(where, "name", name, mend)
    generation = row.generation + bool(change)
    ledger.enter_study(StudyRow(name, generation, row.scoring | scored, asked))
    start = carried_over(ledger, identity) if generation > 1 else []
    if change:
        reuse = told_reuse(ledger, identity, start)
        progress.note(f"{name} now asks another question ({change}): generation {generation} begins {reuse}")
    return generation, start


def carried_over(ledger: Ledger, identity: StudyIdentity) -> list[Coefficients]:
    """The best composites of the ledger that the question's space still contains, as its coefficients.

    A composite of an earlier question is a point of this one where it uses no other checkpoint: the face w_new = 0
    of a simplex that has grown, or what is left of one that has shrunk.  Those with the most corpora scored come
    first, by their violation and objective over these (the mean, while regrets are not known).  Where corpora are
    missing, only they are measured, on the best of those and on what is farthest from all that are chosen, by the
    greatest difference of a coefficient: near the best, the old corpora tell little that is new.
    """
    space, names = identity.space, {content: name for name, content in identity.fine_tunes.items()}
    objective = objectives(ledger, identity).get(SEARCH, Objective(identity.weights))
    ranked = []
    for composite in ledger.composites(identity.scoring):
        units = dict(composite.terms)
        units.pop(identity.base, None)
        if units.keys() <= names.keys():
            by_name = {names[content]: count for content, count in units.items()}
            point = Coefficients(tuple((name, by_name.get(name, 0)) for name in space.names))
            if not space.contains(point):
                continue
            scores = recall(ledger, identity, composite, SEARCH)
            weights = {name: identity.weights[name] for name in scores}
            if any(weights.values()):
                over = exceeded(ledger, identity, scores)
                ranked.append((-len(scores), over, replace(objective, weights=weights)(scores), composite.key, point))
    ranked.sort()
    if not ranked or -ranked[0][0] == len(identity.corpora[SEARCH]):
        return [point for *_, point in ranked[:CARRIED_OVER]]
    known = [point for scored, *_, point in ranked if scored == ranked[0][0]]
    others = [point for scored, *_, point in ranked if scored != ranked[0][0]]
    return (_apart(known, SCORED_ANEW) + others)[:SCORED_ANEW]


def told_reuse(ledger: Ledger, identity: StudyIdentity, start: Sequence[Coefficients]) -> str:
    """What a new generation has of the ones before, and why it holds."""
    if not start:
        return "nothing that is measured is a composite of it"
    found = [recall(ledger, identity, identity.composite(point), SEARCH) for point in start]
    held = [name for name in identity.corpora[SEARCH] if all(name in scores for scores in found)]
    new = [name for name in identity.corpora[SEARCH] if name not in held]
    why = (
        f"with {len(start)} composites whose checkpoints and windows are the same, so scores on {', '.join(held)} hold"
    )
    return f"{why}; of these only {', '.join(new)} is scored" if new else f"{why}; none of these is scored again"


def _apart(ranked: Sequence[Coefficients], most: int) -> list[Coefficients]:
    """The first point, then one after the other the one farthest from those chosen, the first of equals."""
    rest = np.array([[units for _, units in point.items] for point in ranked]).reshape(len(ranked), -1)
    chosen, distance_N = list[int](), np.full(len(ranked), np.inf)
    while len(chosen) < min(most, len(ranked)) and distance_N.max() > 0:
        chosen.append(int(distance_N.argmax()))
        distance_N = np.minimum(distance_N, np.abs(rest - rest[chosen[-1]]).max(axis=1))
    return [ranked[place] for place in chosen]
