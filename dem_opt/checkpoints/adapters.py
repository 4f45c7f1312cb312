"""PEFT adapters on disk, read as edits of the base's parameters that stay factored in memory.

stored names + adapter_config.json --> Adapter (factors by module)     Adapter + Architecture --> edits by parameter

The truth is the forward pass of PEFT's own model of the adapter: what that can't be written as weights of the base's
architecture is refused.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dem_opt.checkpoints.adapter_config import (
    fault,
    is_saved_whole,
    is_target_parameter,
    rank_of,
    scale_of,
    stores_experts_by_outputs,
    token_indices,
)
from dem_opt.checkpoints.adapter_edits import Edit, ExpertsLowRank, LowRank, Replaced, ReplacedRows, Shifted
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
from dem_opt.checkpoints.training_record import RECORD
from dem_opt.checkpoints.vocabulary import fitted_content
from dem_opt.errors import InputError
from dem_opt.types import StoredModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

_WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Components of names that data-parallel training, torch.compile and activation checkpointing add."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"""(?P<module>.+)\.lora_(?:
        (?P<linear>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.(?P<what>weight|bias)
      | embedding_(?P<embedding>[AB])(?:\.[^.]+)?
      | (?P<magnitude>magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?
    )$""",
    re.VERBOSE,
)
"""Names of factors, which may have the adapter's name (`default`) in them."""

_TOKENS = re.compile(r"(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?:\.[^.]+)?$")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_ORIGINAL = ".original_module."
_BASE = ".base_layer"


@dataclass(frozen=True, kw_only=True)
class PlannedEdit:
    """How a parameter is edited, and the stored tensors that the edit is made of.

    Attributes:
        module: Path of the module that PEFT trained.
        stored: Stored names by part: "A", "B", "magnitude_vector", or "values".
        scale: s of the formulas.
        transposed: The parameter, or each of its experts, is stored as [inputs, outputs].
        indices: Rows of the parameter.
    """

    kind: Literal["low rank", "experts", "rows", "replaced", "shifted"]
    module: str
    stored: Mapping[str, str]
    scale: float = 1.0
    transposed: bool = False
    indices: tuple[int, ...] = ()

    def load(self, parts: Mapping[str, Tensor]) -> Edit:
        """The edit of its parts' tensors."""
        if self.kind == "replaced":
            return Replaced(parts["values"])
        if self.kind == "rows":
            return ReplacedRows(parts["values"], self.indices)
        if self.kind == "shifted":
            return Shifted(parts["values"], self.scale)
        if self.kind == "experts":
            return ExpertsLowRank(parts["A"], parts["B"], self.scale, self.transposed)
        magnitude = parts["magnitude_vector"].reshape(-1) if "magnitude_vector" in parts else None
        return LowRank(parts["A"], parts["B"], self.scale, self.transposed, magnitude)


@dataclass(frozen=True)
class Plan:
    """The edits that an adapter makes to a base.

    Attributes:
        edits: By parameter.
        copies: Pairs of a parameter and the stored name of a copy of the base's values.
        twins: Pairs of edits that must be the same: of two names of one tied weight.
        faults: Reasons why the adapter does not fit.
    """

    edits: dict[str, PlannedEdit] = field(default_factory=dict)
    copies: list[tuple[str, str]] = field(default_factory=list)
    twins: list[tuple[PlannedEdit, PlannedEdit]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


_EXPERT = re.compile(r"\.experts\.[0-9]+\.")
"""The mark in the name of one expert's module, as transformers before 5 writes it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's files: its stored names, sorted.

    Attributes:
        factors: By module, the stored names of "A", "B" and perhaps "magnitude_vector" and "bias".
        tokens: By module, the stored name of rows of its weight.
        whole: By parameter, the stored name of the tensor that replaces it.
        copies: Pairs of a parameter and the stored name of a copy of the base's tensor.
    """

    header: Header
    config: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, str]]
    tokens: Mapping[str, str]
    whole: Mapping[str, str]
    copies: Sequence[tuple[str, str]]

    def shape(self, stored: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return self.header.tensors[stored].shape

    def memory_bytes(self, architecture: Architecture, names: Collection[str]) -> int:
        """Bytes that `load_edits` allocates for these parameters: factors and tensors as they are stored."""
        edits = plan_edits(architecture, self).edits
        stored = (name for parameter, edit in edits.items() if parameter in names for name in edit.stored.values())
        return sum(self.header.tensors[name].nbytes for name in stored)

    def content(self, base: str) -> str:
        """The content hash of the fine-tune: tensors, settings and the content of the base."""
        settings: dict[str, Any] = {
            f"{module}.weight": (
                scale_of(self.config, module, self.shape(parts["A"])[0]),
                bool(self.config.get("fan_in_fan_out")) or "embedding" in parts["A"],
            )
            for module, parts in sorted(self.factors.items(), key=lambda item: f"{item[0]}.weight")
            if "A" in parts
        }
        # Only where they are set, so that hashes of adapters without them are those of earlier releases.
        rarer = {name: self.config.get(name) for name in ("trainable_token_indices", "target_parameters")}
        if any(rarer.values()):
            settings |= rarer | {"by_outputs": stores_experts_by_outputs(self.config)}
        return sha256(repr((base, hash_tensors(self.header), settings)).encode()).hexdigest()


def read_adapter(folder: Path, field: str) -> Adapter:
    """Read an adapter folder: its config and its header, no tensors.

    Raises:
        InputError: A file is missing or damaged, or this kind of adapter can't be merged.
    """
    if not isdir(folder):
        mend = "is a file: name the folder that it is in" if isfile(folder) else "no such folder"
        raise InputError(folder, field, None, mend)
    if not (folder / CONFIG).is_file():
        raise InputError(folder, field, None, f"has no {CONFIG}{_elsewhere(folder)}")
    if not (folder / WEIGHTS).is_file():
        allow = f"is pickled: save it as safetensors, or write `{{path: {folder.name}, pickled: true}}`"
        raise InputError(folder, field, None, allow if (folder / PICKLED).is_file() else f"has no {WEIGHTS}")
    config = read_json(folder / CONFIG, field)
    if unmergeable := fault(config):
        again = "; or remove the folder and train it again" if (folder / RECORD).is_file() else ""
        raise InputError(folder / CONFIG, field, None, unmergeable[1] + again)
    return sort_tensors(Header(folder, field, read_file_header(folder / WEIGHTS, field), adapter=True), config)


def _elsewhere(folder: Path) -> str:
    """Describe a folder without an adapter's config, or name its folder that has one."""
    if (folder / "config.json").is_file():
        return ": a checkpoint is named by `checkpoint:` instead of `adapter:`"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f": name the folder of one adapter in it, such as {inner[0]}" if inner else ""


def check_adapter(architecture: Architecture, base: Header, adapter: Adapter) -> None:
    """Check that an adapter edits parameters that the base has, in their shapes, and was trained on their values.

    Raises:
        InputError: One for all differences.
    """
    plan = plan_edits(architecture, adapter)
    layout = architecture.layout(base)
    for parameter in sorted(layout.fused & plan.edits.keys()):
        if {*layout.plain_sources(parameter)} != architecture.stored_as(parameter):
            plan.faults.append(f"{parameter} is fused from tensors of old names: save the base again")
    if plan.faults:
        raise InputError(adapter.header.folder, adapter.header.field, None, describe_faults(plan, base, adapter))
    _check_copies(architecture, base, adapter, plan)
    for first, second in plan.twins:
        if not _same_edit(*(each.load(_read(adapter, each)) for each in (first, second))):
            mend = f"{first.module} and {second.module} are trained apart, {_UNTIED}"
            raise InputError(adapter.header.folder, adapter.header.field, None, mend)


def describe_faults(plan: Plan, base: Header, adapter: Adapter) -> str:
    """The first faults of a plan, for an error."""
    trained_on = adapter.config.get("base_model_name_or_path")
    origin = f" (made for {trained_on})" if trained_on else ""
    more = f"; and {len(plan.faults) - 3} more" if len(plan.faults) > 3 else ""
    return f"does not fit the base {base.folder}{origin}: {'; '.join(plan.faults[:3])}{more}"


def load_edits(
    architecture: Architecture, adapter: Adapter, devices: Mapping[str, torch.device] | None = None
) -> dict[str, Edit]:
    """Load an adapter's edits by parameter, each on its parameter's device; on the CPU unless given."""
    stored = dict(read_tensors(adapter.header, adapter.header.tensors))
    edits: dict[str, Edit] = {}
    for name, edit in plan_edits(architecture, adapter).edits.items():
        device = devices[name] if devices else "cpu"
        edits[name] = edit.load({part: stored[key].to(device) for part, key in edit.stored.items()})
    return edits


def content_of(model: StoredModel) -> str:
    """The content hash that a checkpoint's or an adapter's files have now.

    Raises:
        InputError: Weights are NaN or infinite.
    """
    if model.base is None:
        content = content_hash(model.path, model.field)
        return content if model.vocabulary is None else fitted_content(model.vocabulary, content)
    return read_adapter(model.path, model.field).content(model.base)


def sort_tensors(header: Header, config: Mapping[str, Any]) -> Adapter:
    """Sort stored tensors into factors, tokens, replaced parameters and copies of the base's.

    Raises:
        InputError: A tensor has a dtype that can't be merged, or two are for the same place.
    """
    factors: dict[str, dict[str, str]] = {}
    tokens: dict[str, str] = {}
    whole: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    for stored, tensor in header.tensors.items():
        if tensor.dtype not in DTYPES:
            mend = f"tensor {stored} is {tensor.dtype}: only {', '.join(DTYPES)} can be merged"
            raise InputError(tensor.file, header.field, None, mend)
        name = _WRAPPERS.sub("", stored).removeprefix(_PREFIX)
        if match := _FACTOR.match(name):
            part = "bias" if match["what"] == "bias" else match["linear"] or match["embedding"] or match["magnitude"]
            place, key = factors.setdefault(match["module"], {}), part
        elif match := _TOKENS.match(name):
            place, key = tokens, match["module"]
        elif _ORIGINAL in name:
            copies.append((name.replace(_ORIGINAL, "."), stored))
            continue
        else:
            place, key = whole, _SAVED.sub(".", name).replace(f"{_BASE}.", ".")
        if key in place:
            mend = f"{place[key]} and {stored} are for the same place: save one adapter alone"
            raise InputError(tensor.file, header.field, None, mend)
        place[key] = stored
    adapted = {f"{module.replace(_BASE, '')}.weight" for module in factors}
    copies += [(name, whole.pop(name)) for name in list(whole) if name in adapted]
    return Adapter(header, config, factors, tokens, whole, copies)


_UNTIED = (
    "but the base ties them, and no model of its kind computes that: "
    "train them as modules_to_save with `ensure_weight_tying: true`"
)


def plan_edits(architecture: Architecture, adapter: Adapter) -> Plan:
    """Match an adapter's tensors with the parameters of a base."""
    plan = Plan()
    candidates: dict[str, list[tuple[str, PlannedEdit]]] = {}
    for name, edit in _candidates(architecture, adapter, plan.faults):
        candidates.setdefault(architecture.aliases.get(name, name), []).append((name, edit))
    for parameter, edits in candidates.items():
        _settle(architecture, adapter, parameter, edits, plan)
    for name, stored in adapter.copies:
        current = architecture.current_name(name)
        parameter = architecture.aliases.get(current, current)
        if architecture.parameters.get(parameter) != adapter.shape(stored):
            plan.faults.append(f"{name} is {list(adapter.shape(stored))}, {_its_shape(architecture, parameter)}")
        plan.copies.append((parameter, stored))
    return plan


def _candidates(architecture: Architecture, adapter: Adapter, faults: list[str]) -> Iterator[tuple[str, PlannedEdit]]:
    """The edits of an adapter, by the name of the parameter, which may be one of several of a tied weight."""
    known = architecture.parameters
    single = [name for name in adapter.factors if _EXPERT.search(name) and f"{name}.weight" not in known]
    if single:
        mend = "merge it into a checkpoint with the release of transformers that it was trained with"
        faults.append(f"{len(single)} modules are of single experts ({single[0]}), which the base stacks: {mend}")
    for module, parts in adapter.factors.items():
        if module in single:
            continue
        try:
            name, edit = _factored(architecture, adapter, module, parts)
        except _FaultError as misfit:
            faults.append(str(misfit))
            continue
        yield name, edit
        if "bias" in parts:
            bias = PlannedEdit(kind="shifted", module=module, stored={"values": parts["bias"]}, scale=edit.scale)
            yield architecture.current_name(f"{module}.bias"), bias
    for module, stored in adapter.tokens.items():
        name = architecture.current_name(f"{module}.weight")
        is_embedding = architecture.aliases.get(name, name) == architecture.embedding
        indices = token_indices(adapter.config, module, is_embedding)
        yield name, PlannedEdit(kind="rows", module=module, stored={"values": stored}, indices=indices)
    for name, stored in adapter.whole.items():
        module = name.rpartition(".")[0]
        yield architecture.current_name(name), PlannedEdit(kind="replaced", module=module, stored={"values": stored})


class _FaultError(ValueError):
    """Why factors do not fit."""


def _factored(
    architecture: Architecture, adapter: Adapter, module: str, parts: Mapping[str, str]
) -> tuple[str, PlannedEdit]:
    """The parameter that a module's factors edit, and how.

    Raises:
        _FaultError: They do not fit.
    """
    if not {"A", "B"} <= parts.keys():
        raise _FaultError(f"{module} has only one of its two factors")
    down, up = adapter.shape(parts["A"]), adapter.shape(parts["B"])
    if 0 in (*down, *up):
        raise _FaultError(f"{module} has empty factors: they were saved before a sharded training had gathered them")
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise _FaultError(f"{module} has factors of {list(down)} and {list(up)}")
    if adapter.config.get("lora_bias") and "bias" not in parts:
        raise _FaultError(f"{module} has no bias, and the config says lora_bias")
    name, key = _target(architecture, adapter, module)
    shape = architecture.parameters.get(architecture.aliases.get(name, name), ())
    experts = shape[0] if len(shape) == 3 else 1
    rank, remainder = divmod(down[0], experts)
    stated = rank_of(adapter.config, key)
    if remainder or not rank or stated not in (rank, None):
        raise _FaultError(f"{module} has rank {down[0] / experts:g}, its config says {stated}")
    transposed = _is_transposed(architecture, adapter, name, "embedding" in parts["A"], (up[0], down[1]))
    fits = (down[1], up[0]) if transposed else (up[0], down[1])
    if (shape[1:] if len(shape) == 3 else shape) != fits:
        raise _FaultError(f"{name} is for {list(fits)}, {_its_shape(architecture, name)}")
    scale = scale_of(adapter.config, key, rank)
    if len(shape) == 3:
        stored = {part: parts[part] for part in ("A", "B")}
        return name, PlannedEdit(kind="experts", module=module, stored=stored, scale=scale, transposed=transposed)
    stored = {part: name for part, name in parts.items() if part != "bias"}
    return name, PlannedEdit(kind="low rank", module=module, stored=stored, scale=scale, transposed=transposed)


def _target(architecture: Architecture, adapter: Adapter, module: str) -> tuple[str, str]:
    """The parameter that a module's factors edit, and the name that patterns of rank and alpha are matched with.

    That is the module's weight, or one of `target_parameters`: PEFT wraps the parameters of a module one around the
    other in their order, so the last has the module's own name and the first the most `base_layer` in its.
    """
    inner = module.replace(_BASE, "")
    name = architecture.current_name(f"{inner}.weight")
    if name in architecture.parameters or name in architecture.aliases:
        return name, inner
    own = [
        parameter
        for parameter in architecture.parameters
        if parameter.rpartition(".")[0] == inner and is_target_parameter(adapter.config, parameter)
    ]
    depth = module.count(_BASE)
    return (own[-1 - depth], own[-1 - depth]) if depth < len(own) else (name, inner)


def _is_transposed(
    architecture: Architecture, adapter: Adapter, name: str, embedding: bool, outputs_inputs: tuple[int, int]
) -> bool:
    """The parameter, or each of its experts, is stored as [inputs, outputs].

    Of linear maps the module's class tells, as PEFT reads it.  Stacks of experts: their shape, and of square ones the
    version of PEFT that the adapter was saved with.
    """
    shape = architecture.parameters.get(architecture.aliases.get(name, name), ())
    if len(shape) != 3:
        return embedding or architecture.stores_inputs_first(name)
    if shape[1] != shape[2]:
        return shape[1:] != outputs_inputs
    by_outputs = stores_experts_by_outputs(adapter.config)
    if by_outputs is None:
        raise _FaultError(f"{name} has square experts, and the config no peft_version that tells the factors' layout")
    return architecture.stores_inputs_first(name) if by_outputs else True


def _settle(
    architecture: Architecture,
    adapter: Adapter,
    parameter: str,
    edits: Sequence[tuple[str, PlannedEdit]],
    plan: Plan,
) -> None:
    """Decide on the edit of a parameter that may have several names, each of which PEFT edits on its own."""
    (name, edit), *others = edits
    plan.faults.extend(misfit for _, each in edits if (misfit := _misfit(architecture, adapter, parameter, each)))
    plan.edits[parameter] = next((each for other, each in edits if other == parameter), edit)
    if len({each.kind for _, each in edits}) > 1 or len({other for other, _ in edits}) < len(edits):
        plan.faults.append(f"{parameter} is edited twice: by {', '.join(each.module for _, each in edits)}")
        return
    plan.twins.extend((edit, other) for _, other in others)
    missing = sorted({*architecture.names_of(parameter)} - {other for other, _ in edits})
    if missing and any(_is_trained_apart(architecture, adapter, other, each) for other, each in edits):
        modules = ", ".join(other.removesuffix(".weight") for other in missing)
        plan.faults.append(f"{name.removesuffix('.weight')} is trained apart from {modules}, {_UNTIED}")


def _is_trained_apart(architecture: Architecture, adapter: Adapter, name: str, edit: PlannedEdit) -> bool:
    """PEFT's model has this edit under one name of a tied weight alone.

    Factors and modules of `modules_to_save` wrap one module.  Rows of the input embedding are given to all modules
    that are tied to it, and a tensor that is stored as it is replaces the shared one.
    """
    if edit.kind == "replaced":
        return is_saved_whole(adapter.config, edit.module)
    return edit.kind != "rows" or name != architecture.embedding


def _misfit(architecture: Architecture, adapter: Adapter, parameter: str, edit: PlannedEdit) -> str | None:
    """Why tensors that are no factors do not fit a parameter."""
    if "values" not in edit.stored:
        return None
    stored, expected = adapter.shape(edit.stored["values"]), architecture.parameters.get(parameter)
    if edit.kind != "rows":
        if stored == expected:
            return None
        unbiased = edit.kind == "shifted" and expected is None
        reason = "a bias (lora_bias), which PEFT can't merge either: " if unbiased else ""
        return f"{parameter} is {reason}{list(stored)}, {_its_shape(architecture, parameter)}"
    if expected is None or len(stored) != 2 or stored[1:] != expected[1:]:
        return f"{parameter} has rows of {list(stored[1:])}, {_its_shape(architecture, parameter)}"
    if len(set(edit.indices)) != stored[0] or not all(0 <= index < expected[0] for index in edit.indices):
        return (
            f"{parameter} has {stored[0]} rows, and trainable_token_indices no {stored[0]} tokens below {expected[0]}"
        )
    return None


def _check_copies(architecture: Architecture, base: Header, adapter: Adapter, plan: Plan) -> None:
    """Raise InputError where the adapter's copy of a base's tensor differs from it."""
    originals = read_parameters(architecture, base, [parameter for parameter, _ in plan.copies])
    copies = read_tensors(adapter.header, [stored for _, stored in plan.copies])
    for (parameter, original), (_, copy) in zip(originals, copies, strict=True):
        if not torch.equal(copy.to(original.dtype), original):
            mend = f"was trained on another {parameter} than the base's"
            raise InputError(adapter.header.folder, adapter.header.field, None, mend)


def _read(adapter: Adapter, edit: PlannedEdit) -> dict[str, Tensor]:
    """The tensors of one edit by part."""
    tensors = read_tensors(adapter.header, edit.stored.values())
    return {part: tensor for part, (_, tensor) in zip(edit.stored, tensors, strict=True)}


def _same_edit(first: Edit, second: Edit) -> bool:
    """Two edits are the same: of one is an embedding, the factors of the other are its transposed ones, swapped."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        if first.magnitude_O is not None or second.magnitude_O is not None or first.scale != second.scale:
            return False
        if first.transposed == second.transposed:
            return torch.equal(first.down_RI, second.down_RI) and torch.equal(first.up_OR, second.up_OR)
        return torch.equal(first.down_RI, second.up_OR.T) and torch.equal(first.up_OR, second.down_RI.T)
    return isinstance(first, Replaced) and isinstance(second, Replaced) and torch.equal(first.values, second.values)


def _its_shape(architecture: Architecture, parameter: str) -> str:
    if parameter in architecture.outside:
        return "which is no part of the base's language model, and that alone is merged"
    shape = architecture.parameters.get(architecture.aliases.get(parameter, parameter))
    return "which the base does not have" if shape is None else f"the base's is {list(shape)}"
