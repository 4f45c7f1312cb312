"""Optuna Dashboard beside a running study: links of trials, and figures at milestones, on real databases."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import FloatDistribution
from recorded import RecordedProgress
from summaries import a_trial

from dem_opt.dashboards.live_updates import FIRST_SECONDS, SHARE_OF_TIME, SHARES, LiveUpdates
from dem_opt.errors import InputError

TRIALS = 4


@pytest.fixture
def url(url: str) -> str:
    """A database with a study of some trials, one of which is still running."""
    store = optuna.storages.RDBStorage(url)
    study = optuna.create_study(storage=store, study_name="s")
    for weight in range(TRIALS - 1):
        params, space = {"a": weight / 10}, {"a": FloatDistribution(0.0, 1.0)}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=1.0))
    study.ask({"a": FloatDistribution(0.0, 1.0)})
    store.remove_session()
    store.engine.dispose()
    return url


@pytest.fixture
def study(url: str) -> Iterator[optuna.Study]:
    store = optuna.storages.RDBStorage(url)
    yield optuna.load_study(study_name="s", storage=store)
    store.remove_session()
    store.engine.dispose()


def trial_of(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial as the public functions for notes take it."""
    return optuna.Trial(study, study.get_trials()[number]._trial_id)


def test_every_trial_links_to_its_run_once_and_a_users_note_stays(url: str, study: optuna.Study) -> None:
    """Trial 0 has a note of the user's, 1 is linked alone, the repair brings 2 and 3, finished or not.

    Notes are written under Optuna Dashboard's own keys and read by its public function: a release that stores them
    otherwise fails here.
    """
    optuna_dashboard.save_note(trial_of(study, 0), "my own")
    with LiveUpdates(url, RecordedProgress(), lambda pages: None) as board:
        board.link("s", {1: "http://here/1"}, "http://here/study")
        board.link("s", {number: f"http://here/{number}" for number in range(TRIALS)}, "http://here/study")
        board.link("s", {number: "http://elsewhere/" for number in range(TRIALS)}, "http://here/study")
    notes = [optuna_dashboard.get_note(trial_of(study, number)) for number in range(TRIALS)]
    assert notes[0] == "my own"
    for number in range(1, TRIALS):
        assert f"[Trial {number} in MLflow](http://here/{number})" in notes[number]
    assert board.pages == {"s": "http://here/study"}


def test_links_of_an_unknown_study_are_the_callers_failure(url: str) -> None:
    with LiveUpdates(url, RecordedProgress(), lambda pages: None) as board, pytest.raises(KeyError):
        board.link("another", {0: "http://here/0"}, "http://here/")


class Clock:
    """Seconds that pass when a test says so."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


TRIAL_SECONDS = 1000.0
"""A trial so long that there is time for every drawing."""


def run(board: LiveUpdates, planned: int, clock: Clock, seconds: float = TRIAL_SECONDS) -> None:
    """Trials that end, each when what it set off is drawn."""
    for done in range(1, planned + 1):
        clock.seconds += seconds
        board.trial_finished(a_trial(done, 1.0), done, planned)
        if board._drawing is not None:
            board._drawing.result()


def test_figures_are_drawn_at_milestones_and_not_for_each_trial(tmp_path: Path, clock: Clock) -> None:
    watching, shown = RecordedProgress(), []
    with LiveUpdates(
        f"sqlite:///{tmp_path}/none.db", watching, lambda pages: shown.append(dict(pages)), clock
    ) as board:
        run(board, 100, clock)
    assert len(shown) == len(SHARES) and watching.done == list(range(1, 101)) and watching.warnings == []


@pytest.mark.parametrize("trial", [0.01, 0.5, 60.0])
@pytest.mark.parametrize("drawing", [0.5, 2.0, 30.0])
def test_drawings_take_a_small_share_of_a_run_s_time(
    tmp_path: Path, clock: Clock, trial: float, drawing: float
) -> None:
    ended = []

    def draw(pages: Mapping[str, str]) -> None:
        clock.seconds += drawing
        ended.append(clock.seconds)

    with LiveUpdates(f"sqlite:///{tmp_path}/none.db", RecordedProgress(), draw, clock) as board:
        run(board, 400, clock, trial)
    assert all(end - drawing >= FIRST_SECONDS / SHARE_OF_TIME for end in ended[:1])
    for number, end in enumerate(ended[1:], 2):
        assert number * drawing <= SHARE_OF_TIME * (end - drawing)
    assert bool(ended) == (400 * trial >= FIRST_SECONDS / SHARE_OF_TIME)


def test_a_drawing_that_is_slow_is_waited_for_by_nobody(tmp_path: Path, clock: Clock) -> None:
    """While the first goes on, milestones set nothing off; the first after it does."""
    go_on, shown = Event(), []

    def show(pages: Mapping[str, str]) -> None:
        go_on.wait(60)
        shown.append(1)

    with LiveUpdates(f"sqlite:///{tmp_path}/none.db", RecordedProgress(), show, clock) as board:
        clock.seconds = TRIAL_SECONDS
        for done in range(1, 61):
            board.trial_finished(a_trial(done, 1.0), done, 100)
        go_on.set()
        assert board._drawing is not None
        board._drawing.result()
        board.trial_finished(a_trial(61, 1.0), 61, 100)
        board._drawing.result()
    assert len(shown) == 2


def test_a_drawing_that_fails_is_told_once_and_stops_nothing(tmp_path: Path, clock: Clock) -> None:
    def fail(pages: Mapping[str, str]) -> None:
        raise OSError("the disk is\nfull")

    watching = RecordedProgress()
    with LiveUpdates(f"sqlite:///{tmp_path}/none.db", watching, fail, clock) as board:
        run(board, 100, clock)
    (warning,) = watching.warnings
    assert "OSError: the disk is" in warning and "\n" not in warning and watching.done == list(range(1, 101))


def test_before_there_is_anything_to_draw_the_next_trial_tries_again(tmp_path: Path, clock: Clock) -> None:
    calls = []

    def show(pages: Mapping[str, str]) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise InputError("study", None, None, "nothing is measured yet")

    watching = RecordedProgress()
    with LiveUpdates(f"sqlite:///{tmp_path}/none.db", watching, show, clock) as board:
        run(board, 100, clock)
    assert watching.warnings == [] and len(calls) == 2 + len(SHARES)
