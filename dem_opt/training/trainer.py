"""Train a model on windows with transformers' Trainer, resumable to the same bits.

Training minimizes the mean negative log-likelihood over the scored tokens of packed windows, with AdamW and a
cosine schedule unless the recipe says otherwise.  Its *place* is a folder with the Trainer's saved states and a journal
of every step, from which a killed training resumes.

The Trainer takes a second to import, which commands that train nothing don't wait for: what needs it is in
`dem_opt.training.trainer_states`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dem_opt.checkpoints.training_record import Point
from dem_opt.errors import InputError, nearest
from dem_opt.types import Windows

OWNED = {
    "output_dir": "distributions.NAME.checkpoint",
    "max_steps": "fine_tuning.steps",
    "num_train_epochs": "fine_tuning.steps",
    "per_device_train_batch_size": "fine_tuning.batch_size",
    "learning_rate": "fine_tuning.learning_rate",
    "seed": "fine_tuning.seed",
    "data_seed": "fine_tuning.seed",
    "save_strategy": "fine_tuning.save_every",
    "save_steps": "fine_tuning.save_every",
    "save_total_limit": "fine_tuning.keep",
    "save_only_model": "fine_tuning.keep",
    "resume_from_checkpoint": "nothing: a killed training resumes",
    "eval_strategy": "fine_tuning.keep",
    "logging_steps": "nothing: every step is logged",
    "logging_strategy": "nothing: every step is logged",
    "logging_nan_inf_filter": "nothing: a loss that is not finite ends a training",
    "report_to": "tracking",
    "disable_tqdm": "nothing: progress is shown",
    "push_to_hub": "nothing: export and upload yourself",
}
"""Arguments of the Trainer that are set by another field of the study file, or by none."""


class DivergedError(RuntimeError):
    """The training loss is not finite."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        batch_size: Windows in a step, over several forward passes where `trainer` has gradient_accumulation_steps.
        seed: Seed of the order of windows.
        trainer: Any other argument of transformers' TrainingArguments.
        save_every: Steps between saved states.
    """

    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    trainer: Mapping[str, Any] = field(default_factory=dict)
    save_every: int = 10**9

    @property
    def rows(self) -> int:
        """Windows in a forward pass.

        Raises:
            InputError: The batch is no multiple of gradient_accumulation_steps.
        """
        parts = self.trainer.get("gradient_accumulation_steps", 1)
        if not isinstance(parts, int) or parts < 1 or self.batch_size % parts:
            mend = f"must divide fine_tuning.batch_size, the {self.batch_size} windows of a step"
            raise InputError(None, "fine_tuning.trainer.gradient_accumulation_steps", parts, mend)
        return self.batch_size // parts


def check_trainer(arguments: Mapping[str, Any], where: Path | None) -> None:
    """Raise InputError for an argument that the Trainer does not know, or that another field sets."""
    if not arguments:
        return
    from dem_opt.training.trainer_states import argument_names

    known = argument_names()
    for name, value in arguments.items():
        if name not in known:
            mend = f"is no argument of transformers' Trainer; {nearest(name, known - OWNED.keys())}"
            raise InputError(where, f"fine_tuning.trainer.{name}", value, mend)
        if name in OWNED:
            raise InputError(where, f"fine_tuning.trainer.{name}", value, f"is set by {OWNED[name]}")


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
    from dem_opt.training.trainer_states import run

    with TemporaryDirectory() as scratch, _without_cache(model):
        return run(model, windows, recipe, place or Path(scratch), saved, resumable=place is not None)


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Restore the model's setting of the cache of generated tokens, which the Trainer switches off."""
    kept = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = kept


def parameters_of(model: nn.Module) -> tuple[int, int]:
    """Number of a model's parameters, tied ones once, and of those that are trained."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)
