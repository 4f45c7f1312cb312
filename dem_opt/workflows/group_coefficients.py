"""Search coefficients by group of parameters, after the search of global ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dem_opt.analysis.results import winner_of
from dem_opt.analysis.vector_geometry import squared_lengths
from dem_opt.dashboards.words import group_line
from dem_opt.errors import EvaluationError, InputError, nearest
from dem_opt.grouping import GroupedCoefficients
from dem_opt.planning.inputs import Inputs, check_headers
from dem_opt.search.group_log import log_trials, optuna_name
from dem_opt.search.group_model import Array, block_curvature, global_curvature
from dem_opt.search.group_search import FOLDS, WITH_GRADIENT, GroupSearch, Proposal
from dem_opt.search.group_trials import group_result, measured, search_documents, search_key, study_folds
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import BITS_METRIC, METRIC
from dem_opt.search.trials import is_known
from dem_opt.simplex import Coefficients
from dem_opt.storage.group_tables import GroupTrial
from dem_opt.storage.leases import Lease
from dem_opt.types import NATS_PER_TOKEN, SEARCH, UNITS, Folds, TrialRecord
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.summary import trials_by_run

PART = "groups"
"""The part of a study whose cost it is."""

AnyCoefficients = Mapping[str, float] | Mapping[str, Mapping[str, float]]
"""Coefficients by distribution, or by group and distribution."""

GLOBAL = "global"
"""Key of the coefficients of groups that are left out."""


def check_coefficients(
    context: StudyContext, coefficients: AnyCoefficients, field: str
) -> Coefficients | GroupedCoefficients:
    """Check the coefficients that a user wrote.

    Args:
        context: The study.
        coefficients: By distribution, those left out being 0; or by group, those left out having those of `global`.
        field: What messages call them.

    Raises:
        InputError: A name is unknown, a group has no coefficients, or they are no point of the study's space.
    """
    config, path = context.config, context.path
    rows = {name: row for name, row in coefficients.items() if isinstance(row, Mapping)}
    if not rows:
        return config.space.check({n: v for n, v in coefficients.items() if not isinstance(v, Mapping)}, path, field)
    if len(rows) < len(coefficients):
        name = next(name for name in coefficients if name not in rows)
        raise InputError(path, f"{field}.{name}", coefficients[name], "stands beside groups; write it under `global:`")
    groups = check_headers(config, path).groups(path)
    if groups is None:
        mend = "the study has no groups; write coefficients: {groups: layers} into the study file"
        raise InputError(path, field, next(iter(rows)), mend)
    names = groups.grouping.names
    for name in rows:
        if name not in (*names, GLOBAL):
            raise InputError(path, f"{field}.{name}", None, f"no such group; {nearest(name, names)}")
    missing = [name for name in names if name not in rows]
    if missing and GLOBAL not in rows:
        raise InputError(path, f"{field}.{missing[0]}", None, "has no coefficients; give them, or those of `global`")
    checked = {name: config.space.check(row, path, f"{field}.{name}") for name, row in rows.items()}
    return GroupedCoefficients.of(names, [checked[name if name in checked else GLOBAL] for name in names])


def refuse_groups(context: StudyContext, inputs: Inputs) -> None:
    """Raise InputError for a study with groups where memory does not allow gradients."""
    if inputs.groups is not None and not inputs.gradients_fit:
        mend = "the activations of a backward pass don't fit into memory; use a smaller evaluation.batch, or global"
        raise InputError(context.path, "coefficients.groups", None, mend)


def search_groups(context: StudyContext, driver: Driver, inputs: Inputs, generation: int, lease: Lease) -> None:
    """Search the coefficients of the study's groups, from the best global ones, to the end.

    The order of writing is the ledger, then the trial: an interrupted search goes on, and measures nothing again.
    """
    identity, ledger = driver.identity, driver.ledger
    if identity.groups is None:
        return
    with lease.turn("searching groups"):
        trials = trials_by_run(context, ledger, identity, generation)
        centre = winner_of(identity, trials)
        if centre is None or identity.space.is_point or group_result(ledger, identity, centre) is not None:
            return
        count, coefficients = len(identity.groups.grouping), len(identity.space.names)
        context.progress.note(
            f"{PART}: {count} groups x {coefficients} coefficients, at most {identity.groups.forwards:g} "
            "forward-equivalents"
        )
        documents = search_documents(ledger, identity)
        if documents is not None and count * coefficients > documents:
            context.progress.warning(
                f"coefficients.groups: {count * coefficients} coefficients by group are chosen on {documents} search "
                "documents; more text, or fewer groups, tells them apart better"
            )
        start_nn = _start(driver, inputs, [record for records in trials.values() for record in records])
        search = GroupSearch(space=identity.space, settings=identity.groups, centre=centre, start_nn=start_nn)
        _measure(context, driver, search)
        if result := group_result(ledger, identity, centre):
            context.progress.note(f"{PART}: {group_line(result, UNITS[identity.unit])}")


def _start(driver: Driver, inputs: Inputs, trials: Sequence[TrialRecord]) -> Array:
    """The curvature that the search begins with: that of the trials, divided by the vectors' squared lengths."""
    identity = driver.identity
    assert identity.groups is not None
    whole = [trial for trial in trials if trial.objective is not None and not trial.is_partial]
    shares_MF = np.array([identity.space.shares(trial.coefficients) for trial in whole])
    values_M = np.array([trial.objective for trial in whole], dtype=np.float64)
    lengths = squared_lengths(inputs.base, inputs.fine_tunes)
    parts_G = np.array([sum(lengths[name] for name in members) for _, members in identity.groups.grouping.groups])
    parts_G = parts_G if parts_G.sum() > 0 else np.ones(len(parts_G))
    return block_curvature(global_curvature(shares_MF, values_M), parts_G)


def _measure(context: StudyContext, driver: Driver, search: GroupSearch) -> None:
    """Measure trials until the search ends."""
    identity, ledger = driver.identity, driver.ledger
    key, folds = search_key(identity, search.centre), study_folds(ledger, identity)
    stored = ledger.group_trials(key)
    known = [measured(ledger, identity, folds, trial) for trial in stored]
    steps = context.progress.phase("searching coefficients by group", int(search.settings.forwards), "FE")
    with steps as phase:
        phase.advance(int(sum(trial.forwards for trial in known)))
        while proposals := search.next(known):
            for trial in _trials(driver, proposals, folds, len(known)):
                ledger.add_group_trial(key, trial)
                known.append(measured(ledger, identity, folds, trial))
                phase.advance(int(known[-1].forwards))
            metric = METRIC if identity.unit == NATS_PER_TOKEN else BITS_METRIC
            log_trials(context.config.storage, optuna_name(driver.study, key), identity.space, known, metric)


def _trials(
    driver: Driver, proposals: Sequence[Proposal], folds: Mapping[str, Folds], first: int
) -> Iterator[GroupTrial]:
    """Measure proposals, and yield their trials; those without gradients are measured together.

    Raises:
        EvaluationError: The gradient of the first, the global coefficients, can't be measured.
    """
    composites = [driver.identity.composite(proposal.coefficients) for proposal in proposals]
    plain = [composite for composite, proposal in zip(composites, proposals, strict=True) if proposal.kind in FOLDS]
    failed = bool(plain) and _fails(driver.measure, plain, [SEARCH], PART)
    for place, (proposal, composite) in enumerate(zip(proposals, composites, strict=True)):
        is_failed = failed and not is_known(driver.ledger, driver.identity, composite, SEARCH)
        if proposal.kind in WITH_GRADIENT and first == 0:
            driver.differentiate(composite, folds, PART)
        elif proposal.kind in WITH_GRADIENT:
            is_failed = _fails(driver.differentiate, composite, folds, PART)
        yield GroupTrial(
            number=first + place,
            kind=proposal.kind,
            shrink=proposal.shrink,
            coefficients=proposal.coefficients,
            composite=composite,
            failed=is_failed,
        )


def _fails(measure: Callable[..., None], *arguments: object) -> bool:
    """Measure; return whether a composite could not be scored."""
    try:
        measure(*arguments)
    except EvaluationError:
        return True
    return False
