"""Random search: points drawn uniformly on the simplex."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.proposer import Proposal
from dem_opt.simplex import Coefficients, Space


@dataclass(frozen=True)
class Uniform:
    """Points drawn uniformly on the simplex, or on the part of it that bounds leave."""

    space: Space

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """Draw a point, whatever the trials."""
        return Proposal(self.space.sample(rng))
