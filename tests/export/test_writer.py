"""Exports: what is written loads, proves, and replaces nothing but an export."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import worlds
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from dem_opt.atomic import staged_folder
from dem_opt.checkpoints.architecture import empty_model, read_architecture
from dem_opt.checkpoints.files import INDEX, WEIGHTS, content_hash, read_header
from dem_opt.errors import InputError
from dem_opt.export import writer
from dem_opt.export.writer import MARKER, ExportError, output_dtype, prove, write_composite
from dem_opt.merging.merged_model import MergedModel
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CARD = "# A card, with an umlaut: ü\n"


def keep_dtype(model, dtype):
    """Cast in place; "mixed" keeps the norms in float32."""
    for name, parameter in model.named_parameters():
        wide = dtype == "float32" or (dtype == "mixed" and "norm" in name)
        parameter.data = parameter.to(torch.float32 if wide else torch.bfloat16)


def world(folder, dtype="float32"):
    """Base, a and b as stored models."""
    stored = []
    base = None
    for seed, name in enumerate(("base", "a", "b")):
        model = worlds.save_model(folder / name, seed, base)
        base = base or LlamaForCausalLM.from_pretrained(folder / name)
        keep_dtype(model, dtype)
        model.save_pretrained(folder / name)
        stored.append(StoredModel(folder / name, content_hash(folder / name)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    GenerationConfig(max_new_tokens=7).save_pretrained(folder / "base")
    (folder / "base/notes.txt").write_text("not for export")
    return stored


@pytest.fixture(scope="module", params=["float32", "bfloat16", "mixed"])
def stored(request, tmp_path_factory):
    return world(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture
def fresh(tmp_path):
    return world(tmp_path / "models")


def composite(stored, units=(0, 4 * 10**8, 6 * 10**8)):
    return Composite.of({model.content: count for model, count in zip(stored, units, strict=True)})


def write(stored, out, merged=None, card=CARD, approve=lambda written: None, dtype=None, overwrite=True):
    by_content = {model.content: model for model in stored}

    def approved(written):
        approve(written)
        return {"README.md": card}

    merged = merged or composite(stored)
    return write_composite(stored[0], by_content, merged, out, approved, output_dtype(dtype), overwrite)


@pytest.mark.parametrize("shard_bytes", [10**9, 12_000])
@pytest.mark.parametrize("units", [(0, 4 * 10**8, 6 * 10**8), (-(10**8), 6 * 10**8, 5 * 10**8), (UNIT, 0, 0)])
def test_an_export_loads_as_the_composite_that_was_scored(stored, tmp_path, monkeypatch, shard_bytes, units):
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    merged = composite(stored, units)
    written = write(stored, tmp_path / "out", merged)
    prove(written)
    assert (tmp_path / "out" / INDEX).exists() == (shard_bytes < 10**6)
    assert (tmp_path / "out" / WEIGHTS).exists() != (shard_bytes < 10**6)
    live = empty_model(stored[0].path, torch.float32)
    MergedModel(live, stored).merge(merged)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(loaded(ids).logits, live(ids).logits)


def test_an_export_keeps_the_bases_dtypes_and_names_once(stored, tmp_path):
    write(stored, tmp_path / "out")
    headers = [read_header(folder, "base") for folder in (stored[0].path, tmp_path / "out")]
    forms = [{name: (tensor.shape, tensor.dtype) for name, tensor in header.tensors.items()} for header in headers]
    assert forms[0] == forms[1]


def test_the_content_of_an_exported_vertex_is_that_of_its_checkpoint(stored, tmp_path):
    written = write(stored, tmp_path / "out", Composite.single(stored[1].content))
    assert written.content == stored[1].content == content_hash(tmp_path / "out")


def test_an_export_brings_config_tokenizer_and_card(fresh, tmp_path):
    out = tmp_path / "deep/er/out"
    written = write(fresh, out)
    assert (out / "config.json").read_bytes() == (fresh[0].path / "config.json").read_bytes()
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 7
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, fresh[0].path))
    assert ours("alpha beta")["input_ids"] == theirs("alpha beta")["input_ids"]
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    assert (out / "README.md").read_text(encoding="utf-8") == CARD
    assert not (out / "notes.txt").exists()
    marker = json.loads((out / MARKER).read_text())
    assert marker.pop("files").keys() == {str(file) for file in files(out)} - {MARKER}
    assert marker == {
        "composite": composite(fresh).key,
        "coefficients": {fresh[1].content: 0.4, fresh[2].content: 0.6},
        "content": written.content,
    }


def exact(stored, units, name):
    """A composite's parameter in float32, every product and every sum rounded once, in the order of content."""
    terms = sorted((model.content, count, model.path) for model, count in zip(stored, units, strict=True) if count)
    total = None
    for _, count, path in terms:
        term = load_file(path / WEIGHTS)[name].float() * torch.tensor(count / UNIT, dtype=torch.float32)
        total = term if total is None else total + term
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("units", [(0, 4 * 10**8, 6 * 10**8), (-(10**8), 6 * 10**8, 5 * 10**8), (0, UNIT, 0)])
def test_another_dtype_is_rounded_to_once(stored, tmp_path, units, dtype):
    written = write(stored, tmp_path / "out", composite(stored, units), dtype=dtype)
    prove(written)
    wanted = output_dtype(dtype)
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, exact(stored, units, name).to(wanted)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_config_names_the_dtype_under_its_own_key(fresh, tmp_path, key):
    file = fresh[0].path / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config | ({key: "float32"} if key else {})))
    write(fresh, tmp_path / "out", dtype="bfloat16")
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported == config | {key or "dtype": "bfloat16"}


def test_an_unknown_dtype_and_one_that_is_too_small_are_refused(fresh, tmp_path):
    with pytest.raises(InputError, match="did you mean"):
        output_dtype("float8")
    tensors = load_file(fresh[1].path / WEIGHTS)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, fresh[1].path / WEIGHTS, metadata={"format": "pt"})
    stored = [replace(model, content=content_hash(model.path)) for model in fresh]
    with pytest.raises(InputError, match=r"--dtype = 'float16': model.norm.weight"):
        write(stored, tmp_path / "out", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_same_composite_is_written_with_the_same_bytes(fresh, tmp_path, dtype):
    for name in ("one", "two"):
        write(fresh, tmp_path / name, dtype=dtype)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_write_that_fails_in_the_middle_is_told_and_leaves_nothing(fresh, tmp_path, monkeypatch):
    """On a full disk, safetensors raises no OSError."""

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        write(fresh, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize("earlier", [False, True])
def test_an_export_that_is_killed_leaves_nothing_half_written(fresh, tmp_path, earlier):
    """SIGKILL after the first of two weight files, after the last, and after a rename.

    The one rename of a first export gives it its name; the first of two moves the earlier export out of the way.
    """
    out = tmp_path / "out"
    former = write(fresh, out).content if earlier else None
    command = [sys.executable, str(Path(__file__).parents[1] / "killed_export.py"), str(out)]
    command += [str(model.path) for model in fresh]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)
    again = write(fresh, out, composite(fresh, (UNIT // 2, UNIT // 4, UNIT // 4)))
    prove(again)
    assert left == {"first file": former, "last file": former, "renaming": None if earlier else again.content}
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


def flip_last_bit(out):
    data = bytearray((out / WEIGHTS).read_bytes())
    data[-4] ^= 1
    (out / WEIGHTS).write_bytes(data)


def untie(out):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(("damage", "words"), [(flip_last_bit, "not those that were written"), (untie, "lm_head")])
def test_an_export_that_does_not_load_as_written_is_told(fresh, tmp_path, damage, words):
    written = write(fresh, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ExportError, match=words):
        prove(written)


def test_an_export_of_another_composite_is_told_by_its_tensor(stored, tmp_path):
    written = write(stored, tmp_path / "out")
    other = composite(stored, (0, 4 * 10**8 + 10**6, 6 * 10**8 - 10**6))
    first = next(iter(read_architecture(read_header(stored[0].path, "base")).parameters))
    with pytest.raises(ExportError, match=first):
        prove(replace(written, composite=other))


def occupy(out):
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", ["occupied", "a file", "under a file", "an input"])
def test_nothing_but_an_export_is_replaced(fresh, tmp_path, case):
    out = {"under a file": tmp_path / "file/out", "an input": fresh[1].path}.get(case, tmp_path / "out")
    if case == "occupied":
        occupy(out)
    elif case == "an input":
        (out / MARKER).write_text("{}")
    else:
        (tmp_path / ("out" if case == "a file" else "file")).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(InputError) as refused:
        write(fresh, out)
    assert refused.value.where == out
    assert files(tmp_path) == before


def test_an_earlier_export_and_an_empty_folder_are_replaced(fresh, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(fresh, out)
    prove(write(fresh, out, Composite.single(fresh[2].content)))
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


def test_an_export_of_a_release_that_listed_no_files_is_replaced(fresh, tmp_path):
    write(fresh, tmp_path / "out")
    forget_manifest(tmp_path / "out")
    prove(write(fresh, tmp_path / "out", Composite.single(fresh[2].content)))


def test_an_earlier_export_stays_unless_it_may_be_overwritten(fresh, tmp_path):
    write(fresh, tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(InputError, match="--overwrite") as refused:
        write(fresh, tmp_path / "out", Composite.single(fresh[2].content), overwrite=False)
    assert refused.value.where == tmp_path / "out"
    assert files(tmp_path) == before


def edit(file):
    file.write_text(file.read_text() + "\n")


def forget_manifest(out):
    """As an export of an earlier release."""
    marker = json.loads((out / MARKER).read_text())
    del marker["files"]
    (out / MARKER).write_text(json.dumps(marker))


FOREIGN = {
    "a note": ("note.txt", lambda out: (out / "note.txt").write_text("mine")),
    "a hidden file": (".hidden", lambda out: (out / ".hidden").write_text("mine")),
    "a file in a new folder": ("logs/", lambda out: worlds.write_documents(out / "logs/a.jsonl", ["mine"])),
    "an empty folder": ("logs/", lambda out: (out / "logs").mkdir()),
    "an edited card": ("README.md", lambda out: edit(out / "README.md")),
    "an edited config": ("config.json", lambda out: edit(out / "config.json")),
    "weights trained further": (WEIGHTS, lambda out: flip_last_bit(out)),
    "a link": ("data", lambda out: (out / "data").symlink_to(out.parent / "models")),
    "a note without a manifest": ("note.txt", lambda out: (forget_manifest(out), (out / "note.txt").touch())),
    "weights trained further without a manifest": ("README.md", lambda out: (forget_manifest(out), flip_last_bit(out))),
    "a marker that is no JSON": ("README.md", lambda out: (out / MARKER).write_text("[" * 10**5)),
    "a manifest of another form": ("README.md", lambda out: (out / MARKER).write_text('{"files": [1]}')),
}


@pytest.mark.parametrize("when", ["before", "while it is written"])
@pytest.mark.parametrize("case", FOREIGN)
def test_nothing_that_was_not_exported_is_removed(fresh, tmp_path, case, when):
    out, (name, change) = tmp_path / "out", FOREIGN[case]
    write(fresh, out)
    if when == "before":
        change(out)
    before = files(tmp_path)
    with pytest.raises(InputError) as refused:
        write(fresh, out, Composite.single(fresh[2].content), approve=lambda written: when == "before" or change(out))
    assert refused.value.where == out and name in refused.value.mend
    assert when != "before" or files(tmp_path) == before
    assert out.is_dir() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_a_folder_is_written_through(fresh, tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        write(fresh, tmp_path / "disk/best")
    (tmp_path / "out").symlink_to(tmp_path / "disk/best")
    prove(write(fresh, tmp_path / "out", Composite.single(fresh[2].content)))
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/best" / WEIGHTS).is_file()
    assert {path.name for path in tmp_path.rglob("*best*")} == {"best"}


@pytest.mark.parametrize("place", ["models/a/out", "models/base/deep/er", "models", "models/b", "link/out", "."])
def test_no_export_goes_into_a_model_or_around_one(fresh, tmp_path, place):
    (tmp_path / "link").symlink_to(tmp_path / "models/a")
    before = files(tmp_path)
    with pytest.raises(InputError, match="a model of the study") as refused:
        write(fresh, tmp_path / place, Composite.single(fresh[1].content))
    assert refused.value.where == tmp_path / place
    assert files(tmp_path) == before and not list(tmp_path.rglob(".*"))


def test_two_processes_do_not_write_the_same_export(fresh, tmp_path):
    with staged_folder(tmp_path / "out"), pytest.raises(InputError, match="another process"):
        write(fresh, tmp_path / "out")
    prove(write(fresh, tmp_path / "out"))


def interrupted(written):
    raise KeyboardInterrupt


def refused(written):
    raise ConnectionError("the workers are gone")


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("raised", "case"),
    [
        (UnicodeEncodeError, {"card": "no UTF-8: \ud800"}),
        (KeyboardInterrupt, {"approve": interrupted}),
        (ConnectionError, {"approve": refused}),
    ],
)
def test_an_export_that_is_interrupted_or_not_approved_leaves_what_was_there(fresh, tmp_path, raised, case, earlier):
    out = tmp_path / "out"
    if earlier:
        write(fresh, out)
    before = files(tmp_path)
    with pytest.raises(raised):
        write(fresh, out, Composite.single(fresh[2].content), **case)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"models", "out"} if earlier else {"models"})


@pytest.mark.parametrize("state", ["partial", "former"])
def test_what_a_killed_export_left_is_settled_by_the_next(fresh, tmp_path, state):
    """Killed while writing, a partial folder is left; killed between two renames, the former export, which counts."""
    out = tmp_path / "out"
    write(fresh, out)
    before = files(out)
    out.rename(tmp_path / f".out.{state}")
    with pytest.raises(KeyboardInterrupt):
        write(fresh, out, Composite.single(fresh[2].content), approve=interrupted)
    assert not out.exists() if state == "partial" else files(out) == before
    prove(write(fresh, out, Composite.single(fresh[2].content)))
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


def test_a_checkpoint_that_was_changed_since_is_not_exported(fresh, tmp_path):
    shutil.copy(fresh[0].path / WEIGHTS, fresh[1].path / WEIGHTS)
    with pytest.raises(InputError, match="changed") as refused:
        write(fresh, tmp_path / "out")
    assert refused.value.where == fresh[1].path
    assert not (tmp_path / "out").exists()
