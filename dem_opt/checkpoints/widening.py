"""Widen a checkpoint's 16-bit weights to float32, so that composites, which have the base's dtype, are not rounded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dem_opt.checkpoints.files import Header, StoredTensor, read_file_header, read_json, read_tensors, weight_files
from dem_opt.progress import current_progress

NARROW = ("BF16", "F16")
"""Dtypes that are widened; every value of theirs is one of float32."""


@dataclass(frozen=True)
class Widening:
    """A checkpoint with 16-bit tensors that are to be widened."""

    header: Header
    config: Mapping[str, Any]

    form = "16-bit weights, widened to float32,"
    """The form, for messages."""

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return self.header.files

    @property
    def size(self) -> int:
        """Bytes of the widened tensors, at most."""
        return sum(prod(tensor.shape) * 4 for tensor in self.header.tensors.values())

    def write(self, out: Path) -> dict[str, str]:
        """Write each weight file widened, and the config with the dtype; return the file by tensor."""
        weight_map: dict[str, str] = {}
        with current_progress().phase(f"widening {self.header.field}", len(self.header.tensors), "tensors") as phase:
            for file in self.files:
                tensors = {}
                for name in (name for name, tensor in self.header.tensors.items() if tensor.file == file):
                    ((_, tensor),) = read_tensors(self.header, [name])
                    tensors[name] = tensor.float() if self.header.tensors[name].dtype in NARROW else tensor.clone()
                    phase.advance()
                save_file(tensors, out / file.name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file.name)
        config = _in_float32(self.config) | {"dtype": "float32"}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return weight_map


def _in_float32(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with every dtype, those of its parts too, at float32."""
    return {
        key: "float32" if key in ("dtype", "torch_dtype") else _in_float32(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def plan(folder: Path, field: str) -> Widening | None:
    """The widening of a checkpoint folder, from its headers; None where it has no 16-bit tensor."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder, field):
        tensors |= read_file_header(file, field)
    if not any(tensor.dtype in NARROW for tensor in tensors.values()):
        return None
    return Widening(Header(folder, field, tensors), read_json(folder / "config.json", field))
