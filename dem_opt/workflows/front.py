"""The front between two losses of a study, as its database holds it: no checkpoint is read, and no torch imported."""

from collections.abc import Sequence
from pathlib import Path

from dem_opt.analysis.pareto import checked_axes, front_between
from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.pareto import Front
from dem_opt.storage.identity import refuse_other_space
from dem_opt.workflows.stored_study import stored_study

FIELD = "--between"
"""The option that names the two losses."""


def read_front(config: StudyConfig, path: Path, names: Sequence[str] | None = None) -> Front:
    """Find the front between two losses over everything that is scored.

    Args:
        config: The study.
        path: The study file, which messages name.
        names: Two distributions or general corpora, or one of them and "mean"; unless given, those of
            `objective.pareto`.

    Raises:
        InputError: A name is unknown or given twice; nothing is scored on both, or the study has not been run.
    """
    not_run = InputError(path, None, None, f"nothing is measured yet; first: dem-opt run {path}")
    with stored_study(config) as stored:
        if stored is None:
            raise not_run
        identity = stored.identity
        refuse_other_space(path, identity, config.space)
        if names is None and identity.pareto is None:
            mend = "the study does not search for a front: name two losses, such as code and math, or code and mean"
            raise InputError(None, FIELD, None, mend)
        axes = identity.pareto if names is None else checked_axes(identity, names, None, FIELD)
        assert axes is not None
        front = front_between(stored.ledger, identity, axes)
    if front is None:
        raise InputError(path, FIELD, names and " ".join(names), "no composite is scored on both yet")
    return front
