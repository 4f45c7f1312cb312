"""Read pickled weights, of which only tensors are unpickled, and write them as safetensors."""

from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dem_opt.checkpoints.files import INDEX, WEIGHTS
from dem_opt.errors import InputError, shorten

_NAME = "pytorch_model*.bin"
_ADAPTER = "adapter_model"


def files_of(folder: Path) -> list[Path]:
    """The pickled weights of a checkpoint or an adapter that does not have them as safetensors too."""
    whole = [] if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else sorted(folder.glob(_NAME))
    adapter = folder / f"{_ADAPTER}.bin"
    return whole + [adapter] * (adapter.is_file() and not adapter.with_suffix(".safetensors").is_file())


def write_tensors(pickles: Iterable[Path], out: Path, field: str) -> dict[str, str]:
    """Write a safetensors file for each pickle.

    Returns:
        The file's name by tensor, of a checkpoint's tensors.

    Raises:
        InputError: A pickle holds anything else, is damaged, or has tensors without dense values.
    """
    weight_map: dict[str, str] = {}
    for file in pickles:
        stored = _load(file, field)
        for name, tensor in stored.items():
            if fault := _fault(tensor):
                raise InputError(file, field, name, fault)
        tensors = {name: tensor.contiguous().clone() for name, tensor in stored.items()}
        try:
            save_file(tensors, out / f"{file.stem}.safetensors", metadata={"format": "pt"})
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = f"can't be written as safetensors ({shorten(_first_line(error), 200)})"
            raise InputError(file, field, None, reason) from None
        if file.stem != _ADAPTER:
            weight_map |= dict.fromkeys(tensors, f"{file.stem}.safetensors")
    return weight_map


def _load(file: Path, field: str) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        # Files of PyTorch before 1.6 are no zip archives, which alone can be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may stumble over anything
        reason = shorten(_first_line(error), 200)
        raise InputError(file, field, None, f"holds more than tensors, or is damaged ({reason})") from None
    if not (isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())):
        raise InputError(file, field, None, "is no mapping of names to tensors")
    for name in tensors:
        if not isinstance(name, str) or not name.isprintable() or name == "__metadata__":
            raise InputError(file, field, name, "is no name of a tensor: save a state dict, whose keys are names")
    if is_zipfile(file) and _stored_bytes(file) < _used_bytes(tensors.values()):
        raise InputError(file, field, None, "is truncated: it has fewer bytes than its tensors; copy it again")
    return tensors


def _stored_bytes(file: Path) -> int:
    """Bytes of the tensors of a zip archive.

    Torch maps as many bytes as a tensor needs from where its record begins, also beyond the record's end.
    """
    with ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)


def _used_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that dense tensors lie in, each part counted once."""
    dense = (x for x in tensors if x.layout == torch.strided and not (x.is_meta or x.is_nested))
    storages = (tensor.untyped_storage() for tensor in dense)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _fault(tensor: Tensor) -> str | None:
    """Say why a tensor has no dense values of its own, and what to do; None for an ordinary one."""
    save = "then save the checkpoint again"
    if tensor.is_meta:
        return f"a tensor on the meta device, without values: load the weights first, {save}"
    if tensor.is_nested:
        return f"a nested tensor: pad it, {save}"
    if tensor.is_quantized:
        return f"a quantized tensor: call `dequantize()`, {save}"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}: call `to_dense()`, {save}"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"a tensor with fewer bytes than its shape needs, expanded or truncated: call `contiguous()`, {save}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
