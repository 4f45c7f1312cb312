"""A composite's tensors one at a time, straight from the files."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from math import prod

import torch
from torch import Tensor

from dem_opt.checkpoints.adapters import load_edits, read_adapter
from dem_opt.checkpoints.architecture import Architecture, parameter_of
from dem_opt.checkpoints.files import DTYPES, Header, read_header, read_tensors
from dem_opt.checkpoints.loading import read_parameters
from dem_opt.checkpoints.vocabulary import with_base_rows
from dem_opt.merging.dither import Dither, ScatteredDither, States, seed_of
from dem_opt.merging.kernel import MergeKernel
from dem_opt.types import Composite, StoredModel, Terms

NamedTensors = Iterator[tuple[str, Tensor]]

_FUSED = 2
"""Fused parameters whose places are kept, 4 bytes an element: tensors of a layer's two stacks of experts alternate."""


def merged_tensors(
    architecture: Architecture,
    base: StoredModel,
    stored: Mapping[str, StoredModel],
    composite: Composite,
    names: Sequence[str],
    dtype: torch.dtype | None = None,
) -> NamedTensors:
    """Yield a composite's tensors one at a time, straight from the files, under the base's stored names.

    Parameters that transformers fuses on loading are merged as they are stored: fusing only moves values.

    Args:
        architecture: The base's.
        base: The base.
        stored: Checkpoints and adapters by content.
        composite: The composite.
        names: Stored names of the base's tensors, in the order wanted.
        dtype: What the float32 sums are rounded to, once, in the base's `rounding`; by default the base's dtype, or for
            a single checkpoint its own.
    """
    header = read_header(base.path, "base")
    dtypes = {name: DTYPES[header.tensors[name].dtype] for name in names}
    readers = [_tensors(architecture, header, names, stored[content]) for content in composite.contents]
    parameters = parameter_of(architecture, header)
    terms = {name: composite.terms_of(parameters[name]) for name in names}
    is_stochastic = base.rounding == "stochastic" and dtype != torch.float32
    states = _states(architecture, header, names) if is_stochastic else repeat(None)
    return _merge_each(readers, composite, terms, dtypes, dtype, states)


def _merge_each(
    readers: Sequence[NamedTensors],
    composite: Composite,
    terms: Mapping[str, Terms],
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype | None,
    states: Iterable[States | None],
) -> NamedTensors:
    """Merge the tensors that the readers of a composite's checkpoints yield side by side."""
    kernel = MergeKernel()
    for tensors, own in zip(zip(*readers, strict=True), states, strict=False):
        name, first = tensors[0]
        values = {content: x for content, (_, x) in zip(composite.contents, tensors, strict=True)}
        merged = torch.empty(first.shape, dtype=dtype or (first.dtype if composite.is_single else dtypes[name]))
        flat = [(units, values[content].reshape(-1)) for content, units in terms[name]]
        kernel.merge(merged.view(-1), flat, merged.dtype, keeps_single=False, states=own)
        yield name, merged


def _states(architecture: Architecture, base: Header, names: Sequence[str]) -> Iterator[States]:
    """States for stochastic rounding of the base's stored tensors, each element's by its place in the parameter."""
    layout, parameters = architecture.layout(base), parameter_of(architecture, base)

    @functools.lru_cache(maxsize=_FUSED)
    def places_in(parameter: str) -> Mapping[str, Tensor]:
        shape = architecture.parameters[parameter]
        return architecture.as_stored({parameter: torch.arange(prod(shape), dtype=torch.int32).view(shape)})

    for name in names:
        parameter = parameters[name]
        if parameter in layout.fused:
            yield ScatteredDither(places_in(parameter)[layout.renaming(name)].reshape(-1), seed_of(parameter))
        else:
            yield Dither.of([(0, parameter, 0)])


def _tensors(architecture: Architecture, base: Header, names: Sequence[str], model: StoredModel) -> NamedTensors:
    """Yield a checkpoint's or an adapter's tensors in place of the base's stored tensors."""
    if model.base is not None:
        return _edited(architecture, base, names, model)
    header = with_base_rows(architecture, base, read_header(model.path, model.field))
    parameters = parameter_of(architecture, base)
    layout = architecture.layout(header)
    stored = [layout.stored_as(parameters[name], architecture.layout(base).renaming(name)) for name in names]
    return ((name, tensor) for name, (_, tensor) in zip(names, read_tensors(header, stored), strict=True))


def _edited(architecture: Architecture, base: Header, names: Sequence[str], model: StoredModel) -> NamedTensors:
    """Yield the base's stored tensors with an adapter's edits; fused parameters are edited whole, then taken apart."""
    edits = load_edits(architecture, read_adapter(model.path, model.field))
    parameters = parameter_of(architecture, base)
    layout = architecture.layout(base)
    fused = layout.fused & edits.keys() & {parameters[name] for name in names}
    apart: dict[str, Tensor] = {}
    for parameter, tensor in read_parameters(architecture, base, sorted(fused)):
        apart |= architecture.as_stored({parameter: edits[parameter].apply(tensor)})
    for name, tensor in read_tensors(base, names):
        edit, plain = edits.get(parameters[name]), layout.renaming(name)
        yield name, tensor if edit is None else apart[plain] if plain in apart else edit.apply(tensor)
