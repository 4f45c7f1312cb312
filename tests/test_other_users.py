"""Another user of the machine reads, writes and runs nothing of a running study."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import worlds

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becoming another user needs root and setpriv"
)

NOBODY = "65534"

RUN = """
import sys
from dem_opt.progress import NullProgress
from dem_opt.study import Study
from dem_opt.tracking import NullTracker

class Waiting(NullProgress):
    def trial_finished(self, record, done, planned):
        print("running", flush=True)
        sys.stdin.read()

Study.load(sys.argv[1], tracker=NullTracker(), progress=Waiting()).run()
"""

CONNECT = """
import os, sys
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a-guess-of-more-than-thirty-two-characters")
import ray
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=b"fun")
except ray.exceptions.AuthenticationError:
    print("refused")
"""


@dataclass(frozen=True)
class Running:
    """A study that is running: its home and folder for temporary files, and its processes."""

    home: Path
    temporary: Path
    processes: list[psutil.Process]

    @property
    def session(self) -> Path:
        (folder,) = self.temporary.glob("dem_opt-ray-*")
        return folder

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "dem_opt"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A study of a user whose folders others may enter, and with an ordinary umask."""
    with TemporaryDirectory(prefix="u", dir="/tmp") as name:
        home, temporary = Path(name, "home"), Path(name, "t")  # short: sockets lie in it
        for folder, mode in ((Path(name), 0o755), (home, 0o755), (temporary, 0o1777)):
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        study = worlds.study(home / "study")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "XDG_"))}
        environment |= {"HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", RUN, str(study)],
            env=environment,
            umask=0o022,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "running\n"
            driver = psutil.Process(process.pid)
            yield Running(home, temporary, [driver, *driver.children(recursive=True)])
            process.communicate("", timeout=120)
        assert process.returncode == 0 and list(temporary.iterdir()) == []


def as_nobody(*command: str | Path) -> subprocess.CompletedProcess[str]:
    privileges = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    return subprocess.run([*privileges, *map(str, command)], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("place", ["session", "cache"])
def test_private_folders_can_be_neither_read_nor_written_nor_entered(running, place):
    folder = getattr(running, place)
    assert any(folder.iterdir())
    listing = as_nobody("find", folder, "(", "-readable", "-o", "-writable", "-o", "-executable", ")")
    assert listing.stdout == ""
    assert as_nobody("ls", folder).returncode != 0
    assert as_nobody("sh", "-c", f"touch {folder}/planted").returncode != 0
    assert as_nobody("mv", folder, f"{folder}-moved").returncode != 0


def test_the_token_the_sockets_and_the_kernel_are_out_of_reach(running):
    (kernel,) = running.cache.glob("kernel-*.so")
    sockets = list(running.session.rglob("sockets/*"))
    assert len(sockets) == 2
    for file in (running.session / "token", kernel, *sockets):
        assert file.exists()
        assert as_nobody("cat", file).returncode != 0
        assert as_nobody("sh", "-c", f": >> {file}").returncode != 0


def test_nothing_listens_beyond_loopback_and_without_the_token_ray_refuses(running):
    listening = [
        connection.laddr.ip
        for process in running.processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    commands = [argument for process in running.processes for argument in process.cmdline()]
    address = next(argument.partition("=")[2] for argument in commands if argument.startswith("--gcs-address="))
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, address], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "refused\n"


def test_no_command_line_tells_the_token_and_no_environment_can_be_read(running):
    token = (running.session / "token").read_text()
    for process in running.processes:
        assert token not in " ".join(process.cmdline())
        assert as_nobody("cat", f"/proc/{process.pid}/environ").returncode != 0


CHECK = """
import contextlib, io, json, os, sys
from dem_opt.cli.main import main

def check(study):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        return main(["check", study]), errors.getvalue()

whole, *studies = sys.argv[1:]
assert check(whole)[0] == 0  # everything is imported while this is root: Python may lie where nobody can read it
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(json.dumps({study: check(study) for study in studies}))
"""

UNREADABLE = [
    *("study.yaml", "models/base/config.json", "models/base/model.safetensors", "models/base/tokenizer.json"),
    *("models/code/config.json", "models/code/model.safetensors", "models/code", "data"),
]


def test_a_file_of_another_user_that_cannot_be_read_is_one_line() -> None:
    with TemporaryDirectory(prefix="u", dir="/tmp") as name:
        Path(name).chmod(0o777)
        whole, studies = worlds.study(Path(name, "whole")), {}
        for file in whole.parent.rglob("*.safetensors"):
            file.chmod(0o644)
        for number, place in enumerate(UNREADABLE):
            folder = Path(name, str(number))
            shutil.copytree(whole.parent, folder)
            (folder / place).chmod(0o700 if (folder / place).is_dir() else 0o600)
            studies[str(folder / "study.yaml")] = folder / place
        done = subprocess.run(
            [sys.executable, "-c", CHECK, str(whole), *studies],
            env=os.environ | {"HOME": name, "XDG_CACHE_HOME": f"{name}/cache"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        for study, (status, message) in json.loads(done.stdout).items():
            assert status == 2 and len(message.splitlines()) == 1 and str(studies[study]) in message, message
