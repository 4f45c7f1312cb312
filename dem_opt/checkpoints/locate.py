"""Find the folder of a model: a path, a kept step, or a hub id in the local cache or downloaded from the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dem_opt.checkpoints.convert import converted, widened
from dem_opt.checkpoints.training_record import step_folder
from dem_opt.config import BaseSource, ModelSource
from dem_opt.errors import InputError

WANTED = ["*.json", "*.safetensors", "*.model", "*.spm", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*"]
"""Files of a repository to download: no pickled weights, no code."""

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""


def locate(source: ModelSource, field: str) -> Path:
    """The folder of one model: its path, a kept step of a run, or the cache's folder of its hub id and revision.

    Raises:
        InputError: The id is neither in the cache nor on the hub, or the step was not kept; or something in the folder
            is no file, whose opening could wait for ever.
    """
    assert not isinstance(source.step, list), "several steps are several models (`ModelSource.models`)"
    folder = _folder(source, field)
    return widened(folder, field) if isinstance(source, BaseSource) and source.dtype == "float32" else folder


def _folder(source: ModelSource, field: str) -> Path:
    """The folder, as it is stored or converted."""
    if source.run is not None and source.step is not None:
        assert not isinstance(source.step, list)
        return step_folder(source.run, source.step, field)
    folder = source.path if source.hub is None else _cached(source, source.hub, field)
    assert folder is not None
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(path, field, None, "is no file, but a pipe, socket or device: remove it")
    return converted(folder, field, source.pickled)


def _cached(source: ModelSource, hub: str, field: str) -> Path:
    """The cache's folder of a hub id, downloaded where it is missing."""
    wanted = [*WANTED, "*.bin"] if source.pickled else WANTED
    try:
        return Path(snapshot_download(hub, revision=source.revision, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT))
    except LocalEntryNotFoundError:
        mend = "is not in the local cache, and the hub can't be reached: fetch it where it can, or name a folder"
    except HfHubHTTPError as error:
        mend = f"the hub does not give it ({str(error).strip().partition(chr(10))[0]})"
    except HFValidationError as error:
        mend = f"is no hub id ({error})"
    raise InputError(None, field, str(source), mend) from None
