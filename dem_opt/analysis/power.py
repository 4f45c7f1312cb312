"""Least difference between two composites that windows detect, and the windows that a difference needs.

A two-sided paired test at 5% finds a true difference with 80% probability if it is  z(0.975) + z(0.8) = 2.80  standard
errors (Bloom 1995, Evaluation Review 19:547; Miller 2024, arXiv 2411.00640, section 5).  Standard errors fall with the
square root of the number of windows, as far as more windows are more documents:

    detectable = 2.80 error sqrt(windows / n) ,     n = windows (2.80 error / difference)^2
"""

from dataclasses import dataclass
from math import ceil, fsum, log, sqrt
from statistics import NormalDist

from dem_opt.config import StudyConfig
from dem_opt.types import BITS_PER_BYTE, Precision

STANDARD_ERRORS = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
"""Standard errors of the least difference that is detected."""

TOKEN_SPREAD = 0.25
"""Standard deviation of a token's difference between two composites, in nats, where nothing is measured yet.

Of the quickstart: that of a window of 128 tokens, in nats per token, times sqrt(128), between the best composite and
the median one of the next 63 (quartiles 0.17 and 0.35; dev/LOG.md).
"""

TOKEN_BYTES = 4
"""Bytes of a token, where nothing is measured yet: about those of English text and common tokenizers."""


@dataclass(frozen=True)
class Power:
    """Power of a paired comparison of two composites.

    Attributes:
        error: Standard error of their difference in the objective's unit.
        windows: Windows of each corpus that it is of.
        is_measured: False for a default before there are trials.
    """

    error: float
    windows: int
    is_measured: bool = True

    @classmethod
    def of(cls, config: StudyConfig, precision: Precision | None) -> "Power":
        """The power of a study: measured on its trials, else the one to expect.

        With shares s of the objective's weights the error to expect is  TOKEN_SPREAD sqrt(sum s^2 / (windows * window))
        in nats per token, and in bits per byte that over  TOKEN_BYTES ln 2 .
        """
        if precision is not None:
            return cls(precision.error, precision.windows)
        evaluation, total = config.evaluation, fsum(config.weights.values())
        squares = fsum((weight / total) ** 2 for weight in config.weights.values())
        error = TOKEN_SPREAD * sqrt(squares / (evaluation.windows * evaluation.window))
        if config.objective.unit == BITS_PER_BYTE:
            error /= TOKEN_BYTES * log(2)
        return cls(error, evaluation.windows, is_measured=False)

    def detectable(self, windows: int) -> float:
        """Least difference that so many windows of each corpus detect, in the objective's unit."""
        return STANDARD_ERRORS * self.error * sqrt(self.windows / windows)

    def windows_for(self, difference: float) -> int:
        """Windows of each corpus that detect a difference in the objective's unit."""
        return max(ceil(self.windows * (STANDARD_ERRORS * self.error / difference) ** 2), 2)
