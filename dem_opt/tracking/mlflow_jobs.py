"""MLflow runs that are no trials: fine-tunings with their curves, models of data mixtures, scores on tasks."""

from collections.abc import Callable
from typing import final

from dem_opt.errors import shorten
from dem_opt.storage.engine import masked
from dem_opt.tracking.background_writer import BackgroundWriter, reason_of
from dem_opt.tracking.mlflow_client import MlflowStore, connect, key_of
from dem_opt.tracking.mlflow_runs import mark_reset
from dem_opt.tracking.protocols import JobNote

_KIND, _KEY = "dem_opt.kind", "dem_opt.key"
_BATCH = 500
"""Metrics sent in one call: MLflow takes at most 1000."""


@final
class MlflowJobTracker:
    """The log of work that is no trial.  The first failure costs a warning."""

    def __init__(self, store: MlflowStore, warn: Callable[[str], None]) -> None:
        self._store, self._warn = store, warn
        self._runs: _JobRuns | None = None
        self._has_failed = False
        self._writer = BackgroundWriter(self)

    def write(self, note: JobNote) -> None:
        """Queue a run, or what is new of it."""
        self._writer.submit(lambda: self._write(note))

    def mark_reset(self, is_removed: Callable[[str], bool]) -> None:
        """Queue the tags of searches whose trials were removed."""
        self._writer.submit(lambda: mark_reset(self._store, is_removed))

    def close(self) -> bool:
        """Wait for the queue."""
        self._writer.close(self._writer.submit(lambda: None))
        return not self._has_failed

    def succeeded(self) -> None:
        """Expect the next work to succeed too."""

    def failed(self, error: Exception) -> None:
        """Warn, once."""
        if not self._has_failed:
            self._has_failed = True
            self._warn(f"MLflow at {masked(self._store.uri)} failed ({reason_of(error)}); the work goes on without it")

    def _write(self, note: JobNote) -> None:
        if self._runs is None:
            self._runs = _JobRuns(self._store)
        self._runs.write(note)


class _JobRuns:
    """Runs by kind and key, in plain calls that raise whatever MLflow raises."""

    def __init__(self, store: MlflowStore) -> None:
        self._mlflow, self._client, self._experiment = connect(store)
        self._run_ids: dict[tuple[str, str], str] = {}
        self._last_steps: dict[tuple[str, str], int] = {}

    def write(self, note: JobNote) -> None:
        """Log what is new of a note: its curve since the last call, and its metrics."""
        run, values = self._find(note), self._mlflow.entities
        start = int(self._client.get_run(run).info.start_time)
        points = [point for point in note.curve if point[2] > self._last_step(run, point[0])]
        metrics = [values.Metric(name, value, start + step, step) for name, value, step in points]
        metrics += [values.Metric(name, value, start, 0) for name, value in note.metrics.items()]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(run, metrics[first : first + _BATCH])
        for name, _, step in points:
            self._last_steps[run, name] = step
        if note.status != "RUNNING":
            self._client.set_terminated(run, note.status)

    def _last_step(self, run: str, metric: str) -> int:
        """The last logged step of a curve, of which an earlier command may have written a part."""
        if (run, metric) not in self._last_steps:
            history = self._client.get_metric_history(run, metric)
            self._last_steps[run, metric] = max((point.step for point in history), default=-1)
        return self._last_steps[run, metric]

    def _find(self, note: JobNote) -> str:
        """Return the id of the note's run, which is created where it is missing, and set running."""
        identity = note.kind, note.key
        if identity not in self._run_ids:
            query = f"tags.`{_KIND}` = '{note.kind}' and tags.`{_KEY}` = '{_quoted(note.key)}'"
            runs = self._client.search_runs([self._experiment], query, max_results=1)
            tags = {_KIND: note.kind, _KEY: note.key}
            run = runs[0] if runs else self._client.create_run(self._experiment, tags=tags, run_name=note.name)
            run_id = self._run_ids[identity] = str(run.info.run_id)
            parameters = {key_of(name): shorten(value, 500) for name, value in note.parameters.items()}
            new = [item for item in parameters.items() if item[0] not in run.data.params]
            params = [self._mlflow.entities.Param(*item) for item in new]
            self._client.log_batch(run_id, params=params)
            self._client.update_run(run_id, "RUNNING")
        return self._run_ids[identity]


def _quoted(text: str) -> str:
    return text.replace("'", "_")
