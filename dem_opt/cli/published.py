"""The results that both dashboards show, as a digest in the study's output folder: they are written there once."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from dem_opt.atomic import write_text
from dem_opt.cli import json_output
from dem_opt.config import StudyConfig
from dem_opt.json_files import find_json

if TYPE_CHECKING:
    from dem_opt.types import Summary

FILE = "published.json"
"""The file in a study's output folder."""


@dataclass(frozen=True)
class _Published:
    """Digest of the results, and the URL of MLflow, which had all trials too; without its password."""

    results: str
    tracking: str


def keep(config: StudyConfig, summary: "Summary") -> None:
    """Keep that both dashboards have these results; a folder that can't be written stays without it."""
    with suppress(OSError):
        write_text(config.output / FILE, json.dumps(asdict(_published(config, summary))) + "\n")


def is_published(config: StudyConfig, summary: "Summary") -> bool:
    """True if both dashboards have these results, and MLflow's database is still there."""
    from dem_opt.storage.engine import is_there
    from dem_opt.tracking.urls import is_server

    uri = config.tracking.uri
    is_same = find_json(config.output / FILE, _Published) == _published(config, summary)
    return is_same and (is_server(uri) or is_there(uri))


def _published(config: StudyConfig, summary: "Summary") -> _Published:
    from dem_opt.storage.engine import masked

    results = {key: value for key, value in json_output.of_summary(summary).items() if key != "cost"}
    return _Published(sha256(json.dumps(results).encode()).hexdigest(), masked(config.tracking.uri))
