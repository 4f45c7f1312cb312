"""Fine-tune the base on the data of one distribution, or on a mixture of several.

A checkpoint folder appears under its own name only when it is complete, with a record of its base, data and settings
beside the weights.  Until then a hidden folder beside it has the state from which a killed fine-tuning resumes.
"""

import copy
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dem_opt.atomic import last_write, link_or_copy, publish_folder, staged_folder
from dem_opt.checkpoints.architecture import load_model
from dem_opt.checkpoints.training_record import JOURNAL, RECORD, STEPS, read_record
from dem_opt.config import CHAT_DATE, DataFile
from dem_opt.data.documents import holds_chats, read_documents
from dem_opt.data.files import find_files
from dem_opt.data.mixtures import Mixture, Part, blend
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import load_tokenizer, without_pad_beyond
from dem_opt.data.windows import refuse_ids_beyond
from dem_opt.errors import InputError, located, shorten
from dem_opt.evaluation.nll import document_layout, prepare, score
from dem_opt.json_files import parse_json
from dem_opt.manifest import FILES, manifest_of, refuse_foreign
from dem_opt.training.lora import add_lora, initial_factors, merged, parameters_of, subtract_initial_factors
from dem_opt.training.recipe import DivergedError, Recipe
from dem_opt.types import Corpus, Windows

HOLDER = "holder"
"""File in the place of a job that names the process which works on it."""

PATIENCE = 900.0
"""Seconds to wait for another process that works on the same job and writes nothing, because it is suspended, say."""

POLL = 1.0
"""Seconds between two attempts to lock a job's place."""


@dataclass(frozen=True, kw_only=True)
class FineTuneJob:
    """One fine-tuning, as it is sent to a worker.

    The names of `window` to `lora` are stored in the record of a checkpoint and hashed.

    Attributes:
        base: Folder in Hugging Face's format.
        train: Data file, or a mixture of several.
        out: Folder to write.
        window: Tokens in a window.
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        batch_size: Windows in a step.
        seed: Seed of the order of windows, and of a LoRA's first weights.
        trainer: Any other argument of the Trainer.
        lora: Arguments of peft's LoraConfig, to train an adapter; None trains the base's own weights.
        merged: Write the adapter into a full checkpoint.
        save_every: Steps between saved states.
        validation: Keep the weights of saved states, with their NLL on these windows.
        dtype: Dtype of the weights in training; "auto" is the base's, "mixed" float32 with matrix products in bfloat16.
        gpus: GPUs to divide the model's layers over.
        today: Date that a chat template may write.
    """

    name: str
    base: Path
    train: DataFile | Mixture
    out: Path
    window: int
    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    trainer: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    merged: bool = False
    save_every: int = 10**9
    validation: Corpus | None = None
    dtype: str = "auto"
    gpus: int = 1
    today: date = CHAT_DATE

    @property
    def recipe(self) -> Recipe:
        """Settings of the training."""
        return Recipe(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=self.seed,
            trainer={**({"bf16": True} if self.dtype == "mixed" else {}), **self.trainer},
            save_every=self.save_every,
        )

    @property
    def place(self) -> Path:
        """The folder of its state until it is complete."""
        return self.out.with_name(f".{self.out.name}.training")

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, with padding."""
        return self.steps * self.batch_size * self.window

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its data files with their shares."""
        return self.train.parts if isinstance(self.train, Mixture) else (Part(self.name, self.train, 1.0),)


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """Result of a fine-tuning, stored in its record under these names.

    Attributes:
        path: Folder of the checkpoint.
        steps: Optimizer steps.
        tokens: Tokens that went through the model, with padding.
        seconds: Training time, including the time before a kill.
        first_loss: Of the first batch, in nats per scored token.
        last_loss: Of the last batch, in nats per scored token.
        parameters: Number of the base's parameters; 0 in older records.
        trained: Number of parameters that had gradients, an adapter's own where one was trained; 0 in older records.
    """

    path: Path
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    parameters: int = 0
    trained: int = 0


def fine_tune(job: FineTuneJob) -> FineTuned:
    """Fine-tune the base on the job's data and write the checkpoint.

    The same job gives the same bits with the same number of threads, also where it was killed and resumed.  An earlier
    checkpoint of `dem-opt train` at `job.out` is replaced where nothing was added to it or changed.

    Raises:
        InputError: The data are unreadable or too small for one batch, or `out` has files that `dem-opt train` did not
            write.
        TimeoutError: Another process works on the same checkpoint, and writes nothing.
        DivergedError: The loss is not finite.
    """
    _check_out(job)
    made_from = _made_from(job)
    with _alone(job.place):
        if is_finished(job) and (result := result_of(job.out)):
            shutil.rmtree(job.place)
            return result
        _claim(job.place, made_from)
        try:
            return _train(job, made_from)
        except (DivergedError, InputError):
            shutil.rmtree(job.place)
            raise


def _train(job: FineTuneJob, made_from: dict[str, Any]) -> FineTuned:
    """Train from the state in the job's place, and write the checkpoint."""
    from dem_opt.training.trainer import train_model  # takes a second, for which only a training waits

    tokenizer = load_tokenizer(job.base)
    if AutoConfig.from_pretrained(job.base, local_files_only=True, trust_remote_code=False).is_encoder_decoder:
        raise InputError(job.base, "base", None, "is an encoder-decoder, which can't be trained here: name checkpoints")
    model = _load(job)
    rows = len(model.get_input_embeddings().weight)  # peft's wrappers of an embedding have no `num_embeddings`
    windows = _windows(job, without_pad_beyond(load_tokenizer(job.base), rows))
    refuse_ids_beyond(windows, rows, job.base, job.name)
    parameters, trained = parameters_of(model)
    parameters -= 0 if job.lora is None else trained
    initial = {} if job.lora is None else initial_factors(model)
    keeper = None if job.validation is None else _Keeper(job, model, tokenizer, job.validation, initial)
    points = train_model(model, windows, job.recipe, job.place, keeper)
    losses = [point.loss for point in points if point.loss is not None]
    result = FineTuned(
        path=job.out,
        steps=job.steps,
        tokens=job.tokens,
        seconds=points[-1].seconds,
        first_loss=losses[0],
        last_loss=losses[-1],
        parameters=parameters,
        trained=trained,
    )
    record = {"made_from": made_from, "result": asdict(result) | {"path": job.out.name}}
    _write(job, model, tokenizer, record, initial)
    return result


def is_finished(job: FineTuneJob) -> bool:
    """The job's folder has a checkpoint made from the same base, data and settings.

    Raises:
        InputError: The base or the data file is missing.
    """
    record = read_record(job.out)
    return record is not None and record.get("made_from") == json.loads(json.dumps(_made_from(job)))


def job_identity(job: FineTuneJob) -> str:
    """Hash of the base, data and settings of a job.

    Raises:
        InputError: The base or the data file is missing.
    """
    return hashlib.sha256(json.dumps(_made_from(job)).encode()).hexdigest()


def is_wanted(job: FineTuneJob) -> bool:
    """The job's folder is missing, or was made by `dem-opt train` from other data or settings."""
    return not job.out.exists() or ((job.out / RECORD).exists() and not is_finished(job))


def result_of(folder: Path) -> FineTuned | None:
    """The result of the fine-tuning that made a folder, or kept it as a step; None for folders of other origin."""
    result = (read_record(folder) or read_record(folder.parent.parent) or {}).get("result")
    try:
        return replace(parse_json(json.dumps(result), FineTuned), path=folder)
    except ValueError:
        return None


def save_checkpoint(
    out: Path,
    model: Any,
    tokenizer: Any,
    records: dict[str, Any],
    working: Path | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model (safetensors), tokenizer and JSON records by file name to a folder, whole or not at all.

    The journal and the kept steps in `working` come along.  A record gets the manifest of all that.  The `initial`
    factors of an adapter, which peft took off the base's weights, are subtracted from it.
    """
    with staged_folder(out) as partial:
        model.save_pretrained(partial)
        subtract_initial_factors(partial, initial or {})
        tokenizer.save_pretrained(partial)
        if working is not None:
            shutil.copy(working / JOURNAL, partial)
            if (working / STEPS).exists():
                shutil.copytree(working / STEPS, partial / STEPS, copy_function=link_or_copy)
        for name, record in records.items():
            text = json.dumps(record | {FILES: manifest_of(partial)}, indent=2)
            (partial / name).write_text(text + "\n", encoding="utf-8")
        publish_folder(partial, out)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(path.name.encode() + _file_digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=1000)
def _file_digest(path: Path, *stamp: int) -> bytes:
    """SHA-256 of a file, cached as long as inode, size and time of change are the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class _Keeper:
    """Keep the weights of each saved state, and measure their validation NLL."""

    def __init__(
        self,
        job: FineTuneJob,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        initial: Mapping[str, Tensor],
    ) -> None:
        self._job, self._model, self._tokenizer, self._corpus, self._initial = job, model, tokenizer, corpus, initial
        self._use_cache = model.config.use_cache

    def __call__(self, step: int) -> float:
        """The NLL of the step's weights in nats per token."""
        folder = self._job.place / STEPS / str(step)
        folder.parent.mkdir(exist_ok=True)
        kept, self._model.config.use_cache = self._model.config.use_cache, self._use_cache
        save_checkpoint(folder, _in_base_dtype(self._model, self._job), self._tokenizer, {}, initial=self._initial)
        self._model.config.use_cache = kept
        return _nll(getattr(self._model, "get_base_model", lambda: self._model)(), self._corpus.windows)


def _nll(model: PreTrainedModel, windows: Windows) -> float:
    """NLL of a model in training, whose mode and random state stay as they are."""
    training = model.training
    model.train(False)
    with torch.random.fork_rng():
        measured, _ = score(model, prepare(windows, model.device), 4096, document_layout(model))
    model.train(training)
    return measured.nll


def _windows(job: FineTuneJob, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The job's training windows; of a mixture exactly as many as its steps need."""
    packed = {}
    for part in job.parts:
        if isinstance(part.data, Corpus):
            packed[part.name] = part.data.windows
            continue
        with located(str(part.data)):
            windows = pack(read_documents(part.data, "train"), tokenizer, job.window, today=job.today).windows
        least = 1 if isinstance(job.train, Mixture) else job.batch_size
        if len(windows) < least and part.share:
            mend = f"makes {len(windows)} windows of {job.window} tokens: give more text or a smaller batch"
            raise InputError(str(part.data), "fine_tuning.batch_size", job.batch_size, mend)
        packed[part.name] = windows
    if isinstance(job.train, Mixture):
        return blend(job.train, packed, job.steps * job.batch_size, job.seed)
    return packed[job.name]


def _load(job: FineTuneJob) -> Any:
    """Load the model to train."""
    spread = {"device_map": "auto"} if job.gpus > 1 and torch.cuda.device_count() > 1 else {}
    model: Any = load_model(job.base, "float32" if job.dtype == "mixed" else job.dtype, **spread)
    return model if job.lora is None else add_lora(model, job.lora, job.seed)


def _write(
    job: FineTuneJob,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    initial: Mapping[str, Tensor],
) -> None:
    """Write the finished checkpoint, and remove the job's place."""
    is_merged = job.merged and job.lora is not None
    stored = _in_base_dtype(merged(model) if is_merged else model, job)
    save_checkpoint(job.out, stored, tokenizer, {RECORD: record}, job.place, {} if is_merged else initial)
    shutil.rmtree(job.place)


def _in_base_dtype(model: Any, job: FineTuneJob) -> Any:
    """The model in the base's dtype: a copy where it was trained in another.  Adapters are saved as they are."""
    if job.dtype == "auto" or (job.lora is not None and not job.merged):
        return model
    base = AutoConfig.from_pretrained(job.base, local_files_only=True, trust_remote_code=False).dtype or torch.float32
    return model if base == model.dtype else copy.deepcopy(model).to(base)


def _made_from(job: FineTuneJob) -> dict[str, Any]:
    """Everything that decides the bits of a checkpoint: the base's files, the data's bytes and format, the settings.

    Keys and their order are stored and hashed.  A chat template is part of the base where the data are conversations.
    Settings at their default have no entry, so that records of earlier releases stay valid.
    """
    files = [part.data for part in job.parts if isinstance(part.data, DataFile)]
    windows = [part.data.key for part in job.parts if isinstance(part.data, Corpus)]
    if not (job.base / "config.json").is_file():
        raise InputError(job.base / "config.json", "base", None, "no such file")
    has_chats = any(holds_chats(file, "train") for file in files)
    kinds = {".safetensors", ".json"} | ({".jinja"} if has_chats else set())
    base = sorted(path for path in job.base.glob("*") if path.suffix in kinds)
    sources = [source for file in files for source in find_files(file, "train")]
    settings = asdict(job)
    chosen = ("window", "steps", "learning_rate", "batch_size", "seed")
    made_from = {
        "base": hash_files(base),
        "train": hash_files(path for source in sources for path in source.contents()),
        "settings": {name: settings[name] for name in chosen},
        **{name: dict(arguments) for name in ("trainer", "lora") if (arguments := getattr(job, name))},
        **({"adapter": "merged" if job.merged else "apart"} if job.lora is not None else {}),
        **({"dtype": job.dtype} if job.dtype != "auto" else {}),
        **({"today": job.today.isoformat()} if has_chats and job.today != CHAT_DATE else {}),
        **({"keep": [job.save_every, job.validation.key]} if job.validation is not None else {}),
        **({"windows": windows} if windows else {}),
        **({"mixture": [[part.name, part.share] for part in job.parts]} if isinstance(job.train, Mixture) else {}),
    }
    formats = [{file.format: file.columns | file.named_tools} for file in files if file.columns != {"text": "text"}]
    if not formats:
        return made_from
    return {**made_from, "format": formats if isinstance(job.train, Mixture) else formats[0]}


def holder_of(job: FineTuneJob) -> str | None:
    """The process that works on a job now, in words; None where there is none."""
    if not job.place.is_dir():
        return None
    lock = _try_lock(job.place)
    if lock is None:
        return _named_holder(job.place)
    os.close(lock)
    return None


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Make the folder to work in, and lock it against other processes.

    A worker may outlive the command that was killed; the lock ends with the worker's process.

    Raises:
        TimeoutError: Another process has the lock, and has written nothing for `PATIENCE` seconds.
    """
    lock, written, since = None, -1, time.monotonic()
    while lock is None:
        place.mkdir(exist_ok=True)
        lock = _try_lock(place)
        if lock is not None:
            break
        if (latest := last_write(place)) != written:
            written, since = latest, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            reason = f"{_named_holder(place)} works on it and has written nothing for {PATIENCE:.0f} s"
            raise TimeoutError(f"{reason}: continue that process (kill -CONT), or end it, then train again")
        time.sleep(POLL)
    try:
        (place / HOLDER).write_text(f"process {os.getpid()} on {gethostname()}", encoding="utf-8")
        yield
    finally:
        os.close(lock)


def _try_lock(place: Path) -> int | None:
    """Lock a folder, unless another process has; the lock ends when it is closed."""
    lock = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        pass  # some network file systems lock no folders
    # The former holder may have removed the folder meanwhile: then the lock is of a dead inode.
    if place.exists() and os.path.samestat(os.fstat(lock), place.stat()):
        return lock
    os.close(lock)
    return None


def _named_holder(place: Path) -> str:
    try:
        return shorten((place / HOLDER).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "another process"


def _claim(place: Path, made_from: dict[str, Any]) -> None:
    """Empty the folder unless its state is of the same job."""
    record, written = place / RECORD, json.dumps(made_from)
    if record.is_file() and record.read_bytes() == written.encode():
        return
    for path in place.iterdir():
        if path.name == HOLDER:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    record.write_text(written, encoding="utf-8")


def _check_out(job: FineTuneJob) -> None:
    """Raise InputError where `out` can't be written, or holds anything that `dem-opt train` did not write."""
    out = job.out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(out.parent, "checkpoint", None, f"can't be made ({error.strerror})") from None
    if not os.access(out.parent, os.W_OK):
        raise InputError(out.parent, "checkpoint", None, "can't be written: change its permissions or name another")
    if out.exists() and read_record(out) is None:
        raise InputError(out, "checkpoint", None, "exists and was not made by `dem-opt train`: move it away")
    if out.exists() and not is_finished(job):
        if FILES not in (read_record(out) or {}):
            mend = "has other settings, and no list of its files, as of earlier releases: move it away to train anew"
            raise InputError(out, "checkpoint", None, mend)
        refuse_foreign(out, RECORD, "checkpoint")
