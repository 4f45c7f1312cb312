"""What a checkpoint's config.json declares, as far as it decides whether the checkpoint can be merged."""

import json
from pathlib import Path
from typing import Any

from dem_opt.errors import InputError

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
"""What configs call their number of layers."""


def read_config(folder: Path, field: str) -> dict[str, Any]:
    """config.json with what its `text_config` says of language, where it has one."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {**(config.get("text_config") or {}), **config}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(file, field, None, "not valid JSON, or no config: copy or save it again") from None


def refuse_quantized(folder: Path, field: str) -> None:
    """Raise InputError for weights that stand for others by a scheme of quantization: their sums mean nothing."""
    if settings := read_config(folder, field).get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        mend = "quantized weights can't be summed: name the checkpoint that they were made from, or save it dequantized"
        raise InputError(folder / "config.json", f"{field}: quantization_config.quant_method", method, mend)


def refuse_endless(folder: Path, field: str, tensors: int) -> None:
    """Raise InputError for a config of more layers than tensors, which it would take for ever to make a model of."""
    config = read_config(folder, field)
    for key in LAYERS:
        layers = config.get(key)
        if isinstance(layers, int) and layers > tensors:
            mend = f"more layers than the {tensors} tensors that are stored: copy or save it again"
            raise InputError(folder / "config.json", f"{field}: {key}", layers, mend)
