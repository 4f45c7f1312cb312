"""Documents -> windows of token ids.

Shape suffixes beside the project's: S tokens of a stream, L tokens of one document.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dem_opt.config import CHAT_DATE
from dem_opt.data.byte_counts import scored_bytes
from dem_opt.data.chat_template import encode_chats
from dem_opt.data.documents import Document, Pair
from dem_opt.data.messages import Chat
from dem_opt.data.tokenize import Tokens, encode_pairs, encode_texts
from dem_opt.types import Windows


@dataclass(frozen=True, eq=False)
class Packing:
    """Windows, and where their tokens come from.

    Attributes:
        windows: The windows; their bytes are not counted.
        encoded: Encoded documents.
        encoded_WT: Which of them each token belongs to; -1 for padding.
        places_WT: The token's place in it.
    """

    windows: Windows
    encoded: Sequence[Tokens]
    encoded_WT: NDArray[np.int64]
    places_WT: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        encoded: Sequence[Tokens],
        encoded_WT: NDArray[np.int64],
        places_WT: NDArray[np.int64],
        positions_WT: NDArray[np.int64],
        pad: int,
    ) -> "Packing":
        """The windows of the tokens at these places of encoded documents; none is scored at position 0."""
        scored_WT = _laid_out([tokens.scored_L for tokens in encoded], np.array([False]), encoded_WT, places_WT)
        documents = np.array([*(tokens.document for tokens in encoded), -1], dtype=np.int64)
        windows = Windows(
            _laid_out([tokens.ids_L for tokens in encoded], np.array([pad]), encoded_WT, places_WT),
            positions_WT,
            scored_WT & (positions_WT > 0),
            documents[encoded_WT],
        )
        return cls(windows, encoded, encoded_WT, places_WT)

    def take(self, chosen_W: NDArray[np.int64]) -> "Packing":
        """Some of the windows."""
        windows, documents_WT = self.windows, self.windows.documents_WT
        assert documents_WT is not None
        taken = Windows(
            windows.ids_WT[chosen_W],
            windows.positions_WT[chosen_W],
            windows.scored_WT[chosen_W],
            documents_WT[chosen_W],
        )
        return Packing(taken, self.encoded, self.encoded_WT[chosen_W], self.places_WT[chosen_W])

    def with_bytes(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """The windows with bytes, for which the documents that stand in them are encoded again."""
        used = np.unique(self.encoded_WT[self.encoded_WT >= 0])
        bytes_L = [scored_bytes(self.encoded[place], tokenizer) for place in used]
        used_WT = np.where(self.encoded_WT < 0, -1, np.searchsorted(used, self.encoded_WT))
        bytes_WT = _laid_out(bytes_L, np.array([0]), used_WT, self.places_WT)
        # A document's first token in a window is not scored, also where the window before has its beginning.
        return replace(self.windows, bytes_WT=np.where(self.windows.scored_WT, bytes_WT, 0))


def _laid_out(
    values_L: Sequence[NDArray[Any]],
    padding_1: NDArray[Any],
    documents_WT: NDArray[np.int64],
    places_WT: NDArray[np.int64],
) -> NDArray[Any]:
    """The values at these places of documents, each of which has its own values; the padding for document -1."""
    starts = np.cumsum([0, *map(len, values_L)])
    values_S = np.concatenate([*values_L, padding_1])
    laid_out_WT: NDArray[Any] = values_S[np.where(documents_WT < 0, -1, starts[documents_WT] + places_WT)]
    return laid_out_WT


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    paired: bool = False,
    today: date = CHAT_DATE,
    most: int | None = None,
) -> Packing:
    """Documents of one format in windows of `window` tokens.

    Texts are laid end to end.  A text is encoded as its tokenizer does it (with BOS, say, where it adds one),
    without truncation, and ends with EOS where the tokenizer has one, so that its end is predicted too.  Where
    a window ends within a text, the rest goes on in the next window as a fragment of its own.

    Pairs and conversations stay whole: each stands in the window of the one before it or, where that has not
    the room, begins the next.  One that is longer than a window loses the beginning of what stands before its
    first scored token, all but one token, and then its end.

    Windows are padded at their end; those that score nothing are left out.

    Args:
        documents: Texts, pairs or conversations.
        tokenizer: The tokenizer.
        window: Tokens of a window.
        paired: Encode pairs for an encoder-decoder.
        today: The date that a chat template may write.
        most: Number of windows at most, and of texts only those without padding.  Documents beyond them are not
            encoded.

    Raises:
        InputError: A conversation can't be encoded.
    """
    pad = int(tokenizer.pad_token_id or 0)
    if _are_texts(documents):
        texts = encode_texts(documents, tokenizer)
        return _end_to_end(list(texts if most is None else _first(texts, most * window)), window, pad, most)
    return _whole(_rows(_encode(documents, tokenizer, paired, today), window, most), window, pad)


def _are_texts(documents: Sequence[Document]) -> TypeGuard[Sequence[str]]:
    return all(isinstance(document, str) for document in documents)


def _first(texts: Iterable[Tokens], enough: int) -> Iterator[Tokens]:
    """The first texts, as many as have enough tokens together."""
    tokens = 0
    for text in texts:
        yield text
        tokens += len(text)
        if tokens >= enough:
            break


def _end_to_end(encoded: Sequence[Tokens], window: int, pad: int, most: int | None) -> Packing:
    """Texts as one stream, cut into windows: a token's position is its distance from the last start in its window."""
    lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
    encoded_S = np.repeat(np.arange(len(encoded)), lengths)
    places_S = np.arange(len(encoded_S)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if most is None:
        missing = -len(encoded_S) % window
        encoded_S, places_S = np.pad(encoded_S, (0, missing), constant_values=-1), np.pad(places_S, (0, missing))
    end = window * (len(encoded_S) // window if most is None else min(len(encoded_S) // window, most))
    encoded_WT, places_WT = encoded_S[:end].reshape(-1, window), places_S[:end].reshape(-1, window)
    columns_T = np.arange(window)
    positions_WT = columns_T - np.maximum.accumulate(np.where(places_WT == 0, columns_T, 0), axis=1)
    packing = Packing.of(encoded, encoded_WT, places_WT, positions_WT, pad)
    return packing.take(np.flatnonzero(packing.windows.scored_WT.any(axis=1)))


def _encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, paired: bool, today: date
) -> Iterable[Tokens]:
    """Encode pairs or conversations lazily; those without scored tokens are left out."""
    pairs = [document for document in documents if isinstance(document, Pair)]
    chats = [document for document in documents if isinstance(document, Chat)]
    assert len(documents) in (len(pairs), len(chats)), "documents of one format"
    encoded = encode_pairs(pairs, tokenizer, paired) if pairs else encode_chats(chats, tokenizer, today)
    return (tokens for tokens in encoded if tokens.scored_L.any())


def _rows(encoded: Iterable[Tokens], window: int, most: int | None) -> list[list[Tokens]]:
    """The documents of each window, at most `most` windows; documents beyond them are not encoded."""
    rows: list[list[Tokens]] = []
    room = 0
    for tokens in encoded:
        fitted = _fit(tokens, window)
        if len(fitted) > room:
            if len(rows) == most:
                break
            rows.append([])
            room = window
        rows[-1].append(fitted)
        room -= len(fitted)
    return rows


def _fit(tokens: Tokens, window: int) -> Tokens:
    """At most `window` tokens: first those before the first scored token go, all but one, then the last ones."""
    before = max(int(tokens.scored_L.argmax()) - 1, 0)
    return tokens.cut(min(before, max(len(tokens) - window, 0)), window)


def _whole(rows: Sequence[Sequence[Tokens]], window: int, pad: int) -> Packing:
    """Whole documents as windows: positions restart with each, padding has position 0."""
    encoded_WT = np.full((len(rows), window), -1, dtype=np.int64)
    places_WT = np.zeros_like(encoded_WT)
    number = 0
    for row, documents in enumerate(rows):
        start = 0
        for tokens in documents:
            part = slice(start, start + len(tokens))
            encoded_WT[row, part], places_WT[row, part] = number, np.arange(len(tokens))
            number, start = number + 1, part.stop
    return Packing.of(list(chain.from_iterable(rows)), encoded_WT, places_WT, places_WT, pad)
