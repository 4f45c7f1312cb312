"""Composites that were scored before a search began, as observations of its Gaussian process.

A study that changes has composites of vectors that it has no more, and composites that were not scored on its new
corpora.  Neither is a trial.  But a merge's loss is a function of all shares, those of other vectors too, and the space
is the face where these are 0; and what is lacking of an objective is the loss on a few corpora, which composites nearby
predict.  So each is an observation of the objective, with a standard error where something is lacking.

Shape suffixes beside the project's: P composites that lack corpora, N that were scored on one, F shares, with those of
other vectors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.covariance import Array, usual
from dem_opt.search.samplers.history import Trial, latest
from dem_opt.search.samplers.observations import Measurement
from dem_opt.simplex import Coefficients, Space
from dem_opt.types import BITS_PER_BYTE, NATS_PER_TOKEN

FEWEST = 3
"""Composites that have been scored on a corpus before the loss of others on it is predicted from them."""


@dataclass(frozen=True)
class EarlierComposite:
    """A composite with what is known of its objective.

    Attributes:
        units: Coefficients in units of 1e-9: of every distribution of the space, and by content of other vectors that
            the composite has.
        losses: Loss by corpus, in the objective's unit, of the corpora that it was scored on and that have a weight.
        value: Penalized objective; None where it was not scored on every corpus that this needs.
        violation: Amount by which it exceeds what is allowed, in that unit.
    """

    units: Mapping[str, int]
    losses: Mapping[str, float]
    value: float | None = None
    violation: float = 0.0

    @property
    def coefficients(self) -> Coefficients:
        """The coefficients, with those of other vectors."""
        return Coefficients(tuple(sorted(self.units.items())))


@dataclass(frozen=True)
class Earlier:
    """Composites that were scored before a search began.

    Attributes:
        composites: The composites.
        weights: Weight of each corpus in the objective, a mean, where they sum to 1.  Without weights the objective is
            no mean, and composites without a value are ignored.
        unit: Unit of the objective.
    """

    composites: Sequence[EarlierComposite] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    unit: str = NATS_PER_TOKEN

    def others(self, space: Space) -> tuple[str, ...]:
        """Vectors of the composites that the space has not."""
        return tuple(sorted({name for each in self.composites for name in each.units}.difference(space.names)))

    def measurements(self, space: Space, trials: Iterable[Trial]) -> list[Measurement]:
        """The composites that no trial has measured whole, after these trials."""
        whole = [_of_trial(trial, self.unit) for trial in latest(trials) if trial.is_whole]
        tried = {each.coefficients for each in whole}
        untried = [each for each in self.composites if each.coefficients not in tried]
        complete = [
            Measurement(each.coefficients, each.value, violation=each.violation)
            for each in untried
            if each.value is not None
        ]
        incomplete = [each for each in untried if each.value is None] if self.weights else []
        return complete + self._completed(space, incomplete, [*whole, *untried])

    def _completed(
        self, space: Space, incomplete: Sequence[EarlierComposite], known: Sequence[EarlierComposite]
    ) -> list[Measurement]:
        """Composites that lack corpora, with what is to be expected of their losses on these.

            value = sum_c weight_c loss_c ,    error^2 = sum_c weight_c^2 variance_c ,

        where a lacking loss is the posterior mean of a process with the usual kernel, through the losses on this corpus
        that are known, and variance_c its variance; 0 of a known one.  The errors of two composites that lack the same
        corpus are not independent; they are taken to be.
        """
        others, is_predicted_P = self.others(space), np.ones(len(incomplete), dtype=bool)
        values_P, variances_P = np.zeros(len(incomplete)), np.zeros(len(incomplete))

        def shares(composites: Iterable[EarlierComposite]) -> Array:
            return np.array([space.shares(each.coefficients, others) for each in composites])

        for corpus, weight in self.weights.items():
            has_P = np.array([corpus in each.losses for each in incomplete], dtype=bool)
            values_P[has_P] += [weight * each.losses[corpus] for each in incomplete if corpus in each.losses]
            scored = [each for each in known if corpus in each.losses]
            if len(scored) < FEWEST:
                is_predicted_P &= has_P
            elif not has_P.all():
                observations = gp.observe(shares(scored), np.array([each.losses[corpus] for each in scored]))
                process = gp.GaussianProcess(observations, usual(observations.points_NF.shape[1]))
                posterior = process.posterior(shares(each for each in incomplete if corpus not in each.losses))
                values_P[~has_P] += weight * posterior.mean_M
                variances_P[~has_P] += weight**2 * posterior.variance_M
        filled = zip(incomplete, values_P.tolist(), np.sqrt(variances_P).tolist(), is_predicted_P.tolist(), strict=True)
        return [
            Measurement(each.coefficients, value, error) for each, value, error, is_predicted in filled if is_predicted
        ]

    def to_stored(self) -> dict[str, Any]:
        """As JSON; empty without composites."""
        return asdict(self) if self.composites else {}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """From what `to_stored` gives."""
        return cls(**{**stored, "composites": [EarlierComposite(**each) for each in stored.get("composites", [])]})


def _of_trial(trial: Trial, unit: str) -> EarlierComposite:
    """A whole trial."""
    losses = trial.attributes.bpb if unit == BITS_PER_BYTE else trial.attributes.nll
    return EarlierComposite(trial.coefficients.units, losses, trial.objective)
