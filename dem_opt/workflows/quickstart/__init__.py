"""Make the quickstart's data, tokenizer and base without any download.

Four distributions: Python *code* and technical *prose* out of the standard library, generated *math*
problems with worked steps, and generated JSON *records*.  Everything is drawn from one seed.  A module of the
standard library, a problem and a record are each in one split only.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dem_opt.progress import NullProgress, Progress
from dem_opt.workflows.quickstart.additions import TASK, service_log, write_task
from dem_opt.workflows.quickstart.generated import json_record, math_problem
from dem_opt.workflows.quickstart.library import library_documents, split_modules, topic_documents, within
from dem_opt.data.packing import pack
from dem_opt.atomic import write_text
from dem_opt.errors import InputError
from dem_opt.json_files import find_json
from dem_opt.manifest import FILES, manifest_of, read_description, refuse_changed
from dem_opt.training.fine_tune import save_checkpoint
from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.training.recipe import Recipe
from dem_opt.training.trainer import train_model

DISTRIBUTIONS = ("code", "math", "prose", "records")
ADDED = "logs"
"""Distribution that is not in the study, to try adding one."""

QUESTIONS = 200
"""Number of documents of the downstream task."""

SPLITS = ("train", "val", "held_out")
RECORD = "assets.json"
END = "<|end|>"


@dataclass(frozen=True)
class Settings:
    """Settings of the assets.  They are stored beside them, and another value makes the assets again.

    Attributes:
        characters: Characters of each distribution in the train, search and held-out split.
        module_shares: Shares of the standard library's modules in these splits.
        mixture: Shares of the distributions in the base's training text: mostly code and prose, so that the vectors of
            math and records have more to give.
    """

    characters: tuple[int, int, int] = (450_000, 60_000, 90_000)
    module_shares: tuple[float, float, float] = (0.7, 0.15, 0.15)
    mixture: tuple[float, float, float, float] = (0.35, 0.05, 0.55, 0.05)
    base_characters: int = 700_000
    vocabulary: int = 1024
    hidden: int = 160
    layers: int = 3
    heads: int = 5
    feed_forward: int = 448
    window: int = 128
    base_steps: int = 240
    base_learning_rate: float = 3e-3
    batch_size: int = 16
    fine_tuning_steps: int = 50
    fine_tuning_learning_rate: float = 1e-3
    windows: int = 16
    held_out_windows: int = 64
    trials: int = 40


QUICKSTART = Settings()

Corpora = dict[str, dict[str, list[str]]]
"""Documents by distribution and split."""


def make_assets(
    folder: Path,
    seed: int = 0,
    progress: Progress | None = None,
    settings: Settings = QUICKSTART,
) -> Path:
    """Make data, tokenizer, base and study file in `folder` unless they are there; return the study file's path.

    Finished assets of the same seed and settings are left
    alone, an edited study file too; others, and half-finished ones, are made again, unless a file was edited.

    Raises InputError for a folder that can't be written or that holds other things, and for an edited file that
    would be written again.
    """
    progress = progress or NullProgress()
    study = folder / "study.yaml"
    record = {"seed": seed, "settings": asdict(settings), "python": sys.version}
    if _is_finished(folder, record):
        progress.note("data, tokenizer and base are already here")
        return study
    _claim(folder)
    progress.note("writing data from the standard library and from generators")
    corpora = make_corpora(settings, seed)
    write_corpora(folder / "data", corpora)
    write_corpora(folder / "data", {ADDED: added_corpus(settings, seed)})
    write_task(folder / "tasks", corpora["math"]["held_out"][:QUESTIONS], END)
    progress.note(f"training the base on a mixture ({settings.base_steps} steps)")
    make_base(folder / "models" / "base", corpora, settings, seed)
    study.write_text(study_text(settings, seed), encoding="utf-8")
    parts = [study, folder / "data", folder / "tasks", folder / "models" / "base"]
    text = json.dumps(record | {FILES: manifest_of(folder, parts)}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
    return study


def make_corpora(settings: Settings, seed: int) -> Corpora:
    """Documents of each distribution in each split; no text stands in two splits."""
    modules = split_modules(settings.module_shares, random.Random(f"{seed} modules"))
    code: dict[str, list[str]] = {}
    prose: dict[str, list[str]] = {}
    for split, names, characters in zip(SPLITS, modules, settings.characters, strict=True):
        from_library = characters // 2 if split == "train" else characters
        code[split], prose[split] = library_documents(names, characters, from_library)
    rng = random.Random(f"{seed} topics")
    prose["train"] = shuffled(prose["train"] + topic_documents(), rng, settings.characters[0])
    math = generated_documents(math_problem, settings.characters, random.Random(f"{seed} math"))
    records = generated_documents(json_record, settings.characters, random.Random(f"{seed} records"))
    return {
        "code": without_repeats(code),
        "math": math,
        "prose": without_repeats(prose),
        "records": records,
    }


def added_corpus(settings: Settings, seed: int) -> dict[str, list[str]]:
    """A distribution that neither tokenizer nor base has seen, to be added to a study that has been run."""
    return generated_documents(service_log, settings.characters, random.Random(f"{seed} {ADDED}"))


def shuffled(documents: list[str], rng: random.Random, characters: int) -> list[str]:
    """Documents in an order drawn from `rng`, up to so many characters."""
    return within(rng.sample(documents, len(documents)), characters)


def without_repeats(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """The splits, each text kept only where it stands first."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for split, documents in splits.items():
        kept[split] = [text for text in dict.fromkeys(documents) if text not in seen]
        seen.update(documents)
    return kept


def generated_documents(
    make: Callable[[random.Random], str], characters: tuple[int, int, int], rng: random.Random
) -> dict[str, list[str]]:
    """Documents of a generator for each split, all of them different."""
    seen: set[str] = set()
    splits: dict[str, list[str]] = {}
    for split, wanted in zip(SPLITS, characters, strict=True):
        splits[split] = []
        while wanted > 0:
            document = make(rng)
            if document not in seen:
                seen.add(document)
                splits[split].append(document)
                wanted -= len(document)
    return splits


def write_corpora(folder: Path, corpora: Corpora) -> None:
    """Write `<distribution>.<split>.jsonl`, one document a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, splits in corpora.items():
        for split, documents in splits.items():
            lines = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents]
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer(corpora: Corpora, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training texts: it writes any text, and its EOS is END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for splits in corpora.values() for text in splits["train"]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)  # type: ignore[no-untyped-call]


def make_base(out: Path, corpora: Corpora, settings: Settings, seed: int) -> None:
    """Train tokenizer and base on the mixture of the training texts and save both (float32)."""
    silence_transformers()
    tokenizer = make_tokenizer(corpora, settings.vocabulary)
    model = untrained_base(settings, len(tokenizer), tokenizer.eos_token_id, seed)
    windows = pack(mixture_documents(corpora, settings, seed), tokenizer, settings.window).windows
    recipe = Recipe(steps=settings.base_steps, learning_rate=settings.base_learning_rate, batch_size=settings.batch_size, seed=seed)
    train_model(model, windows, recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, model, tokenizer, {})


def untrained_base(settings: Settings, vocabulary: int, end: int, seed: int) -> LlamaForCausalLM:
    """A Llama of the settings' size with random float32 weights; `end` is the id of END."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.feed_forward,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=4 * settings.window,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
        )
    )


def mixture_documents(corpora: Corpora, settings: Settings, seed: int) -> list[str]:
    """The base's training documents, of each distribution its share of characters, shuffled."""
    documents: list[str] = []
    for name, share in zip(DISTRIBUTIONS, settings.mixture, strict=True):
        documents += within(corpora[name]["train"], round(share * settings.base_characters))
    random.Random(f"{seed} mixture").shuffle(documents)
    return documents


STUDY = """\
# Four distributions, a base that knows some of them better than others, a fine-tuned checkpoint for each:
# which coefficients give the best composite?  Relative paths start at this file.
name: quickstart
base: models/base
distributions:
{distributions}
evaluation: {{window: {window}, windows: {windows}, held_out: {held_out}, seed: {seed}}}
search: {{algorithm: simplex-gp, trials: {trials}, seed: {seed}}}
compute: {{workers: {workers}}}  # models this small are scored faster by two workers than by one with two threads
# The same for every distribution; `dem-opt train` makes the checkpoints that are missing.
fine_tuning: {{steps: {steps}, learning_rate: {learning_rate}, batch_size: {batch_size}, seed: {seed}}}
# For `dem-opt evaluate`, which needs lm-evaluation-harness: how often the answer of a worked problem is exact.
evaluate: {{tasks: [{task}], include: tasks}}
"""

DISTRIBUTION = """\
  {name}:
    checkpoint: models/{name}
    train: data/{name}.train.jsonl
    validation: data/{name}.val.jsonl     # the search split: the winner is chosen by this alone
    held_out: data/{name}.held_out.jsonl  # only reported on"""


def study_text(settings: Settings, seed: int) -> str:
    """The study file, commented, with paths that start at its folder."""
    return STUDY.format(
        distributions="\n".join(DISTRIBUTION.format(name=name) for name in DISTRIBUTIONS),
        window=settings.window,
        windows=settings.windows,
        held_out=settings.held_out_windows,
        trials=settings.trials,
        workers="auto" if torch.cuda.is_available() else min(2, os.cpu_count() or 1),
        seed=seed,
        task=TASK,
        steps=settings.fine_tuning_steps,
        learning_rate=f"{settings.fine_tuning_learning_rate:.1e}",
        batch_size=settings.batch_size,
    )


def _is_finished(folder: Path, record: dict[str, object]) -> bool:
    """The folder's assets were finished with the same seed, settings and Python."""
    written = read_description(folder / RECORD)
    data = [folder / "data" / f"{name}.{split}.jsonl" for name in (*DISTRIBUTIONS, ADDED) for split in SPLITS]
    data.append(folder / "tasks" / f"{TASK}.yaml")
    files = [folder / "study.yaml", folder / "models" / "base" / "model.safetensors", *data]
    same = {key: value for key, value in written.items() if key != FILES} == json.loads(json.dumps(record))
    return same and all(file.is_file() for file in files)


def _claim(folder: Path) -> None:
    """Make the folder, or take one that is empty or this module's own, and mark it as unfinished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = find_json(folder / RECORD, dict[str, Any])
        if any(folder.iterdir()) and written is None:
            raise InputError(folder, None, None, "holds other things; name an empty folder or a new one")
        if written and not isinstance(written.get(FILES), dict):
            mend = "was made by another release, which did not list its files; name an empty folder or a new one"
            raise InputError(folder, None, None, mend)
        refuse_changed(folder, RECORD)
        write_text(folder / RECORD, "{}\n")
    except OSError as error:
        raise InputError(folder, None, None, f"can't be written ({error.strerror})") from None
