"""How well something predicts the loss of models trained on data mixtures.

A predictor gives each mixture a number, less for a better one.  It is judged by Spearman's rank correlation with the
trained models' losses, and by its regret: the loss of the mixture that it puts first, minus the least loss of all,

    regret = L(argmin predicted) - min L        nats per token

A *regression* learns the losses of k trained mixtures from features x of the mixtures (their shares, as RegMix does;
or the loss of a merge),

    L(x) = a + b' z ,   min over a, b of  sum_k (L_k - a - b' z_k)^2 + penalty |b|^2 ,   z: x standardised over the k,

with the penalty, of a few, that predicts each of the k best from the others (the exact leave-one-out residuals of ridge
regression: Hastie, Tibshirani and Friedman 2009, equation 7.64).  It is judged on mixtures that had no part in it.

Shape suffixes beside the project's: N mixtures, F features, L values predicted at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dem_opt.analysis.task_scores import Correlation, correlation, spearman

Array = NDArray[np.float64]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties of a regression's slopes, in standardised features."""

DRAWS = 200
"""Choices of the k trained mixtures over which a regression is judged."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a predictor ranks mixtures.

    Attributes:
        mixtures: Number of mixtures that it is judged on.
        spearman: Rank correlation of predictions and losses: 1 where they agree; None where either is constant.
        regret: Loss of the mixture that it puts first minus the least loss, in the losses' unit.
    """

    mixtures: int
    spearman: Correlation | None
    regret: float


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How well a regression on a few trained mixtures ranks the others, over choices of the few.

    Attributes:
        trained: Number k of mixtures that it learns from.
        spearman: Mean rank correlation over the others.
        low: 5% quantile of the correlation over the choices.
        regret: Mean regret among the others, in the losses' unit.
        error: Root of the mean squared error on the others, in the losses' unit.
    """

    trained: int
    spearman: float
    low: float
    regret: float
    error: float


def quality(predicted_N: Array, losses_N: Array) -> Quality:
    """Judge a predictor by the losses of trained models."""
    return Quality(
        mixtures=len(losses_N),
        spearman=correlation(spearman, predicted_N, losses_N),
        regret=regret(predicted_N, losses_N),
    )


def regret(predicted_N: Array, losses_N: Array) -> float:
    """Loss of the mixture that is predicted best, the first of several, minus the least loss."""
    return float(losses_N[int(np.argmin(predicted_N))] - losses_N.min())


def ridge(features_NF: Array, losses_NL: Array, others_MF: Array) -> Array:
    """Predictions [M, L] for other features by ridge regression, with the best leave-one-out penalty of each value."""
    mean_F, scale_F = features_NF.mean(axis=0), features_NF.std(axis=0)
    scale_F = np.where(scale_F > 1e-12, scale_F, np.inf)  # a constant feature says nothing
    z_NF, z_MF = (features_NF - mean_F) / scale_F, (others_MF - mean_F) / scale_F
    mean_L, count = losses_NL.mean(axis=0), len(features_NF)
    centred_NL = losses_NL - mean_L
    left, values, right = np.linalg.svd(z_NF, full_matrices=False)
    best_L, predicted_ML = np.full(losses_NL.shape[1], np.inf), np.tile(mean_L, (len(others_MF), 1))
    for penalty in PENALTIES:
        shrunk = values / (values**2 + penalty * count)
        slopes_FL = right.T @ (shrunk[:, None] * (left.T @ centred_NL))
        # The mean is fitted too: its leverage 1 / N is part of the hat matrix's diagonal.
        leverage_N = 1 / count + ((left * (values * shrunk)) * left).sum(axis=1)
        residuals_NL = (centred_NL - z_NF @ slopes_FL) / np.maximum(1 - leverage_N, 1e-9)[:, None]
        errors_L = (residuals_NL**2).mean(axis=0)
        better_L = errors_L < best_L
        predicted_ML[:, better_L] = (mean_L + z_MF @ slopes_FL)[:, better_L]
        best_L = np.minimum(best_L, errors_L)
    return predicted_ML


def left_out(
    features_NF: Array, losses_NL: Array, weights_L: Sequence[float], trained: int, draws: int = DRAWS, seed: int = 0
) -> LeftOut:
    """Judge a regression on mixtures that it has not seen.

    Args:
        features_NF: Features of the mixtures.
        losses_NL: Losses on each distribution, which are predicted one by one.
        weights_L: The objective's weights, by which losses and predictions are averaged.
        trained: Number of mixtures that are learnt from, at least 2 fewer than all.
        draws: Number of random choices of these.
        seed: Seed of the choices.
    """
    shares_L = np.asarray(weights_L) / np.sum(weights_L)
    rng, count = np.random.default_rng(seed), len(losses_NL)
    correlations, regrets, squares = [], [], []
    for _ in range(draws):
        order = rng.permutation(count)
        seen, others = order[:trained], order[trained:]
        predicted_M = ridge(features_NF[seen], losses_NL[seen], features_NF[others]) @ shares_L
        losses_M = losses_NL[others] @ shares_L
        correlations.append(float(np.nan_to_num(spearman(predicted_M[None], losses_M[None])[0])))
        regrets.append(regret(predicted_M, losses_M))
        squares.append(float(((predicted_M - losses_M) ** 2).mean()))
    return LeftOut(
        trained=trained,
        spearman=float(np.mean(correlations)),
        low=float(np.quantile(correlations, 0.05)),
        regret=float(np.mean(regrets)),
        error=float(np.sqrt(np.mean(squares))),
    )
