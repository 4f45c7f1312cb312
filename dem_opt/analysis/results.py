"""Composites with their scores, ranked in the final table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dem_opt.analysis.bootstrap import difference
from dem_opt.evaluation.objective import Objective
from dem_opt.search.trials import exceeded, is_known, objectives, recall
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, SPLITS, Composite, Margin, ResultRow, Score, Summary, TrialRecord

TOP = 5
"""How many of the best composites of the search split are scored on the held-out split too."""

APART = 0.01
"""By how much some coefficient must differ for two composites to be listed both."""


@dataclass(frozen=True)
class Entry:
    """A composite that gets a line of the table, and what it cost to find: seconds of its own where None."""

    label: str
    role: str
    algorithm: str
    coefficients: Coefficients | None
    composite: Composite
    evaluations: int = 1
    seconds: float | None = None
    forwards: float = 1.0
    run: str = ""


def entries(identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]]) -> list[Entry]:
    """Base, single fine-tunes, uniform average and each algorithm's best, the best of these last.

    Of several searches by one algorithm, the one that found the best.
    """
    space = identity.space
    baselines = [Entry("base", "base", "", None, Composite.single(identity.base))]
    for name, content in sorted(identity.fine_tunes.items()):
        alone = Coefficients(tuple((one, UNIT * (one == name)) for one in space.names))
        baselines.append(Entry(name, "single", "", alone, Composite.single(content)))
    if space.dimension > 1:
        centroid = space.centroid()
        baselines.append(Entry("uniform", "uniform", "", centroid, identity.composite(centroid)))
    found: dict[str, Entry] = {}
    for name, told in sorted(trials.items(), key=lambda pair: _best_rank(pair[1]), reverse=True):
        if best := best_of(told):
            algorithm = name.partition("@")[0]
            found.pop(algorithm, None)
            found[algorithm] = _best_entry(identity, name, best, told)
    return baselines + list(found.values())


def best_of(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best of the whole trials: a partial one never wins."""
    return min((trial for trial in trials if is_whole(trial)), key=lambda trial: trial.rank, default=None)


def _best_rank(trials: Sequence[TrialRecord]) -> tuple[float, ...]:
    best = best_of(trials)
    return best.rank if best else ()


def is_whole(trial: TrialRecord) -> bool:
    """Whether a trial was scored on all windows."""
    return trial.objective is not None and not trial.is_partial


def _best_entry(identity: StudyIdentity, run: str, best: TrialRecord, told: Sequence[TrialRecord]) -> Entry:
    scored = [trial for trial in told if trial.objective is not None]
    costs = (trial.evaluation.merge_seconds + trial.evaluation.score_seconds + trial.propose_seconds for trial in told)
    algorithm = run.partition("@")[0]
    return Entry(
        f"best of {algorithm}",
        "best",
        algorithm,
        best.coefficients,
        identity.composite(best.coefficients),
        len({trial.coefficients for trial in scored}),
        sum(costs),
        sum(trial.forwards for trial in scored),
        run,
    )


def top_entries(identity: StudyIdentity, trials: Mapping[str, Sequence[TrialRecord]], most: int = TOP) -> list[Entry]:
    """The best composites of the search split, whoever found them, the best first, and none like a better one."""
    whole = [trial for told in trials.values() for trial in told if is_whole(trial)]
    chosen: list[Coefficients] = []
    for trial in sorted(whole, key=lambda trial: trial.rank):
        if len(chosen) < most and not any(_alike(trial.coefficients, better) for better in chosen):
            chosen.append(trial.coefficients)
    return [
        Entry(f"no. {place}", "top", "", point, identity.composite(point))
        for place, point in enumerate(chosen, start=1)
    ]


def left_out_entries(identity: StudyIdentity, winner: Entry) -> list[Entry]:
    """The winner without each of the distributions that it has some of, where others are left, named by it.

    The others keep their proportions and grow to the winner's total: what the distribution's data are worth to it.
    They are composites like any other, though bounds may forbid them as a winner.
    """
    if winner.role != "best" or winner.coefficients is None:
        return []
    made = []
    for name, units in winner.coefficients.items:
        others = {other: count for other, count in winner.coefficients.items if other != name}
        if units and (rest := sum(others.values())):
            total = rest + units
            grown = Space(tuple(others), total / UNIT).at(np.array([others[one] / rest for one in sorted(others)]))
            point = Coefficients(tuple(sorted((grown.units | {name: 0}).items())))
            made.append(Entry(name, "without", "", point, identity.composite(point)))
    return made


def _alike(one: Coefficients, other: Coefficients) -> bool:
    """Whether no coefficient differs by as much as APART."""
    units = other.units
    return all(abs(mine - units[name]) < APART * UNIT for name, mine in one.items)


def summarize(
    study: str,
    ledger: Ledger,
    identity: StudyIdentity,
    trials: Mapping[str, Sequence[TrialRecord]],
    facts: Mapping[str, str],
    stopped: Mapping[str, str] | None = None,
) -> Summary:
    """All that the table, the figures and the report are made from.

    While a study runs, what is not measured yet is left out: composites on the search split, scores on the other.
    """
    found = [entry for entry in entries(identity, trials) if is_known(ledger, identity, entry.composite, SEARCH)]
    by_split = objectives(ledger, identity)
    results = tuple(_result(ledger, identity, by_split, entry) for entry in found)
    top = tuple(_result(ledger, identity, by_split, entry) for entry in top_entries(identity, trials))
    winner = results[-1]
    without = [
        entry for entry in left_out_entries(identity, found[-1]) if is_known(ledger, identity, entry.composite, SEARCH)
    ]
    left_out = tuple(_result(ledger, identity, by_split, entry) for entry in without)
    pairs = [(split, rival) for split in SPLITS for rival in results[:-1]]
    margins = tuple(
        _margin(by_split[split], rival, winner, split)
        for split, rival in pairs
        if split in rival.objective and split in winner.objective
    )
    frozen = {algorithm: tuple(records) for algorithm, records in trials.items()}
    return Summary(
        study=study,
        weights=identity.weights,
        results=results,
        margins=margins,
        trials=frozen,
        facts=facts,
        top=top,
        stopped=stopped,
        worst=identity.worst,
        left_out=left_out,
    )


def _result(ledger: Ledger, identity: StudyIdentity, by_split: Mapping[str, Objective], entry: Entry) -> ResultRow:
    known = [split for split in by_split if is_known(ledger, identity, entry.composite, split)]
    scores = {split: recall(ledger, identity, entry.composite, split) for split in known}
    one_pass = len(identity.keys(SEARCH)) * identity.windows(SEARCH) * int(identity.settings["evaluation.window"])
    return ResultRow(
        label=entry.label,
        role=entry.role,
        algorithm=entry.algorithm,
        coefficients=entry.coefficients,
        scores=scores,
        objective={split: by_split[split](scores[split]) for split in known},
        evaluations=entry.evaluations,
        forwards=entry.forwards,
        forward_tokens=round(entry.forwards * one_pass),
        seconds=ledger.seconds(entry.composite, identity.keys(SEARCH), identity.scoring)
        if entry.seconds is None
        else entry.seconds,
        violation=exceeded(ledger, identity, scores.get(SEARCH, {})),
        run=entry.run,
    )


def rescored(
    one: ResultRow, label: str, scores: Mapping[str, Mapping[str, Score]], by_split: Mapping[str, Objective]
) -> ResultRow:
    """A line for another form of the same composite, with the scores of that form."""
    objective = {split: by_split[split](by_name) for split, by_name in scores.items()}
    return replace(one, label=label, scores=scores, objective=objective)


def _margin(objective: Objective, rival: ResultRow, winner: ResultRow, split: str) -> Margin:
    gap = difference(rival.scores[split], winner.scores[split], objective)
    return Margin(rival=rival.label, split=split, mean=gap.mean, low=gap.low, high=gap.high)
