"""Progress as timestamped lines of a file, for runs that nobody watches."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import TextIO, final

from dem_opt.cli.console_progress import LinePhase, duration
from dem_opt.errors import InputError
from dem_opt.progress import Phase, Progress
from dem_opt.types import TrialRecord

_LINE = re.compile(rb"\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d\d:\d\d [a-z]+: ")
"""The beginning of a line: time and kind of event."""


@final
class LogFile:
    """Appends a line for each event: time, kind of event, text.  Passwords in URLs are masked.

    Raises:
        InputError: The file cannot be written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            if path.is_file() and not _is_log(path):
                mend = "holds something else than a log of dem-opt, to which lines would be added: name another file"
                raise InputError(None, "--log-file", str(path), mend)
            self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(None, "--log-file", str(path), f"cannot be written ({error.strerror})") from None
        self._lock = Lock()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, kind: str, text: str) -> None:
        """Append a line."""
        from dem_opt.storage.engine import masked

        moment = datetime.now().astimezone().isoformat(timespec="seconds")
        with self._lock:
            self._file.write(f"{moment} {kind}: {masked(' '.join(text.splitlines()))}\n")

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """Log when the work begins and ends, and every tenth of work that takes long."""
        began = monotonic()
        self.write("begin", name)
        try:
            yield LinePhase(partial(self.write, "phase"), name, total, unit)
        finally:
            self.write("end", f"{name}: {duration(monotonic() - began)}")

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        """Log how many trials there are from earlier."""
        self.write("note", f"{records[0].study} has {len(records)} of {planned} trials from earlier")

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Log the trial: its coefficients, its objective or why it failed."""
        if record.objective is None:
            outcome = f"failed: {record.reason}"
        elif record.is_partial:
            words = "probe" if record.state == "probe" else "stopped early"
            outcome = f"{words}, estimate {record.objective:.4f} ± {record.error:.4f} {record.unit_words}"
        else:
            outcome = f"{record.objective:.4f} {record.unit_words}"
        place = f"{record.study} trial {record.number} at {record.coefficients}"
        self.write("trial", f"{place}: {outcome}; {done} of {planned} trials finished")

    def time_left(self, seconds: float) -> None:
        """Log nothing: it follows from what was logged."""

    def warning(self, message: str) -> None:
        """Log a warning."""
        self.write("warning", message)

    def note(self, message: str) -> None:
        """Log a note."""
        self.write("note", message)


def _is_log(path: Path) -> bool:
    """True if a file is empty, or begins as `LogFile` writes a line."""
    with path.open("rb") as file:
        first = file.readline(200)
    return not first or _LINE.match(first) is not None


@final
class Broadcast:
    """Progress that passes every event to several others."""

    def __init__(self, *receivers: Progress) -> None:
        self._receivers = receivers

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """Begin the work everywhere."""
        with ExitStack() as contexts:
            phases = [contexts.enter_context(receiver.phase(name, total, unit)) for receiver in self._receivers]
            yield _Phases(phases)

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        """Pass it on."""
        for receiver in self._receivers:
            receiver.search_continued(records, planned)

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Pass it on."""
        for receiver in self._receivers:
            receiver.trial_finished(record, done, planned)

    def time_left(self, seconds: float) -> None:
        """Pass it on."""
        for receiver in self._receivers:
            receiver.time_left(seconds)

    def warning(self, message: str) -> None:
        """Pass it on."""
        for receiver in self._receivers:
            receiver.warning(message)

    def note(self, message: str) -> None:
        """Pass it on."""
        for receiver in self._receivers:
            receiver.note(message)


class _Phases:
    """Several phases of the same work."""

    def __init__(self, phases: list[Phase]) -> None:
        self._phases = phases

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Pass it on."""
        for phase in self._phases:
            phase.advance(amount, detail)
