"""PEFT adapters on disk, read as edits of the base's parameters that stay factored in memory.

    LoRA    Delta W = (alpha / r) B A                  Hu et al. 2021
    rsLoRA  Delta W = (alpha / sqrt(r)) B A            Kalajdzievski 2023
    DoRA    W' = m (W + Delta W) / ||W + Delta W||     Liu et al. 2024, the norm of each output's row

Shape suffixes: O outputs and I inputs of a linear map, R rank.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from os.path import isdir
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.files import (
    DTYPES,
    Header,
    content_hash,
    hash_tensors,
    read_file_header,
    read_json,
    read_tensors,
)
from dem_opt.checkpoints.loading import read_parameters
from dem_opt.errors import InputError
from dem_opt.types import StoredModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B)|(magnitude_vector)(?:\.weight)?)$")
_REFUSED = (
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
)
"""Settings of a config that change the formulas above; adapters that set one are refused."""


class Edit(Protocol):
    """An adapter's change of one parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def apply(self, base: Tensor) -> Tensor:
        """The fine-tuned parameter, computed in float32 and rounded once to the base's dtype."""


@dataclass(frozen=True, eq=False)
class Replaced:
    """A parameter that was trained as a whole: a bias, a module of `modules_to_save`."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def apply(self, base: Tensor) -> Tensor:
        """The values."""
        return self.values.to(base.dtype)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Theta_i = Theta + s B A , with s = alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA).

    With a magnitude m for each output (DoRA):  Theta_i = m V / ||V||,  V = Theta + s B A , the norm of each output's
    row.  `transposed`: Theta is stored as [I, O].
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    transposed: bool
    magnitude_O: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(x.nbytes for x in (self.down_RI, self.up_OR, self.magnitude_O) if x is not None)

    def apply(self, base: Tensor) -> Tensor:
        """Theta_i from Theta."""
        weight_OI = torch.mm(self.up_OR.float(), self.down_RI.float()).mul_(self.scale)
        weight_OI += (base.T if self.transposed else base).float()
        if self.magnitude_O is not None:
            weight_OI *= (self.magnitude_O.float() / torch.linalg.norm(weight_OI, dim=1))[:, None]
        return (weight_OI.T if self.transposed else weight_OI).to(base.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files: the stored names behind each parameter that it edits.

    Attributes:
        factors: By parameter, the stored names of "A", "B" and perhaps "magnitude_vector".
        whole: By parameter, the stored name of the tensor that replaces it.
        repeated: By parameter, the stored name of a copy of the base's tensor.
    """

    header: Header
    config: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    repeated: Mapping[str, str]

    def scale(self, parameter: str) -> float:
        """s of the formula, by the parameter's own rank and alpha where the config has patterns."""
        rank = self.header.tensors[self.factors[parameter]["A"]].shape[0]
        alpha = _pattern(self.config.get("alpha_pattern"), parameter, self.config["lora_alpha"])
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def transposed(self, parameter: str) -> bool:
        """The parameter is stored as [I, O]: GPT-2's linear maps, and embeddings, which map from a one-hot."""
        return bool(self.config.get("fan_in_fan_out")) or "embedding" in self.factors[parameter]["A"]

    def memory_bytes(self, names: Collection[str]) -> int:
        """Bytes that `load_edits` allocates for these parameters: factors and tensors as they are stored."""
        parts = [(name, stored) for name, factors in self.factors.items() for stored in factors.values()]
        parts += self.whole.items()
        return sum(self.header.tensors[stored].nbytes for name, stored in parts if name in names)

    def content(self, base: str) -> str:
        """The content hash of the fine-tune: tensors, settings and the content of the base."""
        settings = {
            parameter: (self.scale(parameter), self.transposed(parameter)) for parameter in sorted(self.factors)
        }
        return sha256(repr((base, hash_tensors(self.header), settings)).encode()).hexdigest()


def read_adapter(folder: Path, field: str) -> Adapter:
    """Read an adapter folder: its config and its header, no tensors.

    Raises:
        InputError: A file is missing or damaged, or this kind of adapter is not supported.
    """
    if not isdir(folder):
        raise InputError(folder, field, None, "no such folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            mend = "is pickled: save it as safetensors" if pickled and name == WEIGHTS else f"has no {name}"
            raise InputError(folder, field, None, mend)
    config = _check_config(folder, field)
    header = Header(folder, field, read_file_header(folder / WEIGHTS, field), adapter=True)
    return _sort(header, config)


def check_adapter(architecture: Architecture, base: Header, adapter: Adapter) -> None:
    """Check that an adapter edits parameters that the base has, in their shapes.

    Raises:
        InputError: One for all differences.
    """
    differences = [part for parameter in adapter.factors for part in _misfit(architecture, adapter, parameter)]
    for parameter, stored in {**adapter.whole, **adapter.repeated}.items():
        shape = adapter.header.tensors[stored].shape
        if parameter in architecture.aliases:
            differences.append(f"{parameter} is tied to {architecture.aliases[parameter]} in the base")
        elif architecture.parameters.get(parameter) != shape:
            differences.append(f"{parameter} is {list(shape)}, {_its_shape(architecture, parameter)}")
    if differences:
        trained_on = adapter.config.get("base_model_name_or_path")
        origin = f" (made for {trained_on})" if trained_on else ""
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        mend = f"does not fit the base {base.folder}{origin}: {'; '.join(differences[:3])}{more}"
        raise InputError(adapter.header.folder, adapter.header.field, None, mend)
    _check_repeated(architecture, base, adapter)


def load_edits(adapter: Adapter, devices: Mapping[str, torch.device] | None = None) -> dict[str, Edit]:
    """Load an adapter's edits by parameter, each on its parameter's device; on the CPU unless given."""
    stored = dict(read_tensors(adapter.header, adapter.header.tensors))
    edits: dict[str, Edit] = {}
    for parameter, name in adapter.whole.items():
        edits[parameter] = Replaced(stored[name].to(devices[parameter] if devices else "cpu"))
    for parameter, names in adapter.factors.items():
        parts = {part: stored[name].to(devices[parameter] if devices else "cpu") for part, name in names.items()}
        magnitude = parts["magnitude_vector"].reshape(-1) if "magnitude_vector" in parts else None
        edits[parameter] = LowRank(
            parts["A"], parts["B"], adapter.scale(parameter), adapter.transposed(parameter), magnitude
        )
    return edits


def content_of(model: StoredModel) -> str:
    """The content hash that a checkpoint's or an adapter's files have now.

    Raises:
        InputError: Weights are NaN or infinite.
    """
    if model.base is None:
        return content_hash(model.path, model.field)
    return read_adapter(model.path, model.field).content(model.base)


def _check_config(folder: Path, field: str) -> dict[str, Any]:
    """The adapter's config; InputError for kinds of adapters whose formula is not here."""
    config = read_json(folder / CONFIG, field)
    kind = config.get("peft_type")
    if kind != "LORA":
        mend = (
            f"is of the kind {kind!r}: only LORA (plain, rsLoRA, DoRA) can be merged; merge it into a checkpoint first"
        )
        raise InputError(folder / CONFIG, field, None, mend)
    for setting in _REFUSED:
        if config.get(setting):
            mend = f"has {setting}, which can't be merged here; make it a checkpoint first"
            raise InputError(folder / CONFIG, field, None, mend)
    if not isinstance(config.get("lora_alpha"), int | float):
        raise InputError(folder / CONFIG, field, None, "has no lora_alpha: copy or save the adapter again")
    return config


def _sort(header: Header, config: Mapping[str, Any]) -> Adapter:
    """Sort stored tensors into factors, replaced parameters and copies of the base's."""
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored, tensor in header.tensors.items():
        if tensor.dtype not in DTYPES:
            mend = f"tensor {stored} is {tensor.dtype}: only {', '.join(DTYPES)} can be merged"
            raise InputError(tensor.file, header.field, None, mend)
        name = stored.removeprefix(_PREFIX)
        if match := _FACTOR.match(name):
            module, *parts = match.groups()
            factors.setdefault(f"{module}.weight", {})[next(part for part in parts if part)] = stored
        else:
            whole[name.replace(".base_layer.", ".")] = stored
    repeated = {name: whole.pop(name) for name in list(whole) if name in factors}
    return Adapter(header, config, factors, whole, repeated)


def _misfit(architecture: Architecture, adapter: Adapter, parameter: str) -> list[str]:
    """Faults of the factors of one parameter, for an error."""
    parts = {part: adapter.header.tensors[stored].shape for part, stored in adapter.factors[parameter].items()}
    if not {"A", "B"} <= parts.keys():
        return [f"{parameter} has only one of its two factors"]
    down_RI, up_OR = parts["A"], parts["B"]
    if len(down_RI) != 2 or len(up_OR) != 2 or down_RI[0] != up_OR[1]:
        return [f"{parameter} has factors of {list(down_RI)} and {list(up_OR)}"]
    if "embedding" in adapter.factors[parameter]["A"] and "magnitude_vector" in parts:
        return [f"{parameter} is an embedding with DoRA, which can't be merged here"]
    shape = (down_RI[1], up_OR[0]) if adapter.transposed(parameter) else (up_OR[0], down_RI[1])
    if architecture.parameters.get(parameter) != shape:
        return [f"{parameter} is for {list(shape)}, {_its_shape(architecture, parameter)}"]
    return []


def _check_repeated(architecture: Architecture, base: Header, adapter: Adapter) -> None:
    """Raise InputError where the adapter's copy of a base's tensor differs from it."""
    originals = read_parameters(architecture, base, adapter.repeated)
    copies = read_tensors(adapter.header, adapter.repeated.values())
    for (parameter, original), (_, copy) in zip(originals, copies, strict=True):
        if not torch.equal(copy.to(original.dtype), original):
            mend = f"was trained on another {parameter} than the base's"
            raise InputError(adapter.header.folder, adapter.header.field, None, mend)


def _its_shape(architecture: Architecture, parameter: str) -> str:
    shape = architecture.parameters.get(parameter)
    return "which the base does not have" if shape is None else f"the base's is {list(shape)}"


def _pattern(patterns: Any, parameter: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    module = parameter.removesuffix(".weight")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default
