"""Overlap: n-grams and near-duplicates that streaming finds are those of a comparison of everything with everything."""

import random

import numpy as np
import pytest

from dem_opt.data import overlap
from dem_opt.data.overlap import NGRAM, SHINGLE, SIMILARITY, Index, batch_of, batches, ngrams


def documents(seed: int, count: int, vocabulary: int = 6) -> list[list[int]]:
    """Documents of 1 to 60 tokens of a small vocabulary, so that n-grams repeat."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def edited(ids: list[int], rng: random.Random, changes: int) -> list[int]:
    """A document with some tokens replaced by others."""
    copy = list(ids)
    for place in rng.sample(range(len(copy)), min(changes, len(copy))):
        copy[place] = 100 + rng.randrange(5)
    return copy


def grams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    """N-grams as they are; of a short document the whole, told apart by its length."""
    return [tuple(ids)] if len(ids) < n else [tuple(ids[k : k + n]) for k in range(len(ids) - n + 1)]


def index_of(evaluated: list[list[int]]) -> Index:
    return Index(batch_of(evaluated))


@pytest.fixture(params=range(4))
def texts(request: pytest.FixtureRequest) -> tuple[list[list[int]], list[list[int]]]:
    """Evaluated documents, and a source with copies, edited copies and parts of them among others."""
    rng = random.Random(request.param)
    evaluated = documents(request.param, 40)
    copies = [edited(ids, rng, changes) for changes in (0, 1, 2, 5) for ids in rng.sample(evaluated, 10)]
    parts = [ids[5:40] for ids in rng.sample(evaluated, 10)]
    source = [*documents(100 + request.param, 60), *copies, *parts]
    rng.shuffle(source)
    return evaluated, [ids for ids in source if ids]


@pytest.mark.parametrize("tokens_at_once", [1, 50, 10**6])
def test_shares_are_those_of_sets_of_ngrams(texts, tokens_at_once, monkeypatch):
    monkeypatch.setattr(overlap, "_TOKENS_AT_ONCE", tokens_at_once)
    evaluated, source = texts
    seen = {gram for ids in source for gram in grams(ids, NGRAM)}
    expected = [np.mean([gram in seen for gram in grams(ids, NGRAM)]) for ids in evaluated]
    index = index_of(evaluated)
    matches = index.look_up(batches(source))
    assert 0 < sum(expected) < len(evaluated)
    assert index.shares(matches) == pytest.approx(expected)
    assert (matches.documents, matches.tokens) == (len(source), sum(map(len, source)))
    assert index.sizes().tolist() == [len(grams(ids, NGRAM)) for ids in evaluated]


@pytest.mark.parametrize("tokens_at_once", [1, 50, 10**6])
def test_near_duplicates_are_those_of_all_pairs(texts, tokens_at_once, monkeypatch):
    """The prefix filter leaves out no pair of a Jaccard index of 0.8 or more, and lets none below pass."""
    monkeypatch.setattr(overlap, "_TOKENS_AT_ONCE", tokens_at_once)
    evaluated, source = texts
    sets = [set(grams(ids, SHINGLE)) for ids in source]

    def is_near(ids: list[int]) -> bool:
        own = set(grams(ids, SHINGLE))
        return any(len(own & other) / len(own | other) >= SIMILARITY for other in sets)

    expected = [is_near(ids) for ids in evaluated]
    assert index_of(evaluated).look_up(batches(source)).near_E.tolist() == expected
    assert 5 < sum(expected) < len(evaluated)


def test_a_jaccard_index_of_exactly_the_threshold_is_near():
    """Of 9 shingles each 8 are common: 8 / 10."""
    left = list(range(9 + SHINGLE - 1))
    right = [*left[:-1], 99]
    assert index_of([left]).look_up(batches([right])).near_E.tolist() == [True]
    assert index_of([left[1:]]).look_up(batches([right[1:]])).near_E.tolist() == [False]  # 7 / 9


@pytest.mark.parametrize("length", range(1, NGRAM + 1))
def test_a_short_document_is_found_whole_only(length):
    ids = list(range(1, length + 1))
    index = index_of([ids])
    for source, is_found in (
        ([ids], True),
        ([[0, *ids]], length >= NGRAM),
        ([ids[:-1], ids[-1:]], length == 1),
        ([ids, [7] * 30], True),
    ):
        matches = index.look_up(batches([other for other in source if other]))
        assert (index.shares(matches)[0] == 1.0) == is_found


def test_ngrams_do_not_reach_over_documents():
    ids = list(range(2 * NGRAM))
    index = index_of([ids])
    assert index.shares(index.look_up(batches([ids[:NGRAM], ids[NGRAM:]]))).tolist() == [pytest.approx(2 / (NGRAM + 1))]


def test_the_longest_match_is_the_longest_run_of_shared_tokens():
    ids = list(range(60))
    index = index_of([[5, 6], ids])
    matches = index.look_up(batches([ids[:20], [99, *ids[25:50], 98]]))
    assert index.longest_match(matches, 1).tolist() == ids[25:50]
    assert index.longest_match(matches, 0).tolist() == []


def test_hashes_tell_ngrams_apart():
    """Every sequence of up to four tokens out of six, each as a document of its own."""
    sequences = [[*ids] for length in range(1, 5) for ids in np.ndindex(*[6] * length)]
    hashes, owners = ngrams(batch_of(sequences), 4)
    assert len(set(hashes.tolist())) == len(sequences) == len(hashes)
    assert owners.tolist() == list(range(len(sequences)))
