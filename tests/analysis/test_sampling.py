"""Laws of sampling errors where windows share documents."""

from math import inf

import numpy as np
import pytest

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.sampling import Documents, Sampling
from dem_opt.evaluation.objective import Objective
from dem_opt.types import Score

TOKENS = 100
ALONE = Objective({"a": 1.0})


def windows_of(lengths: list[int], windows: int, start: int = 0) -> Documents:
    """Documents of these lengths end to end, cut into windows."""
    documents_S = np.repeat(np.arange(len(lengths)), lengths)[start : start + windows * TOKENS]
    counted = [np.unique(documents_T, return_counts=True) for documents_T in documents_S.reshape(windows, TOKENS)]
    return [dict(zip(numbers.tolist(), counts.tolist(), strict=True)) for numbers, counts in counted]


def sampling(documents: Documents | None, windows: int) -> Sampling:
    return Sampling.of((TOKENS,) * windows, documents)


@pytest.mark.parametrize("size", [1, 4])
def test_clusters_have_the_clustered_error(size: int) -> None:
    """G documents of `size` windows each: Var = G / (G - 1) sum_g (sum of residuals in g)^2 / T^2, G - 1 degrees.

    That is the variance of a mean of G independent values, the documents' means.
    """
    groups = 6
    values_W = np.random.default_rng(0).normal(size=groups * size)
    clusters = sampling(windows_of([size * TOKENS] * groups, groups * size), groups * size)
    means_G = values_W.reshape(groups, size).mean(axis=1) / TOKENS
    assert clusters.variance(values_W) == pytest.approx(means_G.var(ddof=1) / groups)
    assert clusters.freedom == pytest.approx(groups - 1)


def test_any_number_of_documents_within_windows_leaves_these_independent() -> None:
    values_W = np.random.default_rng(0).normal(size=8)
    inside, independent = sampling(windows_of([20] * 40, 8), 8), sampling(None, 8)
    assert inside.variance(values_W) == pytest.approx(independent.variance(values_W))
    assert inside.freedom == pytest.approx(independent.freedom) == pytest.approx(7)
    assert inside.has_documents and not independent.has_documents


def test_documents_end_to_end_by_hand() -> None:
    """Half of each window is the next one's document: C is 1 on the diagonal, 1/2 beside it, so for 4 windows

    sum C = 4 + 6/2 = 7, sum C^2 = 4 + 6/4 = 5.5, tr(R'CR) = tr C - 1'C1 / 4 = 4 - 7/4 = 9/4;
    c = 4 / (9/4) * 7 / 5.5, and for residuals 1, 1, -1, -1:  e'Ce = 4 + 2 * 1/2 * (1 - 1 + 1) = 5.
    """
    ends = sampling(windows_of([50, 100, 100, 100, 100], 4), 4)
    assert ends.variance(np.array([1.0, 1.0, -1.0, -1.0])) == pytest.approx(4 / (9 / 4) * 7 / 5.5 * 5 / 400**2)


def test_a_single_document_says_nothing_of_others() -> None:
    single = sampling(windows_of([800], 8), 8)
    assert not single.is_defined and single.variance(np.arange(8.0)) == inf
    scores = {"a": Score(tuple(map(float, range(8))), (TOKENS,) * 8)}
    base = {"a": Score((1.0,) * 8, (TOKENS,) * 8)}
    gap = difference(scores, base, ALONE, {"a": windows_of([800], 8)})
    assert (gap.low, gap.high, gap.sampled) == (-inf, inf, "documents")
    assert difference(scores, base, ALONE).sampled == "windows"


@pytest.mark.parametrize("lengths", [[30] * 60, [90] * 20, [150] * 12, [450] * 4])
def test_drawn_errors_have_the_variance_and_the_tails(lengths: list[int]) -> None:
    windows = 16
    values_W, rng = np.random.default_rng(0).normal(size=windows), np.random.default_rng(1)
    sample = sampling(windows_of(lengths, windows, start=10), windows)
    residuals_NW = sample.residuals(values_W)[None, :]
    normal_R = sample.errors(residuals_NW, 20_000, rng)[0]
    assert normal_R.var() == pytest.approx(sample.variance(values_W), rel=0.05)
    wide_R = sample.errors(residuals_NW, 20_000, rng, tails=True)[0]
    assert np.quantile(np.abs(wide_R), 0.95) > np.quantile(np.abs(normal_R), 0.95)


@pytest.mark.parametrize("lengths", [(15, 60), (100, 100), (70, 130), (150, 250), (300, 900)])
@pytest.mark.parametrize("windows", [16, 64])
def test_intervals_cover_the_truth_as_often_as_they_say(lengths: tuple[int, int], windows: int) -> None:
    """Half of a window's variance is its documents'; the truth is 0.  Of 400 samples 95% are 380, deviation 4.4."""
    rng, covered, count = np.random.default_rng(0), 0, 400
    for _ in range(count):
        drawn = rng.integers(lengths[0], lengths[1] + 1, size=windows * TOKENS // lengths[0] + 2)
        documents = windows_of(drawn.tolist(), windows, int(rng.integers(TOKENS)))
        effects = rng.normal(size=len(drawn))
        shared_W = np.array([sum(effects[number] * tokens for number, tokens in each.items()) for each in documents])
        nats_W = shared_W + TOKENS * rng.normal(size=windows)
        left, right = ({"a": Score(tuple(map(float, each)), (TOKENS,) * windows)} for each in (nats_W, 0 * nats_W))
        gap = difference(left, right, ALONE, {"a": documents})
        covered += gap.low <= 0 <= gap.high
    assert 0.92 <= covered / count <= 0.985
