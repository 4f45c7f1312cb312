"""The results table: baselines and each algorithm's best composite with their scores."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.pareto import front_between
from dem_opt.analysis.sampling import Documents, documents_of
from dem_opt.analysis.total_price import sum_of_all, total_price
from dem_opt.config import TOP, ReportSection
from dem_opt.errors import EvaluationError
from dem_opt.evaluation.objective import Objective
from dem_opt.grouping import GroupedCoefficients, GroupResult
from dem_opt.search.group_trials import group_result
from dem_opt.search.run_name import RunName
from dem_opt.search.trials import exceeded, is_known, objectives, recall
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, SPLITS, Composite, Margin, ResultRow, Score, Summary, TotalPrice, TrialRecord

APART = 0.01
"""Least difference of some coefficient between two composites that are both listed."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A composite that gets a row of the results table, and the cost of finding it.

    Attributes:
        label: Its label in the table.
        role: See `ResultRow.role`.
        algorithm: The algorithm whose best it is; "" for baselines.
        coefficients: Its coefficients; None for the base.
        composite: The same by content.
        evaluations: Composites evaluated to find it.
        seconds: Seconds of evaluating them; None where they are its own, in the ledger.
        forwards: Forward-equivalents of evaluating them.
        run: Label of the run that found it; "" for baselines.
        groups: Coefficients by group; `coefficients` are the global ones then.
    """

    label: str
    role: str
    algorithm: str = ""
    coefficients: Coefficients | None
    composite: Composite
    evaluations: int = 1
    seconds: float | None = None
    forwards: float = 1.0
    run: str = ""
    groups: GroupedCoefficients | None = None


def entries(
    identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]], groups: GroupResult | None = None
) -> list[Entry]:
    """Base, single fine-tunes, uniform average, and each algorithm's best run, the best of these last.

    The best coefficients by group, where they are not the global ones, stand behind all others.
    """
    best = _best_entries(identity, trials)
    return _baselines(identity) + best + group_entries(identity, best, groups)


def final_entries(
    identity: StudyIdentity,
    trials: Mapping[str, Sequence[TrialRecord]],
    report: ReportSection,
    groups: GroupResult | None = None,
) -> list[Entry]:
    """The composites that are scored on both splits: those of `entries`, and what the study's report asks for."""
    left_out = left_out_entries(identity, entries(identity, trials)[-1]) if report.leave_one_out else []
    return [*entries(identity, trials, groups), *top_entries(identity, trials, report.top), *left_out]


def group_entries(identity: StudyIdentity, best: Sequence[Entry], groups: GroupResult | None) -> list[Entry]:
    """The best coefficients by group, with the cost of finding the global ones too; none where they are these."""
    if groups is None or groups.is_global or not best or best[-1].coefficients != groups.centre:
        return []
    centre = best[-1]
    return [
        Entry(
            label=f"best of {len(groups.coefficients)} groups",
            role="best",
            algorithm=centre.algorithm,
            coefficients=groups.centre,
            composite=identity.composite(groups.coefficients),
            evaluations=centre.evaluations + round(groups.gradients + 2 * max(len(groups.judgements) - 1, 0)),
            seconds=(centre.seconds or 0.0) + groups.seconds,
            forwards=centre.forwards + groups.forwards,
            run=centre.run,
            groups=groups.coefficients,
        )
    ]


def _baselines(identity: StudyIdentity) -> list[Entry]:
    space = identity.space
    baselines = [Entry(label="base", role="base", coefficients=None, composite=Composite.single(identity.base))]
    for name, content in sorted(identity.fine_tunes.items()):
        # The fine-tune as it is, a point of the space or not: so a coefficient of 1 whatever the total.
        alone = Coefficients(tuple((other, UNIT if other == name else 0) for other in space.names))
        baselines.append(Entry(label=name, role="single", coefficients=alone, composite=Composite.single(content)))
    if space.dimension > 1:
        baselines.append(_entry(identity, "uniform", "uniform", space.centroid()))
    return baselines


def sum_entries(identity: StudyIdentity) -> list[Entry]:
    """The sum of all vectors, where there are several."""
    return [_entry(identity, "sum of all", "sum", sum_of_all(identity))] if identity.space.dimension > 1 else []


def _entry(identity: StudyIdentity, label: str, role: str, point: Coefficients) -> Entry:
    return Entry(label=label, role=role, coefficients=point, composite=identity.composite(point))


def _best_entries(identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]]) -> list[Entry]:
    """Each algorithm's best run, the worst algorithm first."""
    best_by_run = {run: best for run, records in trials.items() if (best := best_of(records)) is not None}
    by_algorithm: dict[str, Entry] = {}
    for run in sorted(best_by_run, key=lambda run: best_by_run[run].rank, reverse=True):
        entry = _best_entry(identity, run, best_by_run[run], trials[run])
        # Runs come from the worst to the best: a later one of the same algorithm takes its place, at the end.
        by_algorithm.pop(entry.algorithm, None)
        by_algorithm[entry.algorithm] = entry
    return list(by_algorithm.values())


def _best_entry(identity: StudyIdentity, run: str, best: TrialRecord, trials: Sequence[TrialRecord]) -> Entry:
    """The best trial of a run, with the cost of all its trials."""
    scored = [trial for trial in trials if trial.objective is not None]
    algorithm = RunName.parse(run).algorithm
    return Entry(
        label=f"best of {algorithm}",
        role="best",
        algorithm=algorithm,
        coefficients=best.coefficients,
        composite=identity.composite(best.coefficients),
        evaluations=len({trial.coefficients for trial in scored}),
        seconds=sum(
            trial.evaluation.merge_seconds + trial.evaluation.score_seconds + trial.propose_seconds for trial in trials
        ),
        forwards=sum(trial.forwards for trial in scored),
        run=run,
    )


def groups_of(
    ledger: Ledger, identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]]
) -> GroupResult | None:
    """The coefficients by group that were found from the best global ones; None where there are none (yet)."""
    return group_result(ledger, identity, winner_of(identity, trials))


def best_of(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best of the whole trials; one that was stopped early never wins."""
    return min((trial for trial in trials if is_whole(trial)), key=lambda trial: trial.rank, default=None)


def winner_of(identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]]) -> Coefficients | None:
    """The coefficients of the best run of all; None where nothing is found yet."""
    best = _best_entries(identity, trials)
    return best[-1].coefficients if best else None


def is_whole(trial: TrialRecord) -> bool:
    """True if a trial was scored on all windows."""
    return trial.objective is not None and not trial.is_partial


def top_entries(identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]], most: int = TOP) -> list[Entry]:
    """The best composites of the search split over all runs, the best first, without near-duplicates of better ones."""
    whole = [trial for records in trials.values() for trial in records if is_whole(trial)]
    chosen: list[Coefficients] = []
    for trial in sorted(whole, key=lambda trial: trial.rank):
        if len(chosen) < most and not any(_alike(trial.coefficients, better) for better in chosen):
            chosen.append(trial.coefficients)
    return [_entry(identity, f"no. {place}", "top", point) for place, point in enumerate(chosen, start=1)]


def left_out_entries(identity: StudyIdentity, winner: Entry) -> list[Entry]:
    """The winner without each of the distributions that it uses, where others are left; labelled by that distribution.

    The others keep their proportions and grow to the winner's total: the difference is the worth of the distribution's
    data to the winner.  They are composites like any other, though bounds may forbid them as a winner.
    """
    if winner.role != "best" or winner.coefficients is None:
        return []
    used = [name for name, units in winner.coefficients.pairs if units]
    if len(used) < 2:
        return []
    return [_entry(identity, name, "without", _without(winner.coefficients, name)) for name in used]


def _without(coefficients: Coefficients, name: str) -> Coefficients:
    """Coefficients with that of `name` at 0 and the others grown in proportion to the same total."""
    others = {other: units for other, units in coefficients.pairs if other != name}
    rest = sum(others.values())
    total = rest + coefficients.units[name]
    shares = np.array([others[other] / rest for other in sorted(others)])
    grown = Space(tuple(others), total / UNIT).at(shares)
    return Coefficients(tuple(sorted((grown.units | {name: 0}).items())))


def _alike(left: Coefficients, right: Coefficients) -> bool:
    """True if no coefficient differs by as much as APART."""
    return all(abs(units - right.units[name]) < APART * UNIT for name, units in left.pairs)


def summarize(
    study: str,
    ledger: Ledger,
    identity: StudyIdentity,
    trials: Mapping[str, Sequence[TrialRecord]],
    facts: Mapping[str, str],
    stopped: Mapping[str, str] | None = None,
) -> Summary:
    """Summarize a study for the results table, the figures and the report.

    While a study runs, composites without all scores on the search split are left out, and so are held-out scores that
    were not measured yet.

    Args:
        study: Name of the study.
        ledger: Scores.
        identity: The study's models, corpora and objective.
        trials: Finished trials by run.
        facts: Labels and values for people who reproduce the study.
        stopped: Why each run ended.
    """
    by_split = objectives(ledger, identity)
    best = _best_entries(identity, trials)
    groups = group_result(ledger, identity, best[-1].coefficients if best else None)
    table = [*_baselines(identity), *sum_entries(identity), *best, *group_entries(identity, best, groups)]
    listed = [entry for entry in table if is_known(ledger, identity, entry.composite, SEARCH)]
    results = known_rows(ledger, identity, listed)
    *rivals, winner = results
    best_global = next(entry for entry in reversed(listed) if entry.groups is None)
    documents = {split: documents_of(ledger, identity, split) for split in SPLITS}
    margins = tuple(
        _margin(by_split[split], rival, winner, split, documents[split])
        for split in SPLITS
        for rival in rivals
        if split in rival.objective and split in winner.objective
    )
    return Summary(
        study=study,
        weights=identity.weights,
        results=results,
        margins=margins,
        trials={run: tuple(records) for run, records in trials.items()},
        facts=facts,
        top=known_rows(ledger, identity, top_entries(identity, trials)),
        stopped=stopped,
        worst=identity.worst,
        function=identity.function.name if identity.function else "",
        unit=identity.unit,
        left_out=known_rows(ledger, identity, left_out_entries(identity, best_global)),
        costs=ledger.costs(study, identity),
        total_price=_total_price(ledger, identity, best_global),
        front=front_between(ledger, identity, identity.pareto) if identity.pareto else None,
        groups=groups,
    )


def _total_price(ledger: Ledger, identity: StudyIdentity, winner: Entry) -> TotalPrice | None:
    """The price of the sum at a winner that a search found; None where a custom objective is not finite beside it."""
    with suppress(EvaluationError):
        if winner.role == "best" and winner.coefficients is not None:
            return total_price(ledger, identity, winner.coefficients)
    return None


def known_rows(ledger: Ledger, identity: StudyIdentity, listed: Iterable[Entry]) -> tuple[ResultRow, ...]:
    """The rows of those composites that the ledger has scored on all of the search split."""
    by_split = objectives(ledger, identity)
    known = (entry for entry in listed if is_known(ledger, identity, entry.composite, SEARCH))
    return tuple(_row(ledger, identity, by_split, entry) for entry in known)


def finite_objectives(by_split: Mapping[str, Objective], scores: Mapping[str, Mapping[str, Score]]) -> dict[str, float]:
    """Return the objective by split, without splits on which it is not known, or a custom one is not finite."""
    values = {}
    for split, by_name in scores.items():
        with suppress(EvaluationError):
            if split in by_split:
                values[split] = by_split[split](by_name)
    return values


def _row(ledger: Ledger, identity: StudyIdentity, by_split: Mapping[str, Objective], entry: Entry) -> ResultRow:
    known = [split for split in by_split if is_known(ledger, identity, entry.composite, split)]
    scores = {split: recall(ledger, identity, entry.composite, split) for split in known}
    pass_tokens = len(identity.keys(SEARCH)) * identity.windows(SEARCH) * int(identity.settings["evaluation.window"])
    seconds = entry.seconds
    if seconds is None:
        seconds = ledger.seconds(entry.composite, identity.keys(SEARCH), identity.scoring)
    return ResultRow(
        label=entry.label,
        role=entry.role,
        algorithm=entry.algorithm,
        coefficients=entry.coefficients,
        scores=scores,
        objective=finite_objectives(by_split, scores),
        evaluations=entry.evaluations,
        forwards=entry.forwards,
        forward_tokens=round(entry.forwards * pass_tokens),
        seconds=seconds,
        violation=exceeded(ledger, identity, scores.get(SEARCH, {})),
        run=entry.run,
        groups=entry.groups,
    )


def rescored(
    row: ResultRow, label: str, scores: Mapping[str, Mapping[str, Score]], by_split: Mapping[str, Objective]
) -> ResultRow:
    """A row for another form of the same composite, with the scores of that form."""
    objective = {split: by_split[split](by_name) for split, by_name in scores.items()}
    return replace(row, label=label, scores=scores, objective=objective)


def _margin(
    objective: Objective, rival: ResultRow, winner: ResultRow, split: str, documents: Mapping[str, Documents]
) -> Margin:
    gap = difference(rival.scores[split], winner.scores[split], objective, documents)
    return Margin(
        rival=rival.label,
        split=split,
        mean=gap.mean,
        low=gap.low,
        high=gap.high,
        sampled=gap.sampled,
        violation=rival.violation - winner.violation if split == SEARCH else 0.0,
    )
