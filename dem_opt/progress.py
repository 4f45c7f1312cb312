"""Progress of long work as typed events: phases, finished trials, warnings and notes.

Workflows take a `Progress` as an argument.  Code far below them, which hashes or reads a checkpoint's bytes, reports
to `current_progress()`: `reporting` sets it for a thread, so that these functions need no argument that only such
reports use.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, final

from dem_opt.types import TrialRecord


class Phase(Protocol):
    """Work that has begun."""

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Report that `amount` more of the work is done; `detail` is how it stands, such as the training loss."""


class Progress(Protocol):
    """Receives the events of long work.  Events may come from several threads."""

    def phase(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """Begin work that ends with the context.

        Args:
            name: The work, for people: "hashing base".
            total: The amount of work, or None where it cannot be counted.
            unit: The unit of `total` and of `Phase.advance`, in the plural: "bytes", "tensors".
        """

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        """Report the trials that a search has from earlier, at least one; its other trials follow."""

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Report a finished trial; `done` of `planned` trials of its run are finished now."""

    def time_left(self, seconds: float) -> None:
        """Report the seconds that all searches of the command and its final table will take, by their costs so far."""

    def warning(self, message: str) -> None:
        """Report a problem that the work survives."""

    def note(self, message: str) -> None:
        """Report a fact worth a line."""


@final
class NullPhase:
    """A phase that reports nothing."""

    def __enter__(self) -> "NullPhase":
        return self

    def __exit__(self, *exception: object) -> None:
        """Report nothing."""

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Report nothing."""


class NullProgress:
    """Progress that reports nothing."""

    def phase(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """Begin work that reports nothing."""
        return NullPhase()

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        """Report nothing."""

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Report nothing."""

    def time_left(self, seconds: float) -> None:
        """Report nothing."""

    def warning(self, message: str) -> None:
        """Report nothing."""

    def note(self, message: str) -> None:
        """Report nothing."""


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


def current_progress() -> Progress:
    """The progress that `reporting` set in this thread; `NullProgress` where none is set."""
    return _current.get() or NullProgress()


@contextmanager
def reporting(progress: Progress) -> Iterator[None]:
    """Make `progress` the current one of this thread while the context is open."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
