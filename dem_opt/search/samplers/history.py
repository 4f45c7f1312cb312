"""A study's trials as points of the simplex: what every sampler starts from."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from math import inf
from operator import attrgetter
from typing import Any, Literal

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from dem_opt.simplex import UNIT, Coefficients, Space

ATTRIBUTES = "dem_opt"
"""The user attribute of a trial under which everything that was told beside the objective stands."""

EXPECTED = "expected_improvement"
"""The user attribute of a trial that says what was expected of it, in nats per token."""

DRIVER = "driver"
"""The user attribute of a trial that names the driver which has it in hand, where a study may have several."""

START = "start"
"""The user attribute of a study that lists the points to propose first, as units by name."""

State = Literal["running", "complete", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """A trial that has all its coefficients.

    objective   in nats per token; a number if and only if the state is "complete"
    attributes  what was told beside it
    expected    improvement that was expected of it when it was proposed, in nats per token
    driver      who has it in hand, or had; "" where a study has one driver at a time
    """

    number: int
    coefficients: Coefficients
    state: State
    objective: float | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    expected: float | None = None
    driver: str = ""

    @property
    def forwards(self) -> float:
        """Forward-equivalents that the trial stands for."""
        return float(self.attributes.get("forwards", 1.0))

    @property
    def error(self) -> float:
        """Standard error of the objective in nats per token: above 0 where the trial was stopped, an estimate."""
        return float(self.attributes["error"]) if "error" in self.attributes else 0.0

    @property
    def is_whole(self) -> bool:
        """Whether it was told of all windows."""
        return self.objective is not None and not self.error

    @property
    def gradient(self) -> Mapping[str, float]:
        """d objective / d w_i by distribution, in nats per token; empty where it was not measured."""
        return dict(self.attributes.get("gradient", {}))


@dataclass
class History:
    """A study's trials that have all their coefficients.

    Others (the driver died while proposing) are passed over, so that nothing depends on them.  Finished trials never
    change, and are read once: a call costs what Optuna's does, and a little for each trial since the oldest that runs.

    running  the trials that were running at the last call
    unborn   numbers of those that run and have not all coefficients
    """

    space: Space
    running: list[Trial] = field(default_factory=list)
    unborn: list[int] = field(default_factory=list)
    _recent: list[Trial] = field(default_factory=list)
    _settled: list[Trial] = field(default_factory=list)
    _whole: list[Trial] = field(default_factory=list)
    _seen: int = 0
    _stopped: dict[Coefficients, list[Trial]] = field(default_factory=dict)

    def __call__(self, study: Study) -> list[Trial]:
        """The trials in the order of their numbers."""
        frozen = study.get_trials(deepcopy=False)
        while self._seen < len(frozen) and frozen[self._seen].state.is_finished():
            self._settle(frozen[self._seen])
        recent = [(one, self._read(one)) for one in frozen[self._seen :]]
        self.unborn = [one.number for one, trial in recent if trial is None and one.state == TrialState.RUNNING]
        self._recent = [trial for _, trial in recent if trial is not None]
        self.running = [trial for trial in self._recent if trial.state == "running"]
        return self._settled + self._recent

    def whole(self, before: int) -> list[Trial]:
        """The trials below a number that had been told of all windows at the last call, in their order."""
        settled = self._whole[: bisect_left(self._whole, before, key=attrgetter("number"))]
        return settled + [trial for trial in self._recent if trial.number < before and trial.is_whole]

    def stopped(self, coefficients: Coefficients, before: int) -> list[Trial]:
        """The trials below a number that were stopped at these coefficients."""
        recent = (trial for trial in self._recent if trial.error and trial.coefficients == coefficients)
        return [trial for trial in (*self._stopped.get(coefficients, ()), *recent) if trial.number < before]

    def _settle(self, frozen: FrozenTrial) -> None:
        """Read a finished trial, before which all are finished, once and for all."""
        self._seen += 1
        if trial := self._read(frozen):
            self._settled.append(trial)
            if trial.is_whole:
                self._whole.append(trial)
            elif trial.error:
                self._stopped.setdefault(trial.coefficients, []).append(trial)

    def _read(self, frozen: FrozenTrial) -> Trial | None:
        if frozen.state not in _STATES or not _is_whole(frozen, self.space):
            return None
        return _trial(frozen, self.space)


def _is_whole(trial: FrozenTrial, space: Space) -> bool:
    """Whether a trial has all its coefficients."""
    return trial.params.keys() >= set(space.names)


def thin(told: Sequence[Trial], most: int) -> list[Trial]:
    """At most so many of finished trials in the order of their numbers: the best half, and the latest of the others."""
    if len(told) <= most:
        return list(told)
    best = {trial.number: trial for trial in nsmallest(most // 2, told, key=_rank)}
    others = (trial for trial in reversed(told) if trial.number not in best)
    return sorted([*best.values(), *islice(others, most - len(best))], key=lambda trial: trial.number)


def _rank(trial: Trial) -> tuple[float, int]:
    return inf if trial.objective is None else trial.objective, trial.number


def latest(trials: Sequence[Trial]) -> list[Trial]:
    """Of the finished trials with the same coefficients the last, which completes the others, in their order."""
    last = {trial.coefficients: trial for trial in trials if trial.state != "running"}
    return sorted(last.values(), key=lambda trial: trial.number)


def values_of(told: Sequence[Trial]) -> list[float]:
    """Objectives of finished trials; a failed trial's is the worst of the others, so that searches stay away."""
    worst = max(trial.objective for trial in told if trial.objective is not None)
    return [worst if trial.objective is None else trial.objective for trial in told]


def start(study: Study, space: Space) -> list[Coefficients]:
    """The points that the study was told to begin with."""
    listed = study.user_attrs.get(START, [])
    return [space.from_units([units[name] for name in space.names]) for units in listed]


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's view of the space: a parameter for each coefficient.  It knows nothing of their sum."""
    return {name: FloatDistribution(0.0, space.total_units / UNIT) for name in space.names}


def parameters(coefficients: Coefficients) -> dict[str, float]:
    """Coefficients as Optuna's parameters: units / 1e9, from which `from_parameters` reads the same units."""
    return coefficients.weights


def from_parameters(params: Mapping[str, Any], space: Space) -> Coefficients:
    """The coefficients that parameters stand for, exactly."""
    return space.from_units([round(params[name] * UNIT) for name in space.names])


def _trial(trial: FrozenTrial, space: Space) -> Trial:
    state = _STATES[trial.state]
    objective = trial.value if state == "complete" else None
    attributes = trial.user_attrs.get(ATTRIBUTES, {})
    expected, driver = trial.user_attrs.get(EXPECTED), trial.user_attrs.get(DRIVER, "")
    return Trial(trial.number, from_parameters(trial.params, space), state, objective, attributes, expected, driver)
