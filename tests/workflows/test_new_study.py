"""Laws of `dem-opt init`: it writes a study that `check` accepts, overwrites nothing, and names what it did not use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import worlds
from safetensors.torch import save_file
from test_widening import narrowed
from transformers import LlamaConfig, LlamaForCausalLM

from dem_opt.checkpoints.locate import locate
from dem_opt.cli.main import main
from dem_opt.config import BaseSource, load
from dem_opt.workflows.new_study import FORMS, match_files

NAMES = ("code", "math", "prose")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Three fine-tunes and their data, without a study file."""
    path = worlds.study(tmp_path_factory.mktemp("world"))
    path.unlink()
    return path.parent


@pytest.fixture
def world(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "a lot")
    return tmp_path / "a lot"


def save_adapter(folder: Path, base: str) -> None:
    """A LoRA of rank 2 on the queries of the tiny Llama."""
    folder.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 16) / 50, f"{name}.lora_B.weight": torch.ones(16, 2) / 50}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))


def init(world: Path, *words: str) -> int:
    return main(["init", str(world), "--out", str(world / "study.yaml"), *words])


def test_a_study_of_checkpoints_is_written_and_accepted(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(world, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["distributions"].keys() == set(NAMES) and written["unused"] == {}
    study = load(world / "study.yaml")
    assert study.base.path == world / "models/base" and study.name == "a-lot"
    for name in NAMES:
        assert study.distributions[name].checkpoint.path == world / "models" / name
        assert study.distributions[name].validation.paths == [world / "data" / f"{name}.jsonl"]
    assert str(world) not in (world / "study.yaml").read_text()
    assert main(["check", str(world / "study.yaml")]) == 0


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, "stochastic"), (torch.float32, "nearest")], ids=str)
def test_composites_of_sixteen_bits_are_rounded_stochastically(world: Path, dtype: torch.dtype, rounding: str) -> None:
    for name in ("base", *NAMES):
        narrowed(world / "models" / name, dtype)
    assert init(world) == 0
    assert load(world / "study.yaml").base.rounding == rounding
    assert ("rounding:" in (world / "study.yaml").read_text()) == (rounding == "stochastic")
    assert main(["check", str(world / "study.yaml")]) == 0


def test_a_base_that_is_one_gguf_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer and its settings are in the file; its fine-tunes are those of what it is converted to."""
    pytest.importorskip("gguf")
    import gguf_files
    from test_rounding import tokenizer

    sizes = {"vocab_size": worlds.VOCABULARY + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    file = gguf_files.save(tmp_path / "models/base/model.gguf", model, tokenizer(), quantized=True)
    for seed, name in enumerate(NAMES):
        shutil.copytree(locate(BaseSource(path=file), "base"), tmp_path / "models" / name)
        worlds.write_documents(tmp_path / f"data/{name}.jsonl", worlds.documents(seed))
    assert init(tmp_path, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["unused"] == {} and written["distributions"].keys() == set(NAMES)
    assert load(tmp_path / "study.yaml").base.path == tmp_path / "models/base"
    assert load(tmp_path / "study.yaml").base.rounding == "stochastic"
    assert main(["check", str(tmp_path / "study.yaml")]) == 0


def test_a_study_of_adapters_finds_the_base_that_they_name(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "models/base").rename(world / "models/tiny llama")
    for name in ("code", "math"):
        shutil.rmtree(world / "models" / name)
        save_adapter(world / "adapters" / name, "org/tiny llama")
    assert init(world) == 0
    study = load(world / "study.yaml")
    assert study.base.path == world / "models/tiny llama"
    assert {name: study.distributions[name].fine_tune[0] for name in NAMES} == {
        "code": "adapter",
        "math": "adapter",
        "prose": "checkpoint",
    }
    assert main(["check", str(world / "study.yaml")]) == 0


def test_nothing_is_overwritten(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "study.yaml").write_text("mine")
    assert init(world) == 2
    assert (world / "study.yaml").read_text() == "mine" and capsys.readouterr().err.count("\n") == 1


def test_what_is_not_used_is_named_with_its_reason(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worlds.save_model(world / "models/wide", seed=5, hidden=8)
    worlds.write_documents(world / "data/wide.jsonl", worlds.documents(9))
    worlds.write_documents(world / "data/web.jsonl", worlds.documents(10))
    worlds.save_model(world / "models/lonely", seed=6)
    (world / "models/headless").mkdir()
    shutil.copyfile(world / "models/code/model.safetensors", world / "models/headless/model.safetensors")
    (world / "data/math.jsonl").write_text('{"x": 1}\n')
    assert init(world, "--json") == 0
    unused = json.loads(capsys.readouterr().out)["unused"]
    assert {Path(path).name for path in unused} == {"wide", "web.jsonl", "lonely", "headless", "math.jsonl"}
    assert load(world / "study.yaml").distributions.keys() == {"code", "prose"}
    assert all(f"{name}" in (world / "study.yaml").read_text() for name in ("wide", "web.jsonl", "lonely", "headless"))
    assert main(["check", str(world / "study.yaml")]) == 0


def test_where_the_base_is_not_clear_it_is_asked_for(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "models/base").rename(world / "models/origin")
    assert init(world) == 2
    assert "--base" in capsys.readouterr().err and not (world / "study.yaml").exists()
    assert init(world, "--base", str(world / "models/origin"), "--name", "mine") == 0
    assert load(world / "study.yaml").base.path == world / "models/origin"
    assert main(["check", str(world / "study.yaml")]) == 0


@pytest.mark.parametrize("folders", [["nowhere"], ["data"], ["models"]])
def test_folders_without_a_study_are_refused_in_a_line(
    world: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = world / "study.yaml"
    assert main(["init", *(str(world / folder) for folder in folders), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["code.jsonl"], {"validation": "code.jsonl"}),
        (["code.val.jsonl", "code.train.jsonl"], {"train": "code.train.jsonl", "validation": "code.val.jsonl"}),
        (["code_dev.json", "code_test.json"], {"validation": "code_dev.json", "held_out": "code_test.json"}),
        (
            ["code-validation.csv", "code-held-out.csv"],
            {"validation": "code-validation.csv", "held_out": "code-held-out.csv"},
        ),
        (
            ["code/valid.parquet", "code/test.parquet"],
            {"validation": "code/valid.parquet", "held_out": "code/test.parquet"},
        ),
        (["code.test.jsonl"], {"validation": "code.test.jsonl"}),
        (["code.train.jsonl"], {"train": "code.train.jsonl"}),
        (["val.code.txt"], {"validation": "val.code.txt"}),
        (["encoder.jsonl", "barcode.jsonl"], {}),
        (["code-python.val.jsonl"], {}),
    ],
)
def test_data_is_matched_by_name(files: list[str], expected: dict[str, str]) -> None:
    matches = match_files("code", ["code", "code-python", "math"], [Path("data", file) for file in files])
    assert {role: str(path.relative_to("data")) for role, path in matches.items()} == expected


@pytest.mark.parametrize("form", FORMS[:5] + FORMS[8:9], ids=str)
def test_the_form_of_data_is_found(world: Path, form: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for text in worlds.documents(3):
        if form.get("format") == "messages":
            rows.append(
                {"messages": [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:]}]}
            )
        elif form.get("format"):
            rows.append({form.get("prompt", "prompt"): text[:40], form.get("completion", "completion"): text[40:]})
        else:
            rows.append({form.get("text", "text"): text})
    if form.get("format") == "messages":
        for name in ("base", *NAMES):
            (world / "models" / name / "chat_template.jinja").write_text(
                "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            )
    (world / "data/math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert init(world) == 0
    data = load(world / "study.yaml").distributions["math"].validation
    assert {"format": data.format, **data.columns}.items() >= form.items()
