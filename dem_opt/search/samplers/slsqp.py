"""Sequential quadratic programming from measured gradients, restarted from many points."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.proposer import Proposal, first_new
from dem_opt.simplex import Coefficients, Polytope, Space

Array = NDArray[np.float64]

STARTS = 100
"""Starts at most; after the last one proposals are uniform draws."""

FIRST_STEP = 0.5
"""Length in shares of the first step from a start, before it meets a bound."""

_PRECISION = 1e-7
"""Change of the objective in nats at which a run has converged: about the resolution of float32."""

_LEVEL = 1e-12
"""Slope in nats for each share that counts as none."""

_SMALL_STEP = 1e-4
"""Step in shares that shows which bounds are in the way."""

_FAILED = 1e3
"""Objective of a failed trial: the line search then goes back nine tenths of its step."""


@dataclass(frozen=True)
class SLSQP:
    """Kraft's sequential quadratic programming (1988, DFVLR-FB 88-28; scipy's) on  {0 <= p <= caps, sum p = 1}.

    A proposal is a replay: scipy runs from the start, with objectives and gradients  df/dp = (dw/dp)' df/dw  looked up
    in the history, and the first point that the history lacks is proposed.  The objective is scaled so that the first
    step is FIRST_STEP long: slopes of hundredths of a nat make steps as short, and SLSQP only shortens them.

    Runs start, one after the other as they end, from the best of the study's starting points, else from the centroid;
    then from the vertices; then from points drawn with `seed`.  A run ends where it converges, at a start that failed,
    and where it asks for the gradient of a trial that has none: measuring that again would teach nothing else.  While
    trials run the proposal is a uniform draw, because the next step depends on their results.

    Attributes:
        space: The coefficients to choose from.
        seed: Seed of the starts that are drawn.
    """

    space: Space
    seed: int

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """The next point, with the improvement over the best so far that the quadratic model expects of it."""
        if (proposal := first_new(start, trials)) is not None:
            return proposal
        if self.space.is_point:
            return Proposal(self.space.sample(rng))
        taken = {trial.coefficients: trial for trial in trials}
        if all(trial.state != "running" for trial in trials):
            for point in islice(self._starts(start, taken), STARTS):
                if (proposal := self._run(point, taken)) is not None:
                    return proposal
        return Proposal(self.space.sample(rng))

    def _starts(self, start: Sequence[Coefficients], taken: Mapping[Coefficients, Trial]) -> Iterator[Coefficients]:
        """Points from which runs start, in their order, without end."""
        objectives = {point: taken[point].objective for point in start}
        measured = {point: objective for point, objective in objectives.items() if objective is not None}
        yield min(measured, key=measured.__getitem__) if measured else self.space.centroid()
        yield from self.space.vertices()
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.space.sample(rng)

    def _run(self, start: Coefficients, taken: Mapping[Coefficients, Trial]) -> Proposal | None:
        """The first point of a run that no trial has; None where the run ends before."""
        if start not in taken:
            return Proposal(start)
        shares_F, polytope, replay = self.space.shares(start), self.space.polytope, _Replay(self.space, taken)
        try:
            slope = _descent(shares_F, replay.gradient(shares_F), polytope)
            if taken[start].state == "failed" or slope == 0:
                return None
            replay.scale = FIRST_STEP / slope
            # scipy has no step-by-step interface: an exception from the objective hands over the point it asks for.
            minimize(
                replay.objective,
                shares_F,
                jac=replay.gradient,
                method="SLSQP",
                bounds=[(0.0, cap) for cap in np.minimum(polytope.caps_F, 1.0)],
                constraints=_constraints(polytope),
                options={"ftol": _PRECISION * replay.scale},
            )
        except _UnknownError as unknown:
            return Proposal(unknown.coefficients, replay.expected_improvement(unknown.coefficients))
        except _NoGradientError:
            return None
        return None


def _constraints(polytope: Polytope) -> list[dict[str, Any]]:
    """The total, then the limits of families, in scipy's form."""
    size = len(polytope.caps_F)
    constraints = [{"type": "eq", "fun": lambda at_F: at_F.sum() - 1, "jac": np.ones_like}]
    for family in polytope.families:
        ones_F = np.bincount(family.members_n, minlength=size).astype(np.float64)
        if family.least == family.most:
            constraints.append(_linear("eq", ones_F, -family.most))
        else:
            constraints += [_linear("ineq", ones_F, -family.least), _linear("ineq", -ones_F, family.most)]
    # Where fixed families have everything, the total follows from them, and a constraint too many is singular.
    fixed = sum(len(family.members_n) for family in polytope.families if family.least == family.most)
    return constraints[1:] if fixed == size else constraints


def _linear(kind: str, slope_F: Array, offset: float) -> dict[str, Any]:
    """slope' p + offset, which is 0 ("eq") or at least 0 ("ineq")."""
    return {"type": kind, "fun": lambda at_F: slope_F @ at_F + offset, "jac": lambda at_F: slope_F}


def _descent(shares_F: Array, gradient_F: Array, polytope: Polytope) -> float:
    """Length of the projected gradient: 0 where no direction within the space leads down."""
    along_F = gradient_F - gradient_F.mean()
    if (size := float(np.linalg.norm(along_F))) < _LEVEL:
        return 0.0
    step = _SMALL_STEP / size
    moved_F = polytope.project(shares_F - step * along_F) - shares_F
    return float(np.linalg.norm(moved_F)) / step


class _UnknownError(Exception):
    """The history lacks these coefficients."""

    def __init__(self, coefficients: Coefficients) -> None:
        super().__init__(coefficients)
        self.coefficients = coefficients


class _NoGradientError(Exception):
    """The run asks for a gradient that was not measured."""


@dataclass
class _Replay:
    """The scaled objective and its gradient by shares, looked up in the history.

    Attributes:
        space: The coefficients to choose from.
        taken: The study's trials by point.
        scale: Factor of the objective.
        latest: The last point whose gradient scipy asked for: the next step starts there.
    """

    space: Space
    taken: Mapping[Coefficients, Trial]
    scale: float = 1.0
    latest: Coefficients | None = None

    def objective(self, shares_F: Array) -> float:
        """Raises _UnknownError for a point that no trial has."""
        trial = self._trial(self.space.at(shares_F))
        return self.scale * (_FAILED if trial.objective is None else trial.objective)

    def gradient(self, shares_F: Array) -> Array:
        """Raises _UnknownError for a point that no trial has, and _NoGradientError for one without a gradient."""
        self.latest = self.space.at(shares_F)
        return self.scale * self._slopes(self._trial(self.latest))

    def expected_improvement(self, coefficients: Coefficients) -> float:
        """Improvement on the best so far that a step from the latest point promises, in the objective's unit.

        A quadratic that is least at p + d lies  -g'd / 2  below its value at p, g its gradient there.
        """
        assert self.latest is not None
        trial = self._trial(self.latest)
        assert trial.objective is not None
        step_F = self.space.shares(coefficients) - self.space.shares(self.latest)
        reached = trial.objective + 0.5 * float(self._slopes(trial) @ step_F)
        best = min(trial.objective for trial in self.taken.values() if trial.objective is not None)
        return max(best - reached, 0.0)

    def _trial(self, coefficients: Coefficients) -> Trial:
        if coefficients not in self.taken:
            raise _UnknownError(coefficients)
        return self.taken[coefficients]

    def _slopes(self, trial: Trial) -> Array:
        """df/dp = (dw/dp)' df/dw  in nats for each share."""
        slopes = trial.gradient
        if not slopes.keys() >= set(self.space.names):
            raise _NoGradientError
        slopes_F: Array = self.space.jacobian().T @ np.array([slopes[name] for name in self.space.names])
        return slopes_F
