"""Trials and composites with their scores: read back from the ledger, and ranked in the final table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dem_opt.intervals import difference
from dem_opt.ledger import Ledger
from dem_opt.question import SEARCH, SPLITS, Question
from dem_opt.records import (
    Composite,
    Evaluation,
    Failure,
    Margin,
    Score,
    Standing,
    Summary,
    TrialRecord,
    mean_nll,
    violation,
)
from dem_opt.search import Proposal, Search, Trial
from dem_opt.simplex import Coefficients

CARRIED_OVER = 10
"""How many composites of an earlier generation a new one begins with."""


def recall(ledger: Ledger, question: Question, composite: Composite, split: str) -> dict[str, Score]:
    """Scores of a composite by distribution, those that the ledger has."""
    known = ledger.look_up(composite, question.keys(split), question.scoring)
    return {name: known[key] for name, key in question.corpora[split].items() if key in known}


def is_known(ledger: Ledger, question: Question, composite: Composite, split: str) -> bool:
    """Whether the ledger has a composite's scores on all of a split."""
    return len(recall(ledger, question, composite, split)) == len(question.corpora[split])


def exceeded(ledger: Ledger, question: Question, scores: Mapping[str, Score]) -> float:
    """The violation of scores on the search split, in nats per token, against the base's in the ledger."""
    if not question.protect:
        return 0.0
    return violation(scores, recall(ledger, question, Composite.single(question.base), SEARCH), question.protect)


def trial_record(
    ledger: Ledger, question: Question, study: str, proposal: Proposal, answer: Evaluation | Failure
) -> TrialRecord:
    """What came of a proposal.  The scores are the ledger's: those just measured and those that it had."""
    coefficients = proposal.coefficients
    if isinstance(answer, Failure):
        return TrialRecord(
            study, proposal.number, coefficients, None, propose_seconds=proposal.seconds, reason=answer.reason
        )
    scores = recall(ledger, question, question.composite(coefficients), SEARCH)
    objective = mean_nll(scores, question.weights)
    over = exceeded(ledger, question, scores)
    return TrialRecord(
        study, proposal.number, coefficients, objective, scores, answer, proposal.seconds, violation=over
    )


def attributes(record: TrialRecord) -> dict[str, Any]:
    """What Optuna keeps of a trial beside its objective: perplexities for people, seconds and tokens for `recorded`."""
    costs = {
        "forward_tokens": record.evaluation.forward_tokens,
        "merge_seconds": record.evaluation.merge_seconds,
        "score_seconds": record.evaluation.score_seconds,
        "propose_seconds": record.propose_seconds,
    }
    if record.reason:
        return costs | {"reason": record.reason}
    over = {"violation": record.violation} if record.violation else {}
    return costs | over | {"perplexity": {name: score.perplexity for name, score in record.scores.items()}}


def recorded(ledger: Ledger, question: Question, study: str, trial: Trial) -> TrialRecord:
    """The record of a finished trial, from Optuna and the ledger."""
    costs = trial.attributes
    proposal = Proposal(trial.number, trial.coefficients, costs["propose_seconds"])
    if trial.objective is None:
        return trial_record(ledger, question, study, proposal, Failure(costs["reason"]))
    evaluation = Evaluation({}, costs["forward_tokens"], costs["merge_seconds"], costs["score_seconds"])
    return trial_record(ledger, question, study, proposal, evaluation)


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


def entries(question: Question, trials: Mapping[str, Sequence[TrialRecord]]) -> list[Entry]:
    """Base, single fine-tunes, uniform average and each algorithm's best, the best of these last."""
    space = question.space
    baselines = [Entry("base", "base", "", None, Composite.single(question.base))]
    for name, vertex in zip(space.names, space.vertices(), strict=True):
        baselines.append(Entry(name, "single", "", vertex, question.composite(vertex)))
    if space.dimension > 1:
        centroid = space.centroid()
        baselines.append(Entry("uniform", "uniform", "", centroid, question.composite(centroid)))
    bests = [(min(told, key=lambda trial: trial.rank), told) for told in map(_complete, trials.values()) if told]
    bests.sort(key=lambda pair: pair[0].rank, reverse=True)
    return baselines + [_best_entry(question, best, told) for best, told in bests]


def _complete(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [trial for trial in trials if trial.objective is not None]


def _best_entry(question: Question, best: TrialRecord, told: Sequence[TrialRecord]) -> Entry:
    composites = {question.composite(trial.coefficients) for trial in told}
    seconds = sum(
        trial.evaluation.merge_seconds + trial.evaluation.score_seconds + trial.propose_seconds for trial in told
    )
    algorithm = best.study.rpartition("/")[2].partition("#")[0]
    return Entry(
        f"best of {algorithm}",
        "best",
        algorithm,
        best.coefficients,
        question.composite(best.coefficients),
        len(composites),
        seconds,
    )


def summarize(
    study: str,
    ledger: Ledger,
    question: Question,
    trials: Mapping[str, Sequence[TrialRecord]],
    facts: Mapping[str, str],
) -> Summary:
    """All that the table, the figures and the report are made from.

    While a study runs, what is not measured yet is left out: composites on the search split, scores on the other.
    """
    found = [entry for entry in entries(question, trials) if is_known(ledger, question, entry.composite, SEARCH)]
    standings = tuple(_standing(ledger, question, entry) for entry in found)
    winner = standings[-1]
    pairs = [(split, rival) for split in SPLITS for rival in standings[:-1]]
    margins = tuple(
        _margin(question, rival, winner, split)
        for split, rival in pairs
        if split in rival.objective and split in winner.objective
    )
    frozen = {algorithm: tuple(records) for algorithm, records in trials.items()}
    return Summary(study, question.weights, standings, margins, frozen, facts)


def _standing(ledger: Ledger, question: Question, entry: Entry) -> Standing:
    known = [split for split in SPLITS if is_known(ledger, question, entry.composite, split)]
    scores = {split: recall(ledger, question, entry.composite, split) for split in known}
    settings = question.settings
    one_pass = len(question.weights) * int(settings["evaluation.windows"]) * int(settings["evaluation.window"])
    return Standing(
        label=entry.label,
        role=entry.role,
        algorithm=entry.algorithm,
        coefficients=entry.coefficients,
        scores=scores,
        objective={split: mean_nll(scores[split], question.weights) for split in known},
        evaluations=entry.evaluations,
        forward_tokens=entry.evaluations * one_pass,
        seconds=ledger.seconds(entry.composite, question.keys(SEARCH), question.scoring)
        if entry.seconds is None
        else entry.seconds,
        violation=exceeded(ledger, question, scores.get(SEARCH, {})),
    )


def rescored(
    one: Standing, label: str, scores: Mapping[str, Mapping[str, Score]], weights: Mapping[str, float]
) -> Standing:
    """A line for another form of the same composite, with the scores of that form."""
    objective = {split: mean_nll(by_name, weights) for split, by_name in scores.items()}
    return replace(one, label=label, scores=scores, objective=objective)


def _margin(question: Question, rival: Standing, winner: Standing, split: str) -> Margin:
    gap = difference(rival.scores[split], winner.scores[split], question.weights)
    return Margin(rival.label, split, gap.mean, gap.low, gap.high)


def finished(ledger: Ledger, question: Question, search: Search) -> list[TrialRecord]:
    """Records of the trials that are told, in the order of their numbers."""
    told = (trial for trial in search.trials() if trial.state != "running")
    return [recorded(ledger, question, search.name, trial) for trial in told]


def carried_over(ledger: Ledger, question: Question, most: int = CARRIED_OVER) -> list[Coefficients]:
    """The best composites of the ledger that the question's space still contains, as its coefficients.

    A composite of an earlier question is a point of this one where it uses no other checkpoint: the face w_new = 0
    of a simplex that has grown, or what is left of one that has shrunk.  Those with the most corpora scored come
    first, by their violation and mean over these; where only new corpora are missing, only they are measured.
    """
    space, names = question.space, {content: name for name, content in question.experts.items()}
    ranked = []
    for composite in ledger.composites(question.scoring):
        units = dict(composite.terms)
        units.pop(question.base, None)
        if units.keys() <= names.keys() and sum(units.values()) == space.total_units:
            by_name = {names[content]: count for content, count in units.items()}
            point = space.from_units([by_name.get(name, 0) for name in space.names])
            scores = recall(ledger, question, composite, SEARCH)
            weights = {name: question.weights[name] for name in scores}
            if any(weights.values()):
                over = exceeded(ledger, question, scores)
                ranked.append((-len(scores), over, mean_nll(scores, weights), composite.key, point))
    return [point for *_, point in sorted(ranked)[:most]]
