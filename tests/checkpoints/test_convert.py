"""Pickled weights: refused, or converted to the same bits where the study allows it."""

import shutil

import pytest
import torch
import worlds
from safetensors.torch import load_file

from dem_opt.checkpoints.architecture import check_base
from dem_opt.checkpoints.convert import converted
from dem_opt.checkpoints.files import WEIGHTS, content_hash, read_header
from dem_opt.checkpoints.locate import locate
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
    found = locate(ModelSource(path=folder, pickled=True), "base")
    assert content_hash(found) == content
    check_base(read_header(found, "base"))
    assert (found / "tokenizer.json").is_file() and not list(found.glob("*.bin"))
    assert locate(ModelSource(path=folder, pickled=True), "base") == found


def test_other_files_are_converted_anew(pickled):
    folder, _ = pickled
    before = converted(folder, "base")
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    after = converted(folder, "base")
    assert after != before and content_hash(after) != content_hash(before)


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
