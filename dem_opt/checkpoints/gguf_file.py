"""Read GGUF files through transformers, which dequantizes tensors and makes config and tokenizer of the header."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dem_opt.checkpoints.architecture import silent
from dem_opt.checkpoints.files import INDEX, WEIGHTS
from dem_opt.errors import InputError, shorten
from dem_opt.progress import current_progress

_PLAIN = {"F32", "F16", "BF16"}
"""Types of tensors that are not quantized."""

_PART = re.compile(r"-\d+-of-(\d+)\.gguf$", re.IGNORECASE)
"""The end of a name that llama.cpp gives a part of a model."""


def files_of(place: Path, field: str) -> list[Path]:
    """The GGUF file of a place: the file itself, or the only one of a folder without other weights.

    Raises:
        InputError: A folder has several, or the model is split into several.
    """
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        files = [place] if place.is_file() else []
    elif not place.is_dir() or (place / WEIGHTS).is_file() or (place / INDEX).is_file():
        files = []
    else:
        files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf")
    part = next((match for file in files if (match := _PART.search(file.name))), None)
    if part is not None:
        mend = f"is split into {int(part[1])} files, which transformers does not read: join them first, with"
        raise InputError(place, field, None, f"{mend} `llama-gguf-split --merge {files[0].name} OUT.gguf`")
    if len(files) > 1:
        mend = f"has {len(files)} GGUF files: name one of them, such as {files[0].name}"
        raise InputError(place, field, None, mend)
    return files


def read(files: Sequence[Path], field: str) -> Callable[[Path], dict[str, str]]:
    """Return a writer of a GGUF file's model: dequantized to bfloat16, or in float32 where nothing is quantized.

    Raises:
        InputError: The gguf package is missing.
    """
    (file,) = files
    try:
        reader: Any = import_module("gguf").GGUFReader
    except ImportError:
        raise InputError(file, field, None, "needs the gguf package: pip install 'dem-opt[gguf]'") from None

    def write(out: Path) -> dict[str, str]:
        try:
            types = {tensor.tensor_type.name for tensor in reader(file).tensors}
            dtype = torch.float32 if types <= _PLAIN else torch.bfloat16
            source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
            with current_progress().phase(f"converting {file.name}"), silent():
                config = AutoConfig.from_pretrained(file.parent, **source)
                model = AutoModelForCausalLM.from_pretrained(file.parent, config=config, dtype=dtype, **source)
                tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        except Exception as error:  # a damaged file may stumble over anything
            reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
            raise InputError(file, field, None, f"transformers can't read this GGUF file ({reason})") from None
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(out)
        tokenizer.save_pretrained(out)
        tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        return dict.fromkeys(tensors, WEIGHTS)

    return write
