"""A Ray of this process's own: on loopback, its token, sockets and logs in a folder that no other user can enter.

By default Ray listens on all interfaces, writes its token to ~/.ray/auth_token with the umask's mode, and makes its
folders below /tmp/ray writable for everybody.  Whoever has the token, or may write to Ray's sockets, runs code as the
study's user.
"""

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep, time
from typing import Any

from dem_opt.errors import InputError, OutageError, shorten
from dem_opt.permissions import readable_by_others

PREFIX = "dem_opt-ray-"
"""Beginning of the names of session folders."""

LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Longest path of a session folder in bytes: the path of a Unix socket has at most 107."""

STARTS = 3
"""How often Ray is started where it takes too long; on a busy machine the files that it reads are then in memory."""

UNUSED_SECONDS = 60.0
"""Age from which a session folder that no process locks was left by a killed one."""

OBJECT_STORE_BYTES = 75 * 2**20
"""The smallest object store that Ray starts; a study puts its windows there, some MB."""

_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def private_ray(ray: Any) -> Iterator[None]:
    """Start Ray on this machine and connect to it; ended and removed with the context.

    Raises:
        InputError: There is no folder for its files.
        OutageError: Ray did not start, on a machine that is too busy for its limit of 30 s three times, say.
    """
    with session_folder(short_folder()) as folder:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        # A small object store stays below the room in /dev/shm, or goes to the session's folder where that is smaller.
        small = {"object_store_memory": OBJECT_STORE_BYTES} if shared_memory_warning(free_shared_memory()) else {}
        try:
            with _own_token(token), _on_loopback(), _startup():
                start_ray(ray, _temp_dir=str(folder / "ray"), **small)
            yield
        finally:
            ray.shutdown()
            _forget_token()


def start_ray(ray: Any, **options: Any) -> None:
    """Call `ray.init` for a Ray on this machine, again where its processes took longer than the 30 s that Ray waits.

    Ray has no setting for that limit.  Late processes of a start that was given up end with this process.
    """
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options
            )
            return
        except Exception as error:  # Ray raises Exception itself
            if not left or "timed out during startup" not in str(error):
                raise


@contextmanager
def _startup() -> Iterator[None]:
    """Turn a failure of Ray to start into an OutageError, which is one line."""
    try:
        yield
    except Exception as error:  # Ray raises Exception itself, and nothing else runs in the block
        reason = shorten(str(error).strip().partition("\n")[0], 300)
        raise OutageError(f"Ray did not start on this machine ({reason}); where it is busy, try again later") from error


def free_shared_memory() -> int | None:
    """Free bytes of /dev/shm; None on systems that have none."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def shared_memory_warning(free: int | None) -> str | None:
    """Return the warning that /dev/shm, with so many bytes free, has no room for Ray's object store; None if it has."""
    if free is None or free * 0.95 > OBJECT_STORE_BYTES:  # Ray itself takes at most 95%
        return None
    mend = "make it larger (`mount -o remount,size=1G /dev/shm`, `docker run --shm-size=1g`)"
    wanted = OBJECT_STORE_BYTES / 0.95 / 1e6
    return f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, Ray wants {wanted:.0f}: it uses a file instead; {mend}"


def token_warning() -> str | None:
    """Return the warning that other users of this machine can read the user's token of Ray clusters."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    if not readable_by_others(path):
        return None
    return f"{path} can be read by other users of this machine, who could run code as you: chmod 600 {path}"


@contextmanager
def session_folder(parent: Path) -> Iterator[Path]:
    """Make a folder of mode 0700, locked while the context is open, then removed; remove those of killed runs first."""
    _remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        _remove(folder)


def short_folder(longest: int = LONGEST_FOLDER) -> Path:
    """Return the first folder for temporary files that is writable and leaves room for the paths of sockets.

    Raises:
        InputError: There is none.
    """
    for place in (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp", "/var/tmp"):
        folder = Path(place or "").absolute()
        length = len(os.fsencode(folder / f"{PREFIX}12345678"))
        if place and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) and length <= longest:
            return folder
    mend = "no folder for temporary files is writable and short enough for Ray's sockets: set TMPDIR"
    raise InputError(None, "compute.ray", "local", mend)


def _remove_leftovers(parent: Path) -> None:
    """Remove the session folders of this user's killed processes, whose locks are free."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.geteuid() or time() - status.st_mtime < UNUSED_SECONDS:
                continue
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder in which processes that end may still make files."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        sleep(0.1)


@contextmanager
def _own_token(token: Path) -> Iterator[None]:
    """Have Ray ask for the token of a file, and pass on its path to the processes that it starts."""
    former = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    _forget_token()
    try:
        yield
    finally:
        _restore(former)


def _restore(former: Mapping[str, str | None]) -> None:
    for name, value in former.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _forget_token() -> None:
    """Have Ray read its token again: it keeps the first one while the process lives, and no public API resets it."""
    from ray import _raylet

    _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray listen on 127.0.0.1 alone, as it does on systems where it supports one machine only.

    `ray.init(_node_ip_address="127.0.0.1")` is replaced by the machine's address; no public argument keeps loopback.
    """
    from ray._private import ray_constants

    former, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = former
