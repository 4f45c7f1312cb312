"""Laws of judging predictors of mixtures: known rankings, ridge against its normal equations, losses left out."""

import numpy as np
import pytest

from dem_opt.analysis.mixture_prediction import PENALTIES, left_out, quality, regret, ridge

RNG = np.random.default_rng(7)


def test_a_predictor_is_judged_by_ranks_and_by_its_first() -> None:
    """Ranks 1 2 3 4 5 against 2 1 3 4 5: Spearman 1 - 6 * 2 / (5 * 24) = 0.9; its first has the second least loss."""
    judged = quality(np.array([10.0, 20.0, 30.0, 40.0, 50.0]), np.array([2.0, 1.5, 3.0, 4.0, 9.0]))
    assert judged.mixtures == 5 and judged.regret == 0.5
    assert judged.spearman is not None and judged.spearman.value == pytest.approx(0.9)
    assert judged.spearman.low is not None and judged.spearman.low <= 0.9
    assert quality(np.ones(4), np.arange(4.0)).spearman is None


@pytest.mark.parametrize("transform", [lambda values: 3 * values + 1, np.exp, lambda values: values**3])
def test_only_the_order_of_predictions_counts(transform: object) -> None:
    predicted, losses = RNG.normal(size=9), RNG.normal(size=9)
    assert quality(transform(predicted), losses) == quality(predicted, losses)  # type: ignore[operator]
    assert regret(losses, losses) == 0


def test_ridge_solves_its_equations_at_the_penalty_that_predicts_best_from_the_others() -> None:
    features, others = RNG.normal(size=(12, 3)) * [1, 10, 0.1], RNG.normal(size=(4, 3))
    losses = np.stack([features @ [1.0, 0.2, 5.0] + 0.1 * RNG.normal(size=12), RNG.normal(size=12)], axis=1)
    mean, scale = features.mean(axis=0), features.std(axis=0)

    def fitted(rows: np.ndarray, values: np.ndarray, penalty: float, at: np.ndarray) -> np.ndarray:
        """[1, z] with a penalty on the slopes alone, standardised over all rows."""
        design = np.column_stack([np.ones(len(rows)), (rows - mean) / scale])
        ridge_ = design.T @ design + penalty * len(features) * np.diag([0.0, 1, 1, 1])
        return np.column_stack([np.ones(len(at)), (at - mean) / scale]) @ np.linalg.solve(ridge_, design.T @ values)

    for column in range(2):
        values = losses[:, column]
        errors = []
        for penalty in PENALTIES:
            left = [np.arange(12) != n for n in range(12)]
            one_out = [fitted(features[keep], values[keep], penalty, features[~keep])[0] for keep in left]
            errors.append(np.mean((values - one_out) ** 2))
        expected = fitted(features, values, PENALTIES[int(np.argmin(errors))], others)
        assert ridge(features, losses, others)[:, column] == pytest.approx(expected)


def test_a_constant_feature_says_nothing() -> None:
    features, losses = RNG.normal(size=(6, 2)), RNG.normal(size=(6, 1))
    constant = np.column_stack([features, np.full(6, 3.0)])
    others = RNG.normal(size=(3, 2))
    assert ridge(constant, losses, np.column_stack([others, np.full(3, 9.0)])) == pytest.approx(
        ridge(features, losses, others)
    )
    assert ridge(np.ones((6, 1)), losses, np.zeros((2, 1))) == pytest.approx(np.full((2, 1), losses.mean()))


def test_a_regression_ranks_unseen_mixtures_of_a_linear_loss_and_none_of_noise() -> None:
    shares = RNG.dirichlet(np.ones(4), 20)
    losses = 3 - shares @ np.diag([0.5, 0.2, 0.1, 0.8])
    linear = left_out(shares, losses, [1, 1, 1, 1], trained=8, draws=30)
    assert linear.spearman > 0.95 and linear.low > 0.9 and linear.regret < 0.01 and linear.error < 0.02
    noise = left_out(shares, RNG.normal(size=losses.shape), [1, 1, 1, 1], trained=8, draws=30)
    assert abs(noise.spearman) < 0.4 and noise.regret > linear.regret
