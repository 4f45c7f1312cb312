"""Segments: parameters of one device with the same dtypes, one after the other in flat tensors.

Shape suffixes: P flat elements of a segment, N stored checkpoints, R rows of int8 vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from dem_opt.merging.dither import Dither
from dem_opt.merging.int8 import Int8Vector, row_count, row_length
from dem_opt.merging.streaming import BLOCK, Block
from dem_opt.types import Composite

ALIGNMENT = 64
"""Every parameter starts at a multiple of so many elements, hence of at least so many bytes: a cache line."""


@dataclass(frozen=True)
class ParameterSlice:
    """Where a parameter lies in its segment, or a part of it from its element `first` on."""

    name: str
    shape: torch.Size
    start: int
    first: int = 0

    @property
    def slice(self) -> slice:
        """Its elements in the segment."""
        return slice(self.start, self.start + self.shape.numel())

    def parts(self, size: int) -> Iterator["ParameterSlice"]:
        """Divide it into parts of at most `size` elements."""
        for first in range(0, self.shape.numel(), size):
            count = min(size, self.shape.numel() - first)
            yield ParameterSlice(self.name, torch.Size([count]), self.start + first, first)

    def block(self, device: torch.device) -> Block:
        """Its elements in the parameter."""
        return Block(self.name, slice(self.first, self.first + self.shape.numel()), device)


@dataclass(kw_only=True)
class Layout:
    """A segment before it is allocated: which parameters lie where.

    Attributes:
        device: The device's number.
        stored: Dtype in each stored checkpoint; the first is the base's, which composites are rounded to.
        live: Dtype of the live parameters.
        size: Elements, padding included.
    """

    device: int
    stored: tuple[torch.dtype, ...]
    live: torch.dtype
    slices: list[ParameterSlice] = field(default_factory=list)
    size: int = 0

    def append(self, name: str, shape: tuple[int, ...]) -> None:
        """Add a parameter at the next aligned place."""
        place = ParameterSlice(name, torch.Size(shape), self.size)
        self.slices.append(place)
        self.size += -(-place.shape.numel() // ALIGNMENT) * ALIGNMENT


def lay_out(
    shapes: Mapping[str, tuple[int, ...]],
    stored: Sequence[Mapping[str, torch.dtype]],
    live: Mapping[str, torch.dtype],
    devices: Mapping[str, int],
) -> list[Layout]:
    """Group parameters by device and dtypes, in their order; pure arithmetic, shared with `memory_bytes`."""
    layouts: dict[tuple[int, tuple[torch.dtype, ...], torch.dtype], Layout] = {}
    for name, shape in shapes.items():
        device, dtypes = devices[name], tuple(by_name[name] for by_name in stored)
        key = device, dtypes, live[name]
        if key not in layouts:
            layouts[key] = Layout(device=device, stored=dtypes, live=live[name])
        layouts[key].append(name, shape)
    return list(layouts.values())


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Parameters of one device with the same dtypes: of stored checkpoints, int8 vectors, and the merged model.

    Attributes:
        device: The device's number.
        dtype: The base's dtype, which composites are rounded to.
        dtypes: Dtype in each stored checkpoint, by content.
        slices: Where each parameter lies.
        size: Elements, padding included.
        live_P: The live values.
        stored_NP: Values of each stored checkpoint, by content.
        vectors_NP: Quantized vectors, by content.
    """

    device: int
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    slices: Sequence[ParameterSlice]
    size: int
    live_P: Tensor
    stored_NP: dict[str, Tensor] = field(default_factory=dict)
    vectors_NP: dict[str, Int8Vector] = field(default_factory=dict)

    def parts(self, has_adapters: bool) -> Sequence[ParameterSlice]:
        """Divide a merge: by parameter for adapters, else by block, for streamed checkpoints."""
        return self.slices if has_adapters else [part for place in self.slices for part in place.parts(BLOCK)]

    def runs(self, composite: Composite) -> Sequence[ParameterSlice]:
        """Divide it into runs of neighbouring parameters with the same terms, each named by its first parameter."""
        if not composite.parts:
            return [ParameterSlice("", torch.Size([self.size]), 0)]
        firsts = [next(run) for _, run in groupby(self.slices, key=lambda place: composite.terms_of(place.name))]
        ends = [*(first.start for first in firsts[1:]), self.size]
        return [
            ParameterSlice(first.name, torch.Size([end - first.start]), first.start)
            for first, end in zip(firsts, ends, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        flat = sum(x.nbytes for x in (self.live_P, *self.stored_NP.values()))
        vectors = sum(x.nbytes for x in self.vectors_NP.values())
        return flat + vectors + (self.starts_R.nbytes if vectors else 0)

    @cached_property
    def starts_R(self) -> Tensor:
        """First element of each row of its parameters; the padding behind a parameter belongs to its last row."""
        starts = [torch.arange(row_count(x.shape)) * row_length(x.shape) + x.start for x in self.slices]
        return torch.cat(starts).to(self.live_P.device)

    @cached_property
    def states(self) -> Dither:
        """Of its elements, for stochastic rounding: they depend on names and on places in parameters alone."""
        return Dither.of([(place.start, place.name, place.first) for place in self.slices])

    def view(self, flat_P: Tensor, place: ParameterSlice) -> Tensor:
        """View one parameter's part of a flat tensor in its shape."""
        return flat_P[place.slice].view(place.shape)
