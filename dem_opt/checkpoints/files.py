"""Checkpoints on disk: headers, stored tensors by name, content hashes."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dem_opt.atomic import write_text
from dem_opt.checkpoints.hf_config import refuse_quantized
from dem_opt.errors import InputError
from dem_opt.progress import current_progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 10**8
"""The longest header that safetensors reads."""

MOST_READ_BYTES = 2**30
"""Read by one call; more than 2**31 can't be."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes a merge can combine, by safetensors' names."""

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    name: dtype.itemsize for name, dtype in DTYPES.items()
}
"""Bytes of an element, of the dtypes that a stored tensor may have."""

_CHUNK = 2**15
"""Elements hashed at once: they stay in cache between two passes, too few for torch to start threads."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes `start` to `end` of the data part of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What the headers of a checkpoint folder say: its tensors by name.

    `field` is the field of the study file that named the folder, for messages; `adapter`, whether it is one.
    """

    folder: Path
    field: str
    tensors: Mapping[str, StoredTensor]
    adapter: bool = False

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_header(folder: Path, field: str) -> Header:
    """The tensors of a checkpoint folder, from its safetensors headers alone.

    Raises InputError for a folder or file that is missing, unreadable or truncated, for pickled or quantized
    weights, and for a shard outside the folder.
    """
    tensors: dict[str, StoredTensor] = {}
    files = _weight_files(folder, field)
    refuse_quantized(folder, field)
    for file in files:
        for name, tensor in read_file_header(file, field).items():
            if name in tensors:
                raise InputError(file, field, name, f"this tensor also stands in {tensors[name].file.name}")
            tensors[name] = tensor
    if not tensors:
        raise InputError(folder, field, None, "its weight files hold no tensors")
    return Header(folder, field, tensors)


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
    with (
        ThreadPoolExecutor() as threads,
        current_progress().phase(f"hashing {header.field}", header.nbytes, "bytes") as phase,
    ):
        digests = threads.map(lambda item: _digest(header, item[0], item[1]), read_tensors(header, names))
        for name, digest in zip(names, digests, strict=True):
            stored = header.tensors[name]
            phase.advance(stored.nbytes)
            content.update(repr((name, stored.dtype, stored.shape, digest)).encode())
    return content.hexdigest()


def read_tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors by name over the mapped bytes of the files, each of which is opened once."""
    files: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in header.files}
    for name in names:
        yield name, files[header.tensors[name].file].get_tensor(name)


def read_into(header: Header, places: Mapping[str, Tensor]) -> None:
    """Read stored tensors straight to where they are wanted, one after the other as they lie in the files.

    A place has the stored dtype and is contiguous.  What is read is in this process once: a mapped file's pages would
    count beside the place until the file is closed.  Raises InputError for a file that has become shorter.
    """
    order = sorted(places, key=lambda name: (header.tensors[name].file, header.tensors[name].start))
    total = sum(place.nbytes for place in places.values())
    loading = current_progress().phase(f"loading {header.folder.name}", total, "bytes")
    with _Reader(header) as reader, loading as phase:
        for name in order:
            place = places[name]
            here = place if place.device.type == "cpu" else torch.empty(place.shape, dtype=place.dtype)
            reader.read(name, here)
            if here is not place:
                place.copy_(here)
            phase.advance(place.nbytes)


def read_each(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors by name, each read into memory of its own when its turn comes.

    Raises InputError for a file that has become shorter.
    """
    with _Reader(header) as reader:
        for name in names:
            stored = header.tensors[name]
            tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
            reader.read(name, tensor)
            yield name, tensor


class _Reader(ExitStack):
    """The files of a checkpoint, open for reading."""

    def __init__(self, header: Header) -> None:
        super().__init__()
        self._header = header
        self._streams = {file: self.enter_context(file.open("rb", buffering=0)) for file in header.files}
        self._first = {file: 8 + struct.unpack("<Q", stream.read(8))[0] for file, stream in self._streams.items()}

    def read(self, name: str, here: Tensor) -> None:
        """Fill contiguous memory with a stored tensor."""
        stored = self._header.tensors[name]
        assert here.is_contiguous() and here.nbytes == stored.nbytes
        stream = self._streams[stored.file]
        stream.seek(self._first[stored.file] + stored.start)
        if not _fill(stream, here.view(-1).view(torch.uint8).numpy().data):
            raise InputError(stored.file, self._header.field, None, "has become shorter: copy or save it again")


def _fill(stream: FileIO, buffer: memoryview) -> bool:
    """Read until a buffer is full; False where the file ends before."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done : done + MOST_READ_BYTES])
        if not count:
            return False
        done += count
    return True


def read_json(file: Path, field: str) -> dict[str, Any]:
    """A JSON object in a file of a checkpoint.

    Raises InputError where it holds anything else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InputError(file, field, None, "not a JSON object: copy or save it again")
    return data


def _weight_files(folder: Path, field: str) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    if not os.path.isdir(folder):
        raise InputError(folder, field, None, "no such folder")
    if not (folder / "config.json").is_file():
        raise InputError(folder, field, None, "has no config.json: name a folder in Hugging Face's format")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX, field)
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        mend = "has pickled weights only: save it as safetensors, or allow them by `{path: FOLDER, pickled: true}`"
        raise InputError(folder, field, None, mend)
    raise InputError(folder, field, None, f"has no weights: neither {WEIGHTS} nor {INDEX}")


def _shards(index: Path, field: str) -> list[Path]:
    """The files that an index names, which must lie in its folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(index, field, None, "unreadable: an index is JSON with a `weight_map`") from None
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(index, field, name, "names a shard outside its own folder")
        if not os.path.isfile(index.parent / name):
            raise InputError(index, field, name, "names a shard that is not there: copy the checkpoint again")
    return [index.parent / name for name in sorted(names)]


def read_file_header(file: Path, field: str) -> dict[str, StoredTensor]:
    """The tensors of one file: eight bytes with the length of the header, the header as JSON, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise InputError(file, field, None, "truncated or not a safetensors file: copy or save it again")
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = {name: _stored(file, field, name, entry, size - 8 - length) for name, entry in entries.items()}
        safe_open(file, framework="pt")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        raise InputError(file, field, None, "unreadable safetensors header: copy or save it again") from None
    return tensors


def _stored(file: Path, field: str, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    """One entry of a header, held against the bytes of data that the file has."""
    start, end = entry["data_offsets"]
    tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), file, start, end)
    if tensor.dtype not in ITEM_BYTES:
        mend = f"tensor {name} is {tensor.dtype}: only {', '.join(DTYPES)} can be merged"
        raise InputError(file, field, None, mend)
    if end > data:
        mend = f"truncated: tensor {name} ends at byte {end} of {data}; copy or save it again"
        raise InputError(file, field, None, mend)
    if end - start != prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise ValueError(name)
    return tensor


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


def cache_folder() -> Path:
    """What is kept for this user: content hashes, converted checkpoints."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dem_opt"


def _cache_file() -> Path:
    """Where content hashes are kept."""
    return cache_folder() / "contents.json"


def _read_cache() -> dict[str, Any]:
    """Known hashes by folder; none where the file is missing or unreadable."""
    try:
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: Mapping[str, Any]) -> None:
    """Replace the cache; without write permission hashes are computed anew every time."""
    with suppress(OSError):
        write_text(_cache_file(), json.dumps(known))
