"""The SQL engine of a study's database: connecting, SQLite's settings, creating tables, URLs without passwords."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    MetaData,
    Select,
    String,
    TableClause,
    create_engine,
    event,
    func,
    inspect,
    literal,
    make_url,
    select,
    table,
    text,
    update,
)
from sqlalchemy import Engine as Engine
from sqlalchemy import column as table_column
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import CreateTable

from dem_opt.errors import InputError

T = TypeVar("T")

_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")
IDLE_SECONDS = 60
"""Seconds after which PostgreSQL ends a transaction whose driver is silent: it was suspended, or is cut off."""

BUSY_SECONDS = 2.0
"""Seconds that SQLite waits by itself for another program's lock; then `retry` waits, and says so."""

_SQLITE = f"""
    PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}
    PRAGMA journal_mode = WAL
    PRAGMA synchronous = NORMAL
    PRAGMA foreign_keys = ON
"""
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds between two attempts at what another process may be in the middle of."""

_CONNECT_SECONDS = 5
_KEEPALIVE = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 60_000}
"""libpq's settings by which a server that has vanished is noticed within a minute, not in two hours."""

_CREATING = 0x64656D
"""Key of PostgreSQL's advisory lock under which tables are created, shared with drivers of earlier releases."""

_PASSWORD = re.compile(r"(?<=://)([^/:@]*):.*(?=@)")
_SECRET = re.compile(r"(?<=[?&])((?:\w*password|passwd|pwd|token|secret)=)[^&#]*", re.IGNORECASE)


def connect(url: str, field: str = "storage") -> Engine:
    """An engine for the database at `url`, which has been reached and can be written.

    `sqlite:///PATH` gets its parent folder made and what `tune` sets; `postgresql+psycopg://...` checks
    pooled connections before use.

    Raises:
        InputError: The URL is malformed or of an unknown kind, a folder or file can't be written, the file is not a
            database, or the server does not answer within 5 seconds.  Names `field` and the masked URL.
        OperationalError: Another program has locked the SQLite file; `retry.connect_patiently` waits for it.
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
        if _is_locked(error):
            raise
        kind = "file can't be used as a database" if local else "server does not answer"
        raise InputError(None, field, masked(url), f"the {kind} ({_reason(error, parsed)})") from None
    return engine


def engine_settings(url: str) -> Mapping[str, Any]:
    """Arguments of `create_engine`: how long to wait; a server's pooled connections are checked before use."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECONDS, **_KEEPALIVE}}


def is_there(url: str) -> bool:
    """There is a database to connect to: for SQLite the file exists; for a server always true."""
    file = sqlite_file(url)
    return file is None or file.is_file()


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database, None for the URL of a server."""
    if not url.startswith("sqlite"):
        return None
    return Path(str(_parse(url, "storage").database))


@contextmanager
def reading(file: Path) -> Iterator[Engine | None]:
    """Open an SQLite file to read it; None where that can't be done now."""
    engine = create_engine(URL.create("sqlite", database=file.absolute().as_uri(), query={"mode": "ro", "uri": "true"}))
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT name FROM sqlite_master")).close()
    except DBAPIError:
        engine.dispose()
        yield None
        return
    try:
        yield engine
    finally:
        engine.dispose()


def look_up(engine: Engine, name: str, wanted: str, where: str, value: str) -> Any:
    """The value of the column `wanted` in the row of a table where another column has a value; None without one."""
    if not inspect(engine).has_table(name):
        return None
    query: Select[Any] = select(table_column(wanted)).select_from(table(name)).where(table_column(where) == value)
    with engine.connect() as connection:
        return connection.scalar(query)


def replace_beginnings(engine: Engine, columns: Mapping[str, Sequence[str]], old: str, new: str) -> int:
    """Replace a folder at the beginning of the paths or URIs in a database, all or none.

    Args:
        engine: The database.
        columns: Names of columns by table; tables and columns that are not there are passed over.
        old: The folder, without a slash at its end.
        new: What stands in its place.

    Returns:
        The number of values changed.
    """
    inspector, changed = inspect(engine), 0
    with engine.begin() as connection:
        for name, wanted in columns.items():
            present = inspector.has_table(name) and {column["name"] for column in inspector.get_columns(name)}
            for column in (table_column(known, String) for known in wanted if present and known in present):
                beginning = func.substr(column, 1, len(old) + 1)
                moved = literal(new) + func.substr(column, len(old) + 1)
                change = update(table(name, column)).where(beginning.in_([old, f"{old}/"])).values({column: moved})
                changed += connection.execute(change).rowcount
    return changed


def probe(url: str, field: str = "storage") -> str:
    """Tell in a few words what `connect` would find, without making or writing a file.

    Raises:
        InputError: As `connect` does, where that is certain: the server does not answer, the file is no database or
            can't be written, or its folder can't be made.
    """
    parsed = _parse(url, field)
    if parsed.get_backend_name() != "sqlite":
        connect(url, field).dispose()
        return "the server answers"
    _refuse_nameless(parsed, field)
    file = Path(str(parsed.database)).absolute()
    existing = next(path for path in (file, *file.parents) if path.exists())
    if reason := _obstacle(file, existing):
        raise InputError(None, field, masked(url), reason)
    return "is there" if existing == file else "will be made"


def _obstacle(file: Path, existing: Path) -> str | None:
    """The reason why no database can be at `file`, or None; `existing`: the file or its nearest existing parent."""
    if existing != file and not existing.is_dir():
        return f"can't make {file.parent} ({existing} is a file)"
    if existing == file and not (file.is_file() and _is_sqlite(file)):
        return "the file can't be used as a database (it is not one)"
    return None if os.access(existing, os.W_OK) else f"{existing} can't be written"


def _is_sqlite(file: Path) -> bool:
    """The file begins as SQLite's do, or is empty."""
    with file.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


def tune(engine: Engine) -> None:
    """Set up every connection of `engine`, those that it has included.

    SQLite gets WAL, synchronous=NORMAL, foreign keys and a busy timeout.  PostgreSQL is to end transactions in which it
    hears nothing: those of a suspended driver would keep all others waiting.
    """
    event.listen(engine, "connect", _set_pragmas if engine.dialect.name == "sqlite" else _limit_silence)
    engine.dispose()


def masked(url: str) -> str:
    """`url` with *** for the password, whether it stands before the host or in the query."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***", url))


@contextmanager
def exclusive(engine: Engine) -> Iterator[Connection]:
    """A transaction that waits for any other of its kind, of this or an earlier release."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text("BEGIN IMMEDIATE"))
        _wait_for_others(connection)
        yield connection


def _wait_for_others(connection: Connection) -> None:
    """Take PostgreSQL's lock for changes of tables, until the end of the transaction."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_CREATING)))


def create_missing(engine: Engine, metadata: MetaData) -> None:
    """Create the tables that are missing; several processes may do so at once."""
    with engine.begin() as connection:
        _wait_for_others(connection)
        for table in metadata.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))


def making_tables(make: Callable[[], T]) -> T:
    """Call `make`, which creates missing tables, again while another process creates the same ones."""
    for pause in _PAUSES:
        began = time.monotonic()
        try:
            return make()
        except DBAPIError as error:
            if _is_locked(error) and time.monotonic() - began > BUSY_SECONDS:
                raise  # by a program that does something else
            time.sleep(pause)
    return make()


def insert_into(
    engine: Engine | Connection, table: type[DeclarativeBase] | TableClause
) -> sqlite.Insert | postgresql.Insert:
    """An INSERT in the dialect of a database, which has ON CONFLICT."""
    return sqlite.insert(table) if engine.dialect.name == "sqlite" else postgresql.insert(table)


def _parse(url: str, field: str) -> URL:
    """Parse a URL; InputError for malformed ones and for kinds of databases that are not supported."""
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
    """Make the folder of an SQLite file."""
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


def _limit_silence(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    connection.commit()


def _is_locked(error: DBAPIError) -> bool:
    """Another program holds a lock on an SQLite file."""
    return isinstance(error, OperationalError) and "locked" in str(error.orig)


def _probe(engine: Engine) -> None:
    """Connect once, and take SQLite's write lock.

    SQLite's busy timeout does not cover the switch to WAL when several processes open a new file at once, so
    "database is locked" is answered by growing pauses here, for as long as SQLite would wait itself.
    """
    began = time.monotonic()
    for pause in (*_PAUSES, None):
        try:
            with engine.connect() as connection:
                connection.execute(text("BEGIN IMMEDIATE" if engine.dialect.name == "sqlite" else "SELECT 1"))
                connection.rollback()
            return
        except OperationalError as error:
            if pause is None or not _is_locked(error) or time.monotonic() - began > BUSY_SECONDS:
                raise
            time.sleep(pause)


def _reason(error: DBAPIError, url: URL) -> str:
    """The driver's own first line, without the password."""
    first = next(iter(str(error.orig).splitlines()), "no reason given")
    return first.replace(str(url.password), "***") if url.password else first
