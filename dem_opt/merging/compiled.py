"""The merge kernel in C++, compiled on this machine at first use; without a compiler there is none, and why is told."""

import ctypes
import functools
import os
import platform
import shlex
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shutil import which
from time import perf_counter, time

from dem_opt.atomic import staged_file
from dem_opt.checkpoints.files import cache_folder

SOURCE = Path(__file__).with_name("kernel.cpp")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
"""Contraction would fuse a product and a sum into one rounding where a vector is full, and not in its tail."""

_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120

UNUSED_SECONDS = 30 * 24 * 3600
"""Libraries of other sources, compilers and processors that were not used for so long go when another is compiled."""


class Term(ctypes.Structure):
    """A term of a merge, as kernel.cpp has it: addresses of values and scales, the type's number, the coefficient."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("weight", ctypes.c_float),
    )


@dataclass(frozen=True)
class Native:
    """The compiled kernel, or why there is none.

    merge    `dem_merge` of kernel.cpp; None where it could not be compiled
    note     what became of it, for people
    seconds  what compiling or loading it took
    """

    merge: "ctypes._NamedFuncPointer | None"
    note: str
    seconds: float


@functools.cache
def native() -> Native:
    """The kernel of this process: compiled into the user's cache folder, or found there."""
    began = perf_counter()
    try:
        command, file = _library()
        found = file.is_file()
        if found:
            with suppress(OSError):
                os.utime(file)
        else:
            _compile(command, file)
            _forget(file.parent)
        merge = ctypes.CDLL(str(file)).dem_merge
    except (OSError, subprocess.SubprocessError) as error:
        return Native(None, _missing(error), perf_counter() - began)
    merge.restype = None
    merge.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    )
    note = f"the merge kernel was {'compiled before' if found else 'compiled'} by {command[0]}"
    return Native(merge, note, perf_counter() - began)


def outlook() -> str:
    """What `native` will find, for people; compiles and loads nothing."""
    try:
        command, file = _library()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{_missing(error)}; torch's operations do it in threads, slower, with the same bits"
    if file.is_file():
        return f"the merge kernel was compiled before by {command[0]}"
    return f"the merge kernel is compiled by {command[0]} at first use, which takes some seconds once"


def _library() -> tuple[list[str], Path]:
    """The compiler's command, and where the library that it makes lies or is to lie."""
    command = _compiler()
    return command, cache_folder() / f"kernel-{_digest(command)}.so"


def _missing(error: Exception) -> str:
    return f"the merge kernel is not compiled: {_reason(error)}"


def _compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, or the first that is found."""
    command = shlex.split(os.environ.get("CXX", "")) or [name for name in _COMPILERS if which(name)][:1]
    if not command:
        raise FileNotFoundError(f"no C++ compiler ({', '.join(_COMPILERS)} or $CXX) is here")
    return command


def _digest(command: list[str]) -> str:
    """What the library depends on: source, flags, compiler and processor, since a home may be shared by several."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS)
    parts = (SOURCE.read_text(encoding="utf-8"), FLAGS, version.stdout, platform.machine(), _features())
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _features() -> str:
    """What the processor can do, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compile(command: list[str], file: Path) -> None:
    """Make the library under another name, and give it its own when it is whole."""
    with staged_file(file) as partial:
        whole = [*command, *FLAGS, str(SOURCE), "-o", str(partial)]
        subprocess.run(whole, capture_output=True, text=True, check=True, timeout=_SECONDS)


def _forget(folder: Path) -> None:
    """Remove libraries that nobody used for long; those that can't be removed stay."""
    for file in folder.glob("kernel-*.so"):
        with suppress(OSError):
            if time() - file.stat().st_mtime > UNUSED_SECONDS:
                file.unlink()


def _reason(error: Exception) -> str:
    """What went wrong, in a line: of a compiler's errors the first."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
