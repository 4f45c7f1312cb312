"""Train a model on windows with transformers' Trainer, resumable to the same bits.

Training minimizes the mean negative log-likelihood over the scored tokens of packed windows, with AdamW and a
cosine schedule unless the recipe says otherwise.  Its *place* is a folder with the Trainer's saved states and a journal
of every step, from which a killed training resumes.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dem_opt.atomic import write_text
from dem_opt.checkpoints.training_record import JOURNAL, Point, read_journal
from dem_opt.errors import InputError
from dem_opt.json_files import find_json
from dem_opt.training.recipe import DivergedError, Recipe
from dem_opt.types import Windows

WARMUP = 0.1
"""Share of the steps in which the learning rate rises from 0, before it falls to 0 along a cosine."""

STATES = 2
"""Saved states to keep: the last complete one, and the one being written."""

_DONE = "whole"
"""File that marks a saved state as complete: a JSON object of its files; empty where an earlier release wrote it."""


def train_model(
    model: PreTrainedModel | nn.Module,
    windows: Windows,
    recipe: Recipe,
    place: Path | None = None,
    saved: Callable[[int], float | None] | None = None,
) -> list[Point]:
    """Train the model in place and return the journal.

    The windows are repeated in an order drawn from the seed, as often as the steps need; incomplete batches are
    dropped.

    Args:
        place: Folder to resume from, at its last complete state: to the same bits on the same device with as many
            threads.  Nothing is kept without one.
        saved: Called after a state is saved, with its step; may return a validation NLL for the journal.

    Raises:
        DivergedError: A loss is not finite; names the step.
        InputError: The Trainer refuses an argument.
    """
    with TemporaryDirectory() as scratch, _without_cache(model):
        journal = _Journal(Path(scratch) if place is None else place, saved)
        arguments = _arguments(journal.folder, recipe, place is not None)
        trainer = Trainer(model, arguments, train_dataset=_Examples(windows), callbacks=[journal])
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=journal.rewind())
        return read_journal(journal.folder / JOURNAL)


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Restore the model's setting of the cache of generated tokens, which the Trainer switches off."""
    kept = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = kept


def _arguments(folder: Path, recipe: Recipe, saves: bool) -> TrainingArguments:
    """The Trainer's arguments: it logs every step to its callbacks alone, and writes only to the folder."""
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(WARMUP * recipe.steps),
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # The Trainer refuses bf16 on a CPU that it was not told to use.
        **({"use_cpu": True} if recipe.trainer.get("bf16") and not torch.accelerator.is_available() else {}),
        **recipe.trainer,
    }
    owned: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.rows,
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if saves else "no",
        "save_steps": recipe.save_every,
        "save_total_limit": STATES,
        "report_to": "none",
        "disable_tqdm": True,
    }
    try:
        return TrainingArguments(**(defaults | owned))
    except (TypeError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        mend = f"the Trainer refuses it ({reason})"
        raise InputError(None, "fine_tuning.trainer", dict(recipe.trainer), mend) from None


class _Examples(Dataset[dict[str, torch.Tensor]]):
    """Packed windows as the Trainer takes them: labels are the scored tokens, -100 (ignored) elsewhere."""

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


@final
class _Journal(TrainerCallback):
    """Record every step, mark saved states as complete, and stop at the first loss that is not finite."""

    def __init__(self, folder: Path, saved: Callable[[int], float | None] | None) -> None:
        self.folder, self._saved = folder, saved
        self._before, self._began = 0.0, time.perf_counter()

    def rewind(self) -> str | None:
        """Discard everything after the last complete state, and return its folder, or None."""
        states = {int(path.name.rpartition("-")[2]): path for path in self.folder.glob("checkpoint-*")}
        whole = [step for step, path in states.items() if _is_whole(path)]
        last = max(whole, default=0)
        for step, path in states.items():
            if step != last:
                shutil.rmtree(path)
        kept = [point for point in read_journal(self.folder / JOURNAL) if point.step <= last]
        self._write("w", *kept)
        self._before, self._began = (kept[-1].seconds if kept else 0.0), time.perf_counter()
        return str(states[last]) if last else None

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
            raise DivergedError(f"{reason} (now {args.learning_rate:g})")
        self._write("a", Point(state.global_step, self._seconds(), logs["loss"], logs.get("learning_rate")))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        validation = self._saved(state.global_step) if self._saved else None
        if validation is not None:
            self._write("a", Point(state.global_step, self._seconds(), validation=validation))
        folder = self.folder / f"checkpoint-{state.global_step}"
        write_text(folder / _DONE, json.dumps(_inventory(folder)))

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def _write(self, mode: str, *points: Point) -> None:
        with (self.folder / JOURNAL).open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(point.as_written()) + "\n" for point in points)


def _inventory(state: Path) -> dict[str, int | str]:
    """SHA-256 of a state's JSON files and sizes of the others, which are too large to be read again at every save."""
    files = sorted(path for path in state.rglob("*") if path.is_file() and path != state / _DONE)
    return {
        str(path.relative_to(state)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".json" else path.stat().st_size
        )
        for path in files
    }


def _is_whole(state: Path) -> bool:
    """A saved state is complete, and its files are as they were written."""
    if (state / _DONE).is_file() and not (state / _DONE).stat().st_size:
        return True
    return find_json(state / _DONE, dict[str, int | str]) == _inventory(state)
