"""One SQL engine for a study: WAL, probing, masked URLs."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, MetaData, create_engine, event, func, make_url, select, text
from sqlalchemy import Engine as Engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import CreateTable

from dem_opt.errors import InputError

T = TypeVar("T")

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
    try:
        engine = create_engine(parsed, **engine_settings(url))
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


def engine_settings(url: str) -> Mapping[str, Any]:
    """How any engine of a study's database is made: a server's connections are tried before use, and not for ever."""
    if url.startswith("sqlite"):
        return {}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECONDS}}


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


def making_tables(make: Callable[[], T]) -> T:
    """What `make` returns, which makes tables that it does not find: where another process makes the same, again."""
    for pause in _PAUSES:
        try:
            return make()
        except DBAPIError:
            time.sleep(pause)
    return make()


def insert_into(engine: Engine, table: type[DeclarativeBase]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT in the dialect of `engine`, which knows ON CONFLICT."""
    return sqlite.insert(table) if engine.dialect.name == "sqlite" else postgresql.insert(table)


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
