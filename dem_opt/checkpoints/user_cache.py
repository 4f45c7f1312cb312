"""This user's cache: what took long to find out about files, one JSON file for each finding.

A single file of all findings would be read and written whole for each of them, and of two processes that write it at
once one would lose what the other has found.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from pathlib import Path

from dem_opt.atomic import write_text
from dem_opt.json_files import Schema, find_json
from dem_opt.permissions import make_private_folder


def cache_folder() -> Path:
    """This user's cache: content hashes, comparisons of forward passes, converted checkpoints, the merge kernel.

    For a user without a home (a container's, say) a folder that can't be made: nothing is cached.
    """
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "dem_opt"
    home = os.path.expanduser("~")
    return Path(home if home != "~" else os.devnull) / ".cache" / "dem_opt"


def finding_file(kind: str, key: str) -> Path:
    """The file of a finding of a kind, `contents` say, by its key, which may be any text."""
    return cache_folder() / kind / f"{sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.json"


def find(kind: str, key: str, schema: type[Schema]) -> Schema | None:
    """What was found out before; None where nothing was, or its file is damaged."""
    return find_json(finding_file(kind, key), schema)


def keep(kind: str, key: str, finding: object) -> None:
    """Keep a finding, a dataclass or what JSON has; without write permission it is found out anew every time."""
    with suppress(OSError):
        make_private_folder(cache_folder())
        content = asdict(finding) if is_dataclass(finding) and not isinstance(finding, type) else finding
        write_text(finding_file(kind, key), json.dumps(content))
