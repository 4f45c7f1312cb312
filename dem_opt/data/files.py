"""The study file's data paths -> data files on disk, and their bytes, decompressed."""

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from io import BufferedReader
from os import stat
from pathlib import Path, PurePath
from typing import Literal

from dem_opt.config import DataFile
from dem_opt.errors import InputError

Kind = Literal["json", "csv", "tsv", "parquet", "arrow", "text", "saved"]

_KINDS: Mapping[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Kinds of files by their ending, in lower case."""

_READABLE = (
    "must be a .jsonl or .json file (JSON objects), a .csv, .tsv, .parquet or .arrow file (a table) or a "
    ".txt file "
    "(one document), which may be compressed (.gz, .zst, .bz2, .xz, .lz4, .zip)"
)

_COMPRESSIONS: Mapping[str, tuple[str, bytes]] = {
    ".gz": ("gzip", b"\x1f\x8b"),
    ".zst": ("zstd", b"\x28\xb5\x2f\xfd"),
    ".bz2": ("bz2", b"BZh"),
    ".xz": ("xz", b"\xfd7zXZ\x00"),
    ".lz4": ("lz4", b"\x04\x22\x4d\x18"),
    ".zip": ("zip", b"PK\x03\x04"),
}
"""Compressions by ending: name, and the bytes that a file of it begins with."""

_BZ2_BLOCK = b"1AY&SY"  # after "BZh" and a digit: three letters alone may begin a text

_MARKERS = ("dataset_info.json", "state.json")
"""Files by which a folder of `save_to_disk` is known."""

_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, NotImplementedError)
"""Errors of reading and decompressing; `zipfile` has the last two for passwords and for unknown methods."""


@dataclass(frozen=True)
class SourceFile:
    """A data file, or a folder that `save_to_disk` wrote.

    Attributes:
        path: Its path.
        field: Field of the study file that named it.
        kind: How it is read.
    """

    path: Path
    field: str | None
    kind: Kind

    @property
    def endings(self) -> list[str]:
        """Endings of its name, in lower case."""
        return [ending.lower() for ending in self.path.suffixes]

    def contents(self) -> list[Path]:
        """Return the files that hold its rows."""
        return sorted(self.path.glob("*.arrow")) if self.kind == "saved" else [self.path]

    def error(self, mend: str, value: object = None) -> InputError:
        """Return an error that names the file and the field."""
        return InputError(self.path, self.field, value, mend)

    @contextmanager
    def open(self) -> Iterator[Iterable[bytes]]:
        """Open the file; its lines of bytes, decompressed.

        Raises:
            InputError: It can't be read, or is damaged; also for errors of reading within the context.
        """
        try:
            with ExitStack() as stack:
                yield self._opened(stack)
        except _DAMAGED as error:
            raise self.error(f"can't be read ({_reason(error)})") from None

    def _opened(self, stack: ExitStack) -> Iterable[bytes]:
        """The bytes of the file; its beginning tells how they are compressed, whatever its name."""
        with self.path.open("rb") as file:
            compression = _compression(file.read(10))
        ending = self.path.suffix.lower()
        expected, _ = _COMPRESSIONS.get(ending, (None, b""))
        if expected is not None and expected != compression:
            raise self.error(f"ends in {ending}, but is no {expected} file; compress it anew, or rename it")
        match compression:
            case "gzip":
                return stack.enter_context(gzip.open(self.path))
            case "bz2":
                return stack.enter_context(bz2.open(self.path))
            case "xz":
                return stack.enter_context(lzma.open(self.path))
            case "zip":
                return self._zipped(stack)
            case "zstd" | "lz4":
                import pyarrow

                raw = pyarrow.input_stream(str(self.path), compression=compression)
                return stack.enter_context(BufferedReader(raw))
            case _:
                return stack.enter_context(self.path.open("rb"))

    def _zipped(self, stack: ExitStack) -> Iterable[bytes]:
        archive = stack.enter_context(zipfile.ZipFile(self.path))
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise self.error(f"holds {len(names)} files; unpack it and name the folder")
        return stack.enter_context(archive.open(names[0]))


def _compression(head: bytes) -> str | None:
    """The compression of a file that begins with `head`."""
    for name, magic in _COMPRESSIONS.values():
        if head.startswith(magic) and (name != "bz2" or head[4:] == _BZ2_BLOCK):
            return name
    return None


def _reason(error: BaseException) -> str:
    reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0].rstrip(" .:")
    return reason or type(error).__name__


def find_files(data: DataFile, field: str | None) -> list[SourceFile]:
    """The data files of a study file's entry: its paths in their order, folders and patterns in that of names.

    Raises:
        InputError: A path or pattern leads to nothing, a folder has no data files or several kinds of them, or a file
            is named twice.
    """
    files = []
    for path in data.paths:
        try:
            files += _at(path, field)
        except OSError as error:
            raise InputError(path, field, None, f"can't be read ({_reason(error)})") from None
    _refuse_repeats(files)
    return files


def _at(path: Path, field: str | None) -> list[SourceFile]:
    """The data files of one path."""
    if path.is_dir():
        return [SourceFile(path, field, "saved")] if _is_saved(path, field) else _in_folder(path, field)
    if path.is_file():
        return [_source(path, field)]
    if path.exists():
        raise InputError(path, field, None, "can't be read (not a file)")
    if not has_magic(str(path)):
        raise InputError(path, field, None, "no such file")
    matches = _matches(path)
    if not matches:
        raise InputError(path, field, None, "no file matches the pattern")
    return [_source(match, field) for match in matches]


def _matches(pattern: Path) -> list[Path]:
    """The files of a pattern, of which the folders that exist are taken as they are written, brackets and all."""
    root = next(parent for parent in pattern.parents if parent.is_dir())
    names = glob(str(pattern.relative_to(root)), root_dir=root, recursive=True)
    return sorted(root / name for name in names if (root / name).is_file())


def _kind(path: Path) -> Kind | None:
    name = PurePath(path.name.lower())
    if name.suffix not in _COMPRESSIONS:
        return _KINDS.get(name.suffix)
    kind = _KINDS.get(PurePath(name.stem).suffix)
    return None if kind in ("parquet", "arrow") else kind


def is_data_file(path: Path) -> bool:
    """True if a file's name ends as those of data files do."""
    return _kind(path) is not None


def _source(path: Path, field: str | None) -> SourceFile:
    kind = _kind(path)
    if kind is None:
        raise InputError(path, field, None, _READABLE)
    return SourceFile(path, field, kind)


def _is_saved(folder: Path, field: str | None) -> bool:
    """True if `save_to_disk` wrote the folder, as one split."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_MARKERS[0]}"))
        mend = f"holds several splits; name the folder of one ({', '.join(splits)})"
        raise InputError(folder, field, None, mend)
    return all((folder / name).is_file() for name in _MARKERS)


def _in_folder(folder: Path, field: str | None) -> list[SourceFile]:
    """The data files that stand in a folder itself; hidden files and those of other kinds are none of them."""
    paths = sorted(path for path in folder.iterdir() if path.name[0] not in "._" and path.is_file())
    files = [SourceFile(path, field, kind) for path in paths if (kind := _kind(path)) is not None]
    if not files:
        mend = "the folder has no data files; name them, or a pattern such as folder/**/*.jsonl"
        raise InputError(folder, field, None, mend)
    if len({file.kind for file in files}) > 1:
        names = ", ".join(sorted({"".join(file.path.suffixes[-1:]) for file in files}))
        mend = f"the folder has data files of several kinds ({names}); name those you mean by a pattern"
        raise InputError(folder, field, None, mend)
    return files


def _refuse_repeats(files: list[SourceFile]) -> None:
    """Raise InputError where two paths lead to the same file."""
    seen: dict[tuple[int, int], SourceFile] = {}
    for file in files:
        status = stat(file.path)
        first = seen.setdefault((status.st_dev, status.st_ino), file)
        if first is not file:
            also = "" if first.path == file.path else f", also as {first.path}"
            raise file.error(f"is named twice{also}; name each data file once")
