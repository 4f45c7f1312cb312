"""Laws of the database room: what is refused and how it is told, what connections get, who may drive."""

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text

from dem_opt import database
from dem_opt.database import connect, holding, masked, tune
from dem_opt.errors import InputError

SPAWN = multiprocessing.get_context("spawn")
SECRET = "hush"
NOBODY = 2**22 + 1
"""No system numbers its processes so high."""


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    is_local = request.param == "sqlite"
    engine = connect(f"sqlite:///{tmp_path}/study.db" if is_local else request.getfixturevalue("postgres_url"))
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("sqlite:////a:b@c/d.db", "sqlite:////a:b@c/d.db"),
        (f"postgresql+psycopg://me:{SECRET}@host:5/db", "postgresql+psycopg://me:***@host:5/db"),
        (f"postgresql://me:{SECRET}/@:{SECRET}@host/db", "postgresql://me:***@host/db"),
        (f"postgresql://host/db?a=1&password={SECRET}&b=2", "postgresql://host/db?a=1&password=***&b=2"),
        (f"https://me:{SECRET}@host/path", "https://me:***@host/path"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_masked_url_keeps_all_but_the_password(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("nonsense", "not a database URL"),
        ("", "not a database URL"),
        (f"postgresql://me:{SECRET}@host:port/db", "not a database URL"),
        (f"mysql://me:{SECRET}@host/db", "unknown kind of database"),
        (f"postgresql+psycopg2://me:{SECRET}@host/db", "unknown kind of database"),
        (f"postgresql://me:{SECRET}{{@host/db", "braces"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///{here}/file/below/study.db", "can't make {here}/file/below"),
        ("sqlite:///{here}/file", "not a database"),
        ("sqlite:///{here}", "unable to open"),
    ],
)
def test_a_url_that_cant_be_used_is_refused_in_one_line(url: str, mend: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words, and more than a hundred bytes of them. " * 10)
    if "{here}" in url:
        url, mend = url.format(here=tmp_path), mend.format(here=tmp_path)
    with pytest.raises(InputError) as caught:
        connect(url, "tracking.uri")
    told = str(caught.value)
    assert caught.value.field == "tracking.uri"
    assert mend in told
    assert "\n" not in told
    assert SECRET not in told


def test_a_server_that_does_not_answer_is_refused_without_its_password() -> None:
    with pytest.raises(InputError, match="the server does not answer") as caught:
        connect(f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db")
    assert SECRET not in str(caught.value)


def test_the_folder_of_a_new_file_is_made(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path}/a/b/study.db").dispose()
    assert (tmp_path / "a/b/study.db").is_file()


@pytest.mark.parametrize("own", [True, False])
def test_every_sqlite_connection_is_tuned(own: bool, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    engine = connect(url) if own else create_engine(url)
    if not own:
        with engine.connect():
            tune(engine)
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            values = [connection.execute(text(f"PRAGMA {pragma}")).scalar_one() for pragma in pragmas]
            assert values == ["wal", 1, 1, 30000]
    engine.dispose()


def _drive(rounds: list[tuple[str, str]], barrier: Any, answers: Any) -> None:
    """Opens each database at once with everybody else, and tells whether it got the study's lease."""
    for url, study in rounds:
        barrier.wait()
        engine = connect(url)
        try:
            with holding(engine, study):
                answers.put((url, study, "held"))
                barrier.wait()
        except InputError:
            answers.put((url, study, "refused"))
            barrier.wait()
        engine.dispose()


def test_of_drivers_that_come_at_once_exactly_one_holds_the_lease(engine: Engine, tmp_path: Path) -> None:
    """In SQLite every round is a new file; in PostgreSQL the first round makes the table."""
    url, drivers = engine.url.render_as_string(hide_password=False), 3
    new = engine.dialect.name == "sqlite"
    rounds = [(f"sqlite:///{tmp_path}/{n}/study.db" if new else url, f"study {n}") for n in range(10)]
    barrier, answers = SPAWN.Barrier(drivers), SPAWN.Queue()
    processes = [SPAWN.Process(target=_drive, args=(rounds, barrier, answers)) for _ in range(drivers)]
    for process in processes:
        process.start()
    told = Counter(answers.get(timeout=60) for _ in range(drivers * len(rounds)))
    for process in processes:
        process.join()
    expected = (("held", 1), ("refused", drivers - 1))
    assert told == {(*one, word): count for one in rounds for word, count in expected}


def _enter(engine: Engine, **changed: object) -> None:
    """Writes a holder into the lease's table: this process, now, but for what is changed."""
    with holding(engine, "other"), engine.begin() as connection:
        row = dict(connection.execute(text("SELECT * FROM dem_lease")).mappings().one())
        row |= {"study": "study", "token": "another", **changed}
        connection.execute(
            text("INSERT INTO dem_lease VALUES (:study, :token, :host, :pid, :started, :since, :renewed)"),
            row,
        )


def _holders(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT study, pid FROM dem_lease")))


LIVE: list[dict[str, object]] = [{}, {"host": "elsewhere"}, {"host": "elsewhere", "pid": NOBODY}]
GONE: list[dict[str, object]] = [
    {"pid": NOBODY},
    {"host": "elsewhere", "renewed": 0.0},
    pytest.param(  # type: ignore[list-item]
        {"started": "an earlier process of this number"},
        marks=pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
    ),
]


@pytest.mark.parametrize("holder", LIVE)
def test_a_live_holder_is_respected_and_named(engine: Engine, holder: dict[str, object]) -> None:
    _enter(engine, **holder)
    before = _holders(engine)
    with pytest.raises(InputError) as caught, holding(engine, "study"):
        pass
    assert f"process {holder.get('pid', os.getpid())} on {holder.get('host', gethostname())}" in str(caught.value)
    assert "since 20" in str(caught.value)
    assert _holders(engine) == before


@pytest.mark.parametrize("holder", GONE)
def test_a_holder_that_is_gone_is_succeeded_at_once(engine: Engine, holder: dict[str, object]) -> None:
    _enter(engine, **holder)
    with holding(engine, "study") as lease:
        lease.renew()
        assert _holders(engine) == [("study", os.getpid())]
    assert _holders(engine) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_holder_that_nobody_has_buried_is_succeeded(engine: Engine) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = database._started(process.pid)
        _enter(engine, pid=process.pid, started=started)
        with pytest.raises(InputError), holding(engine, "study"):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with holding(engine, "study"):
            pass


def test_the_lease_is_released_whatever_happens_and_studies_do_not_meet(engine: Engine) -> None:
    with pytest.raises(KeyboardInterrupt), holding(engine, "study"), holding(engine, "another"):
        assert len(_holders(engine)) == 2
        raise KeyboardInterrupt
    assert _holders(engine) == []


def test_a_driver_learns_from_renewing_that_it_was_succeeded(engine: Engine) -> None:
    with holding(engine, "study") as lease:
        lease.renew()
        with engine.begin() as connection:
            connection.execute(text("UPDATE dem_lease SET token = 'another'"))
        with pytest.raises(InputError, match="another driver has taken the study over"):
            lease.renew()
    assert _holders(engine) == [("study", os.getpid())], "another's lease is not released"


def test_a_lease_is_renewed_while_it_is_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Event()

    def listen(*arguments: Any) -> None:
        if arguments[2].startswith("UPDATE dem_lease"):
            renewed.set()

    event.listen(engine, "after_cursor_execute", listen)
    monkeypatch.setattr(database, "SILENCE", 0.04)
    with holding(engine, "study"):
        assert renewed.wait(30)


def test_a_new_file_that_another_is_writing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite gives up at once where a file is to become WAL while another connection has reserved it."""
    path = tmp_path / "study.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            other.rollback()

    monkeypatch.setattr("time.sleep", pause)
    connect(f"sqlite:///{path}").dispose()
    other.close()
    assert len(pauses) == 3 and pauses == sorted(pauses)
