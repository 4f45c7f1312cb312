"""A study's three books (Optuna, ledger, MLflow) and its workers' notes: whether each trial stands in each once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import optuna
import psutil
from counted import notes_of
from mlflow.tracking import MlflowClient

from dem_opt.config import StudyConfig, load
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import Ledger

HERE = Path(__file__).parent

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["driver"])


def environment() -> dict[str, str]:
    """The environment in which a driver finds this folder's modules, the tests' and the package."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, *HERE.parents[:2])))}


def start(moment: str, *command: object, **how: Any) -> subprocess.Popen[str]:
    """A driver in a process of its own, whose output is one text."""
    words = [sys.executable, str(HERE / "driver.py"), moment, *map(str, command)]
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
    )


def run(moment: str, *command: object, timeout: float = 900) -> tuple[int, str]:
    """A driver's whole life: its exit status, negative where a signal ended it, and what it said.

    Its process is forked from one that has imported everything and done nothing: a life costs no imports.
    """
    words = [*map(str, command)]
    with NamedTemporaryFile("r") as output:
        process = FORKS.Process(target=live, args=(moment, words, environment(), output.name))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{words} after {timeout} s: {output.read()}")
        return process.exitcode or 0, output.read()


def live(moment: str, words: list[str], variables: Mapping[str, str], output: str) -> None:
    """Be a driver, in a new process."""
    os.environ.update(variables)
    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    import driver

    driver.drive(moment, words)


@contextmanager
def standing_still(*drivers: subprocess.Popen[str]) -> Iterator[None]:
    """While these drivers stand still, each after the trial at which it stops itself; then they go on."""
    for driver in drivers:
        process = psutil.Process(driver.pid)
        while process.status() != psutil.STATUS_STOPPED:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.05)
    yield
    for driver in drivers:
        driver.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Books:
    """A study in Optuna, in MLflow and in its workers' notes.

    states  of Optuna's trials that have all their coefficients, by number
    logged  how often MLflow has each trial
    begun   how often workers began with each piece of work
    """

    config: StudyConfig
    states: dict[int, str]
    running: list[int]
    values: dict[int, float | None]
    coefficients: dict[int, tuple[float, ...]]
    logged: Counter[int]
    statuses: set[str]
    parents: int
    begun: Counter[tuple[Any, ...]]
    recorded: int

    @property
    def repeated(self) -> int:
        """How many evaluations were begun that had been begun before, over the same windows."""
        return sum(count - 1 for count in self.begun.values())

    def check(self, planned: int) -> None:
        """Raises AssertionError unless exactly the planned trials stand in every book, each once."""
        assert not self.running, f"left running: {self.running}"
        assert len(self.states) == planned, f"{len(self.states)} trials"
        assert set(self.states.values()) == {"COMPLETE"}, Counter(self.states.values())
        assert self.logged == Counter(dict.fromkeys(self.states, 1)), "MLflow has each once"
        assert self.statuses == {"FINISHED"}
        assert self.parents == 1


def read(study: Path) -> Books:
    """The books of a study file with one search."""
    config = load(study)
    storage = optuna.storages.RDBStorage(config.storage)
    name = f"{config.name}/{config.search.algorithm}"
    trials = optuna.load_study(study_name=name, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    whole = [trial for trial in trials if len(trial.params) == len(config.distributions)]
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    runs, token = [], None
    while True:
        page = client.search_runs([experiment.experiment_id], max_results=1000, page_token=token)
        runs += page
        if not (token := page.token):
            break
    children = [run for run in runs if "dem_opt.trial" in run.data.tags]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    notes = notes_of(study.parent)
    lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    engine = connect(config.storage)
    recorded = len(Ledger(engine).composites(_scoring(engine)))
    engine.dispose()
    return Books(
        config=config,
        states={trial.number: trial.state.name for trial in whole},
        running=[trial.number for trial in trials if trial.state.name == "RUNNING"],
        values={trial.number: trial.value for trial in whole},
        coefficients={trial.number: tuple(trial.params.values()) for trial in whole},
        logged=Counter(int(run.data.tags["dem_opt.trial"]) for run in children),
        statuses={run.info.status for run in children},
        parents=len(parents),
        begun=Counter(
            (line["composite"], tuple(line["corpora"]), line["seen"]) for line in lines if line["what"] == "begun"
        ),
        recorded=recorded,
    )


def _scoring(engine: Any) -> str:
    from sqlalchemy import text

    with engine.connect() as connection:
        return str(connection.execute(text("SELECT scoring FROM dem_score LIMIT 1")).scalar_one())


def count_ended(study: Path) -> int:
    """How many trials are told, as Optuna's tables say; 0 where there are none yet."""
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    engine = connect(load(study).storage)
    try:
        with engine.connect() as connection:
            count = connection.execute(text("SELECT count(*) FROM trials WHERE state <> 'RUNNING'")).scalar_one()
            return int(count)
    except DBAPIError:
        return 0
    finally:
        engine.dispose()


def versions(study: Path) -> list[Any]:
    """The versions of the registered model."""
    config = load(study)
    return list(MlflowClient(config.tracking.uri).search_model_versions(f"name = '{config.name}'"))
