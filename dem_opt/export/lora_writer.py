"""Write a composite as one LoRA in PEFT's format, and prove from disk that it is the composite.

    Theta_D - Theta = sum_i w_i s_i B_i A_i = B A ,  so that alpha / r = 1

Ranks add up, and the LoRA is exact; or each product is replaced by the nearest of a given rank.  Biases are stored as
they are, other parameters that are no matrices as PEFT's `modules_to_save`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dem_opt.atomic import publish_folder
from dem_opt.checkpoints.adapter_edits import Edit, LowRank, Replaced, ReplacedRows
from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS, check_adapter, load_edits, read_adapter
from dem_opt.checkpoints.architecture import Architecture, empty_model, read_architecture
from dem_opt.checkpoints.files import Header, read_header, read_tensors
from dem_opt.checkpoints.loading import read_parameters
from dem_opt.errors import InputError
from dem_opt.export.low_rank import Factors, nearest, sum_of, truncated
from dem_opt.export.model_card import hub_id
from dem_opt.export.writer import (
    MARKER,
    Export,
    ExportError,
    as_input_error,
    copy_files,
    provenance,
    refuse_changed,
    refuse_occupied,
    refuse_place,
    staged,
    write_json,
)
from dem_opt.manifest import FILES, manifest_of
from dem_opt.merging.tensors import merged_tensors
from dem_opt.progress import current_progress
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

OPTION, RANK = "--as-lora", "--rank"

_PREFIX = "base_model.model"

_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
"""Files of the base's folder that stand beside an adapter: its tokenizer."""

SAME_LORA_SCORE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
"""Largest relative difference between the NLL of an exact LoRA and of its composite, by the base's dtype.

The composite sums fine-tunes that were each rounded to that dtype; the LoRA is rounded once.
"""


@dataclass
class _Parts:
    """An adapter in the making.

    Attributes:
        tensors: By stored name.
        ranks: By module with factors.
        saved: Modules that are stored as a whole.
        biases: Merged biases by parameter.
        has_tied: A tied weight is among them.
        is_truncated: Some products are the nearest of a smaller rank.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    biases: dict[str, Tensor] = field(default_factory=dict)
    has_tied: bool = False
    is_truncated: bool = False


def write_lora(
    base: StoredModel,
    stored: Mapping[str, StoredModel],
    composite: Composite,
    out: Path,
    approve: Callable[[Export], Mapping[str, str]],
    rank: int | None = None,
    overwrite: bool = True,
) -> Export:
    """Write a composite as a PEFT adapter of the base, whole and approved or not at all.

    Args:
        base: The base.
        stored: Checkpoints and adapters by content.
        composite: The composite.
        out: Folder to write.
        approve: Sees the folder before it gets its name; the texts that it gives are written beside the weights.
        rank: Largest rank of a product; None adds up the ranks of the adapters.
        overwrite: An earlier export may be replaced.

    Raises:
        InputError: A part of the composite can't be written as a LoRA of this rank, or `out` can't be written.
    """
    out = out.absolute()
    refuse_place(out, [base.path, *(model.path for model in stored.values())], overwrite)
    used = {content: stored[content] for content, _ in composite.terms}
    refuse_changed(base, used.values())
    header = read_header(base.path, "base")
    architecture = read_architecture(header)
    parts = _build(architecture, header, base, used, composite, rank)
    written = Export(path=out, base=base, stored=used, composite=composite, content="")
    with staged(out) as partial:
        with as_input_error(out):
            save_file(parts.tensors, partial / WEIGHTS, metadata={"format": "pt"})
            write_json(partial / CONFIG, _config(architecture, base, parts))
            copy_files(base.path, partial, _COPIED)
        content = read_adapter(partial, "export").content(base.content)
        written = replace(written, content=content, rank=max(parts.ranks.values()), is_truncated=parts.is_truncated)
        texts = approve(replace(written, path=partial))
        with as_input_error(out):
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            write_json(partial / MARKER, provenance(composite, content) | {FILES: manifest_of(partial)})
            refuse_occupied(out, overwrite)
            publish_folder(partial, out)
    return written


def prove_lora(export: Export) -> None:
    """Read an exported LoRA from disk, compare it with a fresh merge, and load it through peft where that is installed.

    Of a truncated one only the reading is proved here; what it costs is measured.

    Raises:
        ExportError: It is not what was merged, or peft does not load it as it was written.
    """
    header = read_header(export.base.path, "base")
    architecture, adapter = read_architecture(header), read_adapter(export.path, "export")
    check_adapter(architecture, header, adapter)
    if adapter.content(export.base.content) != export.content:
        raise ExportError(f"{export.path}: its weights are not those that were written")
    if not export.is_truncated:
        _compare(architecture, header, export, load_edits(architecture, adapter))
    if find_spec("peft") is not None:
        _load_through_peft(header, export.path)


def _build(
    architecture: Architecture,
    header: Header,
    base: StoredModel,
    used: Mapping[str, StoredModel],
    composite: Composite,
    rank: int | None,
) -> _Parts:
    """The tensors of the LoRA."""
    terms = [(units / UNIT, used[content]) for content, units in composite.terms if content != base.content]
    whole = [model for _, model in terms if model.base is None]
    if whole and rank is None:
        mend = "is a whole fine-tune, which no LoRA holds exactly: add --rank R for the nearest of rank R"
        raise InputError(whole[0].path, OPTION, None, mend)
    changes: dict[str, list[tuple[float, Edit]]] = {}
    for weight, model in terms:
        for name, edit in load_edits(architecture, read_adapter(model.path, model.field)).items() if model.base else ():
            changes.setdefault(name, []).append((weight, edit))
    parts = _Parts()
    rest = [name for name in architecture.parameters if whole or (name in changes and not _plain(changes[name]))]
    for name in sorted(changes.keys() - {*rest}):
        factors = sum_of(_plain(changes[name]))
        if rank is not None and factors.rank > rank:
            factors, parts.is_truncated = truncated(factors, rank), True
        _add_factors(architecture, parts, name, factors)
    for name, merged, original in _merged(architecture, header, base, used, composite, rest):
        if not torch.equal(merged, original.float()):
            _add_dense(architecture, parts, name, merged, original, changes.get(name, []), rank)
    _finish(architecture, header, parts)
    return parts


def _plain(changes: Sequence[tuple[float, Edit]]) -> list[tuple[float, LowRank]]:
    """The changes of a parameter if all are low-rank sums, without DoRA's magnitudes; else nothing."""
    plain = [(weight, x) for weight, x in changes if isinstance(x, LowRank) and x.magnitude_O is None]
    return plain if len(plain) == len(changes) else []


def _merged(
    architecture: Architecture,
    header: Header,
    base: StoredModel,
    used: Mapping[str, StoredModel],
    composite: Composite,
    names: Sequence[str],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Parameters of the composite in float32, each with the base's own values."""
    layout = architecture.layout(header)
    if fused := [name for name in names if name in layout.fused or len(architecture.parameters[name]) > 2]:
        raise InputError(None, OPTION, None, f"{fused[0]}, a stack of matrices, can't be written as a LoRA here")
    stored = [layout.sources[name][0] for name in names]
    merged = merged_tensors(architecture, base, used, composite, stored, torch.float32)
    originals = read_parameters(architecture, header, names)
    for (name, original), (_, tensor) in zip(originals, merged, strict=True):
        yield name, tensor, original


def _add_dense(
    architecture: Architecture,
    parts: _Parts,
    name: str,
    merged: Tensor,
    original: Tensor,
    changes: Sequence[tuple[float, Edit]],
    rank: int | None,
) -> None:
    """Add a parameter whose change is no sum of factors: as the nearest of the rank, or as it is."""
    saved_whole = bool(changes) and all(isinstance(edit, Replaced | ReplacedRows) for _, edit in changes)
    module = architecture.module_of(name)
    if name.endswith(".weight") and isinstance(module, nn.Linear | Conv1D) and not saved_whole:
        if rank is None:
            mend = "which no LoRA holds exactly: add --rank R for the nearest of rank R"
            raise InputError(None, OPTION, None, f"{name} was trained as DoRA, or whole by some adapters, {mend}")
        parts.is_truncated = True
        change = merged - original.float()
        _add_factors(architecture, parts, name, nearest(change.T if isinstance(module, Conv1D) else change, rank))
    elif name.endswith(".bias"):
        parts.biases[name] = merged.to(original.dtype)
    else:
        names = architecture.names_of(name)
        parts.has_tied |= len(names) > 1
        for own in names:
            parts.tensors[f"{_PREFIX}.{own}"] = merged.to(original.dtype, copy=True)
            parts.saved.add(own.rpartition(".")[0])


def _add_factors(architecture: Architecture, parts: _Parts, parameter: str, factors: Factors) -> None:
    """Add the factors of a parameter under each of its names; those of an embedding map from a one-hot."""
    names = architecture.names_of(parameter)
    parts.has_tied |= len(names) > 1
    from_embedding = isinstance(architecture.module_of(parameter), nn.Embedding)
    for name in names:
        module = name.removesuffix(".weight")
        is_embedding = isinstance(architecture.module_of(name), nn.Embedding)
        down, up = factors if is_embedding == from_embedding else (factors.up_OR.T, factors.down_RI.T)
        keys = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        for key, tensor in zip(keys, (down, up), strict=True):
            parts.tensors[f"{_PREFIX}.{module}.{key}"] = tensor.clone(memory_format=torch.contiguous_format)
        parts.ranks[module] = factors.rank


def _finish(architecture: Architecture, header: Header, parts: _Parts) -> None:
    """Add biases, and what else the modules that are stored whole consist of.

    Raises:
        InputError: PEFT has no way to store this.
    """
    if not parts.ranks:
        raise InputError(None, OPTION, None, "the composite changes no matrix of the base: there is no LoRA to write")
    for name, bias in parts.biases.items():
        module = name.removesuffix(".bias")
        place = f"{module}.base_layer" if module in parts.ranks else module
        parts.tensors[f"{_PREFIX}.{place}.bias"] = bias
    for module in sorted(parts.saved):
        inside = [name for name in architecture.parameters if name.startswith(f"{module}.")]
        if module in parts.ranks or any("." in name.removeprefix(f"{module}.") for name in inside):
            raise InputError(None, OPTION, None, f"{module} can't be stored in an adapter: export without {OPTION}")
        missing = [name for name in inside if f"{_PREFIX}.{name}" not in parts.tensors]
        parts.tensors |= {f"{_PREFIX}.{name}": x for name, x in read_parameters(architecture, header, missing)}


def _config(architecture: Architecture, base: StoredModel, parts: _Parts) -> dict[str, Any]:
    """adapter_config.json, with alpha = r for every module."""
    rank = max(parts.ranks.values())
    ranks = {module: own for module, own in sorted(parts.ranks.items()) if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if architecture.paired else "CAUSAL_LM",
        "base_model_name_or_path": hub_id(base.path) or str(base.path.resolve()),
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": _shortest(architecture, {*parts.ranks}),
        "modules_to_save": sorted(parts.saved) or None,
        "bias": "all" if parts.biases else "none",
        "fan_in_fan_out": any(isinstance(architecture.module_of(f"{x}.weight"), Conv1D) for x in parts.ranks),
        "ensure_weight_tying": parts.has_tied,
    }


def _shortest(architecture: Architecture, targets: set[str]) -> list[str]:
    """The last components of the targets' names, if these are the names of no other module; else the whole names."""
    endings = {name.rpartition(".")[2] for name in targets}
    names = (x for parameter in architecture.parameters for x in architecture.names_of(parameter))
    modules = {name.rpartition(".")[0] for name in names}
    return sorted(endings if {x for x in modules if x.rpartition(".")[2] in endings} == targets else targets)


def _compare(architecture: Architecture, header: Header, export: Export, edits: Mapping[str, Edit]) -> None:
    """Raise ExportError where base and LoRA are not the composite, but for rounding.

    Fine-tunes are rounded to the base's dtype before they are summed, the LoRA is not: each term may be off by half a
    unit in the last place.
    """
    layout = architecture.layout(header)
    names = [name for name in architecture.parameters if name not in layout.fused or name in edits]
    stored = [layout.sources[name][0] for name in names]
    merged = merged_tensors(architecture, export.base, export.stored, export.composite, stored, torch.float32)
    spread = 1 + sum(abs(units) for _, units in export.composite.terms) / UNIT
    with current_progress().phase("comparing from disk", len(names), "tensors") as phase:
        for name, (_, expected), (_, original) in zip(names, merged, read_tensors(header, stored), strict=True):
            made = edits[name].apply(original.float()) if name in edits else original.float()
            close = 2 * torch.finfo(original.dtype).eps * spread * max(expected.abs().max(), made.abs().max())
            if (made - expected).abs().max() > close:
                raise ExportError(f"{export.path}: {name} is not what was merged")
            phase.advance()


def _load_through_peft(base: Header, folder: Path) -> None:
    """Raise ExportError where peft does not load every tensor of a folder as it was written, with a scale of 1."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights and of embeddings that are saved
        model = peft.PeftModel.from_pretrained(empty_model(base.folder, torch.float32), folder, low_cpu_mem_usage=True)
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = read_adapter(folder, "export")
    written = dict(read_tensors(adapter.header, adapter.header.tensors))
    for name, tensor in written.items():
        # Biases are the base's, of which peft's state has those alone that the adapter's config names.
        missing = name not in loaded and not name.endswith(".bias")
        if missing or (name in loaded and not torch.equal(loaded[name].to(tensor.dtype), tensor)):
            raise ExportError(f"{folder}: peft does not load {name} as it was written")
    scales = {s for x in model.modules() if isinstance(own := getattr(x, "scaling", None), dict) for s in own.values()}
    if scales - {1.0}:
        raise ExportError(f"{folder}: peft scales it by {sorted(scales)}, not by 1")
