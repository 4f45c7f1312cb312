"""The record of a trial, made from the ledger's scores, and what Optuna keeps of it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import fsum, inf

import numpy as np

from dem_opt.errors import EvaluationError
from dem_opt.evaluation.interim_analyses import analysis_count, first_windows, replay, scores_at
from dem_opt.evaluation.objective import Objective, mean_nll, violation
from dem_opt.evaluation.parts import part_count
from dem_opt.evaluation.racing import Race
from dem_opt.search.optuna_study import PendingTrial, Search, Trial
from dem_opt.search.probes import corrected, probe_forwards, probe_race, probed
from dem_opt.search.samplers.covariance import interpolate
from dem_opt.search.samplers.history import thin
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.read_ahead import ReadAhead
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
"""Whole trials that a race's control is made from at most."""

CONTROL_CANDIDATES = 8 * CONTROLS
"""Whole trials, the best and the latest, of which the nearest become controls."""

READ_AT_ONCE = 500
"""Trials whose scores are read by one query."""

LEAST_ERROR = 1e-12
"""Standard error of a stopped trial at least, in the objective's unit: above 0 says that it is an estimate."""


def recall(
    ledger: Ledger, identity: StudyIdentity, composite: Composite, split: str, whole: bool = True
) -> dict[str, Score]:
    """Scores of a composite by distribution: those that the ledger has of all windows, or of any."""
    known = ledger.look_up(composite, identity.keys(split), identity.scoring)
    enough = identity.windows(split) if whole else 1
    by_name = identity.corpora[split].items()
    return {name: known[key] for name, key in by_name if key in known and len(known[key].nats_W) >= enough}


def is_known(ledger: Ledger, identity: StudyIdentity, composite: Composite, split: str) -> bool:
    """True if the ledger has a composite's scores on all of a split."""
    return len(recall(ledger, identity, composite, split)) == len(identity.corpora[split])


def base_scores(ledger: Ledger, identity: StudyIdentity, split: str = SEARCH) -> dict[str, Score]:
    """The base's scores by distribution."""
    return recall(ledger, identity, Composite.single(identity.base), split)


def objectives(ledger: Ledger, identity: StudyIdentity) -> dict[str, Objective]:
    """The objective by split; for regrets only the splits on which the ledger has every fine-tune's scores."""
    by_split = {split: _objective_on(ledger, identity, split) for split in SPLITS}
    return {split: objective for split, objective in by_split.items() if objective is not None}


def _objective_on(ledger: Ledger, identity: StudyIdentity, split: str) -> Objective | None:
    """The objective on one split; None where it is a regret and a fine-tune's scores are missing."""
    if not identity.worst:
        return Objective(identity.weights, function=identity.function, unit=identity.unit)
    own = {
        name: recall(ledger, identity, Composite.single(content), split)
        for name, content in identity.fine_tunes.items()
        if name in identity.corpora[split]
    }
    if not all(name in scores for name, scores in own.items()):
        return None
    return Objective(identity.weights, {name: by_name[name] for name, by_name in own.items()}, unit=identity.unit)


def exceeded(ledger: Ledger, identity: StudyIdentity, scores: Mapping[str, Score]) -> float:
    """The violation of whole scores on the search split, in the objective's unit, against the base's in the ledger."""
    if not identity.protect:
        return 0.0
    return violation(scores, base_scores(ledger, identity), identity.protect, identity.unit)


def limits(ledger: Ledger, identity: StudyIdentity) -> dict[str, float]:
    """Greatest allowed loss of each protected corpus on the search split, where the base's is known."""
    base = base_scores(ledger, identity) if identity.protect else {}
    allowances = ((name, allowance) for name, allowance in identity.protect.items() if name in base)
    return {name: base[name].loss(identity.unit) + allowance for name, allowance in allowances}


def coefficients_of(identity: StudyIdentity, composite: Composite) -> Coefficients | None:
    """A composite as coefficients of the study; None where it is no point of the study's space."""
    names = {content: name for name, content in identity.fine_tunes.items()}
    if composite.parts:
        return None
    units = dict(composite.terms)
    units.pop(identity.base, None)
    if not units.keys() <= names.keys():
        return None
    by_name = {names[content]: count for content, count in units.items()}
    point = Coefficients(tuple((name, by_name.get(name, 0)) for name in identity.space.names))
    return point if identity.space.contains(point) else None


def race_for(
    ledger: Ledger,
    identity: StudyIdentity,
    point: Coefficients,
    whole: Sequence[Trial],
    clear: float = inf,
    any_goal: bool = False,
) -> Race | None:
    """The race of a trial against the best whole trial that violates nothing.

    The control is made from the CONTROLS trials nearest to the point, of the best and the latest: their nats, window
    by window, with the weights that interpolate a merge's loss (`interpolate`).

    Args:
        ledger: Nats of the whole trials.
        identity: The study.
        point: Coefficients of the trial.
        whole: Trials that were measured on all windows, in the order of their numbers.
        clear: Standard errors from the incumbent at which the trial is set aside.
        any_goal: The race only estimates: where all whole trials violate something, it is against one of them.

    Returns:
        None without an incumbent, and where the objective is the largest regret: a paired mean says nothing of it.
    """
    rivals = [trial for trial in whole if not trial.attributes.violation] or (whole if any_goal else [])
    incumbent = min(rivals, key=lambda trial: (trial.objective, trial.number), default=None)
    if incumbent is None or identity.worst or identity.function is not None:
        return None
    point_F, candidates = identity.space.shares(point), thin(whole, CONTROL_CANDIDATES)
    shares_NF = np.array([identity.space.shares(trial.coefficients) for trial in candidates])
    nearest = np.argsort(np.abs(shares_NF - point_F).sum(axis=1), kind="stable")[:CONTROLS]
    weights_N = interpolate(shares_NF[nearest], point_F)
    trials = [incumbent, *(candidates[i] for i in nearest)]
    composites = [identity.composite(trial.coefficients) for trial in trials]
    rival, *controls = ledger.look_up_all(composites, identity.keys(SEARCH), identity.scoring)
    weights = _weights_by_corpus(identity)
    control = {key: weighted_sum([scores[key] for scores in controls], weights_N.tolist()) for key in rival}
    return Race(control, weights, mean_nll(rival, weights, identity.unit), clear, identity.unit)


def _weights_by_corpus(identity: StudyIdentity) -> dict[str, float]:
    """The objective's weight of each corpus that has any; two distributions may share a corpus."""
    weights: dict[str, float] = {}
    for name, key in identity.corpora[SEARCH].items():
        weights[key] = weights.get(key, 0.0) + identity.weights[name]
    return {key: weight for key, weight in weights.items() if weight}


def trial_record(
    ledger: Ledger,
    identity: StudyIdentity,
    study: str,
    trial: PendingTrial,
    answer: Evaluation | Failure,
    race: Race | None = None,
    gradient: bool = False,
    parts: int = 0,
) -> TrialRecord:
    """The record of a trial that was evaluated; its scores are the ledger's, new and old.

    Args:
        ledger: Scores and gradients.
        identity: The study.
        study: Name of the Optuna study.
        trial: The trial.
        answer: The worker's answer; an Evaluation without scores where the ledger had them all.
        race: The race that it ran, if any.
        gradient: Whether its gradient was measured.
        parts: Parts of the windows, where gradients are measured by part.
    """
    if isinstance(answer, Failure):
        return TrialRecord(
            study=study,
            number=trial.number,
            coefficients=trial.coefficients,
            objective=None,
            propose_seconds=trial.propose_seconds,
            reason=answer.reason,
            forwards=0.0,
            unit=identity.unit,
        )
    if trial.part is not None:
        assert race is not None, "a probe comes after the anchor"
        return _probe_record(ledger, identity, study, trial, answer, race, parts)
    composite = identity.composite(trial.coefficients)
    scores = recall(ledger, identity, composite, SEARCH, whole=False)
    if race is not None:
        scores = _at_the_end(identity, race, scores)
        if any(len(score.nats_W) < identity.windows(SEARCH) for score in scores.values()):
            return _stopped_record(ledger, identity, study, trial, answer, race, scores)
    measured = ledger.gradients(composite, identity.keys(SEARCH), identity.differentiation) if gradient else {}
    try:
        goal = _objective_on(ledger, identity, SEARCH)
        assert goal is not None, "regrets are measured after the fine-tunes"
        objective = goal(scores)
    except EvaluationError as error:  # a custom objective that is not finite
        return trial_record(ledger, identity, study, trial, Failure(str(error)))
    return TrialRecord(
        study=study,
        number=trial.number,
        coefficients=trial.coefficients,
        objective=objective,
        scores=scores,
        evaluation=answer,
        propose_seconds=trial.propose_seconds,
        violation=exceeded(ledger, identity, scores),
        forwards=(GRADIENT_FORWARDS if gradient else 1.0) - trial.spared,
        gradient=slope(ledger, identity, scores, measured) if gradient else {},
        unit=identity.unit,
        losses={axis.name: mean_nll(scores, axis.weights, identity.unit) for axis in identity.pareto or ()},
    )


def _at_the_end(identity: StudyIdentity, race: Race, scores: Mapping[str, Score]) -> dict[str, Score]:
    """Scores as they were at the interim analysis that ended the race.

    The ledger may have more windows, of another study: a trial is judged by what its own race saw.
    """
    by_key = {identity.corpora[SEARCH][name]: score for name, score in scores.items()}
    ended = replay(race, by_key, identity.sizes(SEARCH))
    assert ended is not None, "a race that was run is known to its end"
    return {name: ended[key] for name, key in identity.corpora[SEARCH].items()}


def _stopped_record(
    ledger: Ledger,
    identity: StudyIdentity,
    study: str,
    trial: PendingTrial,
    answer: Evaluation,
    race: Race,
    scores: Mapping[str, Score],
) -> TrialRecord:
    """The record of a trial that lost its race: control-variate estimates in the place of means."""
    by_key = {key: scores[name] for name, key in identity.corpora[SEARCH].items()}
    estimate = race.estimate(by_key)
    return TrialRecord(
        study=study,
        number=trial.number,
        coefficients=trial.coefficients,
        objective=race.goal + estimate.difference,
        scores=scores,
        evaluation=answer,
        propose_seconds=trial.propose_seconds,
        violation=sum(_estimated_excess(ledger, identity, race, by_key).values()),
        forwards=sum(len(score.nats_W) for score in by_key.values()) / (len(by_key) * identity.windows(SEARCH)),
        error=max(estimate.error, LEAST_ERROR),
        unit=identity.unit,
        estimates=_estimates(identity, race, by_key),
    )


def _estimated_excess(
    ledger: Ledger, identity: StudyIdentity, race: Race, scores: Mapping[str, Score]
) -> dict[str, float]:
    """By how much protected corpora exceed their allowance, as far as some windows tell, in the objective's unit."""
    corpora = identity.corpora[SEARCH]
    return {
        name: max(0.0, race.loss(corpora[name], scores[corpora[name]]) - limit)
        for name, limit in limits(ledger, identity).items()
    }


def _probe_record(
    ledger: Ledger,
    identity: StudyIdentity,
    study: str,
    trial: PendingTrial,
    answer: Evaluation,
    race: Race,
    parts: int,
) -> TrialRecord:
    """The record of a probe: estimates of the objective and of its gradient from one part of the windows."""
    assert trial.part is not None
    measured = probed(ledger, identity, identity.composite(trial.coefficients), trial.part, parts)
    own, by_key = probe_race(race, identity, trial.part, parts), {key: each.score for key, each in measured.items()}
    scores = {name: by_key[key] for name, key in identity.corpora[SEARCH].items()}
    record = _stopped_record(ledger, identity, study, trial, answer, own, scores)
    assert record.objective is not None
    beyond = {name for name, amount in _estimated_excess(ledger, identity, own, by_key).items() if amount}
    gradients = corrected(ledger, identity, measured, trial.part, parts)
    return replace(
        record,
        forwards=probe_forwards(identity, trial.part, parts),
        gradient=_estimated_slope(identity, gradients, beyond),
        estimates={max(len(score.nats_W) for score in by_key.values()): record.objective},
        part=trial.part,
    )


def _estimates(identity: StudyIdentity, race: Race, scores: Mapping[str, Score]) -> dict[int, float]:
    """The estimated objective at each interim analysis that the scores reach, by the most windows of a corpus."""
    sizes = identity.sizes(SEARCH)
    analyses = (scores_at(scores, sizes, analysis) for analysis in range(1, analysis_count(sizes) + 1))
    return {
        max(len(score.nats_W) for score in seen.values()): race.goal + race.estimate(seen).difference
        for seen in analyses
        if seen is not None
    }


def slope(
    ledger: Ledger, identity: StudyIdentity, scores: Mapping[str, Score], gradients: Mapping[str, Gradient]
) -> dict[str, float]:
    """d penalized / d w_i in the objective's unit by distribution, from whole scores and the gradients of nats.

    sum over corpora of  (share + PENALTY [a protected corpus beyond its allowance])  d loss / d w_i .
    """
    unit = identity.unit
    beyond = {name for name, limit in limits(ledger, identity).items() if scores[name].loss(unit) > limit}
    weights = _with_penalties(objectives(ledger, identity)[SEARCH].shares(scores), beyond)
    corpora = identity.corpora[SEARCH]
    return {
        fine_tune: sum(
            weight * gradients[corpora[name]][content] / fsum(scores[name].sizes_W(unit))
            for name, weight in weights.items()
        )
        for fine_tune, content in identity.fine_tunes.items()
    }


def _estimated_slope(
    identity: StudyIdentity, gradients: Mapping[str, Gradient], beyond: Collection[str]
) -> dict[str, float]:
    """The same from estimated gradients of losses by corpus key; `beyond` names protected corpora beyond allowance."""
    weights = _with_penalties(Objective(identity.weights, unit=identity.unit).shares({}), beyond)
    corpora = identity.corpora[SEARCH]
    return {
        fine_tune: sum(weight * gradients[corpora[name]][content] for name, weight in weights.items())
        for fine_tune, content in identity.fine_tunes.items()
    }


def _with_penalties(shares: Mapping[str, float], beyond: Collection[str]) -> dict[str, float]:
    """The objective's weights of distributions, and PENALTY more for those beyond their allowance."""
    return dict(shares) | {name: shares.get(name, 0.0) + PENALTY for name in beyond}


def attributes(record: TrialRecord) -> TrialAttributes:
    """The measurements that Optuna keeps of a trial."""
    evaluation = record.evaluation
    costs = TrialAttributes(
        forward_tokens=evaluation.forward_tokens,
        scored_tokens=evaluation.scored_tokens,
        merge_seconds=evaluation.merge_seconds,
        score_seconds=evaluation.score_seconds,
        wait_seconds=evaluation.wait_seconds,
        batch_tokens=evaluation.batch_tokens,
        forwards=record.forwards,
        propose_seconds=record.propose_seconds,
    )
    if record.reason:
        return replace(costs, reason=record.reason)
    measured = replace(
        costs,
        nll={name: score.nll for name, score in record.scores.items()},
        bpb={name: bits for name, score in record.scores.items() if (bits := score.bits_per_byte) is not None},
        violation=record.violation,
        gradient=record.gradient,
    )
    if not record.is_partial and not record.violation:
        return measured
    measured = replace(measured, objective=record.objective, penalized=record.penalized)
    if not record.is_partial:
        return measured
    windows = {name: len(score.nats_W) for name, score in record.scores.items()}
    return replace(measured, error=record.error, windows=windows)


def recorded(ledger: Ledger, identity: StudyIdentity, study: str, trial: Trial) -> TrialRecord:
    """The record of a finished trial, from Optuna and the ledger."""
    stored = trial.attributes
    evaluation = _evaluation(stored)
    pending = PendingTrial(number=trial.number, coefficients=trial.coefficients, propose_seconds=stored.propose_seconds)
    if trial.objective is None:
        return trial_record(ledger, identity, study, pending, Failure(stored.reason))
    if trial.part is None and not trial.error:
        record = trial_record(ledger, identity, study, pending, evaluation, gradient=bool(trial.gradient))
        return replace(record, forwards=trial.forwards)
    composite = identity.composite(trial.coefficients)
    if trial.part is not None:
        probe = probed(ledger, identity, composite, trial.part, part_count(identity.windows(SEARCH)))
        scores = {name: probe[key].score for name, key in identity.corpora[SEARCH].items()}
    else:
        known = recall(ledger, identity, composite, SEARCH, whole=False)
        scores = {name: first_windows(known[name], windows) for name, windows in stored.windows.items()}
    return TrialRecord(
        study=study,
        number=trial.number,
        coefficients=trial.coefficients,
        objective=stored.objective,
        scores=scores,
        evaluation=evaluation,
        propose_seconds=stored.propose_seconds,
        violation=stored.violation,
        forwards=trial.forwards,
        error=trial.error,
        unit=identity.unit,
        estimates=trial.estimates,
        gradient=stored.gradient,
        part=trial.part,
    )


def missing(ledger: Ledger, identity: StudyIdentity, search: Search) -> dict[int, Callable[[], TrialRecord]]:
    """Records that a tracker may lack, made on demand, by number: finished trials without those of other drivers."""
    others = search.of_others()
    trials = [trial for trial in search.trials() if trial.state != "running" and trial.number not in others]
    return {trial.number: partial(recorded, ledger, identity, search.name, trial) for trial in trials}


def finished(ledger: Ledger, identity: StudyIdentity, search: Search) -> list[TrialRecord]:
    """Records of a search's finished trials, in the order of their numbers."""
    trials = [trial for trial in search.trials() if trial.state != "running"]
    references = [Composite.single(content) for content in (identity.base, *identity.fine_tunes.values())]
    records = list[TrialRecord]()
    for first in range(0, len(trials), READ_AT_ONCE):
        some = trials[first : first + READ_AT_ONCE]
        composites = [*references, *(identity.composite(trial.coefficients) for trial in some)]
        known = ReadAhead(ledger, composites, identity.keys(SEARCH), identity.scoring)
        records += [recorded(known, identity, search.name, trial) for trial in some]
    return records


def outlined(search: Search, unit: str) -> list[TrialRecord]:
    """The same without scores: what Optuna has of coefficients, objective, violation and costs."""
    return [_outline(search.name, trial, unit) for trial in search.trials() if trial.state != "running"]


def _outline(study: str, trial: Trial, unit: str) -> TrialRecord:
    stored = trial.attributes
    return TrialRecord(
        study=study,
        number=trial.number,
        coefficients=trial.coefficients,
        objective=trial.objective if stored.objective is None else stored.objective,
        evaluation=_evaluation(stored),
        propose_seconds=stored.propose_seconds,
        reason=stored.reason,
        violation=stored.violation,
        forwards=trial.forwards,
        error=trial.error,
        unit=unit,
        part=trial.part,
    )


def _evaluation(stored: TrialAttributes) -> Evaluation:
    """The costs of an evaluation, as Optuna has them."""
    return Evaluation(
        scores={},
        forward_tokens=stored.forward_tokens,
        scored_tokens=stored.scored_tokens,
        merge_seconds=stored.merge_seconds,
        score_seconds=stored.score_seconds,
        wait_seconds=stored.wait_seconds,
        batch_tokens=stored.batch_tokens,
    )
