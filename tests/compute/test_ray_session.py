"""A study's own Ray: reached by its user alone, and gone without a trace when the study ends."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dem_opt.compute import ray_warnings
from dem_opt.compute.ray_session import PREFIX, session_folder, shared_memory_warning, short_folder
from dem_opt.config import ComputeSection
from dem_opt.errors import InputError

STARTED = """
import json, os, sys
import psutil
from pathlib import Path
from dem_opt.compute import RayCompute
from dem_opt.config import ComputeSection

def facts():
    import ray
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    folder = Path(ray.get_runtime_context().worker.node.get_temp_dir_path()).parent
    token = (folder / "token").read_text()
    return {
        "folder": str(folder),
        "modes": {path.name: path.stat().st_mode for path in (folder, folder / "token")},
        "listening": listening,
        "told": [p.pid for p in family if token in " ".join(p.cmdline())],
        "environment": {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")},
    }

runs = []
for _ in range(int(sys.argv[1])):
    with RayCompute(ComputeSection()) as compute:
        assert dict(compute.jobs(abs, [-1])) == {-1: 1}
        runs.append(facts())
        print(json.dumps(runs), flush=True)
        if sys.argv[2:] == ["wait"]:
            sys.stdin.read()
"""


def started(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """A process that starts Ray so many times, and prints what it sees of itself while each runs."""
    code = [sys.executable, "-c", STARTED, *arguments]
    variables = os.environ | {"TMPDIR": str(folder), "HOME": str(folder), "RAY_TMPDIR": ""} | environment
    return subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)


def test_ray_listens_on_loopback_and_its_token_is_its_owners_and_nothing_is_left(tmp_path_factory):
    home = tmp_path_factory.mktemp("h")
    process = started(home, "2", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="of-another-cluster-of-32-characters")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    runs = json.loads(output.splitlines()[-1])
    assert len({run["folder"] for run in runs}) == 2
    for run in runs:
        assert run["listening"]
        assert {address.removeprefix("::ffff:") for address in run["listening"]} == {"127.0.0.1"}
        assert {stat.S_IMODE(mode) for mode in run["modes"].values()} == {0o700, 0o600}
        assert run["told"] == []
        assert run["environment"]["RAY_AUTH_TOKEN"] == "of-another-cluster-of-32-characters"
        assert not Path(run["folder"]).exists()
    assert not (home / ".ray").exists()


WAITING = """
import os
from dem_opt.compute import RayCompute
from dem_opt.config import ComputeSection

with RayCompute(ComputeSection()) as compute:
    print(dict(compute.jobs(os.getenv, ["GOMP_SPINCOUNT"]))["GOMP_SPINCOUNT"])
"""


@pytest.mark.parametrize(("given", "seen"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_of_workers_that_wait_soon_sleep_unless_the_user_says_otherwise(tmp_path_factory, given, seen):
    home = str(tmp_path_factory.mktemp("h"))
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    ended = subprocess.run(
        [sys.executable, "-c", WAITING], capture_output=True, text=True, env=variables | {"TMPDIR": home} | given
    )
    assert ended.stdout.split() == [seen]


REFUSED = """
from dem_opt.compute import RayCompute
from dem_opt.config import ComputeSection
from dem_opt.errors import OutageError

try:
    with RayCompute(ComputeSection()):
        print("started")
except OutageError as error:
    print(error)
"""


def test_a_ray_that_does_not_start_is_one_line_and_leaves_nothing(tmp_path):
    """Ray reads resources from the environment while it starts, and raises there what its parser raises."""
    variables = os.environ | {"TMPDIR": str(tmp_path), "RAY_TMPDIR": "", "RAY_OVERRIDE_RESOURCES": "{"}
    ended = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, env=variables, timeout=300)
    (line,) = ended.stdout.splitlines()
    assert ended.returncode == 0
    assert "Ray" in line and "property name" in line
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


LATE = """
import time
import ray._private.node as node
from dem_opt.compute import RayCompute
from dem_opt.config import ComputeSection

class Clock:
    '''The processes of the first start are there after a minute, which passes at once.'''
    ahead = 0.0
    sleep, time = staticmethod(time.sleep), staticmethod(time.time)
    def monotonic(self):
        return time.monotonic() + self.ahead

asked, known = [], node.ray._private.services.get_node
def get_node(*arguments):
    asked.append(arguments)
    if len(asked) > 1:
        return known(*arguments)
    node.time.ahead = 60.0
    raise RuntimeError("not known yet")

node.time, node.ray._private.services.get_node = Clock(), get_node
with RayCompute(ComputeSection()) as compute:
    print(len(asked) > 1, len(compute._ray.nodes()))
"""


def test_a_ray_that_takes_too_long_to_start_is_started_again(tmp_path):
    variables = os.environ | {"TMPDIR": str(tmp_path), "RAY_TMPDIR": ""}
    ended = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, env=variables, timeout=300)
    assert ended.stdout == "True 1\n", ended.stderr
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_running_one_is_kept(tmp_path):
    running, killed, young = (tmp_path / f"{PREFIX}{name}" for name in ("running", "killed", "young"))
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    for folder in (running, killed, young):
        folder.mkdir()
        (folder / "lock").touch()
    code = [sys.executable, "-c", holder, str(running / "lock")]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for folder in (running, killed):
            os.utime(folder, (0, 0))
        with session_folder(tmp_path) as own:
            assert set(tmp_path.iterdir()) == {own, running, young}
        assert set(tmp_path.iterdir()) == {running, young}
        process.kill()


def test_a_long_folder_for_temporary_files_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert short_folder(longest=1000) == tmp_path
    assert len(os.fsencode(short_folder(longest=len(os.fsencode(tmp_path))))) < len(os.fsencode(tmp_path))
    with pytest.raises(InputError, match="TMPDIR"):
        short_folder(longest=3)


@pytest.mark.parametrize(("free", "warned"), [(64 * 2**20, True), (10**9, False), (None, False)])
def test_too_little_shared_memory_is_told(free, warned):
    warning = shared_memory_warning(free)
    assert warning is None if not warned else warning is not None and warning.startswith("/dev/shm has 67 MB")


@pytest.mark.parametrize(
    ("mode", "folders", "warned"),
    [(0o644, 0o755, True), (0o640, 0o750, True), (0o600, 0o755, False), (0o644, 0o700, False)],
)
def test_a_token_of_a_cluster_that_others_can_read_is_told(monkeypatch, mode, folders, warned):
    with TemporaryDirectory(dir="/tmp") as folder:
        token = Path(folder, "token")
        token.write_text("secret")
        token.chmod(mode)
        Path(folder).chmod(folders)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        warnings = ray_warnings(ComputeSection(ray="auto"))
    assert bool(warnings) == warned and all(f"chmod 600 {token}" in warning for warning in warnings)
