"""Shares on a unit simplex with caps, and with limits on the sums of families: projection and sampling.

Shape suffixes: F shares, M points, E breakpoints, n shares of one family.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GIBBS = 30
"""Steps of the Gibbs chain that samples a polytope with limits, for each share."""


@dataclass(frozen=True, eq=False)
class FamilyLimits:
    """The least and the greatest sum of some shares, whose places are `members_n`."""

    members_n: NDArray[np.int64]
    least: float
    most: float

    def sum(self, shares_F: NDArray[np.float64]) -> float:
        """The sum of the family's shares."""
        return float(shares_F[self.members_n].sum())


@dataclass(frozen=True, eq=False)
class Polytope:
    """The shares  {p : 0 <= p_i <= cap_i, sum_i p_i = 1, least_g <= sum_{i in g} p_i <= most_g}  of families g.

    It must have a point.

    Attributes:
        caps_F: The greatest share of each.
        families: Limits of families, which have no member in common.
    """

    caps_F: NDArray[np.float64]
    families: tuple[FamilyLimits, ...] = ()

    def project(self, points_MF: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest points to points [..., F]; zeros, caps and limits come out exactly.

        clip(x - t_g, 0, cap) with one t for everything outside the families and for every family that this leaves
        within its limits; a family at a limit has the t_g of that sum.  (The conditions of Karush, Kuhn and Tucker: t_g
        is t plus the multiplier of the family's limit.)
        """
        if not self.families:
            return project(points_MF, self.caps_F)
        points_MF = np.asarray(points_MF, dtype=np.float64)
        ends = [self._ends(points_MF, family) for family in self.families]
        breaks_ME = np.sort(
            np.concatenate([points_MF, points_MF - self.caps_F, *(end_M1 for pair in ends for end_M1 in pair)], axis=-1)
        )
        clipped_MEF = np.clip(points_MF[..., None, :] - breaks_ME[..., None], 0, self.caps_F)
        sums_ME = clipped_MEF.sum(axis=-1)
        for family in self.families:
            own_ME = clipped_MEF[..., family.members_n].sum(axis=-1)
            sums_ME += np.clip(own_ME, family.least, family.most) - own_ME
        shift_MF = np.repeat(_crossing(breaks_ME, sums_ME, 1.0), points_MF.shape[-1], axis=-1)
        for family, (first_M1, last_M1) in zip(self.families, ends, strict=True):
            members_n = family.members_n
            shift_MF[..., members_n] = np.clip(shift_MF[..., members_n], first_M1, last_M1)
        projected_MF: NDArray[np.float64] = np.clip(points_MF - shift_MF, 0, self.caps_F)
        return projected_MF

    def _ends(
        self, points_MF: NDArray[np.float64], family: FamilyLimits
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The least and the greatest t that leave a family within its limits, [..., 1] each."""
        own_Mn, caps_n = points_MF[..., family.members_n], self.caps_F[family.members_n]
        breaks_ME, sums_ME = _sums(own_Mn, caps_n)
        return _crossing(breaks_ME, sums_ME, family.most), _crossing(breaks_ME, sums_ME, family.least)

    def sample(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw a point uniformly: Dirichlet(1, ..., 1), as normalized exponentials.

        Where limits bind, a Gibbs chain starts from the projected draw: each step draws two shares anew, whose sum it
        keeps.
        """
        caps_F = self.caps_F
        draws_F = rng.exponential(size=len(caps_F))
        shares_F = draws_F / max(draws_F.sum(), 1e-300)
        if len(caps_F) > 1 and ((caps_F < 1).any() or self.families):
            shares_F = self.project(shares_F)
            for _ in range(GIBBS * len(caps_F)):
                i, j = rng.choice(len(caps_F), size=2, replace=False)
                both = shares_F[i] + shares_F[j]
                least, most = self._range(shares_F, i, j)
                shares_F[i] = rng.uniform(least, max(least, most))
                shares_F[j] = both - shares_F[i]
        return np.asarray(shares_F)

    def _range(self, shares_F: NDArray[np.float64], i: int, j: int) -> tuple[float, float]:
        """Between what a share i may be where a share j has the rest of their sum."""
        both = shares_F[i] + shares_F[j]
        least, most = max(0.0, both - self.caps_F[j]), min(self.caps_F[i], both)
        for family in self.families:
            has_i, has_j = i in family.members_n, j in family.members_n
            if has_i == has_j:
                continue
            others = family.sum(shares_F) - shares_F[i if has_i else j]
            ends = family.least - others, family.most - others
            least, most = (
                (max(least, ends[0]), min(most, ends[1]))
                if has_i
                else (
                    max(least, both - ends[1]),
                    min(most, both - ends[0]),
                )
            )
        return least, most


def project(points_MF: NDArray[np.float64], caps_F: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean projection of points [..., F] onto {0 <= p <= caps, sum p = 1}, whose caps sum to at least 1.

    clip(x - t, 0, caps) with the one t that makes the sum 1 (Held, Wolfe, Crowder 1974): the sum falls with t, and is
    linear between the breakpoints x and x - caps, at which a share meets a bound.  Zeros and caps come out exactly,
    so a projected gradient step reaches faces and corners.
    """
    points_MF = np.asarray(points_MF, dtype=np.float64)
    if (caps_F >= 1).all():
        return _project_uncapped(points_MF)
    shift_M1 = _crossing(*_sums(points_MF, caps_F), 1.0)
    clipped_MF: NDArray[np.float64] = np.clip(points_MF - shift_M1, 0, caps_F)
    return clipped_MF


def _sums(
    points_MF: NDArray[np.float64], caps_F: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Breakpoints t of  sum clip(x - t, 0, caps)  in ascending order, and the sums at them."""
    breaks_ME = np.sort(np.concatenate([points_MF, points_MF - caps_F], axis=-1), axis=-1)
    sums_ME: NDArray[np.float64] = np.clip(points_MF[..., None, :] - breaks_ME[..., None], 0, caps_F).sum(axis=-1)
    return breaks_ME, sums_ME


def _crossing(breaks_ME: NDArray[np.float64], sums_ME: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """The t, [..., 1], at which a sum that falls, and is linear between breakpoints, is a total."""
    # The last breakpoint with at least the total, and the next: between them t is found by linear interpolation.
    left_M1 = np.maximum((sums_ME >= total).sum(axis=-1, keepdims=True) - 1, 0)
    right_M1 = np.minimum(left_M1 + 1, breaks_ME.shape[-1] - 1)
    low_M1, high_M1 = (np.take_along_axis(sums_ME, at_M1, axis=-1) for at_M1 in (left_M1, right_M1))
    start_M1, end_M1 = (np.take_along_axis(breaks_ME, at_M1, axis=-1) for at_M1 in (left_M1, right_M1))
    part_M1 = np.divide(low_M1 - total, low_M1 - high_M1, out=np.zeros_like(low_M1), where=low_M1 > high_M1)
    crossing_M1: NDArray[np.float64] = start_M1 + part_M1 * (end_M1 - start_M1)
    return crossing_M1


def _project_uncapped(points_MF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Projection where no cap binds: t = (sum of the k largest - 1) / k, k the most shares that all stay above 0."""
    descending_MF = -np.sort(-points_MF, axis=-1)
    excess_MF = np.cumsum(descending_MF, axis=-1) - 1
    counts_F = np.arange(1, points_MF.shape[-1] + 1)
    positive_MF = descending_MF * counts_F > excess_MF
    support_M1 = len(counts_F) - 1 - np.argmax(positive_MF[..., ::-1], axis=-1, keepdims=True)
    threshold_M1 = np.take_along_axis(excess_MF, support_M1, axis=-1) / (support_M1 + 1)
    projected_MF: NDArray[np.float64] = np.maximum(points_MF - threshold_M1, 0.0)
    return projected_MF
