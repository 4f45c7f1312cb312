"""Inner products of a study's distribution vectors and what rounding does to them, measured once and kept.

Shape suffixes: N fine-tunes, P parameters of a tensor, B parameters of a block.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from dem_opt.analysis.stored_vectors import keep, recall_vectors
from dem_opt.checkpoints.architecture import parameter_of, read_architecture, stored_names
from dem_opt.checkpoints.files import read_header
from dem_opt.merging.tensors import merged_tensors
from dem_opt.progress import Progress
from dem_opt.types import Composite, StoredModel, VectorGeometry

BLOCK = 2**18
"""Parameters whose inner products are summed in float32, where rounding stays small; blocks are summed in float64."""


SAMPLED = 2**25
"""Parameters that `sampled_rounding` looks at: read and compared in a second or two."""


def vectors_of(base: StoredModel, fine_tunes: Mapping[str, StoredModel]) -> VectorGeometry:
    """< Theta_i - Theta , Theta_j - Theta >  over all stored parameters.

    One tensor of each model is in memory at a time.  Differences are formed in float32.  Tied weights count once, as
    they are stored.
    """
    inner_NN, lost = torch.zeros(len(fine_tunes), len(fine_tunes), dtype=torch.float64), 0.0
    for _, base_P, others in _side_by_side(base, fine_tunes):
        inner_NN += inner_products(base_P, others)
        lost += squared_rounding(base_P, others)
    length = float(inner_NN.mean())  # | mean of the vectors |^2
    rounding = sqrt(lost / length) if length else None
    return VectorGeometry(tuple(fine_tunes), tuple(map(tuple, inner_NN.tolist())), rounding)


def sampled_rounding(base: StoredModel, fine_tunes: Mapping[str, StoredModel], elements: int = SAMPLED) -> float | None:
    """`VectorGeometry.rounding`, over matrices of all layers that have so many parameters, or a few more.

    None where the base has no matrices of 16 bits, or the fine-tunes' average is the base there.
    """
    header = read_header(base.path, "base")
    architecture = read_architecture(header)
    parameters, left = parameter_of(architecture, header), elements
    names = []
    for name in sorted(stored_names(architecture, header), key=lambda name: zlib.crc32(name.encode())):
        tensor = header.tensors[name]
        if left > 0 and tensor.dtype != "F32" and len(tensor.shape) > 1 and parameters[name] != architecture.embedding:
            names.append(name)
            left -= prod(tensor.shape)
    if not names:
        return None
    lost = length = 0.0
    for _, base_P, others in _side_by_side(base, fine_tunes, names):
        lost += squared_rounding(base_P, others)
        length += float(inner_products(base_P, others).mean())
    return sqrt(lost / length) if length else None


def squared_lengths(base: StoredModel, fine_tunes: Mapping[str, StoredModel]) -> dict[str, float]:
    """sum_i |Theta_i - Theta|^2  of each parameter, read as `vectors_of` does."""
    lengths: dict[str, float] = {}
    for parameter, base_P, others in _side_by_side(base, fine_tunes):
        squares = float(inner_products(base_P, others).trace())
        lengths[parameter] = lengths.get(parameter, 0.0) + squares
    return lengths


def _side_by_side(
    base: StoredModel, fine_tunes: Mapping[str, StoredModel], some: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield the stored tensors of all models, or some, flat, with the name of the parameter that each becomes."""
    header = read_header(base.path, "base")
    architecture = read_architecture(header)
    names = stored_names(architecture, header) if some is None else some
    parameters = parameter_of(architecture, header)
    readers = [
        merged_tensors(architecture, base, {model.content: model}, Composite.single(model.content), names)
        for model in (base, *fine_tunes.values())
    ]
    for tensors in zip(*readers, strict=True):
        (name, base_P), *others = tensors
        yield parameters[name], base_P.reshape(-1), [tensor.reshape(-1) for _, tensor in others]


def inner_products(base_P: Tensor, stored_NP: list[Tensor]) -> Tensor:
    """< x_i - x_0 , x_j - x_0 >  over flat tensors, [N, N]."""
    inner_NN = torch.zeros(len(stored_NP), len(stored_NP), dtype=torch.float64)
    for start in range(0, len(base_P), BLOCK):
        part = slice(start, start + BLOCK)
        block_NB = torch.stack([x_P[part].float() for x_P in stored_NP]) - base_P[part].float()
        inner_NN += (block_NB @ block_NB.T).double()
    return inner_NN


def squared_rounding(base_P: Tensor, stored_NP: list[Tensor]) -> float:
    """| round(m) - m |^2 ,  m the uniform average of fine-tunes, rounded to the base's dtype as a composite is."""
    squared = 0.0
    for start in range(0, len(base_P), BLOCK):
        part = slice(start, start + BLOCK)
        base_B = base_P[part].float()
        mean_B = base_B + (torch.stack([x_P[part].float() for x_P in stored_NP]) - base_B).mean(dim=0)
        squared += float((mean_B.to(base_P.dtype).float() - mean_B).double().square().sum())
    return squared


def measure_once(base: StoredModel, fine_tunes: Mapping[str, StoredModel], folder: Path, progress: Progress) -> None:
    """Measure the vectors and keep them in a folder, unless it has those of the same contents."""
    contents = {name: fine_tune.content for name, fine_tune in fine_tunes.items()}
    if recall_vectors(base.content, contents, folder) is None:
        with progress.phase(f"comparing {len(contents)} distribution vectors, once"):
            keep(vectors_of(base, fine_tunes), base.content, contents, folder)
