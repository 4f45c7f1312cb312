"""Another weighting of the objective, answered from the ledger without a forward pass."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from dem_opt.analysis.results import summarize
from dem_opt.errors import InputError, nearest
from dem_opt.search.trials import exceeded, objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import Question
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, Composite, Summary, TrialRecord

MEASURED = "the ledger"
"""What the table says in the place of an algorithm."""


def checked(question: Question, weights: Mapping[str, float], where: object, field: str) -> dict[str, float]:
    """A weighting that a user wrote, of all that the question weighs and in its order; names left out are 0.

    Raises InputError for an unknown name, a weight that is negative or not finite, and a weighting that is 0 of all.
    """
    for name, weight in weights.items():
        if name not in question.weights:
            mend = f"no such distribution or general corpus; {nearest(name, question.weights)}"
            raise InputError(where, f"{field}.{name}", weight, mend)
        if not isfinite(weight) or weight < 0:
            raise InputError(where, f"{field}.{name}", weight, "a weight is a number of at least 0")
    counted = [name for name, weight in weights.items() if weight and (name in question.experts or not question.worst)]
    if not counted:
        kind = "distribution's weight" if question.worst else "weight"
        raise InputError(where, field, dict(weights), f"at least one {kind} must be above 0")
    return {name: float(weights.get(name, 0.0)) for name in question.weights}


def reweighted(study: str, ledger: Ledger, question: Question, facts: Mapping[str, str]) -> Summary | None:
    """What a study would have found with this question's weights, had it looked at all that the ledger has.

    The candidates are the points of the question's space that are scored on all of the search split, whoever measured
    them and why.  The winner's line says how many they are; they cost no forward pass.  None where there is none.
    """
    objective = objectives(ledger, question).get(SEARCH)
    if objective is None:
        return None
    records = []
    for number, composite in enumerate(ledger.composites(question.scoring)):
        scores, point = recall(ledger, question, composite, SEARCH), _point(question, composite)
        if point is not None and len(scores) == len(question.corpora[SEARCH]):
            over = exceeded(ledger, question, scores)
            records.append(TrialRecord(study, number, point, objective(scores), scores, violation=over, forwards=0.0))
    if not records:
        return None
    return replace(summarize(study, ledger, question, {MEASURED: records}, facts), trials={})


def _point(question: Question, composite: Composite) -> Coefficients | None:
    """The composite as coefficients; None where it is no point of the question's space."""
    units = dict(composite.terms)
    units.pop(question.base, None)
    if not units.keys() <= set(question.experts.values()):
        return None
    names = {content: name for name, content in question.experts.items()}
    by_name = {names[content]: count for content, count in units.items()}
    point = Coefficients(tuple((name, by_name.get(name, 0)) for name in question.space.names))
    return point if question.space.contains(point) else None
