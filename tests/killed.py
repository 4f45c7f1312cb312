"""Runs a tiny study, killed at a boundary and then again to its end, for every boundary; writes what came of each.

Each driver is a process of its own, forked before torch or MLflow has started a thread.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
import torch
import transformers
import worlds
from mlflow.tracking import MlflowClient

from dem_opt import Study
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.worker import Worker
from dem_opt.search.optuna_study import Search
from dem_opt.storage.ledger import Ledger

SEARCH = {"algorithm": "simplex-gp", "trials": 8, "seed": 3}
BOUNDARIES: dict[str, tuple[Any, str, int]] = {
    "asked": (optuna.storages.RDBStorage, "create_new_trial", 6),
    "scored": (Worker, "evaluate", 6),
    "ledger written": (Ledger, "record", 6),
    "told": (Search, "tell", 6),
    "MLflow run created": (MlflowClient, "create_run", 5),
}


def after(owner: Any, name: str, act: Callable[[int], None]) -> None:
    """Let every call of a method be followed by `act` with the number of the call."""
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = original(*arguments, **named)
        calls += 1
        act(calls)
        return result

    setattr(owner, name, wrapped)


def drive(folder: Path, boundary: str | None) -> int:
    """One driver's life in a process of its own; its exit status, 9 where it was killed."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        torch.set_num_threads(1)
        after(Worker, "evaluate", lambda call: (folder / "evaluations").open("a").write("x") and None)
        if boundary:
            owner, name, last = BOUNDARIES[boundary]
            after(owner, name, lambda call: os._exit(9) if call == last else None)
        Study.load(folder / "study.yaml", compute=InProcessCompute()).run()
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def outcome(folder: Path) -> dict[str, Any]:
    """State of a study in Optuna, in MLflow and in its workers' notes."""
    storage = f"sqlite:///{folder}/runs/tiny/study.db"
    trials = optuna.load_study(study_name="tiny/simplex-gp", storage=storage).trials
    client = MlflowClient(f"sqlite:///{folder}/runs/tiny/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    whole = [trial for trial in trials if len(trial.params) == 3]
    return {
        "states": [trial.state.name for trial in whole],
        "trials": [[trial.params, trial.value] for trial in whole],
        "running": [trial.number for trial in trials if trial.state.name == "RUNNING"],
        "numbers": [trial.number for trial in whole],
        "logged": sorted(int(run.data.tags["dem_opt.trial"]) for run in children),
        "statuses": sorted({run.info.status for run in children}),
        "parents": len(runs) - len(children),
        "evaluations": len((folder / "evaluations").read_text()),
    }


def main(root: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    template = root / "mlflow.db"
    MlflowClient(f"sqlite:///{template}").search_experiments()
    outcomes = {}
    for name in [None, *BOUNDARIES]:
        folder = root / str(name).replace(" ", "-")
        worlds.study(folder, search=SEARCH)
        (folder / "runs/tiny").mkdir(parents=True)
        shutil.copy(template, folder / "runs/tiny/mlflow.db")
        exits = [drive(folder, name)] if name else []
        outcomes[str(name)] = {"exits": [*exits, drive(folder, None)]}
    for name, books in outcomes.items():
        books |= outcome(root / name.replace(" ", "-"))
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
