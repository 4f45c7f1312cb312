"""Connections to MLflow: without telemetry and chatter, and with short timeouts."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dem_opt.atomic import publish_new
from dem_opt.storage import engine

_SQLITE = "sqlite:///"
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


def connect(store: MlflowStore) -> tuple[Any, Any, str]:
    """Connect to a store; the experiment is created where it is missing.

    Returns:
        The mlflow module, a client, and the experiment's id.

    Raises:
        Exception: Whatever MLflow raises.
    """
    mlflow = _import_mlflow()
    make_database(store.uri)
    if in_database := store.uri.startswith(("sqlite", "postgresql")):
        engine.connect(store.uri, "tracking.uri").dispose()
    client = mlflow.MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)
    experiment = client.get_experiment_by_name(store.experiment)
    if experiment is not None:
        return mlflow, client, str(experiment.experiment_id)
    location = store.artifacts.absolute().as_uri() if in_database else None
    return mlflow, client, str(client.create_experiment(store.experiment, artifact_location=location))


def make_database(uri: str) -> None:
    """Create MLflow's tables in an SQLite file that does not exist yet, safely beside other processes.

    MLflow cannot continue with a file that it left half-made, nor can two of its processes create one together: so
    the tables are made in a file of this process, which then gets its name.
    """
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        uri = f"{_SQLITE}{folder}/new.db"
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
