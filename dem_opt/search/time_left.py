"""The time that a command's searches and its final table will take, from what its trials have cost so far.

    time   = sum over runs of  max(work / workers, driver) + trials left * overhead  +  final table

    work   = trials left * (merge + forwards * seconds of a forward-equivalent)         beside the driver, in workers
    driver = proposals left * seconds of a proposal + trials left * seconds of writing one down

    forwards   of a trial that races: the mean so far, with RACED_FORWARDS as if it were that of RACED_TRIALS more
    proposal   a line through the proposals so far, which take longer as trials grow
    overhead   of what the clock has shown between two trials, the part that neither workers nor driver explain

The final table's composites go through the workers in rounds.  Nothing is told before FIRST trials are finished.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf, sqrt
from statistics import fmean
from time import monotonic

import numpy as np

from dem_opt.config import StudyConfig
from dem_opt.search.optuna_study import Search
from dem_opt.search.run_name import RunName
from dem_opt.simplex import Coefficients
from dem_opt.types import TrialRecord

FIRST = 5
"""Finished trials of this command before which there is no estimate."""

RECENT = 30
"""Latest trials whose costs count: the machine, and what a search proposes, change as it goes on."""

RACED_FORWARDS = 0.5
"""Forward-equivalents expected of a trial that races, before any is known: about the mean of recorded studies."""

RACED_TRIALS = 16
"""Trials that this expectation counts for: in recorded studies early races are no guide to later ones."""

FEWEST_ON_A_LINE = 4
"""Proposals from which on their times are fitted by a line; fewer are averaged."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of a search, as far as its time can be planned.

    Attributes:
        name: Name of its Optuna study.
        trials: Trials that are left, at most.
        is_raced: Trials are stopped when they will not win.
        is_sequential: A proposal waits for the trial before it, so one worker is busy.
        forwards: Forward-equivalents that are left of its budget.
        seconds: Seconds that are left of its budget, from its first proposal.
    """

    name: str
    trials: int
    is_raced: bool = False
    is_sequential: bool = False
    forwards: float = inf
    seconds: float = inf


@dataclass(frozen=True, kw_only=True)
class FinalTable:
    """The rest of the final table to score: requests to workers, and their forward-equivalents in all."""

    requests: int
    forwards: float


def plan_search(search: Search) -> PlannedRun:
    """Plan what is left of a search that has been begun."""
    return PlannedRun(
        name=search.name,
        trials=search.unfinished,
        is_raced=search.races or search.parts > 0,
        is_sequential=search.is_sequential,
        forwards=search.forwards_left,
        seconds=search.seconds_left,
    )


def plan_run(config: StudyConfig, run: RunName) -> PlannedRun:
    """Plan a run that no driver has begun."""
    settings = config.search
    is_grid = run.algorithm == "grid"
    minutes = inf if settings.minutes is None or is_grid else settings.minutes
    return PlannedRun(
        name=run.optuna_name(config.name),
        trials=config.planned_trials(run.algorithm),
        is_raced=settings.racing and not is_grid and run.algorithm != "gradient" and settings.gradients is not True,
        is_sequential=run.algorithm == "gradient",
        forwards=inf if settings.forwards is None or is_grid else settings.forwards,
        seconds=60 * minutes,
    )


@dataclass(frozen=True)
class _Trial:
    """A finished trial.

    Attributes:
        record: Its record.
        at: The clock's time of its end.
        proposals: Proposals that the driver had made by then.
    """

    record: TrialRecord
    at: float
    proposals: int

    @property
    def work(self) -> float:
        """Seconds of a worker."""
        return self.record.evaluation.merge_seconds + self.record.evaluation.score_seconds


@dataclass
class _Run:
    """A run, as far as this command has come.

    Attributes:
        plan: What was planned.
        recent: The latest trials, those of earlier commands too.
        raced: Forward-equivalents of the latest trials that raced.
        trials: The latest trials that this command has finished.
        finished: Number of trials that it has finished.
        proposals: Seconds of each proposal.
        fitted: Seconds of those proposals for which a model was fitted.
        forwards: Forward-equivalents of the finished trials.
        proposing: Seconds of all proposals.
        waited: Seconds that the driver has waited for workers.
        began: The clock's time of the first proposal.
    """

    plan: PlannedRun
    recent: deque[TrialRecord] = field(default_factory=lambda: deque(maxlen=RECENT))
    raced: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    trials: deque[_Trial] = field(default_factory=lambda: deque(maxlen=RECENT + 1))
    finished: int = 0
    proposals: list[float] = field(default_factory=list)
    fitted: list[float] = field(default_factory=list)
    forwards: float = 0.0
    proposing: float = 0.0
    waited: float = 0.0
    began: float | None = None

    def add(self, record: TrialRecord, is_raced: bool) -> None:
        """Note the cost of a trial, of whichever command."""
        self.recent.append(record)
        if is_raced:
            self.raced.append(record.forwards)


class TimeLeft:
    """The time left of a command, updated by its driver.

    Args:
        workers: Number of workers.
        runs: The runs that the command plans, in their order.
        final: The final table.
        clock: Seconds, from any start.
    """

    def __init__(
        self, workers: int, runs: Sequence[PlannedRun], final: FinalTable, clock: Callable[[], float] = monotonic
    ) -> None:
        self._workers, self._final, self._clock = workers, final, clock
        self._runs = {run.name: _Run(run) for run in runs}
        self._measured = deque[TrialRecord](maxlen=RECENT)

    def begin(
        self,
        run: PlannedRun,
        earlier: Sequence[TrialRecord],
        is_known: Callable[[Coefficients], bool] = lambda _: False,
    ) -> None:
        """Begin a run, whose plan is certain now; learn the costs of its trials from earlier commands.

        Landmarks and starting points, which `is_known` tells, did not race, whatever they cost.
        """
        self._runs[run.name] = _Run(run)
        for record in earlier:
            raced = record.is_partial or (record.forwards < 1 and not is_known(record.coefficients))
            self._add(record, raced)

    def proposed(self, run: str, seconds: float, is_known: bool) -> None:
        """Note what a proposal took; `is_known` if it was a landmark or a starting point, for which nothing is fitted.

        Called after the proposal.
        """
        state = self._runs[run]
        if state.began is None:
            state.began = self._clock() - seconds
        state.proposals.append(seconds)
        state.proposing += seconds
        if not is_known:
            state.fitted.append(seconds)

    @contextmanager
    def waiting(self, run: str) -> Iterator[None]:
        """Count the time in this context as the driver's waiting for workers."""
        began = self._clock()
        try:
            yield
        finally:
            self._runs[run].waited += self._clock() - began

    def finished(self, record: TrialRecord, is_raced: bool) -> None:
        """Note a finished trial."""
        run = self._runs[record.study]
        self._add(record, is_raced)
        run.trials.append(_Trial(record, self._clock(), len(run.proposals)))
        run.finished += 1
        run.forwards += record.forwards

    def _add(self, record: TrialRecord, is_raced: bool) -> None:
        self._runs[record.study].add(record, is_raced)
        if record.measured:
            self._measured.append(record)

    def seconds(self) -> float | None:
        """The seconds that are left; None where too few trials tell."""
        if sum(run.finished for run in self._runs.values()) < FIRST:
            return None
        # Landmarks whose scores the ledger has say nothing of the trials after them.
        if not self._measured and sum(len(run.fitted) for run in self._runs.values()) < FIRST:
            return None
        return sum(map(self._seconds_of, self._runs.values())) + self._final_seconds()

    def _seconds_of(self, run: _Run) -> float:
        """Seconds that a run will take."""
        forwards = _expected_forwards(run)
        trials = float(max(run.plan.trials - run.finished, 0))
        if forwards and run.plan.forwards < inf:
            trials = min(trials, max(run.plan.forwards - run.forwards, 0.0) / forwards)
        work = trials * _measured_share(run) * (self._merge_seconds() + forwards * self._forward_seconds())
        proposals = max(trials - (len(run.proposals) - run.finished), 0.0)
        driver = proposals * _extrapolate(run.fitted, proposals) + trials * self._writing_seconds(run)
        expected = self._beside(run, work, driver) + trials * self._overhead(run)
        elapsed = self._clock() - run.began if run.began is not None else 0.0
        return min(expected, max(run.plan.seconds - elapsed, 0.0))

    def _beside(self, run: _Run, work: float, driver: float) -> float:
        """Seconds that workers and driver take beside each other, or one after the other."""
        return work + driver if run.plan.is_sequential else max(work / self._workers, driver)

    def _writing_seconds(self, run: _Run) -> float:
        """Seconds that the driver takes for each trial beside its proposal: to read, to write, to log."""
        states = [state for state in (run, *self._runs.values()) if state.finished >= FIRST][:1]
        for state in states:
            assert state.began is not None
            busy = state.trials[-1].at - state.began - state.waited - state.proposing
            return max(busy, 0.0) / state.finished
        return 0.0

    def _overhead(self, run: _Run) -> float:
        """Seconds for each trial of what neither workers nor driver explain."""
        if len(run.trials) < FIRST:
            return 0.0
        first, *others = run.trials
        proposals = sum(run.proposals[first.proposals : others[-1].proposals])
        driver = proposals + len(others) * self._writing_seconds(run)
        explained = self._beside(run, sum(trial.work for trial in others), driver)
        return max(others[-1].at - first.at - explained, 0.0) / len(others)

    def _merge_seconds(self) -> float:
        return fmean([record.evaluation.merge_seconds for record in self._measured] or [0.0])

    def _forward_seconds(self) -> float:
        """Seconds of a forward-equivalent, in one worker."""
        forwards = sum(record.forwards for record in self._measured)
        return sum(record.evaluation.score_seconds for record in self._measured) / forwards if forwards else 0.0

    def _final_seconds(self) -> float:
        """Seconds of the final table, whose requests the workers answer in rounds."""
        requests = self._final.requests
        if not requests:
            return 0.0
        each = self._merge_seconds() + self._final.forwards / requests * self._forward_seconds()
        return ceil(requests / self._workers) * each


def _expected_forwards(run: _Run) -> float:
    """Mean forward-equivalents of the trials that are left."""
    if run.plan.is_raced:
        return (RACED_TRIALS * RACED_FORWARDS + sum(run.raced)) / (RACED_TRIALS + len(run.raced))
    return fmean([record.forwards for record in run.recent] or [1.0])


def _measured_share(run: _Run) -> float:
    """Share of a run's latest trials whose scores the ledger did not have."""
    return fmean([record.measured for record in run.recent] or [1.0])


def _extrapolate(seconds: Sequence[float], more: float) -> float:
    """The mean of so many more values, by a line through those so far.

    The line rises as far as the values show beyond their noise: by its slope less the slope's standard error.
    """
    count = len(seconds)
    if count < FEWEST_ON_A_LINE:
        return fmean(seconds) if seconds else 0.0
    places_N = np.arange(count) - (count - 1) / 2
    values_N = np.array(seconds)
    square = float(places_N @ places_N)
    slope = float(places_N @ values_N) / square
    residuals_N = values_N - values_N.mean() - slope * places_N
    error = sqrt(float(residuals_N @ residuals_N) / (count - 2) / square)
    # The line passes through the mean of the values at the mean of their places.
    return fmean(seconds) + max(slope - error, 0.0) * (count + more) / 2
