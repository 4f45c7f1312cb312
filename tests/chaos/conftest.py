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

CPUS = 4
"""More than the machine may have: workers of tiny models."""


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray that drivers join and leave, and this process does not join."""
    from ray.cluster_utils import Cluster

    os.environ.update(SETTINGS | {"PYTHONPATH": books.environment()["PYTHONPATH"]})
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    yield made.address
    made.shutdown()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that holds nothing, and one node that holds workers."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", books.environment()["PYTHONPATH"])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
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
