"""Text -> fixed, hashed windows of token ids, split into search and held-out."""

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dem_opt.config import Distribution, EvaluationSection
from dem_opt.errors import InputError
from dem_opt.question import HELD_OUT, SEARCH
from dem_opt.records import Corpus, Windows

SURPLUS = 8
"""Windows are drawn from at most this many times those asked for, so that a large file costs no more time."""

_CHARACTERS_AT_ONCE = 2**16
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, from its files alone.

    Raises InputError when the folder is missing or its tokenizer can't be read.
    """
    if not folder.is_dir():
        raise InputError(folder, None, None, "no such folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(folder, None, None, f"its tokenizer can't be read ({reason})") from error
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids; truncation and padding, which calls switch, are left out."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        identity = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    else:
        identity = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    return sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def read_documents(path: Path, field: str | None = None) -> list[str]:
    """The documents of a UTF-8 file in its order: each line's "text" of a .jsonl, or a .txt as one document.

    Documents of white space alone are left out; all others come through as they are.  A byte order mark at
    the file's start is no text.  `field` is the study file's field that named the path.

    Raises InputError for a file that is missing, unreadable or not UTF-8, for a line that is no JSON object
    with a "text" string, and where no document is left.
    """
    if path.suffix not in (".jsonl", ".txt"):
        mend = 'must be a .jsonl file (a JSON object with a "text" on each line) or a .txt file (one document)'
        raise InputError(path, field, None, mend)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(path, field, None, "no such file") from None
    except OSError as error:
        raise InputError(path, field, None, f"can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(path, field, None, f"must be UTF-8 text; byte {error.start} is not") from None
    documents = [content] if path.suffix == ".txt" else _texts(content, path, field)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(path, field, None, "has no text; give at least one document that is not empty")
    return documents


def _texts(content: str, path: Path, field: str | None) -> list[str]:
    """The "text" of each line that is not blank; only line feeds end a line: JSON strings may hold others."""
    lines = enumerate(content.split("\n"), start=1)
    return [_text(line, number, path, field) for number, line in lines if line.strip()]


def _text(line: str, number: int, path: Path, field: str | None) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(path, field, line, f"line {number} is not valid JSON ({error})") from None
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        mend = f'line {number} must be a JSON object with a "text" that is a string'
        raise InputError(path, field, line, mend)
    if _SURROGATE.search(text):
        raise InputError(path, field, line, f"line {number} holds half of a surrogate pair, which is no text")
    return text


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, window: int) -> Windows:
    """Documents laid end to end in windows of `window` tokens (ids_WT, positions_WT, scored_WT).

    A document is encoded as its tokenizer does it (with BOS, say, where it adds one), without truncation, and
    ends with EOS where the tokenizer has one, so that its end is predicted too.  Where a window ends within a
    document, the rest goes on in the next window as a fragment of its own.  The last window is padded.
    Windows that score nothing are left out.
    """
    encoded = list(_encode(documents, tokenizer))
    ids_S, starts_S = _stream(encoded)
    missing = -len(ids_S) % window
    pad = tokenizer.pad_token_id or 0
    return _windows(
        np.pad(ids_S, (0, missing), constant_values=pad),
        np.pad(starts_S, (0, missing), constant_values=True),
        window,
    )


def _encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each document's token ids with EOS at the end, encoded in batches as they are asked for."""
    end = tokenizer.eos_token_id
    for batch in _batches(documents):
        encoding = tokenizer(
            batch,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids in encoding["input_ids"]:
            yield ids if end is None or ids[-1:] == [end] else [*ids, end]


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    """The documents in their order, each batch closed by the one that fills it."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _stream(encoded: Sequence[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Documents end to end: token ids, and where a document starts."""
    lengths = np.array([len(ids) for ids in encoded if ids], dtype=np.int64)
    ids_S = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
    starts_S = np.zeros(len(ids_S), dtype=np.bool_)
    starts_S[np.cumsum(lengths) - lengths] = True
    return ids_S, starts_S


def _windows(ids_S: NDArray[np.int64], starts_S: NDArray[np.bool_], window: int) -> Windows:
    """A stream of whole windows, cut: a token's position is its distance from the last start in its window."""
    ids_WT, starts_WT = ids_S.reshape(-1, window), starts_S.reshape(-1, window)
    places_T = np.arange(window)
    positions_WT = places_T - np.maximum.accumulate(np.where(starts_WT, places_T, 0), axis=1)
    windows = Windows(ids_WT, positions_WT, positions_WT > 0)
    return _take(windows, np.flatnonzero(windows.scored_WT.any(axis=1)))


def _take(windows: Windows, chosen_W: NDArray[np.int64]) -> Windows:
    return Windows(windows.ids_WT[chosen_W], windows.positions_WT[chosen_W], windows.scored_WT[chosen_W])


def build_corpora(
    name: str, distribution: Distribution, evaluation: EvaluationSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[Corpus, Corpus]:
    """The search and the held-out corpus of a distribution, which share no document.

    Documents are taken once and ordered by a seeded hash of their text, so neither the name nor the order of
    distributions or lines matters.  With a held_out file each split has its own file, and what stands in the
    validation file too is left out of held-out.  Without one, the validation documents are divided, by
    characters, in the proportion windows : held_out.  Each split's windows are drawn from the full windows of
    its documents; the order of the draw is their fixed order.

    Raises InputError for unreadable files, for a single document to be divided, and for too little text.
    """
    search, held_out = _split(name, distribution, evaluation)
    held_out_path = distribution.held_out or distribution.validation
    drawn = {
        SEARCH: _draw(search, tokenizer, evaluation, "windows", distribution.validation),
        HELD_OUT: _draw(held_out, tokenizer, evaluation, "held_out", held_out_path),
    }
    identity = tokenizer_digest(tokenizer)
    keys = {split: sha256(f"{windows.digest} {identity}".encode()).hexdigest() for split, windows in drawn.items()}
    return (
        Corpus(name, SEARCH, keys[SEARCH], drawn[SEARCH]),
        Corpus(name, HELD_OUT, keys[HELD_OUT], drawn[HELD_OUT]),
    )


def _split(name: str, distribution: Distribution, evaluation: EvaluationSection) -> tuple[list[str], list[str]]:
    """Search and held-out documents, distinct, in seeded order."""
    field = f"distributions.{name}.validation"
    documents = _ordered(read_documents(distribution.validation, field), evaluation.seed)
    if distribution.held_out is None:
        share = evaluation.windows / (evaluation.windows + evaluation.held_out)
        return _divide(documents, share, distribution.validation, field)
    field = f"distributions.{name}.held_out"
    held_out = _ordered(read_documents(distribution.held_out, field), evaluation.seed)
    seen = set(documents)
    unseen = [document for document in held_out if document not in seen]
    if not unseen:
        mend = f"each document stands in {distribution.validation} too; give some that search does not see"
        raise InputError(distribution.held_out, field, None, mend)
    return documents, unseen


def _ordered(documents: Sequence[str], seed: int) -> list[str]:
    """Distinct documents in the order of a seeded hash of their text."""
    return sorted(set(documents), key=lambda document: sha256(f"{seed}\n{document}".encode()).digest())


def _divide(documents: list[str], share: float, path: Path, field: str) -> tuple[list[str], list[str]]:
    """Cut so that the first part's characters are nearest to `share` of all; both parts hold a document."""
    if len(documents) < 2:
        mend = "one document can't be divided into search and held-out; add documents or a held_out file"
        raise InputError(path, field, None, mend)
    ends = np.cumsum([len(document) for document in documents])
    cut = int(np.abs(ends[:-1] - share * ends[-1]).argmin()) + 1
    return documents[:cut], documents[cut:]


def _draw(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationSection,
    field: Literal["windows", "held_out"],
    path: Path,
) -> Windows:
    """As many windows as `field` of the evaluation asks for, drawn from the full windows of the documents."""
    wanted: int = getattr(evaluation, field)
    available = _full_windows(documents, tokenizer, evaluation.window, SURPLUS * wanted)
    if len(available) < wanted:
        mend = (
            f"the split has text for {len(available)} windows of {evaluation.window} tokens; "
            "ask for fewer, shorten evaluation.window or add text"
        )
        raise InputError(path, f"evaluation.{field}", wanted, mend)
    return _take(available, np.random.default_rng(evaluation.seed).permutation(len(available))[:wanted])


def _full_windows(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, window: int, most: int) -> Windows:
    """The first windows without padding, at most `most`; documents beyond them are not encoded."""
    encoded, tokens = [], 0
    for ids in _encode(documents, tokenizer):
        encoded.append(ids)
        tokens += len(ids)
        if tokens >= most * window:
            break
    ids_S, starts_S = _stream(encoded)
    whole = min(len(ids_S) // window, most) * window
    return _windows(ids_S[:whole], starts_S[:whole], window)
