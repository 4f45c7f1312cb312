"""The Optuna study: ask, tell, and adopt the trials of a driver that died."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import inf, isfinite
from time import monotonic, perf_counter
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from dem_opt import config
from dem_opt.search.beginning import Beginning, Known
from dem_opt.search.optuna_storage import (
    StoredTrials,
    close_storage,
    introduce,
    open_storage,
    read_beginning,
)
from dem_opt.search.outcomes import outcome_of
from dem_opt.search.samplers import make_proposer, propose
from dem_opt.search.samplers.history import History, Trial, distributions, parameters
from dem_opt.search.trial_attributes import DRIVER, EXPECTED_IMPROVEMENT, PART, PARTS, TrialAttributes
from dem_opt.simplex import Coefficients, Space
from dem_opt.storage.leases import Lease
from dem_opt.storage.optuna_tables import (
    finish_trial,
    mark_running,
    read_attribute,
)
from dem_opt.storage.retry import BRIEF, RetryPolicy, patient
from dem_opt.types import GRADIENT_FORWARDS, NATS_PER_TOKEN, UNITS

__all__ = ["METRIC", "PendingTrial", "Search", "Trial"]

METRIC = "nll"
"""Optuna's name of the objective, in nats per token."""

BITS_METRIC = "bpb"
"""The same where it is in bits per byte."""

STOPPED = "stopped"
"""User attribute of a study: why its search ended, in words."""


@dataclass(frozen=True, kw_only=True)
class PendingTrial:
    """A trial to evaluate.

    Attributes:
        number: Optuna's number of the trial.
        coefficients: Its point.
        propose_seconds: Seconds that proposing it took; 0 for an adopted one.
        spared: Forward-equivalents that it saves: those of an earlier trial of the same coefficients, which this one
            completes, or of a starting point's scores that the database had.
        part: The part of the windows that it measures with their gradient, if it is a probe.
    """

    number: int
    coefficients: Coefficients
    propose_seconds: float = 0.0
    spared: float = 0.0
    part: int | None = None


class Search:
    """One Optuna study over a space of coefficients, opened, or created where none has its name.

    Args:
        url: The database.
        name: Name of the Optuna study.
        space: The coefficients to choose from.
        search: Algorithm and budgets.
        beginning: Starting points and earlier observations; written down when the study is created, ignored afterwards.
        gradients: Whether trials are measured with their gradient, but for starting points and for landmarks other than
            the centroid.
        lease: Lease of the driver that asks.  Where it is shared, drivers ask in turns, and each knows its own trials.
        patience: How long to wait for a database that is away.
        unit: Unit of the objective.
        axes: Names of the two losses whose front is searched; none where there is one objective.
        parts: Parts of the windows, one of which most gradients are measured on; 0 where they are of all windows, as
            they stay in a study that was begun so.

    Attributes:
        beginning: Starting points and earlier observations, as they were written down.
        finished: Number of finished trials: as of the last `ask`, and those told here since.
        elsewhere: Number of trials that other drivers had in hand at the last `ask`.
    """

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        search: config.SearchSection,
        beginning: Beginning | None = None,
        gradients: bool = False,
        lease: Lease | None = None,
        patience: RetryPolicy = BRIEF,
        unit: str = NATS_PER_TOKEN,
        axes: Sequence[str] = (),
        parts: int = 0,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name, self._space, self._search, self._unit = name, space, search, unit
        self._lease, self.patience = lease if lease and lease.shared else None, patience
        self._axes = axes
        self.gradients = gradients or search.algorithm == "gradient"
        self._mine: set[int] = set()
        self._study = patience(lambda: self._opened(url, beginning or Beginning()))
        self._study_id = self._storage.get_study_id_from_name(name)
        self._trials = StoredTrials(self._storage, self._study_id, space)
        self.beginning = patience(lambda: read_beginning(self._storage, self._study_id, space))
        start = self.beginning.start
        self._known = frozenset([*space.landmarks(), *start])
        self._without_gradient = self._known.difference({space.centroid()}.difference(start))
        self._history = patience(self._read)
        self.parts = 0 if _has_gradients_of_all_windows(self._history.trials) else parts
        self._proposer = make_proposer(
            search.algorithm,
            space,
            seed=search.seed,
            divisions=search.divisions,
            trials=search.trials,
            forwards=search.forwards,
            objectives=len(self._metrics),
            gradients=self.gradients,
            parts=self.parts,
            earlier=self.beginning.earlier,
        )
        self.finished, self.elsewhere = len(self._history.trials) - len(self._history.running), 0
        self._began = monotonic()

    def _opened(self, url: str, beginning: Beginning) -> optuna.Study:
        """The study in its storage, with everything that a new one needs."""
        with self._turn():
            self._storage = open_storage(url)
            # Optuna's own sampler is never asked: trials are created with their coefficients (`_propose`).
            directions = [StudyDirection.MINIMIZE] * len(self._metrics)
            study = optuna.create_study(
                study_name=self.name, storage=self._storage, directions=directions, load_if_exists=True
            )
            self.uid = introduce(study, self._storage, beginning, self._metrics)
            return study

    @property
    def _metrics(self) -> list[str]:
        """Optuna's names of the objectives: "nll", or "nll.NAME" for each of two losses."""
        metric = METRIC if self._unit == NATS_PER_TOKEN else BITS_METRIC
        return [f"{metric}.{name}" for name in self._axes] or [metric]

    @contextmanager
    def _turn(self) -> Iterator[Callable[[], None]]:
        """This driver's turn to propose: no other reads or makes proposals meanwhile.

        Gives a function that raises where the turn was lost.
        """
        if self._lease is None:
            yield _alone
        else:
            with self._lease.turn() as confirm:
                yield confirm

    def close(self) -> None:
        """Close the connections to the database."""
        close_storage(self._storage)

    @property
    def id(self) -> int:
        """Optuna's number of the study, under which Optuna Dashboard shows it."""
        return self._study_id

    @property
    def algorithm(self) -> str:
        """Name of the algorithm, as in a study file."""
        return self._search.algorithm

    @property
    def planned(self) -> int:
        """Number of trials that the study will have at most: a grid's whole lattice, else `search.trials`.

        A space that is a single point gets one trial.
        """
        if self._space.is_point:
            return 1
        if self._search.algorithm == "grid":
            return self._space.lattice_size(self._search.divisions)
        return self._search.trials

    @property
    def unfinished(self) -> int:
        """Number of trials that the search may still score: those under way, and new ones until a budget is spent."""
        trials, running = self._history.trials, len(self._history.running)
        return running if self._why_stop(trials) else self.planned - len(trials) + running

    @property
    def forwards_left(self) -> float:
        """Forward-equivalents that are left of its budget; infinite without one, as a grid is."""
        budget = None if self._search.algorithm == "grid" else self._search.forwards
        return inf if budget is None else max(budget - sum(map(self.forwards_of, self._history.trials)), 0.0)

    @property
    def seconds_left(self) -> float:
        """Seconds that are left of its budget; infinite without one, as a grid is."""
        budget = None if self._search.algorithm == "grid" else self._search.minutes
        return inf if budget is None else max(60 * budget - (monotonic() - self._began), 0.0)

    @property
    def is_sequential(self) -> bool:
        """True if a proposal has to wait for the trial before it."""
        return self._search.algorithm == "gradient"

    @property
    def races(self) -> bool:
        """True if trials are stopped when they will not win.

        Never a grid's, nor those that have a gradient, nor those of a front, which no single trial wins.
        """
        return self._search.racing and self._search.algorithm != "grid" and not self.gradients and not self._axes

    @property
    def completes(self) -> bool:
        """True if a trial that was stopped may be completed by a later one."""
        return self.races and self._search.algorithm == "simplex-gp"

    @property
    def stopped(self) -> str:
        """Why the search ended, in words; empty while it goes on."""
        return str(self._study.user_attrs.get(STOPPED, ""))

    def is_known(self, coefficients: Coefficients) -> bool:
        """True if these are a landmark or a starting point: they are scored whole, without racing."""
        return coefficients in self._known

    def measures_gradient(self, coefficients: Coefficients) -> bool:
        """True if a whole trial at these coefficients is measured with its gradient; with parts only the centroid's."""
        if self.parts:
            return coefficients == self._space.centroid()
        is_measured = self._search.algorithm == "gradient" or coefficients not in self._without_gradient
        return self.gradients and is_measured

    @patient
    def ask(self) -> PendingTrial | None:
        """The next trial to evaluate, under a number of its own; None where there is none now.

        Trials that a driver left come first, in the order of their numbers: a driver that is gone, or this one when the
        database went away.  Trials of earlier releases whose driver died while proposing lack coefficients: they are
        told as failed, and do not count.  While other drivers have trials in hand (`elsewhere`), there may be more
        later.
        """
        with self._turn() as confirm:
            # Drivers before trials: the trials that a driver finished before it ended are read as finished.
            alive = self._lease.others() if self._lease else {}
            self._history = self._read()
            trial = self._next(self._history, alive, confirm)
        if trial is not None:
            self._mine.add(trial.number)
        return trial

    def _next(self, history: History, alive: Collection[str], confirm: Callable[[], None]) -> PendingTrial | None:
        for number in history.incomplete:
            reason = "interrupted while it was being proposed"
            self._tell(number, None, TrialAttributes(reason=reason, forwards=0.0), {})
        self.finished = len(history.trials) - len(history.running)
        running = [trial for trial in history.running if trial.number not in self._mine]
        left = [trial for trial in running if trial.driver not in alive]
        self.elsewhere = len(running) - len(left)
        if left and left[0].part is not None and not self.parts:
            reason = "it was to measure one part of the windows, and gradients are of all windows now"
            self._tell(left[0].number, None, TrialAttributes(reason=reason, forwards=0.0), {})
            self._history = self._read()
            return self._next(self._history, alive, confirm)
        if left and self._take_over(left[0]):
            return self._pending(left[0].number, left[0].coefficients, part=left[0].part)
        if left:
            self._history = self._read()
            return self._next(self._history, alive, confirm)
        if reason := self._why_stop(history.trials):
            self._stop(reason)
            return None
        if self.is_sequential and running:
            return None
        return self._propose(history.trials, confirm)

    def _take_over(self, trial: Trial) -> bool:
        """Make a trial this driver's; False where its own driver, which was silent for too long, has finished it."""
        return self._lease is None or mark_running(
            self._storage.engine, self._id_of(trial.number), (DRIVER, self._lease.token)
        )

    def _pending(
        self, number: int, coefficients: Coefficients, propose_seconds: float = 0.0, part: int | None = None
    ) -> PendingTrial:
        return PendingTrial(
            number=number,
            coefficients=coefficients,
            propose_seconds=propose_seconds,
            spared=0.0 if part is not None else self._spared(number, coefficients),
            part=part,
        )

    def _propose(self, trials: Sequence[Trial], confirm: Callable[[], None]) -> PendingTrial:
        began = perf_counter()
        proposal = propose(self._proposer, trials, self.beginning.start, self._search.seed)
        attributes: dict[str, Any] = {}
        if proposal.expected_improvement is not None:
            attributes[EXPECTED_IMPROVEMENT] = proposal.expected_improvement
        if self._lease is not None:
            attributes[DRIVER] = self._lease.token
        part = None
        if proposal.is_probe:
            part = attributes[PART] = sum(trial.part is not None for trial in trials) % self.parts
        elif self.parts and self.measures_gradient(proposal.coefficients):
            attributes[PARTS] = self.parts
        confirm()
        # One transaction: whoever dies here leaves a trial with all its coefficients, or none.
        template = create_trial(
            state=TrialState.RUNNING,
            params=parameters(proposal.coefficients),
            distributions=distributions(self._space),
            user_attrs=attributes,
        )
        trial_id = self._storage.create_new_trial(self._study_id, template)
        number = self._storage.get_trial_number_from_id(trial_id)
        return self._pending(number, proposal.coefficients, perf_counter() - began, part)

    def _spared(self, number: int, coefficients: Coefficients) -> float:
        """Forward-equivalents that trial `number`, at these coefficients, saves.

        None of a grid's: searches are compared with the cost of the whole grid.
        """
        if self._search.algorithm == "grid":
            return 0.0
        known = self.beginning.known.get(coefficients, Known()).forwards(self.measures_gradient(coefficients))
        return known + sum(trial.forwards for trial in self._history.stopped(coefficients, number))

    def _stop(self, reason: str) -> None:
        """Write down why the search ended."""
        if reason != self.stopped:
            self._study.set_user_attr(STOPPED, reason)

    def _why_stop(self, trials: Sequence[Trial]) -> str:
        """Which budget is spent, or that no improvement is expected; empty where the search goes on."""
        search = self._search
        if len(trials) >= self.planned:
            return f"all {self.planned} planned trials"
        if search.algorithm == "grid":
            return ""
        if search.forwards is not None and (spent := sum(map(self.forwards_of, trials))) >= search.forwards:
            return f"{spent:.1f} of {search.forwards:g} forward-equivalents"
        if search.minutes is not None and monotonic() - self._began >= search.minutes * 60:
            return f"{search.minutes:g} minutes"
        if isinstance(search.patience, int) and self._expects_little(trials, search.patience):
            return (
                f"less than {search.tolerance:g} {UNITS[self._unit]} expected of each of the last {search.patience} "
                "proposals"
            )
        return ""

    def _expects_little(self, trials: Sequence[Trial], patience: int) -> bool:
        """True if the last so many finished trials and all running ones were proposed with little expected of each.

        A proposal counts running trials as observed where they are expected, so it promises little beside them,
        whatever they may turn out to be.
        """
        ended = [trial for trial in trials if trial.state != "running"][-patience:]
        recent = [*ended, *(trial for trial in trials if trial.state == "running")]
        improvements = [trial.expected_improvement for trial in recent]
        return len(ended) == patience and all(
            improvement is not None and improvement < self._search.tolerance for improvement in improvements
        )

    def forwards_of(self, trial: Trial) -> float:
        """Forward-equivalents of a trial; of a running one the most that it may take."""
        if trial.state != "running":
            return trial.forwards
        if trial.part is not None:
            return GRADIENT_FORWARDS / self.parts
        most = GRADIENT_FORWARDS if self.measures_gradient(trial.coefficients) else 1.0
        return most - self._spared(trial.number, trial.coefficients)

    def of_others(self) -> set[int]:
        """Numbers of the trials that other drivers, which are alive, have or had in hand."""
        alive = self._lease.others() if self._lease else {}
        return {trial.number for trial in self.trials() if trial.driver in alive}

    def whole(self, before: int) -> list[Trial]:
        """The trials below a number that were measured on all windows at the last `ask`, in the order of numbers."""
        return self._history.whole(before)

    def with_anchor(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials and the anchor of all probes, which was finished before any of them was proposed."""
        anchors = (trial for trial in self._history.trials if trial.is_whole and trial.part is None and trial.gradient)
        return list({trial.number: trial for trial in [*islice(anchors, 1), *trials]}.values())

    @patient
    def tell(
        self,
        number: int,
        objective: float | None,
        attributes: TrialAttributes,
        estimates: Mapping[int, float] | None = None,
        losses: Sequence[float] = (),
    ) -> bool:
        """Finish a trial.

        A finished trial stays as it is, and so does one that another driver has taken over from this one, which was
        silent for too long.  Raises ValueError for an objective that is not finite.

        Args:
            number: The trial.
            objective: The value that the search minimizes, in the objective's unit; None for a failed trial.
            attributes: Its measurements; a failed trial has a reason.
            estimates: Of a trial that was stopped early, at each interim analysis by windows seen.
            losses: Both losses, where a front is searched; Optuna's values are these instead of the objective.

        Returns:
            Whether the trial was this driver's to finish.
        """
        self._tell(number, objective, attributes, estimates or {}, losses)
        self._mine.discard(number)
        return self._is_mine(number)

    def _is_mine(self, number: int) -> bool:
        if self._lease is None:
            return True
        driver = read_attribute(self._storage.engine, self._id_of(number), DRIVER)
        return bool(driver is None or driver == self._lease.token)

    def _tell(
        self,
        number: int,
        objective: float | None,
        attributes: TrialAttributes,
        estimates: Mapping[int, float],
        losses: Sequence[float] = (),
    ) -> None:
        if objective is not None and not isfinite(objective):
            raise ValueError(f"the objective of trial {number} is {objective}")
        assert objective is not None or attributes.reason, f"trial {number} fails without a reason"
        outcome = outcome_of(objective, attributes, estimates, losses)
        driver = (DRIVER, self._lease.token) if self._lease else None
        if finish_trial(self._storage.engine, self._id_of(number), outcome, driver):
            self.finished += 1

    def _id_of(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    @patient
    def trials(self) -> list[Trial]:
        """All trials that have their coefficients, in the order of their numbers."""
        return list(self._read().trials)

    def _read(self) -> History:
        return self._trials.read()


def _alone() -> None:
    """Confirm the turn of a driver that is the only one."""


def _has_gradients_of_all_windows(trials: Sequence[Trial]) -> bool:
    """True if a trial has a gradient that is not known by part: one of an earlier release, or without races."""
    return any(trial.gradient and trial.part is None and not trial.parts for trial in trials)
