"""Where the two dashboards answer on this machine, and the links into them that notes carry."""

from hashlib import sha256
from urllib.parse import quote, urlsplit, urlunsplit

LOOPBACK = "127.0.0.1"

_FIRST, _COUNT = 20_000, 10_000
"""Ports below those that systems give to outgoing connections."""


def preferred_port(uri: str) -> int:
    """The port that serves a database's contents: always the same, if it is free.

    So a link that was written while a study ran still works when its dashboards are started a week later.
    """
    return _FIRST + int.from_bytes(sha256(uri.encode()).digest()[:8]) % _COUNT


def is_server(uri: str) -> bool:
    """True if a tracking URI is the address of a server."""
    return urlsplit(uri).scheme in ("http", "https")


def without_login(url: str) -> str:
    """A URL without user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def address_of(uri: str) -> str:
    """Where a browser finds what is in a database, or a server: without a slash at its end."""
    return without_login(uri).rstrip("/") if is_server(uri) else f"http://{LOOPBACK}:{preferred_port(uri)}"


def mlflow_run(uri: str, experiment: str, run: str) -> str:
    """The page of a run."""
    return f"{address_of(uri)}/#/experiments/{experiment}/runs/{run}"


def mlflow_model(uri: str, name: str) -> str:
    """The page of a registered model."""
    return f"{address_of(uri)}/#/models/{quote(name, safe='')}"


def optuna_study(uri: str, study: int) -> str:
    """The page of a study in Optuna Dashboard."""
    return f"{address_of(uri)}/dashboard/studies/{study}"


def optuna_trial(uri: str, study: int, number: int) -> str:
    """The page of a trial in Optuna Dashboard."""
    return f"{optuna_study(uri, study)}/trials?numbers={number}"
