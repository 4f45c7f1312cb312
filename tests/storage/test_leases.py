"""Laws of leases: who may drive a study, alone or beside others, and what becomes of drivers that are gone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from dem_opt.errors import InputError
from dem_opt.storage import leases
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding, visiting
from dem_opt.storage.retry import outage

SPAWN = multiprocessing.get_context("spawn")
NOBODY = 2**22 + 1
"""No system numbers its processes so high."""


@pytest.fixture
def server(postgres_url: str) -> Iterator[Engine]:
    engine = connect(postgres_url)
    yield engine
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
    outcomes = Counter(answers.get(timeout=60) for _ in range(drivers * len(rounds)))
    for process in processes:
        process.join()
    expected = (("held", 1), ("refused", drivers - 1))
    assert outcomes == {(*turn, word): count for turn in rounds for word, count in expected}


def _enter(engine: Engine, **changed: object) -> None:
    """Writes a holder into the lease's table: this process, now, but for what is changed."""
    with holding(engine, "other"), engine.begin() as connection:
        row = dict(connection.execute(text("SELECT * FROM dem_driver WHERE study = 'other'")).mappings().one())
        row |= {"study": "study", "token": "another", **changed}
        connection.execute(
            text("INSERT INTO dem_driver VALUES (:study, :slot, :token, :host, :pid, :started, :since, :renewed)"),
            row,
        )


def _holders(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT study, pid FROM dem_driver")))


LIVE: list[dict[str, object]] = [{}, {"renewed": 0.0}, {"host": "elsewhere"}, {"host": "elsewhere", "pid": NOBODY}]
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
        started = leases._started(process.pid)
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
            connection.execute(text("UPDATE dem_driver SET token = 'another'"))
        with pytest.raises(InputError, match="another driver has taken the study over"):
            lease.renew()
    assert _holders(engine) == [("study", os.getpid())], "another's lease is not released"


def test_a_lease_is_renewed_while_it_is_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Event()

    def listen(*arguments: Any) -> None:
        if arguments[2].startswith("UPDATE dem_driver"):
            renewed.set()

    event.listen(engine, "after_cursor_execute", listen)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.04)
    with holding(engine, "study"):
        assert renewed.wait(30)


def test_on_a_server_several_drivers_see_each_other_and_on_sqlite_there_is_one(engine: Engine) -> None:
    with holding(engine, "study", several=True) as first:
        if engine.dialect.name == "sqlite":
            with pytest.raises(InputError, match="has been driving it since"), holding(engine, "study", several=True):
                pass
            assert first.others() == {}
            return
        with holding(engine, "study", several=True) as second, holding(engine, "other", several=True):
            assert list(first.others()) == [second.token] and list(second.others()) == [first.token]
        assert first.others() == {}


def test_who_does_not_drive_sees_the_drivers_of_a_server_and_is_seen_by_none(engine: Engine) -> None:
    visitor = visiting(engine, "study")
    assert visitor.others() == {}
    with holding(engine, "study", several=True) as lease:
        assert list(visitor.others()) == ([lease.token] if engine.dialect.name == "postgresql" else [])
        assert lease.others() == {}
        with visitor.turn("describing"):
            pass
    assert visitor.others() == {}


@pytest.mark.parametrize("holder", [*GONE, {"renewed": 0.0}])
def test_a_driver_that_is_gone_is_forgotten_by_the_others(server: Engine, holder: dict[str, object]) -> None:
    with holding(server, "study", several=True) as lease:
        lease._reached = 1.0
        _enter(server, slot="another", **holder)
        assert len(_holders(server)) == 2
        assert lease.others() == {} and len(_holders(server)) == 1


def test_after_an_outage_a_silent_driver_gets_time_to_be_heard_again(server: Engine) -> None:
    with holding(server, "study", several=True) as lease:
        _enter(server, slot="another", host="elsewhere", renewed=1.0)
        assert list(lease.others()) == ["another"], "this driver came just now: it could not have heard"


def test_a_driver_that_was_forgotten_goes_on_beside_others(server: Engine) -> None:
    with holding(server, "study", several=True) as lease:
        with server.begin() as connection:
            connection.execute(text("DELETE FROM dem_driver"))
        lease.renew()
        assert _holders(server) == [("study", os.getpid())]


def _take_turns(url: str, file: Path, rounds: int) -> None:
    """Adds one to the number in a file, so often."""
    engine = connect(url)
    with holding(engine, "study", several=True) as lease:
        for _ in range(rounds):
            with lease.turn() as confirm:
                number = int(file.read_text())
                confirm()
                file.write_text(str(number + 1))
    engine.dispose()


def test_turns_do_not_overlap(postgres_url: str, tmp_path: Path) -> None:
    file, drivers, rounds = tmp_path / "number", 3, 40
    file.write_text("0")
    processes = [SPAWN.Process(target=_take_turns, args=(postgres_url, file, rounds)) for _ in range(drivers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert file.read_text() == str(drivers * rounds)


def _be_frozen(url: str, ready: Any, thawed: Any, answers: Any) -> None:
    """Take a turn, be frozen in the middle of it, and tell whether the turn was still there afterwards."""
    leases.LEASE_SECONDS = 1.0
    engine = connect(url)
    with holding(engine, "study", several=True) as lease:
        with lease.turn() as confirm:
            ready.set()
            thawed.wait()
            try:
                confirm()
                answers.put("kept")
            except SQLAlchemyError as error:
                answers.put(outage(error))
        with lease.turn():
            answers.put("another turn")
    engine.dispose()


def test_a_frozen_driver_loses_its_turn_and_its_lease_and_learns_it(
    postgres_url: str, server: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    ready, thawed, answers = SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    process = SPAWN.Process(target=_be_frozen, args=(postgres_url, ready, thawed, answers))
    process.start()
    assert ready.wait(60) and process.pid
    with holding(server, "study", several=True) as lease:
        assert len(lease.others()) == 1
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with lease.turn():
                deadline = time.monotonic() + 30
                while lease.others() and time.monotonic() < deadline:
                    time.sleep(0.1)
                assert lease.others() == {}
        finally:
            os.kill(process.pid, signal.SIGCONT)
        thawed.set()
        assert "connection" in answers.get(timeout=60), "an outage, after which the driver proposes anew"
        assert answers.get(timeout=60) == "another turn"
    process.join()


def test_a_turn_that_lasts_is_kept(server: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.4)
    with holding(server, "study", several=True) as lease, lease.turn() as confirm:
        time.sleep(1.2)
        confirm()


def test_no_transaction_of_a_silent_program_lasts(server: Engine) -> None:
    with server.connect() as connection:
        limit = connection.scalar(text("SHOW idle_in_transaction_session_timeout"))
    assert limit == "1min"


def test_a_turn_ends_with_its_connection_and_the_loss_is_told(server: Engine) -> None:
    kill = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
    drivers = holding(server, "study", several=True), holding(server, "study", several=True)
    with drivers[0] as first, drivers[1] as second, first.turn() as confirm:
        confirm()
        with server.begin() as connection:
            connection.execute(text(kill))
        with second.turn(), pytest.raises(OperationalError):
            confirm()
