"""Another weighting of the objective, evaluated from the ledger without a forward pass."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path

from dem_opt.analysis.results import summarize
from dem_opt.errors import InputError, nearest
from dem_opt.search.trials import coefficients_of, exceeded, objectives, recall
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, Summary, TrialRecord

LEDGER = "the ledger"
"""Label of the results table in the place of a run."""


def checked(identity: StudyIdentity, weights: Mapping[str, float], where: Path | None, field: str) -> dict[str, float]:
    """A user's weighting, completed with 0 for names left out, in the study's order.

    Raises:
        InputError: For an unknown name, a weight that is negative or not finite, and a weighting of zeros.
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
    """The summary that a study with these weights would have, had it evaluated every composite of the ledger.

    The candidates are the points of the study's space that are scored on all of the search split, whichever study
    measured them.  The winner's row counts them as its evaluations; they cost no forward pass.

    Returns:
        None where there is no candidate.
    """
    objective = objectives(ledger, identity).get(SEARCH)
    if objective is None:
        return None
    records = []
    for number, composite in enumerate(ledger.composites(identity.scoring)):
        scores, point = recall(ledger, identity, composite, SEARCH), coefficients_of(identity, composite)
        if point is not None and len(scores) == len(identity.corpora[SEARCH]):
            records.append(
                TrialRecord(
                    study=study,
                    number=number,
                    coefficients=point,
                    objective=objective(scores),
                    scores=scores,
                    violation=exceeded(ledger, identity, scores),
                    forwards=0.0,
                    unit=identity.unit,
                )
            )
    if not records:
        return None
    return replace(summarize(study, ledger, identity, {LEDGER: records}, facts), trials={})
