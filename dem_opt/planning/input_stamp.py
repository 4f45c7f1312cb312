"""A stamp of everything that a study's identity follows from: settings, files, versions.  No file is opened.

Where a study's stamp is what it was, its checkpoints, texts and tokenizer are, too: a file that is changed, replaced,
added or removed gives another one.
"""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from dem_opt.config import ModelSource, StudyConfig
from dem_opt.config.objective_function import ObjectiveFunction
from dem_opt.data.files import find_files
from dem_opt.errors import InputError

_SECTIONS: Any = {
    **dict.fromkeys(("base", "distributions", "general", "simplex", "objective", "evaluation"), True),
    "compute": {"workers", "gpus_per_worker", "ray"},
}
"""Parts of the study file that decide what is scored and how; those of `compute` decide `evaluation.batch: auto`."""

_COMMIT_DIGITS = 40
"""Hexadecimal digits of a commit, the only kind of revision that a hub never moves."""


def stamp_inputs(config: StudyConfig, versions: dict[str, str]) -> str | None:
    """Return the stamp of a study's inputs as they are now.

    Args:
        config: The study file.
        versions: Versions of the libraries by name.

    Returns:
        None where the inputs have none: a file is missing, or a hub's revision may have moved.

    Raises:
        InputError: The custom objective can't be imported.
    """
    sources = [config.base, *(fine_tune.source for fine_tune in config.fine_tunes.values())]
    function = config.objective.function
    try:
        files = [stamp for source in sources for stamp in _stamps_of_model(source)]
        files += [stamp for stamp in _stamps_of_texts(config)]
    except (InputError, OSError):
        return None
    if any(source.hub is not None and not _is_commit(source.revision) for source in sources):
        return None
    stamped = [
        sorted(versions.items()),
        config.model_dump_json(include=_SECTIONS),
        *([config.model_dump_json(include={"vectors"})] if config.vectors else []),
        *([config.coefficients.model_dump_json()] if config.coefficients.groups != "global" else []),
        str(ObjectiveFunction.load(function)) if function else "",
        sorted(files),
    ]
    return sha256(repr(stamped).encode()).hexdigest()


def _is_commit(revision: str | None) -> bool:
    """True if a revision names one commit for ever."""
    return revision is not None and len(revision) == _COMMIT_DIGITS and set(revision) <= set("0123456789abcdef")


def _stamps_of_model(source: ModelSource) -> Iterator[tuple[str, int, int, int]]:
    """Stamps of all files in a model's folder and below it; none for a commit of the hub."""
    if source.place is not None:
        for folder, _, names in os.walk(source.place, followlinks=True, onerror=_raise):
            yield from (_stamp(Path(folder) / name) for name in names)


def _stamps_of_texts(config: StudyConfig) -> Iterator[tuple[str, int, int, int]]:
    """Stamps of the data files of both splits."""
    for name, corpus in config.corpora.items():
        for part in (corpus.validation, corpus.held_out):
            for source in find_files(part, name) if part is not None else ():
                yield from map(_stamp, source.contents())


def _stamp(file: Path) -> tuple[str, int, int, int]:
    """Path, size, time of change in nanoseconds and inode: one changes when the file does."""
    stat = file.stat()
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _raise(error: OSError) -> None:
    raise error
