"""A worker that notes what it was asked for, in a file beside the models; importable by Ray's workers."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dem_opt.evaluation.worker import Worker
from dem_opt.types import Evaluation, Request, WorkerSpec


class Counted(Worker):
    """Writes a line when an evaluation begins, and one when it has ended; waits where it is held."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._folder = Path(spec.base.path).parents[1]
        self._notes = notes_of(self._folder)

    def evaluate(self, request: Request) -> Evaluation:
        self._note("begun", request)
        while _hold_of(self._folder).exists():
            time.sleep(0.02)
        evaluation = super().evaluate(request)
        self._note("ended", request)
        return evaluation

    def _note(self, what: str, request: Request) -> None:
        seen = sum(len(score.nats_W) for score in request.known.values())
        line = {"what": what, "pid": os.getpid(), "composite": request.composite.key, "seen": seen}
        line["corpora"] = sorted(request.corpora)
        with self._notes.open("a") as file:
            file.write(json.dumps(line) + "\n")


def notes_of(folder: Path) -> Path:
    return folder / "evaluations.jsonl"


def _hold_of(folder: Path) -> Path:
    return folder / "hold"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While no evaluation ends that begins here: what a test does meanwhile may take any time."""
    _hold_of(folder).touch()
    try:
        yield
    finally:
        _hold_of(folder).unlink()


def build(spec: WorkerSpec) -> Counted:
    return Counted(spec)
