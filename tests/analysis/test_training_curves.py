"""Laws of training curves: exact curves are found again, noise changes little, a loss that rises has no gain."""

import numpy as np
import pytest

from dem_opt.analysis.training_curves import FEWEST, SCALES, TrainingCurve, fit_curve


@pytest.mark.parametrize("place", [0, 13, 39])
@pytest.mark.parametrize("count", [FEWEST, 50])
def test_an_exact_curve_is_found_again(count: int, place: int) -> None:
    curve = TrainingCurve(start=4.0, gain=0.7, scale=float(SCALES[place] * count))
    fitted = fit_curve(curve.loss(np.arange(float(count))).tolist())
    assert fitted is not None
    assert (fitted.start, fitted.gain, fitted.scale) == pytest.approx((4.0, 0.7, curve.scale), rel=1e-6)


def test_noise_moves_losses_less_than_it_is() -> None:
    curve, steps = TrainingCurve(start=3.0, gain=0.5, scale=8.0), np.arange(60.0)
    noisy = curve.loss(steps) + 0.1 * np.random.default_rng(0).normal(size=60)
    fitted = fit_curve(noisy.tolist())
    assert fitted is not None and np.abs(fitted.loss(steps) - curve.loss(steps)).max() < 0.1


def test_a_curve_never_rises() -> None:
    fitted = fit_curve([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    assert fitted is not None and fitted.gain == 0 and fitted.start == pytest.approx(1.25)
    assert fitted.loss(np.array([0.0, 1e6])).tolist() == [fitted.start] * 2


def test_few_steps_have_no_curve() -> None:
    assert fit_curve([3.0, 2.0, 1.5, 1.2, 1.1][: FEWEST - 1]) is None
