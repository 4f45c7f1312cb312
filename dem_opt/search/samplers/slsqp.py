"""Sequential quadratic programming from measured gradients, started again from many points."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.sampler import Choice, first_new
from dem_opt.simplex import Coefficients, Space, project

Array = NDArray[np.float64]

STARTS = 100
"""Most points that it starts from; after the last one proposals are uniform draws."""

FIRST_STEP = 0.5
"""Length in shares of the first step from a start, before it meets a bound."""

_PRECISION = 1e-7
"""Change of the objective in nats at which a run has converged: about what float32 tells apart."""

_LEVEL, _LITTLE = 1e-12, 1e-4
"""A slope in nats for each share that is none, and a step in shares that shows which bounds are in the way."""

_FAILED = 1e3
"""Objective of a failed trial: the line search then goes back nine tenths of its step."""


@dataclass(frozen=True)
class SLSQP:
    """Kraft's sequential quadratic programming (1988, DFVLR-FB 88-28; scipy's) on  {0 <= p <= caps, sum p = 1}.

    seed  of the starts that are drawn

    A proposal is a replay: scipy runs from the start on, with objectives and gradients  df/dp = (dw/dp)' df/dw  looked
    up in the history, and the first point that the history lacks is proposed.  The objective is scaled so that the
    first step is FIRST_STEP long: slopes of hundredths of a nat make steps as short, and SLSQP only shortens them.

    Runs start, one after the other as they end, from the best of the points that the study begins with, else from the
    centroid; then from the vertices; then from points drawn with `seed`.  A run ends where it converges, at a start
    that failed, and where it asks for the gradient of a trial that has none: measuring that again would teach nothing
    else.  While trials run it draws a point, because its next one depends on theirs.
    """

    space: Space
    seed: int

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Choice:
        """The next point, with the improvement over the best so far that its quadratic model expects of it."""
        if (choice := first_new(begin, trials)) is not None:
            return choice
        if self.space.is_point:
            return Choice(self.space.sample(rng))
        taken = {trial.coefficients: trial for trial in trials}
        if all(trial.state != "running" for trial in trials):
            for start in islice(self._starts(begin, taken), STARTS):
                if (choice := self._run(start, taken)) is not None:
                    return choice
        return Choice(self.space.sample(rng))

    def _starts(self, begin: Sequence[Coefficients], taken: Mapping[Coefficients, Trial]) -> Iterator[Coefficients]:
        """Where runs begin."""
        values = {point: taken[point].objective for point in begin}
        told = {point: value for point, value in values.items() if value is not None}
        yield min(told, key=told.__getitem__) if told else self.space.centroid()
        yield from self.space.vertices()
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.space.sample(rng)

    def _run(self, start: Coefficients, taken: Mapping[Coefficients, Trial]) -> Choice | None:
        """The first point of a run that no trial has; None where the run ends before."""
        if start not in taken:
            return Choice(start)
        shares_F, caps_F, replay = self.space.shares(start), self.space.caps_F, _Replay(self.space, taken)
        try:
            slope = _descent(shares_F, replay.gradient(shares_F), caps_F)
            if taken[start].state == "failed" or slope == 0:
                return None
            replay.scale = FIRST_STEP / slope
            minimize(
                replay.objective,
                shares_F,
                jac=replay.gradient,
                method="SLSQP",
                bounds=[(0.0, cap) for cap in np.minimum(caps_F, 1.0)],
                constraints={"type": "eq", "fun": lambda at_F: at_F.sum() - 1, "jac": np.ones_like},
                options={"ftol": _PRECISION * replay.scale},
            )
        except _UnknownError as unknown:
            return Choice(unknown.coefficients, replay.expected(unknown.coefficients))
        except _NoGradientError:
            return None
        return None


def _descent(shares_F: Array, gradient_F: Array, caps_F: Array) -> float:
    """Length of the projected gradient: 0 where no direction within the space leads down."""
    along_F = gradient_F - gradient_F.mean()
    if (size := float(np.linalg.norm(along_F))) < _LEVEL:
        return 0.0
    step = _LITTLE / size
    moved_F = project(shares_F - step * along_F, caps_F) - shares_F
    return float(np.linalg.norm(moved_F)) / step


class _UnknownError(Exception):
    """The history lacks these coefficients."""

    def __init__(self, coefficients: Coefficients) -> None:
        super().__init__(coefficients)
        self.coefficients = coefficients


class _NoGradientError(Exception):
    """A trial's gradient is asked for that was not measured."""


@dataclass
class _Replay:
    """The scaled objective and its gradient by shares, looked up in the history.

    passed  the last point whose gradient was asked for
    """

    space: Space
    taken: Mapping[Coefficients, Trial]
    scale: float = 1.0
    passed: Coefficients | None = None

    def objective(self, shares_F: Array) -> float:
        """Raises _UnknownError for a point that no trial has."""
        trial = self._trial(self.space.at(shares_F))
        return self.scale * (_FAILED if trial.objective is None else trial.objective)

    def gradient(self, shares_F: Array) -> Array:
        """Raises _UnknownError for a point that no trial has, and _NoGradientError for one without a gradient."""
        self.passed = self.space.at(shares_F)
        return self.scale * self._slopes(self._trial(self.passed))

    def expected(self, coefficients: Coefficients) -> float:
        """By how much a step is expected to improve on the best so far.

        From p to p + d by  -g'd / 2 , the decrease of a quadratic that is least there.
        """
        assert self.passed is not None
        last = self._trial(self.passed)
        assert last.objective is not None
        step_F = self.space.shares(coefficients) - self.space.shares(self.passed)
        reached = last.objective + 0.5 * float(self._slopes(last) @ step_F)
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
