"""Convert pickled weights to safetensors in the user's cache, where the study file allows pickles."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

from dem_opt.atomic import publish_folder, staged_folder
from dem_opt.checkpoints.files import INDEX, PICKLED, WEIGHTS, cache_folder
from dem_opt.errors import InputError

_NAME = "pytorch_model*.bin"


def converted(folder: Path, field: str) -> Path:
    """A copy of a checkpoint folder with its weights as safetensors, made once for the same files.

    Only tensors are unpickled.  A folder that has safetensors, or no pickled weights, is returned as it is.

    Raises:
        InputError: A pickle holds anything else, or is damaged.
    """
    pickles = sorted(folder.glob(_NAME)) if folder.is_dir() else []
    if not pickles or (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return folder
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in pickles]
    out = cache_folder() / "converted" / sha256(repr(stats).encode()).hexdigest()[:32]
    if not out.is_dir():
        with staged_folder(out, wait=True) as partial:
            if not out.is_dir():  # another process may have made it meanwhile
                _write(folder, pickles, partial, field)
                publish_folder(partial, out)
    return out


def _write(folder: Path, pickles: list[Path], out: Path, field: str) -> None:
    """Write a safetensors file for each pickle, an index, and copies of the folder's other files."""
    weight_map: dict[str, str] = {}
    for file in pickles:
        tensors = {name: tensor.contiguous().clone() for name, tensor in _load(file, field).items()}
        save_file(tensors, out / f"{file.stem}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{file.stem}.safetensors")
    (out / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in (*PICKLED, "*.bin.index.json")):
            shutil.copyfile(file, out / file.name)


def _load(file: Path, field: str) -> dict[str, Any]:
    """The tensors of one file."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(file, field, None, f"holds more than tensors, or is damaged ({reason})") from None
    if not (isinstance(tensors, dict) and all(isinstance(value, torch.Tensor) for value in tensors.values())):
        raise InputError(file, field, None, "is no mapping of names to tensors")
    return tensors
