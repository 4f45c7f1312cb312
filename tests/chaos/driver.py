"""A driver that dies when it is told to: `dem-opt`, with every evaluation noted and one SIGKILL at a chosen boundary.

    python driver.py MOMENT COMMAND...

MOMENT is "never", BOUNDARY:CALL (right after that call of it), or "told+SECONDS" (after the first trial is told).
"""

import os
import signal
import sys
from threading import Timer
from typing import Any

import optuna
from counted import build
from killed import after
from mlflow.tracking import MlflowClient

import dem_opt.study  # noqa: F401  imported here, before a driver is forked
from dem_opt.cli import main
from dem_opt.compute.ray_pool import RayPool
from dem_opt.export import writer
from dem_opt.search.optuna_study import Search
from dem_opt.storage.ledger import Ledger
from dem_opt.workflows import context, export

BOUNDARIES: dict[str, tuple[Any, str]] = {
    "asked": (optuna.storages.RDBStorage, "create_new_trial"),
    "scored": (RayPool, "next_done"),
    "ledger written": (Ledger, "record"),
    "told": (Search, "tell"),
    "MLflow run created": (MlflowClient, "create_run"),
    "MLflow run ended": (MlflowClient, "set_terminated"),
    "export renamed": (writer, "write_composite"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Die at this moment."""
    if moment.startswith("told+"):
        timer = Timer(float(moment.removeprefix("told+")), die)
        timer.daemon = True
        after(Search, "tell", lambda call: timer.start() if call == 1 else None)
    elif moment != "never":
        boundary, _, last = moment.partition(":")
        owner, name = BOUNDARIES[boundary]
        after(owner, name, lambda call: die() if call == int(last) else None)
        if name == "write_composite":
            export.write_composite = writer.write_composite


def drive(moment: str, words: list[str]) -> None:
    """Be `dem-opt` with these words, until the moment."""
    context.build = build
    arm(moment)
    sys.exit(main.main(words))


if __name__ == "__main__":
    drive(sys.argv[1], sys.argv[2:])
