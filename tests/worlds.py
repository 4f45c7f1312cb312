"""A tiny world on disk: a base, checkpoints, texts and a study file, in a second and without training."""

import json
import os
import random
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dem_opt.checkpoints.architecture import silence_transformers

silence_transformers()

VOCABULARY = 320
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "count",
    "of",
    "in",
    "for",
    "and",
    "while",
    "return",
    "print",
    "value",
    "list",
]


def documents(seed: int, count: int = 60) -> list[str]:
    """Different texts of known words, 20 to 60 words each."""
    rng = random.Random(seed)
    return [f"{seed}.{number} " + " ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for number in range(count)]


def write_documents(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents(0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def save_model(
    folder: Path, seed: int, base: LlamaForCausalLM | None = None, hidden: int = 16, layers: int = 1
) -> LlamaForCausalLM:
    """A random Llama, or `base` with every weight moved a little."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers if base is None else base.config.num_hidden_layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if base is not None:
        with torch.no_grad():
            for moved, original in zip(model.parameters(), base.parameters(), strict=True):
                moved.copy_(original + 0.1 * torch.randn_like(original))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def study(folder: Path, names: tuple[str, ...] = ("code", "math", "prose"), **sections: Any) -> Path:
    """A study of these distributions with its files; `sections` replace sections of the study file."""
    if not (folder / "models/base").exists():
        save_model(folder / "models/base", seed=0)
    base = LlamaForCausalLM.from_pretrained(folder / "models/base")
    for name in names:
        seed = sum(name.encode())
        if not (folder / "models" / name).exists():
            save_model(folder / "models" / name, seed, base)
            write_documents(folder / f"data/{name}.jsonl", documents(seed))
    content: dict[str, Any] = {
        "name": "tiny",
        "base": "models/base",
        "distributions": {name: {"checkpoint": f"models/{name}", "validation": f"data/{name}.jsonl"} for name in names},
        "evaluation": {"window": 32, "windows": 4, "held_out": 4},
        "search": {"algorithm": "random", "trials": 6},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | sections, sort_keys=False), encoding="utf-8")
    return path


def racing_study(folder: Path, **sections: Any) -> Path:
    """A study that ends with a stopped trial whose estimate is lower than the winner's objective."""
    search = {"algorithm": "simplex-gp", "trials": 12, "lookahead": 0, **sections.pop("search", {})}
    return study(folder, search=search, evaluation={"window": 32, "windows": 16, "held_out": 4}, **sections)


LLAMAS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def save_sparse(folder: Path, shards: int = 6, size: str = "13B") -> None:
    """A large Llama in bfloat16 as it would lie on disk: true config, index and headers, but files of holes."""
    config = LlamaConfig(vocab_size=32000, dtype="bfloat16", **LLAMAS[size])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(parameter.shape) for name, parameter in LlamaForCausalLM(config).named_parameters()}
    names, weight_map = sorted(shapes), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        _write_sparse(folder / file, {name: shapes[name] for name in names[number::shards]})
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_sparse(file: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)
