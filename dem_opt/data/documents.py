"""Data files -> documents: texts, pairs of prompt and completion, conversations.

JSON lines are read here, because `datasets` does not tell the line that is broken; .txt too, because it makes a
document of every line.  Parquet is read through `datasets`, streaming: nothing is downloaded or left on disk.
"""

import json
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from glob import escape
from tempfile import TemporaryDirectory
from typing import Any

from dem_opt.config import DataFile
from dem_opt.errors import InputError, nearest

ROLES = ("system", "user", "assistant", "tool")
"""Roles of a conversation's turns."""

_ROWS_AT_ONCE = 1000
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Pair:
    """A prompt, which is not scored, and a completion, which is."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; the assistant's are scored."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    turns: tuple[Turn, ...]


Document = str | Pair | Chat


def document_identity(document: Document) -> str:
    """A text that identifies a document among those of its format; it is hashed to order documents."""
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        return json.dumps([document.prompt, document.completion])
    return json.dumps([[turn.role, turn.content] for turn in document.turns])


@dataclass(frozen=True)
class _Row:
    """An entry of a file by column, with its place and its form in an error."""

    entry: Mapping[str, Any]
    place: str
    shown: Any


@dataclass(frozen=True)
class _Reader:
    """A data file, and the study file's field that named it."""

    data: DataFile
    field: str | None

    def error(self, mend: str, value: object = None) -> InputError:
        return InputError(self.data.path, self.field, value, mend)


def read_documents(data: DataFile, field: str | None = None) -> list[Document]:
    """The documents of a file in its order: one of each line (.jsonl) or row (.parquet), or one in all (.txt).

    Documents without text to score are left out: texts and completions of white space alone, conversations in which
    the assistant says no more than that.  All others are returned unchanged.  A byte order mark at the start of
    a .jsonl or .txt file is no text.  `field` is the study file's field that named the file.

    Raises InputError for a file that is missing, unreadable, not UTF-8 or no Parquet, for an entry without the
    format's columns or with something else in them, and where no document is left.
    """
    reader = _Reader(data, field)
    if data.path.suffix not in _READERS:
        raise reader.error(
            "must be a .jsonl file (a JSON object on each line), a .parquet file or a .txt file (one document)"
        )
    if not data.path.is_file():
        raise reader.error("can't be read (not a file)" if data.path.exists() else "no such file")
    try:
        with closing(_READERS[data.path.suffix](reader)) as rows:
            documents = [_document(row, reader) for row in rows]
    except OSError as error:
        raise reader.error(f"can't be read ({error.strerror or _first_line(error)})") from None
    documents = [document for document in documents if _scored_text(document).strip()]
    if not documents:
        raise reader.error("has no text to score; give at least one document that is not empty")
    return documents


def _scored_text(document: Document) -> str:
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        return document.completion
    return "".join(turn.content for turn in document.turns if turn.role == "assistant")


def _whole_file(reader: _Reader) -> Generator[_Row]:
    """A .txt file: one document of format text."""
    if reader.data.format != "text":
        raise reader.error(f"a .txt file is one document of format text, not {reader.data.format}")
    yield _Row({reader.data.text: _decoded(reader)}, "the file", None)


def _lines(reader: _Reader) -> Generator[_Row]:
    """The lines that are not blank; only line feeds end a line: JSON strings may hold other separators."""
    for number, line in enumerate(_decoded(reader).split("\n"), start=1):
        if line.strip():
            yield _line(line, f"line {number}", reader)


def _line(line: str, place: str, reader: _Reader) -> _Row:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise reader.error(f"{place} is not valid JSON ({error})", line) from None
    return _Row(entry if isinstance(entry, dict) else {}, place, line)


def _decoded(reader: _Reader) -> str:
    try:
        return reader.data.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise reader.error(f"must be UTF-8 text; byte {error.start} is not") from None


def _parquet(reader: _Reader) -> Generator[_Row]:
    """The rows of a Parquet file, the format's columns alone."""
    import datasets
    from pyarrow import ArrowException, parquet

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path, columns = reader.data.path, list(reader.data.columns.values())
    try:
        known = parquet.read_schema(path).names
        for column in columns:
            if column not in known:
                raise reader.error(f"has no column of this name; {nearest(column, known)}", column)
        with TemporaryDirectory() as cache:
            options = {"columns": columns, "batch_size": _ROWS_AT_ONCE, "cache_dir": cache}
            rows = datasets.IterableDataset.from_parquet(escape(str(path)), **options)
            for number, entry in enumerate(rows, start=1):
                yield _Row(entry, f"row {number}", {column: entry[column] for column in columns})
    except ArrowException as error:
        raise reader.error(f"can't be read as Parquet ({_first_line(error)}); write it anew") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(" .:")


_READERS: Mapping[str, Callable[[_Reader], Generator[_Row]]] = {
    ".jsonl": _lines,
    ".parquet": _parquet,
    ".txt": _whole_file,
}


def _document(row: _Row, reader: _Reader) -> Document:
    if reader.data.format == "messages":
        return Chat(_turns(row, reader))
    strings = [row.entry.get(column) for column in reader.data.columns.values()]
    texts = [string for string in strings if isinstance(string, str)]
    if len(texts) < len(strings):
        raise _misses_strings(row, reader)
    for text in texts:
        _check_text(text, row, reader)
    return texts[0] if reader.data.format == "text" else Pair(*texts)


def _misses_strings(row: _Row, reader: _Reader) -> InputError:
    names = [f'a "{column}"' for column in reader.data.columns.values()]
    kind = "that is a string" if len(names) == 1 else "that are strings"
    return reader.error(f"{_must_have(row)} {' and '.join(names)} {kind}", row.shown)


def _must_have(row: _Row) -> str:
    return f"{row.place} must be a JSON object with" if row.place.startswith("line") else f"{row.place} must have"


def _turns(row: _Row, reader: _Reader) -> tuple[Turn, ...]:
    """The messages of an entry; keys other than role and content are ignored."""
    column = reader.data.messages
    messages = row.entry.get(column)
    if not isinstance(messages, list):
        mend = f'{_must_have(row)} "{column}", a list of objects with "role" and "content"'
        raise reader.error(mend, row.shown)
    return tuple(_turn(message, number, row, reader) for number, message in enumerate(messages, start=1))


def _turn(message: Any, number: int, row: _Row, reader: _Reader) -> Turn:
    place = f"{row.place}, message {number}"
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise reader.error(f'{place} must be an object with "role" and "content", which are strings', message)
    if role not in ROLES:
        raise reader.error(f"{place} has an unknown role; {nearest(role, ROLES)}", role)
    _check_text(content, row, reader)
    return Turn(role, content)


def _check_text(text: str, row: _Row, reader: _Reader) -> None:
    if _SURROGATE.search(text):
        raise reader.error(f"{row.place} holds half of a surrogate pair, which is no text", row.shown)
