"""The chart between the unit cube and the shares of a space, for samplers that know boxes only.

    p_i = min(cap_i, l max(u_i - d, 0))    u in [0, 1]^F,  d the width of the dead zone,  l so that sum p = 1

A coordinate in its *dead zone* [0, d] is a share of exactly 0, so a sampler that draws from densities over the cube
reaches every face and corner with positive probability, as it does not with softmax or stick-breaking.  Where all live
coordinates are at their caps, the dead ones divide the rest equally: at the corner where all are dead, everything.
(The Euclidean projection onto caps would give back to the dead what caps cut off, and reach no corner of that kind.)
"""

import numpy as np
from numpy.typing import NDArray

from dem_opt.simplex import UNIT

Array = NDArray[np.float64]

DEAD = 0.2
"""Width of the dead zone: with less, TPE took longer to corners and faces, and was no better inside."""

NEAREST = 0.5
"""Least length of the greatest coordinate beyond the dead zone, as a part of the 1 - DEAD that there is."""


def to_shares(cube_F: Array, caps_F: Array) -> Array:
    """The shares at a point of the cube."""
    alive_F = np.maximum(np.asarray(cube_F, dtype=np.float64) - DEAD, 0.0)
    shares_F = _fill(alive_F, caps_F, 1.0)
    rest = max(1.0 - shares_F.sum(), 0.0)
    return shares_F + _fill(np.where(alive_F > 0, 0.0, 1.0), caps_F, rest)


def _fill(weights_F: Array, caps_F: Array, amount: float) -> Array:
    """Divide an amount in proportion to weights, up to the caps; less than the amount where caps leave less.

    Water filling: each round fixes the shares that reach their caps and divides the rest among the others, so it ends
    after at most F rounds.
    """
    full_F = weights_F <= 0
    shares_F = np.zeros(len(caps_F))
    while not full_F.all():
        proportional_F = weights_F * ((amount - shares_F.sum()) / weights_F[~full_F].sum())
        over_F = ~full_F & (proportional_F >= caps_F)
        if not over_F.any():
            return np.where(full_F, shares_F, proportional_F)
        shares_F[over_F] = caps_F[over_F]
        full_F |= over_F
    return shares_F


def from_shares(shares_F: Array, caps_F: Array) -> Array:
    """A point of the cube that has these shares, always the same.

        u_i = d + r (1 - d) p_i / max p        d / 2, the middle of the dead zone, where p_i = 0; 1 at a cap below 1

    r is uniform from NEAREST to 1, drawn from a generator that the shares seed: a sampler sees points of all lengths,
    as if it had been told its own draws.  (At r = 1 TPE drew back to equal shares: over three shares its regret after
    60 trials was up to a thousand times as great.  With vectors of one length a Gaussian process sought improvement at
    the others for ever, and stood still.)
    """
    # Whole units, not floats: the same shares after a round trip through the storage seed the same generator.
    seed_F = np.rint(shares_F * UNIT).astype(np.int64)
    reach = (1 - DEAD) * np.random.default_rng(seed_F).uniform(NEAREST, 1.0)
    cube_F: Array = np.where(shares_F > 0, DEAD + reach * (shares_F / shares_F.max()), DEAD / 2)
    return np.where((shares_F == caps_F) & (caps_F < 1) & (shares_F > 0), 1.0, cube_F)
