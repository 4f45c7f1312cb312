"""Laws of the comparison before a study: once for each content, refused by nats, left out only with a reason."""

import pytest
import torch
import worlds
import yaml
from in_process import open_study
from recorded import RecordedProgress
from transformers import BertConfig, BertForMaskedLM

from dem_opt.checkpoints.user_cache import cache_folder
from dem_opt.cli.main import main
from dem_opt.errors import InputError
from dem_opt.evaluation.forward_check import Comparison, NotComparableError
from dem_opt.planning import vertices


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Names of the models that are compared; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    original = vertices.compare_forward

    def counting(base, model):
        names.append(model.path.name)
        return original(base, model)

    monkeypatch.setattr(vertices, "compare_forward", counting)
    return names


def answer(monkeypatch, comparison: Comparison) -> None:
    monkeypatch.setattr(vertices, "compare_forward", lambda base, model: comparison)


def test_each_content_is_compared_once(tmp_path, compared):
    path = worlds.study(tmp_path)
    assert main(["check", str(path)]) == 0
    assert compared == ["base", "code", "math", "prose"]
    open_study(path).run()
    open_study(path).score({"code": 1.0})
    assert len(compared) == 4
    worlds.save_model(tmp_path / "models/math", seed=9)
    open_study(path).score({"code": 1.0})
    assert compared[4:] == ["math"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": 3}', "[" * 10_000])
def test_a_damaged_cache_is_made_anew(tmp_path, compared, text):
    open_study(worlds.study(tmp_path)).score({"code": 1.0})
    kept = list((cache_folder() / vertices.VERTICES).iterdir())
    assert len(kept) == len(compared) == 4
    for file in kept:
        file.write_text(text)
    open_study(worlds.study(tmp_path)).score({"code": 1.0})
    assert len(compared) == 8 and all(file.read_text() != text for file in kept)


@pytest.mark.parametrize("command", ["check", "run", "score", "merge"])
def test_a_vertex_that_computes_something_else_is_refused_in_nats(tmp_path, monkeypatch, compared, capsys, command):
    path = worlds.study(tmp_path)
    answer(monkeypatch, Comparison(5.25, 5.5, 0.125))
    more = {
        "score": ["--coefficients", "code=1"],
        "merge": ["--coefficients", "code=1", "--out", str(tmp_path / "out")],
    }
    assert main([command, str(path), *more.get(command, [])]) == 2
    message = capsys.readouterr().err
    assert all(number in message for number in ("5.2500", "5.5000", "1.2e-01")) and message.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_rounding_is_no_difference(tmp_path, monkeypatch, compared):
    answer(monkeypatch, Comparison(5.25, 5.25, vertices.SAME_BITS))
    open_study(worlds.study(tmp_path)).score({"code": 1.0})


@pytest.mark.parametrize("difference", [float("nan"), float("inf")])
def test_no_number_is_a_difference(tmp_path, monkeypatch, compared, difference):
    answer(monkeypatch, Comparison(5.25, 5.25, difference))
    with pytest.raises(InputError, match="nats per token"):
        open_study(worlds.study(tmp_path)).score({"code": 1.0})


def test_what_can_not_be_compared_is_told_each_time(tmp_path, monkeypatch, compared):
    def refuse(base, model):
        compared.append(model.path.name)
        raise NotComparableError("no such class")

    monkeypatch.setattr(vertices, "compare_forward", refuse)
    path = worlds.study(tmp_path)
    for _ in range(2):
        progress = RecordedProgress()
        open_study(path, progress).score({"code": 1.0})
        assert len(progress.warnings) == 4 and all("no such class" in warning for warning in progress.warnings)
    assert len(compared) == 4


def test_without_memory_it_is_left_out_and_said(tmp_path, monkeypatch, compared):
    monkeypatch.setattr(vertices, "available_memory", lambda: 10**3)
    progress = RecordedProgress()
    open_study(worlds.study(tmp_path), progress).score({"code": 1.0})
    (warning,) = progress.warnings
    assert "memory" in warning and compared == []


@pytest.mark.parametrize("command", ["check", "train", "run", "score"])
def test_a_masked_language_model_is_no_base(tmp_path, compared, capsys, command):
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    for name in ("base", "code", "math"):
        config = BertConfig(vocab_size=worlds.VOCABULARY, max_position_embeddings=64, **fields)
        BertForMaskedLM(config).save_pretrained(tmp_path / "models" / name)
        worlds.tokenizer().save_pretrained(tmp_path / "models" / name)
        worlds.write_documents(tmp_path / f"data/{name}.jsonl", worlds.documents(len(name)))
    data = {name: {"validation": f"data/{name}.jsonl", "train": f"data/{name}.jsonl"} for name in ("code", "math")}
    folder = "trained" if command == "train" else "models"
    distributions = {name: {"checkpoint": f"{folder}/{name}", **files} for name, files in data.items()}
    content = {"name": "masked", "base": "models/base", "distributions": distributions}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content | {"evaluation": {"window": 32, "windows": 4, "held_out": 4}}))
    more = ["--coefficients", "code=1"] if command == "score" else []
    assert main([command, str(path), *more]) == 2
    message = capsys.readouterr().err
    assert "BertLMHeadModel" in message and "causal" in message and message.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "trained").exists()
