"""Hub ids: the local cache is enough, and what is not there is told in one line."""

import os
import shutil
from pathlib import Path

import pytest
import worlds

from dem_opt.checkpoints.files import read_header
from dem_opt.checkpoints.locate import locate
from dem_opt.config import ModelSource, load
from dem_opt.errors import InputError
from dem_opt.planning.inputs import check_headers

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as the hub's client keeps it, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def keep(cache: Path, name: str, revision: str = "main") -> Path:
    """A folder of the cache for one revision of a model."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(REVISION)
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_a_cached_revision_is_found(cache, revision):
    folder = keep(cache, "somebody/model")
    assert locate(ModelSource(hub="somebody/model", revision=revision), "base") == folder


@pytest.mark.parametrize(
    ("name", "revision"), [("somebody/other", None), ("somebody/model", "v2"), ("somebody/model", "f" * 40)]
)
def test_what_is_not_cached_is_told(cache, name, revision):
    keep(cache, "somebody/model")
    with pytest.raises(InputError, match="not in the local cache") as refused:
        locate(ModelSource(hub=name, revision=revision), "distributions.code.checkpoint")
    assert refused.value.field == "distributions.code.checkpoint" and name in str(refused.value)


def test_a_name_that_is_no_hub_id_is_told(cache):
    with pytest.raises(InputError, match="is no hub id"):
        locate(ModelSource(hub="two--dashes/.git"), "base")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "notes"])
def test_a_folder_with_a_pipe_is_told_at_once(tmp_path, name):
    worlds.save_model(tmp_path, seed=0)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is no file") as refused:
        locate(ModelSource(path=tmp_path), "base")
    assert refused.value.where == tmp_path / name and refused.value.field == "base"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_copy_of_links_alone_is_told(cache, tmp_path, name):
    """As `cp -r` makes it of a folder of the hub's cache."""
    folder = keep(cache, "somebody/model")
    worlds.save_model(folder, seed=0)
    blob = (folder / name).rename(folder.parent / "blob")
    (folder / name).symlink_to(Path("../blob"))
    assert read_header(folder, "base").tensors
    copy = shutil.copytree(folder, tmp_path / "a" / "copy", symlinks=True)
    with pytest.raises(InputError, match="link to nothing") as refused:
        read_header(copy, "base")
    assert refused.value.where == copy / name and blob.is_file()


def test_a_study_may_name_its_base_by_hub_id(cache, tmp_path):
    path = worlds.study(tmp_path / "world")
    folder = keep(cache, "somebody/base")
    (tmp_path / "world/models/base").rename(folder.with_name("made"))
    folder.rmdir()
    folder.with_name("made").rename(folder)
    path.write_text(path.read_text().replace("base: models/base", "base: {hub: somebody/base}"))
    assert check_headers(load(path), path).headers["base"].folder == folder
