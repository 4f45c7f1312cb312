"""Connections to MLflow: without telemetry and chatter, and with short timeouts."""

import logging
import os
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from dem_opt.atomic import publish_new
from dem_opt.config import sqlite_url
from dem_opt.storage import engine

_LOCATIONS = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}
"""Columns of MLflow's tables in which the place of files stands, as an absolute URI."""

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


@dataclass(frozen=True, kw_only=True)
class MlflowStore:
    """An experiment of an MLflow server or database.

    Attributes:
        uri: Tracking and registry URI.
        experiment: Name of the experiment.
        artifacts: Where a new experiment in a database keeps its files; a server decides for itself.
    """

    uri: str
    experiment: str
    artifacts: Path


def key_of(name: str) -> str:
    """A name as a key of a parameter: MLflow takes no `@`, so the step `w.code@20` is `w.code:20`."""
    return name.replace("@", ":")


def connect(store: MlflowStore) -> tuple[Any, Any, str]:
    """Connect to a store; the experiment is created where it is missing.

    Where the folder of a database and its files was moved or copied, MLflow is told where the files are now.

    Returns:
        The mlflow module, a client, and the experiment's id.

    Raises:
        Exception: Whatever MLflow raises.
    """
    mlflow = _import_mlflow()
    make_database(store.uri)
    if in_database := store.uri.startswith(("sqlite", "postgresql")):
        engine.connect(store.uri, "tracking.uri").dispose()
    follow_artifacts(store)
    client = mlflow.MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)
    experiment = client.get_experiment_by_name(store.experiment)
    if experiment is not None:
        return mlflow, client, str(experiment.experiment_id)
    location = store.artifacts.absolute().as_uri() if in_database else None
    return mlflow, client, str(client.create_experiment(store.experiment, artifact_location=location))


def follow_artifacts(store: MlflowStore) -> None:
    """Have an SQLite database that was moved or copied with its files name the place where they are now.

    MLflow stores absolute places.  All those below the experiment's are changed: its runs, models and their versions.

    Raises:
        InputError: The database can't be opened.
    """
    file = engine.sqlite_file(store.uri)
    if file is None or not file.is_file():
        return
    connected = engine.connect(store.uri, "tracking.uri")
    try:
        location = engine.look_up(connected, "experiments", "artifact_location", "name", store.experiment)
        old, new = _local_folder(location or ""), store.artifacts.absolute()
        if old is not None and old != new and _moved_together(file.absolute(), old, new):
            engine.replace_beginnings(connected, _LOCATIONS, location.rstrip("/"), new.as_uri())
    finally:
        connected.dispose()


def _local_folder(location: str) -> Path | None:
    """The folder of a file URI, or an absolute path; None for anything else."""
    parts = urlsplit(location)
    path = Path(unquote(parts.path)) if parts.scheme == "file" else Path(location)
    return path if path.is_absolute() else None


def _moved_together(database: Path, old: Path, new: Path) -> bool:
    """The folder that holds both files and database has another place now: it was moved, or copied.

    The paths of the files end alike before and after.  What is before the common end was the folder's place, and is it
    now; the database must be in it, or else only `output` was changed in the study file.
    """
    ends = zip(reversed(old.parts), reversed(new.parts), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    root = new.parents[common - 1] if common else new
    return database.is_relative_to(root) and (new.exists() or not old.exists())


def make_database(uri: str) -> None:
    """Create MLflow's tables in an SQLite file that does not exist yet, safely beside other processes.

    MLflow cannot continue with a file that it left half-made, nor can two of its processes create one together: so
    the tables are made in a file of this process, which then gets its name.
    """
    path = engine.sqlite_file(uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        uri = sqlite_url(Path(folder, "new.db"))
        _import_mlflow().MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        publish_new(Path(folder, "new.db"), path)


def _import_mlflow() -> Any:
    """Import MLflow with `_SETTINGS`; environment variables that the user has set win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow
