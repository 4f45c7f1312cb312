"""A study's trials as points of the simplex: what every sampler starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from math import inf
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
        return float(self.attributes.get("error", 0.0))

    @property
    def gradient(self) -> Mapping[str, float]:
        """d objective / d w_i by distribution, in nats per token; empty where it was not measured."""
        return dict(self.attributes.get("gradient", {}))


@dataclass
class History:
    """A study's trials that have all their coefficients.

    Others (the driver died while proposing) are passed over, so that nothing depends on them; `unborn` has the numbers
    of those that are still running.  Finished trials never change, and are read once.
    """

    space: Space
    unborn: list[int] = field(default_factory=list)
    _finished: dict[int, Trial] = field(default_factory=dict)

    def __call__(self, study: Study) -> list[Trial]:
        """The trials in the order of their numbers.

        Finished ones are looked up by number and nothing else, so that an ask costs as much after thousands of them.
        """
        known, self.unborn = self._finished.get, []
        read = (known(frozen.number) or self._read(frozen) for frozen in study.get_trials(deepcopy=False))
        return [trial for trial in read if trial is not None]

    def _read(self, frozen: FrozenTrial) -> Trial | None:
        if frozen.state not in _STATES or not _is_whole(frozen, self.space):
            if frozen.state == TrialState.RUNNING:
                self.unborn.append(frozen.number)
            return None
        trial = _trial(frozen, self.space)
        if trial.state != "running":
            self._finished[trial.number] = trial
        return trial


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
