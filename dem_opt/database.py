"""One SQL engine for a study: WAL, probing, backoff, leases, masked URLs."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    URL,
    Connection,
    MetaData,
    create_engine,
    delete,
    event,
    func,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy import Engine as Engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable

from dem_opt.errors import InputError

SILENCE = 60.0
"""Seconds after which a driver on another host that has not renewed its lease counts as gone."""

_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")
_SQLITE = """
    PRAGMA busy_timeout = 30000
    PRAGMA journal_mode = WAL
    PRAGMA synchronous = NORMAL
    PRAGMA foreign_keys = ON
"""
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_CONNECT_SECONDS = 5
_CREATING = 0x64656D
_PASSWORD = re.compile(r"(?<=://)([^/:@]*):.*(?=@)")
_SECRET = re.compile(r"(?<=[?&])((?:\w*password|passwd|pwd|token|secret)=)[^&#]*", re.IGNORECASE)


def connect(url: str, field: str = "storage") -> Engine:
    """An engine for the database at `url`, which has been reached and can be written.

    `sqlite:///PATH` gets its parent folder made and what `tune` sets; `postgresql+psycopg://...` checks
    pooled connections before use.  Raises InputError naming `field` and the masked URL for a URL that is
    malformed or of an unknown kind, a folder or file that can't be written, a file that is not a database,
    and a server that does not answer within 5 seconds.
    """
    parsed = _parse(url, field)
    local = parsed.get_backend_name() == "sqlite"
    if local:
        _make_folder(parsed, field)
    patience = {} if local else {"connect_timeout": _CONNECT_SECONDS}
    try:
        engine = create_engine(parsed, pool_pre_ping=not local, connect_args=patience)
    except ImportError as error:
        raise InputError(None, field, masked(url), f"its driver is not installed ({error.name})") from None
    tune(engine)
    try:
        _probe(engine)
    except DBAPIError as error:
        engine.dispose()
        kind = "file can't be used as a database" if local else "server does not answer"
        raise InputError(None, field, masked(url), f"the {kind} ({_reason(error, parsed)})") from None
    return engine


def is_there(url: str) -> bool:
    """Whether there is a database to connect to: a file for SQLite; a server answers for itself."""
    parsed = _parse(url, "storage")
    return parsed.get_backend_name() != "sqlite" or Path(str(parsed.database)).is_file()


def probe(url: str, field: str = "storage") -> str:
    """What `connect` would find, in a few words; writes nothing, makes no file.

    Raises InputError as `connect` does where that is certain: a server that does not answer, a file that is no
    database or that can't be written, a folder that can't be made.
    """
    parsed = _parse(url, field)
    if parsed.get_backend_name() != "sqlite":
        connect(url, field).dispose()
        return "the server answers"
    _refuse_nameless(parsed, field)
    file = Path(str(parsed.database)).absolute()
    place = next(one for one in (file, *file.parents) if one.exists())
    if reason := _hindrance(file, place):
        raise InputError(None, field, masked(url), reason)
    return "is there" if place == file else "will be made"


def _hindrance(file: Path, place: Path) -> str | None:
    """Why no database can be at `file`, of which `place` is the part that exists; None where it can."""
    if place != file and not place.is_dir():
        return f"can't make {file.parent} ({place} is a file)"
    if place == file and not (file.is_file() and _is_sqlite(file)):
        return "the file can't be used as a database (it is not one)"
    return None if os.access(place, os.W_OK) else f"{place} can't be written"


def _is_sqlite(file: Path) -> bool:
    """Whether a file begins as SQLite's do, or is empty."""
    with file.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


def tune(engine: Engine) -> None:
    """Gives every SQLite connection of `engine` WAL, synchronous=NORMAL, foreign keys, 30 s of patience."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
        engine.dispose()


def masked(url: str) -> str:
    """`url` with *** for the password, whether it stands before the host or in the query."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***", url))


def create_missing(engine: Engine, metadata: MetaData) -> None:
    """Creates the tables that are not there yet; several processes may do so at once."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_CREATING)))
        for table in metadata.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))


def insert_into(engine: Engine, table: type[DeclarativeBase]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT in the dialect of `engine`, which knows ON CONFLICT."""
    return sqlite.insert(table) if engine.dialect.name == "sqlite" else postgresql.insert(table)


class _Tables(DeclarativeBase):
    """The lease's table."""


class _Holder(_Tables):
    """Who drives a study.  `started` tells a process from a later one of the same number."""

    __tablename__ = "dem_lease"

    study: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    started: Mapped[str]
    since: Mapped[float]
    renewed: Mapped[float]


class Lease:
    """The right to drive one study, held by one process at a time."""

    def __init__(self, engine: Engine, study: str) -> None:
        self._engine, self._study, self._token = engine, study, uuid4().hex

    def renew(self) -> None:
        """Says that this driver is alive; raises InputError where another driver has taken the study over."""
        with self._engine.begin() as connection:
            statement = update(_Holder).where(*self._mine).values(renewed=_now(connection))
            if connection.execute(statement).rowcount == 0:
                raise InputError(None, "study", self._study, "another driver has taken the study over")

    @property
    def _mine(self) -> tuple[Any, ...]:
        return _Holder.study == self._study, _Holder.token == self._token

    def _take(self) -> None:
        """Takes the lease, or raises InputError; looks again where somebody was quicker."""
        while not self._attempt():
            pass

    def _attempt(self) -> bool:
        """Whether the lease was taken from nobody, or from the very holder who was seen to be gone."""
        with self._engine.begin() as connection:
            now = _now(connection)
            this = _Holder.study == self._study
            seen = connection.execute(select(_Holder.__table__).where(this)).one_or_none()
            if seen is None:
                fresh = insert_into(self._engine, _Holder).values(study=self._study, **self._me(now))
                counted = fresh.on_conflict_do_nothing().execution_options(preserve_rowcount=True)
                return connection.execute(counted).rowcount == 1
            if _is_alive(seen, now):
                raise InputError(None, "study", self._study, _held_by(seen))
            same = (this, _Holder.token == seen.token, _Holder.renewed == seen.renewed)
            return connection.execute(update(_Holder).where(*same).values(self._me(now))).rowcount == 1

    def _me(self, now: float) -> dict[str, Any]:
        pid = os.getpid()
        process = {"host": gethostname(), "pid": pid, "started": _started(pid) or ""}
        return {"token": self._token, "since": now, "renewed": now, **process}

    def _beat(self, ended: Event) -> None:
        """Renews now and then.  That the lease is lost, the driver learns from its own renewal."""
        while not ended.wait(SILENCE / 4):
            with suppress(InputError, DBAPIError):
                self.renew()

    def _release(self) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(_Holder).where(*self._mine))


@contextmanager
def holding(engine: Engine, study: str) -> Iterator[Lease]:
    """Holds the lease of `study`: one driver at a time.

    A thread renews it while it is held.  A holder on this host whose process is gone is succeeded at once,
    one on another host after 60 seconds without a renewal.  Raises InputError, which says who and since when,
    where the holder is alive.
    """
    create_missing(engine, _Tables.metadata)
    lease = Lease(engine, study)
    lease._take()
    ended = Event()
    beating = Thread(target=lease._beat, args=[ended], daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        ended.set()
        beating.join()
        lease._release()


def _parse(url: str, field: str) -> URL:
    """The parts of a URL of a kind that is supported."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InputError(None, field, masked(url), "not a database URL; sqlite:///PATH is one") from None
    if parsed.drivername not in _DRIVERS:
        kinds = "sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
        raise InputError(None, field, masked(url), f"unknown kind of database; write {kinds}")
    if "{" in url or "}" in url:
        raise InputError(None, field, masked(url), "no braces, please; in a password write %7B and %7D")
    return parsed


def _make_folder(url: URL, field: str) -> None:
    """The folder of an SQLite file."""
    _refuse_nameless(url, field)
    shown = masked(str(url))
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(None, field, shown, f"can't make {folder} ({error.strerror})") from None


def _refuse_nameless(url: URL, field: str) -> None:
    """Raise InputError for a database in memory: it could not be resumed."""
    if url.database in (None, "", ":memory:"):
        raise InputError(None, field, masked(str(url)), "names no file; write sqlite:///PATH")


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in _SQLITE.strip().splitlines():
        connection.execute(pragma).close()


def _probe(engine: Engine) -> None:
    """Connects once; SQLite is also asked for its write lock.

    SQLite's own patience does not cover the switch to WAL when several processes open a new file at once, so
    "database is locked" is met by trying again after growing pauses.
    """
    for pause in (*_PAUSES, None):
        try:
            with engine.connect() as connection:
                connection.execute(text("BEGIN IMMEDIATE" if engine.dialect.name == "sqlite" else "SELECT 1"))
                connection.rollback()
            return
        except OperationalError as error:
            if pause is None or "locked" not in str(error.orig):
                raise
            time.sleep(pause)


def _reason(error: DBAPIError, url: URL) -> str:
    """The driver's own first line, without the password."""
    first = next(iter(str(error.orig).splitlines()), "no reason given")
    return first.replace(str(url.password), "***") if url.password else first


def _now(connection: Connection) -> float:
    """The database's clock, the one that all hosts share, in seconds since 1970."""
    moment: datetime = connection.execute(select(func.now())).scalar_one()
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _is_alive(holder: Any, now: float) -> bool:
    if holder.host == gethostname():
        return bool(_started(holder.pid) == holder.started)
    return bool(now - holder.renewed < SILENCE)


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; "" where nothing says so, None where it is gone."""
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
    state, *fields = status.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


def _held_by(holder: Any) -> str:
    since = datetime.fromtimestamp(holder.since, UTC)
    return (
        f"process {holder.pid} on {holder.host} has been driving it since {since:%Y-%m-%d %H:%M:%S} UTC; "
        "wait for it, or stop it"
    )
