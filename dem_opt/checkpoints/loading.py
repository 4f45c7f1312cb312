"""A checkpoint's parameters on disk -> tensors: in memory of their own, at their places, or mapped."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dem_opt.checkpoints.architecture import Architecture, load_model
from dem_opt.checkpoints.files import Header, read_each, read_into, read_tensors
from dem_opt.checkpoints.layout import Layout


def read_parameters(architecture: Architecture, header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named parameters of a checkpoint that fits, in the dtype they are stored in, in the order of `names`.

    A parameter that is one stored tensor is read into memory of its own.  If any is fused, transformers loads the
    checkpoint once, in a dtype that holds all of its values.
    """
    layout, wanted = architecture.layout(header), list(names)
    fused = _converted(header, layout) if layout.fused & set(wanted) else {}
    plain = iter(read_each(header, [layout.sources[name][0] for name in wanted if name not in layout.fused]))
    for name in wanted:
        yield name, fused[name].to(layout.dtype(header, name)) if name in layout.fused else next(plain)[1]


def load_parameters(architecture: Architecture, header: Header, places: Mapping[str, Tensor]) -> None:
    """Read the named parameters of a checkpoint that fits to their places, which have the dtype they are stored in.

    A parameter that is one stored tensor comes straight from its file; those that are fused pass through transformers.
    """
    layout = architecture.layout(header)
    read_into(header, [(layout.sources[name][0], place) for name, place in places.items() if name not in layout.fused])
    for name, tensor in read_parameters(architecture, header, [name for name in places if name in layout.fused]):
        places[name].copy_(tensor)


def map_parameters(architecture: Architecture, header: Header) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's parameters over its mapped files, which are read where and when a tensor is; none is fused."""
    layout = architecture.layout(header)
    assert not layout.fused, f"{header.folder} can't be mapped: transformers fuses its tensors"
    stored = [layout.sources[name][0] for name in architecture.parameters]
    return ((name, x) for name, (_, x) in zip(architecture.parameters, read_tensors(header, stored), strict=True))


def _converted(header: Header, layout: Layout) -> dict[str, Tensor]:
    """All parameters as transformers makes them of the stored tensors, in the widest dtype among these."""
    dtypes = {layout.dtype(header, name) for name in layout.sources}
    widest = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    return {name: parameter.detach() for name, parameter in load_model(header.folder, widest).named_parameters()}
