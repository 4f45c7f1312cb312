"""What the tests of faults share: a Ray that outlives the drivers, and folders of tiny studies."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import books  # noqa: E402
import worlds  # noqa: E402

from dem_opt.pool import SETTINGS  # noqa: E402

CPUS = 4
"""More than the machine may have: residents of tiny models."""


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray that drivers join and leave."""
    import os

    import ray

    os.environ.update(SETTINGS | {"PYTHONPATH": books.environment()["PYTHONPATH"]})
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def make_study(tmp_path: Path, ray_address: str) -> Callable[..., Path]:
    """Makes a study of two tiny distributions; sections of the study file replace the usual ones."""

    def make(trials: int, documents: int = 60, **sections: Any) -> Path:
        usual: dict[str, Any] = {
            "search": {"algorithm": "random", "trials": trials, "racing": False},
            "compute": {"ray": ray_address, "residents": 1},
        }
        study = worlds.study(tmp_path, ("code", "math"), **(usual | sections))
        for seed, name in enumerate(("code", "math")):
            worlds.write_documents(tmp_path / f"data/{name}.jsonl", worlds.documents(seed, documents))
        return study

    return make
