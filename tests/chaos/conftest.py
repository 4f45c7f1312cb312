"""Shared by the tests of faults: a Ray that outlives the drivers, and folders of tiny studies."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import books  # noqa: E402
import worlds  # noqa: E402

from dem_opt.compute import SETTINGS  # noqa: E402
from dem_opt.compute.ray_session import STARTS  # noqa: E402

CPUS = 4
"""More than the machine may have: workers of tiny models."""

LIGHT = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
"""Nodes without the processes that no test needs."""


def make_cluster(cpus: int) -> Any:
    """A head with so many CPUs, to which nodes can be added; one that is too slow for Ray's 30 s is started again."""
    from ray.cluster_utils import Cluster

    class PatientCluster(Cluster):  # type: ignore[misc]
        def add_node(self, **arguments: Any) -> Any:
            for left in reversed(range(STARTS)):
                try:
                    return super().add_node(**LIGHT, **arguments)
                except Exception as error:  # Ray raises Exception itself
                    if not left or not ("timed out" in str(error) or isinstance(error, TimeoutError)):
                        raise
            raise AssertionError

    return PatientCluster(initialize_head=True, head_node_args={"num_cpus": cpus})


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray that drivers join and leave, and this process does not join."""
    os.environ.update(SETTINGS | {"PYTHONPATH": books.environment()["PYTHONPATH"]})
    made = make_cluster(CPUS)
    yield made.address
    made.shutdown()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that holds nothing; tests add nodes that hold workers."""
    monkeypatch.setenv("PYTHONPATH", books.environment()["PYTHONPATH"])
    made = make_cluster(0)
    yield made
    made.shutdown()


@pytest.fixture
def make_study(tmp_path: Path, ray_address: str) -> Callable[..., Path]:
    """Makes a study of two tiny distributions; sections of the study file replace the usual ones."""

    def make(trials: int, documents: int = 60, **sections: Any) -> Path:
        usual: dict[str, Any] = {
            "search": {"algorithm": "random", "trials": trials, "racing": False},
            "compute": {"ray": ray_address, "workers": 1},
        }
        study = worlds.study(tmp_path, ("code", "math"), **(usual | sections))
        for seed, name in enumerate(("code", "math")):
            worlds.write_documents(tmp_path / f"data/{name}.jsonl", worlds.documents(seed, documents))
        return study

    return make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests recorded."""
    for report in terminalreporter.stats.get("passed", ()):
        for what, measured in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {what}: {measured}")
