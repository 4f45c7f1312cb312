"""Round stored tensors that a merge can't combine, once: float64 to float32, and FP8 with scales to bfloat16.

    W_oi = q_oi s_ab ,   a, b the block of o, i

q are FP8 values, s the scales that are stored beside them: one for a tensor, for each row, or for each block.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dem_opt.checkpoints.files import Header, StoredTensor, read_file_header, read_json, read_tensors, weight_files
from dem_opt.errors import InputError
from dem_opt.progress import current_progress

FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
"""Ends that a scale's name adds to its tensor's; with the first, too, the scale multiplies."""

_ACTIVATION_SCALES = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
"""Scales of what a quantized model computes; the rounded model computes in its dtype."""

_BLOCK = 128
"""Elements of a block along each dimension, where config.json names no `weight_block_size`."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rounding:
    """A checkpoint whose float64 or FP8 tensors are to be rounded."""

    header: Header
    config: Mapping[str, Any]
    scales: Mapping[str, str]

    @property
    def form(self) -> str:
        """The dtypes that are rounded, in words."""
        dtypes = {tensor.dtype for tensor in self.header.tensors.values()}
        fp8 = f"FP8 weights, rounded to {str(self.narrow).removeprefix('torch.')}," if dtypes & set(FP8) else ""
        wide = "float64 weights, rounded to float32," if "F64" in dtypes else ""
        return " and ".join(part for part in (fp8, wide) if part)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return self.header.files

    @property
    def narrow(self) -> torch.dtype:
        """The dtype that FP8 tensors are rounded to: the config's."""
        return _DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype")), torch.bfloat16)

    @property
    def size(self) -> int:
        """Bytes of the rounded tensors, at most."""
        return sum(prod(tensor.shape) * 4 for tensor in self.header.tensors.values())

    def write(self, out: Path) -> dict[str, str]:
        """Write each weight file rounded, and the config without its quantization; return the file by tensor."""
        weight_map: dict[str, str] = {}
        dropped = {*self.scales.values(), *(n for n in self.header.tensors if n.endswith(_ACTIVATION_SCALES))}
        kept = {
            name: tensor for name, tensor in self.header.tensors.items() if self.scales == {} or name not in dropped
        }
        with current_progress().phase(f"rounding {self.header.field}", len(kept), "tensors") as phase:
            for file in self.files:
                tensors: dict[str, Tensor] = {}
                for name in (name for name, tensor in kept.items() if tensor.file == file):
                    tensors[name] = self._rounded(name)
                    phase.advance()
                if tensors:
                    save_file(tensors, out / file.name, metadata={"format": "pt"})
                    weight_map |= dict.fromkeys(tensors, file.name)
        (out / "config.json").write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
        return weight_map

    def _rounded(self, name: str) -> Tensor:
        """A tensor in a dtype that can be merged."""
        ((_, tensor),) = read_tensors(self.header, [name])
        if self.header.tensors[name].dtype == "F64":
            return tensor.float()
        if name not in self.scales:
            return tensor.clone()
        ((_, scale),) = read_tensors(self.header, [self.scales[name]])
        return (tensor.float() * _expanded(scale.float(), tensor.shape, self.block())).to(self.narrow)

    def block(self) -> tuple[int, ...]:
        """Elements along each dimension, the last ones, that share a scale."""
        block = _quantization(self.config).get("weight_block_size")
        return tuple(block) if block else (_BLOCK, _BLOCK)

    def _config(self) -> dict[str, Any]:
        """The config of the rounded model."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        for name in ("dtype", "torch_dtype"):
            if config.get(name) == "float64":
                config[name] = "float32"
        return config


def plan(folder: Path, field: str) -> Rounding | None:
    """The rounding that a checkpoint folder needs, read from its headers; None for others.

    Raises:
        InputError: An FP8 tensor has no scale, or one that does not fit it.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder, field):
        tensors |= read_file_header(file, field)
    if not any(tensor.dtype in ("F64", *FP8) and prod(tensor.shape) for tensor in tensors.values()):
        return None
    rounding = Rounding(Header(folder, field, tensors), read_json(folder / "config.json", field), {})
    scales = {name: _scale_of(rounding, name) for name, tensor in tensors.items() if tensor.dtype in FP8}
    return Rounding(rounding.header, rounding.config, scales)


def _scale_of(rounding: Rounding, name: str) -> str:
    """The name of an FP8 tensor's scale; InputError where there is none that fits."""
    header, tensors = rounding.header, rounding.header.tensors
    scale = next((name + end for end in _SCALES if name + end in tensors), None)
    if scale is None:
        mend = f"tensor {name} is FP8 without a scale (neither {' nor '.join(name + end for end in _SCALES)})"
        raise InputError(header.folder, header.field, None, f"{mend}: name the checkpoint that it was made from")
    shape, sizes = tensors[name].shape, tensors[scale].shape
    if prod(sizes) != 1 and not _fits(sizes, shape, rounding.block()):
        mend = f"scale {scale} is {list(sizes)}, which does not fit {name} of {list(shape)}: save the checkpoint again"
        raise InputError(header.folder, header.field, None, mend)
    return scale


def _fits(scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """A scale has, along each dimension, one value, one for each element, or one for each block."""
    if len(scale) != len(shape):
        return len(scale) == 1 and scale[0] == shape[0]
    blocks = (1,) * (len(shape) - len(block)) + block[-len(shape) :]
    return all(part in (1, size, ceil(size / step)) for part, size, step in zip(scale, shape, blocks, strict=True))


def _expanded(scale: Tensor, shape: torch.Size, block: tuple[int, ...]) -> Tensor:
    """A scale in a shape that multiplies a tensor of this one."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    blocks = (1,) * (len(shape) - len(block)) + block[-len(shape) :]
    for dimension, (size, step) in enumerate(zip(shape, blocks, strict=True)):
        if scale.shape[dimension] not in (1, size):
            scale = scale.repeat_interleave(step, dimension).narrow(dimension, 0, size)
    return scale


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}
