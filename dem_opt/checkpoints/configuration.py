"""The computing configuration of a checkpoint: those fields of its config.json that change the forward pass.

Every field computes unless this module lists it as a label, as decided by the tensors, or as a mere length; a field
that the model's class does not declare is not known to compute.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from hashlib import sha256
from math import isclose
from pathlib import Path
from typing import Any, Self

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2CLS, ACT2FN

from dem_opt.checkpoints.architecture import CONFIG_ERRORS
from dem_opt.checkpoints.files import read_json
from dem_opt.errors import InputError, shorten

_ORIGIN = {
    *("_commit_hash", "_name_or_path", "architectures", "auto_map", "dtype", "name_or_path", "tokenizer_class"),
    *("torch_dtype", "transformers_version"),
}
_RUNTIME = {
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation", "attn_implementation"),
    *("cache_implementation", "chunk_size_feed_forward", "gradient_checkpointing", "num_logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "pretraining_tp", "return_dict"),
    *("use_associative_scan", "use_cache", "use_mamba_kernels", "use_mambapy", "use_return_dict"),
}
_TRAINING = {
    *("aux_loss_coef", "embed_init_std", "embedding_initializer_range", "init_device", "init_std"),
    *("initializer_cutoff_factor", "initializer_factor", "initializer_range", "input_jitter_noise", "layerdrop"),
    *("mtp_loss_scaling_factor", "rescale_prenorm_residual", "router_aux_loss_coef", "router_jitter_noise"),
    *("router_z_loss_coef", "w_init_variance_scale", "z_loss_coefficient"),
}
_HEADS = {
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "summary_activation"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params"),
}
_GENERATION = {
    *("begin_suppress_tokens", "bos_token_id", "cls_token_id", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "length_penalty"),
    *("mask_token_id", "max_length", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences"),
    *("pad_token_id", "repetition_penalty", "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p"),
}
LABELS = _ORIGIN | _RUNTIME | _TRAINING | _HEADS | _GENERATION
"""Fields that change no forward pass in evaluation; so are all with "drop" in their name."""

_TENSORS = {"quantization_config", "tie_word_embeddings", "vocab_size"}
"""Fields that the stored tensors decide: they are compared as tensors."""

_LENGTHS = {
    *("context_length", "max_position_embeddings", "max_seq_len", "max_source_positions", "max_target_positions"),
    *("n_ctx", "n_positions", "seq_length"),
}
"""Fields that limit a text's length; learned positions are tensors."""

_FIXED_ROTATIONS = {None, "default", "linear", "llama3"}
"""Kinds of rotary embeddings whose angles do not depend on the length that the config declares."""

_OLD_ROTARY = {"partial_rotary_factor", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct"}
"""Fields of earlier versions of transformers, which reads them into `rope_parameters`."""

_ROPE_TYPE = re.compile(r"rope_parameters\.(?:.+\.)?type$")
"""The earlier name of `rope_type`, which stays beside it."""

_REPEATED = {"intermediate_size", "max_window_layers", "n_inner"}
"""Fields that repeat others: widths of the tensors, and what `layer_types` says of each layer."""

_UNREAD = {"prefix", "tf_legacy_loss", "torchscript", "use_bfloat16"}
"""Fields of every config of earlier versions that no forward pass of torch reads."""

_PRECISION = {
    *("attention_softmax_in_fp32", "reorder_and_upcast_attn", "residual_in_fp32", "scale_attention_softmax_in_fp32"),
    "slow_but_exact",
}
"""Fields that round the same function in another way."""

_ROTARY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True}}
"""Values with which transformers completes a rotary embedding, by its kind."""

_FLOAT32_EPS = 2.0**-23

_LEARNED_ACTIVATIONS = {"prelu", "xielu"}
"""Activation functions with parameters of their own."""

_SHOWN = 3
"""Differences listed in a message; the rest are counted."""


@dataclass(frozen=True)
class Configuration:
    """The fields of a config.json, without those that compute nothing.

    Attributes:
        written: Values as JSON by dotted name, as the file has them.
    """

    written: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `text`."""
        return cls(json.loads(text))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the written fields."""
        return sha256(self.text.encode()).hexdigest()

    @property
    def text(self) -> str:
        """The written fields as JSON."""
        return json.dumps(dict(self.written), sort_keys=True)

    def differences(self, other: "Configuration") -> dict[str, tuple[Any, Any]]:
        """The fields in which two forward passes differ, with both values; None where a field has no value.

        Files are compared as transformers reads them: older and newer spellings of one configuration are the same.
        """
        if self.written == other.written:
            return {}
        texts = _text(self.written), _text(other.written)
        ours, theirs = self.written, other.written
        if texts[0] is not None and texts[1] is not None:
            ours, theirs = _completed(texts[0]), _completed(texts[1])
        names = (name for name in sorted(ours.keys() | theirs.keys()) if not _is_same(ours.get(name), theirs.get(name)))
        return {name: (ours.get(name), theirs.get(name)) for name in names}


def read_configuration(folder: Path, field: str) -> Configuration:
    """The configuration of a checkpoint folder; InputError where config.json can't be read."""
    written = _flat(read_json(folder / "config.json", field))
    return Configuration({name: value for name, value in written.items() if not _is_label(name)})


def check_configuration(base: Path, folder: Path, field: str) -> list[str]:
    """Check that a fine-tune's forward pass is the base's with other weights.

    Returns:
        A warning, where fields differ that are not known to compute: composites have the base's.

    Raises:
        InputError: A field that computes has another value than the base's.
    """
    configuration = read_configuration(folder, field)
    differences = configuration.differences(read_configuration(base, "base"))
    passive = {name for name in differences if not _computes(name, configuration)}
    if differences.keys() - passive:
        computing = {name: values for name, values in differences.items() if name not in passive}
        mend = (
            f"computes otherwise than the base's, which a composite has: {describe(computing, 'base')}; "
            "name the base that it was trained from, or correct the file"
        )
        raise InputError(folder / "config.json", field, None, mend)
    if not passive:
        return []
    return [f"{field}: config.json differs from the base's, which composites have: {describe(differences, 'base')}"]


def describe(differences: Mapping[str, tuple[Any, Any]], other: str) -> str:
    """The first differences in words, the model's type before all, and a count of the others.

    Args:
        differences: Both values by field.
        other: What has the second value.
    """
    names = sorted(differences, key=lambda name: (name != "model_type", name))
    parts = [f"{name} = {_shown(differences[name][0])} ({other}: {_shown(differences[name][1])})" for name in names]
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return "; ".join([*parts[:_SHOWN], *more])


def _shown(value: Any) -> str:
    return "absent" if value is None else shorten(json.dumps(value))


def _is_same(ours: Any, theirs: Any) -> bool:
    """Two values are equal; numbers up to float32, in which GGUF files store them and models compute."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return all(map(_is_same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return isclose(ours, theirs, rel_tol=_FLOAT32_EPS)
    if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        return _is_same_activation(ours, theirs)
    return bool(ours == theirs)


def _is_same_activation(ours: str, theirs: str) -> bool:
    """Two names are those of one activation function, up to float32: silu and swish, gelu_new and gelu_pytorch_tanh."""
    if not {ours, theirs} <= ACT2CLS.keys() - _LEARNED_ACTIVATIONS:
        return False
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    return torch.allclose(ACT2FN[ours](x), ACT2FN[theirs](x), rtol=_FLOAT32_EPS, atol=_FLOAT32_EPS)


def _is_label(name: str) -> bool:
    """A dotted name changes no forward pass, or is compared as tensors."""
    return any(part in LABELS or part in _TENSORS or "drop" in part for part in name.split("."))


def _computes(name: str, configuration: Configuration) -> bool:
    """A field is one of the model's class, and no length, unless rotary angles depend on the length."""
    text = _text(configuration.written)
    if text is None:
        return True
    if name in _PRECISION:
        return False
    if name.rpartition(".")[2] in _LENGTHS:
        rotations = {value for key, value in _completed(text).items() if key.rpartition(".")[2] == "rope_type"}
        return not rotations <= _FIXED_ROTATIONS
    return name.partition(".")[0] in _declared(text)


def _completed(text: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a language model that compute, with the defaults of its class."""
    values = {name: value for name, value in _flat(text.to_dict()).items() if not _is_label(name) and value is not None}
    silent = _REPEATED | _UNREAD
    if getattr(text, "rope_parameters", None):
        silent |= _OLD_ROTARY - _declared(text)
    values = {name: value for name, value in values.items() if name not in silent and not _ROPE_TYPE.match(name)}
    if {"hidden_size", "num_attention_heads"} <= values.keys():
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    for name in [name for name in values if name.endswith("rope_type")]:
        _complete_rotation(values, name)
    return values


def _complete_rotation(values: dict[str, Any], name: str) -> None:
    """Give a rotary embedding, by the name of its `rope_type`, the defaults of its kind; stretched by 1 it is plain."""
    prefix = name.removesuffix("rope_type")
    if values[name] == "linear" and values.get(f"{prefix}factor") == 1:
        values[name] = "default"
        del values[f"{prefix}factor"]
    for field, default in _ROTARY_DEFAULTS.get(values[name], {}).items():
        values.setdefault(f"{prefix}{field}", default)


def _declared(text: PreTrainedConfig) -> set[str]:
    """Names of the fields that a configuration's class declares."""
    names = {field.name for field in fields(text)} if is_dataclass(text) else set(vars(text))
    return names | {"model_type"}


def _text(written: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The configuration of the language model; None where transformers has no class for it, or refuses it."""
    data = _nested(written)
    if data.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[data["model_type"]].from_dict(data)
    except CONFIG_ERRORS:
        return None
    return config if config.is_encoder_decoder else config.get_text_config()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; values as JSON has them."""
    return dict(_items(json.loads(json.dumps(data, default=str)), prefix))


def _items(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(written: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flat`."""
    data: dict[str, Any] = {}
    for name, value in written.items():
        *parents, last = name.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return data
