"""What all searches of a generation begin with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dem_opt.search.samplers.earlier import Earlier
from dem_opt.simplex import Coefficients
from dem_opt.types import GRADIENT_FORWARDS


@dataclass(frozen=True)
class Known:
    """What the database has of a starting point: shares of the windows of the search split, from 0 to 1.

    Attributes:
        scores: Windows that were scored.
        gradients: Windows of the corpora whose gradient is known.
    """

    scores: float = 0.0
    gradients: float = 0.0

    def forwards(self, gradient: bool) -> float:
        """Forward-equivalents that it spares a trial there, with its gradient or without."""
        return GRADIENT_FORWARDS * self.gradients if gradient else self.scores


@dataclass(frozen=True)
class Beginning:
    """Starting points and earlier observations.

    Attributes:
        start: Points to propose first.
        known: What the database has of each of them, as the generation begins; nothing where none is given.
        earlier: Composites that were scored before: also those of other vectors, or scored on only some of the corpora.
    """

    start: Sequence[Coefficients] = ()
    known: Mapping[Coefficients, Known] = field(default_factory=dict)
    earlier: Earlier = field(default_factory=Earlier)
