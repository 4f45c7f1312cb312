"""Optuna's tables: the end of a trial in one transaction, and the trials of a study in four queries.

Optuna's public interface writes every attribute in a transaction of its own, refuses to change a finished trial, and
reads an object for each attribute: with one attribute for each measurement that is too slow.  So these are the columns
that dem_opt writes and reads itself; tests/storage/test_optuna_tables.py compares them with those of the installed
Optuna, and what is written here with what Optuna reads.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    DateTime,
    Engine,
    Enum,
    Float,
    Integer,
    String,
    TableClause,
    and_,
    column,
    func,
    or_,
    select,
    table,
    update,
)

from dem_opt.storage.engine import insert_into

RUNNING, COMPLETE, PRUNED, FAIL = "RUNNING", "COMPLETE", "PRUNED", "FAIL"
"""Optuna's states of a trial, as the database names them."""

CONSTRAINTS = "constraints"
"""System attribute of a trial: a list of numbers, above 0 where a constraint is violated.

Optuna has a newer form, one attribute for each constraint; its Dashboard shows this one alone, and Optuna reads both.
"""

_FINITE, _INFINITE = "FINITE", "INF_POS"

Attribute = tuple[str, Any]
"""Name and value of a user attribute."""

TRIALS = table(
    "trials",
    column("trial_id", Integer),
    column("study_id", Integer),
    column("number", Integer),
    column("state", Enum(RUNNING, COMPLETE, PRUNED, FAIL, "WAITING", name="trialstate")),
    column("datetime_complete", DateTime),
)
PARAMETERS = table(
    "trial_params", column("trial_id", Integer), column("param_name", String), column("param_value", Float)
)
VALUES = table(
    "trial_values",
    column("trial_id", Integer),
    column("objective", Integer),
    column("value", Float),
    column("value_type", Enum(_FINITE, _INFINITE, "INF_NEG", name="trialvaluetype")),
)
USER_ATTRIBUTES = table(
    "trial_user_attributes", column("trial_id", Integer), column("key", String), column("value_json", String)
)
STUDY_SYSTEM_ATTRIBUTES = table(
    "study_system_attributes", column("study_id", Integer), column("key", String), column("value_json", String)
)
SYSTEM_ATTRIBUTES = table(
    "trial_system_attributes", column("trial_id", Integer), column("key", String), column("value_json", String)
)
INTERMEDIATE_VALUES = table(
    "trial_intermediate_values",
    column("trial_id", Integer),
    column("step", Integer),
    column("intermediate_value", Float),
    column(
        "intermediate_value_type",
        Enum(_FINITE, _INFINITE, "INF_NEG", "NAN", name="trialintermediatevaluetype"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a trial.

    Attributes:
        state: COMPLETE, PRUNED or FAIL.
        values: Optuna's values of a complete trial, one for each objective, which may be infinite; none for the others.
        attributes: User attributes.
        intermediate: Intermediate values by step.
        violation: Above 0 where a constraint is violated.
    """

    state: str
    values: Sequence[float] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    intermediate: Mapping[int, float] = field(default_factory=dict)
    violation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A trial as the database has it."""

    id: int
    number: int
    state: str
    values: tuple[float, ...]
    parameters: Mapping[str, float]
    attributes: Mapping[str, Any]
    intermediate: Mapping[int, float]


def finish_trial(engine: Engine, trial: int, outcome: Outcome, owned: Attribute | None = None) -> bool:
    """End a running trial, with everything that is known of it, or not at all.

    Args:
        engine: The database.
        trial: Optuna's id of the trial.
        outcome: Its end.
        owned: A user attribute of which the trial may not have another value.

    Returns:
        False, and nothing is written, where the trial has ended before, or the attribute has another value.
    """
    ended = datetime.now(UTC).replace(tzinfo=None)  # Optuna keeps naive times in UTC
    with engine.connect() as connection:
        if not _update_running(connection, trial, state=outcome.state, datetime_complete=ended):
            return False
        # Read behind the lock of that update: whoever had the trial locked before has written its owner.
        if owned is not None and _read_attribute(connection, trial, owned[0]) not in (None, owned[1]):
            return False
        write_outcomes(connection, {trial: outcome})
        connection.commit()
    return True


def mark_running(engine: Engine, trial: int, attribute: Attribute) -> bool:
    """Give a running trial a user attribute; False, and nothing is written, where the trial has ended."""
    with engine.begin() as connection:
        if not _update_running(connection, trial, state=RUNNING):
            return False
        write_outcomes(connection, {trial: Outcome(state=RUNNING, attributes=dict([attribute]))})
    return True


def _update_running(connection: Connection, trial: int, **columns: Any) -> bool:
    """Update a running trial, and keep others from it until the transaction ends; False where the trial has ended."""
    running = (TRIALS.c.trial_id == trial) & (TRIALS.c.state == RUNNING)
    return connection.execute(update(TRIALS).where(running).values(columns)).rowcount == 1


def write_outcomes(connection: Connection, outcomes: Mapping[int, Outcome]) -> None:
    """Write values and attributes of trials by id; an attribute that a trial has is replaced."""
    rows: dict[TableClause, list[dict[str, Any]]] = {VALUES: [], INTERMEDIATE_VALUES: []}
    attributes: dict[TableClause, list[dict[str, Any]]] = {USER_ATTRIBUTES: [], SYSTEM_ATTRIBUTES: []}
    for trial, outcome in outcomes.items():
        for objective, measured in enumerate(outcome.values):
            value, kind = (measured, _FINITE) if isfinite(measured) else (None, _INFINITE)
            rows[VALUES].append({"trial_id": trial, "objective": objective, "value": value, "value_type": kind})
        rows[INTERMEDIATE_VALUES] += (
            {"trial_id": trial, "step": step, "intermediate_value": value, "intermediate_value_type": _FINITE}
            for step, value in outcome.intermediate.items()
        )
        attributes[USER_ATTRIBUTES] += (_attribute(trial, *item) for item in outcome.attributes.items())
        if outcome.violation > 0:
            attributes[SYSTEM_ATTRIBUTES].append(_attribute(trial, CONSTRAINTS, [outcome.violation]))
    for target, entries in rows.items():
        if entries:
            connection.execute(insert_into(connection, target), entries)
    for target, entries in attributes.items():
        if entries:
            insert = insert_into(connection, target)
            replaced = {"value_json": insert.excluded.value_json}
            connection.execute(insert.on_conflict_do_update(index_elements=["trial_id", "key"], set_=replaced), entries)


def _attribute(trial: int, key: str, value: object) -> dict[str, Any]:
    return {"trial_id": trial, "key": key, "value_json": json.dumps(value)}


def read_attribute(engine: Engine, trial: int, key: str) -> Any:
    """A user attribute of a trial, or None."""
    with engine.connect() as connection:
        return _read_attribute(connection, trial, key)


def _read_attribute(connection: Connection, trial: int, key: str) -> Any:
    same = (USER_ATTRIBUTES.c.trial_id == trial) & (USER_ATTRIBUTES.c.key == key)
    stored = connection.scalar(select(USER_ATTRIBUTES.c.value_json).where(same))
    return None if stored is None else json.loads(stored)


def read_study_attributes(engine: Engine, study: int, keys: Collection[str]) -> dict[str, Any]:
    """Some system attributes of a study; Optuna reads all, two of which are the note of each trial."""
    rows = STUDY_SYSTEM_ATTRIBUTES
    query = select(rows.c.key, rows.c.value_json).where((rows.c.study_id == study) & rows.c.key.in_(keys))
    with engine.connect() as connection:
        return {key: json.loads(text) for key, text in connection.execute(query)}


def read_trials(engine: Engine, study: int, after: int = 0, also: Collection[int] = ()) -> list[StoredTrial]:
    """The trials of a study, in the order of their numbers.

    Args:
        engine: The database.
        study: Optuna's id of the study.
        after: Trials up to this id are left out.
        also: Ids of trials that are read nevertheless.
    """
    # Without this bound a database looks at every trial of the study: `or` keeps it from using an index.
    bound = TRIALS.c.trial_id >= min([after + 1, *also])
    wanted = and_(TRIALS.c.study_id == study, bound, or_(TRIALS.c.trial_id > after, TRIALS.c.trial_id.in_(also)))
    columns = TRIALS.c.trial_id, TRIALS.c.number, TRIALS.c.state, VALUES.c.value, VALUES.c.value_type
    valued = VALUES.c.trial_id == TRIALS.c.trial_id
    query = select(*columns).join_from(TRIALS, VALUES, valued, isouter=True).where(wanted)
    with engine.connect() as connection:
        # Trials before what belongs to them: a trial that ends meanwhile is read as running, never without a part.
        rows = connection.execute(query.order_by(TRIALS.c.number, VALUES.c.objective)).all()
        parameters, attributes, intermediate = (
            _by_trial(connection, wanted, *columns)
            for columns in (
                (PARAMETERS.c.trial_id, PARAMETERS.c.param_name, PARAMETERS.c.param_value),
                (USER_ATTRIBUTES.c.trial_id, USER_ATTRIBUTES.c.key, USER_ATTRIBUTES.c.value_json),
                (INTERMEDIATE_VALUES.c.trial_id, INTERMEDIATE_VALUES.c.step, INTERMEDIATE_VALUES.c.intermediate_value),
            )
        )
    values: dict[int, tuple[float, ...]] = {}
    for row in rows:  # one for each value
        value = inf if row.value_type == _INFINITE else row.value
        values[row.trial_id] = values.get(row.trial_id, ()) + (() if value is None else (value,))
    return [
        StoredTrial(
            id=row.trial_id,
            number=row.number,
            state=row.state,
            values=values[row.trial_id],
            parameters=parameters.get(row.trial_id, {}),
            attributes={key: json.loads(text) for key, text in attributes.get(row.trial_id, {}).items()},
            intermediate=intermediate.get(row.trial_id, {}),
        )
        for row in {row.trial_id: row for row in rows}.values()
    ]


def _by_trial(
    connection: Connection, wanted: ColumnElement[bool], trial: Any, key: Any, value: Any
) -> dict[int, dict[Any, Any]]:
    """A column of the rows that belong to the wanted trials, by trial and by another column."""
    query = select(trial, key, value).where(trial.in_(select(TRIALS.c.trial_id).where(wanted)))
    by_trial: dict[int, dict[Any, Any]] = {}
    for owner, name, content in connection.execute(query):
        by_trial.setdefault(owner, {})[name] = content
    return by_trial


def count_states(engine: Engine, study: int) -> dict[str, int]:
    """Number of trials of a study by state."""
    query = select(TRIALS.c.state, func.count()).where(TRIALS.c.study_id == study).group_by(TRIALS.c.state)
    with engine.connect() as connection:
        return {state: count for state, count in connection.execute(query)}


def best_value(engine: Engine, study: int) -> float | None:
    """The least finite value of a study's complete trials, which is that of Optuna's best trial; None without any.

    Of a study with several objectives, the least mean of a trial's values.
    """
    complete = (TRIALS.c.study_id == study) & (TRIALS.c.state == COMPLETE)
    means = select(func.avg(VALUES.c.value).label("mean")).join_from(
        TRIALS, VALUES, VALUES.c.trial_id == TRIALS.c.trial_id
    )
    by_trial = means.where(complete).group_by(TRIALS.c.trial_id).subquery()
    with engine.connect() as connection:
        least: float | None = connection.scalar(select(func.min(by_trial.c.mean)))
    return least
