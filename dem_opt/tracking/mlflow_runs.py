"""A search's runs in MLflow, in plain calls: a parent, a child for each trial and baseline, the winner as a model."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import file_digest, sha256
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import TYPE_CHECKING, Any

from dem_opt.errors import shorten
from dem_opt.tracking.mlflow_client import MlflowStore, connect, key_of
from dem_opt.tracking.protocols import DataSource, Peers, Records, SearchInfo, StudyDescription
from dem_opt.tracking.urls import mlflow_run
from dem_opt.types import HELD_OUT, SEARCH, ResultRow, Score, TrialRecord

if TYPE_CHECKING:
    from mlflow.entities import Run, RunInfo

CHAMPION = "champion"
"""The alias of the registered model's version that holds the winner."""

BEST = "best."
"""Beginning of the names of a search's metrics, which are of its best composite."""

PAGE = 1000
"""Runs that one query returns at most."""

STEPS = 256
"""Largest number of windows, of all corpora together, up to which a trial's windows are logged one by one."""

_STUDY, _UID, _CONTENT = "dem_opt.study", "dem_opt.uid", "dem_opt.content"
_TRIAL, _REASON, _BASELINE = "dem_opt.trial", "dem_opt.reason", "dem_opt.baseline"
_PARENT, _NOTE, _CONTEXT = "mlflow.parentRunId", "mlflow.note.content", "mlflow.data.context"
_ROLE = "role"
_STATE = "dem_opt.state"
"""Tag of a trial's run: "complete", "stopped", "probe", "infeasible" or "failed"; runs of release 0.1.0 have none."""

_OBJECTIVE = "objective_nll"
"""Metric of the composites that may win, in nats per token: sorted by it, the winner comes first."""

_ESTIMATE, _INFEASIBLE = "estimate", "infeasible_nll"
"""Metrics in its place: of a trial that saw some of the windows, and of a composite that violates a constraint."""
_RESET = "dem_opt.reset"
"""Tag of a search whose trials were removed from the study's database."""

_LONGEST_DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""


class MlflowRuns:
    """A search's runs, in plain calls that raise whatever MLflow raises.

    Of the trials that MLflow has, `_logged` maps the finished ones to the ids of their runs, `_begun` the others to
    their runs; `_earlier` are the finished ones that release 0.1.0 logged.
    """

    def __init__(self, store: MlflowStore, search: SearchInfo, peers: Peers) -> None:
        self._store, self._search, self._peers = store, search, peers
        with peers.exclusive():
            self._mlflow, self._client, self._experiment = connect(store)
        with peers.exclusive():
            self._parent = self._find_parent(search.study, search.uid)
            self._set_parameters(search.parameters)
            self._find_children()

    def log_all(self, records: Records) -> None:
        """Log the trials that MLflow lacks, and upgrade those that an earlier release logged."""
        with self._peers.exclusive():
            self._find_children()
            for number, make in records.items():
                if number not in self._logged:
                    self.log(make())
                elif number in self._earlier:
                    self._upgrade(make())

    def _upgrade(self, record: TrialRecord) -> None:
        """Rename the objective of a trial that may not win, in a run of release 0.1.0, and tag the run.

        MLflow can't remove a metric; a later value that is no number takes its place, and is sorted behind all numbers.
        """
        run, (name, value) = self._logged[record.number], _objective_metric(record)
        if record.objective is not None and name != _OBJECTIVE:
            now, metric = int(time() * 1000), self._mlflow.entities.Metric
            renamed = [metric(_OBJECTIVE, nan, now, record.number), metric(name, value, now, record.number)]
            renamed += [metric("standard_error", record.error, now, record.number)] if record.is_partial else []
            self._client.log_batch(run, renamed)
        self._client.set_tag(run, _STATE, _state(record))
        self._earlier.discard(record.number)

    def log(self, record: TrialRecord) -> None:
        """Log a trial in three calls: create, log, end.  Each is safe to repeat where a former driver died."""
        if record.number in self._logged:
            return
        run = self._begun.get(record.number) or self._begin(record)
        values, weights = self._mlflow.entities, record.coefficients.weights
        params = [values.Param(key_of(f"w.{name}"), str(weight)) for name, weight in weights.items()]
        metrics = [values.Metric(*metric, run.start_time, record.number) for metric in _metrics(record)]
        metrics += [values.Metric(key, nll, run.start_time, step) for key, nll, step in _window_metrics(record.scores)]
        self._client.log_batch(run.run_id, metrics, params)
        self._client.set_terminated(run.run_id, "FAILED" if record.objective is None else "FINISHED")
        self._logged[record.number] = run.run_id

    def links(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """Return the URLs of logged trials by number: of all, or of those among `numbers`."""
        logged = self._logged if numbers is None else [number for number in numbers if number in self._logged]
        return {number: self._page_of(self._logged[number]) for number in logged}

    @property
    def page(self) -> str:
        """The parent's URL."""
        return self._page_of(self._parent.info.run_id)

    def _page_of(self, run: str) -> str:
        return mlflow_run(self._store.uri, self._experiment, run)

    def describe(self, description: StudyDescription) -> None:
        """Log facts of the study; they replace earlier ones."""
        parent, values = self._parent.info.run_id, self._mlflow.entities
        page = f"[This search in Optuna Dashboard]({self._search.page})" if self._search.page else ""
        note = "\n\n".join(part for part in (description.note, page) if part)
        tags = dict(description.tags) | ({_NOTE: note} if note else {})
        # MLflow shows of each metric the value of the largest step, then of the latest time, then the largest: all
        # metrics of one description have the same, so those of two winners are never mixed.  A metric that an earlier
        # description had, and this one lacks, becomes no number.
        now, step = int(time() * 1000), description.trials
        former = self._client.get_run(parent).data.metrics if description.metrics else {}
        lacking = {key: nan for key in former if key.startswith(BEST) and key not in description.metrics}
        measured = [values.Metric(key, value, now, step) for key, value in {**lacking, **description.metrics}.items()]
        self._client.log_batch(parent, measured, tags=[values.RunTag(key, value) for key, value in tags.items()])
        if description.data:
            self._client.log_inputs(parent, [_dataset(values, source) for source in description.data])
        for path, content in description.files.items():
            self._log_file(path, content)
        for result in description.baselines:
            self._log_baseline(result)

    def _log_file(self, path: str, content: str | bytes) -> None:
        """Log an artifact of the parent."""
        folder, _, name = path.rpartition("/")
        with TemporaryDirectory(prefix="dem-opt-") as scratch:
            file = Path(scratch, name)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
            self._client.log_artifact(self._parent.info.run_id, str(file), folder or None)

    def _log_baseline(self, result: ResultRow) -> None:
        """Log a baseline as a run, found by its label or created, with the metrics that trials have.

        Where another composite has the label now, as "winner without NAME" does after a new winner, its run replaces
        the former one's: MLflow keeps the first value of a parameter, and the largest of metrics of one step.
        """
        label, values = _baseline_label(result), self._mlflow.entities
        parent = self._parent.info.run_id
        tags = {_PARENT: parent, _ROLE: "baseline", _BASELINE: label, "dem_opt.kind": result.role}
        weights = {key_of(f"w.{name}"): str(weight) for name, weight in (result.coefficients or {}).items()}
        known = []
        for run in self._find_runs(f"tags.`{_PARENT}` = '{parent}' and tags.`{_ROLE}` = 'baseline'"):
            if run.data.tags.get(_BASELINE) != label:
                continue
            if run.data.params.items() <= weights.items():
                known.append(run)
            else:
                self._client.delete_run(run.info.run_id)
        run = known[0] if known else self._client.create_run(self._experiment, tags=tags, run_name=shorten(label, 200))
        start = run.info.start_time
        params = [values.Param(*weight) for weight in weights.items()]
        metrics = [values.Metric(key, value, start, 0) for key, value in result_metrics(result)]
        if result.violation and _OBJECTIVE in run.data.metrics:  # of an earlier release: behind all numbers
            prefixes = ("", "held_out.") if f"held_out.{_OBJECTIVE}" in run.data.metrics else ("",)
            metrics += [values.Metric(f"{prefix}{_OBJECTIVE}", nan, start, 1) for prefix in prefixes]
        metrics += [
            values.Metric(key, nll, start, step) for key, nll, step in _window_metrics(result.scores.get(SEARCH, {}))
        ]
        new = [param for param in params if param.key not in run.data.params]
        self._client.log_batch(run.info.run_id, metrics, new)
        self._client.set_terminated(run.info.run_id)

    def register(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """Make the version that holds the folder's content the champion, and return it; upload it where it is new."""
        model, content = self._search.model, _digest(folder)
        query = f"name = '{model}' and tags.`{_CONTENT}` = '{content}'"
        versions = self._client.search_model_versions(query, max_results=1)
        version = versions[0].version if versions else self._upload(folder, metrics, {**tags, _CONTENT: content})
        self._client.set_registered_model_alias(model, CHAMPION, str(version))
        return str(version)

    def end(self) -> None:
        """Mark the parent as finished."""
        self._client.set_terminated(self._parent.info.run_id)

    def _upload(self, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """Upload a new version.

        Its source is the files' location: MLflow would resolve a `models:/` source by a setting of the process.
        """
        name, parent, values = self._search.model, self._parent.info, self._mlflow.entities
        model = self._client.create_logged_model(
            self._experiment, re.sub(r"[^\w-]", "-", name), parent.run_id, dict(tags)
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(parent.run_id, [values.LoggedModelOutput(model.model_id, 0)])
        created = model.creation_timestamp
        measured = [values.Metric(key, value, created, 0, model.model_id) for key, value in metrics.items()]
        self._client.log_batch(parent.run_id, measured)
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        version = self._client.create_model_version(
            name, model.artifact_location, parent.run_id, dict(tags), model_id=model.model_id
        )
        return str(version.version)

    def _find_parent(self, study: str, uid: str) -> "Run":
        """Return the search's run, found by its tags or created, and set it running."""
        runs = self._find_runs(f"tags.`{_STUDY}` = '{study}' and tags.`{_UID}` = '{uid}'")
        tags = {_STUDY: study, _UID: uid}
        run: Run = runs[-1] if runs else self._client.create_run(self._experiment, tags=tags, run_name=study)
        self._client.update_run(run.info.run_id, "RUNNING")
        return run

    def _set_parameters(self, parameters: Mapping[str, str]) -> None:
        """Log the parameters that the parent lacks: MLflow refuses to change one."""
        new = [(key, value) for key, value in parameters.items() if key not in self._parent.data.params]
        params = [self._mlflow.entities.Param(key, value) for key, value in new]
        self._client.log_batch(self._parent.info.run_id, params=params)

    def _find_children(self) -> None:
        """Sort the trials that MLflow has; delete a second run of a trial, which a repeated request leaves."""
        self._logged: dict[int, str] = {}
        self._begun: dict[int, RunInfo] = {}
        self._earlier = set[int]()
        runs = self._find_runs(f"tags.`{_PARENT}` = '{self._parent.info.run_id}'")
        ended = {"FINISHED", "FAILED"}
        for run in sorted(runs, key=lambda run: run.info.status not in ended):
            if _TRIAL not in run.data.tags:
                continue
            number = int(run.data.tags[_TRIAL])
            if number in self._logged or number in self._begun:
                self._client.delete_run(run.info.run_id)
            elif run.info.status in ended:
                self._logged[number] = run.info.run_id
                if _STATE not in run.data.tags:
                    self._earlier.add(number)
            else:
                self._begun[number] = run.info

    def _begin(self, record: TrialRecord) -> "RunInfo":
        tags = {_PARENT: self._parent.info.run_id, _TRIAL: str(record.number), _STATE: _state(record)}
        if record.reason:
            tags[_REASON] = shorten(record.reason, 500)
        if self._search.trial_page is not None:
            tags[_NOTE] = f"[Trial {record.number} in Optuna Dashboard]({self._search.trial_page(record.number)})"
        run: Run = self._client.create_run(self._experiment, tags=tags, run_name=f"trial-{record.number}")
        return run.info

    def _find_runs(self, query: str) -> "list[Run]":
        return _find_runs(self._client, self._experiment, query)


def mark_reset(store: MlflowStore, is_removed: Callable[[str], bool]) -> None:
    """Tag the parent runs of removed searches; `is_removed` tells one by its name."""
    _, client, experiment = connect(store)
    for run in _find_runs(client, experiment, f"tags.`{_STUDY}` LIKE '%'"):
        if is_removed(run.data.tags[_STUDY]):
            client.set_tag(run.info.run_id, _RESET, "true")


def _find_runs(client: Any, experiment: str, query: str) -> "list[Run]":
    """Return all runs of a query, newest first."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], query, max_results=PAGE, page_token=token)
        runs.extend(page)
        if not (token := page.token):
            return runs


def _metrics(record: TrialRecord) -> list[tuple[str, float]]:
    """Metrics of a trial: nats per token, perplexities, tokens, seconds."""
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
        metrics.append(_objective_metric(record))
    if record.is_partial:
        metrics.append(("standard_error", record.error))
    if measured.batch_tokens:
        metrics.append(("batch_tokens", float(measured.batch_tokens)))
    if record.violation:
        metrics.append(("protect_violation", record.violation))
    return [*metrics, *_losses(record.scores)]


def _losses(scores: Mapping[str, Score], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield NLL in nats per token, perplexity and, where bytes are known, bits per byte on each corpus."""
    for name, score in scores.items():
        yield f"{prefix}nll.{name}", score.nll
        yield f"{prefix}perplexity.{name}", score.perplexity
        if score.bits_per_byte is not None:
            yield f"{prefix}bpb.{name}", score.bits_per_byte


def _state(record: TrialRecord) -> str:
    if record.objective is None:
        return "failed"
    if record.is_partial:
        return record.state
    return "infeasible" if record.violation else "complete"


def _objective_metric(record: TrialRecord) -> tuple[str, float]:
    """The objective under the name that says whether it may win; NaN for a failed trial."""
    names = {"stopped": _ESTIMATE, "probe": _ESTIMATE, "infeasible": _INFEASIBLE}
    return names.get(_state(record), _OBJECTIVE), nan if record.objective is None else record.objective


def _window_metrics(scores: Mapping[str, Score]) -> Iterator[tuple[str, float, int]]:
    """Yield the NLL of each window in nats per token, its number as the step; nothing for more than STEPS windows."""
    if sum(len(score.nats_W) for score in scores.values()) > STEPS:
        return
    for name, score in scores.items():
        for window, (nats, tokens) in enumerate(zip(score.nats_W, score.tokens_W, strict=True)):
            if tokens:
                yield f"window_nll.{name}", nats / tokens, window


def _baseline_label(result: ResultRow) -> str:
    """The name of a baseline's run, by which it is found again."""
    labels = {"single": f"{result.label} alone", "without": f"winner without {result.label}"}
    return labels.get(result.role, result.label)


def result_metrics(result: ResultRow) -> list[tuple[str, float]]:
    """Metrics of a composite: those of trials for the search split, with the prefix `held_out.` for the other.

    A composite that violates a constraint has its objective under another name, also on the held-out split.
    """
    metrics = [("forward_equivalents", result.forwards)]
    if result.violation:
        metrics.append(("protect_violation", result.violation))
    objective = _INFEASIBLE if result.violation else _OBJECTIVE
    for split, prefix in ((SEARCH, ""), (HELD_OUT, "held_out.")):
        if split in result.objective:
            metrics.append((f"{prefix}{objective}", result.objective[split]))
        metrics += _losses(result.scores.get(split, {}), prefix)
    return metrics


def _dataset(values: Any, data: DataSource) -> Any:
    """Return a corpus as MLflow's input of a run."""
    dataset = values.Dataset(
        name=data.name,
        digest=data.digest[:_LONGEST_DIGEST],
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps({"num_rows": data.windows, "rows": "windows of tokens"}),
    )
    return values.DatasetInput(dataset, [values.InputTag(_CONTEXT, data.split)])


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}\0{file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
