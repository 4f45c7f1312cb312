"""A worker that notes what it was asked for, in a file beside the models; importable by Ray's workers."""

import json
import os
from pathlib import Path

from dem_opt.evaluation.worker import Worker
from dem_opt.types import Evaluation, Request, WorkerSpec


class Counted(Worker):
    """Writes a line when an evaluation begins, and one when it has ended."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._notes = notes_of(Path(spec.base.path).parents[1])

    def evaluate(self, request: Request) -> Evaluation:
        self._note("begun", request)
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


def build(spec: WorkerSpec) -> Counted:
    return Counted(spec)
