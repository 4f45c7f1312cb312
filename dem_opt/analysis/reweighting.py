"""Another weighting of the objective, answered from the ledger without a forward pass."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from dem_opt.analysis.results import summarize
from dem_opt.errors import InputError, nearest
from dem_opt.search.trials import exceeded, objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, Composite, Summary, TrialRecord

MEASURED = "the ledger"
"""What the table says in the place of an algorithm."""


def checked(identity: StudyIdentity, weights: Mapping[str, float], where: object, field: str) -> dict[str, float]:
    """A weighting that a user wrote, of all that the question weighs and in its order; names left out are 0.

    Raises InputError for an unknown name, a weight that is negative or not finite, and a weighting that is 0 of all.
    """
    for name, weight in weights.items():
        if name not in identity.weights:
            mend = f"no such distribution or general corpus; {nearest(name, identity.weights)}"
            raise InputError(where, f"{field}.{name}", weight, mend)
        if not isfinite(weight) or weight < 0:
            raise InputError(where, f"{field}.{name}", weight, "a weight is a number of at least 0")
    counted = [
        name for name, weight in weights.items() if weight and (name in identity.fine_tunes or not identity.worst)
    ]
    if not counted:
        kind = "distribution's weight" if identity.worst else "weight"
        raise InputError(where, field, dict(weights), f"at least one {kind} must be above 0")
    return {name: float(weights.get(name, 0.0)) for name in identity.weights}


def reweighted(study: str, ledger: Ledger, identity: StudyIdentity, facts: Mapping[str, str]) -> Summary | None:
    """What a study would have found with this question's weights, had it looked at all that the ledger has.

    The candidates are the points of the question's space that are scored on all of the search split, whoever measured
    them and why.  The winner's line says how many they are; they cost no forward pass.  None where there is none.
    """
    objective = objectives(ledger, identity).get(SEARCH)
    if objective is None:
        return None
    records = []
    for number, composite in enumerate(ledger.composites(identity.scoring)):
        scores, point = recall(ledger, identity, composite, SEARCH), _point(identity, composite)
        if point is not None and len(scores) == len(identity.corpora[SEARCH]):
            over = exceeded(ledger, identity, scores)
            records.append(
                TrialRecord(
                    study=study,
                    number=number,
                    coefficients=point,
                    objective=objective(scores),
                    scores=scores,
                    violation=over,
                    forwards=0.0,
                )
            )
    if not records:
        return None
    return replace(summarize(study, ledger, identity, {MEASURED: records}, facts), trials={})


def _point(identity: StudyIdentity, composite: Composite) -> Coefficients | None:
    """The composite as coefficients; None where it is no point of the question's space."""
    units = dict(composite.terms)
    units.pop(identity.base, None)
    if not units.keys() <= set(identity.fine_tunes.values()):
        return None
    names = {content: name for name, content in identity.fine_tunes.items()}
    by_name = {names[content]: count for content, count in units.items()}
    point = Coefficients(tuple((name, by_name.get(name, 0)) for name in identity.space.names))
    return point if identity.space.contains(point) else None
