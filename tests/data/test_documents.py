"""Laws of data files: what comes through, the same from every kind of file, and one line for what is wrong."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dem_opt.config import DataFile
from dem_opt.data.documents import Document, Pair, document_identity, read_documents
from dem_opt.data.messages import Chat, Turn
from dem_opt.errors import InputError

EXOTIC = "\u2028\x85\x00 \U0001f469\u200d\U0001f52c \u202etes\u0301t\ufeff \u05e9\u05dc\u05d5\u05dd \U0010ffff\r\n\r\t"
MARK = "\ufeff"


def chat(*turns: str) -> Chat:
    """A conversation of turns such as "user: a question"."""
    return Chat(tuple(Turn(*turn.split(": ", 1)) for turn in turns))


def entry(document: Document) -> dict[str, Any]:
    """A document as a line or row."""
    if isinstance(document, str):
        return {"text": document}
    if isinstance(document, Pair):
        return {"prompt": document.prompt, "completion": document.completion}
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in document.turns]}


def write_lines(path: Path, entries: Sequence[dict[str, Any]], ascii_only: bool = True) -> Path:
    path.write_bytes("".join(json.dumps(each, ensure_ascii=ascii_only) + "\n" for each in entries).encode())
    return path


def write_parquet(path: Path, entries: Sequence[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(entries)), path)
    return path


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], Path]] = {"jsonl": write_lines, "parquet": write_parquet}

DOCUMENTS: dict[str, list[Document]] = {
    "text": ["plain", EXOTIC, " leading and trailing \n", "\N{NO-BREAK SPACE}x", "plain"],
    "prompt_completion": [Pair("a", "b"), Pair("", EXOTIC), Pair(EXOTIC, " b\n"), Pair("ab", "")],
    "messages": [
        chat("system: be brief", "user: why?", f"assistant: {EXOTIC}", "user: ", "assistant: so"),
        chat(f"user: {EXOTIC}", "tool: 5", "assistant: x"),
        chat("user: nobody answers"),
    ],
}
"""Documents by format; the last one, but for texts, scores nothing."""


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("form", DOCUMENTS)
def test_documents_come_through_untouched(tmp_path: Path, form: Any, kind: str) -> None:
    entries = [{**entry(document), "id": number} for number, document in enumerate(DOCUMENTS[form])]
    path = WRITERS[kind](tmp_path / f"a.{kind}", entries)
    kept = DOCUMENTS[form] if form == "text" else DOCUMENTS[form][:-1]
    assert read_documents(DataFile(path=path, format=form)) == kept


@pytest.mark.parametrize("text", DOCUMENTS["text"])
def test_escaped_or_not_alone_or_in_lines_a_text_is_the_same(tmp_path: Path, text: str) -> None:
    for ascii_only in (True, False):
        path = write_lines(tmp_path / "lines.jsonl", [{"text": text}], ascii_only)
        assert read_documents(DataFile(path=path)) == [text]
    whole = tmp_path / "whole.txt"
    whole.write_bytes(text.encode())
    assert read_documents(DataFile(path=whole)) == [text]


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_may_have_other_names(tmp_path: Path, kind: str) -> None:
    entries = [
        {"text": "no", "prompt": "no", "q": "a", "completion": "b", "talk": entry(chat("assistant: x"))["messages"]}
    ]
    path = WRITERS[kind](tmp_path / f"[a]*.{kind}", entries)
    assert read_documents(DataFile(path=path, text="q")) == ["a"]
    assert read_documents(DataFile(path=path, format="prompt_completion", prompt="q")) == [Pair("a", "b")]
    assert read_documents(DataFile(path=path, format="messages", messages="talk")) == [chat("assistant: x")]


def test_what_scores_nothing_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(MARK.encode() + b'{"text": "a"}\r\n\r\n{"text": " \\n"}\n{"text": ""}\n{"text": "b"}')
    assert read_documents(DataFile(path=path)) == ["a", "b"]
    pairs = write_lines(tmp_path / "b.jsonl", [entry(Pair(" ", "a")), entry(Pair("a", " \t"))])
    assert read_documents(DataFile(path=pairs, format="prompt_completion")) == [Pair(" ", "a")]
    chats = [chat("assistant: a"), chat("assistant:  "), Chat(()), chat("user: assistant")]
    path = write_lines(tmp_path / "c.jsonl", [entry(each) for each in chats])
    assert read_documents(DataFile(path=path, format="messages")) == [chat("assistant: a")]


def test_a_lone_carriage_return_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":\r"a\\rb"}\r\n{"text": "c"}\n')
    assert read_documents(DataFile(path=path)) == ["a\rb", "c"]


def test_documents_that_differ_have_different_identities() -> None:
    alike = [Pair("ab", "c"), Pair("a", "bc"), Pair("", "abc"), chat("user: a", "assistant: b"), chat("user: ab")]
    alike.append(chat("assistant: a", "user: b"))
    assert len({document_identity(document) for document in alike}) == len(alike)


def test_reading_parquet_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    cache = Path(os.path.expanduser("~/.cache/huggingface/datasets"))
    before = sorted(cache.glob("*"))
    assert read_documents(DataFile(path=path)) == ["a"]
    with pytest.raises(InputError):
        read_documents(DataFile(path=write_parquet(tmp_path / "b.parquet", [{"text": 1}, {"text": 2}])))
    assert not list((tmp_path / "scratch").iterdir())
    assert sorted(cache.glob("*")) == before


PAIRS, CHATS = {"format": "prompt_completion"}, {"format": "messages"}
BAD: list[tuple[str, bytes | None, dict[str, str], str]] = [
    ("missing.jsonl", None, {}, "no such file"),
    ("missing.parquet", None, {}, "no such file"),
    ("table.xlsx", b"a,b", {}, "must be a .jsonl"),
    ("latin.txt", b"caf\xe9", {}, "UTF-8 text; byte 3"),
    ("latin.jsonl", b'{"text": "caf\xe9"}', {}, "must be UTF-8"),
    ("latin.jsonl", b'{"prompt": "caf\xe9"}', PAIRS, "must be UTF-8"),
    ("empty.txt", b"", {}, "has no text"),
    ("blank.txt", b" \n\t", {}, "has no text"),
    ("mark.txt", MARK.encode(), {}, "has no text"),
    ("empty.jsonl", b"", {}, "has no text"),
    ("empty.jsonl", b"", CHATS, "has no text"),
    ("blank.jsonl", b'{"text": " "}\n', {}, "has no text"),
    ("blank.jsonl", b'{"prompt": "a", "completion": " "}\n', PAIRS, "has no text"),
    ("mute.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', CHATS, "has no text to score"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', {}, "line 2 is not valid JSON"),
    ("deep.jsonl", b"[" * 100_000, {}, "line 1 is not valid JSON"),
    ("list.jsonl", b'{"text": "a"}\n\n["text"]', {}, "line 3 must be a JSON object"),
    ("other.jsonl", b'{"body": "a"}', {}, 'line 1 must be a JSON object with a "text" that is a string'),
    ("number.jsonl", b'{"text": 5}', {}, "line 1 must be a JSON object"),
    ("half.jsonl", b'{"text": "\\ud800"}', {}, "line 1 holds half of a surrogate pair"),
    ("half.jsonl", b'{"prompt": "\\udfff", "completion": "a"}', PAIRS, "line 1 holds half of a surrogate pair"),
    ("half.jsonl", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', CHATS, "line 1 holds half of a"),
    ("prompt.txt", b"a", PAIRS, "a .txt file is one document of format text, not prompt_completion"),
    ("text.jsonl", b'{"text": "a"}', PAIRS, 'with a "prompt" and a "completion" that are strings'),
    ("half.jsonl", b'{"prompt": "a", "completion": 5}', PAIRS, 'with a "prompt" and a "completion" that are'),
    ("null.jsonl", b'{"prompt": "a", "completion": null}', PAIRS, "has no text to score"),
    ("column.jsonl", b'{"prompt": "a"}', PAIRS | {"prompt": "question"}, 'with a "question" and a "completion"'),
    ("text.jsonl", b'{"text": "a"}', CHATS, 'line 1 must be a JSON object with "messages", a list of objects with'),
    ("dict.jsonl", b'{"messages": {"role": "user", "content": "a"}}', CHATS, 'with "messages", a list of objects'),
    ("words.jsonl", b'{"messages": ["a"]}', CHATS, 'line 1, message 1 must be an object with "role" and "content"'),
    (
        "norole.jsonl",
        b'{"messages": [{"from": "humane", "value": "a"}]}',
        CHATS,
        "message 1 has an unknown role; did you mean 'human'?",
    ),
    ("parts.jsonl", b'{"messages": [{"role": "user", "content": []}]}', CHATS, 'with "role" and "content"'),
    ("role.jsonl", b'{"messages": [{"role": "asistant", "content": "a"}]}', CHATS, "did you mean 'assistant'?"),
    ("role.jsonl", b'{"messages": [{"role": 5, "content": "a"}]}', CHATS, 'with "role" and "content"'),
    ("none.parquet", b"no table", {}, "can't be read as Parquet"),
    ("empty.parquet", b"", {}, "can't be read as Parquet (Parquet file size is 0 bytes)"),
]


def refusal(data: DataFile) -> str:
    """The one line that says what is wrong with a file."""
    with pytest.raises(InputError) as caught:
        read_documents(data, "distributions.code.validation")
    message = str(caught.value)
    assert message.startswith(f"{data.path}: distributions.code.validation") and "\n" not in message
    return message


@pytest.mark.parametrize(("name", "content", "form", "mend"), BAD)
def test_bad_files_are_told_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, form: dict[str, str], mend: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert mend in refusal(DataFile.model_validate({"path": tmp_path / name, **form}))


@pytest.mark.parametrize(
    ("column", "form", "mend"),
    [
        ({"txt": ["a"]}, {}, "= 'text': has no column of this name; did you mean 'txt'?"),
        ({"prompt": ["a"]}, PAIRS, "= 'completion': has no column of this name; known: prompt"),
        ({"text": [1]}, {}, "= {'text': 1}: row 1 must have a \"text\" that is a string"),
        ({"text": [b"a"]}, {}, 'row 1 must have a "text" that is a string'),
        ({"text": [None, None]}, {}, "has no text"),
        ({"messages": ["a"]}, CHATS, 'row 1 must have "messages", a list of objects with "role" and "content"'),
        ({"messages": [[{"role": "user"}]]}, CHATS, 'row 1, message 1 must be an object with "role" and "content"'),
        ({"messages": [[{"role": "bot", "content": "a"}]]}, CHATS, "= 'bot': row 1, message 1 has an unknown role"),
        ({"text": []}, {}, "has no text"),
        ({"text": [" "]}, {}, "has no text"),
    ],
)
def test_bad_tables_are_told_in_one_line(
    tmp_path: Path, column: dict[str, list[Any]], form: dict[str, str], mend: str
) -> None:
    parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    assert mend in refusal(DataFile.model_validate({"path": tmp_path / "a.parquet", **form}))


def test_a_damaged_page_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 10_000]}), path, compression=None)
    content = bytearray(path.read_bytes())
    content[10:4000] = b"\xff" * 3990
    path.write_bytes(content)
    assert "can't be read" in refusal(DataFile(path=path))
