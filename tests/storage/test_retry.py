"""Laws of patience: what counts as an outage is waited for, told once, and only so long; nothing else is."""

import sqlite3
from pathlib import Path

import pytest
from recorded import RecordedProgress
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from dem_opt.errors import OutageError
from dem_opt.storage import retry
from dem_opt.storage.retry import RetryPolicy, outage, patient


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)


def away(words: str = "database is locked") -> OperationalError:
    return OperationalError("UPDATE", {}, sqlite3.OperationalError(words))


class Shaky:
    """Fails so many times before it works."""

    def __init__(self, failures: int, error: Exception, patience: RetryPolicy) -> None:
        self.failures, self.error, self.patience, self.calls = failures, error, patience, 0

    @patient
    def work(self, result: int) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return result


@pytest.mark.parametrize("failures", [0, 1, 5])
def test_work_is_done_again_until_it_is_done_and_that_is_told_once(failures: int) -> None:
    progress = RecordedProgress()
    shaky = Shaky(failures, away(), RetryPolicy("the database X", 60.0, progress))
    assert shaky.work(7) == 7 and shaky.calls == failures + 1
    if failures:
        assert progress.notes[0] == "waiting for the database X (database is locked), for at most 60 s"
        assert len(progress.notes) == 2 and progress.notes[1].startswith("the database X is back after")
    else:
        assert progress.notes == []


def test_waiting_has_an_end() -> None:
    progress = RecordedProgress()
    shaky = Shaky(10**6, away("disk full"), RetryPolicy("the database X", 0.05, progress))
    with pytest.raises(OutageError, match=r"the database X can't be used \(disk full\); gave up after 0.05 s"):
        shaky.work(7)
    assert len(progress.notes) == 1 and shaky.calls > 1


def test_without_patience_an_outage_is_told_at_once() -> None:
    shaky = Shaky(1, away(), RetryPolicy())
    with pytest.raises(OutageError, match="database is locked"):
        shaky.work(7)
    assert shaky.calls == 1


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), away("no such table: dem_score"), IntegrityError("", {}, Exception())]
)
def test_what_is_no_outage_is_not_waited_for(error: Exception) -> None:
    shaky = Shaky(1, error, RetryPolicy("X", 60.0))
    with pytest.raises(type(error)):
        shaky.work(7)
    assert shaky.calls == 1


def test_the_cause_is_found_behind_what_wraps_it() -> None:
    try:
        raise RuntimeError("a commit failed") from away("disk I/O error")
    except RuntimeError as error:
        assert outage(error) == "disk I/O error"


def test_a_refusal_to_write_is_an_outage(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with pytest.raises(Exception) as caught, engine.begin() as connection:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        connection.execute(text("CREATE TABLE refused (x int)"))
    engine.dispose()
    assert "read-only transaction" in str(outage(caught.value))


def test_a_closed_database_is_an_outage(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/nowhere/study.db")
    with pytest.raises(OperationalError) as caught, engine.connect():
        pass
    assert outage(caught.value) == "unable to open database file"


def test_a_connection_that_is_lost_in_a_transaction_stays_an_outage_until_it_is_undone(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.connect() as connection, engine.connect() as other:
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
        other.execute(text(f"SELECT pg_terminate_backend({pid})"))
        for reason in ("terminating connection", "its connection was lost"):
            with pytest.raises(SQLAlchemyError) as caught:
                connection.scalar(text("SELECT 1"))
            assert reason in (retry.outage(caught.value) or "")
    engine.dispose()


def test_each_reason_is_told_once() -> None:
    progress = RecordedProgress()
    errors = iter([away("restarting"), away("restarting"), away("read-only"), away("restarting")])

    def work() -> int:
        for error in errors:
            raise error
        return 7

    assert RetryPolicy("X", 60.0, progress)(work) == 7
    assert [line.partition("(")[2].partition(")")[0] for line in progress.notes[:-1]] == ["restarting", "read-only"]
