"""Documents -> fixed, hashed windows of token ids, split into search and held-out."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dem_opt.config import CHAT_DATE, DataFile, DistributionSection, EvaluationSection, GeneralSection
from dem_opt.data.chat_template import ChatTemplate, encode_chats, rendered
from dem_opt.data.documents import Document, Pair, document_identity, read_documents
from dem_opt.data.messages import Chat
from dem_opt.data.tokenize import Tokens, encode_pairs, encode_texts, tokenizer_digest
from dem_opt.errors import InputError, located
from dem_opt.types import HELD_OUT, SEARCH, Corpus, Windows

SURPLUS = 8
"""Windows are drawn from at most this many times their number, so that a large file takes no longer."""


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    paired: bool = False,
    today: date = CHAT_DATE,
) -> Windows:
    """Documents of one format in windows of `window` tokens (ids_WT, positions_WT, scored_WT).

    Texts are laid end to end.  A text is encoded as its tokenizer does it (with BOS, say, where it adds one),
    without truncation, and ends with EOS where the tokenizer has one, so that its end is predicted too.  Where
    a window ends within a text, the rest goes on in the next window as a fragment of its own.

    Pairs and conversations stay whole: each stands in the window of the one before it or, where that has not
    the room, begins the next.  One that is longer than a window loses the beginning of what stands before its
    first scored token, all but one token, and then its end.  `paired` encodes pairs for an encoder-decoder;
    `today` is the date that a chat template may write.

    Windows are padded at their end; those that score nothing are left out.  Raises InputError for
    conversations that can't be encoded.
    """
    if _are_texts(documents):
        return _pack_texts(list(encode_texts(documents, tokenizer)), tokenizer, window)
    rows = _rows(_encode(documents, tokenizer, paired, today), window)
    return _fill(rows, window, _pad(tokenizer))


def _are_texts(documents: Sequence[Document]) -> TypeGuard[Sequence[str]]:
    return all(isinstance(document, str) for document in documents)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id or 0)


def _encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, paired: bool, today: date
) -> Iterable[Tokens]:
    """Encode pairs or conversations lazily; those without scored tokens are left out."""
    pairs = [document for document in documents if isinstance(document, Pair)]
    chats = [document for document in documents if isinstance(document, Chat)]
    assert len(documents) in (len(pairs), len(chats)), "documents of one format"
    encoded = encode_pairs(pairs, tokenizer, paired) if pairs else encode_chats(chats, tokenizer, today)
    return (tokens for tokens in encoded if tokens.scored_L.any())


def _pack_texts(encoded: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, window: int) -> Windows:
    ids_S, starts_S = _stream(encoded)
    missing = -len(ids_S) % window
    return _windows(
        np.pad(ids_S, (0, missing), constant_values=_pad(tokenizer)),
        np.pad(starts_S, (0, missing), constant_values=True),
        window,
    )


def _rows(encoded: Iterable[Tokens], window: int, most: int | None = None) -> list[list[Tokens]]:
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
    start = min(before, max(len(tokens) - window, 0))
    return Tokens(tokens.ids_L[start : start + window], tokens.scored_L[start : start + window])


def _fill(rows: Sequence[Sequence[Tokens]], window: int, pad: int) -> Windows:
    """Whole documents as windows: positions restart with each, padding has position 0."""
    ids_WT = np.full((len(rows), window), pad, dtype=np.int64)
    positions_WT = np.zeros((len(rows), window), dtype=np.int64)
    scored_WT = np.zeros((len(rows), window), dtype=np.bool_)
    for row, documents in enumerate(rows):
        start = 0
        for tokens in documents:
            place = slice(start, start + len(tokens))
            ids_WT[row, place], scored_WT[row, place] = tokens.ids_L, tokens.scored_L
            positions_WT[row, place] = np.arange(len(tokens))
            start = place.stop
    return Windows(ids_WT, positions_WT, scored_WT)


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
    name: str,
    data: DistributionSection | GeneralSection,
    evaluation: EvaluationSection,
    tokenizer: PreTrainedTokenizerBase,
    paired: bool = False,
) -> tuple[Corpus, Corpus]:
    """The search and the held-out corpus of a distribution or a general corpus, which share no document.

    Documents are taken once and ordered by a seeded hash of their text, so neither the name nor the order of
    distributions or lines matters.  With a held_out file each split has its own file, and what stands in the
    validation file too is left out of held-out.  Without one, the validation documents are divided, by
    characters, in the proportion windows : held_out.  Each split's windows are drawn from the windows that
    `pack` makes of its documents (of texts, from those without padding); the order of the draw is their fixed
    order.  A corpus's key hashes windows and tokenizer, and with conversations the chat template.

    `paired`: for an encoder-decoder, whose documents must be pairs.

    Raises InputError for unreadable files, for a single document to be divided, and for too little text.
    """
    section = "general" if isinstance(data, GeneralSection) else "distributions"
    files = {SEARCH: data.validation, HELD_OUT: data.held_out or data.validation}
    for split, file in files.items():
        if paired and file.format != "prompt_completion":
            field = f"{section}.{name}.{split if data.held_out and split == HELD_OUT else 'validation'}.format"
            raise InputError(str(file), field, file.format, "an encoder-decoder needs pairs: format prompt_completion")
    builder = _Builder(evaluation, tokenizer, paired)
    search, held_out = builder.split(f"{section}.{name}", data)
    return (
        builder.corpus(name, SEARCH, search, "windows", files[SEARCH]),
        builder.corpus(name, HELD_OUT, held_out, "held_out", files[HELD_OUT]),
    )


@dataclass(frozen=True)
class _Builder:
    """Settings that the corpora of a study share."""

    evaluation: EvaluationSection
    tokenizer: PreTrainedTokenizerBase
    paired: bool

    def split(self, section: str, data: DistributionSection | GeneralSection) -> tuple[list[Document], list[Document]]:
        """Search and held-out documents, distinct, in seeded order."""
        documents = self.ordered(data.validation, f"{section}.validation")
        if data.held_out is None:
            return self.divide(list(documents.values()), str(data.validation), f"{section}.validation")
        held_out = self.ordered(data.held_out, f"{section}.held_out")
        unseen = [document for key, document in held_out.items() if key not in documents]
        if not unseen:
            mend = f"each document stands in {data.validation} too; give some that search does not see"
            raise InputError(str(data.held_out), f"{section}.held_out", None, mend)
        return list(documents.values()), unseen

    def ordered(self, file: DataFile, field: str) -> dict[Hashable, Document]:
        """Distinct documents by what tells them apart, in the order of a seeded hash of their text."""
        documents = read_documents(file, field)
        if self.paired and any(isinstance(document, Chat) for document in documents):
            raise InputError(str(file), field, None, "an encoder-decoder needs pairs of texts, not of messages")
        with located(str(file)):
            distinct = {self.key(document): document for document in documents}
        return dict(sorted(distinct.items(), key=self.order))

    def key(self, document: Document) -> Hashable:
        """Key that tells a document apart from others.

        Of a conversation, the roles and contents, and what the chat template makes of it where that is something else
        because of further keys, such as tool calls; an id that the template does not read makes no other document.
        """
        if not isinstance(document, Chat) or document.bare == document:
            return document
        template = ChatTemplate(self.tokenizer, self.evaluation.date)
        texts = template.texts(document)
        try:
            reads_more = template.texts(document.bare) != texts
        except InputError:  # the template needs the further keys
            reads_more = True
        return (document.bare, texts) if reads_more else document.bare

    def order(self, item: tuple[Hashable, Document]) -> tuple[bytes, str]:
        """A seeded hash; documents that share it, whose roles and contents are the same, by their key."""
        key, document = item
        return sha256(f"{self.evaluation.seed}\n{document_identity(document)}".encode()).digest(), str(key)

    def divide(self, documents: list[Document], path: str, field: str) -> tuple[list[Document], list[Document]]:
        """Cut so that the first part's share of characters is nearest to that of windows; both hold a document."""
        if len(documents) < 2:
            mend = "one document can't be divided into search and held-out; add documents or a held_out file"
            raise InputError(path, field, None, mend)
        share = self.evaluation.windows / (self.evaluation.windows + self.evaluation.held_out)
        with located(path):
            ends = np.cumsum([len(rendered(document, self.tokenizer, self.evaluation.date)) for document in documents])
        cut = int(np.abs(ends[:-1] - share * ends[-1]).argmin()) + 1
        return documents[:cut], documents[cut:]

    def corpus(
        self,
        name: str,
        split: str,
        documents: Sequence[Document],
        field: Literal["windows", "held_out"],
        file: DataFile,
    ) -> Corpus:
        """As many windows as `field` of the evaluation asks for, drawn from those of the documents."""
        wanted: int = getattr(self.evaluation, field)
        with located(str(file)):
            available = self.windows(documents, SURPLUS * wanted)
        if len(available) < wanted:
            mend = (
                f"the split has text for {len(available)} windows of {self.evaluation.window} tokens; "
                "ask for fewer, shorten evaluation.window or add text"
            )
            raise InputError(str(file), f"evaluation.{field}", wanted, mend)
        drawn = np.random.default_rng(self.evaluation.seed).permutation(len(available))[:wanted]
        windows = _take(available, drawn)
        made_by = tokenizer_digest(self.tokenizer, chat=any(isinstance(document, Chat) for document in documents))
        return Corpus(
            distribution=name,
            split=split,
            key=sha256(f"{windows.digest} {made_by}".encode()).hexdigest(),
            windows=windows,
        )

    def windows(self, documents: Sequence[Document], most: int) -> Windows:
        """The first windows, at most `most`; documents beyond them are not encoded."""
        window = self.evaluation.window
        if _are_texts(documents):
            return _full_windows(encode_texts(documents, self.tokenizer), window, most)
        rows = _rows(_encode(documents, self.tokenizer, self.paired, self.evaluation.date), window, most)
        return _fill(rows, window, _pad(self.tokenizer))


def _full_windows(texts: Iterable[list[int]], window: int, most: int) -> Windows:
    """The first windows without padding, at most `most`; texts beyond them are not encoded."""
    encoded, tokens = [], 0
    for ids in texts:
        encoded.append(ids)
        tokens += len(ids)
        if tokens >= most * window:
            break
    ids_S, starts_S = _stream(encoded)
    whole = min(len(ids_S) // window, most) * window
    return _windows(ids_S[:whole], starts_S[:whole], window)


def refuse_ids_beyond(windows: Windows, rows: int, folder: Path, texts: str) -> None:
    """Raise InputError where a text has a token for which the model has no row.

    Args:
        windows: The tokens.
        rows: Rows of the model's embedding.
        folder: The model's folder.
        texts: The data, for the message.
    """
    highest = int(windows.ids_WT.max(initial=-1))
    if highest >= rows:
        mend = (
            f"its tokenizer gives a text of {texts} the added token {highest}, but its embedding has {rows:,} rows: "
            "resize the embedding, or leave out the token"
        )
        raise InputError(folder, None, None, mend)
