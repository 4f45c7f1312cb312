"""Manifests: the files that were written into a folder, with their hashes, by which they are later told from a user's.

A folder is replaced only where everything in it is in its manifest, unchanged.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dem_opt.errors import InputError
from dem_opt.json_files import find_json

FILES = "files"
"""Key of the manifest in the JSON file that describes a folder: SHA-256 by path within the folder."""


def manifest_of(folder: Path, parts: Sequence[Path] = ()) -> dict[str, str]:
    """SHA-256 of every file of a folder, or of some files and folders in it, by its path within the folder."""
    paths = [path for part in parts or [folder] for path in (_paths(part) if part.is_dir() else [part])]
    return {str(path.relative_to(folder)): _digest(path) for path in paths if path.is_file()}


def read_description(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or where the file holds anything else."""
    return find_json(file, dict[str, Any]) or {}


def refuse_foreign(
    folder: Path, description: str, field: str | None = None, unlisted: Mapping[str, str] | None = None
) -> None:
    """Raise InputError where a folder holds anything that its manifest does not list, or that has changed since.

    Args:
        folder: An existing folder; one that is empty is accepted.
        description: Name of the file in it that has the manifest.
        field: Field of the study file, or option, that names the folder.
        unlisted: The manifest of a folder whose description has none.
    """
    foreign = next(_foreign(folder, description, listed(folder, description) or dict(unlisted or {})), None)
    if foreign is not None:
        mend = f"holds {foreign}, which dem-opt did not write: move it away, or name another folder"
        raise InputError(folder, field, None, mend)


def refuse_changed(folder: Path, description: str, field: str | None = None) -> None:
    """Raise InputError where a file of a folder's manifest has been changed since; other files are no matter."""
    for name, digest in listed(folder, description).items():
        file = folder / name
        if file.is_symlink() or (file.exists() and not (file.is_file() and _digest(file) == digest)):
            mend = f"{name} has been changed since: move it away, or name another folder"
            raise InputError(folder, field, None, mend)


def refuse_others(folder: Path, description: str, names: Iterable[str], field: str | None = None) -> None:
    """Raise InputError where a folder has files of these names that its manifest does not list, or that have changed.

    Args:
        folder: An existing folder.
        description: Name of the file in it that has the manifest.
        names: Names of the files that are to be written.
        field: Option that names the folder.
    """
    known = listed(folder, description)
    mine = [description, *known] if known else []
    for name in (description, *names):
        if name not in mine and os.path.lexists(folder / name):
            mend = f"holds {name}, which dem-opt did not write: move it away, or name another folder"
            raise InputError(folder, field, None, mend)
    refuse_changed(folder, description, field)


def listed(folder: Path, description: str) -> dict[str, Any]:
    """The manifest of a folder; empty where it has none."""
    manifest = read_description(folder / description).get(FILES)
    return manifest if isinstance(manifest, dict) else {}


def _foreign(folder: Path, description: str, files: Mapping[str, Any]) -> Iterator[str]:
    """Paths in a folder that are not as its manifest says, in order."""
    parents = {str(parent) for name in files for parent in Path(name).parents}
    for path in _paths(folder):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield name
        elif path.is_dir():
            if name not in parents:
                yield f"{name}/"
        elif name == description and files:
            continue
        elif name not in files:
            yield name
        elif files[name] != _digest(path):
            yield f"a changed {name}"


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
