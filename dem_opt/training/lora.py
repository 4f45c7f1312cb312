"""LoRA through peft, an optional package: train low-rank factors  Delta W = (alpha / r) B A , and merge them.

Hu et al. 2021. B starts at zero, so training starts from the base.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dem_opt.errors import InputError, nearest

DEFAULTS: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
"""Arguments of LoraConfig where the study file has none: rank, alpha, and the layers that get factors."""

OWNED = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path")


def check_lora(arguments: Mapping[str, Any], where: Path | None) -> None:
    """Raise InputError where peft is missing, and for arguments that its LoraConfig does not know."""
    known = {field.name for field in fields(_import_peft().LoraConfig) if field.init} - {*OWNED}
    for name, value in arguments.items():
        if name not in known:
            mend = f"is no argument of peft's LoraConfig; {nearest(name, known)}"
            raise InputError(where, f"fine_tuning.lora.{name}", value, mend)


def add_lora(model: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """Freeze a model's weights and add trainable factors, drawn from the seed.

    Raises:
        InputError: peft refuses a value.
    """
    peft = _import_peft()
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**DEFAULTS, **arguments}))
    except (TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(None, "fine_tuning.lora", dict(arguments), f"peft refuses it ({reason})") from None


def merged(model: Any) -> Any:
    """Add the factors' product to the weights:  W + (alpha / r) B A ."""
    return model.merge_and_unload()


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        mend = "adapters are trained with peft: pip install 'dem-opt[lora]'; or name a `checkpoint:`"
        raise InputError(None, "fine_tuning.lora", None, mend) from None
    return peft
