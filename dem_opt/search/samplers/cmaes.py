"""CMA-ES in the plane of the shares, by the library `cmaes`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray

from dem_opt.search.samplers.history import Trial, values_of
from dem_opt.search.samplers.sampler import Choice, first_new, first_points
from dem_opt.simplex import Coefficients, Space, plane, project

Array = NDArray[np.float64]

SIGMA = 0.2
"""The first standard deviation, in shares."""

MARGIN = 0.1
"""How far beyond a bound a share is told that is at it, in shares."""

_DRAWS = 100


@dataclass(frozen=True)
class CMAES:
    """The covariance matrix adaptation evolution strategy (Hansen 2016, arXiv:1604.00772) on the simplex.

        p = project(c + H x)        x normal in F - 1 dimensions,  c the centroid,  H an orthonormal basis of {sum = 0}

    The projection reaches faces and corners exactly.  What is told is  x = H' (p - c + s) , whose shares are p too:
    s is -MARGIN where a share is 0, MARGIN where it is at a cap below 1, so a whole distribution can move onto a face.
    (Median regret after 100 trials, where two of 8 shares are best: 0.0033 without a margin, 8e-6 with it, and 0.02 in
    the coordinates of `cube`, whose scale is one too many.)  The library wants two dimensions: with two shares the
    second one is idle.

    Optuna's CmaEsSampler keeps its state in private attributes of trials and goes another way after a resume.  Here
    the distribution is made again for each proposal: trials in the order of their numbers are divided into generations
    of the population size, and those are told that have ended; a failed trial counts as the worst of its own.  The
    proposal is drawn from the newest distribution, so trials that still run are no obstacle.  Where CMA-ES says that it
    should stop, it starts anew.  The first proposals are the points that the study begins with, then the landmarks.
    """

    space: Space

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Choice:
        """The next point; a uniform draw where the distribution has nothing new."""
        if (choice := first_new(first_points(self.space, begin), trials)) is not None:
            return choice
        if self.space.is_point:
            return Choice(self.space.sample(rng))
        taken = {trial.coefficients for trial in trials}
        basis_FD, centre_F, caps_F = self._basis(), self.space.shares(self.space.centroid()), self.space.caps_F
        strategy = self._told(trials, basis_FD, centre_F)
        strategy.reseed_rng(int(rng.integers(2**32)))
        for _ in range(_DRAWS):
            point = self.space.at(project(centre_F + basis_FD @ strategy.ask(), caps_F))
            if point not in taken:
                return Choice(point)
        return Choice(self.space.sample(rng))

    def _basis(self) -> Array:
        """H, [F, D]."""
        basis_FD = plane(len(self.space.caps_F))
        return basis_FD if len(basis_FD) > 2 else np.append(basis_FD, np.zeros((2, 1)), axis=1)

    def _told(self, trials: Sequence[Trial], basis_FD: Array, centre_F: Array) -> CMA:
        """The strategy after all generations that have ended."""
        strategy = _fresh(basis_FD)
        for generation in _ended(trials, strategy.population_size):
            points_NF = np.array([self._beyond(trial.coefficients) for trial, _ in generation])
            points_ND = (points_NF - centre_F) @ basis_FD
            # A step far beyond a small sigma overflows it; the library then says that it diverges, and should stop.
            with np.errstate(over="ignore"):
                strategy.tell([(point_D, value) for point_D, (_, value) in zip(points_ND, generation, strict=True)])
            if strategy.should_stop():
                strategy = _fresh(basis_FD)
        return strategy

    def _beyond(self, coefficients: Coefficients) -> Array:
        """Shares, or MARGIN beyond them where they are at a bound: their projection is the shares."""
        shares_F, caps_F = self.space.shares(coefficients), self.space.caps_F
        beyond_F: Array = shares_F - MARGIN * (shares_F == 0) + MARGIN * ((shares_F == caps_F) & (caps_F < 1))
        return beyond_F


def _fresh(basis_FD: Array) -> CMA:
    return CMA(mean=np.zeros(basis_FD.shape[1]), sigma=SIGMA, seed=0)


def _ended(trials: Sequence[Trial], size: int) -> Iterator[list[tuple[Trial, float]]]:
    """Generations with their values, of those in which nothing runs any more and something was measured."""
    for begin in range(0, len(trials) - size + 1, size):
        generation = trials[begin : begin + size]
        measured = any(trial.objective is not None for trial in generation)
        if measured and all(trial.state != "running" for trial in generation):
            yield list(zip(generation, values_of(generation), strict=True))
