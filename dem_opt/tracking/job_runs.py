"""MLflow runs that are no trials: fine-tunings with their curves, models trained on mixtures, scores on tasks."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from dem_opt.errors import shorten
from dem_opt.storage.engine import masked
from dem_opt.tracking.mlflow_client import connected

_KIND, _KEY = "dem_opt.kind", "dem_opt.key"
_BATCH = 500
"""Metrics that are sent at a time: MLflow takes at most 1000."""


@dataclass(frozen=True)
class Note:
    """A run as it is so far.

    kind    what it is of: "fine-tuning", "data mixing", "downstream"
    key     tells it from others of its kind: the same key is the same run
    curve   (metric, value, step)
    status  RUNNING, FINISHED or FAILED
    """

    kind: str
    name: str
    key: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[str, float, int], ...] = ()
    status: str = "FINISHED"


@final
class JobRun:
    """Writes notes into MLflow, in one thread of its own; a failure is one warning, and nothing fails with it."""

    def __init__(self, uri: str, experiment: str, artifacts: Path, warn: Callable[[str], None]) -> None:
        self._place, self._warn = (uri, experiment, artifacts), warn
        self._runs: _Runs | None = None
        self._out = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def write(self, note: Note) -> None:
        """Queues a run, or what is new of it."""
        self._thread.submit(self._report, self._thread.submit(self._write, note))

    def close(self) -> None:
        """Waits for what is queued."""
        self._thread.shutdown()

    def _write(self, note: Note) -> None:
        if self._runs is None:
            self._runs = _Runs(*self._place)
        self._runs.write(note)

    def _report(self, done: Any) -> None:
        if (error := done.exception()) is not None and not self._out:
            self._out = True
            reason = shorten(masked(f"{type(error).__name__}: {error}".splitlines()[0]), 300)
            self._warn(f"MLflow at {masked(self._place[0])} failed ({reason}); the work goes on without it")


class _Runs:
    """Runs by kind and key, in plain calls that raise whatever MLflow raises."""

    def __init__(self, uri: str, experiment: str, artifacts: Path) -> None:
        self._mlflow, self._client, self._experiment = connected(uri, experiment, artifacts)
        self._known: dict[tuple[str, str], str] = {}
        self._last: dict[tuple[str, str], int] = {}

    def write(self, note: Note) -> None:
        """What is new of a note: its curve from where it was, and its metrics once it is over."""
        run, values = self._find(note), self._mlflow.entities
        now = int(self._client.get_run(run).info.start_time)
        new = [one for one in note.curve if one[2] > self._last.get((run, one[0]), self._seen(run, one[0]))]
        metrics = [values.Metric(name, value, now + step, step) for name, value, step in new]
        metrics += [values.Metric(name, value, now, 0) for name, value in note.metrics.items()]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run, metrics[start : start + _BATCH])
        for name, _, step in new:
            self._last[run, name] = step
        if note.status != "RUNNING":
            self._client.set_terminated(run, note.status)

    def _seen(self, run: str, metric: str) -> int:
        """The last step of a curve that an earlier command wrote."""
        if (run, metric) not in self._last:
            history = self._client.get_metric_history(run, metric)
            self._last[run, metric] = max((point.step for point in history), default=-1)
        return self._last[run, metric]

    def _find(self, note: Note) -> str:
        """The id of the note's run, made where there is none, running where it is."""
        at = note.kind, note.key
        if at not in self._known:
            wanted = f"tags.`{_KIND}` = '{note.kind}' and tags.`{_KEY}` = '{_quoted(note.key)}'"
            found = self._client.search_runs([self._experiment], wanted, max_results=1)
            tags = {_KIND: note.kind, _KEY: note.key}
            run = found[0] if found else self._client.create_run(self._experiment, tags=tags, run_name=note.name)
            self._known[at] = str(run.info.run_id)
            new = [item for item in note.parameters.items() if item[0] not in run.data.params]
            params = [self._mlflow.entities.Param(name, shorten(value, 500)) for name, value in new]
            self._client.log_batch(self._known[at], params=params)
            self._client.update_run(self._known[at], "RUNNING")
        return self._known[at]


def _quoted(text: str) -> str:
    return text.replace("'", "_")
