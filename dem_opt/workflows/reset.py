"""Reset a study: remove its trials, keep everything that was measured."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.search.catalog import delete_optuna_studies, optuna_studies_of
from dem_opt.search.run_name import RunName
from dem_opt.storage.engine import is_there, masked
from dem_opt.storage.leases import holding
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import opened
from dem_opt.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class ResetPlan:
    """Effect of a reset on a study's database.

    Attributes:
        study: Name of the study.
        storage: URL of the database, without its password.
        trials: Number of trials of each Optuna study that is removed, by its name, over all generations.
        scores: Number of scores that stay in the ledger, those of other studies in the same database included.
    """

    study: str
    storage: str
    trials: dict[str, int]
    scores: int


def plan_reset(config: StudyConfig, path: Path) -> ResetPlan:
    """Say what a reset would remove; nothing is removed.

    Raises:
        InputError: The study has not been run, or a driver is at work on it.
    """
    with _exclusive(config, path) as ledger:
        return _plan(config, ledger)


def reset(config: StudyConfig, path: Path, tracker: Tracker, warn: Callable[[str], None]) -> ResetPlan:
    """Remove the trials of a study and of its placebos, of all runs and generations; return what was removed.

    The study's row goes last, so that another reset finishes one that was killed.

    Args:
        config: The study.
        path: The study file, which messages name.
        tracker: Marks the logs of the removed searches.
        warn: Receives one line where the tracker cannot be reached.

    Raises:
        InputError: The study has not been run, or a driver is at work on it.
    """
    with _exclusive(config, path) as ledger:
        plan = _plan(config, ledger)
        delete_optuna_studies(list(plan.trials), config.storage)
        tracker.mark_reset(lambda name: RunName.from_optuna(name, config.name) is not None, warn)
        for name in reversed(_names(config, ledger)):
            ledger.forget_study(name)
        return plan


def _plan(config: StudyConfig, ledger: Ledger) -> ResetPlan:
    names = _names(config, ledger)
    trials = {search: count for name in names for search, count in optuna_studies_of(name, config.storage).items()}
    return ResetPlan(study=config.name, storage=masked(config.storage), trials=trials, scores=ledger.count_scores())


def _names(config: StudyConfig, ledger: Ledger) -> list[str]:
    """The study, and the studies of its placebos, NAME+KIND."""
    return [config.name, *(row.name for row in ledger.studies() if row.name.startswith(f"{config.name}+"))]


@contextmanager
def _exclusive(config: StudyConfig, path: Path) -> Iterator[Ledger]:
    """Open the ledger of a study that nobody drives, and keep others from beginning to."""
    if not is_there(config.storage):
        raise _not_run(path)
    with opened(config.storage) as engine:
        if not Ledger.is_in(engine) or (ledger := Ledger(engine)).study(config.name) is None:
            raise _not_run(path)
        with holding(engine, config.name, several=True) as lease, lease.turn("beginning"):
            if others := lease.others():
                drivers = " and ".join(others.values())
                raise InputError(path, "name", config.name, f"{drivers} is at work on it; wait for it, or stop it")
            yield ledger


def _not_run(path: Path) -> InputError:
    return InputError(path, None, None, "nothing to reset: the study has not been run")
