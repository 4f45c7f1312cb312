"""Waiting for a database that is away: which errors count as an outage, how long to retry, what to report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from time import monotonic, sleep
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from dem_opt.errors import OutageError, shorten
from dem_opt.progress import NullProgress, Progress
from dem_opt.storage.engine import Engine, connect, masked

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between two attempts: each pause is twice the one before."""

READ_ONLY = "25006"
"""SQLSTATE of PostgreSQL's refusal to write, in recovery or by setting."""

_BUGS = ("no such table", "no such column", "syntax error")


@dataclass(frozen=True)
class RetryPolicy:
    """Patience of a study with its database.

    Attributes:
        what: The database in words, without its password.
        seconds: Longest time for one call.
        progress: Gets a note when the waiting begins, for each new reason, and when it ends.
    """

    what: str = "the database"
    seconds: float = 0.0
    progress: Progress = field(default_factory=NullProgress)

    def __call__(self, work: Callable[[], "T"]) -> "T":
        """Call `work`, again after growing pauses while the database is away; it must be safe to repeat.

        Raises:
            OutageError: The time is up.
        """
        began, pause, reported = monotonic(), FIRST_PAUSE, set[str]()
        while True:
            try:
                result = work()
            except Exception as error:
                if (reason := outage(error)) is None:
                    raise
                left = self.seconds - (monotonic() - began)
                if left <= 0:
                    waited = f"; gave up after {self.seconds:g} s" if reported else ""
                    raise OutageError(f"{self.what} can't be used ({reason}){waited}") from None
                if reason not in reported:
                    self.progress.note(f"waiting for {self.what} ({reason}), for at most {left:.0f} s")
                reported.add(reason)
                sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if reported:
                    self.progress.note(f"{self.what} is back after {monotonic() - began:.0f} s")
                return result


BRIEF = RetryPolicy(seconds=30.0)
"""Wait without a word for what another program does to the database in passing; the default of readers."""


@contextmanager
def outages_in_words(what: str) -> Iterator[None]:
    """Turn any error that means that the database can't be used now into an OutageError, which is one line."""
    try:
        yield
    except Exception as error:
        if (reason := outage(error)) is None:
            raise
        raise OutageError(f"{what} can't be used ({reason})") from error


@contextmanager
def opened(url: str, patience: RetryPolicy | None = None) -> Iterator[Engine]:
    """Connect to a database, and dispose of the connections at the end.

    Where another program has locked it, the first connection waits as `patience` says, `BRIEF` unless given.

    Raises:
        InputError: As `engine.connect`.
        OutageError: The database can't be used now, for the first connection or in the block.
    """
    patience = patience or replace(BRIEF, what=f"the database {masked(url)}")
    engine = patience(lambda: connect(url))
    try:
        with outages_in_words(patience.what):
            yield engine
    finally:
        engine.dispose()


def outage(error: BaseException) -> str | None:
    """The reason, in the driver's own words, if an error means that the database can't be used now; else None."""
    cause: BaseException | None = error
    while cause is not None:  # Optuna wraps what SQLAlchemy raises
        if isinstance(cause, PoolTimeoutError):
            return "no free connection"
        # Optuna repeats some queries on a lost connection, which SQLAlchemy refuses until the transaction is undone.
        if isinstance(cause, PendingRollbackError):
            return "its connection was lost"
        if isinstance(cause, DBAPIError) and _is_outage(cause):
            first = next(iter(str(cause.orig).splitlines()), "no reason given")
            return shorten(masked(first), 200)
        cause = cause.__cause__
    return None


def _is_outage(error: DBAPIError) -> bool:
    if error.connection_invalidated or isinstance(error, InterfaceError):
        return True
    if isinstance(error, OperationalError):
        return not any(words in str(error.orig) for words in _BUGS)
    return getattr(error.orig, "sqlstate", None) == READ_ONLY


class _Patient(Protocol):
    """An object with a retry policy."""

    patience: RetryPolicy


T = TypeVar("T")
Self = TypeVar("Self", bound=_Patient)
P = ParamSpec("P")


def patient(method: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], T]:
    """Decorate a method to be called again while the database is away, by its object's retry policy."""

    @wraps(method)
    def waiting(self: Self, *arguments: P.args, **named: P.kwargs) -> T:
        return self.patience(lambda: method(self, *arguments, **named))

    return waiting  # type: ignore[return-value]  # wraps makes self positional
