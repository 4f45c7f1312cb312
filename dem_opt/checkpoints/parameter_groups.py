"""Groups of a model's parameters, from the study file's words: layers, blocks of layers, tensors, depth, patterns."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.config import REST, Groups
from dem_opt.errors import InputError
from dem_opt.grouping import Grouping

EMBEDDING, HEAD = "embedding", "head"
"""Groups of what stands before and after the layers; with tied embeddings both are one, the embedding."""

_LAYER = re.compile(r"^(?P<stack>(?:[^.]*[^.\d][^.]*\.)+)(?P<number>\d+)\.(?P<rest>.+)$")
"""A name's first numeric part is the number of its layer; what stands before names the stack."""

_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"att|(^|\.)SelfAttention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|(^|\.)fc\d|expert|moe|DenseReluDense", re.IGNORECASE)
_QK = re.compile(r"(q|k|wq|wk|query|key)(_([ab]_)?proj)?")
_VO = re.compile(r"(v|o|wv|wo|value|dense|out|c)(_proj)?")


def parameter_groups(groups: Groups, architecture: Architecture, where: Path | None = None) -> Grouping | None:
    """The grouping that a study file asks for; None for `global`.

    Args:
        groups: `coefficients.groups` of the study file.
        architecture: The base's.
        where: The study file, for messages.

    Raises:
        InputError: A pattern matches nothing, or a parameter that another group has too, or there are fewer layers
            than parts of the depth.
    """
    names = list(architecture.parameters)
    match groups:
        case "global":
            return None
        case "layers":
            return Grouping.of(layer_groups(names, architecture))
        case "blocks":
            layers = layer_groups(names, architecture)
            return Grouping.of({name: _block(name, layers[name], names) for name in names})
        case "tensors":
            return Grouping.of(_tensor_groups(names))
        case {"depth": int(parts)}:
            return Grouping.of(_depth_groups(names, architecture, parts, where))
        case _:
            return Grouping.of(_pattern_groups(names, groups, where))


def layer_groups(names: Sequence[str], architecture: Architecture) -> dict[str, str]:
    """The layer of each parameter by name, as "layers.3", or "encoder.block.3" where a model has several stacks.

    What stands outside of all layers is the embedding, but for an output embedding of its own and the norms before it,
    which are the head.
    """
    layers = {name: match for name in names if (match := _LAYER.match(name))}
    stacks = {match["stack"] for match in layers.values()}
    common = _common_beginning(stacks)
    first = min((place for place, name in enumerate(names) if name in layers), default=0)
    groups = {}
    for place, name in enumerate(names):
        if name in layers:
            groups[name] = f"{layers[name]['stack'].removeprefix(common)}{layers[name]['number']}"
        else:
            groups[name] = HEAD if architecture.head is not None and place > first else EMBEDDING
    return groups


def _tensor_groups(names: Sequence[str]) -> dict[str, str]:
    """A group for each parameter: its name without what all stacks begin with, and without "weight"."""
    common = _common_beginning({match["stack"] for name in names if (match := _LAYER.match(name))})
    short = {name: name.removeprefix(common).removesuffix(".weight") for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _common_beginning(stacks: set[str]) -> str:
    """Parts of names that all stacks begin with, without the last part of the shortest."""
    parts = [stack.split(".")[:-1] for stack in sorted(stacks)]
    if not parts:
        return ""
    common = 0
    while common < min(map(len, parts)) - 1 and len({tuple(part[: common + 1]) for part in parts}) == 1:
        common += 1
    return "".join(f"{part}." for part in parts[0][:common])


def _block(name: str, layer: str, names: Sequence[str]) -> str:
    """The block of a parameter: its layer and its kind; what stands outside of layers is not divided."""
    match = _LAYER.match(name)
    if match is None:
        return layer
    kind = _kind(match["rest"])
    if kind in ("qk", "vo"):
        beginning = name.removesuffix(match["rest"])
        siblings = (_kind(other.removeprefix(beginning)) for other in names if other.startswith(beginning))
        # Where one tensor has queries, keys and values, attention is one block.
        kind = "attention" if "attention" in siblings else kind
    return f"{layer}.{kind}"


def _kind(rest: str) -> str:
    """The kind of a parameter by its name within the layer."""
    if _NORM.search(rest):
        return "norms"
    if _ATTENTION.search(rest):
        module = rest.split(".")[-2:][0]
        return "qk" if _QK.fullmatch(module) else "vo" if _VO.fullmatch(module) else "attention"
    return "mlp" if _MLP.search(rest) else "other"


def _depth_groups(names: Sequence[str], architecture: Architecture, parts: int, where: Path | None) -> dict[str, str]:
    """Consecutive layers in so many parts of nearly equal number; the embedding is in the first, a head in the last."""
    layers = layer_groups(names, architecture)
    numbered = list(dict.fromkeys(layer for layer in layers.values() if layer not in (EMBEDDING, HEAD)))
    if parts > len(numbered):
        mend = f"the base has {len(numbered)} layers; ask for at most as many parts"
        raise InputError(where, "coefficients.groups.depth", parts, mend)
    part = {layer: 1 + place * parts // len(numbered) for place, layer in enumerate(numbered)}
    part |= {EMBEDDING: 1, HEAD: parts}
    return {name: f"depth.{part[layer]}" for name, layer in layers.items()}


def _pattern_groups(
    names: Sequence[str], groups: Mapping[str, int | str | list[str]], where: Path | None
) -> dict[str, str]:
    """Groups by shell patterns on parameter names; those that no pattern matches are `rest`."""
    group_of: dict[str, str] = {}
    for group, patterns in groups.items():
        for pattern in patterns if isinstance(patterns, list) else [str(patterns)]:
            matched = [name for name in names if fnmatchcase(name, pattern)]
            field = f"coefficients.groups.{group}"
            if not matched:
                mend = f"matches no parameter of the base; they are named like {names[len(names) // 2]}"
                raise InputError(where, field, pattern, mend)
            for name in matched:
                if group_of.setdefault(name, group) != group:
                    mend = f"matches {name}, which {group_of[name]} has too; a parameter is in one group"
                    raise InputError(where, field, pattern, mend)
    return {name: group_of.get(name, REST) for name in names}
