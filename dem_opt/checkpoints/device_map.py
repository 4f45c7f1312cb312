"""Division of a model over devices by layers, and hooks that move activations between them.

Written here rather than with accelerate's `dispatch_model`: that replaces the parameters it places, but ours are views
of the merged model's flat segments, and tied weights must stay one tensor.  Only its `send_to_device` is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from dem_opt.checkpoints.transformers_internals import layer_classes
from dem_opt.errors import InputError

FIELD = "compute.gpus_per_worker"


@dataclass(frozen=True)
class Split:
    """A model's layers, divided over devices.

    Attributes:
        devices: Number of devices.
        places: The device's number by name of each parameter and buffer; all names of tied ones.
        modules: The device's number by name of each module whose inputs are moved; empty for one device.
        layers: Number of layers of each device.
    """

    devices: int
    places: Mapping[str, int]
    modules: Mapping[str, int]
    layers: tuple[int, ...]


def split_layers(model: PreTrainedModel, devices: int, where: Path | None = None) -> Split:
    """Divide a model over devices by layers, in their order, so that the largest share has the fewest parameters.

    Layers are the modules that the class says must not be divided; each has one device, and every device at least one
    layer.  What comes before the last layer and belongs to none (embeddings, which models add up outside of any
    module) lies on the first device, what comes after on the last.  Tied weights lie where the first of their names
    does, a buffer beside its module's parameters, else on the first device.

    Raises:
        InputError: The model has fewer layers than devices.
    """
    blocks = _blocks(model) if devices > 1 else []
    if len(blocks) < devices > 1:
        mend = f"{type(model).__name__} has {len(blocks)} layers to divide: write at most so many, or leave it out"
        raise InputError(where, FIELD, devices, mend)
    order = _order(blocks, [name for name, _ in model.named_parameters()])
    sizes = [0] * (len(blocks) + 2)
    for name, parameter in model.named_parameters():
        sizes[order[name]] += parameter.numel()
    counts = _divide(sizes, devices) if devices > 1 else (len(blocks),)
    owner = [0, *chain.from_iterable([device] * count for device, count in enumerate(counts)), devices - 1]
    by_tensor = {id(parameter): owner[order[name]] for name, parameter in model.named_parameters()}
    every_name = model.named_parameters(remove_duplicate=False)
    places = {name: by_tensor[id(parameter)] for name, parameter in every_name}
    modules = dict(_holders(model, blocks, owner, places))
    places |= {name: modules[_holder(name, modules)] for name, _ in model.named_buffers(remove_duplicate=False)}
    return Split(devices, places, modules if devices > 1 else {}, counts)


def language_model(model: PreTrainedModel) -> nn.Module:
    """The part that reads tokens, its decoder; of a model that reads nothing else, all of it."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is model.config:
        return model
    return cast(nn.Module, model.get_decoder())  # type: ignore[no-untyped-call]


def move_activations(model: PreTrainedModel, split: Split, devices: Sequence[torch.device]) -> None:
    """Move the arguments of every module that has a device there before each of its calls."""
    for name, number in split.modules.items():
        hook = partial(_move_arguments, devices[number])
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def _move_arguments(
    device: torch.device, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Any]:
    """A forward pre-hook: tensors among the arguments, and in their lists and mappings, on a device."""
    return send_to_device(arguments, device), send_to_device(keywords, device)


def _blocks(model: PreTrainedModel) -> list[str]:
    """Names of the language model's layers in their order; where one lies within another, the outer."""
    classes, modules = layer_classes(model), {*language_model(model).modules()}
    blocks: list[str] = []
    for name, module in model.named_modules():
        is_inner = bool(blocks) and name.startswith(f"{blocks[-1]}.")
        if type(module).__name__ in classes and module in modules and not is_inner:
            blocks.append(name)
    return blocks


def _order(blocks: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """By parameter the number of its layer from 1 on; of others 0 before the last layer, len(blocks) + 1 behind it."""
    numbers = {block: number for number, block in enumerate(blocks, 1)}
    order = {name: next((numbers[part] for part in _prefixes(name) if part in numbers), 0) for name in names}
    last = max((index for index, name in enumerate(names) if order[name] == len(blocks)), default=0)
    return order | {name: len(blocks) + 1 for name in names[last + 1 :] if blocks}


def _prefixes(name: str) -> Iterator[str]:
    """The modules that a name lies in, from the outermost on, and itself."""
    return accumulate(name.split("."), lambda left, right: f"{left}.{right}")


def _divide(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """Layers for each device, such that the largest share is smallest; sizes are before, layers, behind."""
    # Bisection on the largest share: if it can be `middle`, it can be anything above.
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _fill(sizes, devices, middle) is None else (low, middle)
    counts = _fill(sizes, devices, high)
    assert counts is not None, "all layers but one for each other device fit into the sum"
    return counts


def _fill(sizes: Sequence[int], devices: int, most: int) -> tuple[int, ...] | None:
    """Layers for each device if none has more than `most` parameters, the first ones full; None if impossible."""
    before, *layers, behind = sizes
    counts: list[int] = []
    done = 0
    for device in range(devices):
        room, left = most - (before if device == 0 else 0), devices - 1 - device
        count = 1
        while done + count + left < len(layers) and sum(layers[done : done + count + 1]) <= room:
            count += 1
        share = sum(layers[done : done + count]) + (behind if not left else 0)
        if share > room:
            return None
        counts, done = [*counts, count], done + count
    return tuple(counts) if done == len(layers) else None


def _holders(
    model: PreTrainedModel, blocks: Sequence[str], owner: Sequence[int], places: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    """Each layer, and each module outside of layers with parameters or buffers of its own, with its device."""
    yield from zip(blocks, owner[1:], strict=False)
    for name, module in model.named_modules():
        if any(part in blocks for part in _prefixes(name)):
            continue
        own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        if own or any(True for _ in module.named_buffers(recurse=False)):
            yield name, places[own[0]] if own else 0


def _holder(name: str, modules: Mapping[str, int]) -> str:
    """The module that a buffer is moved with."""
    return next((part for part in _prefixes(name) if part in modules), name.rpartition(".")[0])
