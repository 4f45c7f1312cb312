"""Progress that keeps its events, for tests of what long work reports."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dem_opt.progress import NullPhase
from dem_opt.types import TrialRecord


class RecordedProgress:
    """Keeps finished trials, how many were finished by then, phases that began, and messages."""

    def __init__(self) -> None:
        self.records: list[TrialRecord] = []
        self.done: list[int] = []
        self.earlier: list[Sequence[TrialRecord]] = []
        self.left: list[float] = []
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[NullPhase]:
        self.phases.append(name)
        yield NullPhase()

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        self.earlier.append(records)

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        self.records.append(record)
        self.done.append(done)

    def time_left(self, seconds: float) -> None:
        self.left.append(seconds)

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)
