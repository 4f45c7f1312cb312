"""MLflow: a run for every trial, the winner as a registered model."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, final

from dem_opt.database import connect, masked
from dem_opt.errors import shorten
from dem_opt.records import TrialRecord

if TYPE_CHECKING:
    from mlflow.entities import Run, RunInfo

T = TypeVar("T")

CHAMPION = "champion"
"""The registered model's alias that points at the winner."""

PATIENCE = 180.0
"""Seconds that `close` waits for what is still queued."""

QUEUE = 1000
"""Trials that wait to be written at most; what comes then is left to the next run's `reconcile`."""

PAGE = 1000
"""Runs that are asked of MLflow at a time."""

_STUDY, _UID, _CONTENT = "dem_opt.study", "dem_opt.uid", "dem_opt.content"
_TRIAL, _REASON = "dem_opt.trial", "dem_opt.reason"
_PARENT = "mlflow.parentRunId"
_SQLITE = "sqlite:///"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


class Tracker(Protocol):
    """Who writes a study down for people to look at.  None of it may fail a study."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial was told.  Returns at once."""

    def reconcile(self, records: Sequence[TrialRecord]) -> None:
        """Writes down what is missing of these trials, each exactly once.  Returns at once."""

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Registers a checkpoint folder as the champion; its version, or None where that failed."""

    def close(self) -> None:
        """Waits for what is still to be written, but not for ever."""


@dataclass(frozen=True)
class Place:
    """Where and as what a study is written down.

    model       the name under which the winner is registered
    study, uid  name and unique identity of the Optuna study: together they find the parent run again
    artifacts   where a new experiment in a database keeps its files; a server decides for itself
    parameters  of the parent run; MLflow keeps the first value of each
    """

    uri: str
    experiment: str
    model: str
    study: str
    uid: str
    artifacts: Path
    parameters: Mapping[str, str]


@final
class MlflowTracker:
    """A study in MLflow: one parent run, a child run for each trial, the winner as a registered model.

    All of MLflow, its import included, happens in one thread of its own.  Whatever fails there becomes one
    warning for each outage; the next `reconcile` logs what is missing.

    warn  is called with one line, from the thread
    """

    def __init__(self, place: Place, warn: Callable[[str], None]) -> None:
        self._open = partial(_Runs, place)
        self._name, self._warn = f"MLflow at {masked(place.uri)}", warn
        self._runs: _Runs | None = None
        self._out = self._is_behind = False
        self._room = Semaphore(QUEUE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._submit(self._opened)

    def trial_ended(self, record: TrialRecord) -> None:
        """Queues the trial's run; where the queue is full, lets it be, with one warning."""
        if self._room.acquire(blocking=False):
            self._submit(lambda: self._log(record))
        elif not self._is_behind:
            self._is_behind = True
            self._warn(f"{self._name} is too slow; the study goes on, the next run logs what is missing")

    def reconcile(self, records: Sequence[TrialRecord]) -> None:
        """Queues the runs that MLflow lacks, and the end of those that were begun only."""
        known = tuple(records)
        self._submit(lambda: self._opened().log_all(known))

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Registers a checkpoint folder under the model's name, with the alias "champion".

        Waits for it.  A folder of the same content is registered once: its first version becomes the champion
        again.  None where MLflow failed.
        """
        return self._submit(lambda: self._opened().register(folder, metrics, tags)).result()

    def close(self) -> None:
        """Waits at most PATIENCE seconds for the queue, and ends the parent run."""
        ended = self._submit(self._end)
        wait([ended], PATIENCE)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if not ended.done():
            self._warn(f"{self._name} is too slow; the next run logs what is missing")

    def _submit(self, job: Callable[[], T]) -> "Future[T | None]":
        """Queues a job and a report on it: what the job returned, or None where it failed."""
        return self._thread.submit(self._report, self._thread.submit(job))

    def _report(self, done: "Future[T]") -> T | None:
        """Warns of the first failure of an outage, after which the next job begins by connecting anew."""
        error = done.exception()
        if error is None:
            self._out = False
            return done.result()
        if not self._out:
            reason = shorten(masked(f"{type(error).__name__}: {error}".splitlines()[0]), 300)
            self._warn(f"{self._name} failed ({reason}); the study goes on, the next run logs what is missing")
        self._out, self._runs = True, None
        return None

    def _log(self, record: TrialRecord) -> None:
        try:
            self._opened().log(record)
        finally:
            self._room.release()

    def _opened(self) -> "_Runs":
        if self._runs is None:
            self._runs = self._open()
        return self._runs

    def _end(self) -> None:
        if self._runs is not None:
            self._runs.end()


class _Runs:
    """A study's runs, in plain calls that raise whatever MLflow raises.

    Of the trials MLflow has, `_logged` are finished and `_begun` were left in the middle.
    """

    def __init__(self, place: Place) -> None:
        self._mlflow, self._client, self._experiment = connected(place.uri, place.experiment, place.artifacts)
        self._model = place.model
        self._parent = self._find_parent(place.study, place.uid)
        self._set_parameters(place.parameters)
        self._logged: set[int] = set()
        self._begun: dict[int, RunInfo] = {}
        self._find_children()

    def log_all(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            self.log(record)

    def log(self, record: TrialRecord) -> None:
        """Three calls: create, log, end.  All are safe to repeat from where a former driver died."""
        if record.number in self._logged:
            return
        run = self._begun.get(record.number) or self._begin(record)
        values, weights = self._mlflow.entities, record.coefficients.weights
        params = [values.Param(f"w.{name}", str(weight)) for name, weight in weights.items()]
        metrics = [values.Metric(*metric, run.start_time, record.number) for metric in _metrics(record)]
        self._client.log_batch(run.run_id, metrics, params)
        self._client.set_terminated(run.run_id, "FAILED" if record.objective is None else "FINISHED")
        self._logged.add(record.number)

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """The version that holds the folder's content, the champion from now on."""
        content = _digest(folder)
        same = f"name = '{self._model}' and tags.`{_CONTENT}` = '{content}'"
        found = self._client.search_model_versions(same, max_results=1)
        version = found[0].version if found else self._upload(folder, metrics, {**tags, _CONTENT: content})
        self._client.set_registered_model_alias(self._model, CHAMPION, str(version))
        return str(version)

    def end(self) -> None:
        self._client.set_terminated(self._parent.info.run_id)

    def _upload(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """A new version.

        It names its files by their location, since MLflow resolves a `models:/` source by a global setting.
        """
        parent, values = self._parent.info, self._mlflow.entities
        model = self._client.create_logged_model(
            self._experiment, re.sub(r"[^\w-]", "-", self._model), parent.run_id, dict(tags)
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(parent.run_id, [values.LoggedModelOutput(model.model_id, 0)])
        now = model.creation_timestamp
        measured = [values.Metric(key, value, now, 0, model.model_id) for key, value in metrics.items()]
        self._client.log_batch(parent.run_id, measured)
        if not self._client.search_registered_models(f"name = '{self._model}'"):
            self._client.create_registered_model(self._model)
        made = self._client.create_model_version(
            self._model, model.artifact_location, parent.run_id, dict(tags), model_id=model.model_id
        )
        return str(made.version)

    def _find_parent(self, study: str, uid: str) -> "Run":
        """The study's run, found by its tags and running again, or made."""
        found = self._search(f"tags.`{_STUDY}` = '{study}' and tags.`{_UID}` = '{uid}'")
        tags = {_STUDY: study, _UID: uid}
        run: Run = found[-1] if found else self._client.create_run(self._experiment, tags=tags, run_name=study)
        self._client.update_run(run.info.run_id, "RUNNING")
        return run

    def _set_parameters(self, parameters: Mapping[str, str]) -> None:
        """Adds the parameters that the parent lacks: MLflow's are written once."""
        new = [(key, value) for key, value in parameters.items() if key not in self._parent.data.params]
        params = [self._mlflow.entities.Param(key, value) for key, value in new]
        self._client.log_batch(self._parent.info.run_id, params=params)

    def _find_children(self) -> None:
        """Sorts the trials that MLflow has; a second run of one, left by a request sent twice, is deleted."""
        runs = self._search(f"tags.`{_PARENT}` = '{self._parent.info.run_id}'")
        ended = {"FINISHED", "FAILED"}
        for run in sorted(runs, key=lambda run: run.info.status not in ended):
            if _TRIAL not in run.data.tags:
                continue
            number = int(run.data.tags[_TRIAL])
            if number in self._logged or number in self._begun:
                self._client.delete_run(run.info.run_id)
            elif run.info.status in ended:
                self._logged.add(number)
            else:
                self._begun[number] = run.info

    def _begin(self, record: TrialRecord) -> "RunInfo":
        tags = {_PARENT: self._parent.info.run_id, _TRIAL: str(record.number)}
        if record.reason:
            tags[_REASON] = shorten(record.reason, 500)
        run: Run = self._client.create_run(self._experiment, tags=tags, run_name=f"trial-{record.number}")
        return run.info

    def _search(self, wanted: str) -> "list[Run]":
        """All runs, page by page, newest first."""
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs([self._experiment], wanted, max_results=PAGE, page_token=token)
            runs.extend(page)
            if not (token := page.token):
                return runs


def connected(uri: str, experiment: str, artifacts: Path) -> tuple[Any, Any, str]:
    """MLflow, a client, and the id of an experiment, made where it is missing; raises whatever MLflow raises.

    artifacts  where a new experiment in a database keeps its files; a server decides for itself
    """
    mlflow = _import_mlflow()
    if uri.startswith(_SQLITE):
        _make_database(mlflow, Path(uri.removeprefix(_SQLITE)))
    if in_database := uri.startswith(("sqlite", "postgresql")):
        connect(uri, "tracking.uri").dispose()
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return mlflow, client, str(found.experiment_id)
    location = artifacts.absolute().as_uri() if in_database else None
    return mlflow, client, str(client.create_experiment(experiment, artifact_location=location))


def _import_mlflow() -> Any:
    """MLflow without telemetry and chatter, impatient with a server that is away; the user's settings win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _make_database(mlflow: Any, path: Path) -> None:
    """MLflow's tables in a new file, whole or not at all: MLflow can't go on with a file that it left half-made."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        uri = f"{_SQLITE}{folder}/new.db"
        mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        if not path.exists():
            Path(folder, "new.db").rename(path)


def _metrics(record: TrialRecord) -> list[tuple[str, float]]:
    """The trial's metrics: nats per token, perplexities, tokens, seconds."""
    measured = record.evaluation
    metrics = [
        ("forward_tokens", float(measured.forward_tokens)),
        ("scored_tokens", float(measured.scored_tokens)),
        ("merge_seconds", measured.merge_seconds),
        ("score_seconds", measured.score_seconds),
        ("wait_seconds", measured.wait_seconds),
        ("propose_seconds", record.propose_seconds),
    ]
    if record.objective is not None:
        metrics.append(("objective_nll", record.objective))
    if measured.batch_tokens:
        metrics.append(("batch_tokens", float(measured.batch_tokens)))
    if record.violation:
        metrics.append(("protect_violation", record.violation))
    for name, score in record.scores.items():
        metrics += [(f"nll.{name}", score.nll), (f"perplexity.{name}", score.perplexity)]
    return metrics


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}\0{file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
