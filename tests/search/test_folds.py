"""Laws of the two folds of a corpus's windows."""

import numpy as np
import pytest

from dem_opt.search.folds import NARROWEST, cut, two_folds
from dem_opt.types import Score


def end_to_end(windows, texts, seed):
    """Documents of windows of 100 tokens that texts of random lengths fill end to end, in a random order."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(texts), rng.integers(10, 250, size=texts))[: windows * 100]
    counted = [
        {int(document): int(count) for document, count in zip(*np.unique(part, return_counts=True), strict=True)}
        for part in owner.reshape(-1, 100)
    ]
    return [counted[place] for place in rng.permutation(len(counted))]


@pytest.mark.parametrize("seed", range(5))
def test_folds_are_halves_that_share_a_document_at_most(seed):
    documents_W = end_to_end(16, 40, seed)
    tokens_W = [sum(documents.values()) for documents in documents_W]
    first, second = two_folds(tokens_W, documents_W)
    assert sorted((*first, *second)) == list(range(len(tokens_W)))
    shared = {d for w in first for d in documents_W[w]} & {d for w in second for d in documents_W[w]}
    assert len(shared) <= 1
    part = sum(tokens_W[window] for window in first) / sum(tokens_W)
    assert NARROWEST <= part <= 1 - NARROWEST


def test_documents_that_stay_whole_are_never_shared():
    documents_W = [{3 * window: 10, 3 * window + 1: 20} for window in (4, 0, 3, 1, 2, 5)]
    first, second = two_folds([30] * 6, documents_W)
    assert first == (1, 3, 4) and second == (0, 2, 5)


@pytest.mark.parametrize("documents_W", [None, [{7: 10}] * 4])
def test_unknown_documents_and_a_single_one_are_divided_by_windows(documents_W):
    assert two_folds([10] * 4, documents_W) == ((0, 1), (2, 3))


def test_a_cut_has_the_windows_of_the_fold():
    score = Score((1.0, 2.0, 3.0), (4, 5, 6), (7, 8, 9))
    assert cut(score, (0, 2)) == Score((1.0, 3.0), (4, 6), (7, 9))
    assert cut(Score((1.0, 2.0), (4, 5)), (1,)) == Score((2.0,), (5,))
