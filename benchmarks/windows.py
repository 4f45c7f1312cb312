"""How many windows: the regret of coefficients that are chosen on few windows, on a problem whose optimum is known.

    python benchmarks/windows.py STUDY

The problem is made from a study that was run.  The loss of each window of its search split is fitted, over the
composites near the winner, by a quadratic in the coefficients; all these windows together are the population, and the
mean of their quadratics has an optimum that is found to any precision.  Then W windows of each corpus are drawn with
replacement, the minimum of their mean is chosen, and its regret under the population's mean is told: mean and 95%
quantile over DRAWS draws, in nats per token, and the standard deviation of the coefficients.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dem_opt.analysis.results import is_whole
from dem_opt.config import load
from dem_opt.simplex import Space, project
from dem_opt.types import Summary
from dem_opt.workflows.stored_results import stored_results

Array = NDArray[np.float64]

WINDOWS = (8, 16, 24, 32, 64, 96, 128, 256)
DRAWS = 400

NEAR = 0.1
"""Composites within so many nats per token of the best are fitted: a quadratic holds near the optimum."""

STEPS = 400
"""Steps of projected gradient descent to an optimum."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    path = parser.parse_args().study
    config = load(path)
    slopes_CWK, curves_CWKK = quadratics(stored_results(config, path), config.space)
    corpora, windows, _ = slopes_CWK.shape
    best_K = minimum(slopes_CWK.mean((0, 1)), curves_CWKK.mean((0, 1)))
    lowest = value(slopes_CWK.mean((0, 1)), curves_CWKK.mean((0, 1)), best_K)
    rng = np.random.default_rng(0)
    print("| windows | tokens of each corpus | regret | 95% quantile | deviation of a coefficient |")
    print("|---|---|---|---|---|")
    for count in WINDOWS:
        regrets, points = [], []
        for _ in range(DRAWS):
            draws_CW = rng.integers(windows, size=(corpora, count))
            point_K = minimum(mean_of(slopes_CWK, draws_CW), mean_of(curves_CWKK, draws_CW))
            points.append(point_K)
            regrets.append(value(slopes_CWK.mean((0, 1)), curves_CWKK.mean((0, 1)), point_K) - lowest)
        cells = (f"{np.mean(regrets):.5f}", f"{np.quantile(regrets, 0.95):.5f}", f"{np.std(points, axis=0).mean():.3f}")
        print(f"| {count} | {count * config.evaluation.window:,} | {' | '.join(cells)} |")


def quadratics(summary: Summary, space: Space) -> tuple[Array, Array]:
    """Slopes [C, W, K] and curvatures [C, W, K, K] of each window's loss in nats per token, of C corpora.

    loss(w) = constant + slope . w + w . curvature . w / 2
    """
    trials = {trial.coefficients: trial for records in summary.trials.values() for trial in records if is_whole(trial)}
    best = min(trial.objective or 0.0 for trial in trials.values())
    near = [trial for trial in trials.values() if (trial.objective or 0.0) < best + NEAR]
    points_NK = np.array([space.point(trial.coefficients) for trial in near])
    names = sorted(name for name, weight in summary.weights.items() if weight)
    nll_NCW = np.array(
        [[np.divide(trial.scores[name].nats_W, trial.scores[name].tokens_W) for name in names] for trial in near]
    )
    dimension = points_NK.shape[1]
    rows, columns = np.triu_indices(dimension)
    # On the simplex the constant and the slopes are not independent, nor are the squares: lstsq takes the smallest.
    features_NP = np.concatenate(
        [np.ones((len(near), 1)), points_NK, points_NK[:, rows] * points_NK[:, columns]], axis=1
    )
    terms_PX, *_ = np.linalg.lstsq(features_NP, nll_NCW.reshape(len(near), -1), rcond=None)
    terms_CWP = terms_PX.T.reshape(*nll_NCW.shape[1:], -1)
    curves_CWKK = np.zeros((*nll_NCW.shape[1:], dimension, dimension))
    curves_CWKK[..., rows, columns] += terms_CWP[..., 1 + dimension :]
    curves_CWKK[..., columns, rows] += terms_CWP[..., 1 + dimension :]
    return terms_CWP[..., 1 : 1 + dimension], curves_CWKK


def mean_of(parts_CW: Array, draws_CW: NDArray[np.int64]) -> Array:
    """The mean over corpora of the mean over the windows that were drawn of each."""
    means: Array = np.stack([part_W[draws_W].mean(axis=0) for part_W, draws_W in zip(parts_CW, draws_CW, strict=True)])
    total: Array = means.mean(axis=0)
    return total


def value(slope_K: Array, curve_KK: Array, point_K: Array) -> float:
    """Loss up to its constant."""
    return float(slope_K @ point_K + point_K @ curve_KK @ point_K / 2)


def minimum(slope_K: Array, curve_KK: Array) -> Array:
    """The minimum over the simplex, by projected gradient descent."""
    point_K, caps_K = np.full(len(slope_K), 1 / len(slope_K)), np.ones(len(slope_K))
    step = 1 / max(float(np.linalg.norm(curve_KK, 2)), 1e-9)
    for _ in range(STEPS):
        point_K = project(point_K - step * (slope_K + curve_KK @ point_K), caps_K)
    return point_K


if __name__ == "__main__":
    main()
