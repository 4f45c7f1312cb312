"""What people see while they wait and at the end: progress, plain lines, tables, one-line errors."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dem_opt.records import TrialRecord

WIDTH = 100
LINES = 10
"""Plain lines of progress for each algorithm, besides those for a new best."""

_out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
_err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line for people, on standard output."""
    _out.print(escape(text), soft_wrap=True)


def complain(text: str) -> None:
    """A line on standard error."""
    _err.print(escape(text), soft_wrap=True)


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None = None, words: int = 1
) -> None:
    """A table whose first `words` columns are text and whose others are numbers; row `strong` stands out."""
    made = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        made.add_column(escape(header), justify="left" if index < words else "right", overflow="fold")
    for index, row in enumerate(rows):
        made.add_row(*map(escape, row), style="bold" if index == strong else None)
    _out.print(made)


def as_json(data: object) -> str:
    """An answer for programs."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def say_json(data: object) -> None:
    """An answer for programs, on standard output."""
    sys.stdout.write(as_json(data))


class Progressing:
    """An observer: a progress bar for each algorithm on a terminal, plain lines elsewhere.

    A context: the bar is drawn while it is open.  When quiet, everything goes to standard error.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = _err if quiet else _out
        self._best: dict[str, TrialRecord] = {}
        self._stopped: Counter[str] = Counter()
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def trial_ended(self, record: TrialRecord, done: int, planned: int) -> None:
        """Moves the bar, or prints a line for a new best and for every tenth of the way.

        Only whole trials may be the best: the objective of one that was stopped is an estimate.
        """
        before = self._best_words(record.study)
        best = self._best.get(record.study, record)
        self._stopped[record.study] += record.is_partial
        if record.objective is not None and not record.is_partial and record.rank[:2] <= best.rank[:2]:
            self._best[record.study] = record
        found = self._best_words(record.study)
        shown = found + self._stopped_words(record.study)
        if self._console.is_terminal:
            self._progress.update(self._task(record.study), completed=done, total=planned, best=escape(shown))
        elif found != before or done == planned or done * LINES // planned > (done - 1) * LINES // planned:
            self.milestone(f"{record.study}: {done} of {planned} trials; {shown}")
        if record.reason:
            self.milestone(f"{record.study}: trial {record.number} failed: {record.reason}")

    def training(self, name: str, step: int, steps: int, loss: float) -> None:
        """Moves the fine-tuning's bar, or prints a line for every tenth of the way."""
        shown = f"training loss {loss:.3f} nats per token"
        if self._console.is_terminal:
            self._progress.update(self._task(name), completed=step, total=steps, best=shown)
        elif step * LINES // steps > self._tenths.get(name, 0):
            self._tenths[name] = step * LINES // steps
            self.milestone(f"{name}: {step} of {steps} steps; {shown}")

    def milestone(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(escape(message), soft_wrap=True)

    def _best_words(self, study: str) -> str:
        """The best so far, to a ten-thousandth of a nat."""
        best = self._best.get(study)
        if best is None:
            return "no whole trial yet"
        return f"best {best.objective:.4f} nats per token" + (", protect violated" if best.violation else "")

    def _stopped_words(self, study: str) -> str:
        """How many trials were stopped early, where any was."""
        stopped = self._stopped[study]
        return f"; {stopped} stopped early" if stopped else ""

    def _task(self, study: str) -> TaskID:
        if study not in self._tasks:
            self._tasks[study] = self._progress.add_task(study, best="")
        return self._tasks[study]
