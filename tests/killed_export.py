"""Writes a composite of checkpoints, killed at three points; prints the content that each left under its name.

Each export is a process of its own, forked before torch has started a thread.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from dem_opt.checkpoints.files import content_hash
from dem_opt.export import writer
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

POINTS = {"first file": ("save_file", 1), "last file": ("save_file", 2), "renaming": ("rename", 1)}


def die_after(owner: object, name: str, calls: int) -> None:
    """Let this process be killed when a function has returned for the so-manieth time."""
    original, left = getattr(owner, name), [calls]

    def dying(*arguments, **named):
        result = original(*arguments, **named)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def write(point: str, base: StoredModel, stored: dict[str, StoredModel], composite: Composite, out: Path) -> int:
    """One export's life in a process of its own; its exit status, -9 where it was killed."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    name, calls = POINTS[point]
    die_after(writer if name == "save_file" else Path, name, calls)
    writer.write_composite(base, stored, composite, out, lambda written: {})
    os._exit(0)


def main(out: Path, paths: list[Path]) -> None:
    torch.set_num_threads(1)
    contents = [content_hash(path) for path in paths]
    composite = Composite.of(dict(zip(contents, (UNIT // 2, UNIT // 4, UNIT // 4), strict=True)))
    stored = {content: StoredModel(path, content) for content, path in zip(contents, paths, strict=True)}
    size = sum(file.stat().st_size for file in paths[0].glob("*.safetensors"))
    writer.SHARD_BYTES = size * 2 // 3
    left = {}
    for point in POINTS:
        assert write(point, stored[contents[0]], stored, composite, out) == -signal.SIGKILL, point
        left[point] = content_hash(out) if out.exists() else None
    sys.stdout.write(json.dumps(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
