"""Laws of the power of a paired comparison."""

import numpy as np
import pytest
from scipy.stats import norm

from dem_opt.analysis.power import Power


def test_the_least_difference_is_found_in_80_percent_of_the_cases():
    """A difference d and its estimate N(d, error^2): found where the estimate is beyond 1.96 errors on either side."""
    power = Power(noise=0.001, windows=16)
    for windows in (16, 64):
        difference = power.detectable(windows)
        shift = difference / np.sqrt(0.001 * difference * 16 / windows)
        assert norm.sf(1.96 - shift) + norm.cdf(-1.96 - shift) == pytest.approx(0.8, abs=1e-4)


def test_windows_and_differences_turn_each_other_round():
    power = Power(noise=0.001, windows=16)
    assert power.detectable(64) == pytest.approx(power.detectable(16) / 4)
    for windows in (2, 16, 100, 1000):
        assert power.windows_for(power.detectable(windows) * (1 + 1e-9)) == windows
    assert power.windows_for(100.0) == 2, "a single window has no spread"
