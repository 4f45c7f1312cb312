"""The image that `make image` built: the quickstart's commands and every service start from it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import psutil
import pytest
import worlds
from compose import ROOT, free_ports

from dem_opt import __version__

SPEC = spec_from_file_location("image", ROOT / "docker/image.py")
assert SPEC is not None and SPEC.loader is not None
image: Any = module_from_spec(SPEC)
SPEC.loader.exec_module(image)

TAG = f"localhost/dem-opt:{__version__}"
TOKEN = "a-token-of-more-than-thirty-two-characters"
MARK = "DEM_OPT_CONTAINER"
"""Variable of every process in a container, with the container's name: chroot isolation leaves them their own lives."""


@dataclass(frozen=True)
class Container:
    """A container of the image, in which commands run as its user, on this machine's network."""

    name: str
    studies: Path

    def words(self, *command: str) -> list[str]:
        run = [*image.command(), "run", "--isolation", "chroot", "--user", "dem"]
        variables = [f"--env={name}" for name in (f"RAY_AUTH_TOKEN={TOKEN}", f"{MARK}={self.name}")]
        return [*run, *variables, "--volume", f"{self.studies}:/studies", self.name, "--", *command]

    def run(self, *command: str, timeout: float = 600) -> str:
        """A command's output; it must end well."""
        with TemporaryFile("w+") as output:  # processes that a command leaves behind would keep a pipe open
            done = subprocess.run(self.words(*command), stdout=output, stderr=STDOUT, timeout=timeout)
            output.seek(0)
            text = output.read()
        assert done.returncode == 0, text[-2000:]
        return text

    @contextmanager
    def serving(self, healthy: str, *command: str) -> Iterator[None]:
        """Start a service and wait until a line of Python says that it is healthy."""
        with subprocess.Popen(self.words(*command), stdout=DEVNULL, stderr=DEVNULL) as process:
            try:
                deadline = time.monotonic() + 240
                while subprocess.run([sys.executable, "-c", healthy], capture_output=True).returncode:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(1)
                yield
            finally:
                self.end()

    def end(self) -> None:
        """End every process in the container."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.name:
                    process.kill()
                    processes.append(process)
        psutil.wait_procs(processes, timeout=60)


def answers(port: int, path: str) -> str:
    return f"from urllib.request import urlopen; urlopen('http://127.0.0.1:{port}{path}', timeout=5)"


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    if reason := image.obstacle():
        pytest.skip(reason)
    if not image.STORAGE.is_dir() or not image.output("images", "--quiet", "--filter", f"reference={TAG}"):
        pytest.skip("no image: make image")
    with TemporaryDirectory(prefix="studies-") as folder:
        name = image.output("from", "--pull-never", TAG)
        studies = Path(folder)
        worlds.study(studies)
        for path in (studies, *studies.rglob("*")):
            os.chown(path, 1000, 1000)
        container = Container(name, studies)
        yield container
        container.end()
        image.buildah("rm", name)


def test_a_study_runs_with_a_compiled_kernel_and_is_exported(container: Container) -> None:
    assert "kernel" in container.run("dem-opt", "check", "/studies/study.yaml")
    container.run("dem-opt", "run", "/studies/study.yaml")
    assert "compiled before" in container.run("dem-opt", "check", "/studies/study.yaml")
    container.run("dem-opt", "export", "--out", "/studies/best", "/studies/study.yaml")
    assert (container.studies / "best/model.safetensors").stat().st_uid == 1000


def test_the_dashboards_answer(container: Container) -> None:
    mlflow, optuna = free_ports(2)
    database = "sqlite:////studies/dashboard.db"
    container.run("python", "-c", f"import optuna; optuna.storages.RDBStorage({database!r})")
    with container.serving(
        answers(mlflow, "/health"),
        *("mlflow", "server", "--host=127.0.0.1", f"--port={mlflow}", "--workers=1"),
        "--backend-store-uri=sqlite:////studies/tracking.db",
    ):
        pass
    with container.serving(
        answers(optuna, "/api/studies"),
        *("optuna-dashboard", "--host=127.0.0.1", f"--port={optuna}", "--server=gunicorn", "--quiet", database),
    ):
        pass


def test_a_driver_runs_a_study_on_the_images_ray(container: Container) -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    connects = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
    head = ("ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=1", "--block")
    worlds.study(container.studies, compute={"ray": address, "workers": 1}, search={"algorithm": "random", "trials": 2})
    with container.serving(connects, *head, "--include-dashboard=false"):
        container.run("env", f"RAY_HEAD={address}", "dem-opt-driver", "dem-opt", "run", "/studies/study.yaml")
