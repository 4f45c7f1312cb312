"""A composite's tensors one at a time, straight from the files."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dem_opt.checkpoints.adapters import load_edits, read_adapter
from dem_opt.checkpoints.architecture import Architecture, parameter_of
from dem_opt.checkpoints.files import DTYPES, Header, read_header, read_tensors
from dem_opt.checkpoints.loading import read_parameters
from dem_opt.checkpoints.vocabulary import with_base_rows
from dem_opt.merging.kernel import MergeKernel
from dem_opt.types import Composite, StoredModel, Terms

NamedTensors = Iterator[tuple[str, Tensor]]


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
        dtype: What the float32 sums are rounded to, once; by default the base's dtype, or for a single checkpoint its
            own.
    """
    header = read_header(base.path, "base")
    dtypes = {name: DTYPES[header.tensors[name].dtype] for name in names}
    readers = [_tensors(architecture, header, names, stored[content]) for content in composite.contents]
    parameters = parameter_of(architecture, header)
    terms = {name: composite.terms_of(parameters[name]) for name in names}
    return _merge_each(readers, composite, terms, dtypes, dtype)


def _merge_each(
    readers: Sequence[NamedTensors],
    composite: Composite,
    terms: Mapping[str, Terms],
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype | None,
) -> NamedTensors:
    """Merge the tensors that the readers of a composite's checkpoints yield side by side."""
    kernel = MergeKernel()
    for tensors in zip(*readers, strict=True):
        name, first = tensors[0]
        values = {content: x for content, (_, x) in zip(composite.contents, tensors, strict=True)}
        merged = torch.empty(first.shape, dtype=dtype or (first.dtype if composite.is_single else dtypes[name]))
        kernel.merge(
            merged.view(-1), [(units, values[content].reshape(-1)) for content, units in terms[name]], merged.dtype
        )
        yield name, merged


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
