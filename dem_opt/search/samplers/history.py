"""A study's trials as points of the simplex: the input of every proposer."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from heapq import nsmallest
from itertools import islice
from math import fsum, inf, isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dem_opt.search.trial_attributes import DRIVER, EXPECTED_IMPROVEMENT, PART, PARTS, TrialAttributes
from dem_opt.simplex import TOLERANCE, UNIT, Coefficients, Space

State = Literal["running", "complete", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    # A pruner judged the trial bad before its end, and left no estimate (`_objective`): as bad as a failed one.
    TrialState.PRUNED: "failed",
}


@dataclass(frozen=True)
class Trial:
    """A trial that has all its coefficients.

    Attributes:
        number: Optuna's number of the trial.
        coefficients: Its point.
        state: Running, complete or failed.
        objective: Value to minimize, in the objective's unit; a number if and only if the state is "complete".  Where a
            front between two losses is searched, their mean.
        losses: Both losses then; none where there is one objective, and of a trial that is not complete.
        attributes: Measurements beside the objective.
        expected_improvement: Improvement that its proposer expected, in the objective's unit; None without an opinion.
        estimates: Estimates of the objective of a trial that was stopped early, by windows seen.
        driver: Token of the driver that has or had it in hand; "" where a study has one driver at a time.
        part: The part of the windows that a probe measures, with its gradient; None for other trials.
        parts: Parts of the windows on each of which the gradient is known: of the anchor of probes; else 0.
    """

    number: int
    coefficients: Coefficients
    state: State
    _: KW_ONLY
    objective: float | None = None
    losses: tuple[float, ...] = ()
    attributes: TrialAttributes = field(default_factory=TrialAttributes)
    expected_improvement: float | None = None
    estimates: Mapping[int, float] = field(default_factory=dict)
    driver: str = ""
    part: int | None = None
    parts: int = 0

    @property
    def forwards(self) -> float:
        """Forward-equivalents that the trial is charged with."""
        return self.attributes.forwards

    @property
    def error(self) -> float:
        """Standard error of the objective, in its unit: above 0 where the trial was stopped early."""
        return self.attributes.error

    @property
    def gradient(self) -> Mapping[str, float]:
        """d objective / d w_i by distribution, in the objective's unit; empty where it was not measured."""
        return self.attributes.gradient

    @property
    def is_whole(self) -> bool:
        """True if its objective was measured on all windows."""
        return self.objective is not None and not self.error


@dataclass(frozen=True)
class History:
    """A study's trials at one moment.

    Attributes:
        trials: Those that have all their coefficients, in the order of their numbers.
        incomplete: Numbers of running trials that lack coefficients: their driver died, or is asking now.
    """

    trials: Sequence[Trial] = ()
    incomplete: Sequence[int] = ()

    @cached_property
    def running(self) -> list[Trial]:
        """The trials that are being evaluated."""
        return [trial for trial in self.trials if trial.state == "running"]

    def whole(self, before: int) -> list[Trial]:
        """The trials below a number that were measured on all windows."""
        return [trial for trial in self.trials if trial.number < before and trial.is_whole]

    def stopped(self, coefficients: Coefficients, before: int) -> list[Trial]:
        """The trials below a number that were stopped early at these coefficients."""
        return [
            trial
            for trial in self.trials
            if trial.number < before and trial.error and trial.part is None and trial.coefficients == coefficients
        ]


class HistoryReader:
    """Read the history of a study; each finished trial is parsed once."""

    def __init__(self, space: Space) -> None:
        self._space = space
        # Optuna's storages hand out the same object for a finished trial, so identity says that it was parsed before.
        # A number alone would not: one sampler may serve several studies.
        self._parsed: dict[int, tuple[FrozenTrial, Trial | None]] = {}

    def read(self, study: Study) -> History:
        """The trials of a study as they are now, with objectives to minimize."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        return self.parse(study.get_trials(deepcopy=False), sign)

    def parse(self, frozen: Sequence[FrozenTrial], sign: float = 1.0) -> History:
        """The history of trials as Optuna has them; objectives are multiplied by `sign`."""
        trials = [self._parse(trial, sign) for trial in frozen]
        incomplete = [
            stored.number
            for stored, trial in zip(frozen, trials, strict=True)
            if trial is None and stored.state == TrialState.RUNNING
        ]
        return History([trial for trial in trials if trial is not None], incomplete)

    def _parse(self, frozen: FrozenTrial, sign: float) -> Trial | None:
        if not frozen.state.is_finished():
            return parse_trial(frozen, self._space, sign)
        known, trial = self._parsed.get(frozen.number, (None, None))
        if known is not frozen:
            trial = parse_trial(frozen, self._space, sign)
            self._parsed[frozen.number] = frozen, trial
        return trial


def parse_trial(frozen: FrozenTrial, space: Space, sign: float = 1.0) -> Trial | None:
    """A trial as a point of the space, its objective times `sign`; None without all coefficients, or outside."""
    if frozen.state not in _STATES or not frozen.params.keys() >= set(space.names):
        return None
    try:
        coefficients = from_parameters(frozen.params, space)
    except ValueError as error:
        warnings.warn(f"trial {frozen.number} is passed over: {error}", stacklevel=2)
        return None
    attributes = TrialAttributes.from_stored(frozen.user_attrs)
    if sign < 0:
        attributes = replace(attributes, gradient={name: -slope for name, slope in attributes.gradient.items()})
    objective = _objective(frozen, attributes)
    state = _STATES[frozen.state]
    if state != "running":
        state = "failed" if objective is None else "complete"
    return Trial(
        frozen.number,
        coefficients,
        state,
        objective=None if objective is None else sign * objective,
        losses=() if objective is None or len(frozen.values or ()) < 2 else tuple(frozen.values),
        attributes=attributes,
        expected_improvement=frozen.user_attrs.get(EXPECTED_IMPROVEMENT),
        estimates=frozen.intermediate_values,
        driver=frozen.user_attrs.get(DRIVER, ""),
        part=frozen.user_attrs.get(PART),
        parts=frozen.user_attrs.get(PARTS, 0),
    )


def _objective(frozen: FrozenTrial, attributes: TrialAttributes) -> float | None:
    """The value of a finished trial that the search learns from, None where there is none.

    Optuna's own value is only that of trials which may win: one that was stopped early has no value, and one that
    violates a constraint an infinite one.  No model of the objective takes an infinite value.
    """
    values = frozen.values if frozen.state == TrialState.COMPLETE else None
    if values is not None and all(map(isfinite, values)):
        return fsum(values) / len(values)
    is_measured = values is not None or (frozen.state == TrialState.PRUNED and attributes.error > 0)
    return attributes.penalized if is_measured else None


def thin(trials: Sequence[Trial], most: int) -> list[Trial]:
    """At most so many of finished trials in the order of their numbers: the best half, and the latest of the others."""
    if len(trials) <= most:
        return list(trials)
    best = {trial.number: trial for trial in nsmallest(most // 2, trials, key=_by_objective)}
    others = (trial for trial in reversed(trials) if trial.number not in best)
    return sorted([*best.values(), *islice(others, most - len(best))], key=lambda trial: trial.number)


def _by_objective(trial: Trial) -> tuple[float, int]:
    return inf if trial.objective is None else trial.objective, trial.number


def latest(trials: Iterable[Trial]) -> list[Trial]:
    """The finished trials in their order, of those with the same coefficients the last, which completes the others.

    Probes complete none, and none completes them.
    """
    finished = [trial for trial in trials if trial.state != "running"]
    last = {(trial.coefficients, None if trial.part is None else trial.number): trial for trial in finished}
    return sorted(last.values(), key=lambda trial: trial.number)


def values_of(trials: Sequence[Trial]) -> list[float]:
    """Objectives of finished trials; a failed trial counts as the worst of the others, so that searches stay away."""
    worst = max(trial.objective for trial in trials if trial.objective is not None)
    return [worst if trial.objective is None else trial.objective for trial in trials]


def losses_of(trials: Sequence[Trial]) -> NDArray[np.float64]:
    """Both losses of finished trials, [N, 2]; a failed trial counts as the worst of the others in each."""
    worst = np.array([trial.losses for trial in trials if trial.losses]).max(axis=0)
    return np.array([trial.losses or worst for trial in trials])


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's view of the space: one parameter for each coefficient, without their sum."""
    return {name: FloatDistribution(0.0, space.total_units / UNIT) for name in space.names}


def parameters(coefficients: Coefficients) -> dict[str, float]:
    """Coefficients as Optuna's parameters: units / 1e9, from which `from_parameters` reads the same units."""
    return coefficients.weights


def from_parameters(params: Mapping[str, Any], space: Space) -> Coefficients:
    """The coefficients of a trial's parameters: to the unit, or the nearest point for parameters written by hand.

    Raises ValueError for parameters that are farther than 1e-6 from the space.
    """
    values = {name: float(params[name]) for name in space.names}
    exact = Coefficients(tuple((name, round(value * UNIT)) for name, value in values.items()))
    if space.contains(exact):
        return exact
    point_K = np.array(list(values.values()))
    nearest = space.nearest(point_K)
    if np.abs(space.point(nearest) - point_K).max() > TOLERANCE:
        raise ValueError(f"its coefficients {values} do not lie in {space}")
    return nearest
