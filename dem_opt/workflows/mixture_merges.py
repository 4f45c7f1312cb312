"""The merges that stand for mixtures of a budget: the study's own trials, or a search of them with another sum.

A mixture of T tokens has s_i T of distribution i, and a fine-tune on it has seen T_1.  If every token moved the model
equally far, the mixture's model would be the merge with  w_i = s_i T / T_1 , whose coefficients sum to  t = T / T_1 .
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dem_opt.analysis.precision import study_precision
from dem_opt.config import StudyConfig
from dem_opt.config.sections import SimplexSection
from dem_opt.search.trials import limits
from dem_opt.simplex import TOLERANCE, Space
from dem_opt.storage.engine import is_there
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import opened
from dem_opt.tracking import NullTracker
from dem_opt.types import Precision, TrialRecord
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.mixture_file import FOLDER
from dem_opt.workflows.optimize import search_only
from dem_opt.workflows.summary import trials_by_run


@dataclass(frozen=True, kw_only=True)
class Merges:
    """Trials of merges with a sum of coefficients.

    Attributes:
        space: Their coefficient space.
        total: The sum that stands for the budget.
        trials: The trials.
        precision: How well their best is known.
        allowed: Greatest allowed loss of each protected corpus on the search split, in the objective's unit.
    """

    space: Space
    total: float
    trials: tuple[TrialRecord, ...]
    precision: Precision | None
    allowed: Mapping[str, float]


def find_merges(context: StudyContext, identity: StudyIdentity, total: float) -> Merges | None:
    """The merges with a sum, as far as they have been searched: in the study itself, or for an earlier proposal.

    Args:
        context: The study.
        identity: Its identity when it was run.
        total: The sum of the coefficients.
    """
    if has_sum(identity.space, total):
        return _read(context, identity, total, is_own=True)
    searched = with_sum(context, total)
    return _read(searched, replace(identity, space=searched.config.space), total, is_own=False)


def measure_merges(context: StudyContext, identity: StudyIdentity, total: float) -> Merges:
    """The merges with a sum; they are searched unless that is done, with the study's algorithm and budget."""
    merges = find_merges(context, identity, total)
    if merges is None:
        context.progress.note(f"searching merges with a sum of {total:g}, which stand for this many tokens")
        search_only(with_sum(context, total))
        merges = find_merges(context, identity, total)
    assert merges is not None, "searched just now"
    return merges


def has_sum(space: Space, total: float) -> bool:
    """True if coefficients of a space may have this sum."""
    least = space.total if space.least is None else space.least
    return least - TOLERANCE <= total <= space.total + TOLERANCE


def with_sum(context: StudyContext, total: float) -> StudyContext:
    """The study with another sum of coefficients; its bounds are scaled along, so that they bound the same shares.

    A name of a study file has no "+", so none of them is this one's.
    """
    config = context.config
    factor = total / config.simplex.sums[1]
    bounds = {name: (low * factor, high * factor) for name, (low, high) in config.simplex.boxes.items()}
    changed = config.model_copy(
        update={
            "name": f"{config.name}+sum-{total:g}",
            "simplex": SimplexSection(total=total, bounds=bounds),
            "output": config.output / FOLDER,
        }
    )
    return replace(context, config=changed, tracker=NullTracker())


def _read(context: StudyContext, identity: StudyIdentity, total: float, *, is_own: bool) -> Merges | None:
    """The finished trials of a study that is as it was run; None where there is no such study, or it was not ended."""
    config: StudyConfig = context.config
    if not is_there(config.storage):
        return None
    with opened(config.storage) as engine:
        ledger = Ledger(engine)
        row = ledger.study(config.name)
        if (
            row is None
            or StudyIdentity.recall(row.identity, row.scoring).identity_fields() != identity.identity_fields()
        ):
            return None
        with context.runs(row.generation).existing() as searches:
            if not is_own and not all(search.stopped for search in searches.values()):
                return None
        trials: Mapping[str, tuple[TrialRecord, ...]] = trials_by_run(context, ledger, identity, row.generation)
        return Merges(
            space=identity.space,
            total=total,
            trials=tuple(trial for records in trials.values() for trial in records),
            precision=study_precision(ledger, identity, trials),
            allowed=limits(ledger, identity),
        )
