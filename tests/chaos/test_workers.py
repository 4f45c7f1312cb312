"""Workers that are killed, alone or with their node: the study goes on, and every trial is told once."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import books
import pytest
import stub_workers
from counted import held, notes_of
from recorded import RecordedProgress

from dem_opt.compute import ATTEMPTS, RayCompute
from dem_opt.config import ComputeSection
from dem_opt.errors import InputError
from dem_opt.progress import NullProgress, Progress
from dem_opt.types import Composite, Request, StoredModel, WorkerSpec

SLOW: dict[str, Any] = {"documents": 1000, "evaluation": {"window": 64, "windows": 200, "held_out": 4}}
"""A trial of some tenths of a second."""


def notes(study: Path) -> list[dict[str, Any]]:
    file = notes_of(study.parent)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def at_work(driver: subprocess.Popen[str], study: Path, seen: int) -> int:
    """The process of a worker that has just begun with something, after so many notes."""
    while True:
        assert driver.poll() is None, f"the driver has ended: {driver.communicate()[0]}"
        lines = notes(study)
        if len(lines) > seen and lines[-1]["what"] == "begun":
            return int(lines[-1]["pid"])
        time.sleep(0.02)


def test_workers_that_are_killed_while_they_score_lose_no_trial(make_study: Callable[..., Path]) -> None:
    kills, planned = 3, 20
    study, rng = make_study(planned, **SLOW), random.Random(3)
    driver = books.start("never", "run", study)
    for _ in range(kills):
        pid = at_work(driver, study, len(notes(study)) + rng.randint(0, 4))
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        while notes(study)[-1]["pid"] == pid:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.05)
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    assert said.count("a worker was lost") <= kills
    outcome = books.read(study)
    outcome.check(planned)
    assert outcome.repeated <= kills


def test_nodes_that_are_killed_and_replaced_lose_no_trial(make_study: Callable[..., Path], cluster: Any) -> None:
    kills, planned = 2, 30
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    compute = {"ray": cluster.address, "workers": 2}
    study = make_study(planned, compute=compute, **SLOW)
    driver = books.start("never", "run", study)
    for kill in range(kills):
        at_work(driver, study, len(notes(study)) + 3)
        with held(study.parent):
            cluster.remove_node(nodes.pop(kill % 2), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
    said, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, said
    outcome = books.read(study)
    outcome.check(planned)
    assert outcome.repeated <= 2 * kills


@pytest.fixture
def pool_of(cluster: Any) -> Iterator[Callable[..., Any]]:
    """Makes pools of stand-ins on the cluster, in this process."""
    import ray

    with ExitStack() as stack:

        def make(
            progress: Progress,
            build: type = stub_workers.Fragile,
            folder: Path = Path("models/code"),
            workers: int | Literal["auto"] = "auto",
        ) -> Any:
            settings = ComputeSection(ray=cluster.address, workers=workers, patience=600)
            spec = WorkerSpec(base=StoredModel(folder, "content"), fine_tunes=(), corpora=(), batch_tokens=64)
            return stack.enter_context(RayCompute(settings)).workers(build, spec, progress)

        yield make
    assert not ray.is_initialized()


def test_a_node_whose_files_differ_is_refused_by_its_name(cluster: Any, pool_of: Callable[..., Any]) -> None:
    cluster.add_node(num_cpus=1, node_name="north")
    cluster.add_node(num_cpus=1, node_name="south", env_vars={"DEM_OPT_TEST_FRAGILE": "1"})
    with pytest.raises(InputError, match="models/code on node south: its weights differ"):
        pool_of(NullProgress())


def test_nodes_that_join_get_workers_and_one_whose_files_differ_does_not(
    cluster: Any, pool_of: Callable[..., Any]
) -> None:
    cluster.add_node(num_cpus=1, node_name="north")
    progress = RecordedProgress()
    pool = pool_of(progress)
    assert pool.capacity == 1
    cluster.add_node(num_cpus=1, node_name="east")
    ticket = 0
    while pool.capacity < 2:
        pool.submit(Request(ticket=ticket, composite=Composite.single("content"), corpora=("a",)))
        ticket += 1
        pool.next_done()
        time.sleep(0.1)
    cluster.add_node(num_cpus=1, node_name="south", env_vars={"DEM_OPT_TEST_FRAGILE": "1"})
    while not any("south" in line for line in progress.warnings):
        pool.submit(Request(ticket=ticket, composite=Composite.single("content"), corpora=("a",)))
        ticket += 1
        pool.next_done()
        time.sleep(0.1)
    assert pool.capacity == 2
    assert progress.notes[0] == "a node has joined; it gets a worker"
    assert progress.warnings[-1].endswith("models/code on node south: its weights differ")
    pool.close()


def test_nodes_that_are_lost_while_their_worker_loads_are_no_fault_of_the_worker(
    cluster: Any, pool_of: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1) for _ in range(ATTEMPTS + 2))}

    def lose_nodes() -> None:
        for _ in range(ATTEMPTS + 1):
            while not (loading := [name for name in nodes if (tmp_path / name).exists()]):
                time.sleep(0.1)
            cluster.remove_node(nodes.pop(loading[0]), allow_graceful=False)
        (tmp_path / "ready").touch()

    thread = Thread(target=lose_nodes, daemon=True)
    thread.start()
    pool = pool_of(NullProgress(), stub_workers.Slow, tmp_path, workers=1)
    thread.join()
    assert pool.capacity == 1
    pool.close()
