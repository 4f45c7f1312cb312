"""Ctrl-C and SIGTERM: what is being scored is finished first, and the line that resumes is told."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import books
import pytest
from test_workers import SLOW, at_work

PLANNED = 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_what_is_being_scored(make_study: Callable[..., Path], number: int) -> None:
    study = make_study(PLANNED, **SLOW)
    driver = books.start("never", "run", study, start_new_session=True)
    at_work(driver, study, 8)
    os.killpg(driver.pid, number)
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 130, said
    assert "stopping when what is being scored is written" in said
    assert said.splitlines()[-1].endswith(f"To continue: dem-opt run {study}")
    stopped = books.read(study)
    assert 0 < len([state for state in stopped.states.values() if state == "COMPLETE"]) < PLANNED
    assert set(stopped.logged.values()) == {1}
    status, said = books.run("never", "run", study)
    assert status == 0, said
    outcome = books.read(study)
    outcome.check(PLANNED)
    # What was queued behind it may have been begun before its worker was let go.
    assert outcome.repeated <= 1


def test_the_second_signal_stops_at_once(make_study: Callable[..., Path]) -> None:
    study = make_study(PLANNED, **SLOW)
    driver = books.start("never", "run", study, start_new_session=True)
    at_work(driver, study, 8)
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 130, said
    assert "Traceback" not in said and "To continue" in said.splitlines()[-1]
    status, said = books.run("never", "run", study)
    assert status == 0, said
    books.read(study).check(PLANNED)
