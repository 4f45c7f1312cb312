"""What tests share: a cache folder of their own, and one Ray for all that need it."""

import logging
import os
from pathlib import Path

import pytest
import torch

from dem_opt.pool import SETTINGS

CPUS = 2

torch.set_num_threads(1)
"""Models are tiny, and tests run in several processes; Ray's workers have the threads that Ray gives them."""


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Content hashes are cached in a folder that is gone afterwards, by residents in other processes too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ray_session(own_cache):
    """One Ray of two CPUs on this machine."""
    import ray

    os.environ.update(SETTINGS | {"PYTHONPATH": str(Path(__file__).parent)})
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()
