"""MLflow: a run for every trial, the winner as a registered model."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from math import inf
from pathlib import Path
from threading import Semaphore
from time import monotonic
from typing import NamedTuple, Protocol, TypeVar, final

from dem_opt.errors import shorten
from dem_opt.storage.engine import masked
from dem_opt.tracking.study_runs import CHAMPION, Alone, MlflowRuns, Place, Records, StudyDescription
from dem_opt.types import TrialRecord

__all__ = ["CHAMPION", "Drivers", "MlflowTracker", "Place", "Records", "StudyDescription", "Tracker"]

T = TypeVar("T")

QUEUE = 1000
"""Trials that wait to be written at most; what comes then is left to the next run's `reconcile`."""

REST = 10.0
"""Seconds after a failure in which trials are let be: each attempt to reach a server that is away takes seconds."""

Board = Callable[[str, Mapping[int, str], str], None]
"""Is told of an Optuna study's pages in MLflow: those of trials by number, and its own; from the tracker's thread."""


class Drivers(NamedTuple):
    """The other drivers of a tracker's study.

    alone   a context that keeps what they might do at the same time from being done twice
    others  whether there are any now
    """

    alone: Alone = nullcontext
    others: Callable[[], bool] = bool


NO_OTHERS = Drivers()
"""Where a study has one driver."""


class Tracker(Protocol):
    """Who writes a study down for people to look at.  None of it may fail a study."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial was told.  Returns at once."""

    def reconcile(self, records: Records) -> None:
        """Writes down what is missing of these trials, each exactly once.  Returns at once."""

    def describe(self, study_description: StudyDescription) -> None:
        """Writes down what is known of the study beside its trials.  Returns at once."""

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Registers a checkpoint folder as the champion; its version, or None where that failed."""

    def close(self) -> bool:
        """Waits for what is still to be written, but not for ever; whether all was."""


@final
class MlflowTracker:
    """A study in MLflow: one parent run, a child run for each trial, the winner as a registered model.

    All of MLflow, its import included, happens in one thread of its own.  Whatever fails there becomes one
    warning for each outage; the next `reconcile` logs what is missing.

    warn   is called with one line, from the thread
    board  is told where trials have their pages; where it fails, the study goes on, with one warning
    """

    def __init__(
        self, place: Place, warn: Callable[[str], None], drivers: Drivers = NO_OTHERS, board: Board | None = None
    ) -> None:
        self._board, self._study, self._drivers = board, place.study, drivers
        self._open = partial(MlflowRuns, place, drivers.alone)
        self._patience = place.patience
        self._name, self._warn = f"MLflow at {masked(place.uri)}", warn
        self._runs: MlflowRuns | None = None
        self._out = self._is_behind = self._lacks = self._is_unlinked = False
        self._failed = -inf
        self._room = Semaphore(QUEUE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._submit(self._opened)

    def trial_ended(self, record: TrialRecord) -> None:
        """Queues the trial's run; where the queue is full, lets it be, with one warning."""
        if self._room.acquire(blocking=False):
            self._submit(lambda: self._log(record))
            return
        self._lacks = True
        if not self._is_behind:
            self._is_behind = True
            self._warn(f"{self._name} is too slow; the study goes on, the next run logs what is missing")

    def reconcile(self, records: Records) -> None:
        """Queues the runs that MLflow lacks, and the end of those that were begun only."""
        self._submit(lambda: self._log_all(records))

    def describe(self, study_description: StudyDescription) -> None:
        """Queues it."""
        self._submit(lambda: self._opened().describe(study_description))

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Registers a checkpoint folder under the model's name, with the alias "champion".

        Waits for it.  A folder of the same content is registered once: its first version becomes the champion
        again.  None where MLflow failed.
        """
        return self._submit(lambda: self._opened().register(folder, metrics, tags)).result()

    def close(self) -> bool:
        """Waits for the queue, but not for ever, and ends the parent run unless another driver goes on."""
        ended = self._submit(self._end)
        wait([ended], self._patience)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if not ended.done():
            self._warn(f"{self._name} is too slow; the next run logs what is missing")
        return ended.done() and not self._lacks

    def _submit(self, job: Callable[[], T]) -> "Future[T | None]":
        """Queues a job and a report on it: what the job returned, or None where it failed."""
        return self._thread.submit(self._report, self._thread.submit(job))

    def _report(self, done: "Future[T]") -> T | None:
        """Warns of the first failure of an outage, which lasts until MLflow is reached again."""
        error = done.exception()
        if error is None:
            self._out &= self._runs is None
            return done.result()
        if not self._out:
            reason = shorten(masked(f"{type(error).__name__}: {error}".splitlines()[0]), 300)
            self._warn(f"{self._name} failed ({reason}); the study goes on, the next run logs what is missing")
        self._out, self._lacks, self._runs, self._failed = True, True, None, monotonic()
        return None

    def _log_all(self, records: Records) -> None:
        runs = self._opened()
        runs.log_all(records)
        self._lacks = False
        self._link(runs.links(), runs.page)

    def _log(self, record: TrialRecord) -> None:
        try:
            if monotonic() - self._failed > REST:
                runs = self._opened()
                runs.log(record)
                self._link(runs.links([record.number]), runs.page)
            else:
                self._lacks = True
        finally:
            self._room.release()

    def _link(self, pages: Mapping[int, str], page: str) -> None:
        """Tells the board, which never fails a study, nor MLflow's log of it.  Its first failure is a warning."""
        if self._board is None:
            return
        try:
            self._board(self._study, pages, page)
        except Exception as error:
            if not self._is_unlinked:
                self._is_unlinked = True
                cause = error.__cause__ or error
                reason = shorten(masked(f"{type(cause).__name__}: {cause}".splitlines()[0]), 300)
                self._warn(f"links to MLflow could not be written ({reason}); they are made up for later")

    def _opened(self) -> MlflowRuns:
        if self._runs is None:
            self._runs = self._open()
        return self._runs

    def _end(self) -> None:
        if self._runs is not None and not self._drivers.others():
            self._runs.end()
