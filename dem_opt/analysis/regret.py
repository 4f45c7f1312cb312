"""Regret of searches against their cost, over algorithms and seeds.

The unit of cost is the *forward-equivalent*: one forward pass over all windows of the search split.  A composite that
another search measured before costs as much as if it had not been.  The *regret* of a composite is its penalized
objective minus the lowest of any whole trial of the study, in the unit of the objective:

    regret(w) = f(w) + PENALTY violation(w) - min over whole trials of the same

Where a front between two losses is searched, no objective says how good a search is.  Its place takes the *missing
hypervolume*: that of all whole trials of all runs minus that of a run's own, up to the front's reference point.

Shape suffix beside the project's: S points of a curve.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count, takewhile
from math import ceil, inf
from statistics import median

import numpy as np

from dem_opt.analysis.order_statistics import expected_best
from dem_opt.pareto import hypervolume
from dem_opt.search.run_name import RunName
from dem_opt.types import NATS_PER_TOKEN, UNITS, Summary, TrialRecord

GRID = "grid"
"""The algorithm whose trials have no order of their own."""

FIRST_MARK = 10
"""Forward-equivalents at which regrets are compared first; then at 2, 4, 8... times as many."""

EVERY = 500
"""Costs up to which a grid's curve has every point; beyond, as many more that are evenly spaced in the logarithm."""

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""Costs of a run, ascending, and its best value by then."""

SLACK = 1e-9
"""Costs in forward-equivalents closer than this are equal: sums of parts of a pass are not exact in floats."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One search, with its best objective by cost.

    Attributes:
        name: Label of the run: its algorithm, or ALGORITHM@SEED.
        algorithm: Its algorithm.
        trials: Finished trials.
        partial: Trials that were stopped early; they cost the windows that were scored, and are never the best.
        failed: Trials that failed.
        forwards: Forward-equivalents in all.
        ask: Median seconds of proposing a trial.
        asking: Seconds of proposing in all.
        measuring: Seconds of merging and scoring in all.
        stopped: Why it ended; empty while it goes on.
        spent_S: Forward-equivalents spent, ascending, from the first whole trial on.
        best_S: Lowest penalized objective of its whole trials by then, in its unit; of a grid the mean over all
            orders of its points.
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
        """Best penalized objective for so many forward-equivalents; infinite before the first whole trial.

        A run that ended earlier keeps its best.
        """
        place = bisect_right(self.spent_S, forwards + SLACK)
        return self.best_S[place - 1] if place else inf


@dataclass(frozen=True)
class Regret:
    """Regret of an algorithm's runs when each has spent `forwards`, in the objective's unit.

    Attributes:
        forwards: Forward-equivalents.
        median: Median over runs.
        low: Lower quartile over runs, linear between order statistics; None for a single run, so for a grid too.
        high: Upper quartile.
    """

    forwards: float
    median: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """An algorithm: its runs together.

    Attributes:
        algorithm: Its name.
        runs: Its runs, one for each seed.
        forwards: Forward-equivalents of all runs.
        ask: Median seconds of proposing a trial, over the trials of all runs.
        regrets: Regret at the comparison's marks; None where a run has no whole trial yet.
        curve: Regret at every cost at which one of its runs finished a trial, from where all have a whole one.
        is_expected: True if its regret is the expectation over all orders of a grid's points instead of a run's own.
    """

    algorithm: str
    runs: tuple[Run, ...]
    forwards: float
    ask: float
    regrets: tuple[Regret | None, ...]
    curve: tuple[Regret, ...]
    is_expected: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A study's searches, side by side.

    Attributes:
        study: Name of the study.
        best: Lowest penalized objective of all whole trials, in the objective's unit; None where there is none.  Of a
            front, the negative hypervolume of all.
        marks: Forward-equivalents at which regrets are reported.
        rows: Algorithms.
        unit: Unit of objectives and regrets, in words.
        title: Name of what is compared.
        meaning: Its definition.
    """

    study: str
    best: float | None
    marks: tuple[float, ...]
    rows: tuple[Row, ...]
    unit: str = UNITS[NATS_PER_TOKEN]
    title: str = "Regret"
    meaning: str = "Regret: best fully scored objective so far minus the lowest that any run found"


def algorithm_of(run: str) -> str:
    """The algorithm of a run's label."""
    return RunName.parse(run).algorithm


def compare(summary: Summary) -> Comparison:
    """The searches of a study, those of one algorithm with several seeds in one row."""
    runs = [_run(summary, name, (_grid_curve if algorithm_of(name) == GRID else _curve)) for name in summary.trials]
    best = min((run.best_S[-1] for run in runs if run.best_S), default=None)
    return _comparison(summary, runs, best, has_expectation=True)


def compare_searches(summary: Summary) -> Comparison:
    """The same by what the study searches for: the objective, or the hypervolume of the front."""
    if summary.front is None:
        return compare(summary)
    reference = summary.front.reference
    runs = [_run(summary, name, partial(_hypervolume_curve, reference=reference)) for name in summary.trials]
    losses = [losses for records in summary.trials.values() for record in records if (losses := _losses(record))]
    best = -hypervolume(np.array(losses), reference) if losses else None
    return replace(
        _comparison(summary, runs, best, has_expectation=False),
        unit=f"{summary.unit_words}, squared",
        title="Missing hypervolume",
        meaning="Missing hypervolume: that of the front of all runs together minus that of a run's own front so far",
    )


def _comparison(summary: Summary, runs: Sequence[Run], best: float | None, has_expectation: bool) -> Comparison:
    costs = marks(runs)
    by_algorithm: dict[str, list[Run]] = {}
    for run in runs:
        by_algorithm.setdefault(run.algorithm, []).append(run)
    rows = (
        _row(seeds, summary.trials, best, costs, is_expected=has_expectation and algorithm == GRID)
        for algorithm, seeds in by_algorithm.items()
    )
    return Comparison(study=summary.study, best=best, marks=costs, rows=tuple(rows), unit=summary.unit_words)


def marks(runs: Sequence[Run]) -> tuple[float, ...]:
    """10, 20, 40 ... forward-equivalents, then those of the run that spent most, rounded up.

    A grid spends as many as it has points, so it counts only where nothing else was run.
    """
    searches = [run for run in runs if run.algorithm != GRID] or runs
    most = ceil(max((run.forwards for run in searches), default=0.0) - SLACK)
    doublings = (FIRST_MARK * 2**power for power in count())
    # A doubling close below the last mark would say nearly the same.
    return (*map(float, takewhile(lambda mark: mark <= 0.8 * most, doublings)), float(most)) if most > 0 else ()


def _run(summary: Summary, name: str, curve: Callable[[Sequence[TrialRecord]], Curve]) -> Run:
    records = summary.trials[name]
    spent_S, best_S = curve(records)
    return Run(
        name=name,
        algorithm=algorithm_of(name),
        trials=len(records),
        partial=sum(record.is_partial for record in records),
        failed=sum(record.objective is None for record in records),
        forwards=sum(record.forwards for record in records),
        ask=_median_ask(records),
        asking=sum(record.propose_seconds for record in records),
        measuring=sum(record.evaluation.merge_seconds + record.evaluation.score_seconds for record in records),
        stopped=(summary.stopped or {}).get(name, ""),
        spent_S=spent_S,
        best_S=best_S,
    )


def _hypervolume_curve(records: Sequence[TrialRecord], reference: tuple[float, float]) -> Curve:
    """Cost and negative hypervolume after every trial, in the order of their numbers, from the first whole one on."""
    spent_S, volumes_S, losses_N2, cost = list[float](), list[float](), list[tuple[float, ...]](), 0.0
    for record in records:
        cost += record.forwards
        if losses := _losses(record):
            losses_N2.append(losses)
            spent_S.append(cost)
            volumes_S.append(-hypervolume(np.array(losses_N2), reference))
    return tuple(spent_S), tuple(volumes_S)


def _losses(record: TrialRecord) -> tuple[float, ...]:
    """Both losses of a trial that was scored."""
    return tuple(record.losses.values())


def _curve(records: Sequence[TrialRecord]) -> Curve:
    """Cost and best after every trial, in the order of their numbers, from the first whole one on."""
    spent = accumulate(record.forwards for record in records)
    best = accumulate((_whole_objective(record) for record in records), min)
    known = [(cost, lowest) for cost, lowest in zip(spent, best, strict=True) if lowest < inf]
    return tuple(cost for cost, _ in known), tuple(lowest for _, lowest in known)


def _grid_curve(records: Sequence[TrialRecord]) -> Curve:
    """Cost and expected best, over all orders of the grid's points, each of which costs one forward-equivalent."""
    objectives = [value for record in records if (value := _whole_objective(record)) < inf]
    if not objectives:
        return (), ()
    objectives.sort()
    most = len(objectives)
    every, beyond = np.arange(1, min(most, EVERY) + 1), np.geomspace(min(most, EVERY), most, EVERY)
    spent_S = np.unique(np.concatenate([every, beyond.round().astype(np.int64)]))
    return tuple(map(float, spent_S)), tuple(map(float, expected_best(objectives, spent_S)))


def _whole_objective(record: TrialRecord) -> float:
    """Penalized objective in the objective's unit; infinite for a trial that failed or was stopped early."""
    return inf if record.penalized is None or record.is_partial else record.penalized


def _median_ask(records: Sequence[TrialRecord]) -> float:
    return median(record.propose_seconds for record in records) if records else 0.0


def _row(
    runs: Sequence[Run],
    trials: Mapping[str, Sequence[TrialRecord]],
    best: float | None,
    marks: Sequence[float],
    is_expected: bool,
) -> Row:
    """An algorithm's runs together; regrets count from `best`."""
    costs = sorted({cost for run in runs for cost in run.spent_S})
    curve = [regret for cost in costs if (regret := _regret(runs, cost, best)) is not None]
    return Row(
        algorithm=runs[0].algorithm,
        runs=tuple(runs),
        forwards=sum(run.forwards for run in runs),
        ask=_median_ask([record for run in runs for record in trials[run.name]]),
        regrets=tuple(_regret(runs, mark, best) for mark in marks),
        curve=tuple(curve),
        is_expected=is_expected,
    )


def _regret(runs: Sequence[Run], forwards: float, best: float | None) -> Regret | None:
    """Median and quartiles over runs at a cost; None where one of them has no whole trial yet."""
    objectives = [run.best_after(forwards) for run in runs]
    if best is None or inf in objectives:
        return None
    low, middle, high = (float(value) - best for value in np.quantile(objectives, [0.25, 0.5, 0.75]))
    return Regret(forwards, middle, low, high) if len(objectives) > 1 else Regret(forwards, middle)
