"""What a worker holds for life on one of its devices, in bytes.

Arithmetic on headers and the study file.  It follows what merged model does, so it changes when that does.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from dem_opt.checkpoints.adapters import read_adapter
from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.files import DTYPES, Header
from dem_opt.config import StudyConfig
from dem_opt.merging.int8 import row_count
from dem_opt.merging.kernel import CPU_BLOCK, CPU_THREADS, DEVICE_BLOCK
from dem_opt.merging.merged_model import ALIGNMENT
from dem_opt.merging.streaming import BLOCK, BUFFERS

PROCESS = 450 * 10**6
"""Bytes that Python, torch, transformers and Ray take in a worker's process before it loads (its RSS, on Linux)."""

CONTEXT = 600 * 10**6
"""Bytes that a process takes on a GPU before it stores anything: CUDA's context and the libraries' kernels.  Not
measured: a round number above what is usual."""

_WINDOW_BYTES = 49
"""Bytes of a token of a window: int64 ids, positions, targets and place, and the spec's own ids, positions and mask."""


def held_bytes(
    architecture: Architecture,
    base: Header,
    unlike: Sequence[Header],
    names: Collection[str],
    study: StudyConfig,
    device: str,
    itemsize: int,
) -> dict[str, int]:
    """What the device of these parameters holds of checkpoints that are not alike, by field of the plan.

    Windows are counted on every device, though only the first has them.
    """
    given, adapters = study.evaluation, sum(one.adapter for one in unlike)
    return {
        "stored": _stored(architecture, base, unlike, names, given.vectors),
        "live": _flat(architecture, base, names, itemsize),
        "scratch": _scratch(base, device) + _applied(architecture, names, adapters),
        "windows": _WINDOW_BYTES * len(study.corpora) * (given.windows + given.held_out) * given.window,
        "process": PROCESS if device == "cpu" else CONTEXT,
    }


def streamed_bytes(
    architecture: Architecture,
    unlike: Sequence[Header],
    names: Collection[str],
    study: StudyConfig,
    free: int,
    stored: int,
) -> tuple[tuple[Path, ...], int]:
    """Which checkpoints stay in files if `free`, what is left beside all of them, is negative; bytes of the others.

    The base first where coefficients sum to 1, since then no composite but itself reads it; else last; experts from
    the last one on.  None where even that does not help, nor for compressed vectors, which begin from the base.
    """
    base, *fine_tunes = unlike
    order = [one for one in reversed(fine_tunes) if not one.adapter]
    order = [base, *order] if study.space.least is None and study.space.total == 1 else [*order, base]
    streamed: list[Header] = []
    for one in order if study.evaluation.vectors == "exact" else ():
        if free >= 0:
            break
        if not architecture.layout(one).fused:
            size = _flat(architecture, one, names)
            streamed, free, stored = [*streamed, one], free + size, stored - size
    kept = stored + sum(_flat(architecture, one, names) for one in streamed)
    return (tuple(one.folder for one in streamed), stored) if free >= 0 else ((), kept)


def fetched_bytes(architecture: Architecture, unlike: Sequence[Header]) -> int:
    """Bytes on a GPU of what is fetched of one checkpoint that stays in its files.

    Merges have blocks, or all of a parameter where adapters need that, and those that come next; the reduction of a
    gradient has all of its parameter.
    """
    base, largest = unlike[0], max(architecture.sizes.values())
    elements = BUFFERS * (largest if any(one.adapter for one in unlike) else min(BLOCK, largest))
    layout = architecture.layout(base)
    return max(elements, largest) * max(layout.dtype(base, name).itemsize for name in architecture.parameters)


def reduced_bytes(architecture: Architecture, itemsize: int, device: str) -> int:
    """Bytes of the largest parameter's gradient, and of three blocks in float32 that it is reduced by."""
    largest = max(architecture.sizes.values())
    return largest * itemsize + 3 * 4 * min(CPU_BLOCK if device == "cpu" else DEVICE_BLOCK, largest)


def _stored(
    architecture: Architecture, base: Header, unlike: Sequence[Header], names: Collection[str], vectors: str
) -> int:
    """Bytes of base and experts: checkpoints and adapters as they are, or beside the base its vectors in int8.

    A row of a vector has a float32 scale; where rows begin is an int64 for all vectors.
    """
    if vectors == "exact":
        return sum(_factored(one, names) if one.adapter else _flat(architecture, one, names) for one in unlike)
    rows = sum(row_count(architecture.parameters[name]) for name in names)
    whole, fine_tunes = _flat(architecture, base, names), len(unlike) - 1
    return whole + fine_tunes * (_flat(architecture, base, names, 1) + 4 * rows) + (8 * rows if fine_tunes else 0)


def _flat(architecture: Architecture, header: Header, names: Collection[str], itemsize: int | None = None) -> int:
    """Bytes of a checkpoint in an merged model's segments, tied weights once; in its own dtypes unless one is given."""
    layout = architecture.layout(header)
    return sum(
        -(-architecture.sizes[name] // ALIGNMENT) * ALIGNMENT * (itemsize or layout.dtype(header, name).itemsize)
        for name in names
    )


def _factored(header: Header, names: Collection[str]) -> int:
    """Bytes of an adapter's edits of these parameters, which stay as they are stored."""
    adapter = read_adapter(header.folder, header.field)
    parts = [(name, stored) for name, factors in adapter.factors.items() for stored in factors.values()]
    parts += [*adapter.whole.items(), *adapter.repeated.items()]
    tensors = [header.tensors[stored] for name, stored in parts if name in names]
    return sum(one.nbytes for one in tensors)


def _applied(architecture: Architecture, names: Collection[str], adapters: int) -> int:
    """Bytes while adapters are applied to the largest parameter: what each makes of it, product and sum in float32."""
    sizes = (architecture.sizes[name] for name in names if name != architecture.embedding)
    return (adapters + 2) * 4 * max(sizes, default=0) if adapters else 0


def _scratch(base: Header, device: str) -> int:
    """Bytes of a merge that nothing is compiled for: two blocks in float32 and a rounded one, for each thread."""
    stored = DTYPES[base.tensors[next(iter(base.tensors))].dtype].itemsize
    return (CPU_BLOCK * CPU_THREADS if device == "cpu" else DEVICE_BLOCK) * (8 + stored)
