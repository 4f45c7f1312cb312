"""Every JSON file that is read back is read as a stranger's: measured again, or one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import worlds

from dem_opt.analysis import vector_geometry
from dem_opt.analysis.task_scores import TaskScore
from dem_opt.checkpoints.files import INDEX, cache_folder, content_hash, known_content, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.checkpoints.training_record import JOURNAL, RECORD, read_journal, read_record
from dem_opt.data.tokenize import load_tokenizer
from dem_opt.errors import InputError
from dem_opt.json_files import find_json, parse_json, read_json
from dem_opt.manifest import refuse_foreign
from dem_opt.training.fine_tune import result_of
from dem_opt.types import VectorGeometry

DEEP = 100_000

MALFORMED = {
    "empty": b"",
    "a space": b" ",
    "half": b'{"base": "b',
    "not UTF-8": b'{"base": "\xff\xfe"}',
    "UTF-16": '{"base": "b"}'.encode("utf-16"),
    "zeros": bytes(100),
    "deep list": b"[" * DEEP + b"]" * DEEP,
    "deep mapping": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a mapping deep inside": b'{"weight_map": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "a number beyond floats": b'{"inner": [[1e999]], "vocab_size": 1e999, "weight_map": 1e999}',
    "a number of many digits": b"9" * 10_000,
    "nothing": b"null",
    "a list": b"[]",
    "a text": b'"text"',
    "a number": b"1",
    "half a character": b'{"base": "\\ud800"}',
    "wrong types": json.dumps(
        {
            "base": 1,
            "contents": 2,
            "inner": "x",
            "weight_map": {"a": 1},
            "result": {"steps": "x"},
            "files": [1],
            "text_config": 1,
            "quantization_config": 1,
            "value": "much",
            "vocab_size": [],
            "hidden_size": "wide",
            "model": 1,
            "added_tokens": 1,
            "auto_map": 1,
            "extra_special_tokens": 1,
            "architectures": 1,
        }
    ).encode(),
    "a folder": None,
    "a pipe": "pipe",
}


def malform(file: Path, kind: str) -> None:
    """Put something in the place of a file."""
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = MALFORMED[kind]
    if content is None:
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)


def model(folder: Path) -> Path:
    """A checkpoint in two files, with a tokenizer."""
    worlds.save_model(folder, seed=0).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    worlds.tokenizer().save_pretrained(folder)
    return folder


def measured_again(folder: Path) -> str:
    header = read_header(folder, "base")
    assert known_content(header) is None
    return content_hash(folder)


def refuses_foreign(folder: Path) -> bool:
    (folder / "note.txt").write_text("mine")
    with pytest.raises(InputError):
        refuse_foreign(folder, RECORD)
    return True


def check_model(folder: Path) -> None:
    check_base(read_header(folder, "base"))
    load_tokenizer(folder)


FOUND: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], object]] = {
    "vectors.json": (
        lambda folder: folder / vector_geometry.FILE,
        lambda file: vector_geometry.recall_vectors("b", {"code": "c"}, file.parent),
        None,
    ),
    "a task's score": (lambda folder: folder / "score.json", lambda file: find_json(file, TaskScore), None),
    "journal": (lambda folder: folder / JOURNAL, read_journal, []),
    "fine_tuning.json": (lambda folder: folder / RECORD, lambda file: result_of(file.parent), None),
    "manifest": (lambda folder: folder / RECORD, lambda file: refuses_foreign(file.parent), True),
    "cached hashes": (
        lambda folder: cache_folder() / "contents.json",
        lambda file: len(measured_again(model(file.parents[1] / "model"))),
        64,
    ),
}
"""Files that are made anew or done without: their place in a folder, what reads them, and its answer."""


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("file", FOUND)
def test_what_can_be_measured_again_is(tmp_path, monkeypatch, file, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, read, answer = FOUND[file]
    malform(place(tmp_path), kind)
    assert read(place(tmp_path)) == answer


@pytest.mark.parametrize("kind", [kind for kind in MALFORMED if kind != "a pipe"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_checkpoint_is_read_or_told_in_one_line(tmp_path, name, kind):
    folder = model(tmp_path / "model")
    malform(folder / name, kind)
    try:
        check_model(folder)
    except InputError as refusal:
        assert str(refusal.where).startswith(str(folder)) and len(str(refusal).splitlines()) == 1
    else:
        assert name == "tokenizer_config.json"


def test_what_was_written_is_read_back(tmp_path):
    vectors = VectorGeometry(("code", "math"), ((1.0, 0.5), (0.5, 2.0)))
    vector_geometry.keep(vectors, "b", {"code": "c", "math": "m"}, tmp_path)
    assert vector_geometry.recall_vectors("b", {"math": "m", "code": "c"}, tmp_path) == VectorGeometry(
        ("math", "code"), ((2.0, 0.5), (0.5, 1.0))
    )
    (tmp_path / "record.json").write_text('{"a": [1, 2.5, null, true, "x"]}')
    assert read_json(tmp_path / "record.json", dict[str, list[object]], "field") == {"a": [1, 2.5, None, True, "x"]}
    assert read_record(tmp_path) is None


def test_numbers_and_texts_are_not_converted():
    assert parse_json("[1]", list[int]) == [1]
    for text, schema in (('["1"]', list[int]), ("[1.5]", list[int]), ("[1]", list[str]), ('["yes"]', list[bool])):
        with pytest.raises(ValueError):
            parse_json(text, schema)
