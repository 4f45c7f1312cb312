"""What people see while they wait and at the end: progress, plain lines, tables, one-line errors."""

import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from time import monotonic
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dem_opt.errors import shorten
from dem_opt.progress import watched
from dem_opt.simplex import Coefficients
from dem_opt.types import TrialRecord

WIDTH = 100
PACE = 30
"""Latest trials over which the pace is told: proposals and races change as a search goes on."""

MOST_NAMED = 4
"""Distributions whose coefficients a line of progress tells."""

LINES = 10
"""Plain lines of progress for each algorithm, besides those for a new best, and for other long work."""

LONG = 5.0
"""Seconds after which work is told of where there is no terminal."""

_out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
_err = Console(stderr=True, highlight=False)


def hush(quiet: bool) -> None:
    """Print nothing for people on standard output from now on, or again."""
    _out.quiet = quiet


def say(text: str) -> None:
    """A line for people, on standard output."""
    _out.print(escape(text), soft_wrap=True)


def complain(text: str) -> None:
    """A line on standard error."""
    _err.print(escape(text), soft_wrap=True)


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None = None, words: int = 1
) -> None:
    """A table whose first `words` columns are text and whose others are numbers; row `strong` stands out.

    One that is wider than the terminal comes in parts, each with the words.
    """
    for part in _parts(headers, rows, words, _out.width):
        chosen = [[row[place] for place in part] for row in rows]
        _print_part(title, [headers[place] for place in part], chosen, strong, words)


def _parts(headers: Sequence[str], rows: Sequence[Sequence[str]], words: int, width: int) -> list[list[int]]:
    """Which columns stand beside each other: words may wrap to a fifth of the width, numbers may not."""
    widths = [
        max(len(line) for row in (headers, *rows) for line in row[place].split("\n")) for place in range(len(headers))
    ]
    first = list(range(words))
    taken = sum(min(widths[place], width // 5) + 1 for place in first) + 2
    parts, used = [list(first)], taken
    for place in range(words, len(headers)):
        if used + widths[place] + 2 > width and len(parts[-1]) > words:
            parts.append(list(first))
            used = taken
        parts[-1].append(place)
        used += widths[place] + 2
    return parts


def _print_part(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None, words: int
) -> None:
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


class _Bars(Progress):
    """Bars, and below them the words of each, which may be longer than a line."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["words"]:
                yield Padding(Text(task.fields["words"]), (0, 0, 0, 2))


class Progressing:
    """An observer: a progress bar for each algorithm on a terminal, plain lines elsewhere.

    A context: the bar is drawn while it is open.  When quiet, everything goes to standard error, and nothing after
    `hush`.  A milestone that ends in " ..." is work that goes on: on a terminal it turns until the next one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = _err if quiet and not _out.quiet else _out
        self._times: dict[str, deque[float]] = {}
        self._phase: TaskID | None = None
        self._best: dict[str, TrialRecord] = {}
        self._stopped: Counter[str] = Counter()
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._watched = ExitStack()
        self._progress = _Bars(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        self._watched.enter_context(watched(self.work))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watched.close()
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
        shown = found + self._stopped_words(record.study) + self._pace_words(record.study, done, planned)
        if self._console.is_terminal:
            self._move(record.study, done, planned, f"{done}/{planned}", shown)
        elif found != before or done == planned or done * LINES // planned > (done - 1) * LINES // planned:
            self.milestone(f"{record.study}: {done} of {planned} trials; {shown}")
        if record.reason:
            self.milestone(f"{record.study}: trial {record.number} failed: {record.reason}")

    def training(self, name: str, step: int, steps: int, loss: float) -> None:
        """Moves the fine-tuning's bar, or prints a line for every tenth of the way."""
        shown = f"training loss {loss:.3f} nats per token"
        if self._console.is_terminal:
            self._move(name, step, steps, f"{step}/{steps}", shown)
        elif self._is_tenth(name, step, steps):
            self.milestone(f"{name}: {step} of {steps} steps; {shown}")

    def work(self, name: str, done: int, total: int, unit: str) -> None:
        """Moves the bar of other long work, which goes when all is done, or prints a line for every tenth of the way.

        Where there is no terminal, work of less than LONG seconds is not told of; nowhere, what has no parts.
        """
        if total <= 1:
            return
        told = f"{decimal(done)} of {decimal(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
        if self._console.is_terminal:
            self._move(name, done, total, told, "")
            if done >= total:
                self._progress.remove_task(self._tasks.pop(name))
        elif not done:
            self._began[name], self._tenths[name] = monotonic(), 0
        elif self._is_tenth(name, done, total) and monotonic() - self._began[name] > LONG:
            self.milestone(f"{name}: {told}")

    def milestone(self, message: str) -> None:
        """A line above the bar; what goes on turns beside it."""
        if self._phase is not None:
            self._progress.remove_task(self._phase)
            self._phase = None
        if self._console.is_terminal and message.endswith(" ..."):
            self._phase = self._progress.add_task(escape(message), total=None, told="", words="")
            return
        self._console.print(escape(message), soft_wrap=True)

    def _best_words(self, study: str) -> str:
        """The best so far, to a ten-thousandth of a nat, and where it is."""
        best = self._best.get(study)
        if best is None:
            return "no whole trial yet"
        at = f" at {_where(best.coefficients)}"
        return f"best {best.objective:.4f} nats per token" + at + (", protect violated" if best.violation else "")

    def _pace_words(self, study: str, done: int, planned: int) -> str:
        """Trials a minute, and the time that is left at that pace: over the latest PACE trials that this run saw.

        A search may end before all that is planned, so it is the most; nothing is said of the first seconds.
        """
        times = self._times.setdefault(study, deque(maxlen=PACE + 1))
        times.append(monotonic())
        spent = times[-1] - times[0]
        if len(times) < 4 or spent < 1:
            return ""
        pace = (len(times) - 1) / spent
        left = f", {_duration((planned - done) / pace)} left at most" if done < planned else ""
        return f"; {60 * pace:.3g} trials a minute{left}"

    def _stopped_words(self, study: str) -> str:
        """How many trials were stopped early, where any was."""
        stopped = self._stopped[study]
        return f"; {stopped} stopped early" if stopped else ""

    def _move(self, name: str, done: int, total: int, told: str, words: str) -> None:
        """A bar, which is made at first."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(escape(name), told="", words="")
        self._progress.update(self._tasks[name], completed=done, total=total, told=told, words=words)

    def _is_tenth(self, name: str, done: int, total: int) -> bool:
        """Whether another tenth of the way is done."""
        before, self._tenths[name] = self._tenths.get(name, 0), done * LINES // max(total, 1)
        return self._tenths[name] > before


def _where(coefficients: Coefficients) -> str:
    """The largest MOST_NAMED coefficients, in the order of names."""
    units = coefficients.units
    named = sorted(sorted(units, key=lambda name: -units[name])[:MOST_NAMED])
    told = ", ".join(f"{shorten(name, 14)} {coefficients.weights[name]:.2f}" for name in named)
    return told + (", ..." if len(units) > MOST_NAMED else "")


def _duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
