"""Two folds of a corpus's windows, which share as few documents as possible: one chooses, the other judges.

Texts are laid end to end, so windows in the order of their documents share a document with the next one at most.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dem_opt.storage.ledger import Ledger
from dem_opt.types import Folds, Score

NARROWEST = 1 / 4
"""Least share of the scored tokens in a fold."""


def two_folds(tokens_W: Sequence[int], documents_W: Sequence[Mapping[int, int]] | None) -> Folds:
    """Cut the windows, in the order of their documents, where fewest documents are shared, and near the middle.

    Args:
        tokens_W: Scored tokens of each window.
        documents_W: Scored tokens of each window's documents; None where documents are unknown: windows count as such.
    """
    windows = range(len(tokens_W))
    known = documents_W if documents_W is not None else [{window: tokens_W[window]} for window in windows]
    order = sorted(windows, key=lambda window: (min(known[window], default=-1), max(known[window], default=-1), window))
    reached = np.maximum.accumulate([max(known[window], default=-1) for window in order])
    begins = [min(known[window], default=-1) for window in order]
    tokens = np.cumsum([tokens_W[window] for window in order])
    cuts = range(1, len(order))
    inner = [cut for cut in cuts if NARROWEST <= tokens[cut - 1] / tokens[-1] <= 1 - NARROWEST] or list(cuts)
    best = min(
        inner, key=lambda cut: (int(reached[cut - 1] >= begins[cut]), abs(2 * tokens[cut - 1] - tokens[-1]), cut)
    )
    return tuple(sorted(order[:best])), tuple(sorted(order[best:]))


def folds_of(ledger: Ledger, scores: Mapping[str, Score]) -> dict[str, Folds]:
    """Folds of corpora by key, from the layouts that the ledger knows and scores of all windows."""
    folds = {}
    for key, score in scores.items():
        layout = ledger.layout(key)
        folds[key] = two_folds(score.tokens_W, layout.documents_W if layout is not None else None)
    return folds


def cut(score: Score, windows: Sequence[int]) -> Score:
    """A score's windows of a fold."""
    sizes = tuple(score.bytes_W[window] for window in windows) if score.bytes_W else ()
    nats, tokens = (score.nats_W[window] for window in windows), (score.tokens_W[window] for window in windows)
    return Score(tuple(nats), tuple(tokens), sizes)
