"""A study of thousands of trials: its pace, its driver's memory, and how soon it goes on after a kill.

    python benchmarks/many_trials.py FOLDER [--trials 20000] [--resume 0 5000 20000] [--algorithm random]

A study of two tiny models in SQLite with MLflow, driven by `dem-opt run` on one worker, a Ray actor of this machine.
At each mark of `--resume` its driver is killed and started again; told are the seconds from its start until its first
new trial stands in Optuna's tables (wall and the driver's own processor seconds), imports and Ray's start included.  At
0 nothing is there before: what every start costs.  Memory is what the driver keeps without files' pages.
"""

import argparse
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter, sleep

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import worlds

MIB = 2**20
ENDED = "SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"


def make_study(folder: Path, trials: int, algorithm: str) -> Path:
    """A study of two tiny models and two windows each."""
    folder.mkdir(parents=True, exist_ok=True)
    return worlds.study(
        folder,
        ("code", "math"),
        evaluation={"window": 32, "windows": 2, "held_out": 2},
        search={"algorithm": algorithm, "trials": trials, "racing": False},
        compute={"workers": 1},
    )


def ended(folder: Path) -> int:
    """Trials that Optuna's tables have as ended."""
    database = folder / "runs/tiny/study.db"
    if not database.exists():
        return 0
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        try:
            return int(connection.execute(ENDED).fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not made yet
            return 0


@contextmanager
def driven(study: Path) -> Iterator[psutil.Process]:
    """A `dem-opt run` of the study, killed at the end."""
    command = [str(Path(sys.executable).with_name("dem-opt")), "run", str(study)]
    with (study.parent / "run.log").open("ab") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        children = process.children(recursive=True)
        for each in (process, *children):
            each.kill()
        psutil.wait_procs([process, *children], timeout=30)


def wait_for(folder: Path, count: int, driver: psutil.Process, every: float) -> None:
    """Return when so many trials have ended."""
    while ended(folder) < count:
        if driver.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit(f"the driver has ended; see {folder / 'run.log'}")
        sleep(every)


def main() -> None:
    """Drive a study from mark to mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--resume", type=int, nargs="+", default=[0, 5_000, 20_000], metavar="TRIALS")
    parser.add_argument("--algorithm", default="random")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    marks = sorted(arguments.resume)
    # Some more than the last mark: what is told there is the first new trial of a study that goes on.
    study = make_study(folder, max(arguments.trials, marks[-1]) + 1000, arguments.algorithm)
    for mark, until in zip(marks, [*marks[1:], marks[-1] + 1], strict=True):
        before, began = ended(folder), perf_counter()
        with driven(study) as driver:
            wait_for(folder, before + 1, driver, 0.05)
            spent = driver.cpu_times()
            print(
                f"{before:6,} trials: first new one after {perf_counter() - began:.1f} s "
                f"({spent.user + spent.system:.1f} s of a processor)",
                flush=True,
            )
            for count in range(mark + 1000, until + 1, 1000):
                paced = perf_counter(), ended(folder)
                wait_for(folder, count, driver, 0.5)
                memory = driver.memory_info()
                pace = (perf_counter() - paced[0]) / max(1, count - paced[1])
                kept = (memory.rss - memory.shared) / MIB
                print(f"{count:6,} trials: {pace * 1e3:.0f} ms a trial, {kept:.0f} MiB", flush=True)
            wait_for(folder, until, driver, 0.5)


if __name__ == "__main__":
    main()
