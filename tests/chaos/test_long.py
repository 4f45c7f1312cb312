"""A study of hundreds of trials: its driver's memory stays flat, and it goes on after a kill.

`benchmarks/many_trials.py` measures larger ones.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import books
import psutil

PLANNED = 800
MIB = 2**20


def test_a_study_of_many_trials_goes_on_in_flat_memory(make_study: Callable[..., Path]) -> None:
    study = make_study(PLANNED, documents=20, evaluation={"window": 32, "windows": 2, "held_out": 2})
    driver, sizes = books.start("never", "run", study), {}
    for count in (300, PLANNED - 100):
        while books.count_ended(study) < count:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.5)
        memory = psutil.Process(driver.pid).memory_info()
        sizes[count] = (memory.rss - memory.shared) / MIB  # without files' pages, which come and go as the kernel likes
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    driver = books.start("never", "run", study)
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    books.read(study).check(PLANNED)
    # Optuna keeps every trial in memory: some kilobytes each.
    assert sizes[PLANNED - 100] - sizes[300] < 18
