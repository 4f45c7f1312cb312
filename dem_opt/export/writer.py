"""Write a composite as a checkpoint folder, and prove from disk that it is the composite."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dem_opt.atomic import publish_folder, staged_folder
from dem_opt.checkpoints.adapters import content_of
from dem_opt.checkpoints.architecture import (
    Architecture,
    load_model,
    parameter_of,
    read_architecture,
    stored_dtypes,
    stored_names,
)
from dem_opt.checkpoints.configuration import read_configuration
from dem_opt.checkpoints.files import (
    DTYPES,
    INDEX,
    WEIGHTS,
    Header,
    StoredTensor,
    hash_tensors,
    read_header,
    read_tensors,
)
from dem_opt.checkpoints.layout import Layout
from dem_opt.errors import InputError, nearest
from dem_opt.json_files import read_json
from dem_opt.manifest import FILES, manifest_of, read_description, refuse_foreign
from dem_opt.merging.tensors import NamedTensors, merged_tensors
from dem_opt.progress import current_progress
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Score, StoredModel, Terms

MARKER = "dem_opt.json"
"""File of an exported folder with its coefficients, the hash of its weights, and its manifest."""

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one weight file."""

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates",
)
"""Files of the base's folder that an export copies."""


SAME_SCORE = {"exact": 1e-5, "int8": 2e-2}
"""Largest relative difference between the NLL of an export and of its composite, by storage of the vectors: exact, that
of two float32 forward passes of one model; int8, more than quantization has ever cost in a test.
"""

Scores = Mapping[str, Mapping[str, Score]]
"""By split, then by distribution."""


class ExportError(RuntimeError):
    """The exported folder, read back from disk, is not the composite."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A composite on disk.

    Attributes:
        path: Folder.
        base: Model whose config, tokenizer and layout of weights it has.
        stored: Checkpoints and adapters of the composite's terms, by content.
        composite: The composite.
        content: Content hash of the written weights.
        dtype: Dtype that all sums were rounded to; None where each was rounded to its base tensor's dtype.
        rank: Of a composite that was written as a LoRA: its largest rank.
        is_truncated: The LoRA is the nearest of its rank, and not exact.
    """

    path: Path
    base: StoredModel
    stored: Mapping[str, StoredModel]
    composite: Composite
    content: str
    dtype: torch.dtype | None = None
    rank: int | None = None
    is_truncated: bool = False


def output_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name such as "bfloat16".

    Raises:
        InputError: Tensors of this dtype can't be written.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name is not None and name not in known:
        raise InputError(None, "--dtype", name, nearest(name, known))
    return known[name] if name else None


def write_composite(
    base: StoredModel,
    stored: Mapping[str, StoredModel],
    composite: Composite,
    out: Path,
    approve: Callable[[Export], Mapping[str, str]],
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
) -> Export:
    """Write a composite as a Hugging Face folder, whole and approved or not at all.

    Weights are stored as the base stores them, in its dtypes, or all of them in `dtype`, to which the float32 sums
    are rounded once; a single checkpoint keeps its own.  Config (but for its dtype), generation config, tokenizer,
    stored buffers and tensors that the language model does not load are the base's.  When `approve` has seen it and
    not raised, the texts that it gives are written beside them by name, and the folder gets its own name; with
    `overwrite` in the place of an earlier export, in which nothing was added or changed.

    Raises:
        InputError: `out` holds anything else, is inside or above a model of the study, or can't be written, a
            checkpoint's content is no longer what `stored` says, or a weight is beyond the dtype's range.
    """
    out = out.absolute()
    used = {content: stored[content] for content in composite.contents}
    refuse_place(out, [base.path, *(model.path for model in stored.values())], overwrite)
    refuse_changed(base, used.values())
    header = read_header(base.path, "base")
    architecture = read_architecture(header)
    declared = dtype or _own_dtype(architecture, base, used, composite)
    written = Export(path=out, base=base, stored=used, composite=composite, content="", dtype=dtype)
    with staged(out) as partial:
        with as_input_error(out):
            contents = Contents.of(architecture, header, declared)
            refuse_full(out, partial, sum(contents.sizes.values()))
            write_weights(partial, contents, _merging(architecture, written), "merging and writing")
            copy_files(base.path, partial, COPIED)
            if declared is not None:
                _set_dtype(partial / "config.json", declared)
        content = hash_tensors(read_header(partial, "export"))
        texts = approve(replace(written, path=partial, content=content))
        with as_input_error(out):
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            write_json(partial / MARKER, provenance(composite, content) | {FILES: manifest_of(partial)})
            refuse_occupied(out, overwrite)
            publish_folder(partial, out)
    return replace(written, content=content)


def _own_dtype(
    architecture: Architecture, base: StoredModel, used: Mapping[str, StoredModel], composite: Composite
) -> torch.dtype | None:
    """The dtype of a composite that is a single checkpoint, where it differs from the base's."""
    if not composite.is_single or base.content in used:
        return None
    (model,) = used.values()
    base_header = read_header(base.path, "base")
    header = read_header(model.path, model.field) if model.base is None else base_header
    dtypes = set(stored_dtypes(architecture, header).values())
    alike = dtypes == set(stored_dtypes(architecture, base_header).values())
    return None if alike or len(dtypes) > 1 else dtypes.pop()


def prove(export: Export) -> None:
    """Compare every tensor on disk with a fresh merge, bit for bit, and load the folder through transformers.

    Loaded parameters must be the stored tensors, except where transformers fuses several into one.

    Raises:
        ExportError: Names the first tensor that differs.
    """
    header, original = read_header(export.path, "export"), read_header(export.base.path, "base")
    if hash_tensors(header) != export.content:
        raise ExportError(f"{export.path}: its weights are not those that were written")
    architecture = read_architecture(original)
    contents, parameters = Contents.of(architecture, original, export.dtype), parameter_of(architecture, original)
    loaded = _loaded(architecture, export.path, header)
    fresh = contents.read(list(contents.sizes), _merging(architecture, export))
    with current_progress().phase("comparing from disk", len(contents.sizes), "tensors") as phase:
        for stored_name, (name, merged) in zip(contents.sizes, fresh, strict=True):
            ((_, stored),) = read_tensors(header, [name])
            if stored.dtype != merged.dtype or not _same_bits(stored, merged):
                raise ExportError(f"{export.path}: {name} is not what was merged")
            parameter = parameters.get(stored_name)
            is_whole = parameter is not None and parameter not in contents.layout.fused
            if parameter is not None and is_whole and not _same_bits(loaded[parameter], merged):
                raise ExportError(f"{export.path}: {parameter} does not load as it was merged")
            phase.advance()


def _loaded(architecture: Architecture, folder: Path, header: Header) -> dict[str, Tensor]:
    """The parameters of an exported folder as transformers loads them.

    Raises:
        ExportError: They are not the base's parameters.
    """
    alike = len({tensor.dtype for tensor in header.tensors.values()}) == 1
    model = load_model(folder, "auto" if alike else torch.float32)
    loaded = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if unlike := sorted(loaded.keys() ^ architecture.parameters.keys() ^ architecture.outside):
        raise ExportError(f"{folder}: does not load with the base's parameters: {unlike[0]}")
    return loaded


def prove_scores(again: Scores, scores: Scores, tolerance: float) -> None:
    """Raise ExportError where a written folder scores otherwise than its composite did, by a relative difference.

    With exact vectors the bits are the same, and so are the scores, but for float32 sums in another order on another
    number of threads.  Vectors in int8 have a quantization error, which the export has not.
    """
    pairs = [(split, name, score) for split, by_name in scores.items() for name, score in by_name.items()]
    for split, name, score in pairs:
        other = again[split][name]
        if abs(other.nll - score.nll) > tolerance * score.nll:
            raise ExportError(
                f"the exported model scores {other.nll!r} nats per token on {name}, {split}, the winner {score.nll!r}"
            )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """The folder in which an export is made; InputError where it can't be."""
    with ExitStack() as stack:
        with as_input_error(out):
            partial = stack.enter_context(staged_folder(out))
        yield partial


def refuse_changed(base: StoredModel, others: Iterable[StoredModel]) -> None:
    """Raise InputError where the weights of a model, or the base's configuration, are no longer what was scored."""
    for model in (base, *others):
        if content_of(model) != model.content:
            raise InputError(
                model.path, model.field, None, "its weights have changed since they were scored; run again"
            )
    if base.configuration and read_configuration(base.path, base.field).text != base.configuration:
        raise InputError(base.path / "config.json", base.field, None, "has changed since it was scored; run again")


def refuse_place(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raise InputError where no export may be written to `out`.

    Args:
        out: Folder to be written.
        inputs: Folders of the study's models: `out` may not be one of them, nor inside or above one.
        overwrite: An earlier export may be replaced.  Whatever else `out` holds may not.
    """
    place = out.resolve()
    for folder in inputs:
        model = folder.resolve()
        if place == model or model in place.parents or place in model.parents:
            relation = "is" if place == model else "is inside of" if model in place.parents else "holds"
            raise InputError(out, None, None, f"{relation} {folder}, a model of the study: name another folder")
    refuse_occupied(out, overwrite)


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise InputError where `out` holds anything but an unchanged earlier export, or one that is to stay."""
    if out.exists() and not out.is_dir():
        raise InputError(out, None, None, "is a file: name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    refuse_foreign(out, MARKER, unlisted=_unlisted(out))
    if not overwrite:
        raise InputError(out, None, None, "holds an earlier export: name another folder, or add --overwrite")


def _unlisted(out: Path) -> dict[str, str]:
    """The manifest of an export of a release that wrote none: files of the names that it wrote, whole with its weights.

    Empty where the weights are not those that the marker tells.
    """
    marker = read_description(out / MARKER)
    if FILES in marker or "content" not in marker:
        return {}
    try:
        content = hash_tensors(read_header(out, "export"))
    except InputError:
        return {}
    names = (*COPIED, WEIGHTS, INDEX, "model-*-of-*.safetensors", "README.md", "mergekit.yaml", MARKER)
    known = [path for name in names for path in out.glob(name)]
    return manifest_of(out, known) if content == marker["content"] else {}


def refuse_full(out: Path, partial: Path, size: int) -> None:
    """Raise InputError where the disk has no room for so many bytes of weights."""
    free = shutil.disk_usage(partial).free
    if free < size:
        mend = f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: name another disk"
        raise InputError(out, None, None, mend)


@contextmanager
def as_input_error(out: Path) -> Iterator[None]:
    """Turn the system's errors of writing into an InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(out, None, None, f"can't be written ({reason})") from error


EditedTensors = Callable[[Sequence[str]], NamedTensors]
"""Yields edited values of some of the base's stored tensors, in the order of their names."""


@dataclass(frozen=True)
class Contents:
    """The tensors of a folder that is written like the base's, by the names under which the base stores them.

    Attributes:
        base: The base.
        layout: Its layout.
        merged: By stored name, the stored tensor of which it is the merged value: itself, or for another name of a tied
            weight the parameter's.
        sizes: Bytes of every tensor, in the order of writing: those that are merged, then the base's own.
    """

    base: Header
    layout: Layout
    merged: Mapping[str, str]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, architecture: Architecture, base: Header, dtype: torch.dtype | None) -> Self:
        """The contents of an export of a composite of this base's in a dtype, its own by default."""
        layout = architecture.layout(base)
        merged = {name: name for name in stored_names(architecture, base)}
        merged |= {alias: layout.sources[parameter][0] for alias, parameter in layout.aliases.items()}
        sizes = {name: _bytes_in(base.tensors[name], dtype) for name in merged}
        return cls(base, layout, merged, sizes | {name: base.tensors[name].nbytes for name in layout.kept})

    def shards(self) -> dict[str, list[str]]:
        """The names that go into each weight file, in order."""
        shards: list[list[str]] = [[]]
        for name, size in self.sizes.items():
            if shards[-1] and sum(self.sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
                shards.append([])
            shards[-1].append(name)
        if len(shards) == 1:
            return {WEIGHTS: shards[0]}
        return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}

    def read(self, names: Sequence[str], edited: EditedTensors) -> NamedTensors:
        """Edited tensors, and copies of the others, one at a time, by the names that they are written under."""
        merged = [name for name in names if name in self.merged]
        tensors = edited([self.merged[name] for name in merged])
        for name, (_, tensor) in zip(merged, tensors, strict=True):
            _refuse_infinite(name, tensor)
            yield self.layout.renaming(name), tensor
        for name, tensor in read_tensors(self.base, [name for name in names if name not in self.merged]):
            yield self.layout.renaming(name), tensor


def _bytes_in(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    """Bytes of a tensor in a dtype, its own unless one is given."""
    return prod(tensor.shape) * dtype.itemsize if dtype else tensor.nbytes


def _merging(architecture: Architecture, export: Export) -> EditedTensors:
    """The merged values of an export's tensors."""
    return lambda names: merged_tensors(architecture, export.base, export.stored, export.composite, names, export.dtype)


def write_weights(folder: Path, contents: Contents, edited: EditedTensors, phase_name: str) -> None:
    """Write the weight files one by one, each from tensors in memory; with several, an index."""
    shards, written = contents.shards(), dict[str, str]()
    with current_progress().phase(phase_name, len(contents.sizes), "tensors") as phase:
        for file, names in shards.items():
            tensors: dict[str, Tensor] = {}
            for name, tensor in contents.read(names, edited):
                tensors[name] = tensor
                phase.advance()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(contents.sizes.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": written})


def _refuse_infinite(name: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor whose sums are beyond the range of its dtype."""
    if not tensor.isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(None, "--dtype", dtype, f"{name} is beyond its range: choose bfloat16 or float32")


def copy_files(base: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copy files and folders of the base whose names match a pattern."""
    for path in sorted({path for pattern in patterns for path in base.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Write a dtype into a config, under the key that it has (`torch_dtype` until transformers 5)."""
    data = read_json(config, dict[str, Any], "base")
    keys = [key for key in ("dtype", "torch_dtype") if key in data] or ["dtype"]
    write_json(config, data | dict.fromkeys(keys, str(dtype).removeprefix("torch.")))


def provenance(composite: Composite, content: str) -> dict[str, object]:
    """Content of the marker: coefficients by content hash, the composite's key, the hash of the written weights.

    Where groups have coefficients of their own, these are `parts`, and `coefficients` those of all other parameters.
    """
    described: dict[str, object] = {"composite": composite.key, "coefficients": _weights(composite.terms)}
    if composite.parts:
        described["parts"] = [
            {"parameters": list(parameters), "coefficients": _weights(terms)} for parameters, terms in composite.parts
        ]
    return described | {"content": content}


def _weights(terms: Terms) -> dict[str, float]:
    return {content: units / UNIT for content, units in terms}


def write_json(file: Path, data: object) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _same_bits(loaded: Tensor, merged: Tensor) -> bool:
    """A loaded parameter has the merged one's shape and bits, in the dtype that it was loaded in."""
    exact = merged.to(loaded.dtype)
    return loaded.shape == exact.shape and torch.equal(
        loaded.contiguous().view(-1).view(torch.uint8), exact.view(-1).view(torch.uint8)
    )
