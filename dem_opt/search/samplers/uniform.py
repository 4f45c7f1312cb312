"""Random search: points drawn uniformly on the simplex."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.sampler import Choice
from dem_opt.simplex import Coefficients, Space


@dataclass(frozen=True)
class Uniform:
    """Points drawn uniformly on the simplex, or on what bounds leave of it."""

    space: Space

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Choice:
        """A draw, whatever was found so far."""
        return Choice(self.space.sample(rng))
