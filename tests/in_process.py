"""Studies whose workers live in this process: without Ray, and without MLflow unless a test is about it.

A fresh MLflow database costs seconds, and tracking has tests of its own.
"""

from collections import Counter
from pathlib import Path

import pytest
import worlds
import yaml

from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import load_inputs
from dem_opt.progress import Progress
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import SEARCH, Composite, Request


def open_study(path: Path, progress: Progress | None = None) -> Study:
    return Study.load(path, tracker=NullTracker(), compute=InProcessCompute(), progress=progress)


def open_tracked(path: Path, progress: Progress | None = None) -> Study:
    return Study.load(path, compute=InProcessCompute(), progress=progress)


def replace_dependencies(monkeypatch: pytest.MonkeyPatch, **dependencies: object) -> None:
    """Let commands open studies with these arguments, and not with those that the study file asks for."""
    initialize = Study.__init__

    def initialize_with(study: Study, *places: object, **arguments: object) -> None:
        initialize(study, *places, **(arguments | dependencies))

    monkeypatch.setattr(Study, "__init__", initialize_with)


def count_evaluations(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Composite, str]]:
    """Count the evaluations of every (composite, corpus) from now on."""
    counts: Counter[tuple[Composite, str]] = Counter()
    original = Worker.evaluate

    def counting(worker: Worker, request: Request) -> object:
        counts.update((request.composite, key) for key in request.corpora)
        return original(worker, request)

    monkeypatch.setattr(Worker, "evaluate", counting)
    return counts


def edit(path: Path, change) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def search_keys(path: Path) -> tuple[str, ...]:
    """Corpus keys of the search split."""
    return load_inputs(load(path), path).identity().keys(SEARCH)


def evaluated_on_the_simplex(evaluated: Counter, path: Path) -> list[tuple[Composite, str]]:
    """Evaluations on the search split of composites without the base: the price of the sum takes others."""
    base, keys = load_inputs(load(path), path).identity().base, search_keys(path)
    return [(composite, key) for composite, key in evaluated if key in keys and base not in dict(composite.terms)]


def add_general(path: Path, **objective) -> Path:
    """The study with a general corpus "web", and an objective."""
    worlds.write_documents(path.parent / "data/web.jsonl", worlds.documents(7))
    return edit(path, lambda study: study.update(general={"web": "data/web.jsonl"}, objective=objective))
