"""Which of several devices each layer of a model lies on, and what moves activations between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dem_opt.errors import InputError

FIELD = "compute.gpus_per_worker"


@dataclass(frozen=True)
class Split:
    """A model's layers, divided over devices.

    devices  how many
    places   the device's number by name of each parameter and buffer, by all names of tied ones
    modules  the number by name of each module whose inputs are moved to its device, where there are several
    layers   how many layers each device has
    """

    devices: int
    places: Mapping[str, int]
    modules: Mapping[str, int]
    layers: tuple[int, ...]


def split_layers(model: PreTrainedModel, devices: int, where: object = None) -> Split:
    """Divide a model over devices by layers, in their order, so that the largest share has the fewest parameters.

    Layers are the modules that the class says must not be divided (`_no_split_modules`); each has one device, and
    every device at least one.  What comes before the last layer and belongs to none (embeddings, which models add up
    outside of any module) lies on the first device, what comes after on the last.  Tied weights lie where the first of
    their names does, a buffer beside its module's parameters, else on the first device.  Raises InputError where there
    are fewer layers than devices.
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


def move_activations(model: PreTrainedModel, split: Split, devices: Sequence[torch.device]) -> None:
    """Let every module that has a device find its tensors there: what it is called with is moved before."""
    for name, number in split.modules.items():
        model.get_submodule(name).register_forward_pre_hook(_mover(devices[number]), with_kwargs=True)


def _mover(device: torch.device) -> Any:
    """A hook that moves the tensors among a module's arguments."""

    def move(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return _on(device, given), _on(device, named)

    return move


def _on(device: torch.device, value: Any) -> Any:
    """The same with its tensors on a device, those in tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_on(device, one) for one in value)
    return {key: _on(device, one) for key, one in value.items()} if type(value) is dict else value


def _blocks(model: PreTrainedModel) -> list[str]:
    """Names of the layers in their order; of one within another the outer."""
    kinds = set(model._no_split_modules or ())
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not any(name.startswith(f"{block}.") for block in found[-1:]):
            found.append(name)
    return found


def _order(blocks: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """For each parameter the number of its layer from 1 on; of others 0 before the last layer, else one more."""
    numbers = {block: number for number, block in enumerate(blocks, 1)}
    found = {name: next((numbers[part] for part in _prefixes(name) if part in numbers), 0) for name in names}
    last = max((index for index, name in enumerate(names) if found[name] == len(blocks)), default=0)
    return found | {name: len(blocks) + 1 for name in names[last + 1 :] if blocks}


def _prefixes(name: str) -> Iterator[str]:
    """The modules that a name lies in, from the outermost on, and itself."""
    return accumulate(name.split("."), lambda left, right: f"{left}.{right}")


def _divide(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """How many layers each device gets, so that the largest share is the smallest; sizes are before, layers, behind."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _fill(sizes, devices, middle) is None else (low, middle)
    counts = _fill(sizes, devices, high)
    assert counts is not None, "all layers but one for each other device fit into the sum"
    return counts


def _fill(sizes: Sequence[int], devices: int, most: int) -> tuple[int, ...] | None:
    """Layers for each device of at most so many parameters, the first ones full; None where they are too many."""
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
    """Each layer, and each module outside of them that has parameters or buffers of its own, with its device."""
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
