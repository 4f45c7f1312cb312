"""The settings of a training: a recipe, and what the study file may say of the Trainer's arguments.

Apart from `dem_opt.training.trainer`, which takes a second to import: commands that train nothing don't wait for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dem_opt.errors import InputError, nearest

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
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments) if field.init}
    for name, value in arguments.items():
        if name not in known:
            mend = f"is no argument of transformers' Trainer; {nearest(name, known - OWNED.keys())}"
            raise InputError(where, f"fine_tuning.trainer.{name}", value, mend)
        if name in OWNED:
            raise InputError(where, f"fine_tuning.trainer.{name}", value, f"is set by {OWNED[name]}")
