"""Embeddings of a fine-tune with more or fewer rows than the base's: added tokens, padding.

A composite has the base's rows.  Rows beyond are left out; those that a fine-tune lacks are the base's, so that its
distribution vector is zero there.  Both tokenizers must mean the same tokens by the ids that they share.
"""

from dataclasses import replace
from hashlib import sha256
from math import prod

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.files import ITEM_BYTES, Header, LowerRows, StoredTensor, read_json
from dem_opt.errors import InputError


def with_base_rows(architecture: Architecture, base: Header, other: Header) -> Header:
    """The header of a checkpoint that fits, with the base's number of rows for its vocabulary."""
    ours, theirs = architecture.layout(base), architecture.layout(other)
    changed: dict[str, StoredTensor] = {}
    rows = architecture.parameters[architecture.embedding][0]
    for parameter in architecture.vocabulary:
        (name, *_), (original, *_) = theirs.sources[parameter], ours.sources[parameter]
        tensor = other.tensors[name]
        shape = (rows, *tensor.shape[1:])
        if tensor.shape[0] > rows:
            end = tensor.start + prod(shape) * ITEM_BYTES[tensor.dtype]
            changed[name] = replace(tensor, shape=shape, end=end)
        elif tensor.shape[0] < rows:
            below = LowerRows(original, base.tensors[original].file, tensor.shape[0])
            changed[name] = replace(tensor, shape=shape, below=below)
    if not changed:
        return other
    own_rows = other.tensors[theirs.sources[architecture.embedding][0]].shape[0]
    return replace(other, tensors={**other.tensors, **changed}, rows=own_rows)


def differ_in_rows(architecture: Architecture, base: Header, other: Header) -> list[str]:
    """The parameters of the vocabulary that a checkpoint stores with another number of rows, and else as the base."""
    ours, theirs = architecture.layout(base), architecture.layout(other)
    if theirs.borrowed is not None:
        return []
    pairs = {
        name: (ours.form(base, name), theirs.form(other, name))
        for name in architecture.vocabulary
        if name in theirs.sources and name not in ours.fused | theirs.fused
    }
    return [
        name
        for name, ((base_shape,), (shape, *more)) in pairs.items()
        if not more and shape and shape[0] not in (0, base_shape[0]) and shape[1:] == base_shape[1:]
    ]


def check_tokens(base: Header, other: Header) -> None:
    """Raise InputError where two tokenizers mean different tokens by an id."""
    files = [header.folder / "tokenizer.json" for header in (base, other)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = (read_tokens(header) for header in (base, other))
    unlike = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
    if unlike:
        first = unlike[0]
        mend = (
            f"means other tokens than the base's by {len(unlike):,} ids (id {first}: {theirs[first]!r}, the base's "
            f"{ours[first]!r}), so their rows can't be summed: name a fine-tune with the base's tokens"
        )
        raise InputError(files[1], other.field, None, mend)


def read_tokens(header: Header, added: bool = True) -> dict[int, str]:
    """Tokens by id of a folder's tokenizer.json, those that were added to its vocabulary among them.

    Raises:
        InputError: The file is no tokenizer.
    """
    file = header.folder / "tokenizer.json"
    tokenizer = read_json(file, header.field)
    try:
        vocabulary, others = tokenizer["model"].get("vocab") or {}, tokenizer.get("added_tokens") or []
        named = vocabulary.items() if isinstance(vocabulary, dict) else ((x[0], i) for i, x in enumerate(vocabulary))
        tokens = {int(number): str(token) for token, number in named}
        more = {int(token["id"]): str(token["content"]) for token in others}
        return tokens | more if added else tokens
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(file, header.field, None, "unreadable tokenizer: copy or save it again") from None


def fitted_content(base: str, content: str) -> str:
    """The content hash of a checkpoint whose rows are fitted to those of a base."""
    return sha256(repr(("rows of", base, content)).encode()).hexdigest()
