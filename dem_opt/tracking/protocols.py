"""The protocols of a tracker, and the records that it is given."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dem_opt.types import ResultRow, TrialRecord

Records = Mapping[int, Callable[[], TrialRecord]]
"""Finished trials by number; a record is made only where the tracker lacks it."""

PageListener = Callable[[str, Mapping[int, str], str], None]
"""Receives the name of a search, the URLs of its trials by number, and its own URL.

Called from the tracker's thread.
"""


@dataclass(frozen=True, kw_only=True)
class SearchInfo:
    """A search as a tracker shows it.

    Attributes:
        model: Name under which the winner is registered.
        study: Name of the Optuna study.
        uid: Unique identity of the Optuna study; together with the name it finds the logged search again.
        parameters: Settings of the study.  The first value that was logged of each is kept.
        trial_page: Maps a trial's number to its page in Optuna Dashboard.
        page: The search's page in Optuna Dashboard.
    """

    model: str
    study: str
    uid: str
    parameters: Mapping[str, str]
    trial_page: Callable[[int], str] | None = None
    page: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A corpus of one split: the file that it was cut from, the hash of its windows and their number."""

    name: str
    split: str
    source: str
    digest: str
    windows: int


@dataclass(frozen=True, kw_only=True)
class StudyDescription:
    """Facts of a study beside its trials.

    Attributes:
        tags: Tags of the search.
        note: Description in Markdown; empty where there is none.
        data: The corpora that composites are scored on.
        files: Contents of files by path.
        metrics: Metrics of the search as a whole.
        trials: Number of finished trials that the metrics are of.
        baselines: Composites that are logged like trials.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    data: Sequence[DataSource] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    trials: int = 0
    baselines: Sequence[ResultRow] = ()


@dataclass(frozen=True, kw_only=True)
class JobNote:
    """Work that is no trial, as far as it is done: a fine-tuning, a data mixture, scores on tasks.

    Attributes:
        kind: "fine-tuning", "data mixing" or "downstream".
        name: Name for people.
        key: Identity within the kind: notes of the same key are of the same work.
        parameters: Settings of the work.
        metrics: Final metrics.
        curve: Points (metric, value, step).
        status: "RUNNING", "FINISHED" or "FAILED".
    """

    kind: str
    name: str
    key: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[str, float, int], ...] = ()
    status: str = "FINISHED"


class Peers(Protocol):
    """The other drivers of the same study."""

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context that only one driver of the study is in at a time."""

    def any_alive(self) -> bool:
        """Return whether another driver is at work now."""


class NoPeers:
    """The peers of a study that has one driver."""

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()

    def any_alive(self) -> bool:
        """Return False."""
        return False


class SearchTracker(Protocol):
    """The log of one search.  A failure to write costs a warning, never the study."""

    def trial_ended(self, record: TrialRecord) -> None:
        """Log a finished trial.  Returns at once."""

    def reconcile(self, records: Records) -> None:
        """Log those of these trials that are missing, each exactly once.  Returns at once."""

    def describe(self, description: StudyDescription) -> None:
        """Log facts of the study; they replace earlier ones.  Returns at once."""

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Register a checkpoint folder as the champion.

        Returns:
            The version, or None where it could not be registered.
        """

    def close(self) -> bool:
        """Wait, for a limited time, until everything is written.

        Returns:
            Whether everything was written.
        """


class JobTracker(Protocol):
    """The log of work that is no trial.  A failure to write costs a warning, never the work."""

    def write(self, note: JobNote) -> None:
        """Log the work, or what is new of it.  Returns at once."""

    def close(self) -> bool:
        """Wait until everything is written; return whether it was."""


class Tracker(Protocol):
    """A place where studies are logged."""

    def open_search(self, search: SearchInfo, peers: Peers, warn: Callable[[str], None]) -> SearchTracker:
        """Begin or continue the log of a search.

        Args:
            search: The search.
            peers: Other drivers that may log the same search.
            warn: Receives one line for each outage, from any thread.
        """

    def open_jobs(self, warn: Callable[[str], None]) -> JobTracker:
        """Begin a log of work that is no trial; `warn` is as for `open_search`."""

    def mark_reset(self, is_removed: Callable[[str], bool], warn: Callable[[str], None]) -> None:
        """Mark the logs of searches whose trials were removed, and wait for it; nothing is created.

        Args:
            is_removed: Whether a search's `SearchInfo.study` is that of a removed one.
            warn: Receives one line where the place cannot be reached.
        """
