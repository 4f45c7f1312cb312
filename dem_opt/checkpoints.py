"""Checkpoints on disk -> named tensors; header-only checks that they fit together."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from dem_opt.errors import InputError, shorten

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes a merge can combine, by safetensors' names."""

CONFIG_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OSError, ImportError, StrictDataclassError)
"""What transformers raises for configs that it can make no model of."""

_CHUNK = 2**15
"""Elements hashed at once: they stay in cache between two passes, too few for torch to start threads."""

_SHOWN = 10
"""Mismatches told in full before the rest are counted."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes `start` to `end` of the data part of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What the headers of a checkpoint folder say: its tensors by name.

    `field` is the field of the study file that named the folder, for messages.
    """

    folder: Path
    field: str
    tensors: Mapping[str, StoredTensor]

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return sorted({tensor.file for tensor in self.tensors.values()})


@dataclass(frozen=True)
class Architecture:
    """What the model class makes of a config, without its weights.

    parameters  shape by name in the order of `named_parameters()`: tied weights once
    aliases     the other names of tied weights, and the parameter that each stands for
    embedding   the name of the input embedding, whose first dimension is the vocabulary
    """

    name: str
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    embedding: str


def read_header(folder: Path, field: str) -> Header:
    """The tensors of a checkpoint folder, from its safetensors headers alone.

    Raises InputError for a folder or file that is missing, unreadable or truncated, for pickled weights, for
    a shard outside the folder, and for tensors that are not of a dtype in DTYPES.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder, field):
        for name, tensor in _read_file_header(file, field).items():
            if name in tensors:
                raise InputError(file, field, name, f"this tensor also stands in {tensors[name].file.name}")
            tensors[name] = tensor
    if not tensors:
        raise InputError(folder, field, None, "its weight files hold no tensors")
    return Header(folder, field, tensors)


def read_architecture(header: Header) -> Architecture:
    """Parameter names, shapes and ties of the model that the folder's config describes.

    Raises InputError for a config that transformers can't make a causal language model of.
    """
    model = _construct(header.folder, header.field, torch.float32, "meta")
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    every_name = model.named_parameters(remove_duplicate=False)
    aliases = {name: names[id(parameter)] for name, parameter in every_name if name not in parameters}
    return Architecture(
        name=type(model).__name__,
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        aliases=aliases,
        embedding=names[id(model.get_input_embeddings().weight)],
    )


def check_base(base: Header) -> Architecture:
    """The base's architecture, whose parameters the stored tensors must be.

    Raises InputError where they are not, or where the tokenizer has ids beyond the embedding.
    """
    architecture = read_architecture(base)
    stored = {name: shape for name, (shape, _) in _forms(base, architecture).items()}
    found = _differences(architecture.parameters, stored, architecture.embedding)
    if found:
        mend = f"not the parameters of a {architecture.name}, or renamed on loading: {_tell(found)}"
        raise InputError(base.folder, base.field, None, mend)
    _check_ties(base, architecture)
    _check_tokenizer(base, architecture)
    return architecture


def check_fit(architecture: Architecture, base: Header, other: Header) -> None:
    """Whether another checkpoint has the base's names, shapes, dtypes and vocabulary.

    Tied weights may be stored under all their names or only as the parameter.  Raises one InputError for all
    that differs.
    """
    expected, stored = (_forms(header, architecture) for header in (base, other))
    found = _differences(expected, stored, architecture.embedding)
    ours, theirs = _vocabulary(base), _vocabulary(other)
    if ours != theirs:
        found.append(f"its config.json has a vocabulary (vocab_size) of {theirs}, the base's of {ours}")
    if found:
        mend = f"does not fit the base {base.folder}: {_tell(found)}"
        raise InputError(other.folder, other.field, None, mend)
    _check_ties(other, architecture)


def content_hash(folder: Path, field: str = "checkpoint") -> str:
    """SHA-256 over name, dtype, shape and digest of every tensor, in order of name.

    Sharding and file names change nothing, and neither does config.json, which is no part of the content.
    Hashes are kept in the user's cache folder by path, size, time and inode of the files.

    Raises InputError for NaN or infinite weights, and what `read_header` raises.
    """
    header = read_header(folder, field)
    content = known_content(header)
    if content is None:
        content = hash_tensors(header)
        _write_cache(_read_cache() | {str(folder.resolve()): {"files": _stamp(header), "content": content}})
    return content


def known_content(header: Header) -> str | None:
    """The content hash that the cache has for these very files; None where they have to be read for it."""
    known = _read_cache().get(str(header.folder.resolve()))
    return known.get("content") if isinstance(known, dict) and known.get("files") == _stamp(header) else None


def hash_tensors(header: Header) -> str:
    """The content hash from the bytes, past the cache: one digest for each tensor, many tensors at a time.

    Raises InputError for NaN or infinite weights.
    """
    content = hashlib.sha256()
    names = sorted(header.tensors)
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda item: _digest(header, item[0], item[1]), _tensors(header, names))
        for name, digest in zip(names, digests, strict=True):
            stored = header.tensors[name]
            content.update(repr((name, stored.dtype, stored.shape, digest)).encode())
    return content.hexdigest()


def read_parameters(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors in the order of `names`, mapped from the files, which are read where a tensor is."""
    return _tensors(read_header(folder, "checkpoint"), names)


def empty_model(folder: Path, dtype: torch.dtype, field: str = "base") -> PreTrainedModel:
    """The model that the folder's config describes, for evaluation, with parameters that have no memory yet.

    Buffers that no checkpoint stores (rotary frequencies) are right.  Each parameter is one zero, expanded, to
    be replaced through `parameter.data`.  Raises InputError for a config that no such model can be made of.
    """
    model = _construct(folder, field, dtype, "cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
    model.train(False)
    return model


def silence_transformers() -> None:
    """Let transformers load and save without progress bars of its own."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _construct(folder: Path, field: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model of a config with uninitialized parameters (on the CPU, pages that nobody touched)."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with no_init_weights(), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except CONFIG_ERRORS as error:
        mend = f"no causal language model can be made of it: {shorten(' '.join(str(error).split()), 200)}"
        raise InputError(folder / "config.json", field, None, mend) from None
    model.tie_weights()
    return model


def _weight_files(folder: Path, field: str) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    if not folder.is_dir():
        raise InputError(folder, field, None, "no such folder")
    if not (folder / "config.json").is_file():
        raise InputError(folder, field, None, "has no config.json: name a folder in Hugging Face's format")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX, field)
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        raise InputError(folder, field, None, "has pickled weights only: save it as safetensors")
    raise InputError(folder, field, None, f"has no weights: neither {WEIGHTS} nor {INDEX}")


def _shards(index: Path, field: str) -> list[Path]:
    """The files that an index names, which must lie in its folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(index, field, None, "unreadable: an index is JSON with a `weight_map`") from None
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(index, field, name, "names a shard outside its own folder")
        if not (index.parent / name).is_file():
            raise InputError(index, field, name, "names a shard that is not there: copy the checkpoint again")
    return [index.parent / name for name in sorted(names)]


def _read_file_header(file: Path, field: str) -> dict[str, StoredTensor]:
    """The tensors of one file: eight bytes with the length of the header, the header as JSON, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if length > size - 8:
            raise InputError(file, field, None, "truncated or not a safetensors file: copy or save it again")
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        return {name: _stored(file, field, name, entry, size - 8 - length) for name, entry in entries.items()}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(file, field, None, "unreadable safetensors header: copy or save it again") from None


def _stored(file: Path, field: str, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    """One entry of a header, held against the bytes of data that the file has."""
    start, end = entry["data_offsets"]
    tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), file, start, end)
    if tensor.dtype not in DTYPES:
        mend = f"tensor {name} is {tensor.dtype}: only {', '.join(DTYPES)} can be merged"
        raise InputError(file, field, None, mend)
    if end > data:
        mend = f"truncated: tensor {name} ends at byte {end} of {data}; copy or save it again"
        raise InputError(file, field, None, mend)
    if end - start != prod(tensor.shape) * DTYPES[tensor.dtype].itemsize:
        raise ValueError(name)
    return tensor


def _forms(header: Header, architecture: Architecture) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor that is not another name of a tied one."""
    return {name: (one.shape, one.dtype) for name, one in header.tensors.items() if name not in architecture.aliases}


def _differences(expected: Mapping[str, Any], stored: Mapping[str, Any], embedding: str) -> list[str]:
    """What is told of each name that stands in one only, or in both with different shapes (and dtypes)."""
    found = []
    for name, value in expected.items():
        if name not in stored:
            found.append(f"{name} is missing")
        elif stored[name] != value:
            hint = " (another vocabulary)" if name == embedding else ""
            found.append(f"{name} is {_show(stored[name])}, not {_show(value)}{hint}")
    return found + [f"{name} is unknown to it" for name in stored if name not in expected]


def _show(value: Any) -> str:
    """A shape, or a shape and a dtype, as [2, 3] or [2, 3] BF16."""
    shape, dtype = value if value and isinstance(value[0], tuple) else (value, "")
    return f"{list(shape)} {dtype}".rstrip()


def _tell(found: list[str]) -> str:
    """The first few differences, and a count of the others."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _vocabulary(header: Header) -> object:
    """vocab_size as config.json has it."""
    file = header.folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (ValueError, AttributeError):
        raise InputError(file, header.field, None, "not valid JSON") from None


def _check_tokenizer(base: Header, architecture: Architecture) -> None:
    """Raise InputError where tokenizer.json has an id that the embedding has no row for."""
    file = base.folder / "tokenizer.json"
    if not file.is_file():
        return
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocabulary, added = tokenizer["model"].get("vocab", {}), tokenizer.get("added_tokens") or []
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        highest = max([-1, *ids, *(token["id"] for token in added)])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(file, base.field, None, "unreadable tokenizer: copy or save it again") from None
    rows = architecture.parameters[architecture.embedding][0]
    if highest >= rows:
        mend = f"its vocabulary has id {highest}, the embedding {architecture.embedding} only {rows} rows"
        raise InputError(file, base.field, None, mend)


def _check_ties(header: Header, architecture: Architecture) -> None:
    """Raise InputError where a weight that the config ties is stored twice with different values."""
    for alias, name in architecture.aliases.items():
        if alias in header.tensors:
            (_, one), (_, two) = _tensors(header, (alias, name))
            if one.dtype != two.dtype or not torch.equal(one, two):
                mend = f"{alias} and {name} differ, but config.json ties them: set tie_word_embeddings to false"
                raise InputError(header.folder, header.field, None, mend)


def _tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name over the mapped bytes of the files, each of which is opened once."""
    files: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in header.files}
    for name in names:
        yield name, files[header.tensors[name].file].get_tensor(name)


def _digest(header: Header, name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, all of whose values must be finite."""
    digest = hashlib.sha256()
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        if not chunk.isfinite().all():
            mend = f"tensor {name} has NaN or infinite values: train it again with a lower learning rate"
            raise InputError(header.tensors[name].file, header.field, None, mend)
        digest.update(chunk.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stamp(header: Header) -> list[list[Any]]:
    """What changes when a weight file does: path, size, time of change in nanoseconds, inode."""
    return [[str(one.resolve()), (stat := one.stat()).st_size, stat.st_mtime_ns, stat.st_ino] for one in header.files]


def _cache_file() -> Path:
    """Where content hashes are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dem_opt" / "contents.json"


def _read_cache() -> dict[str, Any]:
    """Known hashes by folder; none where the file is missing or unreadable."""
    try:
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: Mapping[str, Any]) -> None:
    """Replace the cache at once; a cache that can't be written is done without."""
    file = _cache_file()
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(file)
