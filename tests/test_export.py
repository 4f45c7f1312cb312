"""Exports: what is written loads, proves, and replaces nothing but an export."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import worlds
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from dem_opt import export
from dem_opt.arena import Arena
from dem_opt.checkpoints import INDEX, WEIGHTS, content_hash, empty_model, read_architecture, read_header
from dem_opt.errors import InputError
from dem_opt.export import MARKER, ExportError, model_card, prove, write_composite
from dem_opt.records import Composite, Score, Standing, StoredModel
from dem_opt.simplex import UNIT, Coefficients

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


def write(stored, out, merged=None, card=CARD, approve=lambda written: None):
    folders = {model.content: model.path for model in stored}
    return write_composite(stored[0].path, folders, merged or composite(stored), out, card, approve)


@pytest.mark.parametrize("shard_bytes", [10**9, 12_000])
@pytest.mark.parametrize("units", [(0, 4 * 10**8, 6 * 10**8), (-(10**8), 6 * 10**8, 5 * 10**8), (UNIT, 0, 0)])
def test_an_export_loads_as_the_composite_that_was_scored(stored, tmp_path, monkeypatch, shard_bytes, units):
    monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes)
    merged = composite(stored, units)
    written = write(stored, tmp_path / "out", merged)
    prove(written)
    assert (tmp_path / "out" / INDEX).exists() == (shard_bytes < 10**6)
    assert (tmp_path / "out" / WEIGHTS).exists() != (shard_bytes < 10**6)
    live = empty_model(stored[0].path, torch.float32)
    Arena(live, stored).merge(merged)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(loaded(ids).logits, live(ids).logits)


def test_an_export_keeps_the_bases_dtypes_and_names_once(stored, tmp_path):
    write(stored, tmp_path / "out")
    headers = [read_header(folder, "base") for folder in (stored[0].path, tmp_path / "out")]
    forms = [{name: (one.shape, one.dtype) for name, one in header.tensors.items()} for header in headers]
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
    assert json.loads((out / MARKER).read_text()) == {
        "composite": composite(fresh).key,
        "coefficients": {fresh[1].content: 0.4, fresh[2].content: 0.6},
        "content": written.content,
    }


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
    (out / "added_later.txt").write_text("goes")
    prove(write(fresh, out, Composite.single(fresh[2].content)))
    assert not (out / "added_later.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


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


def standing(label, coefficients, nll):
    scores = {"code": Score((nll, nll), (1, 1)), "math": Score((2 * nll,), (1,))}
    both = {"search": scores, "held_out": scores}
    objective = {"search": 1.5 * nll, "held_out": 1.5 * nll}
    return Standing(label, "best", "random", coefficients, both, objective, 1, 2, 3.0)


def test_a_card_tells_coefficients_scores_and_provenance():
    coefficients = Coefficients((("code", 3 * 10**8), ("math", 6 * 10**8)))
    contents = {"base": "ba5e", "code": "c0de", "math": "3a7b"}
    card = model_card("study", coefficients, contents, {"torch": "2.13.0"}, [standing("winner", coefficients, 2.0)])
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    for row in (["base", "0.100000000", "ba5e"], ["code", "0.300000000", "c0de"], ["math", "0.600000000", "3a7b"]):
        assert row in rows
    assert rows.count(["winner", "2.0000", "4.0000", "3.0000", "20.086"]) == 2
    assert ["torch", "2.13.0"] in rows
    assert "search split" in body and "held-out split" in body


def test_a_card_without_scores_says_none():
    coefficients = Coefficients((("code", UNIT),))
    card = model_card("study", coefficients, {"base": "ba5e", "code": "c0de"}, {})
    assert "split" not in card and "0.000000000" in card


def test_what_users_write_shows_as_it_is_in_a_card():
    coefficients = Coefficients((("code", 10**9), ("math", 0)))
    label = "a|b <script>alert(1)</script> [x](http://y) `z`\n# not a title"
    card = model_card(
        label, coefficients, dict.fromkeys(("base", "code", "math"), label), {}, [standing(label, coefficients, 1.0)]
    )
    assert "<script" not in card.replace("\\<script", "")
    assert "\n# not a title" not in card
    shown = [line for line in card.splitlines() if line.startswith("| ") and "script" in line]
    assert len(shown) == 5
    assert all(line.count("|") - line.count("\\|") in (4, 6) for line in shown)
