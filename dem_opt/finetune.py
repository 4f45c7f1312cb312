"""base + data -> one fine-tuned checkpoint per distribution (or one for a mixture).

A fine-tuning minimizes the mean negative log-likelihood over the scored tokens of packed windows, with AdamW
and a cosine schedule, by transformers' Trainer.  A checkpoint folder appears under its own name only when it
is complete, with a record of what it was made from beside the weights.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dem_opt.config import DataFile, StudyConfig
from dem_opt.corpus import pack
from dem_opt.documents import read_documents
from dem_opt.errors import InputError, located
from dem_opt.hub import locate
from dem_opt.records import Windows
from dem_opt.tokens import load_tokenizer

RECORD = "fine_tuning.json"
"""The file of a checkpoint folder that says what it was made from."""

WARMUP = 0.1
"""Share of the steps in which the learning rate rises from 0; then it falls to 0 along a cosine."""


@dataclass(frozen=True)
class FineTuneJob:
    """One fine-tuning: picklable, and importable with `fine_tune` by a worker.

    `base` is a Hugging Face folder, `train` a data file, `out` the folder to be written.  `window` counts
    tokens, `batch_size` windows in a step; `seed` orders the windows.
    """

    name: str
    base: Path
    train: DataFile
    out: Path
    window: int
    steps: int
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning gave.

    Losses are nats per scored token of the first and last batch; `tokens` are all those that went through the
    model, padding included.
    """

    path: Path
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float


def fine_tune(job: FineTuneJob) -> FineTuned:
    """Fine-tune the base on the job's data and write the checkpoint, in the thread count the process has.

    Same job, same number of threads, same bits.  An earlier checkpoint of `dem-opt train` at `job.out` is
    replaced.

    Raises InputError for data that is unreadable or too small for one batch, and for an `out` that somebody
    else made; RuntimeError when the loss is not finite.
    """
    started = time.perf_counter()
    _check_out(job.out)
    made_from, tokenizer = _made_from(job), load_tokenizer(job.base)
    if AutoConfig.from_pretrained(job.base, local_files_only=True).is_encoder_decoder:
        raise InputError(job.base, "base", None, "is an encoder-decoder, which can't be trained here: name checkpoints")
    with located(job.train.path):
        windows = pack(read_documents(job.train, "train"), tokenizer, job.window)
    if len(windows) < job.batch_size:
        mend = f"makes {len(windows)} windows of {job.window} tokens: give more text or a smaller batch"
        raise InputError(job.train.path, "fine_tuning.batch_size", job.batch_size, mend)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype="auto", local_files_only=True)
    losses = train_model(model, windows, job.steps, job.learning_rate, job.batch_size, job.seed)
    tokens = job.steps * job.batch_size * job.window
    made = FineTuned(job.out, job.steps, tokens, time.perf_counter() - started, losses[0], losses[-1])
    record = {"made_from": made_from, "result": asdict(made) | {"path": job.out.name}}
    save_checkpoint(job.out, model, tokenizer, {RECORD: record})
    return made


def is_finished(job: FineTuneJob) -> bool:
    """Whether the job's folder holds a checkpoint made from the same base, data and settings.

    Raises InputError when the base or the data file is missing.
    """
    record = _read_record(job.out)
    return record is not None and record.get("made_from") == _made_from(job)


def jobs_of(config: StudyConfig) -> list[FineTuneJob]:
    """A job for each distribution that has training data."""
    settings, window = config.fine_tuning, config.evaluation.window
    base = locate(config.base, "base")
    return [
        FineTuneJob(name, base, one.train, one.checkpoint.path, window, **settings.model_dump())
        for name, one in config.distributions.items()
        if one.train is not None and one.checkpoint is not None and one.checkpoint.path is not None
    ]


def is_wanted(job: FineTuneJob) -> bool:
    """Whether the job's folder is missing, or was made by `train` from other data or settings."""
    return not job.out.exists() or ((job.out / RECORD).exists() and not is_finished(job))


def train_model(
    model: PreTrainedModel, windows: Windows, steps: int, learning_rate: float, batch_size: int, seed: int
) -> list[float]:
    """Train the model in place and return the loss of each step, in nats per scored token.

    The windows go round in an order drawn from the seed, as often as the steps need; incomplete batches are
    dropped.  Raises RuntimeError, naming the step, when a loss is not finite.
    """
    losses = _Losses()
    kept, model.config.use_cache = model.config.use_cache, False
    with TemporaryDirectory() as scratch:
        arguments = _arguments(scratch, steps, learning_rate, batch_size, seed)
        trainer = Trainer(model, arguments, train_dataset=_Examples(windows), callbacks=[losses])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.config.use_cache = kept
    return losses.nats


def _arguments(scratch: str, steps: int, learning_rate: float, batch_size: int, seed: int) -> TrainingArguments:
    """The Trainer's settings: it logs every step to its callbacks alone, and writes only to `scratch`."""
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP * steps),
        seed=seed,
        data_seed=seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def save_checkpoint(out: Path, model: Any, tokenizer: Any, records: dict[str, Any]) -> None:
    """Write model (safetensors), tokenizer and JSON records by file name to a folder, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, record in records.items():
        (partial / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class _Examples(Dataset[dict[str, torch.Tensor]]):
    """Packed windows as the Trainer wants them: labels are the scored tokens, -100 elsewhere."""

    def __init__(self, windows: Windows) -> None:
        self.ids_WT = torch.from_numpy(windows.ids_WT)
        self.positions_WT = torch.from_numpy(windows.positions_WT)
        self.labels_WT = self.ids_WT.masked_fill(~torch.from_numpy(windows.scored_WT), -100)

    def __len__(self) -> int:
        return len(self.ids_WT)

    def __getitem__(self, w: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids_WT[w],
            "position_ids": self.positions_WT[w],
            "labels": self.labels_WT[w],
        }


class _Losses(TrainerCallback):
    """Collects the loss of each step and stops at the first that is not finite."""

    def __init__(self) -> None:
        self.nats: list[float] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            reason = f"training loss is {logs['loss']} at step {state.global_step}: lower learning_rate"
            raise RuntimeError(f"{reason} (now {args.learning_rate:g})")
        self.nats.append(logs["loss"])


def _made_from(job: FineTuneJob) -> dict[str, Any]:
    """What decides the bits of a checkpoint: the base's files, the data's bytes and format, and the settings.

    A chat template is part of the base where the data are conversations.  Texts in a column of that name have
    no entry for their format.
    """
    kinds = {".safetensors", ".json"} | ({".jinja"} if job.train.format == "messages" else set())
    base = sorted(path for path in job.base.glob("*") if path.suffix in kinds)
    for path, field in ((job.base / "config.json", "base"), (job.train.path, "train")):
        if not path.is_file():
            raise InputError(path, field, None, "no such file")
    settings = asdict(job)
    chosen = ("window", "steps", "learning_rate", "batch_size", "seed")
    made_from = {
        "base": hash_files(base),
        "train": hash_files([job.train.path]),
        "settings": {name: settings[name] for name in chosen},
    }
    plain = job.train.columns == {"text": "text"}
    return made_from if plain else {**made_from, "format": {job.train.format: job.train.columns}}


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint folder, or None where there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _check_out(out: Path) -> None:
    """Raise InputError where `out` can't be written, or holds what no fine-tuning of this project wrote."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(out.parent, "checkpoint", None, f"can't be made ({error.strerror})") from None
    if not os.access(out.parent, os.W_OK):
        raise InputError(out.parent, "checkpoint", None, "can't be written: change its permissions or name another")
    if out.exists() and _read_record(out) is None:
        raise InputError(out, "checkpoint", None, "exists and was not made by `dem-opt train`: move it away")
