"""A tracker that logs nothing."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self, final

from dem_opt.tracking.protocols import JobNote, Peers, Records, SearchInfo, StudyDescription
from dem_opt.types import TrialRecord


@final
class NullTracker:
    """A tracker that logs nothing, and the log of each search and job.

    Studies with it need no MLflow: `Study.load(path, tracker=NullTracker())`.
    """

    def open_search(self, search: SearchInfo, peers: Peers, warn: Callable[[str], None]) -> Self:
        """Return this tracker."""
        return self

    def open_jobs(self, warn: Callable[[str], None]) -> Self:
        """Return this tracker."""
        return self

    def mark_reset(self, is_removed: Callable[[str], bool], warn: Callable[[str], None]) -> None:
        """Mark nothing."""

    def trial_ended(self, record: TrialRecord) -> None:
        """Log nothing."""

    def reconcile(self, records: Records) -> None:
        """Log nothing."""

    def describe(self, description: StudyDescription) -> None:
        """Log nothing."""

    def write(self, note: JobNote) -> None:
        """Log nothing."""

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Register nothing and return None."""
        return None

    def close(self) -> bool:
        """Return True: nothing is left to be written."""
        return True
