"""The settings of a PEFT adapter: which can be merged, and what they make of its tensors.

One set of rules answers for adapters that are read and for those that are about to be trained.
"""

import re
from collections.abc import Mapping
from math import sqrt
from sys import float_info
from typing import Any

CHECKPOINT = "merge it into a checkpoint: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
"""The way out for adapters that PEFT can merge and this program can't."""

_ON_THE_INPUT = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
    *("XLORA", "POLY"),
}
"""Kinds of adapters that change or watch the model's input, so that no weights compute what they do."""

_UNMERGEABLE = {
    "alora_invocation_tokens": "acts from its invocation tokens on, and no weights compute that",
    "arrow_config": "chooses among several adapters for each token, and no weights compute that",
    # PEFT would import whatever module the file names as megatron_core.
    "megatron_config": "is of layers that Megatron splits over processes, and PEFT would import a module that it names",
    "layer_replication": "was trained on a model with repeated layers, which the base does not have",
}
"""Settings with which no weights of the base's shapes compute what was trained."""

_MERGED_ELSEWHERE = ("use_qalora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config")
"""Variants of LoRA with a formula or tensors of their own."""

_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights as they are."""

CONVERTIBLE = re.compile("pissa(_niter_[0-9]+)?|olora")
"""Values of `init_lora_weights` that take the first factors off the base:  W_0 = W - s B_0 A_0 .

What was trained is then  W_0 + s B A = W + s (B A - B_0 A_0) , a plain LoRA of twice the rank.
"""


def fault(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first setting with which an adapter can't be merged, and why; None where there is none."""
    kind = str(config.get("peft_type"))
    if kind in _ON_THE_INPUT:
        return "peft_type", f"is of the kind {kind!r}, which acts on the input, and no weights compute that"
    if kind != "LORA":
        return "peft_type", f"is of the kind {kind!r}: only LORA (plain, rsLoRA, DoRA) is read here; {CHECKPOINT}"
    for setting, reason in _UNMERGEABLE.items():
        if config.get(setting):
            return setting, f"has {setting}: it {reason}"
    for setting in _MERGED_ELSEWHERE:
        if config.get(setting):
            return setting, f"has {setting}, which can't be merged here; {CHECKPOINT}"
    if not _is_number(config.get("lora_alpha")):
        return "lora_alpha", "has no lora_alpha that is a number: copy or save the adapter again"
    for setting in ("rank_pattern", "alpha_pattern"):
        if not _are_patterns(config.get(setting)):
            return setting, f"has {setting} that is no mapping of patterns to numbers: copy or save the adapter again"
    return _initialization_fault(config.get("init_lora_weights"))


def _initialization_fault(initialization: Any) -> tuple[str, str] | None:
    """The fault of an initialization that changed the base's weights."""
    if initialization in _BASE_UNCHANGED:
        return None
    reason = f"has init_lora_weights {initialization!r}, which changed the base's weights before training"
    if isinstance(initialization, str) and initialization.startswith(("pissa", "olora", "corda", "lora_ga")):
        mend = "save it as a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        return "init_lora_weights", f"{reason}: {mend}, or {CHECKPOINT}"
    return "init_lora_weights", f"{reason}: {CHECKPOINT}"


def rank_of(config: Mapping[str, Any], module: str) -> int | None:
    """The rank of a module's factors, by `r` and `rank_pattern`; None where the config says none."""
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    return rank if isinstance(rank, int) else None


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of the formula, alpha / r or alpha / sqrt(r), by the module's own alpha where the config has a pattern."""
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def token_indices(config: Mapping[str, Any], module: str, is_embedding: bool) -> tuple[int, ...]:
    """The tokens whose rows of a module were trained; a list is of the input embedding's."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if module.endswith(name)), None)
    elif not is_embedding:
        indices = None
    valid = isinstance(indices, list) and all(isinstance(index, int) for index in indices)
    return tuple(indices) if valid and indices else ()


def is_saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """The module is one of `modules_to_save`: PEFT trains a copy of it, untied from all other names."""
    names = config.get("modules_to_save")
    return isinstance(names, list) and any(isinstance(name, str) and module.endswith(name) for name in names)


def is_target_parameter(config: Mapping[str, Any], parameter: str) -> bool:
    """The parameter is one of `target_parameters`."""
    names = config.get("target_parameters")
    return isinstance(names, list) and any(parameter == name or parameter.endswith(f".{name}") for name in names)


def stores_experts_by_outputs(config: Mapping[str, Any]) -> bool | None:
    """Factors of stacked experts map an expert's inputs to its outputs, as PEFT has stored them since 0.19.

    Before, they mapped the second dimension of the stack to the third, whatever these were.  None: no version is
    stated.
    """
    match = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) >= (0, 19) if match else None


def _is_number(value: Any) -> bool:
    """A number that a float holds; JSON has NaN, infinities and longer ones, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def _are_patterns(patterns: Any) -> bool:
    """A mapping of regular expressions to numbers, or nothing."""
    try:
        return all(re.compile(key) and _is_number(value) for key, value in (patterns or {}).items())
    except (re.error, AttributeError, TypeError):
        return False


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default
