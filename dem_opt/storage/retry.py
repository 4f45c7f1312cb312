"""Waiting for a database that is away: what counts as that, for how long, and what is said meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from time import monotonic, sleep
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from dem_opt.errors import OutageError, shorten
from dem_opt.progress import NullProgress, Progress
from dem_opt.storage.engine import masked

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between two attempts: each pause is twice the one before."""

READ_ONLY = "25006"
"""The SQL state of PostgreSQL's refusal to write, in recovery or by setting."""

_BUGS = ("no such table", "no such column", "syntax error")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a study waits for its database, and whom it tells.

    what     the database in words, without its password
    seconds  at most so long for one piece of work
    progress gets a note when the waiting begins, for each new reason, and when it ends
    """

    what: str = "the database"
    seconds: float = 0.0
    progress: Progress = field(default_factory=NullProgress)

    def __call__(self, work: Callable[[], "T"]) -> "T":
        """What the work returns; it is done again, after growing pauses, where the database was away.

        So it has to be safe to repeat.  Raises OutageError when the time is up.
        """
        began, pause, told = monotonic(), FIRST_PAUSE, set[str]()
        while True:
            try:
                result = work()
            except Exception as error:
                if (reason := outage(error)) is None:
                    raise
                left = self.seconds - (monotonic() - began)
                if left <= 0:
                    waited = f"; it was waited for for {self.seconds:g} s" if told else ""
                    raise OutageError(f"{self.what} can't be used ({reason}){waited}") from None
                if reason not in told:
                    self.progress.note(f"waiting for {self.what} ({reason}), for at most {left:.0f} s")
                told.add(reason)
                sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if told:
                    self.progress.note(f"{self.what} is back after {monotonic() - began:.0f} s")
                return result


NO_RETRY = RetryPolicy()
"""Gives up at once."""


def outage(error: BaseException) -> str | None:
    """The reason, in the driver's own words, where an error says that the database can't be used now; else None.

    Optuna wraps what SQLAlchemy raises; the cause is looked for in the chain.  It also tries some queries again on a
    connection that is gone, which SQLAlchemy refuses before anything of the transaction is undone.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, PoolTimeoutError):
            return "no free connection"
        if isinstance(found, PendingRollbackError):
            return "its connection was lost"
        if isinstance(found, DBAPIError) and _is_outage(found):
            first = next(iter(str(found.orig).splitlines()), "no reason given")
            return shorten(masked(first), 200)
        found = found.__cause__
    return None


def _is_outage(error: DBAPIError) -> bool:
    if error.connection_invalidated or isinstance(error, InterfaceError):
        return True
    if isinstance(error, OperationalError):
        return not any(words in str(error.orig) for words in _BUGS)
    return getattr(error.orig, "sqlstate", None) == READ_ONLY


class _Patient(Protocol):
    """Has patience."""

    patience: RetryPolicy


T = TypeVar("T")
Self = TypeVar("Self", bound=_Patient)
P = ParamSpec("P")


def patient(method: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], T]:
    """A method that is done again where the database was away, with its object's patience."""

    @wraps(method)
    def waiting(self: Self, *arguments: P.args, **named: P.kwargs) -> T:
        return self.patience(lambda: method(self, *arguments, **named))

    return waiting  # type: ignore[return-value]  # wraps makes self positional
