"""Check that stored tensors are the parameters that a base's config describes, and say what is left out."""

import re
from math import prod

import torch
from torch import Tensor

from dem_opt.checkpoints.architecture import Architecture, read_architecture
from dem_opt.checkpoints.files import Header, read_tensors
from dem_opt.checkpoints.hf_config import read_config
from dem_opt.checkpoints.layout import Form, Layout, grouped, missing, renamed
from dem_opt.checkpoints.vocabulary import check_tokens, differ_in_rows, read_tokens
from dem_opt.errors import InputError

_SHOWN = 3
"""Mismatches listed in an error; the rest are counted."""

_FACTOR = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\b")


def check_base(base: Header) -> Architecture:
    """The base's architecture, after checking that its stored tensors are the parameters.

    Raises:
        InputError: A tensor is missing or of another shape, or the tokenizer has ids beyond the embedding.
    """
    architecture = read_architecture(base)
    layout = architecture.layout(base)
    _refuse_parts(base, layout, architecture)
    differences = _shape_differences(architecture, layout, base)
    absent = [*missing(architecture, layout), *([layout.borrowed] if layout.borrowed else [])]
    differences += _missing(absent, layout, base, architecture)
    if differences:
        mend = f"not the parameters of a {architecture.name}: {_list(differences)}"
        raise InputError(base.folder, base.field, None, mend)
    for parameter in architecture.parameters:
        layout.dtype(base, parameter)
    _check_ties(base, layout, "config.json ties them: set tie_word_embeddings to false")
    _check_tokenizer(base, architecture)
    return architecture


def check_fit(architecture: Architecture, base: Header, other: Header) -> None:
    """Check that a checkpoint has the base's parameters, shapes and vocabulary; its dtypes may differ.

    Tied weights may be stored under all their names or only as the parameter.  Tensors that neither the base's class
    nor the checkpoint's own loads are passed over.

    Raises:
        InputError: One for all differences.
    """
    ours, theirs = architecture.layout(base), architecture.layout(other)
    _refuse_parts(other, theirs, architecture)
    rows = differ_in_rows(architecture, base, other)
    differences = [line for name, line in _form_differences(architecture, base, other).items() if name not in rows]
    own = _own_architecture(architecture, theirs, other, ours)
    absent = missing(architecture, theirs)
    if theirs.borrowed and own is not None and own.head is not None:
        absent.append(theirs.borrowed)
    differences += _missing(absent, theirs, other, architecture)
    if own is not None:
        loaded = set(theirs.unused) - set(own.layout(other).unused)
        differences += [f"{name} is unknown to it" for name in theirs.unused if name in loaded]
    differences += [
        f"{name} is stored in another form than the base's"
        for name in sorted(ours.fused | theirs.fused)
        if ours.plain_sources(name) != theirs.plain_sources(name) and name in theirs.sources
    ]
    vocabulary, others = (read_config(header.folder, header.field).get("vocab_size") for header in (base, other))
    if others != vocabulary and not rows:
        differences.append(f"its config.json has a vocabulary (vocab_size) of {others}, the base's of {vocabulary}")
    if differences:
        mend = f"does not fit the base {base.folder}: {_list(differences)}"
        raise InputError(other.folder, other.field, None, mend)
    for parameter in architecture.parameters:
        theirs.dtype(other, parameter)
    if rows:
        check_tokens(base, other)
    reason = f"the config.json of the base {base.folder} ties them: name a base that stores its head, too"
    _check_ties(other, theirs, reason)
    _check_buffers(base, ours, other, theirs)


def left_out(architecture: Architecture, header: Header) -> list[str]:
    """Say which tensors of a checkpoint that fits are passed over, and which names were understood otherwise."""
    layout = architecture.layout(header)
    lines = []
    for count, change in renamed(layout.renaming, header.tensors):
        lines.append(f"{_tensors(count)} {change}")
    if layout.borrowed:
        lines.append(f"{layout.borrowed} is not stored and tied: it is the other embedding's tensor")
    if header.rows is not None:
        rows = architecture.parameters[architecture.embedding][0]
        others = "those beyond are left out" if header.rows > rows else "the others are the base's"
        lines.append(f"its vocabulary has {header.rows:,} rows, the base's {rows:,}: {others}")
    parts = (("outside the language model", layout.outside), (f"that {architecture.name} does not load", layout.unused))
    lines += [
        f"{_tensors(len(names))} {place}: {grouped(names)}; exports have the base's" for place, names in parts if names
    ]
    return lines


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' if count > 1 else ''}"


def _refuse_parts(header: Header, layout: Layout, architecture: Architecture) -> None:
    """Raise InputError for weights that were saved in parts: placeholders, flat shards, factors of an adapter."""
    empty = [
        stored
        for name, names in layout.sources.items()
        for stored in names
        if architecture.sizes[name] and not prod(header.tensors[stored].shape)
    ]
    if empty:
        cause = "it was saved under DeepSpeed's ZeRO-3 without gathering"
        cure = "make the weights with its zero_to_fp32.py, or save with stage3_gather_16bit_weights_on_model_save"
        mend = f"{_tensors(len(empty))} of size 0 ({grouped(empty)}): {cause}; {cure}"
        raise InputError(header.folder, header.field, None, mend)
    if flat := [name for name in header.tensors if name.endswith("flat_param")]:
        mend = f"holds flat shards of FSDP ({grouped(flat)}): save its full state dict"
        raise InputError(header.folder, header.field, None, mend)
    if factors := [name for name in header.tensors if _FACTOR.search(name)]:
        mend = (
            f"holds an adapter's factors beside the weights ({grouped(factors)}): merge them, or save the adapter alone"
        )
        raise InputError(header.folder, header.field, None, mend)
    if layout.ambiguous:
        starts = ", ".join(repr(start) for start in (layout.renaming.old, *layout.ambiguous))
        raise InputError(header.folder, header.field, None, f"holds several models, named {starts}: save one alone")


def _own_architecture(architecture: Architecture, theirs: Layout, other: Header, ours: Layout) -> Architecture | None:
    """The architecture of a checkpoint's own config, where it decides whether its tensors are what they seem."""
    foreign = {theirs.renaming(name) for name in theirs.unused} - {ours.renaming(name) for name in ours.unused}
    return read_architecture(other) if foreign or theirs.borrowed else None


def _shape_differences(architecture: Architecture, layout: Layout, base: Header) -> list[str]:
    """For an error, each parameter of the base that is stored in other shapes than the class has."""
    differences = []
    for name in layout.sources:
        shape, form = architecture.parameters[name], layout.form(base, name)
        if form != (shape,) and not (name in layout.fused and prod(shape) == sum(map(prod, form))):
            differences.append(_difference(name, form, (shape,), architecture))
    return differences


def _form_differences(architecture: Architecture, base: Header, other: Header) -> dict[str, str]:
    """For an error, each parameter of a checkpoint that is stored in other shapes than the base's."""
    ours, theirs = architecture.layout(base), architecture.layout(other)
    forms = {name: (theirs.form(other, name), ours.form(base, name)) for name in theirs.sources}
    return {name: _difference(name, *pair, architecture) for name, pair in forms.items() if pair[0] != pair[1]}


def _difference(name: str, form: Form, expected: Form, architecture: Architecture) -> str:
    hint = " (another vocabulary)" if name == architecture.embedding and form[0][1:] == expected[0][1:] else ""
    return f"{name} is {_show(form)}, not {_show(expected)}{hint}"


def _missing(absent: list[str], layout: Layout, header: Header, architecture: Architecture) -> list[str]:
    """For an error, the parameters that have no tensor, and the tensors that are no parameter."""
    if not absent:
        return []
    kinds = read_config(header.folder, header.field).get("architectures") or [architecture.name]
    kind = f" (its config.json says {kinds[0]})" if kinds != [architecture.name] else ""
    words = [f"{grouped(absent)} {'is' if len(absent) == 1 else 'are'} missing{kind}"]
    return words + ([f"it has {grouped(layout.unused)} instead"] if layout.unused else [])


def _show(form: Form) -> str:
    """Shapes as [2, 3], those that are fused joined by a plus."""
    return " + ".join(str(list(shape)) for shape in form)


def _list(differences: list[str]) -> str:
    """The first differences, and a count of the others."""
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return "; ".join(differences[:_SHOWN]) + more


def _check_tokenizer(base: Header, architecture: Architecture) -> None:
    """Raise InputError where the vocabulary of tokenizer.json has an id that the embedding has no row for.

    Added tokens may be beyond it, as in many published models, where no text has them (`refuse_ids_beyond`).
    """
    file = base.folder / "tokenizer.json"
    highest = max(read_tokens(base, added=False), default=-1) if file.is_file() else -1
    rows = architecture.parameters[architecture.embedding][0]
    if highest >= rows:
        mend = f"its vocabulary has id {highest}, the embedding {architecture.embedding} only {rows} rows"
        raise InputError(file, base.field, None, mend)


def _check_ties(header: Header, layout: Layout, reason: str) -> None:
    """Raise InputError where a weight that the base's config ties is stored twice with different values."""
    for alias, name in layout.aliases.items():
        (_, copy), (_, parameter) = read_tensors(header, (alias, layout.sources[name][0]))
        if not _agree(copy, parameter):
            raise InputError(header.folder, header.field, None, f"{alias} and {name} differ, but {reason}")


def _agree(x: Tensor, y: Tensor) -> bool:
    """The same values, perhaps in two dtypes."""
    wider = torch.promote_types(x.dtype, y.dtype)
    return torch.equal(x.to(wider), y.to(wider))


def _check_buffers(base: Header, ours: Layout, other: Header, theirs: Layout) -> None:
    """Raise InputError where a stored buffer is not the base's: composites keep the base's."""
    shared = [name for name in ours.buffers if name in theirs.buffers]
    originals = read_tensors(base, [ours.buffers[name] for name in shared])
    others = read_tensors(other, [theirs.buffers[name] for name in shared])
    for name, (_, original), (_, buffer) in zip(shared, originals, others, strict=True):
        shared_part = tuple(slice(min(sizes)) for sizes in zip(original.shape, buffer.shape, strict=False))
        if original.ndim != buffer.ndim or not torch.equal(original[shared_part], buffer[shared_part]):
            raise InputError(other.folder, other.field, None, f"its buffer {name} is not the base's")
