"""Facts of a checkpoint's config.json that decide whether the checkpoint can be merged."""

from pathlib import Path
from typing import Any

from dem_opt.errors import InputError
from dem_opt.json_files import read_json

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
"""Names of the number of layers in configs of various models."""


def read_config(folder: Path, field: str) -> dict[str, Any]:
    """config.json, with the keys of its `text_config` (of multimodal models) that it does not have itself."""
    file = folder / "config.json"
    config = read_json(file, dict[str, Any], field)
    text_config = config.get("text_config") or {}
    if not isinstance(text_config, dict):
        raise InputError(file, f"{field}: text_config", text_config, "must be a mapping: copy or save it again")
    return {**text_config, **config}


def refuse_quantized(folder: Path, field: str) -> None:
    """Raise InputError for quantized weights: sums of quantization codes mean nothing."""
    if settings := read_config(folder, field).get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        mend = "quantized weights can't be summed: name the checkpoint that they were made from, or save it dequantized"
        raise InputError(folder / "config.json", f"{field}: quantization_config.quant_method", method, mend)


def refuse_hub_code(folder: Path, field: str) -> None:
    """Raise InputError for a config that names a kernel of the hub: transformers would download and run it."""
    for key, value in read_config(folder, field).items():
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            mend = "names code on the hub, which is not run: remove the key"
            raise InputError(folder / "config.json", f"{field}: {key}", value, mend)


def refuse_endless(folder: Path, field: str, tensors: int) -> None:
    """Raise InputError for a config with more layers than tensors: constructing that model might never end."""
    config = read_config(folder, field)
    for key in LAYERS:
        layers = config.get(key)
        if isinstance(layers, int) and layers > tensors:
            mend = f"more layers than the {tensors} tensors that are stored: copy or save it again"
            raise InputError(folder / "config.json", f"{field}: {key}", layers, mend)
