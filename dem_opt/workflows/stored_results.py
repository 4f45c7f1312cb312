"""The results of a study as its database holds them: no checkpoint is read, and no torch imported."""

from dataclasses import replace
from pathlib import Path

from dem_opt.analysis.precision import study_precision
from dem_opt.analysis.results import summarize
from dem_opt.analysis.rivals import recall_rivals
from dem_opt.analysis.stored_vectors import study_vectors
from dem_opt.config import StudyConfig
from dem_opt.config.objective_function import import_from
from dem_opt.errors import InputError
from dem_opt.search.runs import Runs
from dem_opt.search.trials import finished
from dem_opt.storage.identity import refuse_other_space
from dem_opt.types import Summary
from dem_opt.workflows.stored_study import stored_study


def stored_results(config: StudyConfig, path: Path) -> Summary:
    """Summarize a study, without surrogate and the facts that reproduce it.

    Raises:
        InputError: The study has no finished trial, or its distributions or bounds have changed since.
    """
    not_run = InputError(path, None, None, f"nothing is measured yet; first: dem-opt run {path}")
    if config.objective.function is not None:
        import_from(path.resolve().parent)
    with stored_study(config) as stored:
        if stored is None:
            raise not_run
        ledger, identity = stored.ledger, stored.identity
        refuse_other_space(path, identity, config.space)
        with Runs(config, stored.generation).existing() as searches:
            trials = {run: finished(ledger, identity, search) for run, search in searches.items()}
            stopped = {run: search.stopped for run, search in searches.items()}
        summary = summarize(config.name, ledger, identity, trials, {"study file": str(path)}, stopped)
        precision, rivals = (
            study_precision(ledger, identity, trials),
            recall_rivals(config, ledger, identity, summary.global_winner),
        )
        vectors = study_vectors(identity, config.output)
        summary = replace(summary, precision=precision, rivals=rivals, vectors=vectors)
    if summary.winner.role != "best":
        raise not_run
    return summary
