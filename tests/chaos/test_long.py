"""A study of thousands of trials: its driver's memory stays flat, and it goes on soon after a kill."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import books
import psutil

PLANNED = 5000
MIB = 2**20


def test_a_study_of_5000_trials_goes_on_in_seconds_and_in_flat_memory(
    make_study: Callable[..., Path], record_property: Callable[[str, object], None]
) -> None:
    study = make_study(PLANNED, documents=20, evaluation={"window": 32, "windows": 2, "held_out": 2})
    driver, sizes = books.start("never", "run", study), {}
    for told in (1000, PLANNED - 100):
        while books.told(study) < told:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.5)
        sizes[told] = psutil.Process(driver.pid).memory_info().rss / MIB
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before, began = books.told(study), time.monotonic()
    driver = books.start("never", "run", study)
    while books.told(study) == before:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.1)
    record_property("seconds until the first new trial", round(time.monotonic() - began, 1))
    record_property("the driver's memory in MiB by trials", {told: round(size) for told, size in sizes.items()})
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    books.read(study).check(PLANNED)
    # Optuna keeps every trial in memory: some kilobytes each.
    assert sizes[PLANNED - 100] - sizes[1000] < 100
