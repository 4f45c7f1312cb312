"""Base, vectors and the live model in flat segments.

Parameters lie one after the other in segments, one for each device and combination of stored and live dtypes.  A
segment holds the values of each stored checkpoint as they are, and the live model's, which its parameters are views
of.  Adapters stay factored: what they make of a parameter is computed when a composite needs it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dem_opt.checkpoints.adapters import Edit, load_edits, read_adapter
from dem_opt.checkpoints.architecture import Architecture, describe, parameter_of, stored_dtypes
from dem_opt.checkpoints.device_map import Split, move_activations, split_layers
from dem_opt.checkpoints.files import DTYPES, read_header, read_tensors
from dem_opt.checkpoints.loading import load_parameters, map_parameters, read_parameters
from dem_opt.merging.int8 import Int8Vector, quantize, row_count, row_length
from dem_opt.merging.kernel import MergeKernel, Values
from dem_opt.merging.streaming import BLOCK, Block, StreamedCheckpoints
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

ALIGNMENT = 64
"""Every parameter starts at a multiple of this many elements, so at least of as many bytes."""


class MergedModel:
    """Stored checkpoints and a live model, by layers on its devices; `merge` makes the model any composite of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Sequence[StoredModel],
        devices: Sequence[torch.device | str] = ("cpu",),
        vectors: str = "exact",
        streamed: Collection[str] = (),
    ) -> None:
        """Load every checkpoint straight to its place, and make the model's parameters views of live memory.

        The dtypes of the model's parameters are the evaluation's; composites are rounded to those of the first
        checkpoint.  All must fit (`check_fit`, `check_adapter`).  With `vectors` "int8" the first is the base, which
        is stored as it is, and of each of the others, which are no adapters, only the vector.  Checkpoints whose
        content is `streamed` stay in their files, which are mapped, and pass through the device block by block in
        every merge that has them: the bits are the same.

        Of several `devices` each has some of the layers (`split_layers`): what is stored and live of them, and their
        merges.  The model takes its inputs on the first and moves what its layers are called with.  The same device
        may be named several times; the bits do not depend on how many there are.
        """
        self._devices = [torch.device(one) for one in devices]
        self._split = split_layers(model, len(self._devices))
        distinct = list({one.content: one for one in stored}.values())
        architecture = describe(model)
        compressed = distinct[1:] if vectors == "int8" else []
        whole = [one for one in distinct if one.base is None and one not in compressed]
        self._base = distinct[0].content if compressed else None
        self._segments = _lay_out(model, architecture, whole, self._split, self._devices)
        self._mapped = StreamedCheckpoints(
            {one.content: dict(map_parameters(architecture, one.path)) for one in whole if one.content in streamed}
        )
        for checkpoint in whole:
            if checkpoint.content not in self._mapped:
                self._load(architecture, checkpoint)
        for checkpoint in compressed:
            self._compress(architecture, checkpoint)
        self._edited = {one.content: self._edits_of(one) for one in distinct if one.base is not None}
        self._adopt(model)
        self._kernels = [MergeKernel(one) for one in self._devices]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, and of the live model."""
        flat = [segment.nbytes for segment in self._segments]
        return sum(flat) + sum(edit.nbytes for _, edits in self._edited.values() for edit in edits.values())

    def merge(self, composite: Composite) -> None:
        """Make the live model  Theta_D = sum_n (units_n / 1e9) Theta_n , always from the stored checkpoints.

        Summed in float32 in the composite's order, rounded once to the first checkpoint's dtype, cast to the live
        one.  A single term is copied as it is.  Raises KeyError for content that is not stored.  Of compressed vectors
        v the same composite is made as  Theta + sum_i (units_i / 1e9) v_i .
        """
        if self._base is not None:
            for segment in self._segments:
                kernel = self._kernels[segment.number]
                kernel.merge(segment.live_P, self._from_base(composite, segment), segment.dtype)
            return
        contents = [content for content, _ in composite.terms]
        edited = any(content in self._edited for content in contents)
        mapped = {content for content in map(self._root, contents) if content in self._mapped}
        parts = [(segment, part) for segment in self._segments for part in segment.parts(edited, bool(mapped))]
        blocks = [part.block(segment.live_P.device) for segment, part in parts]
        for (segment, part), fetched in zip(parts, self._mapped.prefetch(sorted(mapped), blocks), strict=True):
            terms = [(units, self._values(content, segment, part, fetched)) for content, units in composite.terms]
            self._kernels[segment.number].merge(segment.live_P[part.slice], terms, segment.dtype)

    def _root(self, content: str) -> str:
        """The checkpoint that a stored model's values are read of: an adapter's is its base."""
        return self._edited[content][0] if content in self._edited else content

    def _from_base(self, composite: Composite, segment: "_Segment") -> list[tuple[int, Values]]:
        """The terms of a composite over a segment: the base, and vectors in the composite's order."""
        assert self._base is not None
        vectors = [(units, segment.vectors_NP[content]) for content, units in composite.terms if content != self._base]
        return [(UNIT, segment.stored_NP[self._base]), *vectors]

    @contextmanager
    def reduce_gradients(self, base: str, fine_tunes: Sequence[str]) -> Iterator[dict[str, float]]:
        """Where `backward` is called within, gradients G of the parameters are not kept; what is kept are the sums of

            < G , Theta_i - Theta >   for each expert i, by content.

        A parameter's gradient is reduced as soon as it is complete, and freed: there is never a second buffer as large
        as the model.  Each parameter has a sum of its own, on its device; these are added in the order of the
        parameters, so that the result depends neither on the order in which gradients come nor on the devices.  The
        dictionary has the sums on leaving.
        """
        places: dict[Tensor, tuple[_Segment, _Place]] = {
            self._parameters[place.name]: (segment, place) for segment in self._segments for place in segment.places
        }

        sums_N: dict[Tensor, Tensor] = {}

        def reduce(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            segment, place = places[parameter]
            base_P, *values_NP = self._differing(base, fine_tunes, segment, place)
            found_N = inner(gradient.reshape(-1), base_P, values_NP, self._kernels[segment.number].block)
            sums_N[parameter] = sums_N[parameter] + found_N if parameter in sums_N else found_N

        hooks = [
            parameter.requires_grad_().register_post_accumulate_grad_hook(reduce)  # type: ignore[no-untyped-call]
            for parameter in places
        ]
        found: dict[str, float] = {}
        try:
            yield found
        finally:
            for hook, parameter in zip(hooks, places, strict=True):
                hook.remove()
                parameter.requires_grad_(False)
        total_N = torch.zeros(len(fine_tunes), dtype=torch.float64)
        for parameter in self._parameters.values():
            total_N += sums_N[parameter].cpu() if parameter in sums_N else 0.0
        found.update(zip(fine_tunes, total_N.tolist(), strict=True))

    def _differing(
        self, base: str, fine_tunes: Sequence[str], segment: "_Segment", place: "_Place"
    ) -> Iterator[Values]:
        """Values at a place, the first of which is to be subtracted from the others: nothing, from vectors."""
        if self._base is None:
            return (self._values(content, segment, place) for content in (base, *fine_tunes))
        assert base == self._base
        none_P = torch.zeros((), device=segment.live_P.device).expand(place.shape.numel())
        vectors = (
            segment.vectors_NP[content].within(place.slice) if content != base else none_P for content in fine_tunes
        )
        return chain((none_P,), vectors)

    def _values(
        self, content: str, segment: "_Segment", place: "_Place", fetched: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """A checkpoint's values at a place, flat; those of an adapter are computed, mapped ones may be fetched."""
        if content in self._mapped:
            block = place.block(segment.live_P.device)
            return self._mapped.values(content, block) if fetched is None else fetched[content]
        if content not in self._edited:
            return segment.stored_NP[content][place.slice]
        base, edits = self._edited[content]
        values_P = self._values(base, segment, place, fetched)
        return edits[place.name].apply(values_P.view(place.shape)).reshape(-1) if place.name in edits else values_P

    def _load(self, architecture: Architecture, checkpoint: StoredModel) -> None:
        """Read a checkpoint's parameters from its files to their places."""
        places: dict[str, Tensor] = {}
        for segment in self._segments:
            dtype = segment.dtypes[checkpoint.content]
            flat_P = torch.zeros(segment.size, dtype=dtype, device=segment.live_P.device)
            segment.stored_NP[checkpoint.content] = flat_P
            places |= {place.name: segment.view(flat_P, place) for place in segment.places}
        load_parameters(architecture, checkpoint.path, places)

    def _compress(self, architecture: Architecture, checkpoint: StoredModel) -> None:
        """Read a checkpoint parameter by parameter and keep its vectors."""
        assert self._base is not None and checkpoint.base is None
        places: dict[str, tuple[Tensor, Int8Vector]] = {}
        for segment in self._segments:
            vectors = segment.vectors_NP[checkpoint.content] = segment.no_vector()
            base_P = segment.stored_NP[self._base]
            places |= {
                place.name: (segment.view(base_P, place), vectors.within(place.slice)) for place in segment.places
            }
        for name, tensor in read_parameters(architecture, checkpoint.path, places):
            quantize(tensor, *places[name])

    def _edits_of(self, adapter: StoredModel) -> tuple[str, dict[str, Edit]]:
        """The base that an adapter edits, and its edits."""
        assert adapter.base is not None
        devices = {name: self._devices[number] for name, number in self._split.places.items()}
        return adapter.base, load_edits(read_adapter(adapter.path, "adapter"), devices)

    def _adopt(self, model: PreTrainedModel) -> None:
        """Make the model's parameters views of the live segments, and move its buffers to where they are needed."""
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        for segment in self._segments:
            for place in segment.places:
                self._parameters[place.name].data = segment.view(segment.live_P, place)
        for path, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                number = self._split.places[f"{path}.{name}".lstrip(".")]
                setattr(module, name, buffer.to(self._devices[number]))
        move_activations(model, self._split, self._devices)


def inner(gradient_P: Tensor, base_P: Values, stored_NP: Sequence[Values], block: int) -> Tensor:
    """< g , x_n - x_0 >  for each n over flat tensors: in float32 for each block, summed in float64.

    Differences are formed first, because those of inner products would cancel.  Block by block, gradient and base are
    read once for all n.  A float64 gradient makes everything float64.
    """
    wide = torch.promote_types(gradient_P.dtype, torch.float32)
    sums_N = torch.zeros(len(stored_NP), dtype=torch.float64, device=gradient_P.device)
    for start in range(0, len(gradient_P), block):
        part = slice(start, start + block)
        g_P, x0_P = gradient_P[part].to(wide), base_P[part].to(wide)
        sums_N += torch.stack([torch.dot(x_P[part] - x0_P, g_P) for x_P in stored_NP]).double()
    return sums_N


Named = Iterator[tuple[str, Tensor]]


def merged_tensors(
    architecture: Architecture,
    base: StoredModel,
    stored: Mapping[str, StoredModel],
    composite: Composite,
    names: Sequence[str],
    dtype: torch.dtype | None = None,
) -> Named:
    """A composite's tensors one at a time, straight from the files, under the base's names for them.

    `stored` holds checkpoints and adapters by content.  Each tensor has the base's dtype, or its own where the
    composite is a single checkpoint.  Given a `dtype`, the float32 sums are rounded to that once, and to no other.
    What transformers fuses on loading is merged as it is stored: fusing only moves values.
    """
    header = read_header(base.path, "base")
    dtypes = {name: DTYPES[header.tensors[name].dtype] for name in names}
    readers = [_tensors(architecture, base, names, stored[content]) for content, _ in composite.terms]
    return _merge_each(readers, composite, dtypes, dtype)


def _merge_each(
    readers: Sequence[Named], composite: Composite, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> Named:
    """Merge what the readers of a composite's terms give, one tensor after the other."""
    kernel, alone = MergeKernel(), len(composite.terms) == 1
    for tensors in zip(*readers, strict=True):
        name, first = tensors[0]
        merged = torch.empty(first.shape, dtype=dtype or (first.dtype if alone else dtypes[name]))
        terms = [(units, x.reshape(-1)) for (_, units), (_, x) in zip(composite.terms, tensors, strict=True)]
        kernel.merge(merged.view(-1), terms, merged.dtype)
        yield name, merged


def _tensors(architecture: Architecture, base: StoredModel, names: Sequence[str], model: StoredModel) -> Named:
    """What a checkpoint, or an adapter, has in the place of the base's stored tensors."""
    header = read_header(base.path, "base")
    parameters = parameter_of(architecture, header)
    if model.base is not None:
        return _edited(model, read_tensors(header, names), parameters)
    other = read_header(model.path, "checkpoint")
    layout = architecture.layout(other)
    theirs = [name if parameters[name] in layout.fused else layout.sources[parameters[name]][0] for name in names]
    return ((name, tensor) for name, (_, tensor) in zip(names, read_tensors(other, theirs), strict=True))


def _edited(model: StoredModel, values: Named, parameters: Mapping[str, str]) -> Named:
    """The base's values with an adapter's edits; `parameters` tells which parameter a value is of."""
    edits = load_edits(read_adapter(model.path, "adapter"))
    for name, tensor in values:
        edit = edits.get(parameters[name])
        yield name, tensor if edit is None else edit.apply(tensor)


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in its segment, or a part of it from its element `first` on."""

    name: str
    shape: torch.Size
    start: int
    first: int = 0

    @property
    def slice(self) -> slice:
        """Its elements."""
        return slice(self.start, self.start + self.shape.numel())

    def parts(self, size: int) -> Iterator["_Place"]:
        """Its elements, so many at a time."""
        for first in range(0, self.shape.numel(), size):
            count = min(size, self.shape.numel() - first)
            yield _Place(self.name, torch.Size([count]), self.start + first, first)

    def block(self, device: torch.device) -> Block:
        """What of its parameter it is."""
        return Block(self.name, slice(self.first, self.first + self.shape.numel()), device)


@dataclass(frozen=True)
class _Segment:
    """Parameters of one device, alike in dtype: of N checkpoints by content hash, their vectors, and the live ones.

    number  the device's
    dtype   what composites are rounded to
    dtypes  what each checkpoint stores, by content
    """

    number: int
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    places: Sequence[_Place]
    size: int
    live_P: Tensor
    stored_NP: dict[str, Tensor]
    vectors_NP: dict[str, Int8Vector] = field(default_factory=dict)

    def parts(self, edited: bool, mapped: bool) -> Sequence[_Place]:
        """What is merged at once: parameters that adapters edit, blocks of mapped files, or all of it."""
        if edited:
            return self.places
        if mapped:
            return [part for place in self.places for part in place.parts(BLOCK)]
        return [_Place("", torch.Size([self.size]), 0)]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        flat = sum(x.nbytes for x in (self.live_P, *self.stored_NP.values()))
        vectors = sum(x.nbytes for x in self.vectors_NP.values())
        return flat + vectors + (self.starts_R.nbytes if vectors else 0)

    @cached_property
    def starts_R(self) -> Tensor:
        """Where each row of its parameters begins; what follows a parameter belongs to its last row, and is zero."""
        starts = [torch.arange(row_count(one.shape)) * row_length(one.shape) + one.start for one in self.places]
        return torch.cat(starts).to(self.live_P.device)

    def no_vector(self) -> Int8Vector:
        """A vector of zeros."""
        zeros_P = torch.zeros(self.size, dtype=torch.int8, device=self.live_P.device)
        return Int8Vector(zeros_P, torch.zeros(len(self.starts_R), device=self.live_P.device), self.starts_R)

    def view(self, flat_P: Tensor, place: _Place) -> Tensor:
        """One parameter's part of a flat tensor."""
        return flat_P[place.slice].view(place.shape)


def _lay_out(
    model: PreTrainedModel,
    architecture: Architecture,
    stored: Sequence[StoredModel],
    split: Split,
    devices: Sequence[torch.device],
) -> list[_Segment]:
    """Empty segments for a model's parameters, in the order of `named_parameters()` (tied weights once)."""
    dtypes = {one.content: stored_dtypes(architecture, one.path) for one in stored}
    groups: dict[tuple[int, tuple[torch.dtype, ...]], list[_Place]] = {}
    sizes: dict[tuple[int, tuple[torch.dtype, ...]], int] = {}
    for name, parameter in model.named_parameters():
        group = split.places[name], (*(by_name[name] for by_name in dtypes.values()), parameter.dtype)
        start = sizes.get(group, 0)
        groups.setdefault(group, []).append(_Place(name, parameter.shape, start))
        sizes[group] = start + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return [
        _Segment(
            number=number,
            dtype=alike[0],
            dtypes=dict(zip(dtypes, alike, strict=False)),
            places=places,
            size=sizes[number, alike],
            live_P=torch.zeros(sizes[number, alike], dtype=alike[-1], device=devices[number]),
            stored_NP={},
        )
        for (number, alike), places in groups.items()
    ]
