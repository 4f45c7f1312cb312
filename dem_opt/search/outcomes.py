"""A trial between the database's tables and Optuna's own object, and the end of a trial in Optuna's terms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from optuna.trial import FrozenTrial, TrialState

from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.storage.optuna_tables import COMPLETE, FAIL, PRUNED, Outcome, StoredTrial


def frozen_trial(stored: StoredTrial) -> FrozenTrial:
    """A trial as Optuna's own reader gives it, but for times, distributions and system attributes."""
    state = TrialState[stored.state]
    return FrozenTrial(
        number=stored.number,
        trial_id=stored.id,
        state=state,
        value=None,
        values=stored.values or None,
        datetime_start=None,
        datetime_complete=None,
        params=dict(stored.parameters),
        distributions={},
        user_attrs=dict(stored.attributes),
        system_attrs={},
        intermediate_values=dict(stored.intermediate),
    )


def outcome_of(
    objective: float | None, attributes: TrialAttributes, estimates: Mapping[int, float], losses: Sequence[float]
) -> Outcome:
    """The end of a trial in Optuna's terms: only what may win the study is complete with a finite value.

    So Optuna's best trial, its tables and its Dashboard show the winner of the report.  Optuna itself passes over
    trials that violate a constraint, but its Dashboard and whoever sorts by the value do not: theirs is infinite.
    """
    if objective is None:
        return Outcome(state=FAIL, attributes=attributes.to_stored())
    if not attributes.error and not attributes.violation:
        return Outcome(state=COMPLETE, values=losses or (objective,), attributes=attributes.to_stored())
    stored, violation = replace(attributes, penalized=objective).to_stored(), attributes.violation
    if attributes.error:
        return Outcome(state=PRUNED, attributes=stored, intermediate=estimates, violation=violation)
    return Outcome(state=COMPLETE, values=(inf,), attributes=stored, violation=violation)
