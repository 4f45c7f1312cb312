"""Optuna studies in the database: opening and making them, and reading their trials."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from dem_opt.errors import InputError
from dem_opt.search.beginning import Beginning, Known
from dem_opt.search.outcomes import frozen_trial
from dem_opt.search.samplers.earlier import Earlier
from dem_opt.search.samplers.history import History, Trial, parse_trial
from dem_opt.simplex import Space
from dem_opt.storage import engine
from dem_opt.storage.optuna_tables import read_study_attributes, read_trials
from dem_opt.storage.retry import BRIEF, RetryPolicy

START = "start"
"""User attribute of a study: the points to propose first, as units by name."""

EARLIER = "dem_opt:earlier"
"""System attribute of a study: composites that were scored before it was begun.  Dashboards show none of these."""

KNOWN = "dem_opt:known"
"""System attribute of a study: [scores, gradients] of each starting point (see `Known`)."""

UID = "uid"
"""User attribute of a study: its identity in MLflow."""


class StoredTrials:
    """The trials of an Optuna study; each finished one is read and parsed once."""

    def __init__(self, storage: RDBStorage, study: int, space: Space) -> None:
        self._engine, self._study, self._space = storage.engine, study, space
        self._trials: dict[int, Trial | None] = {}
        self._last, self._unfinished, self._incomplete = 0, set[int](), set[int]()

    def read(self) -> History:
        """The trials as they are now."""
        for stored in read_trials(self._engine, self._study, self._last, self._unfinished):
            frozen = frozen_trial(stored)
            trial = self._trials[stored.number] = parse_trial(frozen, self._space)
            self._last = max(self._last, stored.id)
            _keep(self._unfinished, stored.id, not frozen.state.is_finished())
            _keep(self._incomplete, stored.number, trial is None and frozen.state == TrialState.RUNNING)
        trials = map(self._trials.__getitem__, sorted(self._trials))
        return History([trial for trial in trials if trial is not None], sorted(self._incomplete))


def _keep(some: set[int], element: int, is_in: bool) -> None:
    (some.add if is_in else some.discard)(element)


def read_beginning(storage: RDBStorage, study: int, space: Space) -> Beginning:
    """Read the beginning of a study; one of an earlier release may have starting points alone."""
    hidden = read_study_attributes(storage.engine, study, (EARLIER, KNOWN))
    listed = storage.get_study_user_attrs(study).get(START, [])
    start = [space.from_units([units[name] for name in space.names]) for units in listed]
    known = dict(zip(start, (Known(*shares) for shares in hidden.get(KNOWN, [])), strict=False))
    return Beginning(start, known, Earlier.from_stored(hidden.get(EARLIER, {})))


def introduce(study: optuna.Study, storage: RDBStorage, beginning: Beginning, metrics: list[str]) -> str:
    """Write what a new study lacks and return its uid, which is written last: a study that has it lacks nothing."""
    if (uid := study.user_attrs.get(UID)) is None:
        uid = str(uuid4())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(metrics)
        study.set_user_attr(START, [point.units for point in beginning.start])
        study_id = storage.get_study_id_from_name(study.study_name)
        if beginning.known:
            known = [beginning.known.get(point, Known()) for point in beginning.start]
            storage.set_study_system_attr(study_id, KNOWN, [[each.scores, each.gradients] for each in known])
        if beginning.earlier.composites:
            storage.set_study_system_attr(study_id, EARLIER, beginning.earlier.to_stored())
        study.set_user_attr(UID, uid)
    return str(uid)


_COMPATIBLE: set[str] = set()
"""Databases whose tables were found to be those of this Optuna, which takes longer than all else of opening them."""


def open_storage(url: str) -> RDBStorage:
    """Optuna's tables in a database, made where there are none.

    Where another process makes the same tables, this one waits for it.

    Raises:
        InputError: The tables are of another Optuna, older or newer than this one.
    """
    # Optuna formats the URL: doubled braces stay braces.
    escaped, settings = url.replace("{", "{{").replace("}", "}}"), dict(engine.engine_settings(url))
    storage = engine.making_tables(lambda: RDBStorage(escaped, settings, skip_compatibility_check=True))
    engine.tune(storage.engine)
    if url not in _COMPATIBLE:
        _refuse_other_tables(storage, url)
        _COMPATIBLE.add(url)
    return storage


def _refuse_other_tables(storage: RDBStorage, url: str) -> None:
    """Close the storage and raise InputError where its tables are of another Optuna."""
    version = storage.get_current_version()
    if version == storage.get_head_version():
        return
    is_older = version in storage.get_all_versions()
    close_storage(storage)
    newer = f"its tables are of a newer Optuna than the {optuna.__version__} that is installed: install that one"
    older = "its tables are of an older Optuna; first: optuna storage upgrade --storage URL"
    raise InputError(None, "storage", engine.masked(url), older if is_older else newer)


def study_names(url: str) -> set[str]:
    """Names of the Optuna studies in a database."""
    with opened_storage(url) as storage:
        return set(optuna.get_all_study_names(storage))


@contextmanager
def opened_storage(url: str) -> Iterator[RDBStorage]:
    """Open Optuna's tables in a database, and close its connections afterwards."""
    storage = BRIEF(lambda: open_storage(url))
    try:
        yield storage
    finally:
        close_storage(storage)


def check_tables(url: str, retry: RetryPolicy = BRIEF) -> None:
    """Make Optuna's tables where there are none; InputError where they are of another Optuna."""
    close_storage(retry(lambda: open_storage(url)))


def close_storage(storage: RDBStorage) -> None:
    """Close the connections of Optuna's tables."""
    storage.remove_session()
    storage.engine.dispose()
