"""Data files -> documents: texts, pairs of prompt and completion, conversations."""

import json
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from dem_opt.config import DataFile
from dem_opt.data.files import SourceFile, find_files
from dem_opt.data.harness import Role, gold_answers
from dem_opt.data.messages import Chat, check_text, read_chat
from dem_opt.data.rows import MISSING, Row, read_rows
from dem_opt.errors import InputError
from dem_opt.progress import current_progress

_CONVERSATIONS = "conversations"
"""Other name of the column of messages, where the study file names none."""


@dataclass(frozen=True)
class Pair:
    """A prompt, which is not scored, and a completion, which is.

    Attributes:
        prompt: The prompt.
        completion: The completion.
        joined: Encode both as lm-evaluation-harness does: as one text, without EOS.
    """

    prompt: str
    completion: str
    joined: bool = False


Document = str | Pair | Chat


def document_identity(document: Document) -> str:
    """A text that identifies a document among those of its format; it is hashed to order documents.

    Conversations that differ in more than roles and contents may share it.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        return json.dumps([document.prompt, document.completion])
    return json.dumps([[turn.role, turn.content] for turn in document.turns])


def plain_text(document: Document) -> str:
    """The words of a document without a chat template: of a pair both parts, of a conversation its contents."""
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        return document.prompt + document.completion
    return "\n".join(turn.content for turn in document.turns if turn.content)


def read_documents(data: DataFile, field: str | None = None, role: Role = "validation") -> list[Document]:
    """The documents of the study file's data, file by file: one of each object or row, or one in all (.txt).

    Of a task of lm-evaluation-harness, prompts and gold answers (`harness.gold_answers`).

    Documents without text to score are passed over and their number is reported: columns that are null, texts and
    completions of white space alone, conversations in which the assistant says no more than that.  All others are
    returned unchanged.  A byte order mark at the start of a file is no text.

    Args:
        data: The data, of which `find_files` finds the files.
        field: The study file's field that named them.
        role: What the documents of a task are for, which decides its split.

    Raises:
        InputError: A file is missing, unreadable, damaged or not UTF-8, no entry of a file has the format's columns,
            an entry has something else in them, or no document is left; or a task can't be read.
    """
    if data.task is not None:
        return [Pair(prompt, answer, joined=True) for prompt, answer in gold_answers(data, field or "task", role)]
    documents: list[Document] = []
    entries = 0
    for file in find_files(data, field):
        for document in _documents(file, data):
            entries += 1
            if document is None or not _has_text(document):
                continue
            if documents and isinstance(document, Chat) != isinstance(documents[0], Chat):
                raise file.error("has prompts that are texts and prompts that are messages; give one kind")
            documents.append(document)
    if not documents:
        raise InputError(str(data), field, None, "has no text to score; give at least one document that is not empty")
    if len(documents) < entries:
        count = f"{entries - len(documents)} of {entries} documents"
        current_progress().note(f"{data}: {count} have nothing to score (null, empty or masked) and were passed over")
    _report_masks(data, [document for document in documents if isinstance(document, Chat)])
    return documents


def _report_masks(data: DataFile, chats: Sequence[Chat]) -> None:
    """Tell how many of the assistant's messages the data leaves out."""
    masked = sum(len(chat.masked_places) for chat in chats)
    if masked:
        messages = masked + sum(len(chat.scored_places) for chat in chats)
        current_progress().note(f"{data}: {masked} of {messages} messages of the assistant are masked, and not scored")


def stream_documents(data: DataFile, field: str | None = None) -> Generator[Document]:
    """The documents with text to score of files, one at a time, so that files of any size can be read.

    Raises:
        InputError: A file is missing, or what has been read of it is of another format.
    """
    for file in find_files(data, field):
        with closing(_documents(file, data)) as documents:
            yield from (document for document in documents if document is not None and _has_text(document))


def first_document(data: DataFile, field: str | None = None) -> Document | None:
    """The first document with text to score; None where there is none.

    Raises:
        InputError: A file is missing, or what stands before the first document can't be read in this format.
    """
    with closing(stream_documents(data, field)) as documents:
        return next(documents, None)


def holds_chats(data: DataFile, field: str | None = None) -> bool:
    """True if the documents are conversations.  Of pairs the first one tells; where it can't be read, they are not.

    Raises:
        InputError: A file is missing.
    """
    if data.format != "prompt_completion" or data.task is not None:
        return data.format == "messages"
    for file in find_files(data, field):
        with closing(_documents(file, data)) as documents, suppress(InputError):
            if (first := next(filter(None, documents), None)) is not None:
                return isinstance(first, Chat)
    return False


def _has_text(document: Document) -> bool:
    if isinstance(document, str):
        return bool(document.strip())
    if isinstance(document, Pair):
        return bool(document.completion.strip())
    return any(document.turns[place].speaks for place in document.scored_places)


def _documents(file: SourceFile, data: DataFile) -> Generator[Document | None]:
    """The document of each entry; None where a column is null or, though other entries of the file have it, missing."""
    if file.kind == "text" and data.format != "text":
        raise file.error(f"a .txt file is one document of format text, not {data.format}")
    columns: list[tuple[str, ...]] = [(column,) for column in data.columns.values()]
    if data.format == "messages" and "messages" not in data.model_fields_set:
        columns = [("messages", _CONVERSATIONS)]
    optional: list[tuple[str, ...]] = [] if data.format == "text" else [(data.tools,)]
    lacking: dict[tuple[str, ...], Row] = {}
    present: set[tuple[str, ...]] = set()
    with closing(read_rows(file, columns, optional)) as rows:
        for row in rows:
            values = [row[column] for column in columns]
            for column, value in zip(columns, values, strict=True):
                if value is MISSING:
                    lacking.setdefault(column, row)
                else:
                    present.add(column)
            is_whole = not any(value is MISSING or value is None for value in values)
            yield _document(values, row, data) if is_whole else None
    for column, row in lacking.items():
        if column not in present:
            raise _wrong_values(row, data)


def _document(values: Sequence[Any], row: Row, data: DataFile) -> Document:
    if data.format == "messages":
        return read_chat(values[0], row[data.tools,], data.messages, row)
    if data.format == "prompt_completion" and all(isinstance(value, list) for value in values):
        prompt, completion = values
        return read_chat(prompt, row[data.tools,], data.prompt, row, completion)
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        raise _wrong_values(row, data)
    for text in texts:
        check_text(text, row)
    return texts[0] if data.format == "text" else Pair(texts[0], texts[1])


def _wrong_values(row: Row, data: DataFile) -> InputError:
    if data.format == "messages":
        return row.must_have(f'"{data.messages}", a list of objects with "role" and "content"')
    names = " and ".join(f'a "{column}"' for column in data.columns.values())
    kind = "that is a string" if data.format == "text" else "that are strings, or lists of messages"
    return row.must_have(f"{names} {kind}")
