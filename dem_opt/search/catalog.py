"""The studies of a database: their runs and trials by state, and how a study is removed."""

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.storages import RDBStorage

from dem_opt.search.group_log import is_group_search
from dem_opt.search.optuna_storage import opened_storage
from dem_opt.search.run_name import RunName
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger, StudyRow
from dem_opt.storage.optuna_tables import COMPLETE, FAIL, PRUNED, RUNNING, best_value, count_states
from dem_opt.types import NATS_PER_TOKEN, UNITS


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """A run of a study's present generation, and how many of its trials are in which state.

    Attributes:
        name: An algorithm, or ALGORITHM@k for a run with another seed.
        complete: Trials scored on all windows.
        stopped: Trials stopped early, and probes; their objective is an estimate.
        failed: Trials that could not be scored.
        running: Trials proposed and not finished.
        best: The lowest objective of complete trials that violate no constraint, in its unit; None without any.  Of a
            search for a front, the lowest mean of both losses.
    """

    name: str
    complete: int
    stopped: int
    failed: int
    running: int
    best: float | None


@dataclass(frozen=True, kw_only=True)
class StudyOverview:
    """A study in its present generation.

    `unit` is that of its objective, in words; `pareto` names the two losses whose front it searches.
    """

    name: str
    generation: int
    runs: tuple[RunOverview, ...]
    unit: str = UNITS[NATS_PER_TOKEN]
    pareto: tuple[str, ...] = ()

    @property
    def best(self) -> float | None:
        """The lowest objective of all runs."""
        return min((run.best for run in self.runs if run.best is not None), default=None)


def study_overviews(url: str, ledger: Ledger) -> list[StudyOverview]:
    """The studies of the database at `url`, whose ledger is given, in the order of their names."""
    with opened_storage(url) as storage:
        names = sorted(optuna.get_all_study_names(storage))
        return [_study_overview(row, names, storage) for row in ledger.studies()]


def _study_overview(row: StudyRow, names: Sequence[str], storage: RDBStorage) -> StudyOverview:
    runs = []
    for name in names:
        run = RunName.from_optuna(name, row.name)
        if run is not None and run.generation == row.generation:
            runs.append(_run_overview(run.label, storage, storage.get_study_id_from_name(name)))
    unit = UNITS[row.identity.get("objective.unit", NATS_PER_TOKEN)]
    axes = StudyIdentity.recall(row.identity, row.scoring).pareto or ()
    names = tuple(axis.name for axis in axes)
    return StudyOverview(name=row.name, generation=row.generation, runs=tuple(runs), unit=unit, pareto=names)


def _run_overview(name: str, storage: RDBStorage, study: int) -> RunOverview:
    states = count_states(storage.engine, study)
    return RunOverview(
        name=name,
        complete=states.get(COMPLETE, 0),
        stopped=states.get(PRUNED, 0),
        failed=states.get(FAIL, 0),
        running=states.get(RUNNING, 0),
        best=best_value(storage.engine, study),
    )


def optuna_studies_of(study: str, url: str) -> dict[str, int]:
    """The Optuna studies of all runs, searches by group and generations of a study: the number of trials by name."""
    with opened_storage(url) as storage:
        names = sorted(
            name
            for name in optuna.get_all_study_names(storage)
            if RunName.from_optuna(name, study) or is_group_search(name, study)
        )
        return {name: storage.get_n_trials(storage.get_study_id_from_name(name)) for name in names}


def delete_optuna_studies(names: Sequence[str], url: str) -> None:
    """Delete Optuna studies with their trials."""
    with opened_storage(url) as storage:
        for name in names:
            storage.delete_study(storage.get_study_id_from_name(name))
