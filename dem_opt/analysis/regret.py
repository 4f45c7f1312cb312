"""What searches found for what they spent: regret against forward-equivalents, over algorithms and seeds.

The unit of cost is the *forward-equivalent*: one forward pass over all windows of the search split.  A composite that
another search had measured already costs as much as if it had not been.  The *regret* of a composite is its objective,
with the penalty where it violates what is protected, minus the lowest that any whole trial of the study has, in nats
per token.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, takewhile
from math import ceil, inf
from statistics import median

import numpy as np
from numpy.typing import NDArray

from dem_opt.types import Summary, TrialRecord

GRID = "grid"
"""The algorithm whose trials have no order of their own."""

FIRST_MARK = 10
"""Forward-equivalents at which regrets are compared first; then at 2, 4, 8... times as many."""

EVERY = 500
"""Up to how many points of a grid its curve has all costs; beyond, so many more that are evenly spread over a log."""

SLACK = 1e-9
"""Sums of parts of a forward-equivalent are equal to this."""


@dataclass(frozen=True)
class Run:
    """One search, and how its best came down with its cost.

    forwards  forward-equivalents that it spent in all
    partial   trials that were stopped; they cost what was measured of them, and are never the best
    ask       median seconds that proposing a trial took
    asking, measuring  seconds in all that proposing, and that merging and scoring took
    stopped   why it ended; empty while it goes on
    spent_S   forward-equivalents spent, ascending, from the first whole trial on
    best_S    the lowest penalized objective of its whole trials by then, nats per token; of a grid the mean over orders
    """

    name: str
    algorithm: str
    trials: int
    partial: int
    failed: int
    forwards: float
    ask: float
    asking: float
    measuring: float
    stopped: str
    spent_S: tuple[float, ...]
    best_S: tuple[float, ...]

    def best_after(self, forwards: float) -> float:
        """The best that it had found for so many forward-equivalents; infinite before its first whole trial.

        One that ended earlier keeps what it had.
        """
        place = bisect_right(self.spent_S, forwards + SLACK)
        return self.best_S[place - 1] if place else inf


@dataclass(frozen=True)
class Regret:
    """Regret of an algorithm's runs when each has spent `forwards`, in nats per token.

    low, high  quartiles over runs, linear between order statistics; None for a single run, so for a grid too
    """

    forwards: float
    median: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """An algorithm: its runs together.

    forwards  forward-equivalents of all runs
    ask       median seconds that proposing a trial took, over the trials of all runs
    regrets   at the comparison's marks; None where a run has no whole trial yet
    curve     at every cost at which one of its runs has finished a trial, from where all have a whole one
    """

    algorithm: str
    runs: tuple[Run, ...]
    forwards: float
    ask: float
    regrets: tuple[Regret | None, ...]
    curve: tuple[Regret, ...]

    @property
    def is_expected(self) -> bool:
        """Whether its regret is the mean over all orders of a grid's points, and not what a run did."""
        return self.algorithm == GRID


@dataclass(frozen=True)
class Comparison:
    """A study's searches, side by side.

    best   the lowest penalized objective of all whole trials, nats per token; None where there is none
    marks  forward-equivalents at which regrets are told
    """

    study: str
    best: float | None
    marks: tuple[float, ...]
    rows: tuple[Row, ...]


def algorithm_of(run: str) -> str:
    """The algorithm of a run: NAME of NAME and of NAME@SEED."""
    return run.partition("@")[0]


def compare(summary: Summary) -> Comparison:
    """The searches of a study, those of one algorithm with several seeds in one row."""
    stopped = summary.stopped or {}
    runs = [_run(name, records, stopped.get(name, "")) for name, records in summary.trials.items()]
    best = min((run.best_S[-1] for run in runs if run.best_S), default=None)
    told = marks(runs)
    by_algorithm: dict[str, list[Run]] = {}
    for run in runs:
        by_algorithm.setdefault(run.algorithm, []).append(run)
    rows = tuple(_row(same, summary.trials, best, told) for same in by_algorithm.values())
    return Comparison(summary.study, best, told, rows)


def marks(runs: Sequence[Run]) -> tuple[float, ...]:
    """10, 20, 40... forward-equivalents, then what the run that spent most has spent, rounded up.

    A grid spends what it has points, so it counts only where nothing else was run.
    """
    searches = [run for run in runs if run.algorithm != GRID] or runs
    most = ceil(max((run.forwards for run in searches), default=0.0) - SLACK)
    doublings = (FIRST_MARK * 2**power for power in count())
    return (*map(float, takewhile(lambda mark: mark <= 0.8 * most, doublings)), float(most)) if most > 0 else ()


def expected_best(objectives: Sequence[float], spent_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """The best of k objectives drawn without replacement, expected over all orders, for each k in `spent_S`.

    E_k = v_1 + sum_i (v_{i+1} - v_i) P(best of k > v_i),  P = C(n - i, k) / C(n, k),  v ascending, n values.
    """
    ascending_n = np.sort(np.asarray(objectives, dtype=np.float64))
    n = len(ascending_n)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    left_i = n - np.arange(1, n)
    expected_S = np.empty(len(spent_S))
    for place, k in enumerate(spent_S):
        can = left_i >= k
        log_choices = log_factorial[left_i[can]] - log_factorial[left_i[can] - k]
        log_p = log_choices - log_factorial[n] + log_factorial[n - k]
        expected_S[place] = ascending_n[0] + np.diff(ascending_n)[can] @ np.exp(log_p)
    return expected_S


def _run(name: str, records: Sequence[TrialRecord], stopped: str) -> Run:
    algorithm = algorithm_of(name)
    spent_S, best_S = (_grid_curve if algorithm == GRID else _curve)(records)
    return Run(
        name=name,
        algorithm=algorithm,
        trials=len(records),
        partial=sum(record.is_partial for record in records),
        failed=sum(record.objective is None for record in records),
        forwards=sum(record.forwards for record in records),
        ask=_median_ask(records),
        asking=sum(record.propose_seconds for record in records),
        measuring=sum(record.evaluation.merge_seconds + record.evaluation.score_seconds for record in records),
        stopped=stopped,
        spent_S=spent_S,
        best_S=best_S,
    )


def _curve(records: Sequence[TrialRecord]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cost and best after every trial, in the order of their numbers, from the first whole one on."""
    spent = accumulate(record.forwards for record in records)
    best = accumulate((_whole_objective(record) for record in records), min)
    known = [(cost, lowest) for cost, lowest in zip(spent, best, strict=True) if lowest < inf]
    return tuple(cost for cost, _ in known), tuple(lowest for _, lowest in known)


def _grid_curve(records: Sequence[TrialRecord]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cost and expected best, over all orders of the grid's points, each of which costs one forward-equivalent."""
    objectives = [value for record in records if (value := _whole_objective(record)) < inf]
    if not objectives:
        return (), ()
    most = len(objectives)
    every, beyond = np.arange(1, min(most, EVERY) + 1), np.geomspace(min(most, EVERY), most, EVERY)
    spent_S = np.unique(np.concatenate([every, beyond.round().astype(np.int64)]))
    return tuple(map(float, spent_S)), tuple(map(float, expected_best(objectives, spent_S)))


def _whole_objective(record: TrialRecord) -> float:
    """What is minimized, in nats per token; infinite for a trial that failed or was stopped."""
    return inf if record.penalized is None or record.is_partial else record.penalized


def _median_ask(records: Sequence[TrialRecord]) -> float:
    return median(record.propose_seconds for record in records) if records else 0.0


def _row(
    runs: Sequence[Run],
    trials: Mapping[str, Sequence[TrialRecord]],
    best: float | None,
    told: Sequence[float],
) -> Row:
    """An algorithm's runs together; `best` is what regrets are counted from."""
    costs = sorted({cost for run in runs for cost in run.spent_S})
    curve = [regret for cost in costs if (regret := _regret(runs, cost, best)) is not None]
    return Row(
        algorithm=runs[0].algorithm,
        runs=tuple(runs),
        forwards=sum(run.forwards for run in runs),
        ask=_median_ask([record for run in runs for record in trials[run.name]]),
        regrets=tuple(_regret(runs, mark, best) for mark in told),
        curve=tuple(curve),
    )


def _regret(runs: Sequence[Run], forwards: float, best: float | None) -> Regret | None:
    """Median and quartiles over runs at a cost; None where one of them has no whole trial yet."""
    found = [run.best_after(forwards) for run in runs]
    if best is None or inf in found:
        return None
    low, middle, high = (float(value) - best for value in np.quantile(found, [0.25, 0.5, 0.75]))
    return Regret(forwards, middle, low, high) if len(found) > 1 else Regret(forwards, middle)
