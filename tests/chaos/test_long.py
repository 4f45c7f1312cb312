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
    for count in (1000, PLANNED - 100):
        while books.count_ended(study) < count:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.5)
        memory = psutil.Process(driver.pid).memory_info()
        sizes[count] = (memory.rss - memory.shared) / MIB  # without files' pages, which come and go as the kernel likes
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before, began = books.count_ended(study), time.monotonic()
    driver = books.start("never", "run", study)
    while books.count_ended(study) == before:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.1)
    record_property("seconds until the first new trial", round(time.monotonic() - began, 1))
    record_property("the driver's memory in MiB by trials", {count: round(size) for count, size in sizes.items()})
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    books.read(study).check(PLANNED)
    # Optuna keeps every trial in memory: some kilobytes each.
    assert sizes[PLANNED - 100] - sizes[1000] < 100
