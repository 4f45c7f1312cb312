"""Least difference to the winner that windows detect, and the windows that a difference needs.

A two-sided paired test at 5% finds a true difference with 80% probability if it is  z = z(0.975) + z(0.8) = 2.80
standard errors (Bloom 1995, Evaluation Review 19:547; Miller 2024, arXiv 2411.00640, section 5).  The error is not one
number: it grows with the distance between two composites.  Around the optimum the loss is a bowl, so over composites at
distance x of the winner

    difference ~ x^2 ,   error ~ x / sqrt(windows) ,   noise = error^2 / difference   is the same for all,

which measured composites confirm from the nearest to the fine-tunes.  A difference is z errors where

    detectable = z^2 noise windows / n ,     n = windows z^2 noise / difference

for n windows of each corpus, as far as more windows are more documents.
"""

from dataclasses import dataclass
from math import ceil, fsum, log
from statistics import NormalDist

from dem_opt.config import StudyConfig
from dem_opt.types import BITS_PER_BYTE, Precision

STANDARD_ERRORS = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
"""Standard errors of the least difference that is detected."""

TOKEN_NOISE = 4.0
"""Noise of one token, in nats, where nothing is measured yet: 2.6 on the quickstart, 7 on SmolLM2-135M (dev/LOG.md)."""

TOKEN_BYTES = 4
"""Bytes of a token, where nothing is measured yet: about those of English text and common tokenizers."""


@dataclass(frozen=True)
class Power:
    """Power of a paired comparison of the winner with another composite.

    Attributes:
        noise: (standard error of their difference)^2 / their difference, in the objective's unit.
        windows: Windows of each corpus that it is of.
        is_measured: False for a default before there are trials.
    """

    noise: float
    windows: int
    is_measured: bool = True

    @classmethod
    def of(cls, config: StudyConfig, precision: Precision | None) -> "Power":
        """The power of a study: measured on its trials, else the one to expect.

        With shares s of the objective's weights the noise to expect is  TOKEN_NOISE sum s^2 / (windows * window)  in
        nats per token, and in bits per byte that over  TOKEN_BYTES ln 2 .
        """
        if precision is not None:
            return cls(precision.noise, precision.windows)
        evaluation, total = config.evaluation, fsum(config.weights.values())
        squares = fsum((weight / total) ** 2 for weight in config.weights.values())
        noise = TOKEN_NOISE * squares / (evaluation.windows * evaluation.window)
        if config.objective.unit == BITS_PER_BYTE:
            noise /= TOKEN_BYTES * log(2)
        return cls(noise, evaluation.windows, is_measured=False)

    def detectable(self, windows: int) -> float:
        """Least difference that so many windows of each corpus detect, in the objective's unit."""
        return STANDARD_ERRORS**2 * self.noise * self.windows / windows

    def windows_for(self, difference: float) -> int:
        """Windows of each corpus that detect a difference in the objective's unit."""
        return max(ceil(self.windows * STANDARD_ERRORS**2 * self.noise / difference), 2)
