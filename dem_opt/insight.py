"""What figures show beside scores: the geometry of the distribution vectors, and what a surrogate believes."""

from dataclasses import dataclass
from math import sqrt

from dem_opt.simplex import Coefficients


@dataclass(frozen=True)
class VectorGeometry:
    """The distribution vectors  v_i = Theta_i - Theta , by their inner products over all stored parameters.

    inner  < v_i , v_j > , a row for each of `names`
    """

    names: tuple[str, ...]
    inner: tuple[tuple[float, ...], ...]

    @property
    def norms(self) -> tuple[float, ...]:
        """|v_i|."""
        return tuple(sqrt(max(row[place], 0.0)) for place, row in enumerate(self.inner))

    def cosine(self, one: int, other: int) -> float | None:
        """< v_i , v_j > / (|v_i| |v_j|), within -1 and 1; None where a vector is zero."""
        norms = self.norms
        if not norms[one] or not norms[other]:
            return None
        return min(1.0, max(-1.0, self.inner[one][other] / (norms[one] * norms[other])))


@dataclass(frozen=True)
class Surrogate:
    """What a Gaussian process, fitted to the trials of all searches, believes of the objective with its penalty.

    optimum    where its mean is lowest
    mean       there, in nats per token
    deviation  there, its standard deviation in nats per token
    names      the distributions that vary over `points`: all of up to three, else the three of which the optimum has
               most, while the others keep their coefficients of the optimum
    points     a lattice over them
    means      the process's mean at each, in nats per token
    trials     how many trials it was fitted to
    """

    optimum: Coefficients
    mean: float
    deviation: float
    names: tuple[str, ...]
    points: tuple[Coefficients, ...]
    means: tuple[float, ...]
    trials: int
