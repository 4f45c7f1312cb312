"""Optuna reads what is written into its tables, and what it writes is read as it is."""

from collections.abc import Callable, Iterator
from math import inf

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy import Engine, TableClause, event, inspect

from dem_opt.storage import optuna_tables
from dem_opt.storage.engine import tune
from dem_opt.storage.optuna_tables import (
    COMPLETE,
    FAIL,
    PRUNED,
    Outcome,
    best_value,
    count_states,
    finish_trial,
    mark_running,
    read_attribute,
    read_trials,
)

TABLES = [value for value in vars(optuna_tables).values() if isinstance(value, TableClause)]
OUTCOMES = {
    "complete": Outcome(state=COMPLETE, values=(2.5,), attributes={"nll.code": 0.1, "estimate": False, "fe": 1.0}),
    "infeasible": Outcome(state=COMPLETE, values=(inf,), attributes={"penalized": 1 / 3}, violation=0.25),
    "stopped": Outcome(state=PRUNED, attributes={"windows.a": 4}, intermediate={2: 1.5, 4: 1.25}, violation=0.5),
    "failed": Outcome(state=FAIL, attributes={"reason": 'it\'s "lost"'}),
    "bare": Outcome(state=FAIL),
}
"""Ends of trials."""


@pytest.fixture
def storage(url: str) -> Iterator[RDBStorage]:
    """Optuna's tables in a database of each kind, with a study of one trial."""
    storage = RDBStorage(url)
    tune(storage.engine)
    optuna.create_study(study_name="other", storage=storage).add_trial(running())
    yield storage
    storage.remove_session()
    storage.engine.dispose()


@pytest.fixture
def study(storage: RDBStorage) -> optuna.Study:
    return optuna.create_study(study_name="mine", storage=storage)


@pytest.fixture
def engine(storage: RDBStorage) -> Engine:
    return storage.engine  # type: ignore[no-any-return]


@pytest.fixture
def begin(storage: RDBStorage, study: optuna.Study) -> Callable[[], int]:
    """Creates a running trial, and returns its id."""
    return lambda: storage.create_new_trial(storage.get_study_id_from_name("mine"), running())


def running() -> optuna.trial.FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        params={"a": 0.25, "b": 0.75},
        distributions={name: FloatDistribution(0, 1) for name in "ab"},
        user_attrs={"driver": "me", "fe": 0.5},
    )


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_the_columns_are_those_of_the_installed_optuna(engine: Engine, table: TableClause) -> None:
    known = {column["name"]: column for column in inspect(engine).get_columns(table.name)}
    columns = {column.name: column for column in table.columns}
    assert columns.keys() <= known.keys()
    if engine.dialect.name == "postgresql":
        for name, column in columns.items():
            if enums := getattr(column.type, "enums", None):
                assert set(known[name]["type"].enums) == set(enums) and known[name]["type"].name == column.type.name


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
def test_optuna_reads_the_end_of_a_trial(
    study: optuna.Study, engine: Engine, begin: Callable[[], int], outcome: Outcome
) -> None:
    _, trial = begin(), begin()
    assert finish_trial(engine, trial, outcome)
    before, after = study.trials
    assert before.state is TrialState.RUNNING and before.number == 0
    assert after.state.name == outcome.state and (after.values or []) == list(outcome.values)
    assert after.params == {"a": 0.25, "b": 0.75}
    assert after.user_attrs == {"driver": "me", "fe": 0.5} | dict(outcome.attributes)
    assert after.intermediate_values == outcome.intermediate
    assert list(after.constraints.values()) == ([outcome.violation] if outcome.violation else [])
    assert after.datetime_start is not None and after.duration is not None
    assert 0 <= after.duration.total_seconds() < 60


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
def test_what_is_read_is_what_optuna_reads(
    storage: RDBStorage, study: optuna.Study, engine: Engine, begin: Callable[[], int], outcome: Outcome
) -> None:
    begin()
    finish_trial(engine, begin(), outcome)
    study.tell(study.ask(), 3.0)
    number = storage.get_study_id_from_name("mine")
    stored = read_trials(engine, number)
    assert [
        (trial.number, trial.state, list(trial.values) or None, trial.parameters, trial.attributes, trial.intermediate)
        for trial in stored
    ] == [
        (trial.number, trial.state.name, trial.values, trial.params, trial.user_attrs, trial.intermediate_values)
        for trial in study.trials
    ]
    (first, second, third) = (trial.id for trial in stored)
    assert [trial.id for trial in read_trials(engine, number, second)] == [third]
    assert [trial.id for trial in read_trials(engine, number, second, {first})] == [first, third]
    assert read_attribute(engine, first, "driver") == "me"
    assert read_attribute(engine, first, "none") is None


def test_a_finished_trial_stays_as_it_is(study: optuna.Study, engine: Engine, begin: Callable[[], int]) -> None:
    trial = begin()
    assert finish_trial(engine, trial, OUTCOMES["complete"])
    before = study.trials
    assert not finish_trial(engine, trial, OUTCOMES["stopped"])
    assert study.trials == before


def test_the_owner_of_a_trial_alone_ends_it(study: optuna.Study, engine: Engine, begin: Callable[[], int]) -> None:
    trial, outcome = begin(), OUTCOMES["complete"]
    assert mark_running(engine, trial, ("driver", "other"))
    before = study.trials
    assert not finish_trial(engine, trial, outcome, ("driver", "me"))
    assert study.trials == before and before[0].user_attrs["driver"] == "other"
    assert finish_trial(engine, trial, outcome, ("driver", "other"))
    assert not mark_running(engine, trial, ("driver", "me"))
    assert study.trials[0].user_attrs["driver"] == "other"
    assert finish_trial(engine, begin(), outcome, ("unknown", "me")), "a trial without an owner is everyone's"


def test_an_end_that_can_t_be_written_leaves_the_trial_running(
    study: optuna.Study, engine: Engine, begin: Callable[[], int]
) -> None:
    trial = begin()
    before = study.trials
    with pytest.raises(TypeError):
        finish_trial(engine, trial, Outcome(state=COMPLETE, values=(1.0,), attributes={"bad": object()}))
    assert study.trials == before


def test_an_end_takes_a_few_statements_however_many_attributes_it_has(
    storage: RDBStorage, engine: Engine, begin: Callable[[], int]
) -> None:
    trial, statements = begin(), list[str]()
    event.listen(engine, "before_cursor_execute", lambda *words: statements.append(words[2]))
    finish_trial(engine, trial, Outcome(state=COMPLETE, values=(1.0,), attributes={str(n): n for n in range(50)}))
    assert len(statements) == 3, "the state, the value, the attributes"
    study = storage.get_study_id_from_name("mine")
    statements.clear()
    read_trials(engine, study)
    assert len(statements) == 4


def test_states_are_counted_and_the_best_value_is_that_of_optuna(
    storage: RDBStorage, study: optuna.Study, engine: Engine, begin: Callable[[], int]
) -> None:
    number = storage.get_study_id_from_name("mine")
    assert best_value(engine, number) is None
    for outcome in OUTCOMES.values():
        finish_trial(engine, begin(), outcome)
    finish_trial(engine, begin(), Outcome(state=COMPLETE, values=(2.75,)))
    begin()
    assert count_states(engine, number) == {"COMPLETE": 3, "PRUNED": 1, "FAIL": 2, "RUNNING": 1}
    assert best_value(engine, number) == study.best_value == 2.5
