"""The services of a compose file as processes of this machine: their own commands, environments and health checks.

What a container has of its own is mapped: host names to loopback, ports to free ones, volumes to folders, the
PostgreSQL server to a Unix socket.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "DEM_OPT_TEST_MARK"
PATIENCE = 600.0


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """As Compose reads ${NAME:-default} and ${NAME:?message}; what must be given and is not is a KeyError."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if variables.get(name):
            return variables[name]
        if kind == ":-":
            return str(rest)
        raise KeyError(f"{name}: {rest}")

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


class Services:
    """Starts services of `compose`, waits until they are healthy, runs commands in them, and ends them all.

    A service that ends is started again where Compose says so, until it is stopped: a Ray that takes more than its own
    30 s to start on a busy machine, or that its head took for dead.

    socket_folder  where PostgreSQL's Unix socket is
    folder         a short path for logs, volumes and Ray's files
    """

    def __init__(
        self, compose: dict[str, Any], variables: Mapping[str, str], socket_folder: Path, folder: Path
    ) -> None:
        self._compose, self._variables, self._folder = compose["services"], variables, folder
        self.ports = dict(zip(("5000", "8080", "6379"), free_ports(3), strict=True))
        self.artifacts = folder / "mlflow"
        self._socket = socket_folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._options: dict[str, tuple[str, ...]] = {}
        self._changing = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._start_again, daemon=True)
        self._watch.start()

    def native(self, text: str) -> str:
        """A word of a command, or a URL, as it is on this machine."""
        text = interpolated(text, self._variables)
        text = str(ROOT / "docker/driver.sh") if text == "dem-opt-driver" else text
        text = re.sub(r"@postgres/(\w+)", rf"@/\1?host={self._socket}", text)
        text = re.sub(r"\b((mlflow|ray-head)(?=:\d)|0\.0\.0\.0$)", "127.0.0.1", text)
        text = re.sub(r"(?<=[:=])(5000|8080|6379)\b", lambda match: str(self.ports[match[1]]), text)
        text = text.replace("/tmp/ray/", f"{self._folder}/ray-worker/")
        return re.sub(r"(?<==)/mlflow$", str(self.artifacts), text)

    def command(self, name: str) -> list[str]:
        """A service's entrypoint and command."""
        service = self._compose[name]
        return [self.native(word) for word in (*service["entrypoint"], *service["command"])]

    def environment(self, name: str) -> dict[str, str]:
        """A service's environment, in which the programs of this Python are found."""
        own = {key: self.native(value) for key, value in self._compose[name].get("environment", {}).items()}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "RAY_", "MLFLOW_"))}
        mark = {MARK: f"{self._folder}/{name}", "PYTHONPATH": str(ROOT), "PATH": path}
        return {**kept, "RAY_USAGE_STATS_ENABLED": "0", **own, **mark}

    def start(self, name: str, *options: str) -> None:
        """The service's command in a process group of its own, its output in a file."""
        with self._changing:
            self._start(name, options)

    def _start(self, name: str, options: tuple[str, ...]) -> None:
        with self.log(name).open("ab") as output:
            process = subprocess.Popen(
                [*self.command(name), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(name),
                cwd=self._folder,
                start_new_session=True,
            )
        self._started[name], self._options[name] = process, options

    def _start_again(self) -> None:
        """Until all is closed, start the services again that ended."""
        while not self._closed.wait(0.5):
            with self._changing:
                for name in self._ended():
                    if self._compose[name]["restart"] == "unless-stopped":
                        self.kill(name)
                        self._start(name, self._options[name])

    def _ended(self) -> list[str]:
        return [name for name, process in self._started.items() if process.poll() is not None]

    def run(self, name: str, *command: str, **more: str) -> None:
        """As `docker compose run --rm`: the service's own command unless another is given.  It must succeed.

        Nothing of its container is left afterwards.  What it says goes into a file, as a daemon might hold a pipe.
        """
        entrypoint = [self.native(word) for word in self._compose[name]["entrypoint"]]
        words = [*entrypoint, *command] if command else self.command(name)
        code: int | str = f"not after {PATIENCE:.0f} s"
        try:
            with self.log(name).open("ab") as output, suppress(subprocess.TimeoutExpired):
                environment = {**self.environment(name), **more}
                code = subprocess.run(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, timeout=PATIENCE
                ).returncode
        finally:
            end(f"{self._folder}/{name}", signal.SIGKILL)
        assert code == 0, f"{name} ended: {code}\n" + "\n".join(map(self.last_words, (name, *self._started)))

    def check(self, name: str, **more: str) -> int:
        """The exit status of the service's health check, in its environment and what `more` changes of it."""
        kind, *words = self._compose[name]["healthcheck"]["test"]
        assert kind == "CMD"
        words = [sys.executable if word == "python" else self.native(word) for word in words]
        environment = {**self.environment(name), **more}
        return subprocess.run(words, env=environment, capture_output=True, timeout=PATIENCE).returncode

    def wait(self, *names: str) -> None:
        """Until their health checks succeed, asked as Docker would ask."""
        deadline = time.monotonic() + PATIENCE
        while failing := [name for name in names if self.check(name) != 0]:
            with self._changing:
                over = [name for name in self._ended() if self._compose[name]["restart"] != "unless-stopped"]
            assert not over, f"{over[0]} ended: {self.last_words(over[0])}"
            assert time.monotonic() < deadline, f"{failing} not healthy: {self.last_words(failing[0])}"
            time.sleep(0.5)

    def log(self, name: str) -> Path:
        """File of a service's output, of all its starts."""
        return self._folder / f"{name}.log"

    def last_words(self, name: str) -> str:
        """The end of it."""
        return f"{name}: {self.log(name).read_text()[-3000:]}"

    def kill(self, name: str) -> None:
        """Kills a service's processes, as what they lack kills them: Compose starts them again."""
        end(f"{self._folder}/{name}", signal.SIGKILL)

    def stop(self, name: str) -> None:
        """Kills a service by hand: it stays away."""
        with self._changing:
            process = self._started.pop(name)
        self.kill(name)
        process.wait()

    def close(self) -> None:
        """Ends every process of every service: asked first, and what is left after three seconds killed."""
        self._closed.set()
        self._watch.join()
        for process in self._started.values():
            process.terminate()
        deadline = time.monotonic() + 3
        while any(process.poll() is None for process in self._started.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for name in list(self._started):
            self.stop(name)
        end(f"{self._folder}/", signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """The living processes whose environment has a mark that begins so."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
    return pids


def end(mark: str, number: signal.Signals) -> None:
    """Sends every process with this mark a signal, those too that were being started."""
    while left := marked(mark):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.1)
