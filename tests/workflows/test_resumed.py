"""Laws of a study that is run again: elsewhere, with other libraries, beside other drivers, without MLflow."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

import in_process
import pytest
import worlds
from mlflow.tracking import MlflowClient
from recorded import RecordedProgress
from sqlalchemy import text

from dem_opt import Study
from dem_opt.cli.main import main
from dem_opt.errors import InputError, OutageError
from dem_opt.search import optuna_storage
from dem_opt.storage import engine as engine_module
from dem_opt.storage import retry
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import RetryPolicy
from dem_opt.workflows.libraries import libraries


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedProgress:
    """Runs a study in this process, without MLflow; what it said."""
    listener = RecordedProgress()
    in_process.open_study(path, listener).run()
    return listener


@pytest.mark.parametrize("algorithm", ["simplex-gp", "tpe", "cmaes"])
def test_sqlite_and_postgresql_give_the_same_trials_to_the_bit(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    search = {"algorithm": algorithm, "trials": 12, "seed": 4}
    searches = []
    for name, sections in (("sqlite", {}), ("server", {"storage": postgres_url})):
        listener = run(worlds.study(tmp_path / name, search=search, **sections), monkeypatch)
        searches.append(
            [
                (record.number, record.coefficients.pairs, record.objective, record.error, record.scores)
                for record in listener.records
            ]
        )
    assert len(searches[0]) == 12 and searches[0] == searches[1]


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three trials that was run."""
    path = worlds.study(tmp_path, search={"algorithm": "random", "trials": 3})
    run(path, monkeypatch)
    return path


def test_with_the_same_libraries_nothing_is_scored_again(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [line for line in run(begun, monkeypatch).notes if "since the last run" in line]


def test_a_search_that_goes_on_reports_its_earlier_trials(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.write_text(begun.read_text().replace("trials: 3", "trials: 5"))
    listener = run(begun, monkeypatch)
    (earlier,) = listener.earlier
    assert [record.number for record in earlier] == [0, 1, 2] and listener.done == [4, 5]


@pytest.mark.parametrize("drift", [0.0, 1e-3])
def test_where_libraries_changed_the_best_is_scored_again_and_a_difference_is_told(
    begun: Path, monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    study = Study.load(begun)
    engine = connect(study.config.storage)
    ledger = Ledger(engine)
    assert ledger.libraries("tiny") == libraries()
    ledger.enter_libraries("tiny", libraries() | {"torch": "1.0"})
    winner = study.summary().winner
    if drift:
        _change_nats(engine, drift)
    progress = run(begun, monkeypatch)
    reports = progress.warnings if drift else progress.notes
    (report,) = [line for line in reports if "since the last run" in line]
    assert f"torch 1.0 -> {libraries()['torch']}" in report
    if drift:
        now = winner.objective["search"]
        assert f"the best composite scores {now:.9f}, not {now * (1 + drift):.9f}: {-now * drift:+.1e} nats" in report
    else:
        assert report.endswith("the best composite scores the same to the bit")
    assert ledger.libraries("tiny") == libraries()
    engine.dispose()


def _change_nats(engine, drift: float) -> None:
    """As if all scores had been measured by something that counts a little more."""
    import numpy as np

    with engine.begin() as connection:
        for row in connection.execute(text("SELECT id, nats_W FROM dem_score")).all():
            nats_W = np.frombuffer(row[1], dtype="<f8") * (1 + drift)
            changed = {"nats": nats_W.astype("<f8").tobytes(), "id": row[0]}
            connection.execute(text("UPDATE dem_score SET nats_W = :nats WHERE id = :id"), changed)


def test_another_question_is_refused_while_others_ask_the_old_one(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"storage": postgres_url, "search": {"algorithm": "random", "trials": 3}}
    run(worlds.study(tmp_path, **sections), monkeypatch)
    changed = worlds.study(tmp_path, **sections, simplex={"bounds": {"code": [0, 0.5]}})
    engine = connect(postgres_url)
    with holding(engine, "tiny", several=True), pytest.raises(InputError, match="while it is driven by process"):
        run(changed, monkeypatch)
    assert any("generation 2" in line for line in run(changed, monkeypatch).notes)
    engine.dispose()


def test_what_mlflow_lacks_is_logged_without_scoring(begun: Path) -> None:
    study = in_process.open_tracked(begun, RecordedProgress())
    assert study.sync() and study.sync()
    client = MlflowClient(study.config.tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert sorted(run.data.tags["dem_opt.trial"] for run in runs if "dem_opt.trial" in run.data.tags) == ["0", "1", "2"]


def test_there_is_nothing_to_sync_before_a_run(tmp_path: Path) -> None:
    path = worlds.study(tmp_path)
    with pytest.raises(InputError, match="nothing is measured yet"):
        Study.load(path).sync()
    assert not (tmp_path / "runs").exists()


def _hold(file: Path, ready: Event, over: Event) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ready.set()
        over.wait()


@pytest.fixture
def locked(begun: Path) -> Iterator[Path]:
    """The study, whose database another program has locked."""
    ready, over = Event(), Event()
    program = Thread(target=_hold, args=(begun.parent / "runs/tiny/study.db", ready, over))
    program.start()
    ready.wait()
    yield begun
    over.set()
    program.join()


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_locked_database_is_waited_for_with_a_word_and_not_for_ever(
    begun: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    """In another journal mode than the usual one, readers are locked out too."""
    with closing(sqlite3.connect(begun.parent / "runs/tiny/study.db")) as database:
        database.execute(f"PRAGMA journal_mode = {mode}")
    path = worlds.study(begun.parent, search={"algorithm": "random", "trials": 4}, outages={"storage": 3})
    request.getfixturevalue("locked")
    progress = RecordedProgress()
    with pytest.raises(OutageError, match="locked"):
        in_process.open_study(path, progress).run()
    (note,) = progress.notes
    assert "waiting for the database" in note and "study.db (database is locked)" in note


@pytest.mark.parametrize("command", [["list"], ["trials"], ["report"], ["check"], ["reset", "--yes"]])
def test_every_command_tells_a_locked_database_in_one_line(
    locked: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(engine_module, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(retry, "BRIEF", RetryPolicy(seconds=0.2))
    status = main([*command, str(locked)])
    said = capfd.readouterr().err
    assert status in (0, 1) and "Traceback" not in said
    assert status == 0 or ("locked" in said and len(said.splitlines()) == 1)


COMMANDS = [["run"], ["list"], ["trials"], ["show"], ["report"], ["dashboard"], ["reset", "--yes"]]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_refuses_the_tables_of_another_optuna_in_one_line(
    begun: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(optuna_storage, "_COMPATIBLE", set())  # as in a process of its own
    with closing(sqlite3.connect(begun.parent / "runs/tiny/study.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.9.0.a'")
    assert main([*command, "--quiet", str(begun)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("dem-opt: storage = ") and "a newer Optuna than" in line
