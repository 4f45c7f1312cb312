"""Training curves of fine-tunes: the loss of a distribution by the steps of its own data.

    L(n) = a - b log(1 + n / m)        nats per token after n steps,  b >= 0

is fitted by least squares to the losses of a fine-tune's batches, which it had not seen before.  A model that is
trained on shares s of the data for N steps has taken s_i N on distribution i, and L_i(s_i N) is what it learns there;
`dem_opt.analysis.data_shares.CurvePredictor` adds what it forgets.  The level a, and the difference between training
and validation data, do not change which shares are best.

Shape suffixes beside the project's: S steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEWEST = 6
"""Steps below which no curve is fitted: it has three parameters."""

SCALES = np.geomspace(0.01, 4.0, 40)
"""Candidates of m, as parts of the number of steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """L(n) = start - gain log(1 + n / scale).

    Attributes:
        start: a, the loss before the first step, in nats per token.
        gain: b, in nats per token.
        scale: m, in steps.
    """

    start: float
    gain: float
    scale: float

    def loss(self, steps: Array) -> Array:
        """The loss after so many steps on the distribution's own data, in nats per token."""
        losses: Array = self.start - self.gain * np.log1p(steps / self.scale)
        return losses


def fit_curve(losses: Sequence[float]) -> TrainingCurve | None:
    """Fit a curve to the losses of successive batches, the first after no step; None of too few."""
    if len(losses) < FEWEST:
        return None
    losses_S, steps_S = np.array(losses), np.arange(len(losses), dtype=np.float64)
    curves = [_with_scale(losses_S, steps_S, float(scale)) for scale in SCALES * len(losses)]
    return min(curves, key=lambda curve: float(((curve.loss(steps_S) - losses_S) ** 2).sum()))


def _with_scale(losses_S: Array, steps_S: Array, scale: float) -> TrainingCurve:
    """The least-squares line in log(1 + n / m), or the mean where the line would rise."""
    rows_S = np.log1p(steps_S / scale)
    centred_S = rows_S - rows_S.mean()
    gain = max(-float(centred_S @ losses_S / (centred_S @ centred_S)), 0.0)
    return TrainingCurve(start=float(losses_S.mean() + gain * rows_S.mean()), gain=gain, scale=scale)
