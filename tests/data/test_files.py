"""Laws of the forms in which data lie on disk: each gives the same documents, each has its damaged twin."""

import bz2
import csv
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from test_documents import CHATS, DOCUMENTS, PAIRS, entry, refusal

from dem_opt.config import DataFile
from dem_opt.data.documents import Pair, holds_chats, read_documents
from dem_opt.errors import InputError
from dem_opt.progress import NullProgress, reporting

Entries = Sequence[dict[str, Any]]


def lines(entries: Entries) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in entries).encode()


def compressed(compression: str, content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, compression) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_zip(path: Path, entries: Entries) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/a.jsonl", lines(entries))


def write_table(path: Path, entries: Entries) -> None:
    """A table with a header; lists are JSON text in it."""
    columns = list(entries[0])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
        writer.writerow(columns)
        for each in entries:
            values = [each[column] for column in columns]
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in values])


def write_folder(path: Path, entries: Entries) -> None:
    path.mkdir()
    half = len(entries) // 2
    (path / "part-0.jsonl").write_bytes(lines(entries[:half]))
    (path / "part-1.JSONL.gz").write_bytes(gzip.compress(lines(entries[half:])))
    for other in ("README.md", ".hidden.jsonl", "_SUCCESS"):
        (path / other).write_text("{")


def write_arrow(path: Path, entries: Entries) -> None:
    """A file of Arrow, in two batches; the cache of `datasets` has streams."""
    table = pyarrow.Table.from_pylist(list(entries))
    new = pyarrow.ipc.new_stream if path.name.startswith("stream") else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path, Entries], Any]] = {
    "a.JSONL": lambda path, entries: path.write_bytes(lines(entries)),
    "a.ndjson": lambda path, entries: path.write_bytes(b"\xef\xbb\xbf" + lines(entries)),
    "a.jsonl.gz": lambda path, entries: path.write_bytes(gzip.compress(lines(entries))),
    "two members.jsonl.gz": lambda path, entries: path.write_bytes(
        gzip.compress(lines(entries[:1])) + gzip.compress(lines(entries[1:]))
    ),
    "gzip by its content.jsonl": lambda path, entries: path.write_bytes(gzip.compress(lines(entries))),
    "a.jsonl.bz2": lambda path, entries: path.write_bytes(bz2.compress(lines(entries))),
    "a.jsonl.xz": lambda path, entries: path.write_bytes(lzma.compress(lines(entries))),
    "a.jsonl.zst": lambda path, entries: path.write_bytes(compressed("zstd", lines(entries))),
    "a.jsonl.lz4": lambda path, entries: path.write_bytes(compressed("lz4", lines(entries))),
    "a.jsonl.zip": write_zip,
    "a.json": lambda path, entries: path.write_text(json.dumps(list(entries))),
    "lines.json": lambda path, entries: path.write_bytes(lines(entries)),
    "spread.json": lambda path, entries: path.write_text("\n".join(json.dumps(each, indent=2) for each in entries)),
    "array.jsonl": lambda path, entries: path.write_text("\n" + json.dumps(list(entries), indent=1) + "\n"),
    "a.json.zst": lambda path, entries: path.write_bytes(compressed("zstd", json.dumps(list(entries)).encode())),
    "a.csv": write_table,
    "a.TSV": write_table,
    "a.Parquet": lambda path, entries: parquet.write_table(pyarrow.Table.from_pylist(list(entries)), path),
    "stream.arrow": write_arrow,
    "a.Arrow": write_arrow,
    "saved": lambda path, entries: datasets.Dataset.from_list(list(entries)).save_to_disk(path),
    "folder": write_folder,
}
"""Writers by the name of the file or folder."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("form", DOCUMENTS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_documents(tmp_path: Path, name: str, form: Any) -> None:
    """Also behind a pattern, in a folder whose name looks like one."""
    folder = tmp_path / "100% [data] #1"
    folder.mkdir()
    WRITERS[name](folder / name, [entry(document) for document in DOCUMENTS[form]])
    kept = DOCUMENTS[form] if form == "text" else DOCUMENTS[form][:-1]
    assert read_documents(DataFile(path=folder / name, format=form)) == kept
    assert read_documents(DataFile(path=[folder / name], format=form)) == kept
    if (folder / name).is_file():
        assert read_documents(DataFile(path=folder / "*", format=form)) == kept


def test_lists_folders_and_patterns_have_an_order(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name}]))
    assert read_documents(DataFile(path=tmp_path)) == ["a", "b", "c"]
    assert read_documents(DataFile(path=tmp_path / "[ac].jsonl")) == ["a", "c"]
    assert read_documents(DataFile(path=[tmp_path / "c.jsonl", tmp_path / "[ab].*"])) == ["c", "a", "b"]
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/d.txt").write_text("d")
    assert read_documents(DataFile(path=tmp_path / "deep/**/*.txt")) == ["d"]


class Notes(NullProgress):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        """Keep a note."""
        self.notes.append(message)


@pytest.mark.parametrize("name", [name for name in WRITERS if name[-3:].lower() not in ("csv", "tsv")])
def test_null_and_empty_rows_are_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    progress = Notes()
    WRITERS[name](tmp_path / name, [{"text": text} for text in ("a", None, " ", "b")])
    with reporting(progress):
        assert read_documents(DataFile(path=tmp_path / name)) == ["a", "b"]
    (note,) = progress.notes
    assert "2 of 4" in note and str(tmp_path / name) in note


def test_a_column_may_be_missing_here_and_there_but_not_everywhere(tmp_path: Path) -> None:
    for name, content in {"a": [{"text": "a"}, {"id": 1}], "b": [{"id": 1}, {"id": 2}]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines(content))
    assert read_documents(DataFile(path=tmp_path / "a.jsonl")) == ["a"]
    for path in (tmp_path / "b.jsonl", tmp_path):
        with pytest.raises(InputError, match='line 1 must be a JSON object with a "text"') as caught:
            read_documents(DataFile(path=path))
        assert caught.value.where == tmp_path / "b.jsonl"


@pytest.mark.parametrize("name", [name for name in WRITERS if name[-3:].lower() not in ("csv", "tsv")])
def test_columns_may_be_nested(tmp_path: Path, name: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"data": {"text": "a", "pair": {"prompt": "p"}, "talk": messages}, "pair.completion": "c"}
    WRITERS[name](tmp_path / name, [row, row])
    path = {"path": tmp_path / name}
    assert read_documents(DataFile(**path, text="data.text")) == ["a", "a"]
    pairs = DataFile(**path, format="prompt_completion", prompt="data.pair.prompt", completion="pair.completion")
    assert read_documents(pairs) == [Pair("p", "c")] * 2
    assert len(read_documents(DataFile(**path, format="messages", messages="data.talk"))) == 2
    for missing in ("data.txt", "dat.text", "data.text.more"):
        with pytest.raises(InputError):
            read_documents(DataFile(**path, text=missing))


@pytest.mark.parametrize("name", [name for name in WRITERS if name[-3:].lower() not in ("csv", "tsv")])
def test_a_column_may_be_an_item_of_a_list(tmp_path: Path, name: str) -> None:
    rows = [{"answers": [{"text": text}, {"text": "z"}], "lines": [[text], []]} for text in "ab"]
    WRITERS[name](tmp_path / name, rows)
    for column in ("answers.0.text", "lines.0.0"):
        assert read_documents(DataFile(path=tmp_path / name, text=column)) == ["a", "b"]
    assert read_documents(DataFile(path=tmp_path / name, text="answers.1.text")) == ["z", "z"]
    for missing in ("answers.2.text", "answers.-1.text", "answers.text", "answers.0", "lines.1.0", "lines.0.0.0"):
        with pytest.raises(InputError):
            read_documents(DataFile(path=tmp_path / name, text=missing))


def test_a_cache_of_datasets_is_read_by_file(tmp_path: Path) -> None:
    """The cache of a data set with two splits, as `load_dataset` leaves it: its folder does not say which to take."""
    for split in "ab":
        (tmp_path / f"{split}.jsonl").write_bytes(lines([{"text": split}]))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in "ab"}
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    for split in "ab":
        (path,) = (tmp_path / "cache").rglob(f"json-{split}.arrow")
        assert read_documents(DataFile(path=path)) == [split]
    with pytest.raises(InputError, match="several kinds"):
        read_documents(DataFile(path=path.parent))


def test_what_may_have_no_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("a.jsonl", "zero.jsonl"):
        assert "not a file" in refusal(DataFile(path=tmp_path / name))
    assert "no data files" in refusal(DataFile(path=tmp_path))
    assert "no file matches" in refusal(DataFile(path=tmp_path / "*.jsonl"))


def test_a_table_keeps_its_texts_as_they_are(tmp_path: Path) -> None:
    texts = ["NA", "null", "1.0", " padded ", 'with "quotes", commas', "two\r\nlines", "x" * 200_000]
    write_table(tmp_path / "a.csv", [{"text": text, "id": 1} for text in texts])
    assert read_documents(DataFile(path=tmp_path / "a.csv")) == texts


DAMAGED: list[tuple[str, bytes, dict[str, str], str]] = [
    ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9], {}, "can't be read (Compressed file ended"),
    ("cut.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 9)[:-9], {}, "can't be read"),
    ("cut.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 9)[:-9], {}, "can't be read"),
    ("cut.jsonl.zst", compressed("zstd", b'{"text": "a"}\n' * 9)[:-9], {}, "can't be read (Truncated"),
    ("cut.jsonl.lz4", compressed("lz4", b'{"text": "a"}\n' * 9)[:-9], {}, "can't be read (Truncated"),
    ("bits.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:20] + b"\xff" * 30, {}, "can't be read"),
    ("cut.jsonl.zip", b"PK\x03\x04 and no more", {}, "can't be read"),
    ("plain.jsonl.gz", b'{"text": "a"}\n', {}, "ends in .gz, but is no gzip file"),
    ("empty.jsonl.gz", gzip.compress(b""), {}, "has no text"),
    ("a.gz", gzip.compress(b"a"), {}, "must be a .jsonl or .json file"),
    ("a.parquet.gz", gzip.compress(b"a"), {}, "must be a .jsonl or .json file"),
    ("broken.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": \n'), {}, "line 2 is not valid JSON"),
    ("wide.jsonl", '{"text": "a"}'.encode("utf-16"), {}, "is UTF-16 or UTF-32; save it as UTF-8"),
    ("wide.jsonl", '{"text": "a"}'.encode("utf-16-le"), {}, "is UTF-16 or UTF-32"),
    ("wide.json", '[{"text": "a"}]'.encode("utf-16-be"), {}, "is UTF-16 or UTF-32"),
    ("wide.jsonl", '{"text": "a"}'.encode("utf-32"), {}, "is UTF-16 or UTF-32"),
    ("wide.txt", "text".encode("utf-16"), {}, "is UTF-16 or UTF-32"),
    ("wide.csv", "text\na".encode("utf-16"), {}, "is UTF-16 or UTF-32"),
    ("open.json", b'[{"text": "a"},\n {"text": "b"}', {}, "after item 2: an array ends with ]"),
    ("open.json", b'[{"text": "a"},\n {"text": "b"', {}, "item 2, line 2 is not valid JSON"),
    ("comma.json", b'[{"text": "a"}\n {"text": "b"}]', {}, "item 1, line 1 is not valid JSON (a comma is missing"),
    ("more.json", b'[{"text": "a"}]\n{"text": "b"}', {}, "after item 1"),
    ("bracket.json", b'{"text":\n "a"}]', {}, "after item 1"),
    ("words.json", b'["a", "b"]', {}, "item 1, line 1 must be a JSON object"),
    ("none.json", b"[]", {}, "has no text"),
    ("none.json", b"{", {}, "line 1 is not valid JSON"),
    ("other.json", b'[\n{"txt": "a"}]', {}, 'item 1, line 2 must be a JSON object with a "text"'),
    ("other.csv", b"txt,id\na,1\n", {}, "= 'text': has no column of this name; did you mean 'txt'?"),
    ("other.csv", b"prompt,answer\na,1\n", PAIRS, "= 'completion': has no column of this name"),
    ("semicolons.csv", b"id;text\n1;a\n", {}, "= 'text': has no column of this name; did you mean 'id;text'?"),
    ("empty.csv", b"", {}, "= 'text': has no column of this name"),
    ("header.csv", b"text\n", {}, "has no text"),
    ("wide.csv", b"text,id\na,1\nb, c,2\n", {}, "row 2, line 3 has another number of fields (3) than the header (2)"),
    ("short.csv", b"id,text\n1,a\n2\n", {}, "row 2, line 3 has another number of fields (1) than the header (2)"),
    ("open.csv", b'text\n"a\nb\n', {}, "is no line of a table (unexpected end of data)"),
    ("latin.csv", b"text\ncaf\xe9\n", {}, "must be UTF-8 text; byte 8 is not"),
    ("list.csv", b"messages\nhello\n", CHATS, 'row 1, line 2 must have "messages", a list of objects'),
    ("text.arrow", b"ARROW1 and no more", {}, "can't be read as Arrow"),
    ("empty.arrow", b"", {}, "can't be read as Arrow"),
    ("lines.arrow", b'{"text": "a"}\n' * 9, {}, "can't be read as Arrow"),
    ("a.arrow.gz", gzip.compress(b"a"), {}, "must be a .jsonl or .json file"),
    ("pair.txt", b"a", PAIRS, "a .txt file is one document of format text"),
]


@pytest.mark.parametrize(("name", "content", "form", "mend"), DAMAGED)
def test_damaged_files_are_told_in_one_line(
    tmp_path: Path, name: str, content: bytes, form: dict[str, str], mend: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert mend in refusal(DataFile.model_validate({"path": tmp_path / name, **form}))


def test_paths_that_lead_to_nothing_or_twice_to_a_file_are_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c/a.jsonl", "c/b.parquet", "d/README.md", "e/sub/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(lines([{"text": name}]))
    os.link(tmp_path / "a.jsonl", tmp_path / "linked.jsonl")
    (tmp_path / "symbolic.jsonl").symlink_to(tmp_path / "a.jsonl")
    datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "splits")
    refused = {
        ("no-*.jsonl",): "no file matches",
        ("no.jsonl",): "no such file",
        ("nowhere/*.jsonl",): "no file matches",
        ("a.jsonl", "no.jsonl"): "no such file",
        ("a.jsonl", "a.jsonl"): "is named twice",
        ("a.jsonl", "c/../a.jsonl"): "is named twice",
        ("a.jsonl", "linked.jsonl"): "is named twice",
        ("b.jsonl", "a.jsonl", "symbolic.jsonl"): "is named twice",
        ("[ab].jsonl", "b.jsonl"): "is named twice",
        ("c",): "data files of several kinds (.jsonl, .parquet)",
        ("d",): "the folder has no data files",
        ("e",): "the folder has no data files",
        ("d/*",): "must be a .jsonl or .json file",
        ("splits",): "holds several splits; name the folder of one (train)",
    }
    for names, mend in refused.items():
        with pytest.raises(InputError, match=mend.replace("(", "\\(").replace(")", "\\)")) as caught:
            read_documents(DataFile(path=[tmp_path / name for name in names]), "train")
        assert caught.value.field == "train" and str(tmp_path) in str(caught.value.where)


@pytest.mark.parametrize("name", ["stream.arrow", "a.arrow"])
def test_an_arrow_file_that_is_cut_or_lacks_the_column_is_told(tmp_path: Path, name: str) -> None:
    write_arrow(tmp_path / name, [{"text": "a" * 500}] * 9)
    assert "did you mean 'text'?" in refusal(DataFile(path=tmp_path / name, text="txt"))
    content = (tmp_path / name).read_bytes()
    for end in (9, 300, 1500, len(content) - 200):
        (tmp_path / name).write_bytes(content[:end])
        assert "can't be read as Arrow" in refusal(DataFile(path=tmp_path / name))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_saved_data_set_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    datasets.Dataset.from_list([{"text": "a"}] * 99).save_to_disk(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes((tmp_path / "a" / name).read_bytes()[:200] + b"\xff" * (name[-1] == "w") + b"{")
    assert "can't be read as a data set of save_to_disk" in refusal(DataFile(path=tmp_path / "a"))
    assert "did you mean 'text'?" in refusal(saved_without(tmp_path / "b"))


def saved_without(path: Path) -> DataFile:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(path)
    return DataFile(path=path, text="txt")


def test_pairs_hold_conversations_where_the_first_does(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "a"}]
    for name, row in {
        "chats": {"prompt": message, "completion": message},
        "texts": {"prompt": "", "completion": ""},
    }.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"prompt": None, "completion": None}, row]))
        assert holds_chats(DataFile(path=tmp_path / f"{name}.jsonl", format="prompt_completion")) == (name == "chats")
