"""What people see while they wait and at the end: progress, plain lines, tables, one-line errors."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import monotonic
from types import TracebackType
from typing import Self

import rich.progress
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dem_opt.errors import shorten
from dem_opt.progress import NullPhase, Phase, reporting
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


class _Run:
    """How one run of an algorithm stands: its best whole trial, trials stopped early, when trials finished."""

    def __init__(self) -> None:
        self._best: TrialRecord | None = None
        self._stopped = 0
        self._finished_at: deque[float] = deque(maxlen=PACE + 1)

    def add(self, record: TrialRecord) -> None:
        """Count a finished trial.  The objective of one that was stopped is an estimate: it is never the best."""
        self._finished_at.append(monotonic())
        self._stopped += record.is_partial
        is_whole = record.objective is not None and not record.is_partial
        if is_whole and (self._best is None or record.rank[:2] <= self._best.rank[:2]):
            self._best = record

    @property
    def best(self) -> str:
        """The best so far, to a ten-thousandth of a nat, and its coefficients."""
        if self._best is None:
            return "no whole trial yet"
        words = f"best {self._best.objective:.4f} nats per token at {_largest(self._best.coefficients)}"
        return words + (", protect violated" if self._best.violation else "")

    def summary(self, done: int, planned: int) -> str:
        """The best, trials stopped early, and the pace."""
        stopped = f"; {self._stopped} stopped early" if self._stopped else ""
        return self.best + stopped + self._pace(done, planned)

    def _pace(self, done: int, planned: int) -> str:
        """Trials a minute over the latest PACE trials, and the time left at that pace.

        A search may end before all planned trials, so that time is an upper bound.  The first seconds say nothing.
        """
        times = self._finished_at
        spent = times[-1] - times[0]
        if len(times) < 4 or spent < 1:
            return ""
        pace = (len(times) - 1) / spent
        left = f", {_duration((planned - done) / pace)} left at most" if done < planned else ""
        return f"; {60 * pace:.3g} trials a minute{left}"


class _Bar:
    """A phase on a terminal: a bar, or a spinner where the work cannot be counted, until the work ends."""

    def __init__(self, bars: rich.progress.Progress, name: str, total: int | None, unit: str) -> None:
        self._bars, self._total, self._unit = bars, total, unit
        self._task = bars.add_task(escape(name), total=total, count=_count(0, total, unit), detail="")

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Move the bar; one that has ended stays away."""
        if self._task in self._bars.task_ids:
            self._bars.advance(self._task, amount)
            done = int(self._bars.tasks[self._bars.task_ids.index(self._task)].completed)
            self._bars.update(self._task, count=_count(done, self._total, self._unit), detail=detail)

    def end(self) -> None:
        """Take the bar away."""
        self._bars.remove_task(self._task)


class _Lines:
    """A phase where there is no terminal: a line for every tenth of the work.

    Work that takes less than LONG seconds gets none, unless it has details to tell.
    """

    def __init__(self, write: Callable[[str], None], name: str, total: int | None, unit: str) -> None:
        self._write, self._name, self._total, self._unit = write, name, total, unit
        self._began, self._done, self._tenths = monotonic(), 0, 0
        if total is None:
            write(f"{name} ...")

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Print a line where another tenth of the work is done."""
        self._done += amount
        tenths = self._done * LINES // max(self._total or 0, 1)
        is_next, self._tenths = self._total is not None and tenths > self._tenths, max(tenths, self._tenths)
        if is_next and (detail or monotonic() - self._began > LONG):
            count = _count(self._done, self._total, self._unit)
            self._write(f"{self._name}: {count}" + (f"; {detail}" if detail else ""))

    def end(self) -> None:
        """Print nothing."""


class ConsoleProgress:
    """Progress for people: bars on a terminal, lines elsewhere.  A context: bars are drawn while it is open.

    Args:
        quiet: Leave standard output to the answer: print to standard error, and nothing after `hush`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = _err if quiet and not _out.quiet else _out
        self._runs: dict[str, _Run] = {}
        self._run_tasks: dict[str, TaskID] = {}
        self._contexts = ExitStack()
        self._bars = rich.progress.Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._live = Live(get_renderable=self._drawing, console=self._console)
        self._draws = self._console.is_terminal and not self._console.is_dumb_terminal

    def __enter__(self) -> Self:
        if self._draws:
            self._contexts.enter_context(self._live)
        self._contexts.enter_context(reporting(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.close()

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """Show the work until it ends.  Work of a single part is not shown: it has no progress."""
        if total is not None and total <= 1:
            yield NullPhase()
            return
        shown = _Bar(self._bars, name, total, unit) if self._draws else _Lines(self.note, name, total, unit)
        self._refresh()
        try:
            yield shown
        finally:
            shown.end()
            self._refresh()

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Move the run's bar, or print a line for a new best and for every tenth of the planned trials."""
        run = self._runs.setdefault(record.study, _Run())
        before = run.best
        run.add(record)
        if self._draws:
            self._move(record.study, done, planned, run.summary(done, planned))
        elif run.best != before or done == planned or done * LINES // planned > (done - 1) * LINES // planned:
            self.note(f"{record.study}: {done} of {planned} trials; {run.summary(done, planned)}")
        if record.reason:
            self.note(f"{record.study}: trial {record.number} failed: {record.reason}")

    def warning(self, message: str) -> None:
        """Print a line that stands out."""
        self._console.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)

    def note(self, message: str) -> None:
        """Print a line, above the bars where there are any."""
        self._console.print(escape(message), soft_wrap=True)

    def _refresh(self) -> None:
        if self._draws:
            self._live.refresh()

    def _move(self, run: str, done: int, planned: int, detail: str) -> None:
        if run not in self._run_tasks:
            self._run_tasks[run] = self._bars.add_task(escape(run), count="", detail="")
        count = f"{done}/{planned} trials"
        self._bars.update(self._run_tasks[run], completed=done, total=planned, count=count, detail=detail)

    def _drawing(self) -> RenderableType:
        """The bars, and below them the detail of each, which may be longer than a line."""
        tasks = self._bars.tasks
        details = [Padding(Text(task.fields["detail"]), (0, 0, 0, 2)) for task in tasks if task.fields["detail"]]
        return Group(self._bars.make_tasks_table(tasks), *details)


def _count(done: int, total: int | None, unit: str) -> str:
    """How much of the work is done, with its unit; nothing for work that cannot be counted."""
    if total is None:
        return ""
    return f"{decimal(done)} of {decimal(total)}" if unit == "bytes" else f"{done} of {total} {unit}"


def _largest(coefficients: Coefficients) -> str:
    """The largest MOST_NAMED coefficients, in the order of names."""
    units = coefficients.units
    named = sorted(sorted(units, key=lambda name: -units[name])[:MOST_NAMED])
    words = ", ".join(f"{shorten(name, 14)} {coefficients.weights[name]:.2f}" for name in named)
    return words + (", ..." if len(units) > MOST_NAMED else "")


def _duration(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
