"""Base, vectors and the live model in flat segments; the merge kernel.

Parameters lie one after the other in segments, one for each pair of stored and live dtype.  A segment holds
the values of each stored checkpoint as they are, and the live model's, which its parameters are views of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dem_opt.checkpoints import DTYPES, read_header, read_parameters
from dem_opt.records import Composite, StoredModel
from dem_opt.simplex import UNIT

ALIGNMENT = 64
"""Every parameter starts at a multiple of this many elements, so at least of as many bytes."""

CPU_BLOCK = 2**19
"""Elements merged at once on a CPU: few enough that float32 scratch stays in cache, and many, because threads wait
for each other after every operation."""

DEVICE_BLOCK = 2**24
"""Elements merged at once elsewhere: enough to hide the launching of kernels, and below 2**31."""


class Arena:
    """Stored checkpoints and a live model on one device; `merge` makes the model any composite of them."""

    def __init__(
        self, model: PreTrainedModel, stored: Sequence[StoredModel], device: torch.device | str = "cpu"
    ) -> None:
        """Load every checkpoint straight to its place, and make the model's parameters views of live memory.

        The dtypes of the model's parameters are the evaluation's.  The checkpoints must fit (`check_fit`).
        """
        self.device = torch.device(device)
        self._segments = _lay_out(model, stored[0], self.device)
        for checkpoint in {one.content: one for one in stored}.values():
            self._load(checkpoint)
        self._adopt(model)
        self._kernel = MergeKernel(self.device)

    @property
    def contents(self) -> frozenset[str]:
        """Content hashes of the checkpoints that are stored."""
        return frozenset(self._segments[0].stored_NP)

    @property
    def nbytes(self) -> int:
        """Bytes of the segments: the stored checkpoints and the live model."""
        flats = [flat for one in self._segments for flat in (one.live_P, *one.stored_NP.values())]
        return sum(flat.nbytes for flat in flats)

    def merge(self, composite: Composite) -> None:
        """Make the live model  Theta_D = sum_n (units_n / 1e9) Theta_n , always from the stored checkpoints.

        Summed in float32 in the composite's order, rounded once to the stored dtype, cast to the live one.
        A single term is copied as it is.  Raises KeyError for content that is not stored.
        """
        for segment in self._segments:
            terms = [(units, segment.stored_NP[content]) for content, units in composite.terms]
            self._kernel.merge(segment.live_P, terms)

    def _load(self, checkpoint: StoredModel) -> None:
        """Copy a checkpoint's parameters from its files to their places."""
        places = {place.name: (place, segment) for segment in self._segments for place in segment.places}
        for segment in self._segments:
            stored_P = torch.zeros(segment.size, dtype=segment.dtype, device=self.device)
            segment.stored_NP[checkpoint.content] = stored_P
        for name, tensor in read_parameters(checkpoint.path, places):
            place, segment = places[name]
            assert (tensor.dtype, tensor.shape) == (segment.dtype, place.shape), f"{name}: {checkpoint.path}"
            segment.view(segment.stored_NP[checkpoint.content], place).copy_(tensor)

    def _adopt(self, model: PreTrainedModel) -> None:
        """Make the model's parameters views of the live segments, and move its buffers to the device."""
        parameters = dict(model.named_parameters())
        for segment in self._segments:
            for place in segment.places:
                parameters[place.name].data = segment.view(segment.live_P, place)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))


class MergeKernel:
    """The one place where weights are summed, block by block through scratch memory that is allocated once.

    Multiplication and addition are rounded separately.  `add_(x, alpha=w)` may fuse them in its vector loop
    and not in the loop's tail, and then a weight's bits would depend on its position, on blocks and threads.
    """

    def __init__(self, device: torch.device | str = "cpu", block: int | None = None) -> None:
        """Scratch for `block` elements; by default as many as suit the device.  The bits are the same."""
        self.block = block or (CPU_BLOCK if torch.device(device).type == "cpu" else DEVICE_BLOCK)
        self._sum_P = torch.empty(self.block, dtype=torch.float32, device=device)
        self._term_P = torch.empty(self.block, dtype=torch.float32, device=device)

    def merge(self, out_P: Tensor, terms: Sequence[tuple[int, Tensor]]) -> None:
        """out = sum_n (units_n / 1e9) x_n  over flat tensors of one dtype, rounded to it, cast to out's.

        Terms are (units of 1e-9, values), summed in the order given.  Coefficients are rounded to float32.  A single
        term is copied, which keeps its bits even where the processor flushes denormal numbers to zero.
        """
        if len(terms) == 1 and terms[0][0] == UNIT:
            out_P.copy_(terms[0][1])
            return
        weights = [units / UNIT for units, _ in terms]
        weights_N1 = torch.split(torch.tensor(weights, dtype=torch.float32, device=out_P.device), 1)
        for start in range(0, len(out_P), self.block):
            block = slice(start, start + self.block)
            self._merge_block(out_P[block], weights_N1, [x_P[block] for _, x_P in terms])

    def _merge_block(self, out_P: Tensor, weights_N1: Sequence[Tensor], stored_NP: Sequence[Tensor]) -> None:
        """The same for one block that fits the scratch.  A float32 weight makes every product float32."""
        stored_dtype = stored_NP[0].dtype
        in_place = out_P.dtype == stored_dtype == torch.float32
        sum_P = out_P if in_place else self._sum_P[: len(out_P)]
        term_P = self._term_P[: len(out_P)]
        torch.mul(stored_NP[0], weights_N1[0], out=sum_P)
        for weight_1, x_P in zip(weights_N1[1:], stored_NP[1:], strict=True):
            sum_P.add_(torch.mul(x_P, weight_1, out=term_P))
        if not in_place:
            out_P.copy_(sum_P.to(stored_dtype))


def merged_parameters(
    names: Sequence[str], folders: Mapping[str, Path], composite: Composite
) -> Iterator[tuple[str, Tensor]]:
    """A composite's parameters one at a time, in the stored dtype, straight from the files: the arena's bits.

    `folders` maps content hashes to checkpoint folders.  No more than one parameter is held in memory.
    """
    kernel = MergeKernel()
    readers = [read_parameters(folders[content], names) for content, _ in composite.terms]
    for tensors in zip(*readers, strict=True):
        name, first = tensors[0]
        merged = torch.empty(first.shape, dtype=first.dtype)
        terms = [(units, x.reshape(-1)) for (_, units), (_, x) in zip(composite.terms, tensors, strict=True)]
        kernel.merge(merged.view(-1), terms)
        yield name, merged


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in its segment."""

    name: str
    shape: torch.Size
    start: int


@dataclass(frozen=True)
class _Segment:
    """Parameters of one stored and one live dtype: of N checkpoints by content hash, and the live ones."""

    dtype: torch.dtype
    places: Sequence[_Place]
    size: int
    live_P: Tensor
    stored_NP: dict[str, Tensor]

    def view(self, flat_P: Tensor, place: _Place) -> Tensor:
        """One parameter's part of a flat tensor."""
        return flat_P[place.start : place.start + place.shape.numel()].view(place.shape)


def _lay_out(model: PreTrainedModel, stored: StoredModel, device: torch.device) -> list[_Segment]:
    """Empty segments for a model's parameters, in the order of `named_parameters()` (tied weights once)."""
    tensors = read_header(stored.path, "checkpoint").tensors
    groups: dict[tuple[torch.dtype, torch.dtype], list[_Place]] = {}
    sizes: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for name, parameter in model.named_parameters():
        group = DTYPES[tensors[name].dtype], parameter.dtype
        start = sizes.get(group, 0)
        groups.setdefault(group, []).append(_Place(name, parameter.shape, start))
        sizes[group] = start + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return [
        _Segment(group[0], places, sizes[group], torch.zeros(sizes[group], dtype=group[1], device=device), {})
        for group, places in groups.items()
    ]
