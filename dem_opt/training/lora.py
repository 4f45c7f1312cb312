"""LoRA through peft, an optional package: train low-rank factors  Delta W = (alpha / r) B A , and merge them.

Hu et al. 2021. B starts at zero, so training starts from the base.  PiSSA and OLoRA start from factors of the base
itself, which they take off it, and are saved as the plain LoRA that they are of the base as it was.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dem_opt.checkpoints.adapter_config import CONVERTIBLE, fault
from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS, Plan, plan_edits, sort_tensors
from dem_opt.checkpoints.architecture import describe, read_meta_model
from dem_opt.checkpoints.files import Header, StoredTensor, read_header
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


def check_mergeable(arguments: Mapping[str, Any], base: Path, where: Path | None) -> None:
    """Check, without training, that the adapter which training would save can be read and merged.

    The rules are those of reading: they are applied to the names, shapes and settings that peft would save.

    Raises:
        InputError: It could not be merged, or peft refuses a value.
    """
    field = "fine_tuning.lora"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights, which are checked here
        model = _adapted(read_meta_model(read_header(base, "base")), _trial(arguments), low_cpu_mem_usage=True)
    config = model.peft_config["default"].to_dict() | {"peft_type": "LORA"}
    plain = CONVERTIBLE.fullmatch(str(arguments.get("init_lora_weights", "")))
    if not plain and "init_lora_weights" in arguments:
        config["init_lora_weights"] = arguments["init_lora_weights"]
    if unmergeable := fault(config):
        setting, reason = unmergeable
        raise InputError(where, f"{field}.{setting}", arguments.get(setting), f"no run could merge it: it {reason}")
    tensors = {
        name: StoredTensor("F32", tuple(tensor.shape), base, 0, 4 * tensor.numel())
        for name, tensor in _import_peft().get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    plan = plan_edits(
        describe(read_meta_model(read_header(base, "base"))),
        sort_tensors(Header(base, field, tensors, adapter=True), config),
    )
    faults = [*plan.faults, *_faults_of_training(plan, bool(plain))]
    if faults:
        raise InputError(where, field, dict(arguments), f"no run could merge it: {'; '.join(faults[:3])}")


def count_parameters(base: Path, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Number of a base's parameters, and of those that a LoRA of it trains; no weights are read.

    Raises:
        InputError: peft refuses a value.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights, which a merged adapter unties nowhere
        model = _adapted(read_meta_model(read_header(base, "base")), _trial(arguments), low_cpu_mem_usage=True)
    total, trained = parameters_of(model)
    return total - trained, trained


def _trial(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, without an initialization that needs the base's values."""
    return {**arguments, "init_lora_weights": True}


def _faults_of_training(plan: Plan, converted: bool) -> list[str]:
    """Faults of an adapter that only training it would bring about."""
    faults = [
        f"peft lets the factors of {first.module} and {second.module} differ, which the base ties: name them in "
        "modules_to_save, with ensure_weight_tying: true"
        for first, second in plan.twins
        if first.kind == "low rank"
    ]
    linear = all(edit.kind != "experts" and "embedding" not in edit.stored.get("A", "") for edit in plan.edits.values())
    if converted and not linear:
        faults.append("this init_lora_weights is for linear layers alone")
    return faults


def add_lora(model: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """Freeze a model's weights and add trainable factors, drawn from the seed.

    Raises:
        InputError: peft refuses a value.
    """
    torch.manual_seed(seed)
    return _adapted(model, arguments)


def _adapted(model: PreTrainedModel, arguments: Mapping[str, Any], **options: Any) -> Any:
    """Peft's model of a model.

    Raises:
        InputError: peft refuses a value.
    """
    peft = _import_peft()
    with _as_input_error(arguments), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{**DEFAULTS, **arguments})
        return peft.get_peft_model(model, config, **options)


@contextmanager
def _as_input_error(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn peft's refusal of an argument into an InputError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(None, "fine_tuning.lora", dict(arguments), f"peft refuses it ({reason})") from None


def initial_factors(model: Any) -> dict[str, Tensor]:
    """Copies of the factors that peft took off the base's weights, by the name they are saved under; else nothing."""
    if not CONVERTIBLE.fullmatch(str(model.peft_config["default"].init_lora_weights)):
        return {}
    stored = _import_peft().get_peft_model_state_dict(model)
    return {name: x.detach().cpu().clone() for name, x in stored.items() if ".lora_A." in name or ".lora_B." in name}


def subtract_initial_factors(folder: Path, initial: Mapping[str, Tensor]) -> None:
    """Rewrite a saved adapter as a plain LoRA of the unchanged base, of twice the rank:

    W_0 + s B A = W + s (B A - B_0 A_0) = W + s [B, -B_0] [A; A_0] ,   W_0 = W - s B_0 A_0 .
    """
    if not initial:
        return
    tensors = load_file(folder / WEIGHTS)
    for name, before in initial.items():
        down = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], before if down else -before], dim=0 if down else 1).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # s stays the same: alpha / r, or alpha / sqrt(r).
    factor = sqrt(2) if config.get("use_rslora") else 2
    config |= {
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merged(model: Any) -> Any:
    """Add the factors' product to the weights:  W + (alpha / r) B A ."""
    return model.merge_and_unload()


def parameters_of(model: nn.Module) -> tuple[int, int]:
    """Number of a model's parameters, tied ones once, and of those that are trained."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        mend = "adapters are trained with peft: pip install 'dem-opt[lora]'; or name a `checkpoint:`"
        raise InputError(None, "fine_tuning.lora", None, mend) from None
    return peft
