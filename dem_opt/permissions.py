"""Permissions of files and folders: what another user of this machine could read or replace."""

import functools
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

OTHERS_READ = stat.S_IRGRP | stat.S_IROTH
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_SEARCH = stat.S_IXGRP | stat.S_IXOTH


def make_private_folder(path: Path) -> Path:
    """Make a folder that its owner alone can enter, where it is missing; close one of this user's that is open."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077 and not status.st_mode & OTHERS_WRITE:
        path.chmod(0o700)
    return path


def replaceable(path: Path) -> Path | None:
    """Return the first of a file and its folders through which another user could change the file; None if no one can.

    Each must belong to this user or to root and be writable for nobody else (a group of this user alone excepted).  A
    folder with the sticky bit (/tmp) may be writable: its entries belong to their owners.

    Raises:
        OSError: The file, or one of its folders, is missing.
    """
    return next((part for part in _with_folders(path) if _is_open(part.lstat())), None)


def world_writable(path: Path) -> Path | None:
    """Return the first of a file and its folders that every user may write to; None if there is no such one.

    Raises:
        OSError: The file, or one of its folders, is missing.
    """
    return next((part for part in _with_folders(path) if _is_writable(part.lstat(), stat.S_IWOTH)), None)


def readable_by_others(path: Path) -> bool:
    """Return whether another user can read a file: by its mode, and by being let into its folders."""
    try:
        file, *folders = _with_folders(path)
        return bool(file.stat().st_mode & OTHERS_READ) and all(f.stat().st_mode & OTHERS_SEARCH for f in folders)
    except OSError:
        return False


def _with_folders(path: Path) -> Iterator[Path]:
    resolved = path.resolve(strict=True)
    return iter((resolved, *resolved.parents))


def _is_open(status: os.stat_result) -> bool:
    writers = stat.S_IWOTH if _is_private_group(status.st_gid, os.geteuid()) else OTHERS_WRITE
    return status.st_uid not in {0, os.geteuid()} or _is_writable(status, writers)


def _is_writable(status: os.stat_result, who: int) -> bool:
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return bool(status.st_mode & who) and not sticky


@functools.cache
def _is_private_group(group: int, user: int) -> bool:
    """True if a group is the user's alone: many systems give everyone such a group, and a umask that lets it write."""
    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}
