"""What came of a trial: its record, from Optuna and the ledger, and what Optuna is told of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import numpy as np

from dem_opt.evaluation.interim_analyses import first_windows, replay
from dem_opt.evaluation.objective import Objective, mean_nll, violation
from dem_opt.evaluation.racing import Race
from dem_opt.search.optuna_study import Proposal, Search, Trial
from dem_opt.search.samplers.history import thin
from dem_opt.search.samplers.kernel import interpolate
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import (
    GRADIENT_FORWARDS,
    PENALTY,
    SEARCH,
    SPLITS,
    Composite,
    Evaluation,
    Failure,
    Gradient,
    Score,
    TrialRecord,
    weighted_sum,
)

CONTROLS = 32
"""How many whole trials a race's control is made from at most."""

MEASURED = ("forward_tokens", "scored_tokens", "merge_seconds", "score_seconds", "wait_seconds", "batch_tokens")
"""What is kept of an evaluation beside its scores."""


def recall(
    ledger: Ledger, identity: StudyIdentity, composite: Composite, split: str, whole: bool = True
) -> dict[str, Score]:
    """Scores of a composite by distribution, those that the ledger has of all windows, or of any."""
    known = ledger.look_up(composite, identity.keys(split), identity.scoring)
    enough = identity.windows(split) if whole else 1
    by_name = identity.corpora[split].items()
    return {name: known[key] for name, key in by_name if key in known and len(known[key].nats_W) >= enough}


def is_known(ledger: Ledger, identity: StudyIdentity, composite: Composite, split: str) -> bool:
    """Whether the ledger has a composite's scores on all of a split."""
    return len(recall(ledger, identity, composite, split)) == len(identity.corpora[split])


def base_scores(ledger: Ledger, identity: StudyIdentity, split: str = SEARCH) -> dict[str, Score]:
    """The base's scores by distribution."""
    return recall(ledger, identity, Composite.single(identity.base), split)


def objectives(ledger: Ledger, identity: StudyIdentity) -> dict[str, Objective]:
    """What is minimized, by split: for regrets, of the splits on which the ledger has every fine-tune's scores."""
    if not identity.worst:
        return dict.fromkeys(SPLITS, Objective(identity.weights))
    made = {}
    for split in SPLITS:
        own = {
            name: recall(ledger, identity, Composite.single(content), split)
            for name, content in identity.fine_tunes.items()
        }
        if all(name in scores for name, scores in own.items()):
            made[split] = Objective(identity.weights, {name: scores[name] for name, scores in own.items()})
    return made


def exceeded(ledger: Ledger, identity: StudyIdentity, scores: Mapping[str, Score]) -> float:
    """The violation of whole scores on the search split, in nats per token, against the base's in the ledger."""
    if not identity.protect:
        return 0.0
    return violation(scores, base_scores(ledger, identity), identity.protect)


def race_for(
    ledger: Ledger, identity: StudyIdentity, at: Coefficients, told: Sequence[Trial], clear: float = inf
) -> Race | None:
    """The race of a trial at these coefficients against the best of the whole trials that were told.

    The best is that of those that violate nothing.  The control is made from the CONTROLS trials nearest to it,
    of the best and the latest: their nats, window by window, with the weights that interpolate a merge's loss
    (`interpolate`).  None without an incumbent, and for the largest regret, of which paired means tell nothing.
    """
    able = (trial for trial in told if not trial.attributes.get("violation"))
    best = min(able, key=lambda trial: (trial.objective, trial.number), default=None)
    if best is None or identity.worst:
        return None
    place_F, known = identity.space.shares(at), thin(told, 8 * CONTROLS)
    shares_NF = np.array([identity.space.shares(trial.coefficients) for trial in known])
    near = np.argsort(np.abs(shares_NF - place_F).sum(axis=1), kind="stable")[:CONTROLS]
    weights_N = interpolate(shares_NF[near], place_F)
    composites = [identity.composite(one.coefficients) for one in (best, *(known[i] for i in near))]
    rival, *others = ledger.look_up_all(composites, identity.keys(SEARCH), identity.scoring)
    weights = _weights_by_corpus(identity)
    control = {key: weighted_sum([scores[key] for scores in others], weights_N.tolist()) for key in rival}
    return Race(control, weights, mean_nll(rival, weights), clear)


def _weights_by_corpus(identity: StudyIdentity) -> dict[str, float]:
    """The objective's weight of each corpus, of those that have any."""
    weights: dict[str, float] = {}
    for name, key in identity.corpora[SEARCH].items():
        weights[key] = weights.get(key, 0.0) + identity.weights[name]
    return {key: weight for key, weight in weights.items() if weight}


def trial_record(
    ledger: Ledger,
    identity: StudyIdentity,
    study: str,
    proposal: Proposal,
    answer: Evaluation | Failure,
    race: Race | None = None,
    gradient: bool = False,
) -> TrialRecord:
    """What came of a proposal.  The scores are the ledger's: those just measured and those that it had."""
    if isinstance(answer, Failure):
        return TrialRecord(
            study=study,
            number=proposal.number,
            coefficients=proposal.coefficients,
            objective=None,
            propose_seconds=proposal.seconds,
            reason=answer.reason,
            forwards=0.0,
        )
    composite = identity.composite(proposal.coefficients)
    seen = recall(ledger, identity, composite, SEARCH, whole=False)
    if race is not None:
        seen = _at_the_end(identity, race, seen)
        if any(len(score.nats_W) < identity.windows(SEARCH) for score in seen.values()):
            return _stopped(ledger, identity, study, proposal, answer, race, seen)
    measured = ledger.gradients(composite, identity.keys(SEARCH), identity.differentiation) if gradient else {}
    return TrialRecord(
        study=study,
        number=proposal.number,
        coefficients=proposal.coefficients,
        objective=objectives(ledger, identity)[SEARCH](seen),
        scores=seen,
        evaluation=answer,
        propose_seconds=proposal.seconds,
        violation=exceeded(ledger, identity, seen),
        forwards=GRADIENT_FORWARDS if gradient else 1.0 - proposal.charged,
        gradient=slope(ledger, identity, seen, measured) if gradient else {},
    )


def _at_the_end(identity: StudyIdentity, race: Race, seen: Mapping[str, Score]) -> dict[str, Score]:
    """Scores as they were at the look that ended the race."""
    by_key = {identity.corpora[SEARCH][name]: score for name, score in seen.items()}
    ended = replay(race, by_key, identity.sizes(SEARCH))
    assert ended is not None, "a race that was run is known to its end"
    return {name: ended[key] for name, key in identity.corpora[SEARCH].items()}


def _stopped(
    ledger: Ledger,
    identity: StudyIdentity,
    study: str,
    proposal: Proposal,
    answer: Evaluation,
    race: Race,
    seen: Mapping[str, Score],
) -> TrialRecord:
    """The record of a trial that lost its race: control-variate estimates in the place of means."""
    by_key = {key: seen[name] for name, key in identity.corpora[SEARCH].items()}
    estimate = race.estimate(by_key)
    base, over = base_scores(ledger, identity), 0.0
    for name, allowance in identity.protect.items():
        key = identity.corpora[SEARCH][name]
        over += max(0.0, race.nll(key, by_key[key]) - base[name].nll - allowance)
    return TrialRecord(
        study=study,
        number=proposal.number,
        coefficients=proposal.coefficients,
        objective=race.goal + estimate.difference,
        scores=seen,
        evaluation=answer,
        propose_seconds=proposal.seconds,
        violation=over,
        forwards=sum(len(score.nats_W) for score in by_key.values()) / (len(by_key) * identity.windows(SEARCH)),
        error=max(estimate.error, 1e-12),
    )


def slope(
    ledger: Ledger, identity: StudyIdentity, scores: Mapping[str, Score], gradients: Mapping[str, Gradient]
) -> dict[str, float]:
    """d penalized / d w_i in nats per token by distribution, from gradients by corpus.

    sum over corpora of  (share + PENALTY [what is protected is violated])  d NLL / d w_i .
    """
    shares = objectives(ledger, identity)[SEARCH].shares(scores)
    base = base_scores(ledger, identity) if identity.protect else {}
    for name, allowance in identity.protect.items():
        if scores[name].nll > base[name].nll + allowance:
            shares[name] = shares.get(name, 0.0) + PENALTY
    corpora = identity.corpora[SEARCH]
    return {
        expert: sum(share * gradients[corpora[name]][content] / scores[name].tokens for name, share in shares.items())
        for expert, content in identity.fine_tunes.items()
    }


def attributes(record: TrialRecord) -> dict[str, Any]:
    """What Optuna keeps of a trial beside its objective: perplexities for people, else for `recorded` and samplers."""
    costs = {name: getattr(record.evaluation, name) for name in MEASURED}
    costs |= {"forwards": record.forwards, "propose_seconds": record.propose_seconds}
    if record.reason:
        return costs | {"reason": record.reason}
    told: dict[str, Any] = {"perplexity": {name: score.perplexity for name, score in record.scores.items()}}
    if record.violation:
        told["violation"] = record.violation
    if record.gradient:
        told["gradient"] = dict(record.gradient)
    if record.is_partial:
        seen = {name: len(score.nats_W) for name, score in record.scores.items()}
        told |= {"partial": True, "objective": record.objective, "error": record.error, "windows": seen}
    return costs | told


def recorded(ledger: Ledger, identity: StudyIdentity, study: str, trial: Trial) -> TrialRecord:
    """The record of a finished trial, from Optuna and the ledger."""
    told = trial.attributes
    evaluation = Evaluation(scores={}, **{name: told[name] for name in MEASURED if name in told})
    proposal = Proposal(trial.number, trial.coefficients, told.get("propose_seconds", 0.0))
    if trial.objective is None:
        return trial_record(ledger, identity, study, proposal, Failure(told["reason"]))
    if not trial.error:
        record = trial_record(ledger, identity, study, proposal, evaluation, gradient=bool(trial.gradient))
        return replace(record, forwards=trial.forwards)
    seen = recall(ledger, identity, identity.composite(trial.coefficients), SEARCH, whole=False)
    return TrialRecord(
        study=study,
        number=trial.number,
        coefficients=trial.coefficients,
        objective=told["objective"],
        scores={name: first_windows(seen[name], windows) for name, windows in told["windows"].items()},
        evaluation=evaluation,
        propose_seconds=proposal.seconds,
        violation=told.get("violation", 0.0),
        forwards=trial.forwards,
        error=trial.error,
    )


def missing(ledger: Ledger, identity: StudyIdentity, search: Search) -> dict[int, Callable[[], TrialRecord]]:
    """What a tracker may lack of a search, by number: the trials that are told, but for those of other drivers."""
    others = search.of_others()
    told = [trial for trial in search.trials() if trial.state != "running" and trial.number not in others]
    return {trial.number: partial(recorded, ledger, identity, search.name, trial) for trial in told}


def finished(ledger: Ledger, identity: StudyIdentity, search: Search) -> list[TrialRecord]:
    """Records of the trials that are told, in the order of their numbers."""
    told = (trial for trial in search.trials() if trial.state != "running")
    return [recorded(ledger, identity, search.name, trial) for trial in told]
