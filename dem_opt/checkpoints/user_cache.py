"""The user's cache of facts about files that take long to compute: a JSON file for each entry.

One file of all entries would be read and written whole for each of them, and of two processes that write it at once
one would lose the other's entry.
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


def entry_file(kind: str, key: str) -> Path:
    """The file of an entry of a kind, `contents` say, by its key, which may be any text."""
    return cache_folder() / kind / f"{sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.json"


def get(kind: str, key: str, schema: type[Schema]) -> Schema | None:
    """Read an entry; None where there is none, or its file is damaged."""
    return find_json(entry_file(kind, key), schema)


def put(kind: str, key: str, value: object) -> None:
    """Write an entry, a dataclass or what JSON has; without write permission it is computed anew every time."""
    with suppress(OSError):
        make_private_folder(cache_folder())
        content = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        write_text(entry_file(kind, key), json.dumps(content))
