"""Standard output and standard error of a command: lines, tables, JSON, progress, errors."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dem_opt.cli.console_progress import ConsoleProgress, print_line
from dem_opt.cli.log_file import Broadcast, LogFile
from dem_opt.progress import Progress, reporting

WIDTH = 100
"""Columns of tables where standard output is not a terminal."""


class Terminal:
    """Where a command prints.

    Args:
        quiet: Print nothing on standard output but an answer in JSON.
        as_json: Leave standard output to an answer in JSON: progress goes to standard error.
        log: A file that receives progress and errors too.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, log: LogFile | None = None) -> None:
        self.quiet, self.as_json, self._log = quiet, as_json, log
        width = None if sys.stdout.isatty() else WIDTH
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
    ) -> None:
        """Print a table.  One that is wider than the terminal comes in parts, each with the columns of words.

        Args:
            title: The line above it.
            headers: A header for each column.
            rows: Cells by row and column.
            strong: The row that stands out.
            words: The number of leading columns that are words; the others are numbers.
        """
        for number, part in enumerate(_parts(headers, rows, words, self._out.width)):
            chosen = [[row[place] for place in part] for row in rows]
            heading = f"{title} (continued)" if number else title
            self._out.print(f"\n[bold]{escape(heading)}[/]")
            self._out.print(_table([headers[place] for place in part], chosen, strong, words))


def json_text(data: object) -> str:
    """An answer for programs: strict JSON."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _parts(headers: Sequence[str], rows: Sequence[Sequence[str]], words: int, width: int) -> list[list[int]]:
    """The columns of each part of a table: words may wrap to a fifth of the width, numbers may not."""
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


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None, words: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(escape(header), justify="left" if index < words else "right", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if index == strong else None)
    return table
