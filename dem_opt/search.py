"""The Optuna study: ask, tell, best; adopts the trials of a dead driver."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from dem_opt import config, database
from dem_opt.records import GRADIENT_FORWARDS
from dem_opt.samplers import make_sampler
from dem_opt.samplers.history import ATTRIBUTES, EXPECTED, START, History, Trial, from_parameters, is_whole
from dem_opt.samplers.history import start as starting_points
from dem_opt.simplex import Coefficients, Space

__all__ = ["METRIC", "Proposal", "Search", "Trial"]

STOPPED = "stopped"
"""The user attribute of a study that says why its search ended."""

METRIC = "nll"
"""What Optuna calls the objective: the mean NLL in nats per token, with the penalty where a study protects corpora."""


@dataclass(frozen=True)
class Proposal:
    """A trial to evaluate.

    seconds  the time that proposing it took, 0 for an adopted one
    charged  forward-equivalents that an earlier trial of the same coefficients was charged with, which this one
             completes
    """

    number: int
    coefficients: Coefficients
    seconds: float = 0.0
    charged: float = 0.0


class Search:
    """One Optuna study over a space of coefficients, opened, or created where there is none of that name.

    start     points to propose first; written down when the study is created and not looked at afterwards
    told      how many trials are finished: those there were at the last `ask`, and those told here since
    gradients whether trials are measured with their gradient, but for those that every study looks at first
    """

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        search: config.Search,
        start: Sequence[Coefficients] = (),
        gradients: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name, self._space, self._search = name, space, search
        self.gradients = gradients or search.algorithm == "gradient"
        self._sampler, self._history = make_sampler(search, space), History(space)
        self._storage = _open(url)
        self._study = optuna.create_study(
            study_name=name,
            storage=self._storage,
            sampler=self._sampler,
            direction="minimize",
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(name)
        self.uid = self._introduce(start)
        self._known = frozenset([*space.landmarks(), *starting_points(self._study, space)])
        self.told = _finished(self.trials())
        self._began = monotonic()

    def _introduce(self, start: Sequence[Coefficients]) -> str:
        """Writes what a new study lacks; the uid comes last and tells that nothing is lacking."""
        if (uid := self._study.user_attrs.get("uid")) is None:
            uid = str(uuid4())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._study.set_metric_names([METRIC])
            self._study.set_user_attr(START, [point.units for point in start])
            self._study.set_user_attr("uid", uid)
        return str(uid)

    @property
    def planned(self) -> int:
        """How many trials the study will have at most: a grid's whole lattice, else `search.trials`.

        A space that is a single point gets one trial.
        """
        if self._space.is_point:
            return 1
        if self._search.algorithm == "grid":
            return self._space.lattice_size(self._search.divisions)
        return self._search.trials

    @property
    def is_sequential(self) -> bool:
        """Whether a proposal has to wait for the trial before it."""
        return self._search.algorithm == "gradient"

    @property
    def races(self) -> bool:
        """Whether trials are stopped when they will not win: never a grid's, nor those that have a gradient."""
        return self._search.racing and self._search.algorithm != "grid" and not self.gradients

    @property
    def stopped(self) -> str:
        """Why the search ended, in words; empty while it goes on."""
        return str(self._study.user_attrs.get(STOPPED, ""))

    @property
    def completes(self) -> bool:
        """Whether a trial that was stopped may be completed by a later one."""
        return self.races and self._search.algorithm == "simplex-gp"

    def is_known(self, coefficients: Coefficients) -> bool:
        """Whether every study looks at these first, or this one was told to begin with them."""
        return coefficients in self._known

    def measures_gradient(self, coefficients: Coefficients) -> bool:
        """Whether a trial at these coefficients is measured with its gradient."""
        return self.gradients and (self._search.algorithm == "gradient" or not self.is_known(coefficients))

    def adopt(self) -> list[Proposal]:
        """The trials that a driver left running, in the order of their numbers.

        Those that it died while proposing have not all coefficients: they are told as failed, and don't count.
        """
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if not is_whole(trial, self._space):
                self.tell(trial.number, None, {"reason": "interrupted while it was being proposed"})
        trials = self.trials()
        self.told = _finished(trials)
        whole = [trial for trial in trials if trial.state == "running"]
        return [
            Proposal(trial.number, trial.coefficients, charged=_charged(trials, trial.number, trial.coefficients))
            for trial in whole
        ]

    def ask(self) -> Proposal | None:
        """The next trial to evaluate; None where the search has ended."""
        trials = self.trials()
        self.told = _finished(trials)
        if reason := self._why_stop(trials):
            if reason != self.stopped:
                self._study.set_user_attr(STOPPED, reason)
            return None
        began, self._sampler.known = perf_counter(), trials
        trial = self._study.ask(self._sampler.distributions)
        if (choice := self._sampler.last) is not None and choice.expected is not None:
            trial.set_user_attr(EXPECTED, choice.expected)
        point = from_parameters(trial.params, self._space)
        return Proposal(trial.number, point, perf_counter() - began, _charged(trials, trial.number, point))

    def _why_stop(self, trials: Sequence[Trial]) -> str:
        """Which budget is spent, or that nothing more is expected; empty where the search goes on."""
        given = self._search
        if len(trials) >= self.planned:
            return f"all {self.planned} planned trials"
        if given.algorithm == "grid":
            return ""
        if given.forwards is not None and (spent := sum(map(self.forwards_of, trials))) >= given.forwards:
            return f"{spent:.1f} of {given.forwards:g} forward-equivalents"
        if given.minutes is not None and monotonic() - self._began >= given.minutes * 60:
            return f"{given.minutes:g} minutes"
        last = trials[-given.patience :] if given.patience else []
        if len(last) == given.patience and all(
            trial.expected is not None and trial.expected < given.tolerance for trial in last
        ):
            return (
                f"less than {given.tolerance:g} nats per token expected of each of the last {given.patience} proposals"
            )
        return ""

    def forwards_of(self, trial: Trial) -> float:
        """Forward-equivalents of a trial; of a running one those that it may take."""
        if trial.state != "running":
            return trial.forwards
        return GRADIENT_FORWARDS if self.measures_gradient(trial.coefficients) else 1.0

    def whole(self, before: int) -> list[Trial]:
        """The trials that are told of all windows and whose number is below `before`, in the order of their numbers."""
        return [
            trial
            for trial in self.trials()
            if trial.number < before and trial.objective is not None and not trial.error
        ]

    def tell(self, number: int, objective: float | None, attributes: Mapping[str, Any]) -> None:
        """Finishes a trial with its objective in nats per token, or as failed: None, attributes["reason"].

        A finished trial stays as it is.  Raises ValueError for an objective that is not finite.
        """
        if objective is not None and not isfinite(objective):
            raise ValueError(f"the objective of trial {number} is {objective}")
        assert objective is not None or "reason" in attributes, f"trial {number} fails without a reason"
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        if self._storage.get_trial(trial_id).state.is_finished():
            return
        self._storage.set_trial_user_attr(trial_id, ATTRIBUTES, dict(attributes))
        state = TrialState.FAIL if objective is None else TrialState.COMPLETE
        self._study.tell(number, objective, state=state)
        self.told += 1

    def trials(self) -> list[Trial]:
        """All trials that have their coefficients, in the order of their numbers."""
        return self._history(self._study)


def _charged(trials: Sequence[Trial], number: int, coefficients: Coefficients) -> float:
    """Forward-equivalents of the trial before `number` that was stopped at these coefficients, if there is one."""
    same = (trial for trial in trials if trial.number < number and trial.coefficients == coefficients)
    return sum(trial.forwards for trial in same if trial.error)


def _finished(trials: Sequence[Trial]) -> int:
    return sum(trial.state != "running" for trial in trials)


def _open(url: str) -> RDBStorage:
    """Optuna's tables in a database.  Optuna formats the URL, so braces are doubled to stay what they are."""
    storage = RDBStorage(url.replace("{", "{{").replace("}", "}}"))
    database.tune(storage.engine)
    return storage


def study_names(url: str) -> set[str]:
    """The names of the Optuna studies in a database."""
    storage = _open(url)
    try:
        return set(optuna.get_all_study_names(storage))
    finally:
        storage.engine.dispose()
