"""The Optuna study: ask, tell, best; adopts the trials of a dead driver."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from dem_opt import config
from dem_opt.search.samplers import make_sampler
from dem_opt.search.samplers.history import ATTRIBUTES, DRIVER, EXPECTED, START, History, Trial, from_parameters
from dem_opt.search.samplers.history import start as starting_points
from dem_opt.simplex import Coefficients, Space
from dem_opt.storage import engine
from dem_opt.storage.leases import Lease
from dem_opt.storage.retry import NO_RETRY, RetryPolicy, patient
from dem_opt.types import GRADIENT_FORWARDS

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
    elsewhere how many trials other drivers had in hand at the last `ask`
    gradients whether trials are measured with their gradient, but for those that every study looks at first
    lease     of the driver that asks; where it is shared, drivers ask in turns, and each knows its own trials
    """

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        search: config.SearchSection,
        start: Sequence[Coefficients] = (),
        gradients: bool = False,
        lease: Lease | None = None,
        patience: RetryPolicy = NO_RETRY,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name, self._space, self._search = name, space, search
        self._lease, self.patience = lease if lease and lease.shared else None, patience
        self.gradients = gradients or search.algorithm == "gradient"
        self._sampler, self._history = make_sampler(search, space), History(space)
        self._mine: set[int] = set()
        self._study = patience(lambda: self._opened(url, start))
        self._study_id = self._storage.get_study_id_from_name(name)
        self._known = frozenset([*space.landmarks(), *starting_points(self._study, space)])
        self.told, self.elsewhere = len(self.trials()) - len(self._history.running), 0
        self._began = monotonic()

    def _opened(self, url: str, start: Sequence[Coefficients]) -> optuna.Study:
        """The study in its storage, with all that a new one needs."""
        with self._turn():
            self._storage = _open(url)
            study = optuna.create_study(
                study_name=self.name,
                storage=self._storage,
                sampler=self._sampler,
                direction="minimize",
                load_if_exists=True,
            )
            self.uid = _introduce(study, start)
            return study

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This driver's turn to propose: nobody else reads or makes proposals meanwhile."""
        if self._lease is None:
            yield
        else:
            with self._lease.turn() as self._sampler.confirm:
                yield

    def close(self) -> None:
        """Lets the database's connections go."""
        _close(self._storage)

    @property
    def id(self) -> int:
        """Optuna's number of the study, under which Optuna Dashboard shows it."""
        return self._study_id

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

    @patient
    def ask(self) -> Proposal | None:
        """The next trial to evaluate, under a number of its own; None where there is none now.

        Those that a driver left come first, in the order of their numbers: one that is gone, or this one when the
        database went away.  Those that it died while proposing have not all coefficients: they are told as failed, and
        don't count.  While other drivers have trials in hand (`elsewhere`), there may be more later.
        """
        with self._turn():
            proposal = self._next(self._history(self._study))
        if proposal is not None:
            self._mine.add(proposal.number)
        return proposal

    def _next(self, trials: Sequence[Trial]) -> Proposal | None:
        for number in self._history.unborn:
            self._tell(number, None, {"reason": "interrupted while it was being proposed"})
        self.told = len(trials) - len(self._history.running)
        running = [trial for trial in self._history.running if trial.number not in self._mine]
        alive = self._lease.others() if self._lease and running else {}
        left = [trial for trial in running if trial.driver not in alive]
        self.elsewhere = len(running) - len(left)
        if left:
            return self._take_over(left[0])
        if self._is_over(trials) or (self.is_sequential and running):
            return None
        return self._propose(trials)

    def _take_over(self, trial: Trial) -> Proposal:
        trial_id = self._id_of(trial.number)
        if self._lease is not None:
            self._storage.set_trial_user_attr(trial_id, DRIVER, self._lease.token)
        charged = self._charged(trial.number, trial.coefficients)
        return Proposal(trial.number, trial.coefficients, charged=charged)

    def _propose(self, trials: Sequence[Trial]) -> Proposal:
        began, self._sampler.known = perf_counter(), trials
        trial = self._study.ask(self._sampler.distributions)
        if (choice := self._sampler.last) is not None and choice.expected is not None:
            trial.set_user_attr(EXPECTED, choice.expected)
        if self._lease is not None:
            trial.set_user_attr(DRIVER, self._lease.token)
        point = from_parameters(trial.params, self._space)
        return Proposal(trial.number, point, perf_counter() - began, self._charged(trial.number, point))

    def _charged(self, number: int, coefficients: Coefficients) -> float:
        """Forward-equivalents of the trial before `number` that was stopped at these coefficients, if there is one."""
        return sum(trial.forwards for trial in self._history.stopped(coefficients, number))

    def _is_over(self, trials: Sequence[Trial]) -> bool:
        """Whether the search has ended; why is written down."""
        reason = self._why_stop(trials)
        if reason and reason != self.stopped:
            self._study.set_user_attr(STOPPED, reason)
        return bool(reason)

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

    def of_others(self) -> set[int]:
        """The numbers of the trials that other drivers, and such that are alive, have or had in hand."""
        alive = self._lease.others() if self._lease else {}
        return {trial.number for trial in self.trials() if trial.driver in alive}

    def whole(self, before: int) -> list[Trial]:
        """The trials that were told of all windows at the last `ask`, of those whose number is below `before`.

        In the order of their numbers.
        """
        return self._history.whole(before)

    @patient
    def tell(self, number: int, objective: float | None, attributes: Mapping[str, Any]) -> None:
        """Finishes a trial with its objective in nats per token, or as failed: None, attributes["reason"].

        A finished trial stays as it is.  Raises ValueError for an objective that is not finite.
        """
        self._tell(number, objective, attributes)
        self._mine.discard(number)

    def _tell(self, number: int, objective: float | None, attributes: Mapping[str, Any]) -> None:
        if objective is not None and not isfinite(objective):
            raise ValueError(f"the objective of trial {number} is {objective}")
        assert objective is not None or "reason" in attributes, f"trial {number} fails without a reason"
        trial_id = self._id_of(number)
        if not self._storage.get_trial(trial_id).state.is_finished():
            state = TrialState.FAIL if objective is None else TrialState.COMPLETE
            with suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(trial_id, ATTRIBUTES, dict(attributes))
                self._study.tell(number, objective, state=state, skip_if_finished=True)
                self.told += 1

    def _id_of(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    @patient
    def trials(self) -> list[Trial]:
        """All trials that have their coefficients, in the order of their numbers."""
        return self._history(self._study)


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _introduce(study: optuna.Study, start: Sequence[Coefficients]) -> str:
    """Writes what a new study lacks; the uid comes last and tells that nothing is lacking."""
    if (uid := study.user_attrs.get("uid")) is None:
        uid = str(uuid4())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([METRIC])
        study.set_user_attr(START, [point.units for point in start])
        study.set_user_attr("uid", uid)
    return str(uid)


def _open(url: str) -> RDBStorage:
    """Optuna's tables in a database, made where there are none.

    Optuna formats the URL, so braces are doubled to stay what they are.  Where another process makes the same tables,
    what it has begun is waited for.
    """
    escaped, settings = url.replace("{", "{{").replace("}", "}}"), dict(engine.engine_settings(url))
    storage = engine.making_tables(lambda: RDBStorage(escaped, engine_kwargs=settings))
    engine.tune(storage.engine)
    return storage


def study_names(url: str) -> set[str]:
    """The names of the Optuna studies in a database."""
    storage = _open(url)
    try:
        return set(optuna.get_all_study_names(storage))
    finally:
        _close(storage)
