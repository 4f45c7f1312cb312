"""Whole studies of what users really have: adapters, fused experts, renamed weights, pairs, dtypes side by side."""

import json
import random
from pathlib import Path

import in_process
import pytest
import torch
import worlds
import yaml
import zoo
from test_adapters import LINEAR, make_adapter

from dem_opt.checkpoints.architecture import load_model
from dem_opt.checkpoints.files import read_header
from dem_opt.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

NAMES = ("code", "math")


def write_pairs(path: Path, seed: int) -> dict[str, str]:
    """Prompts and completions of known words; how a study names the file."""
    rng = random.Random(seed)
    lines = [
        {"prompt": " ".join(rng.choices(worlds.WORDS, k=6)), "completion": " ".join(rng.choices(worlds.WORDS, k=4))}
        for _ in range(60)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(path), "format": "prompt_completion"}


def models(folder: Path, name: str, dtypes=(torch.float32,) * 3) -> None:
    """Base and checkpoints of one architecture, with a tokenizer."""
    for seed, (part, dtype) in enumerate(zip(("base", *NAMES), dtypes, strict=True)):
        zoo.save(folder / "models" / part, name, seed, dtype, vocab_size=worlds.VOCABULARY)
    worlds.tokenizer().save_pretrained(folder / "models/base")


def write_study(folder: Path, fine_tunes: dict, **sections) -> Path:
    content = {
        "name": "inputs",
        "base": "models/base",
        "distributions": fine_tunes,
        "evaluation": {"window": 32, "windows": 4, "held_out": 4},
        "search": {"algorithm": "random", "trials": 4},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | sections))
    return path


def texts(folder: Path) -> dict[str, str]:
    for seed, name in enumerate(NAMES):
        worlds.write_documents(folder / f"data/{name}.jsonl", worlds.documents(seed))
    return {name: f"data/{name}.jsonl" for name in NAMES}


def adapters(folder: Path) -> Path:
    models(folder, "llama")
    for seed, name in enumerate(NAMES):
        make_adapter(folder / "models/base", folder / "adapters" / name, seed, target_modules=LINEAR)
    data = texts(folder)
    return write_study(folder, {name: {"adapter": f"adapters/{name}", "validation": data[name]} for name in NAMES})


def an_adapter_beside_a_checkpoint(folder: Path) -> Path:
    path = adapters(folder)
    content = yaml.safe_load(path.read_text())
    content["distributions"]["code"] = {"checkpoint": "models/code", "validation": "data/code.jsonl"}
    path.write_text(yaml.safe_dump(content | {"simplex": {"total": 0.8}}))
    return path


def checkpoints_of(name: str, paired: bool = False, dtypes=(torch.float32,) * 3):
    def make(folder: Path) -> Path:
        models(folder, name, dtypes)
        data = texts(folder)
        if paired:
            data = {name: write_pairs(folder / f"data/{name}.pairs.jsonl", seed) for seed, name in enumerate(NAMES)}
        return write_study(folder, {name: {"checkpoint": f"models/{name}", "validation": data[name]} for name in NAMES})

    return make


WORLDS = {
    "adapters": adapters,
    "an adapter beside a checkpoint": an_adapter_beside_a_checkpoint,
    "fused experts": checkpoints_of("mixtral"),
    "renamed weights": checkpoints_of("gpt_neox"),
    "state space": checkpoints_of("mamba"),
    "pairs, T5": checkpoints_of("t5", paired=True),
    "pairs, BART": checkpoints_of("bart", paired=True),
    "pairs, Llama": checkpoints_of("llama tied", paired=True),
    "bfloat16 base, float32 fine-tunes": checkpoints_of("llama", dtypes=(torch.bfloat16, torch.float32, torch.float32)),
}


@pytest.mark.filterwarnings("ignore:.*falling back to its reference.*")
@pytest.mark.parametrize("case", WORLDS)
def test_a_study_runs_and_its_winner_is_exported_and_scored_again(tmp_path, monkeypatch, capsys, case):
    path = WORLDS[case](tmp_path)
    assert main(["check", str(path)]) == 0
    assert "one worker" in capsys.readouterr().out
    study = in_process.open_study(path)
    winner = study.run().winner
    champion = study.export(tmp_path / "best")
    assert champion.result == winner
    assert set(read_header(tmp_path / "best", "a").tensors) == set(read_header(tmp_path / "models/base", "a").tensors)
    scores = study.score_model(tmp_path / "best")
    for split, by_name in winner.scores.items():
        for name, score in by_name.items():
            assert scores[split][name].nll == pytest.approx(score.nll, rel=1e-5)
    assert load_model(tmp_path / "best", "auto") is not None


def test_a_single_fine_tune_of_another_dtype_is_written_as_it_is(tmp_path, monkeypatch):
    path = WORLDS["bfloat16 base, float32 fine-tunes"](tmp_path)
    written = in_process.open_study(path).merge({"code": 1.0}, tmp_path / "vertex")
    mine = load_model(written.path, "auto").named_parameters()
    theirs = dict(load_model(tmp_path / "models/code", torch.float32).named_parameters())
    assert all(x.dtype == torch.float32 and torch.equal(x, theirs[name]) for name, x in mine)
