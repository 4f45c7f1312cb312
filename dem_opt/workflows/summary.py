"""The results of a study, from its database alone: nothing is scored."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from dem_opt.analysis import surrogate
from dem_opt.analysis.precision import study_precision
from dem_opt.analysis.results import summarize
from dem_opt.analysis.reweighting import checked, reweighted
from dem_opt.analysis.rivals import recall_rivals
from dem_opt.analysis.stored_vectors import study_vectors
from dem_opt.analysis.surrogate import Prediction
from dem_opt.errors import InputError
from dem_opt.search.trials import finished, limits, missing, outlined
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity, refuse_other_space
from dem_opt.storage.ledger import Ledger
from dem_opt.types import Summary, TrialRecord
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.provenance import facts, study_descriptions
from dem_opt.workflows.stored_study import StoredStudy


def read_summary(context: StudyContext) -> Summary:
    """Summarize what the study has measured so far.

    Raises:
        InputError: The study has not been run, or its distributions or bounds have changed since.
    """
    with context.stored() as stored:
        return summarize_stored(context, stored)


def summarize_stored(context: StudyContext, stored: StoredStudy) -> Summary:
    """Summarize a study; InputError where it has no finished trial, or its distributions or bounds have changed."""
    refuse_other_space(context.path, stored.identity, context.config.space)
    summary = summarize_generation(context, stored.ledger, stored.identity, stored.generation)
    if summary.winner.role != "best":
        raise context.not_run()
    return summary


def summarize_generation(context: StudyContext, ledger: Ledger, identity: StudyIdentity, generation: int) -> Summary:
    """Summarize one generation of a study, with the geometry of its vectors and its surrogate."""
    with context.runs(generation).existing() as searches:
        trials = {run: finished(ledger, identity, search) for run, search in searches.items()}
        stopped = {run: search.stopped for run, search in searches.items()}
    settings = facts(context.config, context.path, identity)
    summary = summarize(context.config.name, ledger, identity, trials, settings, stopped)
    records = [record for records in trials.values() for record in records]
    return replace(
        summary,
        vectors=study_vectors(identity, context.config.output),
        surrogate=surrogate.surrogate_of(identity.space, records, limits(ledger, identity)),
        precision=study_precision(ledger, identity, trials),
        rivals=recall_rivals(context.config, ledger, identity, summary.global_winner),
    )


def trials_by_run(
    context: StudyContext, ledger: Ledger, identity: StudyIdentity, generation: int
) -> dict[str, tuple[TrialRecord, ...]]:
    """Return the finished trials of a generation by run."""
    with context.runs(generation).existing() as searches:
        return {run: tuple(finished(ledger, identity, search)) for run, search in searches.items()}


def outlines_by_run(context: StudyContext, generation: int) -> dict[str, list[TrialRecord]]:
    """Return the same without scores, which thousands of trials take long to read."""
    with context.runs(generation).existing() as searches:
        return {run: outlined(search, context.config.objective.unit) for run, search in searches.items()}


def reweigh(context: StudyContext, weights: Mapping[str, float], field: str) -> Summary:
    """Summarize what the study would have found with other weights of its objective.

    Args:
        context: The study.
        weights: Weights by distribution or general corpus; names left out weigh 0.
        field: What messages call the weights.

    Raises:
        InputError: The study has not been run, or a weight is invalid.
    """
    with context.stored() as stored:
        refuse_other_space(context.path, stored.identity, context.config.space)
        if stored.identity.function is not None:
            mend = "the study minimizes a function of its own (objective.function), which weighs scores itself"
            raise InputError(context.path, field, dict(weights), mend)
        new = checked(stored.identity, weights, context.path, field)
        identity = replace(stored.identity, weights=new, pareto=None)  # of a front, a point with other weights
        settings = facts(context.config, context.path, identity)
        summary = reweighted(context.config.name, stored.ledger, identity, settings)
    if summary is None:
        raise context.not_run()
    return summary


def predict(context: StudyContext, coefficients: Coefficients) -> Prediction:
    """Predict the objective of a composite from the trials of all runs.

    Raises:
        InputError: The study has not been run, or has too few trials.
    """
    with context.stored() as stored:
        refuse_other_space(context.path, stored.identity, context.config.space)
        trials = trials_by_run(context, stored.ledger, stored.identity, stored.generation)
        allowed = limits(stored.ledger, stored.identity)
    records = [trial for records in trials.values() for trial in records]
    prediction = surrogate.predict(stored.identity.space, records, coefficients, allowed)
    if prediction is None:
        mend = (
            f"a prediction needs {surrogate.FEWEST} composites that were scored, and a space with more than one point"
        )
        raise InputError(context.path, None, None, mend)
    return prediction


def log_summary(context: StudyContext, summary: Summary, note: str, files: Mapping[str, str | bytes]) -> bool:
    """Log a summary with its baselines, a description in Markdown, and files, in the runs of its searches.

    Returns:
        Whether the tracker has them, and all trials of these searches, now.
    """
    is_complete = True
    with context.stored() as stored:
        runs, lease = context.runs(stored.generation), context.visit(stored.ledger)
        with lease.turn("describing"):
            for run, description in study_descriptions(summary, note, files).items():
                with closing(runs.open(run)) as search:
                    tracker = context.track(search, lease)
                    tracker.reconcile(missing(stored.ledger, stored.identity, search))
                    tracker.describe(description)
                    is_complete &= tracker.close()
    return is_complete
