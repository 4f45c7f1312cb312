"""A study's runs in MLflow, in plain calls: a parent, a child for each trial and baseline, the winner as a model."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dem_opt.errors import shorten
from dem_opt.tracking.mlflow_client import connected
from dem_opt.tracking.urls import mlflow_run
from dem_opt.types import ResultRow, Score, TrialRecord

if TYPE_CHECKING:
    from mlflow.entities import Run, RunInfo

CHAMPION = "champion"
"""The registered model's alias that points at the winner."""

PAGE = 1000
"""Runs that are asked of MLflow at a time."""

STEPS = 256
"""Windows of all corpora up to which a trial's are logged one by one."""

_STUDY, _UID, _CONTENT = "dem_opt.study", "dem_opt.uid", "dem_opt.content"
_TRIAL, _REASON, _BASELINE = "dem_opt.trial", "dem_opt.reason", "dem_opt.baseline"
_PARENT, _NOTE, _CONTEXT = "mlflow.parentRunId", "mlflow.note.content", "mlflow.data.context"
_ROLE = "role"
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""So that MLflow opens an experiment with its runs, and not with an application's traces."""

_LONGEST_DIGEST = 36

Records = Mapping[int, Callable[[], TrialRecord]]
"""Finished trials by number; a record is made where it is missing."""

Alone = Callable[[], AbstractContextManager[object]]
"""A context in which no other driver of the study is."""


@dataclass(frozen=True)
class Place:
    """Where and as what a study is written down.

    model       the name under which the winner is registered
    study, uid  name and unique identity of the Optuna study: together they find the parent run again
    artifacts   where a new experiment in a database keeps its files; a server decides for itself
    parameters  of the parent run; MLflow keeps the first value of each
    patience    seconds that `close` waits for what is still queued
    board       a trial's number -> its page in Optuna Dashboard
    home        the search's page there
    """

    uri: str
    experiment: str
    model: str
    study: str
    uid: str
    artifacts: Path
    parameters: Mapping[str, str]
    patience: float = 180.0
    board: Callable[[int], str] | None = None
    home: str = ""


@dataclass(frozen=True)
class Data:
    """A corpus of a split as MLflow is told of it: where it is from, the hash of its windows, how many there are."""

    name: str
    split: str
    source: str
    digest: str
    windows: int


@dataclass(frozen=True)
class StudyDescription:
    """What is known of a study beside its trials.

    tags       of the parent run
    note       Markdown, which MLflow shows as the parent's description; none where empty
    data       the corpora that it is scored on
    files      artifacts of the parent by path
    metrics    of the parent
    baselines  composites that are runs of their own, in the columns of trials
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    data: Sequence[Data] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    baselines: Sequence[ResultRow] = ()


class MlflowRuns:
    """A study's runs, in plain calls that raise whatever MLflow raises.

    Of the trials MLflow has, `_logged` are finished, with their runs' ids, and `_begun` were left in the middle.
    """

    def __init__(self, place: Place, alone: Alone) -> None:
        self._alone = alone
        with alone():
            self._mlflow, self._client, self._experiment = connected(place.uri, place.experiment, place.artifacts)
        self._model, self._board, self._uri, self._home = place.model, place.board, place.uri, place.home
        with alone():
            self._parent = self._find_parent(place.study, place.uid)
            self._set_parameters(place.parameters)
            self._find_children()

    def log_all(self, records: Records) -> None:
        """Logs the trials that MLflow lacks."""
        with self._alone():
            self._find_children()
            for number, make in records.items():
                if number not in self._logged:
                    self.log(make())

    def log(self, record: TrialRecord) -> None:
        """Three calls: create, log, end.  All are safe to repeat from where a former driver died."""
        if record.number in self._logged:
            return
        run = self._begun.get(record.number) or self._begin(record)
        values, weights = self._mlflow.entities, record.coefficients.weights
        params = [values.Param(f"w.{name}", str(weight)) for name, weight in weights.items()]
        metrics = [values.Metric(*metric, run.start_time, record.number) for metric in _metrics(record)]
        metrics += [values.Metric(key, nll, run.start_time, step) for key, nll, step in _window_metrics(record.scores)]
        self._client.log_batch(run.run_id, metrics, params)
        self._client.set_terminated(run.run_id, "FAILED" if record.objective is None else "FINISHED")
        self._logged[record.number] = run.run_id

    def links(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """Pages of the runs of trials, of all that MLflow has unless numbers are given."""
        wanted = self._logged if numbers is None else [number for number in numbers if number in self._logged]
        return {number: mlflow_run(self._uri, self._experiment, self._logged[number]) for number in wanted}

    @property
    def page(self) -> str:
        """The parent's page."""
        return mlflow_run(self._uri, self._experiment, self._parent.info.run_id)

    def describe(self, study_description: StudyDescription) -> None:
        """Writes down what is known of the study; what is there already gives way to it."""
        parent, values = self._parent.info.run_id, self._mlflow.entities
        home = f"[This search in Optuna Dashboard]({self._home})" if self._home else ""
        note = "\n\n".join(part for part in (study_description.note, home) if part)
        tags = dict(study_description.tags) | ({_NOTE: note} if note else {})
        now = self._parent.info.start_time
        measured = [values.Metric(key, value, now, 0) for key, value in study_description.metrics.items()]
        self._client.log_batch(parent, measured, tags=[values.RunTag(key, value) for key, value in tags.items()])
        if study_description.data:
            self._client.log_inputs(parent, [_dataset(values, one) for one in study_description.data])
        for path, content in study_description.files.items():
            self._log_file(path, content)
        for result in study_description.baselines:
            self._log_baseline(result)

    def _log_file(self, path: str, content: str | bytes) -> None:
        """An artifact of the parent."""
        folder, _, name = path.rpartition("/")
        with TemporaryDirectory(prefix="dem-opt-") as place:
            file = Path(place, name)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
            self._client.log_artifact(self._parent.info.run_id, str(file), folder or None)

    def _log_baseline(self, result: ResultRow) -> None:
        """A baseline's run, found by its label or made: scores of the search split in the columns of trials."""
        label, values = _of_baseline(result), self._mlflow.entities
        parent = self._parent.info.run_id
        tags = {_PARENT: parent, _ROLE: "baseline", _BASELINE: label, "dem_opt.kind": result.role}
        known = [
            run
            for run in self._search(f"tags.`{_PARENT}` = '{parent}' and tags.`{_ROLE}` = 'baseline'")
            if run.data.tags.get(_BASELINE) == label
        ]
        run = known[0] if known else self._client.create_run(self._experiment, tags=tags, run_name=shorten(label, 200))
        began, weights = run.info.start_time, result.coefficients.weights if result.coefficients else {}
        params = [values.Param(f"w.{name}", str(weight)) for name, weight in weights.items()]
        metrics = [values.Metric(key, value, began, 0) for key, value in result_metrics(result)]
        metrics += [
            values.Metric(key, nll, began, step) for key, nll, step in _window_metrics(result.scores.get("search", {}))
        ]
        self._client.log_batch(run.info.run_id, metrics, [one for one in params if one.key not in run.data.params])
        self._client.set_terminated(run.info.run_id)

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """The version that holds the folder's content, the champion from now on."""
        content = _digest(folder)
        same = f"name = '{self._model}' and tags.`{_CONTENT}` = '{content}'"
        found = self._client.search_model_versions(same, max_results=1)
        version = found[0].version if found else self._upload(folder, metrics, {**tags, _CONTENT: content})
        self._client.set_registered_model_alias(self._model, CHAMPION, str(version))
        return str(version)

    def end(self) -> None:
        """Ends the parent."""
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
        self._logged: dict[int, str] = {}
        self._begun: dict[int, RunInfo] = {}
        runs = self._search(f"tags.`{_PARENT}` = '{self._parent.info.run_id}'")
        ended = {"FINISHED", "FAILED"}
        for run in sorted(runs, key=lambda run: run.info.status not in ended):
            if _TRIAL not in run.data.tags:
                continue
            number = int(run.data.tags[_TRIAL])
            if number in self._logged or number in self._begun:
                self._client.delete_run(run.info.run_id)
            elif run.info.status in ended:
                self._logged[number] = run.info.run_id
            else:
                self._begun[number] = run.info

    def _begin(self, record: TrialRecord) -> "RunInfo":
        tags = {_PARENT: self._parent.info.run_id, _TRIAL: str(record.number)}
        if record.reason:
            tags[_REASON] = shorten(record.reason, 500)
        if self._board is not None:
            tags[_NOTE] = f"[Trial {record.number} in Optuna Dashboard]({self._board(record.number)})"
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


def _window_metrics(scores: Mapping[str, Score]) -> Iterator[tuple[str, float, int]]:
    """NLL of each window in nats per token, its number as the step; nothing where there are more than STEPS."""
    if sum(len(score.nats_W) for score in scores.values()) > STEPS:
        return
    for name, score in scores.items():
        for window, (nats, tokens) in enumerate(zip(score.nats_W, score.tokens_W, strict=True)):
            if tokens:
                yield f"window_nll.{name}", nats / tokens, window


def _of_baseline(result: ResultRow) -> str:
    """What a baseline's run is called."""
    return {"single": f"{result.label} alone", "without": f"winner without {result.label}"}.get(
        result.role, result.label
    )


def result_metrics(result: ResultRow) -> list[tuple[str, float]]:
    """Scores on the search split in the columns of trials, and those on the held-out split beside them."""
    metrics = [("forward_equivalents", result.forwards)]
    for split, prefix in (("search", ""), ("held_out", "held_out.")):
        if split in result.objective:
            metrics.append((f"{prefix}objective_nll", result.objective[split]))
        for name, score in result.scores.get(split, {}).items():
            metrics += [(f"{prefix}nll.{name}", score.nll), (f"{prefix}perplexity.{name}", score.perplexity)]
    return metrics


def _dataset(values: Any, data: Data) -> Any:
    """A corpus as an input of a run."""
    made = values.Dataset(
        name=data.name,
        digest=data.digest[:_LONGEST_DIGEST],
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps({"num_rows": data.windows, "rows": "windows of tokens"}),
    )
    return values.DatasetInput(made, [values.InputTag(_CONTEXT, data.split)])


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}\0{file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
