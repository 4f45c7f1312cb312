"""LoRA through peft, an optional package: a base with trainable low-rank factors, and these merged into it."""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from dem_opt.errors import InputError, nearest

DEFAULTS: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
"""Rank and scale of the factors, and the layers that get some; the study file's arguments come before these."""

OWNED = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path")


def check_lora(given: Mapping[str, Any], where: object) -> None:
    """Raise InputError where peft is missing, and for arguments that its LoraConfig does not know."""
    known = {one.name for one in fields(_import_peft().LoraConfig) if one.init} - {*OWNED}
    for name, value in given.items():
        if name not in known:
            mend = f"is no argument of peft's LoraConfig; {nearest(name, known)}"
            raise InputError(where, f"fine_tuning.lora.{name}", value, mend)


def add_lora(model: Any, given: Mapping[str, Any], seed: int) -> Any:
    """The model with trainable factors, drawn from the seed, and its own weights frozen.

    Raises InputError for values that peft refuses.
    """
    peft = _import_peft()
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**DEFAULTS, **given}))
    except (TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(None, "fine_tuning.lora", dict(given), f"peft refuses it ({reason})") from None


def merged(model: Any) -> Any:
    """The model with its factors multiplied out and added."""
    return model.merge_and_unload()


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        mend = "adapters are trained with peft: pip install 'dem-opt[lora]'; or name a `checkpoint:`"
        raise InputError(None, "fine_tuning.lora", None, mend) from None
    return peft
