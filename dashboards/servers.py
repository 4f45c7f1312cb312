"""Optuna Dashboard and MLflow for one study: started on loopback, announced, stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from dem_opt.errors import InputError, shorten
from dem_opt.storage.engine import is_there, sqlite_file
from dem_opt.tracking.mlflow_client import make_database
from dem_opt.tracking.urls import LOOPBACK, address_of, is_server, preferred_port, without_login

PATIENCE = 180.0
"""Seconds to wait for a server's first answer; a tenth of it, for its end before it is killed."""

NICENESS = 19
"""Lowest CPU priority, so that the servers do not slow down the study that they show."""


@dataclass(frozen=True)
class Addresses:
    """The servers' URLs."""

    optuna: str
    mlflow: str


@dataclass(frozen=True)
class Server:
    """A started server.  Its process leads a process group of its own, so that its workers end with it."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def answers(self) -> bool:
        """Return whether a GET request succeeds."""
        try:
            with urlopen(self.address, timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def check(self, secrets: Sequence[str]) -> None:
        """Raise InputError with the error in the server's log, secrets masked, if the server has ended."""
        if self.process.poll() is not None:
            words = _first_error(self.log.read_text(encoding="utf-8", errors="replace"))
            for secret in secrets:
                words = words.replace(secret, "***")
            status = self.process.returncode
            raise InputError(self.name, None, None, f"ended with status {status}: {shorten(words, 500)}")

    def stop(self) -> None:
        """End the process group: SIGTERM first, SIGKILL if that takes too long."""
        for request in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, request)
            except ProcessLookupError:
                break
            if _ended(self.process, PATIENCE / 10):
                break
        self.process.wait()


@contextmanager
def running(storage_url: str, mlflow_uri: str, artifacts: Path | None = None) -> Iterator[Addresses]:
    """Run both servers, ready to answer, until the context ends.

    Args:
        storage_url: The study's database, which must exist.
        mlflow_uri: MLflow's database, or the URL of a running MLflow server, which is used as it is.
        artifacts: Folder of the artifacts that MLflow serves itself; artifacts of file URIs are found without it.

    Raises:
        InputError: A program is not installed, the database is missing, or a server ends or does not answer.
    """
    with _servers(storage_url, mlflow_uri, artifacts, lambda line: None) as (addresses, _):
        yield addresses


def serve(
    storage_url: str,
    mlflow_uri: str,
    artifacts: Path | None,
    announce: Callable[[str], None],
    open_browser: bool = False,
) -> None:
    """Run both servers and announce their URLs until interrupted by Ctrl-C, SIGTERM or SIGHUP.

    Installs signal handlers, so it needs the main thread.

    Raises:
        InputError: As `running` does, and if a server ends by itself.
    """
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        announce("Starting Optuna Dashboard and MLflow ...")
        with _servers(storage_url, mlflow_uri, artifacts, announce) as (addresses, check):
            announce(f"Optuna Dashboard  {addresses.optuna}")
            announce(f"MLflow            {addresses.mlflow}")
            if addresses.mlflow.rstrip("/") != address_of(mlflow_uri):
                linked = address_of(mlflow_uri)
                announce(f"Another program uses {linked}/, which links in notes point to: they will not work.")
            announce("Press Ctrl-C to stop both.")
            for address in (addresses.optuna, addresses.mlflow) if open_browser else ():
                webbrowser.open(address)
            while True:
                time.sleep(1)
                check()
    except KeyboardInterrupt:
        announce("Stopped.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _servers(
    storage_url: str, mlflow_uri: str, artifacts: Path | None, announce: Callable[[str], None]
) -> Iterator[tuple[Addresses, Callable[[], None]]]:
    """Yield the URLs, and a function that raises InputError if a server has ended."""
    _must_exist(storage_url)
    secrets = [password for url in (storage_url, mlflow_uri) if (password := urlsplit(url).password)]
    remote = is_server(mlflow_uri)
    optuna_port, mlflow_port = _free_ports([storage_url, mlflow_uri])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="dem-opt-")))
        servers = [stack.enter_context(_optuna_dashboard(storage_url, optuna_port, folder))]
        if not remote:
            with suppress(OSError):  # the server's own error is reported below
                make_database(mlflow_uri)
            servers.append(stack.enter_context(_mlflow(mlflow_uri, artifacts, mlflow_port, folder)))

        def check() -> None:
            for server in servers:
                server.check(secrets)

        _wait(servers, check, announce)
        yield (
            Addresses(servers[0].address, without_login(mlflow_uri) if remote else servers[1].address),
            check,
        )


def _optuna_dashboard(storage_url: str, port: int, folder: Path) -> AbstractContextManager[Server]:
    """Start Optuna Dashboard; its URL, which may hold a password, is passed in a private file.

    Command lines are readable by every user of the machine.
    """
    config = folder / "optuna-dashboard.toml"
    config.touch(mode=0o600)
    config.write_text(f"[optuna_dashboard]\nstorage = {json.dumps(storage_url)}\n", encoding="utf-8")
    options = [
        "--from-config",
        str(config),
        "--host",
        LOOPBACK,
        "--port",
        str(port),
        "--server",
        "wsgiref",
        "--quiet",
    ]
    return _started("optuna-dashboard", options, {}, port, folder)


def _mlflow(uri: str, artifacts: Path | None, port: int, folder: Path) -> AbstractContextManager[Server]:
    """Start MLflow with one worker, without job runners or telemetry; its URI is passed in the environment."""
    options = ["--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    options += ["--artifacts-destination", str((artifacts or folder).resolve())]
    settings = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return _started("mlflow", ["server", *options], settings, port, folder)


@contextmanager
def _started(
    program: str, options: Sequence[str], settings: dict[str, str], port: int, folder: Path
) -> Iterator[Server]:
    """Start a program of this Python's environment as a server; stop it when the context ends."""
    path = Path(sys.executable).parent / program
    if not path.exists():
        raise InputError(path, None, None, f"is missing; install it with `{sys.executable} -m pip install {program}`")
    log = folder / f"{program}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(path), *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        with suppress(OSError):  # the process has ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    server = Server(program, f"http://{LOOPBACK}:{port}/", process, log)
    try:
        yield server
    finally:
        server.stop()


def _wait(servers: Sequence[Server], check: Callable[[], None], announce: Callable[[str], None]) -> None:
    """Wait until every server answers, and announce each."""
    began = time.monotonic()
    deadline = began + PATIENCE
    for server in servers:
        while not server.answers():
            check()
            if time.monotonic() > deadline:
                raise InputError(server.name, None, None, f"did not answer within {PATIENCE:.0f} seconds")
            time.sleep(0.1)
        announce(f"{server.name} answers after {time.monotonic() - began:.0f} s")


def _ended(process: subprocess.Popen[bytes], patience: float) -> bool:
    """Return whether the process and its group end within `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def _first_error(log: str) -> str:
    """Return the first error in a log, which caused the later ones; else its last line."""
    lines = log.strip().splitlines() or ["(no output)"]
    return next((line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def _free_ports(uris: Sequence[str]) -> list[int]:
    """Return distinct free loopback ports: the ports that links in notes use, if they are free."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in uris]
        for probe, uri in zip(sockets, uris, strict=True):
            try:
                probe.bind((LOOPBACK, preferred_port(uri)))
            except OSError:
                probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def _must_exist(storage_url: str) -> None:
    """Refuse a missing SQLite file, which Optuna Dashboard would create."""
    if not is_there(storage_url):
        raise InputError(sqlite_file(storage_url), "storage", None, "there is no study yet; `dem-opt run` makes it")


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
