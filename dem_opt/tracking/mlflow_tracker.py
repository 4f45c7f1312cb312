"""Log studies in MLflow: a run for every trial, the winner as a registered model."""

from collections.abc import Callable, Mapping
from contextlib import closing
from math import inf
from pathlib import Path
from threading import Semaphore
from time import monotonic
from typing import final

from dem_opt.storage.engine import is_there, masked
from dem_opt.tracking.background_writer import BackgroundWriter, reason_of
from dem_opt.tracking.mlflow_client import MlflowStore
from dem_opt.tracking.mlflow_jobs import MlflowJobTracker
from dem_opt.tracking.mlflow_runs import MlflowRuns
from dem_opt.tracking.protocols import PageListener, Peers, Records, SearchInfo, StudyDescription
from dem_opt.tracking.urls import is_server
from dem_opt.types import TrialRecord

QUEUE = 1000
"""Trials that may wait to be logged; those beyond are left to the next run's `reconcile`."""

REST = 10.0
"""Seconds to skip logging after a failure: each attempt to reach a server that is away takes seconds."""


@final
class MlflowTracker:
    """Logs studies in an MLflow store.

    All of MLflow, its import included, runs in threads of its own.

    Args:
        store: Where runs are written.
        close_seconds: Time that closing a search's log waits for what is still queued.
        on_pages: Receives the URLs of logged trials.  A failure there costs one warning.
    """

    def __init__(
        self, store: MlflowStore, *, close_seconds: float = 180.0, on_pages: PageListener | None = None
    ) -> None:
        self._store, self._close_seconds, self._on_pages = store, close_seconds, on_pages

    def open_search(self, search: SearchInfo, peers: Peers, warn: Callable[[str], None]) -> "MlflowSearchTracker":
        """Begin or continue the log of a search: one parent run, a child run for each trial."""
        return MlflowSearchTracker(
            self._store, search, peers=peers, warn=warn, close_seconds=self._close_seconds, on_pages=self._on_pages
        )

    def open_jobs(self, warn: Callable[[str], None]) -> MlflowJobTracker:
        """Begin a log of fine-tunings, mixtures and task scores, each a run."""
        return MlflowJobTracker(self._store, warn)

    def mark_reset(self, is_removed: Callable[[str], bool], warn: Callable[[str], None]) -> None:
        """Tag the parent runs of searches whose trials were removed with `dem_opt.reset`; a failure costs a warning."""
        if is_server(self._store.uri) or is_there(self._store.uri):
            with closing(MlflowJobTracker(self._store, warn)) as jobs:
                jobs.mark_reset(is_removed)


@final
class MlflowSearchTracker:
    """The log of a search in MLflow.

    A failure costs one warning for each outage; the next `reconcile` logs what is missing.
    """

    def __init__(
        self,
        store: MlflowStore,
        search: SearchInfo,
        *,
        peers: Peers,
        warn: Callable[[str], None],
        close_seconds: float,
        on_pages: PageListener | None,
    ) -> None:
        self._store, self._search, self._peers = store, search, peers
        self._on_pages, self._close_seconds = on_pages, close_seconds
        self._name, self._warn = f"MLflow at {masked(store.uri)}", warn
        self._runs: MlflowRuns | None = None
        self._is_away = self._warned_of_queue = self._warned_of_pages = self._lacks_trials = False
        self._failed_at = -inf
        self._queue = Semaphore(QUEUE)
        self._writer = BackgroundWriter(self)
        self._writer.submit(self._connected)

    def trial_ended(self, record: TrialRecord) -> None:
        """Queue the trial's run.  Where the queue is full the trial is left out, with one warning."""
        if self._queue.acquire(blocking=False):
            self._writer.submit(lambda: self._log(record))
            return
        self._lacks_trials = True
        if not self._warned_of_queue:
            self._warned_of_queue = True
            self._warn(f"{self._name} is too slow; the study goes on, the next run logs what is missing")

    def reconcile(self, records: Records) -> None:
        """Queue the runs that MLflow lacks, and the end of those that were only begun."""
        self._writer.submit(lambda: self._log_all(records))

    def describe(self, description: StudyDescription) -> None:
        """Queue the description."""
        self._writer.submit(lambda: self._connected().describe(description))

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Register a checkpoint folder under the model's name, with the alias "champion", and wait for it.

        A folder of the same content is registered once: its first version becomes the champion again.
        """
        return self._writer.submit(lambda: self._connected().register(folder, metrics, tags)).result()

    def close(self) -> bool:
        """Wait for the queue, and end the parent run unless another driver goes on."""
        in_time = self._writer.close(self._writer.submit(self._end), self._close_seconds)
        if not in_time:
            self._warn(f"{self._name} is too slow; the next run logs what is missing")
        return in_time and not self._lacks_trials

    def succeeded(self) -> None:
        """Note that an outage is over once MLflow is reached again."""
        self._is_away &= self._runs is None

    def failed(self, error: Exception) -> None:
        """Warn of the first failure of an outage, and connect again at the next attempt."""
        if not self._is_away:
            self._warn(
                f"{self._name} failed ({reason_of(error)}); the study goes on, the next run logs what is missing"
            )
        self._is_away, self._lacks_trials, self._runs, self._failed_at = True, True, None, monotonic()

    def _connected(self) -> MlflowRuns:
        if self._runs is None:
            self._runs = MlflowRuns(self._store, self._search, self._peers)
        return self._runs

    def _log_all(self, records: Records) -> None:
        runs = self._connected()
        runs.log_all(records)
        self._lacks_trials = False
        self._report_pages(runs.links(), runs.page)

    def _log(self, record: TrialRecord) -> None:
        try:
            if monotonic() - self._failed_at > REST:
                runs = self._connected()
                runs.log(record)
                self._report_pages(runs.links([record.number]), runs.page)
            else:
                self._lacks_trials = True
        finally:
            self._queue.release()

    def _report_pages(self, pages: Mapping[int, str], page: str) -> None:
        """Report URLs; the listener's first failure is a warning, and no failure of MLflow."""
        if self._on_pages is None:
            return
        try:
            self._on_pages(self._search.study, pages, page)
        except Exception as error:  # the listener writes to a database of its own; its faults must not end logging
            if not self._warned_of_pages:
                self._warned_of_pages = True
                self._warn(
                    f"links to MLflow could not be written ({reason_of(error.__cause__ or error)}); retried later"
                )

    def _end(self) -> None:
        if self._runs is not None and not self._peers.any_alive():
            self._runs.end()
