"""Starting points and earlier observations, which all searches of a generation share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dem_opt.search.samplers.earlier import Earlier
from dem_opt.simplex import Coefficients
from dem_opt.types import GRADIENT_FORWARDS


@dataclass(frozen=True)
class Known:
    """How much of a starting point is in the database: shares of the search split's windows, from 0 to 1.

    Attributes:
        scores: Share that was scored.
        gradients: Share in corpora whose gradient is known.
    """

    scores: float = 0.0
    gradients: float = 0.0

    def forwards(self, gradient: bool) -> float:
        """Forward-equivalents that a trial there saves, with its gradient or without."""
        return GRADIENT_FORWARDS * self.gradients if gradient else self.scores


@dataclass(frozen=True)
class Beginning:
    """Starting points and earlier observations.

    Attributes:
        start: Points to propose first.
        known: How much of each of them was in the database when the generation began; nothing unless given.
        earlier: Composites that were scored before: also those of other vectors, or scored on only some of the corpora.
    """

    start: Sequence[Coefficients] = ()
    known: Mapping[Coefficients, Known] = field(default_factory=dict)
    earlier: Earlier = field(default_factory=Earlier)
