"""Leases: the right of a process to drive a study, renewed while it lives.

With SQLite a study has one driver at a time; with a server there may be several, which take turns by advisory locks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from socket import gethostname
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, delete, func, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dem_opt.errors import InputError
from dem_opt.storage.engine import create_missing, insert_into
from dem_opt.storage.retry import BRIEF, RetryPolicy, patient

LEASE_SECONDS = 60.0
"""Seconds after which a driver beside others, or on another host, that has not renewed its lease counts as gone."""

TURN_PAUSE = 0.02
"""Seconds between two attempts to get a turn."""

WAITING_NOTICE = 10.0
"""Seconds of waiting for a turn after which the user is told."""


class _Tables(DeclarativeBase):
    """The leases' table."""


class _Driver(_Tables):
    """A driver of a study.

    Attributes:
        slot: "" where a study has one driver at a time; else the driver's token.
        started: Start time of the process, which tells it from a later one with the same pid.
        since: When it took the lease, in seconds since 1970 by the database's clock.
        renewed: When it last renewed the lease.
    """

    __tablename__ = "dem_driver"

    study: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    started: Mapped[str]
    since: Mapped[float]
    renewed: Mapped[float]


class Lease:
    """The right to drive one study, of one process alone or beside others.

    Attributes:
        token: Identifies this driver.
        shared: There may be other drivers.
    """

    def __init__(self, engine: Engine, study: str, shared: bool, patience: RetryPolicy) -> None:
        self._engine, self._study, self.patience = engine, study, patience
        self.shared, self.token = shared, uuid4().hex
        self._slot = self.token if shared else ""
        self._reached = 0.0

    @patient
    def renew(self) -> None:
        """Record that this driver is alive.

        Beside others, a lease that was given up is taken again: this driver goes on with the trials that nobody has
        taken over.

        Raises:
            InputError: Another driver has taken the study over.
        """
        self._renew()

    def _renew(self) -> None:
        with self._engine.begin() as connection:
            now = _now(connection)
            statement = update(_Driver).where(*self._mine).values(renewed=now)
            if connection.execute(statement).rowcount == 0:
                if not self.shared:
                    raise InputError(None, "study", self._study, "another driver has taken the study over")
                self._insert(connection, now)
            self._reached = self._reached or now

    @patient
    def others(self) -> dict[str, str]:
        """Names of the other living drivers of the study by token; the rows of dead ones are removed.

        A driver is dead when its process is gone, or when it was suspended or is cut off: after 60 seconds without a
        renewal in which this one could have seen it.  After an outage of the database every driver gets that time
        again.
        """
        if not self.shared:
            return {}
        with self._engine.begin() as connection:
            now = _now(connection)
            theirs = (_Driver.study == self._study, _Driver.token != self.token)
            rows = connection.execute(select(_Driver.__table__).where(*theirs)).all()
            heard = {row.token: max(row.renewed, self._reached) for row in rows}
            gone = [row.token for row in rows if not _is_alive(row, heard[row.token], now)]
            if gone:
                connection.execute(delete(_Driver).where(*theirs, _Driver.token.in_(gone)))
            return {row.token: _name(row) for row in rows if row.token not in gone}

    @contextmanager
    def turn(self, work: str = "proposing") -> Iterator[Callable[[], None]]:
        """Do work that only one of a study's drivers may do at a time; the others wait.

        The turn is a lock of a transaction.  It ends with the driver's life, and after 60 seconds in which the server
        hears nothing of a driver that was suspended or is cut off.

        Args:
            work: Name of the work, hashed into the lock's key: drivers of earlier releases use the same names.

        Yields:
            A function that raises SQLAlchemy's error if the turn was lost.
        """
        if not self.shared:
            yield _check_nothing
            return
        turn = self.patience(lambda: self._begin_turn(work))
        try:
            yield turn.confirm
        finally:
            turn.end()

    def _begin_turn(self, work: str) -> "_Turn":
        digest = sha256(f"{self._study}\0{work}".encode()).digest()
        key = {"key": int.from_bytes(digest[:8], signed=True)}
        connection = self._engine.connect()
        try:
            limit = {"limit": f"{LEASE_SECONDS * 1000:.0f}ms"}
            connection.execute(text("SELECT set_config('idle_in_transaction_session_timeout', :limit, true)"), limit)
            self._wait(connection, key, work)
        except BaseException:
            connection.close()
            raise
        return _Turn(connection)

    def _wait(self, connection: Connection, key: dict[str, int], work: str) -> None:
        began, is_reported = monotonic(), False
        while not connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), key):
            if not is_reported and monotonic() - began > WAITING_NOTICE:
                is_reported = True
                self.patience.progress.note(f"waiting for another driver of {self._study}, which is {work}")
            sleep(TURN_PAUSE)

    @property
    def _mine(self) -> tuple[Any, ...]:
        return _Driver.study == self._study, _Driver.token == self.token

    def _take(self) -> None:
        """Take the lease, or raise InputError; try again where another process was quicker."""
        while not self._attempt():
            pass

    def _attempt(self) -> bool:
        """Take the lease if it is free or its holder is dead; False where another process took it meanwhile."""
        with self._engine.begin() as connection:
            now = self._reached = _now(connection)
            this = (_Driver.study == self._study, _Driver.slot == self._slot)
            holder = connection.execute(select(_Driver.__table__).where(*this)).one_or_none()
            if holder is None:
                return self._insert(connection, now)
            if _is_alive(holder, holder.renewed, now):
                mend = f"{_name(holder)} has been driving it since {_moment(holder)}; wait for it, or stop it"
                raise InputError(None, "study", self._study, mend)
            same = (*this, _Driver.token == holder.token, _Driver.renewed == holder.renewed)
            return connection.execute(update(_Driver).where(*same).values(self._me(now))).rowcount == 1

    def _insert(self, connection: Connection, now: float) -> bool:
        fresh = insert_into(self._engine, _Driver).values(study=self._study, slot=self._slot, **self._me(now))
        counted = fresh.on_conflict_do_nothing().execution_options(preserve_rowcount=True)
        return connection.execute(counted).rowcount == 1

    def _me(self, now: float) -> dict[str, Any]:
        pid = os.getpid()
        process = {"host": gethostname(), "pid": pid, "started": _started(pid) or ""}
        return {"token": self.token, "since": now, "renewed": now, **process}

    def _beat(self, ended: Event) -> None:
        """Renew until ended.  If the lease is lost, the driver learns it from its own call of `renew`."""
        while not ended.wait(LEASE_SECONDS / 4):
            try:
                self._renew()
            except DBAPIError:
                self._reached = 0.0
            except InputError:
                return

    def _release(self) -> None:
        """Give the lease back; where the database is away, it ends with this process, or by its age."""
        with suppress(DBAPIError), self._engine.begin() as connection:
            connection.execute(delete(_Driver).where(*self._mine))


class _Turn:
    """A lock that lives as long as the transaction of its connection, which a thread keeps from being idle."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._using, self._ended = connection, Lock(), Event()
        self._thread = Thread(target=self._keep, daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Raise SQLAlchemy's error if the lock was lost."""
        with self._using:
            self._connection.execute(text("SELECT 1")).close()

    def end(self) -> None:
        """Give the lock back; where the connection is lost, it has ended."""
        self._ended.set()
        self._thread.join()
        with suppress(SQLAlchemyError):
            self._connection.close()

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 4):
            try:
                self.confirm()
            except SQLAlchemyError:
                return


def _check_nothing() -> None:
    """The check of a turn that can't be lost."""


@contextmanager
def holding(engine: Engine, study: str, several: bool = False, patience: RetryPolicy = BRIEF) -> Iterator[Lease]:
    """Hold a lease of `study`: alone, or with `several` beside others where the database is a server.

    A thread renews it meanwhile.  A holder on this host whose process is gone is succeeded at once, one on another
    host after 60 seconds without a renewal.

    Raises:
        InputError: The holder is alive; names it, and since when.
    """
    patience(lambda: create_missing(engine, _Tables.metadata))
    lease = Lease(engine, study, several and _has_several(engine), patience)
    patience(lease._take)
    ended = Event()
    beating = Thread(target=lease._beat, args=[ended], daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        ended.set()
        beating.join()
        lease._release()


def visiting(engine: Engine, study: str, patience: RetryPolicy = BRIEF) -> Lease:
    """A lease that is not taken: shows a study's drivers, and gives turns beside them."""
    patience(lambda: create_missing(engine, _Tables.metadata))
    return Lease(engine, study, _has_several(engine), patience)


def living_drivers(connection: Connection) -> list[str]:
    """Names of the drivers of all studies in a database, as far as they are alive."""
    if not inspect(connection).has_table(_Driver.__tablename__):
        return []
    now, rows = _now(connection), connection.execute(select(_Driver.__table__)).all()
    return [_name(row) for row in rows if _is_alive(row, row.renewed, now)]


def _has_several(engine: Engine) -> bool:
    """A study may have several drivers: the database is a server."""
    return engine.dialect.name == "postgresql"


def _now(connection: Connection) -> float:
    """The database's clock, the one that all hosts share, in seconds since 1970."""
    moment: datetime = connection.execute(select(func.now())).scalar_one()
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _is_alive(holder: Any, heard: float, now: float) -> bool:
    """The holder's process runs, as far as that can be seen from here, and has renewed its lease lately.

    A process of this host that drives alone is not succeeded while it lives, however long it was suspended.
    """
    is_recent = bool(now - heard < LEASE_SECONDS)
    if holder.host != gethostname():
        return is_recent
    return bool(_started(holder.pid) == holder.started) and (is_recent or not holder.slot)


def _started(pid: int) -> str | None:
    """Start time of a process in ticks since boot; "" where /proc is missing, None where the process is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name in parentheses may hold spaces; behind it field 0 is the state, field 19 the start time (proc_pid_stat).
    state, *fields = status.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


def _name(holder: Any) -> str:
    return f"process {holder.pid} on {holder.host}"


def _moment(holder: Any) -> str:
    return f"{datetime.fromtimestamp(holder.since, UTC):%Y-%m-%d %H:%M:%S} UTC"
