"""Match the names of stored tensors with the parameters of a model class, by transformers' rules.

Names that a wrapper changed are understood where one change of their beginning gives every parameter.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from dem_opt.checkpoints.files import DTYPES, Header
from dem_opt.errors import InputError

if TYPE_CHECKING:
    from dem_opt.checkpoints.architecture import Architecture

Form = tuple[tuple[int, ...], ...]
"""The shapes of the stored tensors that a parameter is made of."""

_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""Modules that torch.compile, FSDP, activation checkpointing and DeepSpeed put around others, anywhere in a name."""

_GROUPS = 4
"""Most groups of names in a message."""


class Renaming(NamedTuple):
    """Names without wrapper modules that begin with `old` begin with `new` instead."""

    old: str = ""
    new: str = ""

    def __call__(self, stored: str) -> str:
        """The plain name."""
        name = _WRAPPER.sub("", stored)
        return self.new + name[len(self.old) :] if name.startswith(self.old) else name

    def changes(self, names: Iterable[str]) -> bool:
        """Any of the names has another plain name."""
        return any(self(name) != name for name in names)


@dataclass(frozen=True)
class Layout:
    """The stored tensors that each parameter of a checkpoint is made of.

    Attributes:
        renaming: Turns stored names into those that the class understands.
        sources: Stored names by parameter.
        fused: Parameters that are converted on loading, and not one stored tensor as it is.
        aliases: Stored names of tied weights, with the parameter that each repeats.
        buffers: Stored name by buffer.
        outside: Stored names of parameters that are no part of the language model, such as a vision tower's.
        unused: Stored names that the class does not load.
        borrowed: The parameter, input or output embedding, that takes the other's tensor because it is not stored.
        ambiguous: Other beginnings of names that would give every parameter as well.
    """

    renaming: Renaming
    sources: dict[str, list[str]] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    borrowed: str | None = None
    ambiguous: tuple[str, ...] = ()

    @property
    def kept(self) -> list[str]:
        """Stored names that a merge leaves alone: buffers, and tensors outside of the language model."""
        return [*self.buffers.values(), *self.outside, *self.unused]

    def dtype(self, header: Header, parameter: str) -> torch.dtype:
        """The dtype that a parameter is stored in.

        Raises:
            InputError: It is fused from tensors of several dtypes, or stored in one that can't be merged.
        """
        dtypes = {header.tensors[stored].dtype for stored in self.sources[parameter]}
        if len(dtypes) > 1:
            mend = f"{parameter} is fused from tensors of {', '.join(sorted(dtypes))}: save them in one dtype"
            raise InputError(header.folder, header.field, None, mend)
        (dtype,) = dtypes
        if dtype not in DTYPES:
            mend = f"tensor {self.sources[parameter][0]} is {dtype}: only {', '.join(DTYPES)} can be merged"
            raise InputError(header.folder, header.field, None, mend)
        return DTYPES[dtype]

    def form(self, header: Header, parameter: str) -> Form:
        """The shapes of the stored tensors behind a parameter."""
        return tuple(header.tensors[stored].shape for stored in self.sources[parameter])

    def stored_as(self, parameter: str, plain: str) -> str:
        """The stored name of a parameter, or of the part of a fused one that has this plain name in all checkpoints."""
        if parameter not in self.fused:
            return self.sources[parameter][0]
        return next(stored for stored in self.sources[parameter] if self.renaming(stored) == plain)

    def plain_sources(self, parameter: str) -> list[str]:
        """Plain names of the tensors behind a parameter; none where it is missing."""
        return [self.renaming(stored) for stored in self.sources.get(parameter, ())]


def lay_out(architecture: "Architecture", names: Sequence[str]) -> Layout:
    """Match stored names with parameters.

    Old names are renamed, and stored tensors fused or transposed into the parameter that the class has now.  Where
    parameters are missing, names are tried with another beginning.
    """
    layout = _match(architecture, names, Renaming())
    if not missing(architecture, layout):
        return layout
    candidates = [_match(architecture, names, renaming) for renaming in _renamings(architecture, names)]
    complete = [candidate for candidate in candidates if not missing(architecture, candidate)]
    if not complete:
        return layout
    return replace(complete[0], ambiguous=tuple(candidate.renaming.old for candidate in complete[1:]))


def missing(architecture: "Architecture", layout: Layout) -> list[str]:
    """Parameters that have no stored tensor."""
    return [name for name in architecture.parameters if name not in layout.sources]


def grouped(names: Iterable[str]) -> str:
    """Names by groups with counts: "model.layers.2.* (9)"; numbers that differ are one group."""
    parts = [name.split(".") for name in names]
    for depth in range(max(map(len, parts)), 0, -1):
        groups = Counter(_group(name, depth) for name in parts)
        starred = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", _group(name, depth)) for name in parts)
        groups = starred if len(starred) < len(groups) else groups
        if len(groups) <= _GROUPS:
            break
    shown = ", ".join(f"{group} ({count:,})" if count > 1 else group for group, count in groups.most_common(_GROUPS))
    return shown + (f" and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else "")


def _group(parts: Sequence[str], depth: int) -> str:
    return ".".join(parts if len(parts) <= depth else [*parts[:depth], "*"])


def _match(architecture: "Architecture", names: Sequence[str], renaming: Renaming) -> Layout:
    """Match names after a renaming."""
    layout = Layout(renaming)
    for stored in names:
        name, converted = architecture.rules.target(renaming(stored))
        if name in architecture.parameters:
            layout.sources.setdefault(name, []).append(stored)
            if converted:
                layout.fused.add(name)
        elif name in architecture.aliases:
            layout.aliases[stored] = architecture.aliases[name]
        elif name in architecture.buffers:
            layout.buffers[name] = stored
        elif name in architecture.outside:
            layout.outside.append(stored)
        else:
            layout.unused.append(stored)
    return _tie(architecture, layout)


def _tie(architecture: "Architecture", layout: Layout) -> Layout:
    """Give tied parameters the tensor that is stored under another name, as transformers does.

    That an untied class has a checkpoint with one embedding is no fault of its names; `check_fit` asks its config.
    """
    for alias, name in list(layout.aliases.items()):
        if name not in layout.sources:
            layout.sources[name] = [alias]
            del layout.aliases[alias]
    pair = (architecture.head, architecture.embedding)
    for absent, stored in (pair, pair[::-1]):
        if absent is not None and absent not in layout.sources and stored in layout.sources:
            layout.sources[absent] = layout.sources[stored]
            return replace(layout, borrowed=absent)
    return layout


def _renamings(architecture: "Architecture", names: Sequence[str]) -> Iterator[Renaming]:
    """For each stored name that ends like the input embedding's, the change of beginning that would give it."""
    tied = [alias for alias, name in architecture.aliases.items() if name == architecture.embedding]
    tried = set()
    for target in (architecture.embedding, *tied):
        for stored in names:
            renaming = _common_end(_WRAPPER.sub("", stored), target)
            if renaming is not None and renaming not in tried:
                tried.add(renaming)
                yield renaming


def _common_end(stored: str, target: str) -> Renaming | None:
    """The beginnings of two names before their longest common end of two or more parts."""
    old, new = stored.split("."), target.split(".")
    common = 0
    while common < min(len(old), len(new)) and old[-1 - common] == new[-1 - common]:
        common += 1
    if common < 2:
        return None
    start, wanted = old[: len(old) - common], new[: len(new) - common]
    return Renaming(*("".join(f"{part}." for part in parts) for parts in (start, wanted)))


def renamed(renaming: Renaming, names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Numbers of names that a renaming changes, and what is done to them in words."""
    names = list(names)
    parts = Counter(part for name in names for part in _WRAPPER.findall(name))
    yield from ((count, f"named with {part!r}, which is left out of the name") for part, count in parts.items())
    count = sum(_WRAPPER.sub("", name).startswith(renaming.old) for name in names)
    if renaming.new:
        yield count, f"named with {renaming.old!r} in the place of {renaming.new!r}"
    elif renaming.old:
        yield count, f"named with {renaming.old!r}, which is left out of the name"
