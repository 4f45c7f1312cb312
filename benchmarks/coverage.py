"""Coverage of 95% intervals, and the error of races, where windows share documents whose losses are alike.

    python benchmarks/coverage.py [--samples 2000]

Documents of a regime's lengths are cut into windows of 128 tokens as texts are, from a random place on; all windows are
taken, or one in eight at random.  The difference of two composites on a token is the sum of a part of its document and
of one of its own; on a window of a single document both parts have the same variance.  The truth is 0.

Intervals: the share of samples in which `difference` covers the truth, with documents; beside it, if windows are taken
to be independent, and of a percentile bootstrap of windows.  The width is the mean with documents over that of
independent windows.

Races: the windows of a sample are all there are, their order is random, and the trial is better than its control by
exactly the margin.  The share of trials that are stopped must not be above ERROR.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.sampling import Documents
from dem_opt.evaluation.interim_analyses import replay
from dem_opt.evaluation.objective import Objective
from dem_opt.evaluation.racing import ERROR, MARGIN, Race
from dem_opt.types import Score

Array = NDArray[np.float64]

TOKENS = 128
"""Tokens of a window."""

SPREAD = 0.05
"""Standard deviation of the difference of a window of one document, in nats per token."""

WINDOWS = (16, 64)

RESAMPLES = 1000
"""Resamples of the percentile bootstrap."""


@dataclass(frozen=True)
class Regime:
    """Lengths of documents in tokens, drawn between two bounds; windows begin with a document where these are equal."""

    name: str
    shortest: int
    longest: int

    def lengths(self, rng: np.random.Generator, tokens: int) -> NDArray[np.int64]:
        """Lengths of documents that have so many tokens together, at least."""
        return rng.integers(self.shortest, self.longest + 1, size=tokens // self.shortest + 1)


REGIMES = (
    Regime("several documents a window", 15, 60),
    Regime("one document a window", TOKENS, TOKENS),
    Regime("documents of about a window, end to end", 90, 166),
    Regime("documents of about two windows, end to end", 180, 330),
    Regime("documents of 3 to 9 windows", 3 * TOKENS, 9 * TOKENS),
)


@dataclass(frozen=True)
class Sample:
    """Differences of two composites in nats by window, and the documents of the windows."""

    nats_W: Array
    documents: Documents

    @classmethod
    def draw(cls, rng: np.random.Generator, regime: Regime, windows: int, one_in: int) -> "Sample":
        """Windows of documents, all of them or one in so many at random."""
        tokens = windows * one_in * TOKENS
        lengths = regime.lengths(rng, tokens + TOKENS)
        start = 0 if regime.shortest == regime.longest else rng.integers(TOKENS)
        documents_WT = np.repeat(np.arange(len(lengths)), lengths)[start : start + tokens].reshape(-1, TOKENS)
        documents_WT = rng.permutation(documents_WT)[:windows]
        of_document = rng.standard_normal(len(lengths))[documents_WT].sum(axis=1) / TOKENS
        own = rng.standard_normal(windows)
        nats_W = TOKENS * SPREAD * sqrt(0.5) * (of_document + own)
        return cls(nats_W, [_counts(documents_T) for documents_T in documents_WT])


def _counts(documents_T: NDArray[np.int64]) -> dict[int, int]:
    numbers, counts = np.unique(documents_T, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


OBJECTIVE = Objective({"a": 1.0})


def _score(nats_W: Iterable[float]) -> dict[str, Score]:
    nats = tuple(float(value) for value in nats_W)
    return {"a": Score(nats, (TOKENS,) * len(nats))}


def by_documents(sample: Sample) -> tuple[float, float]:
    """The product's interval."""
    return _interval(sample, sample.documents)


def by_windows(sample: Sample) -> tuple[float, float]:
    """The same, as if windows were independent."""
    return _interval(sample, None)


def _interval(sample: Sample, documents: Documents | None) -> tuple[float, float]:
    gap = difference(
        _score(sample.nats_W), _score(np.zeros(len(sample.nats_W))), OBJECTIVE, documents and {"a": documents}
    )
    return gap.low, gap.high


def by_bootstrap(sample: Sample) -> tuple[float, float]:
    """Percentiles of resampled windows."""
    rng, windows = np.random.default_rng(0), len(sample.nats_W)
    means_R = sample.nats_W[rng.integers(windows, size=(RESAMPLES, windows))].mean(axis=1) / TOKENS
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


METHODS: tuple[Callable[[Sample], tuple[float, float]], ...] = (by_documents, by_windows, by_bootstrap)


def is_stopped(sample: Sample) -> bool:
    """Race a trial that is better by the margin than its control, on all windows together."""
    nats_W = sample.nats_W - sample.nats_W.mean() - TOKENS * MARGIN
    control, trial = _score(np.zeros(len(nats_W))), _score(nats_W)
    ended = replay(Race.against(control, {"a": 1.0}), trial, {"a": len(nats_W)})
    return ended is not None and len(ended["a"].nats_W) < len(nats_W)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    samples = parser.parse_args().samples
    print("| documents | windows | drawn | by documents | windows independent | bootstrap | width | stopped |")
    print("|---|---|---|---|---|---|---|---|")
    for regime in REGIMES:
        for windows in WINDOWS:
            for one_in in (1, 8):
                rng = np.random.default_rng(0)
                drawn = [Sample.draw(rng, regime, windows, one_in) for _ in range(samples)]
                ends_MSX = np.array([[method(sample) for sample in drawn] for method in METHODS])
                covered_M = ((ends_MSX[..., 0] <= 0) & (ends_MSX[..., 1] >= 0)).mean(axis=1)
                width_M = (ends_MSX[..., 1] - ends_MSX[..., 0]).mean(axis=1)
                stopped = np.mean([is_stopped(sample) for sample in drawn])
                cells = [f"{covered:.1%}" for covered in covered_M]
                cells += [f"{width_M[0] / width_M[1]:.2f}", f"{stopped:.2%}"]
                drawn_words = "all" if one_in == 1 else f"1 in {one_in}"
                print(f"| {regime.name} | {windows} | {drawn_words} | {' | '.join(cells)} |", flush=True)
    print(f"\nRaces may stop {ERROR:.0%} of the trials that would win.")


if __name__ == "__main__":
    main()
