"""Compile kernel.cpp on this machine at first use, and load it.

The shared library is cached for the user under a digest of everything that its machine code depends on.  Without a
compiler there is no library, and `CompiledKernel.description` says why.
"""

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

# Without -ffp-contract=off the compiler fuses  sum + w x  into one rounding in the vectorized loop but not in its
# tail, so that a value's bits would depend on its position.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")

_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 120

UNUSED_SECONDS = 30 * 24 * 3600
"""Age since last use after which the libraries of other sources, compilers or processors are deleted."""


class Term(ctypes.Structure):
    """One term of a merge, laid out as `struct Term` of kernel.cpp.

    Attributes:
        values: Address of the values.
        scale: Address of the float32 scale of each row; null for values that are not int8.
        type: The values' dtype, by kernel.cpp's number.
        weight: The coefficient.
    """

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("weight", ctypes.c_float),
    )


@dataclass(frozen=True)
class CompiledKernel:
    """The compiled kernel of this process, or the reason why there is none.

    Attributes:
        merge: `dem_merge` of kernel.cpp; None where it could not be compiled or loaded.
        description: One clause for users: compiled by which compiler, or why not.
        seconds: Time that compiling or loading took.
    """

    merge: "ctypes._NamedFuncPointer | None"
    description: str
    seconds: float


@functools.cache
def compiled_kernel() -> CompiledKernel:
    """Compile the kernel into the user's cache folder, or load the library that is cached there."""
    started = perf_counter()
    try:
        command, library = _library()
        cached = library.is_file()
        if cached:
            with suppress(OSError):
                os.utime(library)
        else:
            _compile(command, library)
            _delete_unused(library.parent)
        merge = ctypes.CDLL(str(library)).dem_merge
    except (OSError, subprocess.SubprocessError) as error:
        return CompiledKernel(None, _not_compiled(error), perf_counter() - started)
    merge.restype = None
    merge.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    )
    description = f"the merge kernel was {'compiled before' if cached else 'compiled'} by {command[0]}"
    return CompiledKernel(merge, description, perf_counter() - started)


def expected_compiled_kernel() -> str:
    """Describe what `compiled_kernel` will return, without compiling or loading anything."""
    try:
        command, library = _library()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{_not_compiled(error)}; merges run as torch operations in threads: slower, with the same bits"
    if library.is_file():
        return f"the merge kernel was compiled before by {command[0]}"
    return f"the merge kernel will be compiled by {command[0]} at first use, which takes a few seconds once"


def _library() -> tuple[list[str], Path]:
    """The compiler's command, and the path of the library that it makes."""
    command = _compiler()
    return command, cache_folder() / f"kernel-{_digest(command)}.so"


def _not_compiled(error: Exception) -> str:
    return f"the merge kernel is not compiled: {_first_error(error)}"


def _compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, or the first of the usual names on the PATH."""
    command = shlex.split(os.environ.get("CXX", "")) or [name for name in _COMPILERS if which(name)][:1]
    if not command:
        raise FileNotFoundError(f"no C++ compiler found ({', '.join(_COMPILERS)} or $CXX)")
    return command


def _digest(command: list[str]) -> str:
    """Hash of source, flags, compiler and processor: machines of different kinds may share a home folder."""
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS
    )
    parts = (SOURCE.read_text(encoding="utf-8"), FLAGS, version.stdout, platform.machine(), _processor_features())
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _processor_features() -> str:
    """The processor's instruction sets, which -march=native compiles for; its name where the system lists none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compile(command: list[str], library: Path) -> None:
    """Write the library beside its place and rename it, so that no process loads half of one."""
    with staged_file(library) as partial:
        full_command = [*command, *FLAGS, str(SOURCE), "-o", str(partial)]
        subprocess.run(full_command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS)


def _delete_unused(folder: Path) -> None:
    """Delete libraries that have not been used for UNUSED_SECONDS, where permissions allow it."""
    for library in folder.glob("kernel-*.so"):
        with suppress(OSError):
            if time() - library.stat().st_mtime > UNUSED_SECONDS:
                library.unlink()


def _first_error(error: Exception) -> str:
    """The first error line of a compiler's output, else the first line of the exception."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
