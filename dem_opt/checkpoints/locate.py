"""Hub ids -> folders: the local cache, or a download where the study names the id and there is a network."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dem_opt.checkpoints.convert import converted
from dem_opt.checkpoints.training_record import step_folder
from dem_opt.config import ModelSource
from dem_opt.errors import InputError

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
"""The files of a repository that are fetched: no pickled weights, no code."""

PATIENCE = 10.0
"""Seconds in which the hub must answer."""


def locate(source: ModelSource, field: str) -> Path:
    """The folder of a model: its path, a kept step of a run, or where the cache keeps its hub id's revision.

    Raises InputError for an id that is neither in the cache nor to be had, and for a step that was not kept.
    """
    if source.run is not None and source.step is not None:
        return step_folder(source.run, source.step, field)
    folder = source.path if source.hub is None else _cached(source, source.hub, field)
    assert folder is not None
    return converted(folder, field) if source.pickled else folder


def _cached(source: ModelSource, hub: str, field: str) -> Path:
    """The cache's folder of a hub id, fetched where it is not there."""
    wanted = [*WANTED, "*.bin"] if source.pickled else WANTED
    try:
        return Path(snapshot_download(hub, revision=source.revision, allow_patterns=wanted, etag_timeout=PATIENCE))
    except LocalEntryNotFoundError:
        mend = "is not in the local cache, and the hub can't be reached: fetch it where it can, or name a folder"
    except HfHubHTTPError as error:
        mend = f"the hub does not give it ({str(error).strip().partition(chr(10))[0]})"
    except HFValidationError as error:
        mend = f"is no hub id ({error})"
    raise InputError(None, field, str(source), mend) from None
