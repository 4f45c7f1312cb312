"""Warnings of fine-tunes that were trained with other tokens than the base's, which encodes all texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dem_opt.data.tokenize import load_tokenizer, tokenizer_digest
from dem_opt.errors import InputError
from dem_opt.json_files import parse_json

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json")
"""Files that decide which ids a text has; a folder with none of them is taken to have the base's."""


def other_tokenizers(base: Path, folders: Mapping[str, Path], chats: bool) -> list[str]:
    """Warn of each fine-tune whose tokenizer, or chat template where conversations are scored, is not the base's.

    Args:
        base: The base's folder.
        folders: Folders of fine-tunes by name.
        chats: Conversations are scored.
    """
    warnings = []
    for name, folder in folders.items():
        if not _has_same_ids(base, folder):
            warnings.append(f"{name} has another tokenizer than the base{_examples(base, folder)}")
        elif chats and _template(folder) not in (None, _template(base)):
            warnings.append(f"{name} has another chat template than the base; the base's renders all conversations")
    return warnings


def _has_same_ids(base: Path, folder: Path) -> bool:
    """True where the files of a tokenizer are the base's, or are read as the same tokenizer."""
    names = [name for name in FILES if (folder / name).is_file()]
    if all((base / name).is_file() and _content(base / name) == _content(folder / name) for name in names):
        return True
    ours, theirs = _load(base), _load(folder)
    return ours is not None and theirs is not None and tokenizer_digest(ours) == tokenizer_digest(theirs)


def _content(file: Path) -> Any:
    """The content of a tokenizer's file, without truncation and padding, which calls set."""
    content = file.read_bytes()
    if file.name != "tokenizer.json":
        return content
    try:
        return parse_json(content, dict[str, Any]) | {"truncation": None, "padding": None}
    except ValueError:
        return content


def _examples(base: Path, folder: Path) -> str:
    """The ids that stand for other tokens, with one of them, for the end of a warning."""
    ours, theirs = _tokens(base), _tokens(folder)
    unlike = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
    if not unlike:
        return "; the base's encodes all texts"
    first = unlike[0]
    return f": {len(unlike):,} ids, of {theirs[first]!r} for {ours[first]!r} say; the base's encodes all texts"


def _tokens(folder: Path) -> dict[int, str]:
    """Tokens by id; none where the tokenizer can't be read."""
    tokenizer = _load(folder)
    return {} if tokenizer is None else {number: token for token, number in tokenizer.get_vocab().items()}


def _template(folder: Path) -> Any:
    """The chat template of a folder; None where it has none."""
    tokenizer = _load(folder) if any((folder / name).is_file() for name in FILES) else None
    return None if tokenizer is None else tokenizer.chat_template


def _load(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(folder)
    except InputError:
        return None
