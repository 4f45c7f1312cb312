"""Standard output and standard error of a command: lines, tables, JSON, progress, errors."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dem_opt.cli.console_progress import ConsoleProgress, print_line
from dem_opt.cli.log_file import Broadcast, LogFile
from dem_opt.progress import Progress, reporting

WIDTH = 100
"""Columns of tables where standard output is not a terminal and COLUMNS is not set."""

WORD_WIDTH = 16
"""Characters to which a table's words may wrap at least."""


class Terminal:
    """Where a command prints.

    Args:
        quiet: Print nothing on standard output but an answer in JSON.
        as_json: Leave standard output to an answer in JSON: progress goes to standard error.
        log: A file that receives progress and errors too.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, log: LogFile | None = None) -> None:
        self.quiet, self.as_json, self._log = quiet, as_json, log
        width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH
        self._out = Console(highlight=False, width=width, quiet=quiet)
        self._err = Console(stderr=True, highlight=False)

    def line(self, text: str) -> None:
        """Print a line for people."""
        print_line(self._out, text)

    def error(self, text: str) -> None:
        """Print a line on standard error."""
        print_line(self._err, text)
        if self._log:
            self._log.write("error", text)

    def json(self, data: object) -> None:
        """Print an answer for programs."""
        sys.stdout.write(json_text(data))

    def raw(self, text: str) -> None:
        """Print an answer for programs as it is."""
        sys.stdout.write(text)

    def ask(self, question: str) -> bool | None:
        """Ask a yes-or-no question on standard error; None where nobody can answer."""
        if not sys.stdin.isatty():
            return None
        self._err.print(escape(f"{question} [y/N] "), end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show the progress of the work within."""
        with ConsoleProgress(self._err if self.as_json and not self.quiet else self._out) as shown:
            progress = Broadcast(shown, self._log) if self._log else shown
            with reporting(progress):
                yield progress

    def table(
        self,
        title: str,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        strong: int | None = None,
        words: int = 1,
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        """Print a table.  Where it is wider than the terminal, some columns are left out and named below it.

        Args:
            title: The line above it.
            headers: A header for each column.
            rows: Cells by row and column.
            strong: The row that stands out.
            words: The number of leading columns that are words, which are always shown; the others are numbers.
            groups: The other columns by group, the most important first; by default each is one, in their order.
        """
        groups = groups or [(column,) for column in range(words, len(headers))]
        if _width(headers, rows, range(len(headers)), words) > self._out.width:
            # An interval may stand below its number: "+0.1381\n[+0.1290, +0.1470]".
            rows = [[*row[:words], *(cell.replace(" [", "\n[") for cell in row[words:])] for row in rows]
        shown = _fitting(headers, rows, words, groups, self._out.width)
        chosen = [[row[column] for column in shown] for row in rows]
        self._out.print(f"\n[bold]{escape(title)}[/]")
        self._out.print(_table([headers[column] for column in shown], chosen, strong, words))
        missing = [" ".join(header.split()) for column, header in enumerate(headers) if column not in shown]
        if missing:
            self.line(f"Left out, for want of room: {', '.join(missing)}. --json has all, as has a wider terminal.")


def json_text(data: object) -> str:
    """An answer for programs: strict JSON."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _fitting(
    headers: Sequence[str], rows: Sequence[Sequence[str]], words: int, groups: Sequence[Sequence[int]], width: int
) -> list[int]:
    """The columns of words, the first group, and of the other groups those that fit into the width beside them."""
    shown = list(range(words))
    for number, group in enumerate(groups):
        if number == 0 or _width(headers, rows, [*shown, *group], words) <= width:
            shown += group
    return sorted(shown)


def _width(headers: Sequence[str], rows: Sequence[Sequence[str]], columns: Iterable[int], words: int) -> int:
    """The width of a table of these columns: words may wrap to WORD_WIDTH characters, numbers may not."""
    total = 1
    for column in columns:
        needed = max(len(line) for row in (headers, *rows) for line in row[column].split("\n"))
        total += 2 + (min(needed, WORD_WIDTH) if column < words else needed)
    return total


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None, words: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(escape(header), justify="left" if index < words else "right", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if index == strong else None)
    return table
