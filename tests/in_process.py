"""Studies whose workers live in this process: without Ray, and without MLflow unless a test is about it.

A fresh MLflow database costs seconds, and tracking has tests of its own.
"""

from pathlib import Path

import pytest

from dem_opt.compute import InProcessCompute
from dem_opt.progress import Progress
from dem_opt.study import Study
from dem_opt.tracking import NullTracker


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
