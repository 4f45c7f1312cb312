"""Stored checkpoints and the merged model, in flat segments.

    Theta_D = sum_n (units_n / 1e9) Theta_n

Parameters lie one after the other in segments, one segment for each device and combination of stored and live dtypes.
A segment holds the values of each stored checkpoint as they are, and the live values, which the model's parameters are
views of; so a merge is a few passes over long flat tensors.  Adapters stay factored: what they make of a parameter is
computed when a composite needs it.

Shape suffixes: P flat elements of a segment, N stored checkpoints, R rows of int8 vectors.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dem_opt.checkpoints.adapter_edits import Edit
from dem_opt.checkpoints.adapters import load_edits, read_adapter
from dem_opt.checkpoints.architecture import Architecture, describe, stored_dtypes
from dem_opt.checkpoints.device_map import move_activations, split_layers
from dem_opt.checkpoints.files import Header, read_header
from dem_opt.checkpoints.loading import load_parameters, map_parameters, read_parameters
from dem_opt.checkpoints.vocabulary import with_base_rows
from dem_opt.merging.int8 import Int8Vector, quantize, row_count, row_starts_bytes
from dem_opt.merging.kernel import CPU_BLOCK, DEVICE_BLOCK, MergeKernel, Values
from dem_opt.merging.segments import ParameterSlice, Segment, lay_out
from dem_opt.merging.streaming import StreamedCheckpoints
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Gradient, ParameterGradient, StoredModel, Terms


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """Bytes of a merged model on one device.

    Attributes:
        live: The live parameters.
        checkpoints: Each stored checkpoint, adapter or int8 vector, in the order of the headers, if none is streamed.
        row_starts: The row boundaries that all int8 vectors share.
    """

    live: int
    checkpoints: tuple[int, ...]
    row_starts: int = 0

    @property
    def stored(self) -> int:
        """Everything but the live parameters."""
        return sum(self.checkpoints) + self.row_starts


class MergedModel:
    """Stored checkpoints and a merged model on its devices; `merge` makes the merged model any composite of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Sequence[StoredModel],
        devices: Sequence[torch.device | str] = ("cpu",),
        vectors: str = "exact",
        streamed: Collection[str] = (),
    ) -> None:
        """Load every checkpoint straight into its segments, and make the model's parameters views of live memory.

        Args:
            model: An empty model; the dtypes of its parameters are the evaluation's.
            stored: Checkpoints and adapters that fit the model (`check_fit`, `check_adapter`).  Composites are rounded
                to the dtypes of the first checkpoint, the base, in its `rounding`.
            devices: Each holds and merges a share of the layers (`split_layers`); the model takes its inputs on the
                first, and activations move between them.  A device may be named several times.  The bits do not depend
                on the number of devices.
            vectors: "exact", or "int8" to keep of every checkpoint but the base only its quantized vector; adapters
                are not allowed then.
            streamed: Contents of checkpoints that stay in their memory-mapped files and pass through the device block
                by block in every merge that needs them, with the same bits.
        """
        self._devices = [torch.device(device) for device in devices]
        self._split = split_layers(model, len(self._devices))
        self._is_stochastic = stored[0].rounding == "stochastic"
        distinct = list({checkpoint.content: checkpoint for checkpoint in stored}.values())
        architecture = describe(model)
        quantized = distinct[1:] if vectors == "int8" else []
        whole = [checkpoint for checkpoint in distinct if checkpoint.base is None and checkpoint not in quantized]
        self._quantized_base = distinct[0].content if quantized else None
        base = read_header(distinct[0].path, distinct[0].field)
        headers = {
            x.content: with_base_rows(architecture, base, read_header(x.path, x.field)) for x in (*whole, *quantized)
        }
        self._segments = self._allocate(model, architecture, {x.content: headers[x.content] for x in whole})
        self._streamed = StreamedCheckpoints(
            {
                checkpoint.content: dict(map_parameters(architecture, headers[checkpoint.content]))
                for checkpoint in whole
                if checkpoint.content in streamed
            }
        )
        for checkpoint in whole:
            if checkpoint.content not in self._streamed:
                self._load(architecture, checkpoint.content, headers[checkpoint.content])
        for checkpoint in quantized:
            self._quantize(architecture, checkpoint.content, headers[checkpoint.content])
        adapters = [checkpoint for checkpoint in distinct if checkpoint.base is not None]
        self._adapters = {adapter.content: self._edits_of(architecture, adapter) for adapter in adapters}
        self._adopt(model)
        self._kernels = [MergeKernel(device) for device in self._devices]

    @staticmethod
    def memory_bytes(
        architecture: Architecture,
        headers: Sequence[Header],
        *,
        dtype: torch.dtype,
        vectors: str = "exact",
        names: Collection[str] | None = None,
    ) -> ModelBytes:
        """Count what a merged model allocates on one device, from headers alone.

        Args:
            architecture: The base's.
            headers: Checkpoints and adapters with different contents, the base first.
            dtype: The evaluation's dtype.
            vectors: "exact" or "int8".
            names: The parameters that the device holds; all by default.
        """
        names = architecture.parameters if names is None else names
        shapes = {name: architecture.parameters[name] for name in architecture.parameters if name in names}
        whole = [header for header in (headers[:1] if vectors == "int8" else headers) if not header.adapter]
        stored = [stored_dtypes(architecture, header) for header in whole]
        layouts = lay_out(shapes, stored, dict.fromkeys(shapes, dtype), dict.fromkeys(shapes, 0))
        elements, rows = sum(layout.size for layout in layouts), sum(map(row_count, shapes.values()))
        flat = {
            id(header): sum(layout.size * layout.stored[number].itemsize for layout in layouts)
            for number, header in enumerate(whole)
        }
        return ModelBytes(
            live=elements * dtype.itemsize,
            checkpoints=tuple(
                flat[id(header)]
                if id(header) in flat
                else read_adapter(header.folder, header.field).memory_bytes(architecture, shapes)
                if header.adapter
                else Int8Vector.memory_bytes(elements, rows)
                for header in headers
            ),
            row_starts=row_starts_bytes(rows) if vectors == "int8" and len(headers) > 1 else 0,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, and of the live parameters."""
        segments = sum(segment.nbytes for segment in self._segments)
        return segments + sum(edit.nbytes for _, edits in self._adapters.values() for edit in edits.values())

    def merge(self, composite: Composite) -> None:
        """Make the merged model  Theta_D = sum_n (units_n / 1e9) Theta_n , always from the stored checkpoints.

        Summed in float32 in the composite's order, rounded once to the base's dtype, then cast to the live one.  A
        single term is copied as it is, rounded where the composite has other parts.  With int8 vectors v the sum is
        Theta + sum_i (units_i / 1e9) v_i .  Neighbouring parameters with the same terms are merged in one pass.

        Raises:
            KeyError: A content is not stored.
        """
        has_adapters = any(content in self._adapters for content in composite.contents)
        streamed = {content for content in map(self._root, composite.contents) if content in self._streamed}
        if not (has_adapters or streamed):
            for segment in self._segments:
                runs = [
                    (part.slice, self._stored_terms(composite.terms_of(part.name), segment))
                    for part in segment.runs(composite)
                ]
                kernel, states = self._kernels[segment.device], segment.states if self._is_stochastic else None
                kernel.merge_runs(segment.live_P, runs, segment.dtype, composite.is_single, states)
            return
        parts = [(segment, part) for segment in self._segments for part in segment.parts(has_adapters)]
        blocks = [part.block(segment.live_P.device) for segment, part in parts]
        for (segment, part), fetched in zip(parts, self._streamed.prefetch(sorted(streamed), blocks), strict=True):
            terms = [
                (units, self._values(content, segment, part, fetched))
                for content, units in composite.terms_of(part.name)
            ]
            kernel, out_P = self._kernels[segment.device], segment.live_P[part.slice]
            states = segment.states.within(part.slice) if self._is_stochastic else None
            kernel.merge(out_P, terms, segment.dtype, composite.is_single, states)

    def _root(self, content: str) -> str:
        """The checkpoint that a term's values are read from: for an adapter its base."""
        return self._adapters[content][0] if content in self._adapters else content

    def _stored_terms(self, terms: Terms, segment: Segment) -> list[tuple[int, Values]]:
        """Terms of a segment in the composite's order; with int8 vectors the base comes first, with coefficient 1."""
        base = self._quantized_base
        if base is None:
            return [(units, segment.stored_NP[content]) for content, units in terms]
        vectors = [(units, segment.vectors_NP[content]) for content, units in terms if content != base]
        return [(UNIT, segment.stored_NP[base]), *vectors]

    @contextmanager
    def reduce_gradients(self, base: str, fine_tunes: Sequence[str]) -> Iterator[dict[str, Gradient]]:
        """Within, reduce the gradients G that `backward` makes to their inner products with the vectors,

            < G_p , Theta_i,p - Theta_p >   for each parameter p and fine-tune i, by parameter, then by content.

        A parameter's gradient is reduced as soon as it is complete, and freed: there is never a second buffer as large
        as the model.  Each parameter has a sum of its own, on its device; so the result depends neither on the order in
        which gradients come nor on the devices.

        Yields:
            A dictionary that has the products after the block, in the order of the parameters (see `total_gradient`).
        """
        places: dict[Tensor, tuple[Segment, ParameterSlice]] = {
            self._parameters[place.name]: (segment, place) for segment in self._segments for place in segment.slices
        }
        sums_N: dict[Tensor, Tensor] = {}

        def reduce(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            segment, place = places[parameter]
            base_P, *values_NP = self._base_and_fine_tunes(base, fine_tunes, segment, place)
            products_N = inner_products(gradient.reshape(-1), base_P, values_NP, self._kernels[segment.device].block)
            # A parameter gets several gradients where `backward` is called several times.
            sums_N[parameter] = sums_N[parameter] + products_N if parameter in sums_N else products_N

        hooks = [
            parameter.requires_grad_().register_post_accumulate_grad_hook(reduce)  # type: ignore[no-untyped-call]
            for parameter in places
        ]
        products: dict[str, Gradient] = {}
        try:
            yield products
        finally:
            for hook, parameter in zip(hooks, places, strict=True):
                hook.remove()
                parameter.requires_grad_(False)
        for name, parameter in self._parameters.items():
            if parameter in sums_N:
                products[name] = dict(zip(fine_tunes, sums_N[parameter].cpu().tolist(), strict=True))

    def _base_and_fine_tunes(
        self, base: str, fine_tunes: Sequence[str], segment: Segment, place: ParameterSlice
    ) -> Iterator[Values]:
        """Values of base and fine-tunes at a place; with int8 vectors zero and the vectors, whose base is zero."""
        if self._quantized_base is None:
            return (self._values(content, segment, place) for content in (base, *fine_tunes))
        assert base == self._quantized_base
        zero_P = torch.zeros((), device=segment.live_P.device).expand(place.shape.numel())
        vectors = (
            segment.vectors_NP[content].within(place.slice) if content != base else zero_P for content in fine_tunes
        )
        return chain((zero_P,), vectors)

    def _values(
        self,
        content: str,
        segment: Segment,
        place: ParameterSlice,
        fetched: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Flat values of a checkpoint at a place: stored, streamed (and perhaps fetched), or made by an adapter."""
        if content in self._streamed:
            block = place.block(segment.live_P.device)
            return self._streamed.values(content, block) if fetched is None else fetched[content]
        if content not in self._adapters:
            return segment.stored_NP[content][place.slice]
        base, edits = self._adapters[content]
        values_P = self._values(base, segment, place, fetched)
        return edits[place.name].apply(values_P.view(place.shape)).reshape(-1) if place.name in edits else values_P

    @staticmethod
    def adapter_scratch_bytes(architecture: Architecture, names: Iterable[str], adapters: int) -> int:
        """Bytes while adapters are applied to the largest parameter: each one's result, and a product and a sum.

        All in float32.  The embedding, the largest parameter but hardly ever adapted, is left out.
        """
        sizes = (architecture.sizes[name] for name in names if name != architecture.embedding)
        return (adapters + 2) * 4 * max(sizes, default=0) if adapters else 0

    def _allocate(
        self, model: PreTrainedModel, architecture: Architecture, headers: Mapping[str, Header]
    ) -> list[Segment]:
        """Allocate live segments for a model's parameters, in the order of `named_parameters()` (tied weights once)."""
        stored = [stored_dtypes(architecture, header) for header in headers.values()]
        live = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return [
            Segment(
                device=layout.device,
                dtype=layout.stored[0],
                dtypes=dict(zip(headers, layout.stored, strict=True)),
                slices=layout.slices,
                size=layout.size,
                live_P=torch.zeros(layout.size, dtype=layout.live, device=self._devices[layout.device]),
            )
            for layout in lay_out(architecture.parameters, stored, live, self._split.places)
        ]

    def _load(self, architecture: Architecture, content: str, header: Header) -> None:
        """Read a checkpoint's parameters from its files into its segments."""
        places: dict[str, Tensor] = {}
        for segment in self._segments:
            dtype = segment.dtypes[content]
            flat_P = torch.zeros(segment.size, dtype=dtype, device=segment.live_P.device)
            segment.stored_NP[content] = flat_P
            places |= {place.name: segment.view(flat_P, place) for place in segment.slices}
        load_parameters(architecture, header, places)

    def _quantize(self, architecture: Architecture, content: str, header: Header) -> None:
        """Read a checkpoint parameter by parameter, and keep its quantized vectors."""
        assert self._quantized_base is not None
        places: dict[str, tuple[Tensor, Int8Vector]] = {}
        for segment in self._segments:
            vectors = segment.vectors_NP[content] = Int8Vector.zeros(segment.size, segment.starts_R)
            base_P = segment.stored_NP[self._quantized_base]
            places |= {
                place.name: (segment.view(base_P, place), vectors.within(place.slice)) for place in segment.slices
            }
        for name, tensor in read_parameters(architecture, header, places):
            quantize(tensor, *places[name])

    def _edits_of(self, architecture: Architecture, adapter: StoredModel) -> tuple[str, dict[str, Edit]]:
        """Load an adapter's edits to the devices of their parameters; returned with the content of its base."""
        assert adapter.base is not None
        devices = {name: self._devices[number] for name, number in self._split.places.items()}
        return adapter.base, load_edits(architecture, read_adapter(adapter.path, adapter.field), devices)

    def _adopt(self, model: PreTrainedModel) -> None:
        """Make the model's parameters views of the live segments, and move its buffers to their devices."""
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        for segment in self._segments:
            for place in segment.slices:
                self._parameters[place.name].data = segment.view(segment.live_P, place)
        for path, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                number = self._split.places[f"{path}.{name}".lstrip(".")]
                setattr(module, name, buffer.to(self._devices[number]))
        move_activations(model, self._split, self._devices)


def total_gradient(products: ParameterGradient, fine_tunes: Sequence[str]) -> Gradient:
    """Sum inner products over the parameters, in their order."""
    return {content: sum((products[name][content] for name in products), 0.0) for content in fine_tunes}


def inner_products(gradient_P: Tensor, base_P: Values, stored_NP: Sequence[Values], block: int) -> Tensor:
    """Compute  < g , x_n - x_0 >  for each n over flat tensors: in float32 within a block, summed in float64.

    Differences are formed first: those of inner products would cancel, since fine-tunes are close to the base.  Block
    by block, gradient and base are read once for all n.  A float64 gradient makes everything float64.
    """
    wide = torch.promote_types(gradient_P.dtype, torch.float32)
    sums_N = torch.zeros(len(stored_NP), dtype=torch.float64, device=gradient_P.device)
    for start in range(0, len(gradient_P), block):
        part = slice(start, start + block)
        g_P, x0_P = gradient_P[part].to(wide), base_P[part].to(wide)
        sums_N += torch.stack([torch.dot(x_P[part] - x0_P, g_P) for x_P in stored_NP]).double()
    return sums_N


def inner_products_bytes(elements: int, itemsize: int, device: str) -> int:
    """Bytes of one parameter's gradient, and of the three float32 blocks that `inner_products` makes of it."""
    return elements * itemsize + 3 * 4 * min(CPU_BLOCK if device == "cpu" else DEVICE_BLOCK, elements)
