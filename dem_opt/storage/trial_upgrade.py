"""Upgrade of the trials that earlier releases wrote: flat attributes, and only what may win is a complete value."""

import json
from collections.abc import Iterator, Mapping
from math import inf, isfinite, log
from typing import Any

from sqlalchemy import BindParameter, Connection, bindparam, delete, inspect, select, update

from dem_opt.storage.optuna_tables import (
    COMPLETE,
    FAIL,
    PRUNED,
    TRIALS,
    USER_ATTRIBUTES,
    VALUES,
    Outcome,
    write_outcomes,
)
from dem_opt.types import PENALTY

NESTED = "dem_opt"
"""User attribute under which release 0.1.0 kept all measurements of a trial, as one JSON object."""

_RENAMED = {"forwards": "fe", "error": "standard_error"}
_NAMED = {"gradient": "gradient", "windows": "windows"}


def flattened(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements under `NESTED` as flat attributes: perplexities as NLL, without what was zero and not partial.

    NLL is recomputed as  log(perplexity) , to the last digit or two.
    """
    return dict(_flat_items(nested))


def _flat_items(nested: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if key in _NAMED:
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        elif key == "perplexity":
            yield from ((f"nll.{name}", log(part)) for name, part in value.items() if isfinite(part))
        elif key != "partial" and (value or key != "batch_tokens"):
            yield _RENAMED.get(key, key), value
    if "perplexity" in nested:
        yield "estimate", bool(nested.get("error"))


def upgrade_trials(connection: Connection) -> None:
    """Rewrite the trials of all studies in a database, in the transaction of a connection.

    A trial that was stopped early becomes PRUNED, and its estimate an intermediate value at the number of windows that
    it had seen.  The value of a trial that violates a constraint becomes infinite.  What was left half-written of a
    trial in hand is removed.
    """
    if not inspect(connection).has_table(USER_ATTRIBUTES.name):
        return
    value = select(VALUES.c.value).where(VALUES.c.trial_id == TRIALS.c.trial_id).scalar_subquery()
    query = (
        select(TRIALS.c.trial_id, TRIALS.c.state, value.label("value"), USER_ATTRIBUTES.c.value_json)
        .join_from(TRIALS, USER_ATTRIBUTES, USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id)
        .where(USER_ATTRIBUTES.c.key == NESTED)
    )
    outcomes = {
        row.trial_id: _upgraded(row.state, row.value, json.loads(row.value_json))
        for row in connection.execute(query)
        if row.state in (COMPLETE, FAIL)
    }
    connection.execute(delete(USER_ATTRIBUTES).where(USER_ATTRIBUTES.c.key == NESTED))
    changed = [{"trial": trial, "new": outcome.state} for trial, outcome in outcomes.items()]
    if changed:
        same: BindParameter[int] = bindparam("trial")
        connection.execute(update(TRIALS).where(TRIALS.c.trial_id == same).values(state=bindparam("new")), changed)
        connection.execute(delete(VALUES).where(VALUES.c.trial_id == same), changed)
    write_outcomes(connection, outcomes)


def _upgraded(state: str, value: float | None, nested: Mapping[str, Any]) -> Outcome:
    """A finished trial as this release writes it."""
    attributes, violation = flattened(nested), nested.get("violation", 0.0)
    if state == FAIL or value is None:
        return Outcome(state=state, attributes=attributes)
    if not nested.get("error") and not violation:
        return Outcome(state=state, values=(value,), attributes=attributes)
    attributes["penalized"] = value
    objective = attributes.setdefault("objective", value - PENALTY * violation)
    if not nested.get("error"):
        return Outcome(state=COMPLETE, values=(inf,), attributes=attributes, violation=violation)
    seen = {max(nested["windows"].values()): objective}
    return Outcome(state=PRUNED, attributes=attributes, intermediate=seen, violation=violation)
