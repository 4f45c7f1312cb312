"""The winner as a checkpoint folder, proved from disk."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dem_opt.arena import merged_parameters
from dem_opt.checkpoints import (
    INDEX,
    WEIGHTS,
    Header,
    content_hash,
    hash_tensors,
    read_architecture,
    read_header,
    silence_transformers,
)
from dem_opt.errors import InputError
from dem_opt.records import Composite, Standing
from dem_opt.simplex import UNIT, Coefficients

MARKER = "dem_opt.json"
"""The file of an exported folder that says what it was made from; a folder that has it may be written again."""

SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in one weight file at most."""

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)
"""What an export takes over from the base's folder, where the base has it."""


FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- merge
- distribution-edited-model
- dem_opt
---"""
"""What model hubs read of a card."""


class ExportError(RuntimeError):
    """What was read back from disk is not what was to be written."""


@dataclass(frozen=True)
class Export:
    """A composite on disk.

    base     the base's folder, which gave config and tokenizer
    folders  checkpoint folders by content hash, at least those of the composite's terms
    content  the content hash of the written weights
    """

    path: Path
    base: Path
    folders: Mapping[str, Path]
    composite: Composite
    content: str


def write_composite(
    base: Path,
    folders: Mapping[str, Path],
    composite: Composite,
    out: Path,
    card: str,
    approve: Callable[[Export], None],
) -> Export:
    """Write a composite as a Hugging Face folder in the base's dtypes, whole and approved or not at all.

    Config, generation config and tokenizer are the base's; `card` becomes README.md.  Tied weights are written
    once.  The folder gets its name, in the place of an earlier export, when `approve` has seen it and not raised.

    Raises InputError where `out` holds anything else or can't be written, and where a checkpoint's content is no
    longer what `folders` says.
    """
    used = {content: folders[content] for content, _ in composite.terms}
    _refuse(out, [base, *used.values()])
    for content, folder in used.items():
        if content_hash(folder) != content:
            raise InputError(folder, None, None, "its weights have changed since they were scored; run again")
    header = read_header(base, "base")
    names = list(read_architecture(header).parameters)
    with _in_place_of(out) as partial:
        with _told(out):
            partial.mkdir(parents=True)
            _refuse_full(out, partial, _size(header, names))
            _write_weights(partial, _plan(header, names), used, composite)
            _copy(base, partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
        content = hash_tensors(read_header(partial, "export"))
        with _told(out):
            _write_json(partial / MARKER, _provenance(composite, content))
        written = Export(partial, base, used, composite, content)
        approve(written)
    return replace(written, path=out)


def prove(export: Export) -> None:
    """Load the folder through transformers and compare every parameter with a fresh merge, bit for bit.

    Raises ExportError naming the first tensor that differs.
    """
    header = read_header(export.path, "export")
    if hash_tensors(header) != export.content:
        raise ExportError(f"{export.path}: its weights are not those that were written")
    dtypes = {tensor.dtype for tensor in header.tensors.values()}
    dtype = "auto" if len(dtypes) == 1 else torch.float32
    silence_transformers()
    model = AutoModelForCausalLM.from_pretrained(export.path, local_files_only=True, dtype=dtype)
    loaded = dict(model.named_parameters())
    names = list(read_architecture(read_header(export.base, "base")).parameters)
    if unlike := sorted(loaded.keys() ^ set(names)):
        raise ExportError(f"{export.path}: does not load with the base's parameters: {unlike[0]}")
    for name, merged in merged_parameters(names, export.folders, export.composite):
        if not _same_bits(loaded[name].detach(), merged):
            raise ExportError(f"{export.path}: {name} does not load as it was merged")


def model_card(
    name: str,
    coefficients: Coefficients,
    contents: Mapping[str, str],
    libraries: Mapping[str, str],
    standings: Sequence[Standing] = (),
) -> str:
    """The README of an export: formula, coefficients, scores on both splits, provenance.

    contents   content hash by name, "base" among the distributions
    libraries  versions by name
    standings  the lines of the table of scores; none where nothing was scored
    """
    weights = {"base": coefficients.base_units / UNIT, **coefficients.weights}
    terms = [[name, f"{weight:.9f}", contents[name]] for name, weight in weights.items()]
    scores = [_scores(split, standings) for split in (standings[0].objective if standings else ())]
    parts = [
        FRONT_MATTER,
        f"# {_plain(name)}",
        "A distribution-edited model: the weighted sum of models fine-tuned from one base, each on one data\n"
        "distribution, with coefficients chosen by the perplexity of the sum.",
        "    Theta_D = Theta + sum_i w_i (Theta_i - Theta)",
        "## Coefficients",
        _table(["model", "coefficient", "content (SHA-256)"], terms),
        *scores,
        "## Made with",
        _table(["library", "version"], [list(item) for item in libraries.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _scores(split: str, standings: Sequence[Standing]) -> str:
    """The table of one split: NLL for each distribution and their weighted mean, and the mean's perplexity."""
    names = list(standings[0].scores[split])
    rows = []
    for one in standings:
        mean = one.objective[split]
        nlls = [f"{one.scores[split][name].nll:.4f}" for name in names]
        rows.append([one.label, *nlls, f"{mean:.4f}", f"{exp(mean):.3f}"])
    title = f"## Scores on the {_plain(split.replace('_', '-'))} split\n\nNLL in nats per token."
    return f"{title}\n\n{_table(['composite', *names, 'mean', 'perplexity of the mean'], rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    shown = [cells if cells[0] == "---" else [_plain(cell) for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>&|#~$!])", r"\\\1", " ".join(text.split()))


def _refuse(out: Path, inputs: Sequence[Path]) -> None:
    """Raise InputError where `out` holds something that is not to be replaced."""
    if out.resolve() in {folder.resolve() for folder in inputs}:
        raise InputError(out, None, None, "is one of the checkpoints to be merged: name another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise InputError(out, None, None, "holds something that dem-opt did not export: name another folder")
    if out.exists() and not out.is_dir():
        raise InputError(out, None, None, "is a file: name a folder")


def _refuse_full(out: Path, partial: Path, size: int) -> None:
    """Raise InputError where the disk has no room for so many bytes of weights."""
    free = shutil.disk_usage(partial).free
    if free < size:
        mend = f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: name another disk"
        raise InputError(out, None, None, mend)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """What the system refuses while writing, as an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(out, None, None, f"can't be written ({error.strerror or error})") from error


@contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """The name of a folder beside `out` that takes its place when all went well, and is gone when not."""
    partial, former = (out.with_name(f".{out.name}.{state}") for state in ("partial", "former"))
    _settle(out, partial, former)
    try:
        yield partial
        with _told(out):
            if out.exists():
                out.rename(former)
            partial.rename(out)
    finally:
        _settle(out, partial, former)


def _settle(out: Path, partial: Path, former: Path) -> None:
    """Clear away what an export, or one that was killed, left; `out` comes back if it was moved for nothing."""
    if former.is_dir() and not out.exists():
        former.rename(out)
    for folder in (partial, former):
        shutil.rmtree(folder, ignore_errors=True)


def _size(header: Header, names: Sequence[str]) -> int:
    """Bytes of the named tensors."""
    return sum(header.tensors[name].end - header.tensors[name].start for name in names)


def _plan(header: Header, names: Sequence[str]) -> dict[str, list[str]]:
    """The names that go into each weight file, in order."""
    shards: list[list[str]] = [[]]
    for name in names:
        if shards[-1] and _size(header, [*shards[-1], name]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_weights(
    folder: Path, plan: Mapping[str, Sequence[str]], folders: Mapping[str, Path], composite: Composite
) -> None:
    """Merge and write one weight file after the other, and the index where there are several."""
    total = 0
    for file, names in plan.items():
        tensors = dict(merged_parameters(names, folders, composite))
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy(base: Path, folder: Path) -> None:
    """Config, generation config and tokenizer of the base."""
    for path in sorted({path for pattern in COPIED for path in base.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _provenance(composite: Composite, content: str) -> dict[str, object]:
    """What the marker says: coefficients by content hash, the composite's key, the hash of what came out."""
    coefficients = {term: units / UNIT for term, units in composite.terms}
    return {"composite": composite.key, "coefficients": coefficients, "content": content}


def _write_json(file: Path, data: object) -> None:
    """Indented JSON."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _same_bits(loaded: Tensor, merged: Tensor) -> bool:
    """Whether a loaded parameter has the merged one's shape and bits, in the dtype that it was loaded in."""
    exact = merged.to(loaded.dtype)
    return loaded.shape == exact.shape and torch.equal(
        loaded.contiguous().view(-1).view(torch.uint8), exact.view(-1).view(torch.uint8)
    )
