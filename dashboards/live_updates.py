"""Live updates of Optuna Dashboard while a study runs: links of trials as they finish, figures from time to time."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dem_opt.errors import InputError, shorten
from dem_opt.progress import Phase, Progress
from dem_opt.types import TrialRecord

if TYPE_CHECKING:
    from dem_opt.dashboards.optuna_dashboard import TrialNotes

SHARES = (0.05, 0.25, 0.5, 0.75)
"""Shares of a run's planned trials after which its figures are drawn again; whoever runs it draws the last ones."""

SHARE_OF_TIME = 0.1
"""The most of a run's time that goes into drawings, each of which takes seconds of a core: short searches have none."""

FIRST_SECONDS = 2.0
"""Seconds that the first drawing is expected to take; each other as long as the one before it."""


class LiveUpdates:
    """Progress that forwards every event, and from time to time draws the study's figures in a thread of its own.

    A context manager; leaving it waits for the drawing in progress.

    Args:
        url: The study's database.
        progress: Receives every event.
        draw: Draws figures and notes; called with the MLflow URL of each search by name, never twice at a time.  An
            exception becomes one warning and does not stop the study; an InputError means that there is nothing to
            draw yet, and the next finished trial tries again.
        clock: Seconds that have passed.
    """

    def __init__(
        self,
        url: str,
        progress: Progress,
        draw: Callable[[Mapping[str, str]], object],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._url, self._progress, self._draw, self._clock = url, progress, draw, clock
        self._began, self._spent, self._expected = clock(), 0.0, FIRST_SECONDS
        self._shares_drawn: dict[str, int] = {}
        self._notes: TrialNotes | None = None
        self._drawing: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="live-updates")
        self._has_warned = False
        self.pages: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._notes is not None:
            self._notes.close()

    def search_continued(self, records: Sequence[TrialRecord], planned: int) -> None:
        """Forward the event."""
        self._progress.search_continued(records, planned)

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Forward the event; at the next share of the planned trials, draw as soon as there is time for it."""
        self._progress.trial_finished(record, done, planned)
        reached = sum(done >= share * planned for share in SHARES)
        if reached > self._shares_drawn.get(record.study, 0) and self._has_time_to_draw():
            self._shares_drawn[record.study] = reached
            self._drawing = self._executor.submit(self._try_to_draw)

    def phase(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """Forward the event."""
        return self._progress.phase(name, total, unit)

    def time_left(self, seconds: float) -> None:
        """Forward the event."""
        self._progress.time_left(seconds)

    def warning(self, message: str) -> None:
        """Forward the event."""
        self._progress.warning(message)

    def note(self, message: str) -> None:
        """Forward the event."""
        self._progress.note(message)

    def link(self, study: str, pages: Mapping[int, str], page: str) -> None:
        """Write the MLflow URLs of trials without a note into their notes, from any thread; remember the search's."""
        from dem_opt.dashboards.optuna_dashboard import TrialNotes  # takes a second, here beside the search

        self.pages[study] = page
        if self._notes is None:
            self._notes = TrialNotes(self._url)
        self._notes.add(study, {number: _trial_note(number, address) for number, address in pages.items()})

    def _has_time_to_draw(self) -> bool:
        """No drawing is in progress, and with another one drawings take no more than their share of the run's time."""
        is_idle = self._drawing is None or self._drawing.done()
        return is_idle and self._spent + self._expected <= SHARE_OF_TIME * (self._clock() - self._began)

    def _try_to_draw(self) -> None:
        began = self._clock()
        try:
            self._draw(self.pages)
        except InputError:
            self._shares_drawn.clear()
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                reason = shorten(f"{type(error).__name__}: {error}".splitlines()[0], 200)
                self.warning(f"figures in Optuna Dashboard could not be updated ({reason}); the study continues")
        else:
            self._expected = self._clock() - began
            self._spent += self._expected


def _trial_note(number: int, address: str) -> str:
    return f"[Trial {number} in MLflow]({address})\n\nLinks to this machine work while `dem-opt dashboard` runs."
