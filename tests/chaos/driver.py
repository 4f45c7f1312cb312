"""A driver that dies or stands still by itself: `dem-opt`, with every evaluation noted.

    python driver.py MOMENT COMMAND...

MOMENT is "never", BOUNDARY:CALL (a SIGKILL right after that call of it), BOUNDARY:CALL+SECONDS (so much later), or
"stop:COUNT" (a SIGSTOP after so many trials are told; whoever started the driver lets it go on; several by commas).
"""

import os
import signal
import sys
from functools import partial
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


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def arm(moment: str) -> None:
    """Die or stand still at this moment."""
    if moment == "never":
        return
    boundary, _, when = moment.partition(":")
    if boundary == "stop":
        counts = {int(count) for count in when.split(",")}
        after(Search, "tell", lambda call: send(signal.SIGSTOP) if call in counts else None)
        return
    last, _, seconds = when.partition("+")
    timer = Timer(float(seconds or 0), send, [signal.SIGKILL])
    timer.daemon = True
    act = timer.start if seconds else partial(send, signal.SIGKILL)
    owner, name = BOUNDARIES[boundary]
    after(owner, name, lambda call: act() if call == int(last) else None)
    if name == "write_composite":
        export.write_composite = writer.write_composite


def drive(moment: str, words: list[str]) -> None:
    """Be `dem-opt` with these words."""
    context.build = build
    arm(moment)
    sys.exit(main.main(words))


if __name__ == "__main__":
    drive(sys.argv[1], sys.argv[2:])
