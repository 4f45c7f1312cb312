"""The cost of looking at a study: both dashboards polled every second, against both idle.

    python benchmarks/look.py [--trials 160]

One study of the quickstart's shape runs with `random` on one worker of one thread, a Ray actor.  Both servers run all
the while; in every other block of trials they are asked once a second for what their pages ask for: of Optuna's trials
those that were not finished when it was asked before.  So both kinds of trials see the same machine, busy or not.  A
trial's wall time is what its worker spent and was idle before it.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter
from urllib.request import Request, urlopen

from trial import SHAPES, make_study

from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.compute import RayCompute
from dem_opt.config import load
from dem_opt.dashboards import servers
from dem_opt.progress import NullProgress
from dem_opt.study import Study
from dem_opt.types import TrialRecord

BLOCK, EDGE = 6, 2
"""Trials of a block; those at its beginning that are not counted."""


@dataclass
class Poll:
    """Asks both servers once a second while `on`; a context."""

    addresses: servers.Addresses
    on: Event = field(default_factory=Event)
    ended: Event = field(default_factory=Event)
    seconds: list[float] = field(default_factory=list)
    finished: int = 0
    optuna: list[float] = field(default_factory=list)
    unanswered: int = 0

    def __enter__(self) -> "Poll":
        self._thread = Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.ended.wait(1):
            if self.on.is_set():
                began = perf_counter()
                try:
                    study = json.loads(self._ask(f"{self.addresses.optuna}api/studies/1?after={self.finished}"))
                    self.finished += sum(trial["state"] in ("Complete", "Fail") for trial in study["trials"])
                    self.optuna.append(perf_counter() - began)
                    self._ask(
                        f"{self.addresses.mlflow}ajax-api/2.0/mlflow/runs/search",
                        {"experiment_ids": ["1"], "max_results": 100, "order_by": ["attributes.start_time DESC"]},
                    )
                except OSError:
                    self.unanswered += 1
                    continue
                self.seconds.append(perf_counter() - began)

    def _ask(self, address: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(address, data, headers), timeout=60) as answer:
            return bytes(answer.read())


@dataclass
class Watch(NullProgress):
    """Progress that starts the servers at the first trial, and looks in every other block."""

    path: Path
    records: list[TrialRecord] = field(default_factory=list)
    poll: Poll | None = None

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Keep it; look in the block that begins, or don't."""
        self.records.append(record)
        if self.poll is None:
            config = load(self.path)
            self._servers = servers.running(config.storage, config.tracking.uri)
            self.poll = Poll(self._servers.__enter__()).__enter__()
        (self.poll.on.set if done // BLOCK % 2 else self.poll.on.clear)()

    def close(self) -> None:
        """Stops polling and servers."""
        assert self.poll is not None
        self.poll.__exit__()
        self._servers.__exit__(None, None, None)


def main() -> None:
    """Measure and print as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=160)
    arguments = parser.parse_args()
    silence_transformers()
    with TemporaryDirectory() as folder:
        path = make_study(Path(folder), SHAPES["quickstart"], arguments.trials)
        config, watch = load(path), Watch(path)
        try:
            compute = RayCompute(config.compute.model_copy(update={"workers": 1}))
            Study(config, path, compute=compute, progress=watch).run()
        finally:
            watch.close()
    spent: dict[bool, list[float]] = {True: [], False: []}
    for number, record in enumerate(watch.records):
        evaluation = record.evaluation
        if number >= BLOCK and number % BLOCK >= EDGE:
            spent[bool(number // BLOCK % 2)].append(
                evaluation.merge_seconds + evaluation.score_seconds + evaluation.wait_seconds
            )
    assert watch.poll is not None
    results = {
        "trials looked at": len(spent[True]),
        "trials alone": len(spent[False]),
        "looked at ms, median": 1e3 * median(spent[True]),
        "alone ms, median": 1e3 * median(spent[False]),
        "ratio of medians": median(spent[True]) / median(spent[False]),
        "ratio of best": min(spent[True]) / min(spent[False]),
        "polls": len(watch.poll.seconds),
        "polls without an answer": watch.poll.unanswered,
        "a poll ms, median": 1e3 * median(watch.poll.seconds),
        "of that Optuna Dashboard's": 1e3 * median(watch.poll.optuna),
        "finished trials that it has told": watch.poll.finished,
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
