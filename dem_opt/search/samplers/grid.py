"""Grid search: the lattice, each point once."""

from collections.abc import Sequence

import numpy as np

from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.proposer import Proposal, first_new
from dem_opt.simplex import Coefficients, Space


class Grid:
    """The points whose shares are multiples of 1 / divisions, in the lattice's order."""

    def __init__(self, space: Space, divisions: int) -> None:
        self._lattice = tuple(space.lattice(divisions))

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """The first lattice point that no trial has.  Raises ValueError where none is left."""
        if (proposal := first_new(self._lattice, trials)) is not None:
            return proposal
        raise ValueError(f"all {len(self._lattice)} points of the lattice have been proposed")
