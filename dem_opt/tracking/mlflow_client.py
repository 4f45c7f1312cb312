"""MLflow and a client of it, without telemetry and chatter, impatient with a server that is away."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dem_opt.atomic import publish_new
from dem_opt.storage.engine import connect

_SQLITE = "sqlite:///"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def connected(uri: str, experiment: str, artifacts: Path) -> tuple[Any, Any, str]:
    """MLflow, a client, and the id of an experiment, made where it is missing; raises whatever MLflow raises.

    artifacts  where a new experiment in a database keeps its files; a server decides for itself
    """
    mlflow = _import_mlflow()
    make_database(uri)
    if in_database := uri.startswith(("sqlite", "postgresql")):
        connect(uri, "tracking.uri").dispose()
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return mlflow, client, str(found.experiment_id)
    location = artifacts.absolute().as_uri() if in_database else None
    return mlflow, client, str(client.create_experiment(experiment, artifact_location=location))


def make_database(uri: str) -> None:
    """MLflow's tables where `uri` names a file that is missing, whole or not at all, whoever else makes them.

    MLflow can't go on with a file that it left half-made, nor can two of its processes make one together.
    """
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        own = f"{_SQLITE}{folder}/new.db"
        _import_mlflow().MlflowClient(tracking_uri=own, registry_uri=own).search_experiments(max_results=1)
        publish_new(Path(folder, "new.db"), path)


def _import_mlflow() -> Any:
    """MLflow without telemetry and chatter, impatient with a server that is away; the user's settings win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow
