"""Write files and folders whole or not at all: under another name beside their place, renamed when complete.

A reader, or a process killed at any moment, sees the old content or the new, never a part.  What is published has the
permissions that the process's umask gives a new file, whatever library wrote it (safetensors writes with mode 600).
A symbolic link is written through: it stays, and what it points to is replaced.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from dem_opt.errors import InputError

PATIENCE = 900.0
"""Seconds for which another process may write nothing before it is not waited for any longer."""

POLL = 0.2
"""Seconds between two attempts to lock a folder."""


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under; the file replaces `path` at the end of the block.

    After an exception nothing is left of it.  The folder of `path` is made where it is missing.
    """
    path = _behind_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; its folder is made where it is missing."""
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_new(partial: Path, path: Path) -> None:
    """Move a file to `path` unless that exists, also where several processes do so at once.

    A hard link fails where the name is taken, which a rename does not; file systems without links get a rename.
    """
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return
    except OSError:
        if not path.exists():
            partial.rename(path)


@contextmanager
def staged_folder(path: Path, wait: bool = False) -> Iterator[Path]:
    """The empty folder `.NAME.partial` beside `path`, which `publish_folder` moves to its place.

    What is still there at the end of the block, or was left by a killed process, is removed.

    Args:
        path: The folder to be made.
        wait: Wait for another process that is making the same folder.

    Raises:
        InputError: Another process is making it, and this one does not wait, or has waited for `PATIENCE` seconds in
            which nothing was written.
    """
    partial, former = _beside(path)
    lock = _make_alone(partial, path, wait)
    try:
        _settle(path, former)
        yield partial
    finally:
        if _is_of(lock, partial):
            shutil.rmtree(partial, ignore_errors=True)
        _settle(path, former)
        os.close(lock)


def publish_folder(partial: Path, path: Path) -> None:
    """Move a staged folder to `path`, in the place of a folder of that name, which is removed.

    A folder can't be replaced by one rename.  A process killed between the two leaves `.NAME.former`, which the next
    `staged_folder` moves back.
    """
    _follow_umask(partial)
    path = _behind_link(path)
    _, former = _beside(path)
    if path.exists():
        path.rename(former)
    partial.rename(path)


def link_or_copy(source: str | Path, target: str | Path) -> str | Path:
    """Hard-link a file, or copy it where links are not supported; a copy function for `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def last_write(folder: Path) -> int:
    """Time of the last change in a folder, in nanoseconds; its files may be replaced meanwhile."""
    latest = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            latest = max(latest, path.stat().st_mtime_ns)
    return latest


def _behind_link(path: Path) -> Path:
    """Where a symbolic link points to; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a folder is made, and where the one that it replaces is kept meanwhile."""
    path = _behind_link(path)
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")


def _make_alone(partial: Path, path: Path, wait: bool) -> int:
    """Make an empty folder that no other process works in; return the lock, which ends with this process."""
    written, since = -1, time.monotonic()
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if not wait:
                raise InputError(path, None, None, "another process is writing it; wait for it") from None
            if (latest := last_write(partial)) != written:
                written, since = latest, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                mend = "continue it (kill -CONT), or end it, then try again"
                reason = f"another process is writing it, and has written nothing for {PATIENCE:.0f} s: {mend}"
                raise InputError(path, None, None, reason) from None
            time.sleep(POLL)
            continue
        except OSError:
            pass  # some network file systems lock no folders
        # The former holder may have moved or removed the folder while this process waited.
        if _is_of(lock, partial):
            break
        os.close(lock)
    for left in partial.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return lock


def _is_of(lock: int, folder: Path) -> bool:
    """The folder is there, and the one that was locked."""
    try:
        return os.path.samestat(os.fstat(lock), folder.stat())
    except FileNotFoundError:
        return False


def _settle(path: Path, former: Path) -> None:
    """Bring `path` back if it was moved aside for nothing, and remove what it replaced."""
    path = _behind_link(path)
    if former.is_dir() and not path.exists():
        former.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def _flush(file: Path) -> None:
    """Have the content on disk before the name: a rename that survives a power failure alone names an empty file."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _follow_umask(folder: Path) -> None:
    """Give the files of a folder the mode of a new file."""
    # os.umask reads the mask only by setting it, for all threads: a file that is made shows it without.
    probe = folder / f".{uuid4().hex[:8]}.mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)
