"""UTF-8 bytes of the text that each token stands for.

Bytes are those of the original text, whatever a tokenizer's normalizer makes of it: a space that the tokenizer puts
before a text has none, and characters that it takes out count for the next token.  The tokens of a text share it out
without gap or overlap, so that their bytes sum to those of the text.  Special tokens count no bytes, also where they
are written out in the text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dem_opt.data.tokenize import Source, Tokens


def scored_bytes(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Bytes of each token of a document that is scored, and 0 for the others [L]."""
    source = tokens.source
    counts_K = (_by_offsets if tokenizer.is_fast else _by_pieces)(source, tokenizer)
    bytes_L = np.zeros(len(tokens), dtype=np.int64)
    # EOS may have been put behind the text's tokens or taken off; it has no bytes.
    first, end = max(source.start, 0), min(source.start + len(counts_K), len(tokens))
    bytes_L[first:end] = counts_K[first - source.start : end - source.start]
    return np.where(tokens.scored_L, bytes_L, 0)


def _by_offsets(source: Source, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Bytes of each token of a text, from the characters that a fast tokenizer says it spans [K].

    Token k gets the characters from  c_{k-1}  to  c_k = min(max_{j<=k} end_j, min_{j>k} start_j) .  So a character of
    several tokens belongs to the one that completes it, and one between two tokens, such as a space that offsets
    leave out, to the second.
    """
    encoding = source.encode(tokenizer, return_offsets_mapping=True, return_special_tokens_mask=True)
    added_K = np.array(encoding["special_tokens_mask"], dtype=bool)
    bytes_K = np.zeros(len(added_K), dtype=np.int64)
    spans_K2 = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[~added_K]
    if not len(spans_K2):
        return bytes_K
    text = source.text
    starts_K, ends_K = spans_K2.T
    later_K = np.minimum.accumulate(np.append(starts_K, len(text))[::-1])[::-1][1:]
    cuts_K = np.minimum(np.maximum.accumulate(ends_K), later_K)
    cuts_K[-1] = len(text)
    counts_K = np.diff(_byte_places(text)[cuts_K], prepend=0)
    ids_K, special = np.array(encoding["input_ids"])[~added_K], _special_tokens(tokenizer)
    for place in np.flatnonzero(np.isin(ids_K, list(special))):
        # An unknown token is special too, but stands for other text than its own name.
        if text[starts_K[place] : ends_K[place]].strip() == special[int(ids_K[place])]:
            counts_K[place] = 0
    bytes_K[~added_K] = counts_K
    return bytes_K


def _by_pieces(source: Source, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Bytes of each token of a text where the tokenizer has no offsets: in proportion to the vocabulary's pieces [K].

    That is exact where the pieces are the text, as those of SentencePiece and of bytes are; elsewhere the sum is.
    """
    ids: Sequence[int] = source.encode(tokenizer)["input_ids"]
    special = _special_tokens(tokenizer)
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        special.pop(tokenizer.unk_token_id, None)  # it stands for text
    pieces = ["" if id in special else piece for id, piece in _pieces(ids, tokenizer)]
    text = source.text
    for content in special.values():
        text = text.replace(content, "")
    total = len(text.encode())
    # A vocabulary of bytes writes each as one character.
    by_character, by_byte = [len(piece) for piece in pieces], [len(piece.encode()) for piece in pieces]
    through_K = np.cumsum(by_character if sum(by_character) == total else by_byte)
    if not len(through_K) or not through_K[-1]:
        return np.zeros(len(ids), dtype=np.int64)
    counts_K: NDArray[np.int64] = np.diff(through_K * total // through_K[-1], prepend=0)
    return counts_K


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Ids with the text of their entries in the vocabulary, in which SentencePiece writes a space as "▁"."""
    entries: Any = tokenizer.convert_ids_to_tokens(list(ids))
    return [(id, entry.replace("▁", " ")) for id, entry in zip(ids, entries, strict=True)]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens by id: those that have a role, and those that were added as special."""
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _byte_places(text: str) -> NDArray[np.int64]:
    """The byte at which each character of a text begins, and its length in bytes."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths)])
