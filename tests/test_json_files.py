"""Every JSON file that is read back is read as a stranger's: measured again, or one line."""

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from malformed import MALFORMED, malform
from safetensors.torch import save_file

from dem_opt.analysis import stored_vectors
from dem_opt.analysis.task_scores import TaskScore
from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS, check_adapter, read_adapter
from dem_opt.checkpoints.convert import RECORD as CONVERTED
from dem_opt.checkpoints.convert import conversion_of
from dem_opt.checkpoints.files import CONTENTS, INDEX, content_hash, known_content, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.checkpoints.training_record import JOURNAL, RECORD, read_journal, read_record
from dem_opt.checkpoints.user_cache import entry_file
from dem_opt.data.tokenize import load_tokenizer
from dem_opt.errors import InputError
from dem_opt.json_files import find_json, parse_json, read_json
from dem_opt.manifest import refuse_foreign
from dem_opt.training.fine_tune import result_of
from dem_opt.types import VectorGeometry
from dem_opt.workflows import quickstart as assets


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
        lambda folder: folder / stored_vectors.FILE,
        lambda file: stored_vectors.recall_vectors("b", {"code": "c"}, file.parent),
        None,
    ),
    "a task's score": (lambda folder: folder / "score.json", lambda file: find_json(file, TaskScore), None),
    "journal": (lambda folder: folder / JOURNAL, read_journal, []),
    "fine_tuning.json": (lambda folder: folder / RECORD, lambda file: result_of(file.parent), None),
    "manifest": (lambda folder: folder / RECORD, lambda file: refuses_foreign(file.parent), True),
    "a converted folder": (lambda folder: folder / CONVERTED, lambda file: conversion_of(file.parent), None),
    "cached hashes": (
        lambda folder: entry_file(CONTENTS, str((folder / "cache/model").resolve())),
        lambda file: len(measured_again(model(file.parents[2] / "model"))),
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


ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
}

WRONG = [
    *(("peft_type", value) for value in (5, None, [], "lora")),
    *(("lora_alpha", value) for value in (nan, inf, -inf, True, None, "8", [8], 10**400)),
    *(("rank_pattern", value) for value in (5, [1], {"(": 2}, {"q_proj": nan}, {"q_proj": "2"})),
    *(("alpha_pattern", value) for value in (5, [1], {"(": 2}, {"q_proj": nan}, {"q_proj": inf}, {"q_proj": True})),
    *(("init_lora_weights", value) for value in (5, {}, [1], "unknown")),
]
"""Values of adapter_config.json with which no weights are the adapter's."""

HARMLESS = [
    *(("r", value) for value in (0, -1, 7, None, "x", nan, inf, [], True)),
    *(("target_modules", value) for value in (5, nan, None, [1])),
    *(("modules_to_save", value) for value in (5, [1], "lm_head", {})),
    *(("trainable_token_indices", value) for value in (5, [-1], [10**9], ["a"], {"a": 5}, {"embed_tokens": nan})),
    *(("target_parameters", value) for value in (5, [1], {})),
    *((flag, value) for flag in ("bias", "fan_in_fan_out", "use_rslora", "peft_version") for value in (5, nan, [])),
]
"""Values that decide nothing where the tensors say it, or that PEFT itself reads in another way."""


def adapter(folder: Path, **settings: object) -> Path:
    """An adapter of `model`."""
    factors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    folder.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{prefix}.{name}.weight": factor for name, factor in factors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(ADAPTER | settings))
    return folder


def check_adapter_of(base: Path, folder: Path) -> None:
    header = read_header(base, "base")
    check_adapter(check_base(header), header, read_adapter(folder, "adapter"))


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_malformed_file_of_an_adapter_is_told_in_one_line(tmp_path, name, kind):
    base, folder = model(tmp_path / "model"), adapter(tmp_path / "adapter")
    check_adapter_of(base, folder)
    malform(folder / name, kind)
    with pytest.raises(InputError) as refusal:
        check_adapter_of(base, folder)
    assert str(refusal.value.where).startswith(str(folder)) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_of_an_adapter_is_told_in_one_line(tmp_path, field, value):
    base, folder = model(tmp_path / "model"), adapter(tmp_path / "adapter", **{field: value})
    with pytest.raises(InputError) as refusal:
        check_adapter_of(base, folder)
    assert CONFIG in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("field", "value"), HARMLESS)
def test_other_values_of_an_adapter_are_read_or_told_in_one_line(tmp_path, field, value):
    base, folder = model(tmp_path / "model"), adapter(tmp_path / "adapter", **{field: value})
    try:
        check_adapter_of(base, folder)
    except InputError as refusal:
        assert len(str(refusal).splitlines()) == 1


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_quickstart_without_its_record_is_left_alone(tmp_path, kind):
    """Which files are the user's can't be told then; a folder with nothing but the record has none."""
    (tmp_path / "study.yaml").write_text("mine")
    malform(tmp_path / assets.RECORD, kind)
    with pytest.raises(InputError):
        assets.make_assets(tmp_path, settings=assets.Settings(characters=(0, 0, 0)))
    assert (tmp_path / "study.yaml").read_text() == "mine"


def test_what_was_written_is_read_back(tmp_path):
    vectors = VectorGeometry(("code", "math"), ((1.0, 0.5), (0.5, 2.0)))
    stored_vectors.keep(vectors, "b", {"code": "c", "math": "m"}, tmp_path)
    assert stored_vectors.recall_vectors("b", {"math": "m", "code": "c"}, tmp_path) == VectorGeometry(
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
