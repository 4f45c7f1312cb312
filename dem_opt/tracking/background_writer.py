"""One thread that writes to a store which may be slow or away."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar, final

from dem_opt.errors import shorten
from dem_opt.storage.engine import masked

T = TypeVar("T")


class Outcomes(Protocol):
    """Receives the outcome of each piece of work, in the writer's thread."""

    def succeeded(self) -> None:
        """Work was done."""

    def failed(self, error: Exception) -> None:
        """Work raised an error."""


@final
class BackgroundWriter:
    """Work that is done in the order of submission, in one thread; no error reaches the submitter."""

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def submit(self, work: Callable[[], T]) -> "Future[T | None]":
        """Queue work; the future holds its result, or None where it failed."""
        return self._thread.submit(self._run, work)

    def close(self, last: "Future[object]", seconds: float | None = None) -> bool:
        """Wait until `last`, the last work submitted, is done, and end the thread.

        Args:
            last: Future of the last work submitted.
            seconds: Time to wait; what has not begun by then is dropped.  None waits for ever.

        Returns:
            Whether everything was done in time.
        """
        wait([last], seconds)
        self._thread.shutdown(wait=False, cancel_futures=True)
        return last.done()

    def _run(self, work: Callable[[], T]) -> T | None:
        try:
            result = work()
        except Exception as error:  # MLflow raises errors of its database, of HTTP, of files; none may end a study
            self._outcomes.failed(error)
            return None
        self._outcomes.succeeded()
        return result


def reason_of(error: BaseException) -> str:
    """The first line of an error with its class, without passwords."""
    return shorten(masked(f"{type(error).__name__}: {error}".splitlines()[0]), 500)
