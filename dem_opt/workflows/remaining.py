"""The work that is left of a study which was begun: trials, and composites of the results table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dem_opt.analysis.precision import study_precision
from dem_opt.analysis.results import Entry, entries, final_entries, groups_of
from dem_opt.checkpoints.files import known_content
from dem_opt.config import StudyConfig
from dem_opt.planning.inputs import CheckedHeaders
from dem_opt.planning.plan import Plan, Work, group_forwards, left_out_count
from dem_opt.search.runs import Runs
from dem_opt.search.trials import finished, is_known
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import HELD_OUT, SEARCH, Precision, TrialRecord
from dem_opt.workflows.stored_study import stored_study


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """Work that a run would still do.

    Attributes:
        trials: Trials of the search that are left, at most.
        done: Trials that have ended.
        planned: Trials that it has in all, at most.
        work: Merges and forward passes, at most.
        precision: How well the windows determine the coefficients; None where too few trials tell.
    """

    trials: int
    done: int
    planned: int
    work: Work
    precision: Precision | None


def remaining_work(config: StudyConfig, files: CheckedHeaders, plan: Plan) -> Remaining | None:
    """Count what is left of a study; None where it was not begun, or asks for something else than was run.

    Contents are compared as far as their hashes are known; texts are not read.
    """
    with stored_study(config) as stored:
        if stored is None or not _is_same(config, files, stored.identity):
            return None
        ledger, identity = stored.ledger, replace(stored.identity, groups=files.groups(None))
        algorithm = config.search.algorithm
        planned = config.planned_trials(algorithm)
        with Runs(config, stored.generation).existing() as searches:
            left = searches[algorithm].unfinished if algorithm in searches else planned
            trials = {run: finished(ledger, identity, search) for run, search in searches.items()}
        work = _work_left(config, ledger, identity, trials, left, plan.work)
        precision = study_precision(ledger, identity, trials)
        done = len(trials.get(algorithm, ()))
        return Remaining(trials=left, done=done, planned=planned, work=work, precision=precision)


def _is_same(config: StudyConfig, files: CheckedHeaders, identity: StudyIdentity) -> bool:
    """True if a study asks for what was run, as far as can be seen without reading weights and texts."""
    objective, evaluation = config.objective, config.evaluation
    function = identity.function.name if identity.function else None
    contents = {name: known_content(header) for name, header in files.headers.items()}
    stored = {"base": identity.base} | {
        name: content
        for name, content in identity.fine_tunes.items()
        if name in config.fine_tunes and config.fine_tunes[name].kind == "checkpoint"
    }
    return (
        config.space == identity.space
        and config.weights == identity.weights
        and (objective.protect, objective.worst, objective.function) == (identity.protect, identity.worst, function)
        and objective.unit == identity.unit
        and config.axes == identity.pareto
        and (config.base.rounding if files.rounds else "nearest") == identity.rounding
        and all(
            identity.settings.get(f"evaluation.{field}", str(getattr(evaluation, field)))
            == str(getattr(evaluation, field))
            for field in ("window", "windows", "held_out", "vectors", "seed")
        )
        and all(contents.get(name) in (None, content) for name, content in stored.items())
    )


def _work_left(
    config: StudyConfig,
    ledger: Ledger,
    identity: StudyIdentity,
    trials: Mapping[str, Sequence[TrialRecord]],
    left: int,
    whole: Work,
) -> Work:
    """The trials that are left, and the composites of the final table without scores; with a new winner, its own."""
    if left:
        known = [entry for entry in entries(identity, trials) if entry.role != "best"]
        # Besides the baselines: the winner and the next best, which the search scores, and leave-one-out.
        search, held_out = left + left_out_count(config) + group_forwards(config), whole.reported - len(known)
    else:
        groups = groups_of(ledger, identity, trials)
        known = final_entries(identity, trials, config.report, groups)
        search, held_out = (group_forwards(config), 1) if groups is None and identity.groups is not None else (0, 0)
    search += _unknown(ledger, identity, known, SEARCH)
    held_out += _unknown(ledger, identity, known, HELD_OUT)
    return replace(whole, trials=left, composites=search, reported=held_out)


def _unknown(ledger: Ledger, identity: StudyIdentity, listed: Sequence[Entry], split: str) -> int:
    """Number of composites that the ledger has not scored on a split."""
    composites = dict.fromkeys(entry.composite for entry in listed)
    return sum(not is_known(ledger, identity, composite, split) for composite in composites)
