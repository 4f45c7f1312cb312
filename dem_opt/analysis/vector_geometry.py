"""The geometry of a study's distribution vectors: inner products, measured once and kept beside the report."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dem_opt.checkpoints.architecture import read_architecture, stored_names
from dem_opt.checkpoints.files import read_header
from dem_opt.insight import Vectors
from dem_opt.merging.merged_model import merged_tensors
from dem_opt.types import Composite, StoredModel

FILE = "vectors.json"
"""What a study's output folder keeps."""

BLOCK = 2**18
"""Parameters whose inner products are summed in float32; sums of blocks are float64."""


def vectors_of(base: StoredModel, experts: Mapping[str, StoredModel]) -> Vectors:
    """< Theta_i - Theta , Theta_j - Theta >  over all stored parameters, one tensor in memory of each model at a time.

    Differences are formed in float32.  Tied weights count once, as they are stored.
    """
    header = read_header(base.path, "base")
    architecture = read_architecture(header)
    names = stored_names(architecture, header)
    models = (base, *experts.values())
    readers = [
        merged_tensors(architecture, base, {one.content: one}, Composite.single(one.content), names) for one in models
    ]
    inner_NN = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for tensors in zip(*readers, strict=True):
        (_, base_P), *others = tensors
        inner_NN += inner_products(base_P.reshape(-1), [tensor.reshape(-1) for _, tensor in others])
    return Vectors(tuple(experts), tuple(map(tuple, inner_NN.tolist())))


def inner_products(base_P: Tensor, stored_NP: list[Tensor]) -> Tensor:
    """< x_i - x_0 , x_j - x_0 >  over flat tensors, [N, N]."""
    inner_NN = torch.zeros(len(stored_NP), len(stored_NP), dtype=torch.float64)
    for start in range(0, len(base_P), BLOCK):
        part = slice(start, start + BLOCK)
        block_NB = torch.stack([x_P[part].float() for x_P in stored_NP]) - base_P[part].float()
        inner_NN += (block_NB @ block_NB.T).double()
    return inner_NN


def measure_once(
    base: StoredModel, experts: Mapping[str, StoredModel], folder: Path, tell: Callable[[str], None]
) -> None:
    """Measure the vectors and keep them in a folder, unless it has those of the same contents."""
    contents = {name: one.content for name, one in experts.items()}
    if recall_vectors(base.content, contents, folder) is None:
        tell(f"comparing {len(contents)} distribution vectors, once")
        keep(vectors_of(base, experts), base.content, contents, folder)


def keep(vectors: Vectors, base: str, experts: Mapping[str, str], folder: Path) -> None:
    """Write inner products by content, whole or not at all; a folder that can't be written is done without."""
    contents = [experts[name] for name in vectors.names]
    text = json.dumps({"base": base, "contents": contents, "inner": vectors.inner})
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".vectors-", dir=folder) as partial:
            (Path(partial) / FILE).write_text(text, encoding="utf-8")
            (Path(partial) / FILE).replace(folder / FILE)


def recall_vectors(base: str, experts: Mapping[str, str], folder: Path) -> Vectors | None:
    """The vectors of these contents, under their present names; None where they were not measured."""
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        place = {content: index for index, content in enumerate(known["contents"])}
        if known["base"] != base or not place.keys() >= set(experts.values()):
            return None
        order = [place[content] for content in experts.values()]
        inner = tuple(tuple(float(known["inner"][i][j]) for j in order) for i in order)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return Vectors(tuple(experts), inner)
