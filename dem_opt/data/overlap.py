"""Overlap of evaluated documents with other texts: shared 13-grams of tokens, and near-duplicates.

Only what is evaluated is held in memory, as hashes of its n-grams; sources of any size stream past it, a batch at a
time.  A hash has 64 bits: of M evaluated and T streamed n-grams  M T / 2^64  meet by chance, half a one for M = 10^7
and T = 10^12 .

An n-gram does not reach over the end of its document.  A document of fewer than n tokens is one n-gram, which only a
document of the same tokens has.

Shape suffixes beside the project's: S tokens of a batch, D its documents, N n-grams, E evaluated documents, U their
distinct n-grams.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

NGRAM = 13
"""Tokens of an n-gram whose match counts as overlap (Brown et al. 2020, arXiv 2005.14165, appendix C, of words)."""

SHINGLE = 5
"""Tokens of the n-grams by which near-duplicates are compared (Lee et al. 2022, arXiv 2107.06499, of words)."""

SIMILARITY = 0.8
"""Jaccard index from which on two documents are near-duplicates, as there."""

LARGE = 0.01
"""Share of n-grams or of documents from which on an overlap is a warning."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_TOKENS_AT_ONCE = 2**18
_ROUNDING = 1e-9  # of products that are whole numbers


Document = Sequence[int] | NDArray[np.int64]
"""Token ids of a document."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids of several documents, end to end."""

    ids_S: NDArray[np.int64]
    lengths_D: NDArray[np.int64]


def batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Documents in batches, each closed by the one that fills it; empty documents are left out."""
    filled: list[Document] = []
    tokens = 0
    for ids in documents:
        if len(ids) == 0:
            continue
        filled.append(ids)
        tokens += len(ids)
        if tokens >= _TOKENS_AT_ONCE:
            yield batch_of(filled)
            filled, tokens = [], 0
    if filled:
        yield batch_of(filled)


def batch_of(documents: Sequence[Document]) -> Batch:
    """Documents, none of which is empty, as one batch."""
    ids_S = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in documents])
    return Batch(ids_S, np.array([len(ids) for ids in documents]))


def ngrams(batch: Batch, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash of each n-gram, documents in their order, and the document that it is of.

    The hash of tokens t_1 ... t_n is  sum_k M^(n-k) f(t_k)  modulo 2^64, with an odd M and a mixing function f; that of
    a short document also has its length in it.
    """
    keys_S = _mix(batch.ids_S.astype(np.uint64))
    ends_D = np.cumsum(batch.lengths_D)
    owner_S = np.repeat(np.arange(len(ends_D)), batch.lengths_D)
    whole_N = np.flatnonzero(ends_D[owner_S] - np.arange(len(keys_S)) >= n)
    hashes, owners = [_rolling(keys_S, n)[whole_N]], [owner_S[whole_N]]
    for length in range(1, n):
        short = np.flatnonzero(batch.lengths_D == length)
        if len(short):
            places = (ends_D[short] - length)[:, None] + np.arange(length)
            hashes.append(_mix(_polynomial(keys_S[places].T) + np.uint64(length)))
            owners.append(short)
    owner_N = np.concatenate(owners)
    order = np.argsort(owner_N, kind="stable")
    return np.concatenate(hashes)[order], owner_N[order]


def _rolling(keys_S: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """The polynomial of each n keys that follow each other."""
    count = max(len(keys_S) - n + 1, 0)
    return _polynomial([keys_S[k : k + count] for k in range(n)])


def _polynomial(keys: Sequence[NDArray[np.uint64]] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = np.zeros_like(keys[0])
    for key in keys:
        value = value * _MULTIPLIER + key
    return value


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): a bijection of 64 bits that spreads each of them."""
    values = values + _MULTIPLIER
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Matches:
    """The part of the evaluated documents that a source has.

    Attributes:
        seen_U: Whether each distinct n-gram stands in the source.
        near_E: Whether each document has a near-duplicate there.
        documents: Documents of the source.
        tokens: Its tokens.
    """

    seen_U: NDArray[np.bool_]
    near_E: NDArray[np.bool_]
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Index:
    """N-grams of evaluated documents, to be looked up in.

    In memory about 30 bytes for each evaluated token: its id, its n-gram's hash and place, its shingle's hash.  A
    source adds a byte for each distinct n-gram, and a batch.

    Attributes:
        batch: The documents, none of which is empty.
    """

    batch: Batch

    def __len__(self) -> int:
        return len(self.batch.lengths_D)

    @cached_property
    def documents(self) -> list[NDArray[np.int64]]:
        """The documents one by one."""
        return np.split(self.batch.ids_S, np.cumsum(self.batch.lengths_D)[:-1])

    @cached_property
    def _ngrams(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """Distinct hashes (sorted), the place there of each n-gram, and where each document's n-grams begin."""
        hashes_N, owner_N = ngrams(self.batch, NGRAM)
        hashes_U, places_N = np.unique(hashes_N, return_inverse=True)
        return hashes_U, places_N, np.searchsorted(owner_N, np.arange(len(self) + 1))

    @cached_property
    def _shingles(self) -> list[NDArray[np.uint64]]:
        """Distinct shingles of each document, sorted."""
        hashes_N, owner_N = ngrams(self.batch, SHINGLE)
        return [np.unique(part) for part in np.split(hashes_N, np.searchsorted(owner_N, np.arange(1, len(self))))]

    @cached_property
    def _rarest(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Shingles (sorted) of which each near-duplicate of a document has one at least, and their documents.

        With Jaccard index  |A & B| / |A | B| >= s  at most  |B| - ceil(s |B|)  shingles of B are missing in A, so that
        A has one of any  |B| - ceil(s |B|) + 1  of them (prefix filtering: Chaudhuri et al. 2006).  The rarest are
        taken, which fewest documents share.
        """
        distinct, counts = np.unique(np.concatenate(self._shingles), return_counts=True)
        chosen = []
        for shingles in self._shingles:
            order = np.argsort(counts[np.searchsorted(distinct, shingles)], kind="stable")
            chosen.append(shingles[order[: len(shingles) - ceil(SIMILARITY * len(shingles) - _ROUNDING) + 1]])
        owner = np.repeat(np.arange(len(self)), [len(shingles) for shingles in chosen])
        hashes = np.concatenate(chosen)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], owner[order]

    def look_up(self, source: Iterable[Batch]) -> Matches:
        """Stream a source past the index."""
        hashes_U, _, _ = self._ngrams
        seen_U, near_E = np.zeros(len(hashes_U), dtype=np.bool_), np.zeros(len(self), dtype=np.bool_)
        documents = tokens = 0
        for batch in source:
            documents, tokens = documents + len(batch.lengths_D), tokens + len(batch.ids_S)
            hashes_N, _ = ngrams(batch, NGRAM)
            places_N = np.minimum(np.searchsorted(hashes_U, hashes_N), len(hashes_U) - 1)
            seen_U[places_N[hashes_U[places_N] == hashes_N]] = True
            self._find_near(batch, near_E)
        return Matches(seen_U, near_E, documents, tokens)

    def _find_near(self, batch: Batch, near_E: NDArray[np.bool_]) -> None:
        """Mark the documents of which a batch has a near-duplicate."""
        rare, rare_owner = self._rarest
        hashes_N, owner_N = ngrams(batch, SHINGLE)
        begins_D = np.searchsorted(owner_N, np.arange(len(batch.lengths_D) + 1))
        first_N, last_N = np.searchsorted(rare, hashes_N), np.searchsorted(rare, hashes_N, side="right")
        hits_N = np.flatnonzero(last_N > first_N)
        if not len(hits_N):
            return
        for hits in np.split(hits_N, np.flatnonzero(np.diff(owner_N[hits_N])) + 1):
            candidates = np.unique(np.concatenate([rare_owner[first_N[hit] : last_N[hit]] for hit in hits]))
            candidates = candidates[~near_E[candidates]]
            if not len(candidates):
                continue
            document = owner_N[hits[0]]
            shingles = np.unique(hashes_N[begins_D[document] : begins_D[document + 1]])
            for candidate in candidates:
                near_E[candidate] = are_near(shingles, self._shingles[candidate])

    def shares(self, matches: Matches) -> NDArray[np.float64]:
        """The share of each document's n-grams that the source has, [E]."""
        _, places_N, starts_E = self._ngrams
        return np.add.reduceat(matches.seen_U[places_N].astype(np.float64), starts_E[:-1]) / np.diff(starts_E)

    def sizes(self) -> NDArray[np.int64]:
        """The number of n-grams of each document, [E]."""
        return np.diff(self._ngrams[2])

    def longest_match(self, matches: Matches, document: int) -> NDArray[np.int64]:
        """The longest run of a document's tokens of which the source has every n-gram; empty where it has none."""
        _, places_N, starts_E = self._ngrams
        seen = matches.seen_U[places_N[starts_E[document] : starts_E[document + 1]]]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8)))
        if not len(edges):
            return np.empty(0, dtype=np.int64)
        begins, ends = edges[::2], edges[1::2]
        longest = int(np.argmax(ends - begins))
        return self.documents[document][begins[longest] : ends[longest] + NGRAM - 1]


def are_near(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> bool:
    """True if the Jaccard index  |A & B| / |A | B|  of two sets without repetition is at least SIMILARITY."""
    if min(len(left), len(right)) < SIMILARITY * max(len(left), len(right)) - _ROUNDING:
        return False
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common >= SIMILARITY * (len(left) + len(right) - common) - _ROUNDING


@dataclass(frozen=True, kw_only=True)
class OverlapRow:
    """Overlap of one split of a corpus with a source.

    Attributes:
        source: Distribution or general corpus that the source belongs to.
        part: "train", or the split.
        corpus: Distribution or general corpus whose documents were looked up.
        split: Their split.
        documents: Their number.
        sharing: Documents of which an n-gram stands in the source.
        share: Share of their n-grams that do, from 0 to 1.
        near_duplicates: Documents of which the source has a near-duplicate.
        example: The longest run of tokens that both have, shortened; "" where there is none.
    """

    source: str
    part: str
    corpus: str
    split: str
    documents: int
    sharing: int
    share: float
    near_duplicates: int
    example: str

    @property
    def is_large(self) -> bool:
        """True if a user should know: from 1% of the n-grams or of the documents on."""
        return self.share >= LARGE or self.near_duplicates >= LARGE * self.documents


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Overlap of a study's corpora with its training data and with each other.

    Written to a JSON file and read back by field name.

    Attributes:
        measured: Date, as YYYY-MM-DD.
        rows: Each corpus and split beside each source.
        training: Tokens of each distribution's training data.
        without_training: Distributions whose training data the study file does not name.
        corpora: Key of each corpus by split and name, by which it is known whether the rows are of a study's data.
    """

    measured: str
    rows: tuple[OverlapRow, ...]
    training: dict[str, int]
    without_training: tuple[str, ...]
    corpora: dict[str, dict[str, str]]
