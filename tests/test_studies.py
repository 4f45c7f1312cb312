"""Every file of studies/ loads, says its question, and fits what it is for."""

import json
import os
import shutil
import struct
from math import prod
from pathlib import Path

import pytest
import torch
import worlds
import yaml
from local_text import KINDS
from transformers import LlamaConfig, LlamaForCausalLM

from dem_opt.config import load
from dem_opt.training.lora import check_lora
from dem_opt.training.recipe import Recipe, check_trainer
from dem_opt.workflows.check import check
from dem_opt.workflows.data_mixing import mixtures
from dem_opt.workflows.quickstart import ADDED, DISTRIBUTIONS, QUICKSTART, study_text

STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))
NAMES = [path.stem for path in STUDIES]
OPENLLAMAS = {
    "3b": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32},
    "7b": worlds.LLAMAS["7B"],
    "13b": worlds.LLAMAS["13B"],
}


def test_those_that_are_promised_are_there() -> None:
    promised = {
        "quickstart",
        "headline",
        "mix",
        "add-a-distribution",
        "lora",
        "scale-free",
        "pretrained",
        "pretrained-sums",
        "pretrained-long",
        "pretrained-long-sums",
        "pretrained-lora",
        "pretrained-long-lora",
        "pretrained-mixtures",
        "pretrained-again",
        "pretrained-three",
        "pretrained-fourth",
        "pretrained-float32",
        "pretrained-stochastic",
    }
    assert promised | {f"openllama-{size}" for size in OPENLLAMAS} == set(NAMES)


@pytest.mark.parametrize("path", STUDIES, ids=NAMES)
def test_a_study_loads_and_begins_with_its_question(path: Path) -> None:
    config = load(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    opening = " ".join(line.removeprefix("#").strip() for line in lines[:3] if line.startswith("#"))
    assert "?" in opening
    settings = config.fine_tuning
    check_trainer(settings.trainer, path)
    check_lora(settings.lora, path)
    assert Recipe(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=settings.seed,
        trainer=settings.trainer,
    ).rows
    if path.stem not in ("pretrained-float32", "pretrained-stochastic"):  # whose fine-tunes are those of `pretrained`
        assert all(distribution.train is not None for distribution in config.distributions.values())
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in readme


def study(name: str) -> Path:
    return STUDIES[NAMES.index(name)]


def test_the_quickstarts_is_what_the_command_writes() -> None:
    written = yaml.safe_load(study_text(QUICKSTART, 0))
    assert load(study("quickstart")).model_dump(exclude={"compute"}) == (
        type(load(study("quickstart")))
        .model_validate(written, context={"folder": STUDIES[0].parent})
        .model_dump(exclude={"compute"})
    )


def test_the_headline_has_four_distributions_and_at_least_eleven_mixtures() -> None:
    path = study("headline")
    config = load(path)
    assert sorted(config.distributions) == sorted(DISTRIBUTIONS)
    tried = mixtures(config, "study", path)
    assert len({tuple(shares.items()) for shares in tried}) == len(tried) >= 11


def test_the_fifth_distribution_is_added_to_the_quickstarts_own_study() -> None:
    grown, four = load(study("add-a-distribution")), load(study("quickstart"))
    assert grown.name == four.name and set(grown.distributions) == {*DISTRIBUTIONS, ADDED}
    assert (grown.evaluation, grown.fine_tuning) == (four.evaluation, four.fine_tuning)
    assert grown.storage.endswith("quickstart/runs/quickstart/study.db")


def test_sums_are_free_in_the_quickstarts_own_ledger() -> None:
    config = load(study("scale-free"))
    assert config.simplex.sums == (0, 2)
    assert config.storage == load(study("add-a-distribution")).storage


@pytest.mark.parametrize("name", ["pretrained", "pretrained-long"])
def test_a_pretrained_study_and_its_sums_differ_in_their_sums_alone(name: str) -> None:
    simplex, sums = load(study(name)), load(study(f"{name}-sums"))
    assert simplex.simplex.sums == (1, 1) and sums.simplex.sums == (0, len(sums.distributions))
    differing = {"name", "output", "tracking", "simplex", "data_mixing", "evaluate"}
    assert simplex.model_dump(exclude=differing) == sums.model_dump(exclude=differing)
    assert sorted(KINDS) == sorted([*simplex.distributions, *simplex.general])


@pytest.mark.parametrize("name", ["pretrained-long", "pretrained-lora", "pretrained-long-lora"])
def test_pretrained_studies_differ_in_their_fine_tunes_alone(name: str) -> None:
    first, other = load(study("pretrained")), load(study(name))
    differing = {"name", "output", "storage", "tracking", "distributions", "fine_tuning", "data_mixing", "evaluate"}
    assert first.model_dump(exclude=differing) == other.model_dump(exclude=differing)
    data = {"train", "validation", "held_out"}
    for kind, entry in other.distributions.items():
        assert entry.model_dump(include=data) == first.distributions[kind].model_dump(include=data)
    assert other.fine_tuning.dtype == first.fine_tuning.dtype == "mixed"


def save_sparse(folder: Path, config: LlamaConfig, shards: int = 4) -> None:
    """A Llama as it would lie on disk, but of holes."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(folder)
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        sparse(folder / file, {name: shapes[name] for name in sorted(shapes)[number::shards]})
    weight_map = {name: files[place % shards] for place, name in enumerate(sorted(shapes))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Tensors in bfloat16 with a true header, in a file of holes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.mark.parametrize("size", OPENLLAMAS)
def test_those_of_openllama_pass_the_check(size: str, tmp_path: Path) -> None:
    """On sparse files with the headers that the weights have, and those that `train` makes of them."""
    path = tmp_path / "study.yaml"
    shutil.copy(study(f"openllama-{size}"), path)
    config = load(path)
    model = LlamaConfig(vocab_size=32000, dtype="bfloat16", max_position_embeddings=2048, **OPENLLAMAS[size])
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in LlamaForCausalLM(model).named_parameters()}
    save_sparse(config.base.path, model)
    for distribution in config.distributions.values():
        kind, source = distribution.fine_tune
        if kind == "checkpoint":
            save_sparse(source.path, model)
        else:
            sparse(source.path / "adapter_model.safetensors", factors(shapes, config.fine_tuning.lora["r"]))
            adapter = {"peft_type": "LORA", **config.fine_tuning.lora, "target_modules": "all-linear", "bias": "none"}
            (source.path / "adapter_config.json").write_text(json.dumps(adapter))
        for file in (distribution.validation, distribution.held_out):
            file.path.parent.mkdir(exist_ok=True)
            file.path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    report = check(config, path)
    assert report.architecture == "LlamaForCausalLM" and len(report.checkpoints) == 5
    assert report.plan.work.trial_tokens == 4 * 64 * 1024


def factors(shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """A LoRA's tensors for all linear layers but the head."""
    made = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and "layers" in name:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            made |= {f"{layer}.lora_A.weight": (rank, shape[1]), f"{layer}.lora_B.weight": (shape[0], rank)}
    return made
