"""Laws of the figures of a proposed mixture: where shares are drawn, which mixture has the ring, hostile names."""

from pathlib import Path

import numpy as np
import pytest

from dem_opt.analysis.data_shares import SharesProposal
from dem_opt.analysis.mixing_cost import Cost, training_cost
from dem_opt.analysis.mixture_prediction import quality
from dem_opt.analysis.mixture_proposal import CorpusSize, Evidence, MixtureProposal, PredictedMixture
from dem_opt.dashboards.mixture_plots import (
    proposal_lines,
    render_proposal,
    shares_figure,
    shares_table,
    simplex_figure,
)
from dem_opt.dashboards.simplex_map import polygon_corners

HOSTILE = "<b>$x$"


def proposal(names: tuple[str, ...], mixtures: int) -> MixtureProposal:
    """Random mixtures over these distributions, predicted in the opposite order."""
    rng = np.random.default_rng(0)
    points = [dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True)) for _ in range(mixtures)]
    losses = rng.permutation(mixtures) + 2.0
    predicted = tuple(
        PredictedMixture(shares=shares, predicted=9 - loss, measured=loss)
        for shares, loss in zip(points, losses.tolist(), strict=True)
    )
    evidence = Evidence(
        predictor="merges",
        source="x",
        tokens=512,
        mixtures=predicted,
        quality=quality(9 - losses, losses) if mixtures else None,
    )
    equal = dict.fromkeys(names, 1 / len(names))
    return MixtureProposal(
        study="s",
        unit="nats per token",
        predictor="curves",
        total=1.0,
        proposal=SharesProposal(
            shares=equal,
            region={name: (0.0, 0.75) for name in names},
            predicted=2.0,
            at_equal=2.0,
            at_natural=2.5,
            divergence=0.0,
            detectable=0.01,
        ),
        steps=4,
        tokens=512,
        sizes={name: CorpusSize(windows=8, documents=4, tokens=200) for name in names},
        natural=equal,
        epochs=dict.fromkeys(names, 0.5),
        epochs_limit=4.0,
        penalty=0.0,
        evidence=(evidence,) if mixtures else (),
        probes=training_cost(10, 10, 100, 1.0),
        search=Cost(),
        training=training_cost(10, 10, 100, 1.0),
        folder=Path(),
    )


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_mixtures_lie_where_their_shares_are_and_the_least_has_the_ring(count: int) -> None:
    names = tuple("abcdefg"[:count])
    result = proposal(names, 6)
    (evidence,) = result.evidence
    figure = simplex_figure(result, evidence)
    rings = [trace for trace in figure.data if trace.marker.symbol == "circle-open"]
    bests = [min(evidence.mixtures, key=lambda mixture: mixture.predicted), evidence.best]
    for ring, best in zip(rings, bests, strict=True):
        expected = np.array(list(best.shares.values())) @ polygon_corners(count)
        assert (ring.x[0], ring.y[0]) == pytest.approx(tuple(expected))
    drawn = [trace for trace in figure.data if trace.marker.colorscale]
    assert [len(trace.x) for trace in drawn] == [6, 6]
    assert sorted(drawn[1].marker.color) == sorted(mixture.measured for mixture in evidence.mixtures)


def test_every_distribution_has_its_region_and_its_marks() -> None:
    figure = shares_figure(proposal(("a", "b", "c"), 6))
    regions = [trace for trace in figure.data if trace.mode == "lines"]
    assert [tuple(trace.x) for trace in regions] == [(0.0, 0.75)] * 3
    assert [len(trace.x) for trace in figure.data if trace.mode == "markers"] == [3, 3, 3]
    assert len(shares_table(proposal(("a", "b", "c"), 0)).rows) == 3


def test_a_proposal_without_trained_mixtures_says_that_it_is_not_tested() -> None:
    tested, untested = (" ".join(proposal_lines(proposal(("a", "b"), mixtures))) for mixtures in (6, 0))
    assert "Spearman -1.00" in tested and "Not tested here" not in tested
    assert "Spearman" not in untested and "Not tested here" in untested
    assert "12% of those of 16 trainings" in tested  # two trainings of 16


def test_names_are_text() -> None:
    page = render_proposal(proposal((HOSTILE, "b", "c"), 6))
    assert HOSTILE not in page and "&lt;b&gt;" in page
