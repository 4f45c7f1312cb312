"""Optuna Dashboard beside a running study: links of trials as they come, figures and the note at milestones."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from dem_opt.dashboards.optuna_dashboard import TrialNotes
from dem_opt.errors import InputError, shorten
from dem_opt.progress import Phase, Progress
from dem_opt.types import TrialRecord

SHARES = (0.05, 0.25, 0.5, 0.75)
"""After which shares of a search's planned trials its figures are drawn anew; at its end they are in any case."""


class Board:
    """Progress that passes all on to another, and draws in a thread of its own; a context, which waits for that.

    show  draws: it is called with the MLflow page of each search by name, never twice at once.  What it raises is told
          once and stops nothing
    """

    def __init__(self, url: str, progress: Progress, show: Callable[[Mapping[str, str]], object]) -> None:
        self._url, self._progress, self._show = url, progress, show
        self._reached: dict[str, int] = {}
        self._notes: TrialNotes | None = None
        self._drawing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="board")
        self._is_told = False
        self.pages: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._notes is not None:
            self._notes.close()

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Passes it on; at a milestone, draws in the background unless it still does."""
        self._progress.trial_finished(record, done, planned)
        reached = sum(done >= share * planned for share in SHARES)
        if reached > self._reached.get(record.study, 0) and (self._drawing is None or self._drawing.done()):
            self._reached[record.study] = reached
            self._drawing = self._thread.submit(self._draw)

    def phase(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """Pass it on."""
        return self._progress.phase(name, total, unit)

    def warning(self, message: str) -> None:
        """Pass it on."""
        self._progress.warning(message)

    def note(self, message: str) -> None:
        """Pass it on."""
        self._progress.note(message)

    def link(self, study: str, pages: Mapping[int, str], page: str) -> None:
        """Notes the pages in MLflow of trials that have no note yet, and the study's own; from any thread."""
        self.pages[study] = page
        if self._notes is None:
            self._notes = TrialNotes(self._url)
        self._notes.add(study, {number: _note(number, address) for number, address in pages.items()})

    def _draw(self) -> None:
        try:
            self._show(self.pages)
        except InputError:
            self._reached.clear()
        except Exception as error:
            if not self._is_told:
                self._is_told = True
                reason = shorten(f"{type(error).__name__}: {error}".splitlines()[0], 200)
                self.warning(f"Optuna Dashboard's figures could not be drawn ({reason}); the study goes on")


def _note(number: int, address: str) -> str:
    return f"[Trial {number} in MLflow]({address})\n\nOn this machine it answers while `dem-opt dashboard` runs."
