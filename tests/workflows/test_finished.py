"""Laws of a finished study: its next run answers from the database, unless anything that it follows from may differ."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Self

import pytest
import worlds
import yaml
from recorded import RecordedProgress

from dem_opt.cli import published
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.progress import NullProgress
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.workflows.finished import FILE, find_finished


class Watched(InProcessCompute):
    """Compute that counts how often it was entered and started workers."""

    def __init__(self) -> None:
        self.entered = self.started = 0

    def __enter__(self) -> Self:
        self.entered += 1
        return self

    def workers(self, *arguments, **named):
        self.started += 1
        return super().workers(*arguments, **named)


class Unusable:
    """Compute that must not be used."""

    device = "cpu"

    def __enter__(self) -> Self:
        raise AssertionError("compute is entered")

    def __exit__(self, *exception: object) -> None:
        """Nothing was entered."""

    def workers(self, *arguments, **named):
        raise AssertionError("workers are started")

    def jobs(self, *arguments, **named) -> Iterator[tuple[object, object]]:
        raise AssertionError("jobs are run")


def open_study(path: Path, compute: object = None, progress: RecordedProgress | None = None) -> Study:
    return Study.load(path, tracker=NullTracker(), compute=compute or InProcessCompute(), progress=progress)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials that was run to its end; tests leave it as it was."""
    path = worlds.study(tmp_path_factory.mktemp("finished"), search={"algorithm": "random", "trials": 3})
    open_study(path).run()
    return path


def test_a_finished_study_answers_without_workers_and_without_a_checkpoint(finished):
    """Checkpoints and texts of the same size, time and inode are full of zeros, so whoever reads one fails."""
    expected = open_study(finished).summary()
    contents = {
        file: file.read_bytes() for pattern in ("models/*/*", "data/*") for file in finished.parent.glob(pattern)
    }
    for file, content in contents.items():
        overwrite(file, bytes(len(content)))
    progress = RecordedProgress()
    assert open_study(finished, Unusable(), progress).run().summary == expected
    assert not progress.phases and not progress.records
    for file, content in contents.items():
        overwrite(file, content)


def overwrite(file: Path, content: bytes) -> None:
    """Other bytes in the same file, and at the same time."""
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def rewritten(path: Path, **sections: object) -> Iterator[None]:
    """A study file with other values in some sections."""
    text = path.read_text()
    content = yaml.safe_load(text)
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    path.write_text(yaml.safe_dump(content))
    yield
    path.write_text(text)


@contextmanager
def touched(file: Path) -> Iterator[None]:
    """The same bytes at another time."""
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    yield
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def replaced(file: Path) -> Iterator[None]:
    """Another file of the same bytes and time in its place."""
    former = file.parents[2] / "former"
    file.rename(former)
    shutil.copy2(former, file)
    yield
    former.rename(file)


@contextmanager
def added(file: Path) -> Iterator[None]:
    """A file that was not there."""
    file.write_text("{}")
    yield
    file.unlink()


@contextmanager
def written(file: Path, text: str) -> Iterator[None]:
    """A file with another text."""
    before = file.read_text()
    file.write_text(text)
    yield
    file.write_text(before)


CHANGES: dict[str, Callable[[Path], AbstractContextManager[None]]] = {
    "a checkpoint": lambda path: touched(path.parent / "models/code/model.safetensors"),
    "another file in its place": lambda path: replaced(path.parent / "models/code/model.safetensors"),
    "a checkpoint's config": lambda path: touched(path.parent / "models/base/config.json"),
    "a file more": lambda path: added(path.parent / "models/base/added.json"),
    "a text": lambda path: touched(path.parent / "data/math.jsonl"),
    "more trials": lambda path: rewritten(path, search={"trials": 4}),
    "another algorithm": lambda path: rewritten(path, search={"algorithm": "tpe"}),
    "another weight": lambda path: rewritten(path, objective={"weights": {"code": 2.0, "math": 1.0, "prose": 1.0}}),
    "a fuller report": lambda path: rewritten(path, report={"top": 3}),
    "damage": lambda path: written(load(path).output / FILE, "{}"),
}


def is_known(path: Path) -> bool:
    config = load(path)
    return find_finished(config, [config.search.algorithm], NullProgress()) is not None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_may_have_changed_is_looked_at_again(finished, change):
    assert is_known(finished)
    with change(finished):
        assert not is_known(finished)
    assert is_known(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: rewritten(path, compute={"patience": 5.0}),
        lambda path: rewritten(path, search={"trials": 2}),
        lambda path: rewritten(path, outages={"storage": 5.0}),
    ],
)
def test_what_a_study_does_not_follow_from_changes_nothing(finished, change):
    with change(finished):
        assert is_known(finished)


def test_after_a_change_a_run_looks_at_its_inputs_and_knows_them_again(finished):
    config = load(finished)
    with touched(finished.parent / "models/code/model.safetensors"):
        compute = Watched()
        open_study(finished, compute).run()
        assert compute.entered and find_finished(config, ["random"], NullProgress()) is not None
    open_study(finished).run()


def test_warnings_of_the_inputs_are_repeated(tmp_path):
    path = worlds.study(
        tmp_path, search={"algorithm": "random", "trials": 2}, objective={"weights": {"code": 1.0, "math": 1.0}}
    )
    first, second = RecordedProgress(), RecordedProgress()
    open_study(path, progress=first).run()
    open_study(path, Unusable(), second).run()
    assert first.warnings and second.warnings == first.warnings


def test_a_command_answers_a_study_that_both_dashboards_show(finished, capsys, monkeypatch):
    """Without the public API, which loads torch: only what is not in the dashboards yet is left to it."""
    summary = open_study(finished).summary()
    config = load(finished)
    published.keep(config, summary)
    assert not published.is_published(config, summary), "MLflow has no database yet"
    (config.output / "mlflow.db").touch()
    monkeypatch.setattr(Study, "__init__", lambda *_, **__: pytest.fail("the study is opened"))
    assert main(["run", "--json", str(finished)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["winner"] == summary.winner.label and answer["cost"]["forward_equivalents"] == summary.forwards
