"""Studies on which coefficients by group are judged: `python benchmarks/group_studies.py FOLDER KIND...` makes them.

    base-240, base-960, base-3840   the quickstart's kind, with bases that have learnt for so many steps
    short-vectors                   the base of 960 steps, fine-tuned at a lower rate
    short-240, short-3840           likewise the others: for the column of groups beside `benchmarks/mixing.py`
    eight                           the same base with eight distributions: math in two kinds, records in three, logs
    adapters                        the same base with a LoRA of rank 8 for each of four distributions
    qwen2                           another architecture, of four layers with grouped queries and tied embeddings, and
                                    five distributions, of which the base has not seen one

All have texts of `benchmarks/mixing.py`.  What is finished in FOLDER is not made again.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from mixing import TEXT, Telling, make_study
from transformers import Qwen2Config, Qwen2ForCausalLM

from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.compute import InProcessCompute
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import load_tokenizer
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.training.fine_tune import save_checkpoint
from dem_opt.training.recipe import Recipe
from dem_opt.training.trainer import train_model
from dem_opt.workflows.quickstart import ADDED, DISTRIBUTIONS, SPLITS, mixture_documents

RATE, LOWER_RATE = 1e-3, 3e-4
"""Learning rates of fine-tunes: the quickstart's, and one that makes shorter vectors."""

RECORDS = ("order", "sensor", "member")
"""Types of the JSON records, each a distribution of `eight`."""

EIGHT = ("code", "prose", ADDED, "money", "counting", *RECORDS)
FIVE = (*DISTRIBUTIONS, ADDED)

LORA = {"steps": 50, "learning_rate": 5e-3, "batch_size": 16, "lora": {"r": 8, "lora_alpha": 16}}
"""Settings of the adapters, those of studies/lora.yaml."""

QWEN2_STEPS = 480


def of_base(folder: Path, steps: int, rate: float = RATE) -> Path:
    """The study of four distributions over a base of so many steps."""
    return make_study(folder, steps, rate)


def eight(folder: Path) -> Path:
    """The study of eight distributions over the base of 960 steps."""
    four = of_base(folder, 960)
    data = four.parent / "data"
    for split in SPLITS:
        records = _read(data / f"records.{split}.jsonl")
        for kind in RECORDS:
            _write(data / f"{kind}.{split}.jsonl", (text for text in records if json.loads(text)["type"] == kind))
        problems = _read(data / f"math.{split}.jsonl")
        _write(data / f"money.{split}.jsonl", (text for text in problems if "euros" in text))
        _write(data / f"counting.{split}.jsonl", (text for text in problems if "euros" not in text))
    content = yaml.safe_load(four.read_text(encoding="utf-8"))
    content["evaluation"]["held_out"] = TEXT.held_out_windows // 2
    return _variant(four.parent, content, "eight", _distributions(EIGHT, "checkpoint", "models/{}-eight"))


def adapters(folder: Path) -> Path:
    """The study of four adapters of the base of 960 steps."""
    four = of_base(folder, 960)
    content = yaml.safe_load(four.read_text(encoding="utf-8")) | {"fine_tuning": LORA}
    return _variant(four.parent, content, "adapters", _distributions(DISTRIBUTIONS, "adapter", "adapters/{}"))


def qwen2(folder: Path) -> Path:
    """The study of five distributions over a base of its own, made where it is missing."""
    four = of_base(folder, 240)
    base = four.parent / "models" / "qwen2"
    if not base.exists():
        print(f"training qwen2 ({QWEN2_STEPS} steps)", flush=True)
        _train_qwen2(four.parent, base)
    content = yaml.safe_load(four.read_text(encoding="utf-8")) | {"base": "models/qwen2"}
    return _variant(four.parent, content, "qwen2", _distributions(FIVE, "checkpoint", "models/{}-qwen2"))


def _train_qwen2(world: Path, out: Path) -> None:
    silence_transformers()
    tokenizer = load_tokenizer(world / "models" / "base")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4 * TEXT.window,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    corpora = {name: {"train": _read(world / "data" / f"{name}.train.jsonl")} for name in DISTRIBUTIONS}
    windows = pack(mixture_documents(corpora, TEXT, 0), tokenizer, TEXT.window).windows
    rate, rows = TEXT.base_learning_rate, TEXT.batch_size
    train_model(model, windows, Recipe(steps=QWEN2_STEPS, learning_rate=rate, batch_size=rows, seed=0))
    save_checkpoint(out, model, tokenizer, {})


def _distributions(names: Iterable[str], kind: str, place: str) -> dict[str, Any]:
    files = {"train": "train", "validation": "val", "held_out": "held_out"}
    return {
        name: {kind: place.format(name), **{key: f"data/{name}.{split}.jsonl" for key, split in files.items()}}
        for name in names
    }


def _variant(world: Path, content: dict[str, Any], name: str, distributions: dict[str, Any]) -> Path:
    content.pop("data_mixing", None)
    path = world / f"{name}.yaml"
    study = content | {"name": name, "distributions": distributions}
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def _read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


KINDS: dict[str, Callable[[Path], Path]] = {
    "base-240": lambda folder: of_base(folder, 240),
    "base-960": lambda folder: of_base(folder, 960),
    "base-3840": lambda folder: of_base(folder, 3840),
    "short-vectors": lambda folder: of_base(folder, 960, LOWER_RATE),
    "short-240": lambda folder: of_base(folder, 240, LOWER_RATE),
    "short-3840": lambda folder: of_base(folder, 3840, LOWER_RATE),
    "eight": eight,
    "adapters": adapters,
    "qwen2": qwen2,
}
"""Functions that make the study of a kind in a folder."""


def make(kind: str, folder: Path) -> Path:
    """The study file of a kind, its base and its fine-tunes made where they are missing."""
    path = KINDS[kind](folder)
    Study.load(path, tracker=NullTracker(), compute=InProcessCompute(), progress=Telling()).train()
    return path


def main() -> None:
    """Make studies of the kinds that are named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in arguments.kinds or KINDS:
        print(make(kind, arguments.folder.resolve()), flush=True)


if __name__ == "__main__":
    main()
