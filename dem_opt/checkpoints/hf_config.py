"""Facts of a checkpoint's config.json that decide whether the checkpoint can be merged."""

import json
from pathlib import Path
from typing import Any

from dem_opt.errors import InputError

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
"""Names of the number of layers in configs of various models."""


def read_config(folder: Path, field: str) -> dict[str, Any]:
    """config.json, with the keys of its `text_config` (of multimodal models) that it does not have itself."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {**(config.get("text_config") or {}), **config}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(file, field, None, "not valid JSON, or no config: copy or save it again") from None


def refuse_quantized(folder: Path, field: str) -> None:
    """Raise InputError for quantized weights: sums of quantization codes mean nothing."""
    if settings := read_config(folder, field).get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        mend = "quantized weights can't be summed: name the checkpoint that they were made from, or save it dequantized"
        raise InputError(folder / "config.json", f"{field}: quantization_config.quant_method", method, mend)


def refuse_endless(folder: Path, field: str, tensors: int) -> None:
    """Raise InputError for a config with more layers than tensors: constructing that model might never end."""
    config = read_config(folder, field)
    for key in LAYERS:
        layers = config.get(key)
        if isinstance(layers, int) and layers > tensors:
            mend = f"more layers than the {tensors} tensors that are stored: copy or save it again"
            raise InputError(folder / "config.json", f"{field}: {key}", layers, mend)
