"""Pickled weights: refused, or converted to the same bits where the study allows it."""

import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
import worlds
import zoo
from safetensors.torch import load_file
from test_adapters import make_adapter

from dem_opt.checkpoints import convert
from dem_opt.checkpoints.adapters import CONFIG, read_adapter
from dem_opt.checkpoints.adapters import WEIGHTS as ADAPTER
from dem_opt.checkpoints.convert import converted
from dem_opt.checkpoints.files import WEIGHTS, content_hash, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.checkpoints.locate import locate
from dem_opt.checkpoints.user_cache import cache_folder
from dem_opt.config import ModelSource
from dem_opt.errors import InputError


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def pickled(tmp_path):
    """A checkpoint folder with pickled weights, and the content that it had."""
    folder = tmp_path / "old"
    worlds.save_model(folder, seed=0)
    content = content_hash(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder, content


def test_it_is_refused_with_the_key_that_allows_it(pickled):
    folder, _ = pickled
    with pytest.raises(InputError, match=r"`\{path: FOLDER, pickled: true\}`"):
        read_header(locate(ModelSource(path=folder), "base"), "base")


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_converted_is_the_same_content(pickled, shards):
    folder, content = pickled
    if shards == 2:
        tensors = list(torch.load(folder / "pytorch_model.bin").items())
        (folder / "pytorch_model.bin").unlink()
        for number, part in enumerate((tensors[:3], tensors[3:]), 1):
            torch.save(dict(part), folder / f"pytorch_model-0000{number}-of-00002.bin")
    place = locate(ModelSource(path=folder, pickled=True), "base")
    assert content_hash(place) == content
    check_base(read_header(place, "base"))
    assert (place / "tokenizer.json").is_file() and not list(place.glob("*.bin"))
    assert locate(ModelSource(path=folder, pickled=True), "base") == place


def test_other_files_are_converted_anew(pickled):
    folder, _ = pickled
    before = converted(folder, "base", allow_pickled=True)
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    after = converted(folder, "base", allow_pickled=True)
    assert after != before and content_hash(after) != content_hash(before)


def test_files_of_the_same_size_and_time_are_converted_anew(pickled):
    """As `cp -p` and rsync leave them."""
    folder, _ = pickled
    file = folder / "pytorch_model.bin"
    before, times = converted(folder, "base", allow_pickled=True), file.stat()
    tensors = torch.load(file)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert content_hash(converted(folder, "base", allow_pickled=True)) != content_hash(before)


@pytest.mark.parametrize("name, other", [("VERSION", 10**6), ("transformers", SimpleNamespace(__version__="0.0"))])
def test_another_converter_converts_anew(pickled, monkeypatch, name, other):
    folder, _ = pickled
    if name == "transformers":
        monkeypatch.setattr(convert.gguf_file, "files_of", lambda place, field: [folder / "pytorch_model.bin"])
        monkeypatch.setattr(convert.gguf_file, "read", lambda files, field: lambda out: {})
    before = converted(folder, "base", allow_pickled=True)
    assert converted(folder, "base", allow_pickled=True) == before
    monkeypatch.setattr(convert, name, other)
    assert converted(folder, "base", allow_pickled=True) != before


def test_nothing_but_tensors_is_unpickled(pickled, tmp_path):
    folder, _ = pickled
    torch.save({"weight": Evil(str(tmp_path / "owned"))}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors") as refused:
        locate(ModelSource(path=folder, pickled=True), "distributions.code.checkpoint")
    assert refused.value.field == "distributions.code.checkpoint"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04broken"])
def test_a_damaged_file_is_told(pickled, content):
    folder, _ = pickled
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match="holds more than tensors, or is damaged"):
        locate(ModelSource(path=folder, pickled=True), "base")


def test_safetensors_are_left_where_they_are(tmp_path):
    worlds.save_model(tmp_path / "new", seed=0)
    assert locate(ModelSource(path=tmp_path / "new", pickled=True), "base") == tmp_path / "new"
    shutil.rmtree(tmp_path / "new")
    assert locate(ModelSource(path=tmp_path / "new", pickled=True), "base") == tmp_path / "new"


def truncated(weight: torch.Tensor, folder: Path) -> None:
    """An archive in which the record of a tensor's bytes is cut in half."""
    whole = folder / "whole.zip"
    torch.save({"lm_head.weight": weight}, whole)
    with ZipFile(whole) as source, ZipFile(folder / "pytorch_model.bin", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[: len(data) // 2] if "/data/" in name else data)
    whole.unlink()


def sparse_csr(weight: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight.to_sparse_csr()


UNUSABLE = {
    "sparse": lambda weight: {"lm_head.weight": weight.to_sparse()},
    "compressed": lambda weight: {"lm_head.weight": sparse_csr(weight)},
    "quantized": lambda weight: {"lm_head.weight": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)},
    "meta": lambda weight: {"lm_head.weight": weight.to("meta")},
    "nested": lambda weight: {"lm_head.weight": torch.nested.as_nested_tensor([weight, weight[:1]])},
    "expanded": lambda weight: {"lm_head.weight": weight[:1, :1].expand(10**7, 10**7)},
    "complex": lambda weight: {"lm_head.weight": weight.to(torch.complex128)},
    "bits": lambda weight: {"lm_head.weight": weight.to(torch.uint8).view(torch.bits8)},
    "numbered": lambda weight: {0: weight},
    "nameless": lambda weight: {None: weight},
    "pairs": lambda weight: {("lm_head", "weight"): weight},
    "metadata": lambda weight: {"__metadata__": weight},
    "half a character": lambda weight: {"\ud800": weight},
    "list": lambda weight: [weight],
    "tensor": lambda weight: weight,
    "nested mapping": lambda weight: {"model": {"lm_head.weight": weight}},
    "a number": lambda weight: {"lm_head.weight": 1.0},
    "truncated": truncated,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_dense_named_tensor_is_one_line_and_leaves_nothing(pickled, kind):
    folder, _ = pickled
    weight, file = torch.ones(4, 4), folder / "pytorch_model.bin"
    file.unlink()
    if kind == "truncated":
        truncated(weight, folder)
    else:
        torch.save(UNUSABLE[kind](weight), file)
    before = set(cache_folder().rglob("*"))
    with pytest.raises(InputError) as refusal:
        read_header(locate(ModelSource(path=folder, pickled=True), "base"), "base")
    assert "\n" not in str(refusal.value) and refusal.value.field == "base"
    left = set(cache_folder().rglob("*")) - before - {cache_folder() / "converted"}
    assert kind == "complex" or (refusal.value.where == file and not left)
    assert not [path for path in left if path.name.endswith(".partial")]


def test_a_folder_in_place_of_the_file_is_one_line(pickled):
    folder, _ = pickled
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin").mkdir()
    with pytest.raises(InputError):
        read_header(locate(ModelSource(path=folder, pickled=True), "base"), "base")


def test_a_file_of_an_old_release_of_torch_is_read(pickled):
    folder, content = pickled
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert content_hash(locate(ModelSource(path=folder, pickled=True), "base")) == content


def test_a_changed_config_is_converted_anew(pickled):
    folder, _ = pickled
    before = converted(folder, "base", allow_pickled=True)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"rms_norm_eps": 0.5,', 1))
    after = converted(folder, "base", allow_pickled=True)
    assert after != before and (after / "config.json").read_text() == config.read_text()


def test_changed_bytes_are_read_or_told(pickled):
    """Of a file of the old format, every byte of which is a pickle's; seeded."""
    folder, _ = pickled
    file, random = folder / "pytorch_model.bin", Random(0)
    torch.save({"lm_head.weight": torch.ones(2, 2)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    for _ in range(200):
        changed = bytearray(content)
        changed[random.randrange(len(changed))] = random.randrange(256)
        file.write_bytes(changed)
        with suppress(InputError):
            converted(folder, "base", allow_pickled=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_pickled_adapter_is_read_and_follows_its_config(tmp_path):
    """The cache's copy is of the weights and of the settings that they are read with."""
    zoo.save(tmp_path / "base", "llama", 0)
    folder = make_adapter(tmp_path / "base", tmp_path / "adapter", 1, target_modules=["q_proj"])
    known = read_adapter(folder, "adapter").content("base")
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()
    with pytest.raises(InputError, match="pickled: true"):
        read_adapter(locate(ModelSource(path=folder), "adapter"), "adapter")
    source = ModelSource(path=folder, pickled=True)
    assert read_adapter(locate(source, "adapter"), "adapter").content("base") == known
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 77}))
    assert read_adapter(locate(source, "adapter"), "adapter").config["lora_alpha"] == 77
