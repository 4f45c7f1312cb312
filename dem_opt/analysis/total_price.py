"""The price of the sum of coefficients: what  sum_i w_i = s  costs the winner w of a study.

On the ray from the base through the winner all coefficients are scaled alike:

    f(t) = objective of the composite  t w / s ,   t its total ;     f(0) is the base's, f(s) the winner's

    slope  f'(s) = sum_i w_i df/dw_i / s         objective's unit for each unit of the total; below 0: more is better

At a minimum over the simplex df/dw_i is the same for all w_i > 0.  So the slope is the Lagrange multiplier of the sum,
and the change of the best objective with the sum as well (envelope theorem).  Bounds above 0 that bind take part of it.

A gradient that the ledger has of the winner gives the slope.  Else it is measured by a step: one more composite, at a
total of  s + h = STEP s , and the parabola through base, winner and step,

    f(t) = f(s) + a (t - s) + b (t - s)^2 ,    a = (d_h s^2 - d_0 h^2) / c ,    b = (d_h s + d_0 h) / c ,

with  c = h s (s + h) ,  d_0 = f(0) - f(s)  and  d_h = f(s + h) - f(s) : a is the slope, with an interval over resampled
documents, since all three are scored on the same windows.  A step costs one forward pass where a gradient costs three,
holds no activations, and has an interval (dev/LOG.md compares them).

A parabola says little of totals far away: losses of long fine-tunes rise much faster.  So where the slope is not 0,
the winner is scored at the total  s - a / 2b  at which the parabola is least, and what is told is the difference that
was measured there, or at the step where this is better, and that of the sum of all vectors, w = (1, ..., 1) (task
arithmetic; Ilharco et al. 2023).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from dem_opt.analysis.bootstrap import RESAMPLES, difference, resampled_objectives, samplings_of
from dem_opt.analysis.sampling import Array, documents_of
from dem_opt.errors import EvaluationError
from dem_opt.evaluation.objective import Objective
from dem_opt.search.trials import base_scores, exceeded, is_known, objectives, recall, slope
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import HELD_OUT, PENALTY, SEARCH, Composite, Margin, Score, TotalPrice

STEP = 1.1
"""Total of the step, in that of the winner."""

FARTHEST = 2.0
"""Greatest total at which the scaled winner is scored, in that of the winner: as far beyond it as the base is below."""

NEAREST = 0.01
"""Least relative change of the total that is scored."""

MATTERS = 0.05
"""Part of the winner's gain over the base from which on a price is worth another search."""

SCALED, SUM = "scaled", "sum"
"""Rivals of the winner with other totals: itself, scaled; the sum of all vectors."""

MOST = 3
"""Composites that the price takes at most, beside winner and base: step, scaled winner, sum of all vectors."""


RIVALS = {SCALED: "the winner scaled to a sum of {total:.3g}", SUM: "the sum of all vectors"}
"""These in words, with their total."""


def price_line(price: TotalPrice, unit: str) -> str:
    """Say on one line what the constraint costs, and where that matters which key of the study file lifts it.

    Args:
        price: The price.
        unit: The objective's unit in words.
    """
    words = {margin.rival: RIVALS[margin.rival].format(total=price.optimum) for margin in price.rivals}
    if price.mend is not None and price.best is not None:
        best, (low, high) = price.best, price.mend
        return (
            f"A sum of {price.total:g} costs at least {-best.mean:.2g} {unit} here: {words[best.rival]} is better by "
            f"so much (search split, 95% interval {-best.high:.4f} to {-best.low:.4f}). "
            f"Try simplex: {{total: [{low:g}, {high:g}]}}."
        )
    ends = "" if price.low is None or price.high is None else f" ({price.low:+.3f} to {price.high:+.3f})"
    others = "".join(
        f"; {words[margin.rival]} {margin.mean:+.4f}" + (", but `protect` is violated" if margin.violation > 0 else "")
        for margin in price.rivals
    )
    beside = f". Beside the winner{others.replace(';', ':', 1)}" if others else ""
    return (
        f"A sum of {price.total:g} costs little: for each unit of the sum the objective changes by "
        f"{price.slope:+.3f}{ends} {unit}{beside}."
    )


def sum_of_all(identity: StudyIdentity) -> Coefficients:
    """The sum of all vectors: every coefficient 1."""
    return Coefficients(tuple((name, UNIT) for name in identity.space.names))


def is_priced(identity: StudyIdentity, winner: Coefficients) -> bool:
    """True if the sum of coefficients is a constraint that binds at the winner, which has other coefficients too."""
    space, total = identity.space, sum(winner.units.values())
    return not space.is_point and total > 0 and total in (space.least_units, space.total_units)


def scaled(coefficients: Coefficients, total: float) -> Coefficients:
    """Coefficients scaled to a total, rounded to units."""
    factor = total * UNIT / sum(coefficients.units.values())
    return Coefficients(tuple((name, round(units * factor)) for name, units in coefficients.pairs))


def unmeasured(
    ledger: Ledger, identity: StudyIdentity, winner: Coefficients, full: bool = False
) -> Iterator[tuple[Composite, str]]:
    """Composites with the split that the price lacks a score of, as far as the scores so far can tell.

    The sum of all vectors is scored on the held-out split where it is better than the winner on the search split.

    Args:
        ledger: Scores so far.
        identity: The study.
        winner: Its winner, scored on the search split.
        full: Score the sum on the held-out split in any case.
    """
    if identity.space.dimension < 2:
        return
    ray, everything = _Ray(ledger, identity, winner), identity.composite(sum_of_all(identity))
    wanted = [(everything, SEARCH)]
    with suppress(EvaluationError):  # a custom objective may not be finite at other sums: then these are all
        if is_priced(identity, winner):
            wanted += [(identity.composite(point), SEARCH) for point in ray.points()]
        if full or (is_known(ledger, identity, everything, SEARCH) and ray.margin(SUM, everything).penalized < 0):
            wanted.append((everything, HELD_OUT))
    yield from (each for each in wanted if not is_known(ledger, identity, *each))


def total_price(ledger: Ledger, identity: StudyIdentity, winner: Coefficients) -> TotalPrice | None:
    """The price of the sum, from the ledger's scores; None where these are missing, or the sum does not bind.

    The mend is a range of totals to search: it is given where a composite with another total is better than the winner,
    beyond its 95% interval and by MATTERS of the winner's gain over the base.

    Raises:
        EvaluationError: A custom objective is not finite at another total.
    """
    if not is_priced(identity, winner):
        return None
    ray, everything = _Ray(ledger, identity, winner), identity.composite(sum_of_all(identity))
    slope = ray.slope() if ray.is_scored else None
    if slope is None:
        return None
    optimum = ray.best_total(slope)
    at_optimum = identity.composite(scaled(winner, optimum))
    rivals = {SCALED: (at_optimum, optimum), SUM: (everything, float(identity.space.dimension))}
    if not slope.is_clear:
        del rivals[SCALED]
    margins = tuple(
        ray.margin(kind, composite)
        for kind, (composite, _) in rivals.items()
        if is_known(ledger, identity, composite, SEARCH)
    )
    better = (margin for margin in margins if margin.is_better)
    best = min(better, key=lambda margin: margin.penalized, default=None)
    mend = None
    if best is not None and -best.penalized >= MATTERS * ray.gain:
        mend = _mend(ray.total, rivals[best.rival][1], identity.space.dimension)
    return TotalPrice(
        total=ray.total,
        slope=slope.mean,
        low=slope.low,
        high=slope.high,
        basis=slope.basis,
        optimum=optimum,
        rivals=margins,
        mend=mend,
    )


def _mend(total: float, better: float, dimension: int) -> tuple[float, float]:
    """A range of totals that has the better one: up to the sum of all vectors, or down to the base."""
    return (0.0, float(max(dimension, ceil(better)))) if better > total else (0.0, total)


@dataclass(frozen=True, kw_only=True)
class _Slope:
    """A slope with its 95% interval and the curvature b of the parabola; a gradient has no interval."""

    mean: float
    curvature: float
    basis: str
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """True if 0 is not within the interval."""
        return self.low is None or self.high is None or self.low > 0 or self.high < 0


@dataclass(frozen=True)
class _Ray:
    """The ray from the base through a study's winner, as far as it is scored on the search split."""

    ledger: Ledger
    identity: StudyIdentity
    winner: Coefficients

    @property
    def total(self) -> float:
        """s."""
        return sum(self.winner.units.values()) / UNIT

    @property
    def is_scored(self) -> bool:
        """True if base and winner are scored, and the objective is known."""
        ends = (Composite.single(self.identity.base), self._best)
        is_known_there = all(is_known(self.ledger, self.identity, end, SEARCH) for end in ends)
        return is_known_there and SEARCH in objectives(self.ledger, self.identity)

    @property
    def gain(self) -> float:
        """f(0) - f(s), at least 0."""
        base, winner = self._values([base_scores(self.ledger, self.identity), self._scores(self._best)])
        return max(base - winner, 0.0)

    def points(self) -> list[Coefficients]:
        """The step, unless a gradient is known, and where it shows a slope, the winner at its best total."""
        slope = self.slope()
        if slope is None:
            return [scaled(self.winner, STEP * self.total)]
        is_far = abs(self.optimum(slope) - self.total) >= NEAREST * self.total
        return [scaled(self.winner, self.optimum(slope))] if slope.is_clear and is_far else []

    def optimum(self, slope: _Slope) -> float:
        """The total at which the parabola is least, from 0 to FARTHEST s; the end that is downhill if it has none."""
        farthest = FARTHEST * self.total
        if slope.curvature <= 0:
            return farthest if slope.mean < 0 else 0.0
        return min(max(self.total - slope.mean / (2 * slope.curvature), 0.0), farthest)

    def best_total(self, slope: _Slope) -> float:
        """The better one of the parabola's optimum and the step, as far as they are scored; else the optimum."""
        optimum = self.optimum(slope)
        totals = {self.identity.composite(scaled(self.winner, total)): total for total in (optimum, STEP * self.total)}
        scored = [composite for composite in totals if is_known(self.ledger, self.identity, composite, SEARCH)]
        if len(scored) < len(totals):
            return optimum
        return totals[min(scored, key=lambda composite: self._values([self._scores(composite)])[0])]

    def slope(self) -> _Slope | None:
        """The slope from the gradient, else from the step; None where neither is known."""
        return self._from_gradient() or self._from_step()

    def margin(self, kind: str, composite: Composite) -> Margin:
        """Another composite minus the winner in the objective, with its 95% interval."""
        rival, winner = self._scores(composite), self._scores(self._best)
        gap = difference(rival, winner, self._objective, documents_of(self.ledger, self.identity, SEARCH))
        return Margin(
            rival=kind,
            split=SEARCH,
            mean=gap.mean,
            low=gap.low,
            high=gap.high,
            sampled=gap.sampled,
            violation=self._violation(rival) - self._violation(winner),
        )

    def _from_gradient(self) -> _Slope | None:
        """The slope of a gradient that the ledger has of the winner."""
        if self.identity.worst or self.identity.function is not None:
            return None
        keys = self.identity.keys(SEARCH)
        gradients = self.ledger.gradients(self._best, keys, self.identity.differentiation)
        contents = set(self.identity.fine_tunes.values())
        if not all(contents <= gradients.get(key, {}).keys() for key in keys):
            return None
        by_name = slope(self.ledger, self.identity, self._scores(self._best), gradients)
        mean = sum(weight * by_name[name] for name, weight in self.winner.items()) / self.total
        base, winner = self._values([base_scores(self.ledger, self.identity), self._scores(self._best)])
        # The parabola with this slope through base and winner:  f(0) = f(s) - a s + b s^2 .
        return _Slope(mean=mean, curvature=(base - winner + mean * self.total) / self.total**2, basis="gradient")

    def _from_step(self) -> _Slope | None:
        """The slope of the parabola through base, winner and step."""
        step = self.identity.composite(scaled(self.winner, STEP * self.total))
        if not is_known(self.ledger, self.identity, step, SEARCH):
            return None
        three = [base_scores(self.ledger, self.identity), self._scores(self._best), self._scores(step)]
        mean, curvature = map(float, _parabola(self.total, np.array(self._values(three))))
        documents = documents_of(self.ledger, self.identity, SEARCH)
        samplings = samplings_of(three[0], self._objective, documents)
        if not all(sampling.is_defined for sampling in samplings.values()):
            return _Slope(mean=mean, curvature=curvature, basis="step", low=-inf, high=inf)
        resampled_3R = resampled_objectives(three, self._objective, samplings, RESAMPLES, tails=True)
        resampled_3R += PENALTY * np.array([self._violation(scores) for scores in three])[:, None]
        slopes_R, _ = _parabola(self.total, resampled_3R)
        low, high = np.quantile(slopes_R[np.isfinite(slopes_R)], [0.025, 0.975])
        return _Slope(mean=mean, curvature=curvature, basis="step", low=float(low), high=float(high))

    @property
    def _best(self) -> Composite:
        return self.identity.composite(self.winner)

    @property
    def _objective(self) -> Objective:
        return objectives(self.ledger, self.identity)[SEARCH]

    def _scores(self, composite: Composite) -> dict[str, Score]:
        return recall(self.ledger, self.identity, composite, SEARCH)

    def _violation(self, scores: Mapping[str, Score]) -> float:
        return exceeded(self.ledger, self.identity, scores)

    def _values(self, composites: Sequence[Mapping[str, Score]]) -> list[float]:
        """Penalized objectives."""
        return [self._objective(scores) + PENALTY * self._violation(scores) for scores in composites]


def _parabola(total: float, objectives_3R: Array) -> tuple[Array, Array]:
    """The slope a at the winner, and the curvature b, of parabolas through base, winner and step, each [R]."""
    width, (base, winner, step) = (STEP - 1) * total, objectives_3R
    by_base, by_step = base - winner, step - winner
    scale = width * total * (total + width)
    return (by_step * total**2 - by_base * width**2) / scale, (by_step * total + by_base * width) / scale
