"""Compile kernel.cpp on this machine at first use, and load it.

The shared library is cached for the user under a digest of everything that its machine code depends on, and a digest
of its own content.  It is machine code: it is loaded only if no other user can write to it or to a folder on its path,
and if its content has that digest.  Without a compiler there is no library, and `CompiledKernel.description` says why.
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
from shutil import rmtree, which
from tempfile import TemporaryDirectory
from time import perf_counter, time

from dem_opt.checkpoints.user_cache import cache_folder
from dem_opt.permissions import make_private_folder, replaceable

SOURCE = Path(__file__).with_name("kernel.cpp")

# Without -ffp-contract=off the compiler fuses  sum + w x  into one rounding in the vectorized loop but not in its
# tail, so that a value's bits would depend on its position.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")

_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 120

_COMPILING = ".compiling-"
"""Beginning of the names of folders in which a compiler works."""

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


class Run(ctypes.Structure):
    """A run of neighbouring elements with the same terms, laid out as `struct Run` of kernel.cpp.

    Attributes:
        end: First element behind it.
        first: Number of its first term.
        count: Number of its terms; with none its elements are left as they are.
    """

    _fields_ = (("end", ctypes.c_int64), ("first", ctypes.c_int64), ("count", ctypes.c_int64))


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
    """Compile the kernel into the user's cache folder, or load the library that is cached there.

    Where other users can write to the cache folder, the kernel is compiled for this process alone.
    """
    started = perf_counter()
    try:
        library, description = _load()
        merge = library.dem_merge
    except (OSError, subprocess.SubprocessError) as error:
        return CompiledKernel(None, _not_compiled(error), perf_counter() - started)
    merge.restype = None
    merge.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    )
    return CompiledKernel(merge, f"the merge kernel was {description}", perf_counter() - started)


def expected_compiled_kernel() -> str:
    """Describe what `compiled_kernel` will return, without compiling or loading anything."""
    try:
        command, digest = _compiler_and_digest()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{_not_compiled(error)}; merges run as torch operations in threads: slower, with the same bits"
    folder = cache_folder()
    if fault := _fault(folder):
        return f"the merge kernel will be compiled by {command[0]} in every process, which takes seconds each: {fault}"
    if _cached(folder, digest):
        return f"the merge kernel was compiled before by {command[0]}"
    return f"the merge kernel will be compiled by {command[0]} at first use, which takes a few seconds once"


def _load() -> tuple[ctypes.CDLL, str]:
    """The library, and how it came about."""
    command, digest = _compiler_and_digest()
    folder = cache_folder()
    with suppress(OSError):
        make_private_folder(folder)
    if fault := _fault(folder):
        with TemporaryDirectory(prefix="dem_opt-kernel-") as temporary:
            if replaceable(Path(temporary)):
                raise PermissionError(f"{fault}; and other users can write to {Path(temporary).parent}")
            library = ctypes.CDLL(str(_compile(command, digest, Path(temporary))))  # stays mapped when it is deleted
        return library, f"compiled by {command[0]} for this process alone: {fault}"
    if path := _cached(folder, digest):
        with suppress(OSError):
            os.utime(path)
        return ctypes.CDLL(str(path)), f"compiled before by {command[0]}"
    path = _compile(command, digest, folder)
    _delete_unused(folder)
    return ctypes.CDLL(str(path)), f"compiled by {command[0]}"


def _compiler_and_digest() -> tuple[list[str], str]:
    command = _compiler()
    return command, _digest(command)


def _fault(folder: Path) -> str | None:
    """Say why no machine code can be kept in a folder, which may be missing; None where it can."""
    existing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if culprit := replaceable(existing):
        return f"other users can write to {culprit} (`chmod go-w`, and be its owner)"
    return None if os.access(existing, os.W_OK) else f"{existing} can't be written to"


def _cached(folder: Path, digest: str) -> Path | None:
    """The library of a digest that no other user can write to and whose content is that of its name."""
    for path in folder.glob(f"kernel-{digest}-*.so"):
        if not path.is_symlink() and replaceable(path) is None and path.name == _name(digest, path):
            return path
    return None


def _name(digest: str, library: Path) -> str:
    """File name of a library: digest of what it was compiled from, and digest of its content."""
    return f"kernel-{digest}-{sha256(library.read_bytes()).hexdigest()[:32]}.so"


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


def _compile(command: list[str], digest: str, folder: Path) -> Path:
    """Compile in a folder of its own and move the library to its place, so that no process loads half of one."""
    with TemporaryDirectory(prefix=_COMPILING, dir=folder) as temporary:
        partial = Path(temporary, "kernel.so")
        full_command = [*command, *FLAGS, str(SOURCE), "-o", str(partial)]
        subprocess.run(full_command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS)
        partial.chmod(0o700)  # a umask of 002 lets the group write
        return partial.replace(folder / _name(digest, partial))


def _delete_unused(folder: Path) -> None:
    """Delete libraries, and what killed compilations left, that have not been used for UNUSED_SECONDS."""
    for path in (*folder.glob("kernel-*.so"), *folder.glob(f"{_COMPILING}*")):
        with suppress(OSError):
            if time() - path.lstat().st_mtime > UNUSED_SECONDS:
                rmtree(path) if path.is_dir() else path.unlink()


def _first_error(error: Exception) -> str:
    """The first error line of a compiler's output, else the first line of the exception."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
