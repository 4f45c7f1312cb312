"""Trials of a search of coefficients by group as an Optuna study, for Optuna Dashboard; nothing is read from it."""

import warnings
from collections.abc import Sequence
from math import inf

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState, create_trial

from dem_opt.grouping import GroupedCoefficients
from dem_opt.search.group_search import CHOSEN, Measured
from dem_opt.search.optuna_storage import opened_storage
from dem_opt.search.optuna_study import METRIC
from dem_opt.simplex import Space

MOST_PARAMETERS = 64
"""Coefficients that are parameters in Optuna, `math/layers.3.mlp`; more are one attribute of the trial."""

_PREFIX = "groups-"


def optuna_name(study: str, key: str) -> str:
    """Name of the Optuna study of a search by its key."""
    return f"{study}/{_PREFIX}{key[:8]}"


def is_group_search(name: str, study: str) -> bool:
    """True if an Optuna study is a search of coefficients by group of this study."""
    return name.startswith(f"{study}/{_PREFIX}")


def log_trials(url: str, name: str, space: Space, trials: Sequence[Measured], metric: str = METRIC) -> None:
    """Add the trials that the Optuna study lacks; it is created where it is missing."""
    with opened_storage(url) as storage, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        study.set_metric_names([metric])
        present = len(study.get_trials(deepcopy=False))
        shown = [trial for trial in trials if trial.kind != CHOSEN]
        for trial in shown[present:]:
            study.add_trial(_frozen(space, trial))


def _frozen(space: Space, trial: Measured) -> FrozenTrial:
    """A trial as Optuna keeps it: one without a gradient is complete too, and one that failed has no value."""
    flat = parameters(trial.coefficients)
    has_parameters = len(flat) <= MOST_PARAMETERS
    attributes = {"kind": trial.kind, "shrink": trial.shrink, "fe": trial.forwards}
    attributes |= {f"objective.fold {fold}": value for fold, value in enumerate(trial.fold_values)}
    distributions: dict[str, BaseDistribution] = {key: FloatDistribution(0.0, space.total) for key in flat}
    return create_trial(
        state=TrialState.FAIL if trial.value == inf else TrialState.COMPLETE,
        value=None if trial.value == inf else trial.value,
        params=flat if has_parameters else {},
        distributions=distributions if has_parameters else {},
        user_attrs=attributes if has_parameters else attributes | {"coefficients": trial.coefficients.weights},
    )


def parameters(coefficients: GroupedCoefficients) -> dict[str, float]:
    """Coefficients by DISTRIBUTION/GROUP."""
    return {f"{name}/{group}": weight for group, row in coefficients.rows for name, weight in row.items()}
