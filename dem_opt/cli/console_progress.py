"""Progress for people: bars on a terminal, plain lines elsewhere."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from time import monotonic
from typing import Self

import rich.progress
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from dem_opt.errors import shorten
from dem_opt.progress import NullPhase, Phase
from dem_opt.simplex import Coefficients
from dem_opt.types import TrialRecord

PACE = 30
"""Number of latest trials that the pace is averaged over: proposals and races change as a search goes on."""

LINES = 10
"""Plain lines of progress for each run, besides those for a new best, and for each other phase."""

LONG = 5.0
"""Seconds after which work is worth a line where there is no terminal."""

FEWEST = 4
"""Moments that a pace is taken from at least, where there are so many."""

INSTANT = 0.1
"""Seconds from the beginning in which no work is done by this run."""


class _Run:
    """State of one run of an algorithm: its best complete trial, others by state, times of the latest trials."""

    def __init__(self) -> None:
        self._best: TrialRecord | None = None
        self._states = Counter[str]()
        self._finished_at: deque[float] = deque(maxlen=PACE + 1)

    def add(self, record: TrialRecord) -> None:
        """Count a trial that has just finished."""
        self._finished_at.append(monotonic())
        self.recall(record)

    def recall(self, record: TrialRecord) -> None:
        """Count a trial, whenever it finished.  The objective of a stopped one is an estimate: it is never the best."""
        self._states[record.state] += 1
        is_whole = record.objective is not None and not record.is_partial
        if is_whole and (self._best is None or record.rank[:2] <= self._best.rank[:2]):
            self._best = record

    @property
    def best(self) -> str:
        """The best so far, with four decimals, and its coefficients."""
        if self._best is None:
            return "no whole trial yet"
        words = f"best {self._best.objective:.4f} {self._best.unit_words} at {in_full(self._best.coefficients)}"
        return words + (", protect violated" if self._best.violation else "")

    def summary(self, left: float | None) -> str:
        """The best, trials that saw some of the windows, the pace, and the seconds that are left of the command."""
        stopped = f"; {self._states['stopped']} stopped early" if self._states["stopped"] else ""
        stopped += f"; {self._states['probe']} probes" if self._states["probe"] else ""
        remaining = "" if left is None else f"; up to {duration(left)} left, final table included"
        return self.best + stopped + self._pace() + remaining

    def _pace(self) -> str:
        """Trials a minute over the latest PACE trials.  The first seconds say nothing."""
        times = self._finished_at
        if len(times) < 4 or (spent := times[-1] - times[0]) < 1:
            return ""
        return f"; {60 * (len(times) - 1) / spent:.3g} trials a minute"


class _Pace:
    """The pace of counted work over the later half of what is done: the first steps are often slow.

    What is done within an instant of the beginning was done before, by a run that this one continues.
    """

    def __init__(self) -> None:
        self._began, self._earlier = monotonic(), 0
        self._points = deque([(self._began, 0)])

    def add(self, done: int) -> None:
        """Note how much is done by now."""
        now = monotonic()
        if now - self._began < INSTANT:
            self._points.clear()
            self._earlier = done
        self._points.append((now, done))
        while len(self._points) > FEWEST and self._points[1][1] <= (self._earlier + done) / 2:
            self._points.popleft()

    def left(self, total: int | None) -> str:
        """The time that the rest will take, in words; empty in the first seconds and at the end."""
        (since, before), (now, done) = self._points[0], self._points[-1]
        if total is None or not before < done < total or now - self._began <= LONG:
            return ""
        return f", about {duration((now - since) * (total - done) / (done - before))} left"


class _Bar:
    """A phase on a terminal: a bar, or a spinner where the work cannot be counted, until the work ends."""

    def __init__(self, bars: rich.progress.Progress, name: str, total: int | None, unit: str) -> None:
        self._bars, self._total, self._unit = bars, total, unit
        self._done, self._is_over, self._pace = 0, False, _Pace()
        self._lock = Lock()
        self._task = bars.add_task(escape(name), total=total, count=count_of(0, total, unit), detail="")

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Move the bar, unless the work is over."""
        with self._lock:
            self._done += amount
            self._pace.add(self._done)
            if not self._is_over:
                count = count_of(self._done, self._total, self._unit) + self._pace.left(self._total)
                self._bars.update(self._task, completed=self._done, count=count, detail=detail)

    def end(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._is_over = True
            self._bars.remove_task(self._task)


class LinePhase:
    """A phase as plain lines, one for every tenth of the work.

    Work that takes less than LONG seconds gets none, unless it has details.
    """

    def __init__(self, write: Callable[[str], None], name: str, total: int | None, unit: str) -> None:
        self._write, self._name, self._total, self._unit = write, name, total, unit
        self._began, self._done, self._tenths, self._pace = monotonic(), 0, 0, _Pace()

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """Write a line where another tenth of the work is done."""
        self._done += amount
        self._pace.add(self._done)
        if self._total is None:
            return
        tenths = self._done * LINES // max(self._total, 1)
        if tenths > self._tenths and (detail or monotonic() - self._began > LONG):
            count = count_of(self._done, self._total, self._unit) + self._pace.left(self._total)
            self._write(f"{self._name}: {count}" + (f"; {detail}" if detail else ""))
        self._tenths = max(tenths, self._tenths)


class ConsoleProgress:
    """Progress for people: bars on a terminal, lines elsewhere.  A context: bars are drawn while it is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._runs: dict[str, _Run] = {}
        self._run_tasks: dict[str, TaskID] = {}
        self._left: float | None = None
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
        return self

    def __exit__(self, *exception: object) -> None:
        self._contexts.close()

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """Show the work until it ends.  Work of a single part is not shown: it has no progress."""
        if total is not None and total <= 1:
            yield NullPhase()
        elif self._draws:
            bar = _Bar(self._bars, name, total, unit)
            self._live.refresh()
            try:
                yield bar
            finally:
                bar.end()
                self._live.refresh()
        else:
            if total is None:
                self.note(f"{name} ...")
            yield LinePhase(self.note, name, total, unit)

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        """Show the best of the earlier trials, as if this command had seen them."""
        study, done = records[0].study, len(records)
        run = self._runs.setdefault(study, _Run())
        for record in records:
            run.recall(record)
        if self._draws:
            self._move(study, done, planned, run.summary(self._left))
        else:
            self.note(f"{study}: {done} of {planned} trials from earlier; {run.summary(self._left)}")

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Move the run's bar, or print a line for a new best and for every tenth of the planned trials."""
        run = self._runs.setdefault(record.study, _Run())
        before = run.best
        run.add(record)
        if self._draws:
            self._move(record.study, done, planned, run.summary(self._left))
        elif run.best != before or done == planned or done * LINES // planned > (done - 1) * LINES // planned:
            self.note(f"{record.study}: {done} of {planned} trials; {run.summary(self._left)}")
        if record.reason:
            self.note(f"{record.study}: trial {record.number} failed: {record.reason}")

    def time_left(self, seconds: float) -> None:
        """Show it with the next trial."""
        self._left = seconds

    def warning(self, message: str) -> None:
        """Print a line that stands out."""
        print_line(self._console, message, "[yellow]warning:[/] ")

    def note(self, message: str) -> None:
        """Print a line, above the bars where there are any."""
        print_line(self._console, message)

    def _move(self, run: str, done: int, planned: int, detail: str) -> None:
        if run not in self._run_tasks:
            self._run_tasks[run] = self._bars.add_task(escape(run), count="", detail="")
        count = f"{done}/{planned} trials"
        self._bars.update(self._run_tasks[run], completed=done, total=planned, count=count, detail=detail)

    def _drawing(self) -> RenderableType:
        """The bars, and below them the detail of each, which may be longer than a line; of several with its name."""
        tasks = self._bars.tasks
        detailed = [task for task in tasks if task.fields["detail"]]
        details = []
        for task in detailed:
            name = Text.from_markup(f"{task.description}: ") if len(detailed) > 1 else Text()
            details.append(Padding(name.append(task.fields["detail"]), (0, 0, 0, 2)))
        return Group(self._bars.make_tasks_table(tasks), *details)


def print_line(console: Console, text: str, prefix: str = "") -> None:
    """Print text as it is after a prefix in markup; a terminal breaks it between words, a file does not."""
    console.print(prefix + escape(text), soft_wrap=not console.is_terminal)


def count_of(done: int, total: int | None, unit: str) -> str:
    """The work done, with its unit; empty for work that cannot be counted."""
    if total is None:
        return ""
    return f"{decimal(done)} of {decimal(total)}" if unit == "bytes" else f"{done} of {total} {unit}"


def in_full(coefficients: Coefficients) -> str:
    """Every coefficient, in the order of names."""
    return ", ".join(f"{shorten(name, 14)} {weight:.2f}" for name, weight in coefficients.items())


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
