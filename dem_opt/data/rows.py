"""Data files -> rows: JSON objects, rows of tables, or a whole text, each with its place for messages.

JSON and CSV are read here, because `datasets` does not name the line that is broken, and .txt too, because it makes a
document of every line.  Arrow files are mapped into memory.  Parquet and folders of `save_to_disk` are read through
`datasets`, a row at a time: nothing is downloaded or left on disk.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any, Final

from dem_opt.data.files import Kind, SourceFile
from dem_opt.errors import InputError, nearest

MISSING: Final = object()
"""The value of a column that a row does not have."""

Columns = Sequence[tuple[str, ...]]
"""Columns, each with the names that it may have."""

_ROWS_AT_ONCE = 1000
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32's other mark begins with UTF-16's
_WIDE_JSON = (b"{\0", b"\0{", b"[\0", b"\0[")
_SPACE = re.compile(r"[ \t\r\n]*")
_ARROW_FILE = b"ARROW1"
_DELIMITERS: Mapping[Kind, str] = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """An entry of a data file by column.

    Attributes:
        entry: Its columns.
        file: The file.
        place: Where it stands in the file.
        shown: The entry as messages show it.
        noun: What an entry of the file must be, in messages.
    """

    entry: Mapping[str, Any]
    file: SourceFile
    place: str
    shown: Any
    noun: str = "must have"

    def __getitem__(self, names: tuple[str, ...]) -> Any:
        """The value of the first of a column's names that the row has, else MISSING.

        `a.b` is b within the column a, and `a.0` the first item of a list.
        """
        return next((value for name in names if (value := _look_up(self.entry, name)) is not MISSING), MISSING)

    def error(self, mend: str, value: object = MISSING) -> InputError:
        """An error that names file, field and place; it shows the row unless given a value."""
        return self.file.error(f"{self.place}{mend}", self.shown if value is MISSING else value)

    def must_have(self, form: str) -> InputError:
        """An error that says what the row lacks."""
        return self.error(f" {self.noun} {form}")


def _look_up(value: Any, column: str) -> Any:
    """The value of a dotted name within nested objects and lists; MISSING where there is none."""
    if isinstance(value, Mapping) and column in value:
        return value[column]
    key, dot, rest = column.partition(".")
    inner: Any = MISSING
    if isinstance(value, Mapping):
        inner = value.get(key, MISSING) if dot else MISSING
    elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        inner = value[int(key)]
    return _look_up(inner, rest) if dot else inner


def read_rows(file: SourceFile, columns: Columns, optional: Columns) -> Generator[Row]:
    """The rows of a file in its order.

    Args:
        file: The data file.
        columns: Columns that are read, each by one of its names.
        optional: Columns that are read where the file has them.

    Raises:
        InputError: The file is unreadable, damaged or not of its kind, or a table lacks a column.
    """
    match file.kind:
        case "json":
            return _json(file)
        case "csv" | "tsv":
            return _csv(file, columns)
        case "parquet":
            return _parquet(file, columns, optional)
        case "arrow":
            return _arrow(file, columns, optional)
        case "saved":
            return _saved(file, columns, optional)
        case "text":
            return _whole(file, columns[0][0])


def _whole(file: SourceFile, column: str) -> Generator[Row]:
    """A .txt file: one document."""
    with file.open() as stream:
        yield Row({column: "".join(_lines(stream, file))}, file, "the file", None)


def _lines(stream: Iterable[bytes], file: SourceFile) -> Iterator[str]:
    """The text with its line feeds, a line at a time; only line feeds end one: JSON and CSV hold other separators."""
    offset = 0
    for line in stream:
        if offset == 0 and (line.startswith(_WIDE) or (file.kind == "json" and line[:2] in _WIDE_JSON)):
            raise file.error("is UTF-16 or UTF-32; save it as UTF-8, as `iconv -f UTF-16 -t UTF-8` does")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise file.error(f"must be UTF-8 text; byte {offset + error.start} is not") from None
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(line)


def _json(file: SourceFile) -> Generator[Row]:
    """Objects on lines of their own, in an array, or, in a .json file, over several lines each."""
    with file.open() as stream:
        lines = enumerate(_lines(stream, file), start=1)
        begin, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
        is_array = first.lstrip().startswith("[")
        if is_array or (".json" in file.endings and not _is_json(first)):
            text = "\n" * (begin - 1) + first + "".join(line for _, line in lines)
            yield from _values(text, file, is_array)
            return
        for number, line in chain([(begin, first)], lines):
            if line.strip():
                yield _line(line.rstrip("\r\n"), f"line {number}", file)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _line(line: str, place: str, file: SourceFile) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise file.error(f"{place} is not valid JSON ({error})", line) from None
    return _object(value, file, place, line)


def _object(value: Any, file: SourceFile, place: str, shown: Any) -> Row:
    if not isinstance(value, dict):
        raise file.error(f"{place} must be a JSON object", shown)
    return Row(value, file, place, shown, "must be a JSON object with")


def _values(text: str, file: SourceFile, is_array: bool) -> Iterator[Row]:
    """The values of an array, or values that follow each other; only one of them is decoded at a time."""
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    position = _skip_space(text, text.index("[") + 1 if is_array else 0)
    while text[position : position + 1] not in ("", "]"):
        number, line, counted = number + 1, line + text.count("\n", counted, position), position
        place = f"item {number}, line {line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise file.error(f"{place} is not valid JSON ({error})") from None
        yield _object(value, file, place, value)
        position = _skip_space(text, end)
        if is_array:
            position = _next_item(text, position, place, file)
    if is_array != (text[position:].strip() == "]"):
        raise file.error(f"is not valid JSON after item {number}: an array ends with ], and nothing follows it")


def _next_item(text: str, position: int, place: str, file: SourceFile) -> int:
    """Where the next item of an array begins, or the array ends."""
    if text[position : position + 1] not in (",", "]", ""):
        raise file.error(f"{place} is not valid JSON (a comma is missing behind it)")
    return _skip_space(text, position + 1) if text[position : position + 1] == "," else position


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _csv(file: SourceFile, columns: Columns) -> Generator[Row]:
    """The rows of a table whose first one names the columns; quotes follow RFC 4180."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's limit of 128 KiB
    with file.open() as stream:
        reader = csv.reader(_lines(stream, file), delimiter=_DELIMITERS[file.kind], strict=True)
        try:
            header = next(reader, [])
            _check_header(header, columns, file)
            for number, fields in enumerate(filter(None, reader), start=1):
                place = f"row {number}, line {reader.line_num}"
                if len(fields) != len(header):
                    counts = f"fields ({len(fields)}) than the header ({len(header)})"
                    raise file.error(f"{place} has another number of {counts}; quote texts with commas", fields)
                yield Row(dict(zip(header, fields, strict=True)), file, place, fields)
        except csv.Error as error:
            raise file.error(f"line {reader.line_num} is no line of a table ({error})") from None


def _check_header(names: Sequence[str], columns: Columns, file: SourceFile) -> None:
    """Raise InputError where a table lacks a column."""
    for name, *others in columns:
        if not any(_root(each, names) in names for each in (name, *others)):
            raise file.error(f"has no column of this name; {nearest(name, names)}", name)


def _root(column: str, names: Sequence[str]) -> str:
    """The column of a table that holds a column of a dotted name."""
    return column if column in names else column.partition(".")[0]


def _table_columns(names: Sequence[str], columns: Columns, optional: Columns, file: SourceFile) -> list[str]:
    """The columns to read of a table that has `names`."""
    _check_header(names, columns, file)
    roots = [_root(name, names) for column in (*columns, *optional) for name in column]
    return [root for root in dict.fromkeys(roots) if root in names]


def _table_rows(entries: Iterable[Mapping[str, Any]], file: SourceFile) -> Iterator[Row]:
    for number, entry in enumerate(entries, start=1):
        pruned = {column: _without_nulls(value) for column, value in entry.items()}
        yield Row(pruned, file, f"row {number}", pruned)


def _without_nulls(value: Any) -> Any:
    """A nested value without the keys that only other rows have: a table gives each object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parquet(file: SourceFile, columns: Columns, optional: Columns) -> Generator[Row]:
    """The rows of a Parquet file, the format's columns alone."""
    import datasets
    from pyarrow import parquet

    with _table_errors(file, "Parquet"):
        names = parquet.read_schema(file.path).names
        with TemporaryDirectory() as cache:
            chosen = _table_columns(names, columns, optional, file)
            options = {"columns": chosen, "batch_size": _ROWS_AT_ONCE, "cache_dir": cache}
            yield from _table_rows(datasets.IterableDataset.from_parquet(escape(str(file.path)), **options), file)


def _arrow(file: SourceFile, columns: Columns, optional: Columns) -> Generator[Row]:
    """The rows of an Arrow file, mapped into memory: of a stream, as `datasets` has in its cache, or of a file."""
    from pyarrow import ipc, memory_map

    with _table_errors(file, "Arrow"), memory_map(str(file.path)) as source:
        is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        source.seek(0)
        reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
        chosen = _table_columns(reader.schema.names, columns, optional, file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _table_rows((row for batch in batches for row in batch.select(chosen).to_pylist()), file)


def _saved(file: SourceFile, columns: Columns, optional: Columns) -> Generator[Row]:
    """The rows of a folder that `save_to_disk` wrote, mapped into memory."""
    import datasets

    with _table_errors(file, "a data set of save_to_disk"):
        table = datasets.load_from_disk(str(file.path)).with_format(None)
        chosen = _table_columns(table.column_names, columns, optional, file)
        yield from _table_rows(table.select_columns(chosen), file)


@contextmanager
def _table_errors(file: SourceFile, kind: str) -> Iterator[None]:
    """Tell errors of `datasets` and Arrow as the file's."""
    import datasets
    from pyarrow import ArrowException

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0].rstrip(" .:")
        raise file.error(f"can't be read as {kind} ({reason}); write it anew") from None
