"""Placebos of a fine-tune: checkpoints like it whose distribution vector carries nothing that was learnt.

    random     Theta + g ||v|| / ||g|| ,  g Gaussian        tensor by tensor, v = Theta_i - Theta
    permuted   Theta[l] + v[pi(l)]                          layer by layer, pi without a fixed point

Adaptive merging of random adapters has been found about as good as that of trained ones (Liu et al. 2026,
arXiv:2602.12323), so a gain counts only beside that of placebos with the same search.

A placebo takes as many bytes on disk as the base, an adapter's as many as the adapter.  Memory holds one weight file
(5 GB at most) and the largest tensor four times in float32.  For 13 billion parameters in bfloat16: 26 GB on disk for
each fine-tune, 8 GB of memory.
"""

import json
import random
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import inf, sqrt
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dem_opt.atomic import publish_folder
from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, PlannedEdit, plan_edits, read_adapter
from dem_opt.checkpoints.architecture import Architecture, read_architecture, stored_names
from dem_opt.checkpoints.files import Header, read_header, read_tensors
from dem_opt.errors import InputError
from dem_opt.export.writer import COPIED, Contents, as_input_error, copy_files, refuse_full, staged, write_weights
from dem_opt.manifest import FILES, manifest_of, read_description, refuse_foreign
from dem_opt.merging.tensors import NamedTensors, merged_tensors
from dem_opt.types import Composite, StoredModel

Kind = Literal["random", "permuted"]

KINDS: tuple[Kind, ...] = ("random", "permuted")

MARKER = "placebo.json"
"""File of a placebo's folder that says what it was made from, with its manifest."""

TOLERANCE = 1e-3
"""Largest relative difference between the norms of a placebo's tensor, once rounded, and of the vector's."""

BISECTIONS = 24
"""Most trials of a scale: rounding to bfloat16 moves a short vector's norm by far more than the tolerance."""

_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<rest>.+)")

Form = tuple[object, ...]
"""Shape and whatever else two tensors must share so that one can take the other's place."""


@dataclass(frozen=True, kw_only=True)
class Placebo:
    """A placebo to be written.

    Attributes:
        kind: "random" or "permuted".
        base: The base.
        fine_tune: The checkpoint or adapter that it stands in for.
        seed: Seed of the Gaussian numbers and of the permutation, which is one for all fine-tunes of a study.
    """

    kind: Kind
    base: StoredModel
    fine_tune: StoredModel
    seed: int

    @property
    def made_from(self) -> dict[str, object]:
        """Everything that decides its bits."""
        contents = {"base": self.base.content, "fine_tune": self.fine_tune.content}
        return {"kind": self.kind, "seed": self.seed, **contents}

    @property
    def nbytes(self) -> int:
        """Bytes of its weights on disk."""
        is_adapter = self.fine_tune.base is not None
        header = self._adapter().header if is_adapter else read_header(self.base.path, self.base.field)
        return header.nbytes

    def check(self) -> None:
        """Check by headers that it can be made.

        Raises:
            InputError: The fine-tune is an adapter of another kind than plain LoRA, or has no two layers alike.
        """
        self._sources(self._forms())

    def is_written(self, out: Path) -> bool:
        """True if the folder holds this very placebo."""
        return read_description(out / MARKER).get("made_from") == self.made_from

    def write(self, out: Path) -> None:
        """Write the folder, whole or not at all, unless it is there.

        Raises:
            InputError: `out` holds anything that was not written here, or can't be written, or `check` raises it.
        """
        if self.is_written(out):
            return
        if out.exists():
            refuse_foreign(out, MARKER)
        with staged(out) as partial, as_input_error(out):
            refuse_full(out, partial, self.nbytes)
            if self.fine_tune.base is None:
                self._write_checkpoint(partial)
            else:
                self._write_adapter(partial)
            record = {"made_from": self.made_from, FILES: manifest_of(partial)}
            (partial / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            publish_folder(partial, out)

    def _write_checkpoint(self, folder: Path) -> None:
        base, architecture = self._base()
        sources = self._sources(self._forms())

        def edited(names: Sequence[str]) -> NamedTensors:
            return self._tensors(architecture, base, names, [sources.get(name, name) for name in names])

        write_weights(
            folder, Contents.of(architecture, base, None), edited, f"writing a placebo of {self.fine_tune.path.name}"
        )
        copy_files(self.base.path, folder, COPIED)

    def _tensors(
        self, architecture: Architecture, base: Header, names: Sequence[str], sources: Sequence[str]
    ) -> NamedTensors:
        """Yield the base's tensors with the vectors of the sources, or random ones of their norms."""
        content = self.fine_tune.content
        fine_tune = {content: self.fine_tune}
        readers = zip(
            read_tensors(base, names),
            read_tensors(base, sources),
            merged_tensors(architecture, self.base, fine_tune, Composite.single(content), sources),
            strict=True,
        )
        for (name, tensor), (source, original), (_, tuned) in readers:
            if self.kind == "random":
                norm = norm_of(tuned.float() - original.float())
                yield name, moved_at_random(tensor, norm, self._generator(name))
            elif source == name:
                yield name, tuned.to(tensor.dtype)
            else:
                yield name, (tensor.float() + (tuned.float() - original.float())).to(tensor.dtype)

    def _adapter(self) -> Adapter:
        return read_adapter(self.fine_tune.path, self.fine_tune.field)

    def _base(self) -> tuple[Header, Architecture]:
        header = read_header(self.base.path, self.base.field)
        return header, read_architecture(header)

    def _forms(self) -> dict[str, Form]:
        """The forms of the stored tensors: of the base's, or of an adapter's factors, whose scale is a part of it."""
        base, architecture = self._base()
        if self.fine_tune.base is None:
            return {name: base.tensors[name].shape for name in stored_names(architecture, base)}
        adapter = self._adapter()
        edits = self._plain_edits(architecture, adapter)
        return {name: (adapter.shape(name), edit.scale) for edit in edits for name in edit.stored.values()}

    def _sources(self, forms: Mapping[str, Form]) -> dict[str, str]:
        return permuted_names(forms, self.seed, self.fine_tune) if self.kind == "permuted" else {}

    def _write_adapter(self, folder: Path) -> None:
        _, architecture = self._base()
        adapter, sources = self._adapter(), self._sources(self._forms())
        stored = dict(read_tensors(adapter.header, adapter.header.tensors))
        if self.kind == "permuted":
            tensors = {name: stored[sources.get(name, name)].clone() for name in stored}
        else:
            tensors = dict(self._random_factors(self._plain_edits(architecture, adapter), stored))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(adapter.header.folder / CONFIG, folder / CONFIG)

    def _plain_edits(self, architecture: Architecture, adapter: Adapter) -> list[PlannedEdit]:
        """The edits of an adapter, whose only tensors are the two factors of each.

        Raises:
            InputError: It has magnitudes, experts, biases or whole tensors too, or factors of tied weights.
        """
        edits = list(plan_edits(architecture, adapter).edits.values())
        factors = {edit.stored[part] for edit in edits if edit.kind == "low rank" for part in ("A", "B")}
        if other := sorted(adapter.header.tensors.keys() - factors):
            mend = f"a placebo is made of plain LoRA factors alone, and {other[0]} is none: compare checkpoints instead"
            raise InputError(adapter.header.folder, adapter.header.field, None, mend)
        return edits

    def _random_factors(self, edits: Iterable[PlannedEdit], stored: Mapping[str, Tensor]) -> NamedTensors:
        """Yield Gaussian factors whose product has the norm of the trained one, tensor by tensor."""
        for edit in edits:
            names = {part: edit.stored[part] for part in ("A", "B")}
            down_RI, up_OR = (stored[name] for name in names.values())
            drawn = {part: gaussian(stored[name], self._generator(name)) for part, name in names.items()}
            scale = sqrt(product_norm(down_RI, up_OR) / product_norm(*drawn.values()))
            for part, name in names.items():
                yield name, (scale * drawn[part]).to(stored[name].dtype)

    def _generator(self, name: str) -> torch.Generator:
        """Random numbers of one tensor, which depend on contents and its name, and not on the order of tensors."""
        digest = sha256(repr((self.seed, self.fine_tune.content, name)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gaussian numbers in float32."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32)


def norm_of(tensor: Tensor) -> float:
    """Euclidean norm, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def product_norm(down_RI: Tensor, up_OR: Tensor) -> float:
    """|| B A ||  without the product:  || B A ||^2 = tr (B^T B) (A A^T) , of R x R matrices."""
    a_RI, b_OR = down_RI.double(), up_OR.double()
    return sqrt(max(float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum()), 0.0))


def moved_at_random(tensor: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """A tensor with a Gaussian vector added, so that the sum, rounded to its dtype, is as far from it as `norm`.

    Where the vector is shorter than the gaps between numbers of the dtype, most of it would be rounded away, and its
    norm with it; so the scale is found by bisection on the norm after rounding, which never falls as the scale grows.
    """
    if norm == 0:
        return tensor.clone()
    start, step = tensor.float(), gaussian(tensor, generator)
    scale, low, high = norm / norm_of(step), 0.0, inf
    for _ in range(BISECTIONS):
        moved = torch.add(start, step, alpha=scale).to(tensor.dtype)
        distance = norm_of(moved.float() - start)
        if abs(distance - norm) <= TOLERANCE * norm:
            break
        low, high = (scale, high) if distance < norm else (low, scale)
        scale = 2 * scale if high == inf else (low + high) / 2
    return moved


def permuted_names(forms: Mapping[str, Form], seed: int, model: StoredModel) -> dict[str, str]:
    """By name of a layer's tensor, the name of the tensor whose vector it gets, from another layer of the same forms.

    Layers are alike where their tensors have the same names and forms; those of each such group change places along one
    random cycle (Sattolo 1986), so that none stays.  Embeddings, heads and layers without a like stay as they are.

    Raises:
        InputError: No two layers are alike.
    """
    layers: dict[tuple[str, int], dict[str, Form]] = {}
    for name, form in forms.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault((match["stack"], int(match["layer"])), {})[match["rest"]] = form
    groups: dict[tuple[str, frozenset[tuple[str, Form]]], list[int]] = {}
    for (stack, layer), tensors in sorted(layers.items()):
        groups.setdefault((stack, frozenset(tensors.items())), []).append(layer)
    rng, sources = random.Random(seed), dict[str, str]()
    for (stack, shared), alike in groups.items():
        for layer, source in zip(alike, _cycle(alike, rng), strict=True):
            for rest, _ in shared if layer != source else ():
                sources[f"{stack}.{layer}.{rest}"] = f"{stack}.{source}.{rest}"
    if not sources:
        mend = "has no two layers of the same shapes, so there is nothing to permute"
        raise InputError(model.path, model.field, None, mend)
    return sources


def _cycle(places: Sequence[int], rng: random.Random) -> list[int]:
    """The places in an order that is one cycle: two or more of them all move."""
    order = list(places)
    for last in range(len(order) - 1, 0, -1):
        other = rng.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


def remove_placebos(folder: Path) -> None:
    """Remove the placebos in a folder; one in which anything was added or changed is left, with an InputError."""
    for placebo in sorted(folder.iterdir()) if folder.is_dir() else ():
        refuse_foreign(placebo, MARKER)
        shutil.rmtree(placebo)
