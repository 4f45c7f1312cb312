"""Windows of a corpus, and what a model scores on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import fsum, isfinite, log
from operator import mul

import numpy as np
from numpy.typing import NDArray

from dem_opt.errors import EvaluationError
from dem_opt.types.units import NATS_PER_TOKEN, perplexity


@dataclass(frozen=True)
class CorpusLayout:
    """Text and documents of a corpus's windows.

    Attributes:
        bytes_W: UTF-8 bytes of the text that is scored in each window.
        documents_W: Scored tokens of each document in each window, by the document's number in the split; a document
            that is cut stands in several windows.
    """

    bytes_W: tuple[int, ...]
    documents_W: tuple[Mapping[int, int], ...]


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one corpus in their fixed order.

    Positions restart at 0 where a document starts, which keeps packed documents apart.  A scored token is
    predicted from the tokens before it in its own document; a document's first token, prompts and padding are
    not scored.  Padding is at the end of a window, has position 0 and is never scored.  For an
    encoder-decoder a document's tokens before its first scored one are the source, the others the target.

    Attributes:
        ids_WT: Token ids.
        positions_WT: Positions.
        scored_WT: Which tokens are scored.
        documents_WT: Number of each token's document in the seeded order of its split; -1 for padding.  None where it
            is not needed, as in training.
        bytes_WT: UTF-8 bytes of the text that each scored token stands for, 0 for others.  None where they were not
            counted.
    """

    ids_WT: NDArray[np.int64]
    positions_WT: NDArray[np.int64]
    scored_WT: NDArray[np.bool_]
    documents_WT: NDArray[np.int64] | None = None
    bytes_WT: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        assert self.ids_WT.shape == self.positions_WT.shape == self.scored_WT.shape
        assert all(each is None or each.shape == self.ids_WT.shape for each in (self.documents_WT, self.bytes_WT))

    def __len__(self) -> int:
        return len(self.ids_WT)

    def take(self, chosen: Sequence[int]) -> "Windows":
        """Some of the windows."""
        chosen_W = np.array(chosen, dtype=np.int64)
        return Windows(
            self.ids_WT[chosen_W],
            self.positions_WT[chosen_W],
            self.scored_WT[chosen_W],
            None if self.documents_WT is None else self.documents_WT[chosen_W],
            None if self.bytes_WT is None else self.bytes_WT[chosen_W],
        )

    @cached_property
    def tokens_W(self) -> tuple[int, ...]:
        """Scored tokens of each window."""
        return tuple(int(count) for count in self.scored_WT.sum(axis=1))

    @cached_property
    def bytes_W(self) -> tuple[int, ...]:
        """UTF-8 bytes of the text that is scored in each window; empty where they were not counted."""
        return () if self.bytes_WT is None else tuple(self.bytes_WT.sum(axis=1).tolist())

    @cached_property
    def layout(self) -> CorpusLayout | None:
        """Bytes and documents of each window, where they are known."""
        if self.bytes_WT is None or self.documents_WT is None:
            return None
        return CorpusLayout(self.bytes_W, tuple(self._documents_W(self.documents_WT)))

    def _documents_W(self, documents_WT: NDArray[np.int64]) -> Iterator[dict[int, int]]:
        for documents_T, scored_T in zip(documents_WT, self.scored_WT, strict=True):
            numbers, tokens = np.unique(documents_T[scored_T], return_counts=True)
            yield dict(zip(numbers.tolist(), tokens.tolist(), strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, positions and scored tokens, which decide the nats."""
        digest = sha256(repr(self.ids_WT.shape).encode())
        for array in (self.ids_WT, self.positions_WT, self.scored_WT):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Windows of one split of a distribution or general corpus; `key` hashes windows and tokenizer."""

    distribution: str
    split: str
    key: str
    windows: Windows


@dataclass(frozen=True)
class Score:
    """Loss of one composite on one corpus, or on the first of its windows.

    Attributes:
        nats_W: Negative log-likelihood summed over the scored tokens of each window, in nats (float64).
        tokens_W: Scored tokens of each window.
        bytes_W: UTF-8 bytes of the text that is scored in each window; empty where they are not known.

    Raises:
        EvaluationError: A window's nats are not finite: NaN is never a score.
    """

    nats_W: tuple[float, ...]
    tokens_W: tuple[int, ...]
    bytes_W: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.nats_W) == len(self.tokens_W) and sum(self.tokens_W) > 0
        assert len(self.bytes_W) in (0, len(self.nats_W))
        for window, nats in enumerate(self.nats_W):
            if not isfinite(nats):
                raise EvaluationError(f"the loss of window {window} is {nats}")

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(self.tokens_W)

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats per token:  sum_W nats / sum_W tokens."""
        return fsum(self.nats_W) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(NLL)."""
        return perplexity(self.nll)

    @property
    def bytes(self) -> int | None:
        """UTF-8 bytes of the scored text, where they are known."""
        return sum(self.bytes_W) if self.bytes_W else None

    @property
    def bits_per_byte(self) -> float | None:
        """sum_W nats / (ln 2 sum_W bytes); None where the bytes are not known, or there are none."""
        return fsum(self.nats_W) / (log(2) * self.bytes) if self.bytes else None

    def sizes_W(self, unit: str) -> tuple[float, ...]:
        """Divisors that turn nats into a loss in this unit: tokens, or  ln 2 bytes , of each window.

        Raises:
            EvaluationError: The unit is bits per byte, and the bytes are not known or there are none.
        """
        if unit == NATS_PER_TOKEN:
            return self.tokens_W
        if not self.bytes:
            raise EvaluationError("a loss in bits per byte needs the number of bytes, which is not known or 0")
        return tuple(log(2) * count for count in self.bytes_W)

    def loss(self, unit: str) -> float:
        """The loss in this unit:  sum_W nats / sum_W sizes ."""
        return self.nll if unit == NATS_PER_TOKEN else fsum(self.nats_W) / fsum(self.sizes_W(unit))


def weighted_sum(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """The score with  sum_n weight_n nats_n  on every window, of scores of the same windows."""
    nats_WN = zip(*(score.nats_W for score in scores), strict=True)
    summed_W = (fsum(map(mul, nats_N, weights)) for nats_N in nats_WN)
    return Score(tuple(summed_W), scores[0].tokens_W, scores[0].bytes_W)
