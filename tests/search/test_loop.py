"""Laws of the loop: what is proposed follows from what was told, and never from which worker is faster."""

import os
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import worlds
from sqlalchemy import Engine, event

from dem_opt.config import load
from dem_opt.evaluation.worker import build
from dem_opt.planning.inputs import load_inputs
from dem_opt.progress import NullProgress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import Search
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding
from dem_opt.storage.ledger import Ledger
from dem_opt.tracking import NullTracker
from dem_opt.types import Evaluation, Failure, Request


class Jumbled:
    """A pool whose answers come in an order drawn from a seed."""

    def __init__(self, worker, capacity: int, seed: int):
        self.capacity, self._worker = capacity, worker
        self._rng, self._waiting = random.Random(seed), []

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def next_done(self) -> tuple[Request, Evaluation | Failure]:
        request = self._waiting.pop(self._rng.randrange(len(self._waiting)))
        return request, self._worker.evaluate(request)

    def withdraw(self) -> set[int]:
        raise AssertionError("nobody asked to stop")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study's settings, its question, and a worker that answers it."""
    path = worlds.study(tmp_path_factory.mktemp("driver"), search={"algorithm": "simplex-gp", "trials": 9, "seed": 1})
    config = load(path)
    sources = load_inputs(config, path)
    return config, sources.identity(), build(sources.spec())


def trials(world, folder: Path, pool, lookahead: int) -> list:
    """Coefficients and objectives, in the order of their numbers, of a search with these workers."""
    config, identity, _ = world
    url = f"sqlite:///{folder / 'study.db'}"
    folder.mkdir()
    engine = connect(url)
    search = Search(url, "jumbled", config.space, config.search)
    with holding(engine, "jumbled") as lease:
        driver = Driver(identity=identity, ledger=Ledger(engine), pool=pool, progress=NullProgress(), study="jumbled")
        driver.optimize(search, lookahead, NullTracker(), lease)
    engine.dispose()
    return [(trial.number, trial.coefficients, trial.objective) for trial in search.trials()]


@pytest.mark.parametrize("capacity", [1, 2, 4])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_order_of_answers_changes_no_trial(world, tmp_path, capacity, lookahead):
    first, second = (
        trials(world, tmp_path / str(seed), Jumbled(world[2], capacity, seed), lookahead) for seed in (0, 1)
    )
    assert len(first) == 9 and first == second


class Watched(Jumbled):
    """A pool that answers in order, and knows how many requests were out whenever another one came."""

    def __init__(self, worker, capacity: int):
        super().__init__(worker, capacity, 0)
        self.out: list[int] = []

    def submit(self, request: Request) -> None:
        self.out.append(len(self._waiting))
        super().submit(request)

    def next_done(self) -> tuple[Request, Evaluation | Failure]:
        request = self._waiting.pop(0)
        return request, self._worker.evaluate(request)


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_no_worker_is_idle_while_a_proposal_is_made(world, tmp_path, capacity):
    """With one proposal ahead for each, whichever of them is through has another one, and so have all others."""
    pool = Watched(world[2], capacity)
    made = len(trials(world, tmp_path / "study", pool, 1))
    assert pool.out == [min(number, 2 * capacity - 1) for number in range(made)]


@pytest.mark.parametrize("table", ["dem_score", "dem_cost", "trials", "trial_params", "trial_values"])
def test_two_signals_in_the_middle_of_a_transaction_stop_the_search_and_leave_the_database_free(world, tmp_path, table):
    """The transaction ends first: else the thread that logs trials would wait for the database, and close() for it."""
    written = 0

    def interrupt(_connection, _cursor, statement: str, *_) -> None:
        nonlocal written
        written += statement.startswith((f"INSERT INTO {table} ", f"UPDATE {table} "))
        if written == 3:
            written += 1
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    event.listen(Engine, "after_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupted:
            trials(world, tmp_path / "study", Stoppable(world[2], 1, 0), 1)
    finally:
        event.remove(Engine, "after_cursor_execute", interrupt)
    assert written > 3 and interrupted.tb, "the frames that were left are alive, and whatever they hold"
    with closing(sqlite3.connect(tmp_path / "study/study.db", timeout=0.1)) as database:
        database.execute("BEGIN IMMEDIATE")


class Stoppable(Jumbled):
    """A pool from which everything that waits can be taken back."""

    def withdraw(self) -> set[int]:
        tickets = {request.ticket for request in self._waiting}
        self._waiting.clear()
        return tickets
