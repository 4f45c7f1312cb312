"""Checkpoints on disk: headers, stored tensors by name, content hashes.

A safetensors file is eight bytes (the header's length N, little-endian), N bytes of JSON (dtype, shape and offsets of
every tensor), then the tensors' bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dem_opt import json_files
from dem_opt.checkpoints import user_cache
from dem_opt.checkpoints.hf_config import refuse_hub_code, refuse_quantized
from dem_opt.errors import InputError
from dem_opt.progress import current_progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 10**8
"""The longest header that safetensors reads."""

MOST_READ_BYTES = 2**30
"""Bytes read by one system call, which can't read more than 2**31."""

CONTENTS = "contents"
"""Kind of the cache's entries that are content hashes, by the checkpoint's folder."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes a merge can combine, by safetensors' names."""

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    **{"F8_E4M3": 1, "F8_E5M2": 1},
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
}
"""Bytes of an element, of the dtypes that a stored tensor may have."""

_CHUNK = 2**15
"""Elements hashed at once: few enough to stay in cache between two passes and for torch to start no threads."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in bytes `start` to `end` of the data part of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    below: "LowerRows | None" = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class LowerRows:
    """Rows that a tensor has not stored itself, but takes from another one, from row `first` on."""

    name: str
    file: Path
    first: int

    def read(self) -> Tensor:
        """The rows in the dtype that they are stored in."""
        with safe_open(self.file, framework="pt") as stored:
            rows: Tensor = stored.get_slice(self.name)[self.first :]
            return rows


@dataclass(frozen=True)
class Header:
    """The headers of a checkpoint folder: its tensors by name.

    Attributes:
        field: Field of the study file that named the folder, for messages.
        adapter: The folder is an adapter.
        rows: Rows of its vocabulary, where they are not the base's, to which its embeddings are cut or completed.
    """

    folder: Path
    field: str
    tensors: Mapping[str, StoredTensor]
    adapter: bool = False
    rows: int | None = None

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_header(folder: Path, field: str) -> Header:
    """Read the tensors' names, shapes and places of a checkpoint folder from its safetensors headers.

    Raises:
        InputError: A folder or file is missing, unreadable or truncated, weights are pickled or quantized, or a shard
            lies outside the folder.
    """
    tensors: dict[str, StoredTensor] = {}
    files = weight_files(folder, field)
    refuse_quantized(folder, field)
    refuse_hub_code(folder, field)
    for file in files:
        for name, tensor in read_file_header(file, field).items():
            if name in tensors:
                raise InputError(file, field, name, f"this tensor is also in {tensors[name].file.name}")
            tensors[name] = tensor
    if not tensors:
        raise InputError(folder, field, None, "its weight files hold no tensors")
    return Header(folder, field, tensors)


def content_hash(folder: Path, field: str = "checkpoint") -> str:
    """SHA-256 over name, dtype, shape and digest of every tensor, in order of name.

    Sharding and file names change nothing, and neither does config.json, which is no part of the content.
    Hashes are kept in the user's cache folder by path, size, time and inode of the files.

    Raises:
        InputError: Weights are NaN or infinite, or `read_header` raises it.
    """
    header = read_header(folder, field)
    content = known_content(header)
    if content is None:
        content = hash_tensors(header)
        user_cache.put(CONTENTS, str(folder.resolve()), _Known(file_stamps(header.files), content))
    return content


def known_content(header: Header) -> str | None:
    """The content hash in the cache for these very files; None where they have to be read."""
    known = user_cache.get(CONTENTS, str(header.folder.resolve()), _Known)
    return known.content if known is not None and known.files == file_stamps(header.files) else None


def hash_tensors(header: Header) -> str:
    """Compute the content hash from the bytes, without the cache: a digest of each tensor, many at a time.

    Raises:
        InputError: Weights are NaN or infinite.
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
    """Yield stored tensors by name over the mapped bytes of the files, each of which is opened once."""
    files: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in header.files}
    for name in names:
        stored = header.tensors[name]
        tensor = files[stored.file].get_tensor(name)
        if stored.below is not None:
            tensor = torch.cat([tensor, stored.below.read().to(tensor.dtype)])
        yield name, tensor if tensor.shape == stored.shape else tensor[: stored.shape[0]]


def read_into(header: Header, places: Iterable[tuple[str, Tensor]]) -> None:
    """Read stored tensors by name straight into their places, one after the other as they lie in the files.

    A place has the stored dtype and is contiguous.  The bytes are in this process once; a mapped file's pages would
    count beside the place until the file is closed.

    Raises:
        InputError: A file has become shorter.
    """
    order = sorted(places, key=lambda pair: (header.tensors[pair[0]].file, header.tensors[pair[0]].start))
    total = sum(place.nbytes for _, place in order)
    loading = current_progress().phase(f"loading {header.folder.name}", total, "bytes")
    with _open_reader(header) as reader, loading as phase:
        for name, place in order:
            on_cpu = place if place.device.type == "cpu" else torch.empty(place.shape, dtype=place.dtype)
            reader.read(name, on_cpu)
            if on_cpu is not place:
                place.copy_(on_cpu)
            phase.advance(place.nbytes)


def read_each(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield stored tensors by name, each read into memory of its own when its turn comes.

    Raises:
        InputError: A file has become shorter.
    """
    with _open_reader(header) as reader:
        for name in names:
            stored = header.tensors[name]
            tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
            reader.read(name, tensor)
            yield name, tensor


@dataclass(frozen=True)
class _Reader:
    """The files of a checkpoint, open for reading, and the byte at which the data part of each begins."""

    header: Header
    streams: Mapping[Path, FileIO]
    starts: Mapping[Path, int]

    def read(self, name: str, place: Tensor) -> None:
        """Fill contiguous memory with a stored tensor."""
        stored = self.header.tensors[name]
        assert place.is_contiguous() and place.nbytes == stored.nbytes
        stream = self.streams[stored.file]
        stream.seek(self.starts[stored.file] + stored.start)
        if stored.below is not None:
            place[stored.below.first :].copy_(stored.below.read())
        if not _fill(stream, place.view(-1).view(torch.uint8)[: stored.end - stored.start].numpy().data):
            raise InputError(stored.file, self.header.field, None, "has become shorter: copy or save it again")


@contextmanager
def _open_reader(header: Header) -> Iterator[_Reader]:
    """Open the files of a checkpoint."""
    with ExitStack() as stack:
        streams = {file: stack.enter_context(file.open("rb", buffering=0)) for file in header.files}
        starts = {file: 8 + struct.unpack("<Q", stream.read(8))[0] for file, stream in streams.items()}
        yield _Reader(header, streams, starts)


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
    """Read a JSON object from a file of a checkpoint; InputError where it can't be read or holds anything else."""
    return json_files.read_json(file, dict[str, Any], field)


def weight_files(folder: Path, field: str) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        InputError: There are none, or an index names others than those there.
    """
    if not os.path.isdir(folder):
        is_file = os.path.isfile(folder)
        raise InputError(
            folder, field, None, "is a file: name the folder that it is in" if is_file else "no such folder"
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            kind = "the base is a checkpoint" if field == "base" else "write `adapter:` instead of `checkpoint:`"
            raise InputError(folder, field, None, f"is an adapter: {kind}")
        _refuse_loose_link(folder, field)
        raise InputError(folder, field, None, "has no config.json: name a folder in Hugging Face's format")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX, field)
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        mend = "has pickled weights only: save it as safetensors, or allow them by `{path: FOLDER, pickled: true}`"
        raise InputError(folder, field, None, mend)
    _refuse_loose_link(folder, field)
    raise InputError(folder, field, None, f"has no weights: neither {WEIGHTS} nor {INDEX}")


def _refuse_loose_link(folder: Path, field: str) -> None:
    """Raise InputError for a link that leads to nothing, as in a copy of a folder of the hub's cache."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            mend = "is a link to nothing: copy the folder with what its links lead to (cp -rL)"
            raise InputError(path, field, None, mend)


@dataclass(frozen=True)
class _Index:
    """The index of a checkpoint in several files: the file of each tensor."""

    weight_map: dict[str, str]


def _shards(index: Path, field: str) -> list[Path]:
    """The shards that an index names, which must lie in its folder."""
    mend = "an index is JSON with a `weight_map`; copy or save it again"
    names = set(json_files.read_json(index, _Index, field, mend).weight_map.values())
    for name in sorted(names):
        if Path(name).name != name:
            raise InputError(index, field, name, "names a shard outside its own folder")
        if not os.path.isfile(index.parent / name):
            raise InputError(index, field, name, "names a shard that is not there: copy the checkpoint again")
    return [index.parent / name for name in sorted(names)]


def read_file_header(file: Path, field: str) -> dict[str, StoredTensor]:
    """The tensors of one file by name."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise InputError(file, field, None, "truncated or not a safetensors file: copy or save it again")
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = {name: _read_entry(file, field, name, entry, size - 8 - length) for name, entry in entries.items()}
        safe_open(file, framework="pt")  # the library's own checks, beyond those of each entry
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        raise InputError(file, field, None, "unreadable safetensors header: copy or save it again") from None
    return tensors


def _read_entry(file: Path, field: str, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    """One entry of a header, checked against the bytes of data that the file has."""
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
    """SHA-256 of a tensor's bytes; InputError for values that are not finite."""
    digest = hashlib.sha256()
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        if not chunk.isfinite().all():
            mend = f"tensor {name} has NaN or infinite values: train it again with a lower learning rate"
            raise InputError(header.tensors[name].file, header.field, None, mend)
        digest.update(chunk.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Known:
    """An entry of the cache: a content hash, and the stamp of the files that it was computed from."""

    files: list[tuple[str, int, int, int, int]]
    content: str


def file_stamps(files: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """Path, size, both times in nanoseconds and inode of each file: one changes when the file does.

    The time of the content can be set back, as `cp -p` and rsync do; that of the inode can't.
    """
    stats = [(file.resolve(), file.stat()) for file in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
