"""This machine's memory and speed, as far as workers depend on them."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

PROCESS_BYTES = 450 * 10**6
"""RSS of a worker's process with Python, torch, transformers and Ray before it loads anything (Linux)."""

GPU_CONTEXT_BYTES = 600 * 10**6
"""Bytes that a process takes on a GPU before it stores anything: CUDA's context and the libraries' kernels.  Not
measured: a round number above what is usual."""

PROBES = 10
"""Probes of a machine's speed, one after the other: on a busy machine they tell how far one may be off."""

_PROBE_SECONDS = 0.1

# Control groups of version 2 and 1, under /sys/fs/cgroup: files with the limit and the use, the file with details, and
# the detail that counts cached files.
_CONTAINERS: Sequence[tuple[str, str, str, str]] = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "cache"),
)

# float32 numbers copied to time memory: 64 MB, more than caches hold.
_COPIED = 2**24


@dataclass(frozen=True)
class Machine:
    """Memory for workers on this machine.

    Attributes:
        device: "cuda" where there is a GPU, else "cpu".
        devices: Number of GPUs; 1 on a CPU.
        total: Bytes of the smallest GPU, or of RAM (or of the container's share of it).
        available: Bytes of it that are free now; files cached in RAM count as free.
    """

    device: str
    devices: int
    total: int
    available: int


@dataclass(frozen=True)
class Speed:
    """Speed of a worker.

    Attributes:
        source: How it is known, for users.
        flops: Floating-point operations a second of a matrix product in the evaluation's dtype.
        bandwidth: Bytes a second, read and written.
        token_seconds: Measured seconds of an evaluation (merge and score) for each forward token; None where there was
            none yet.
        low: The least that the same work may take, as a factor of the expected seconds: by the fastest measurements.
        high: The most that it may take, by the slowest of them.
    """

    source: str
    flops: float
    bandwidth: float
    token_seconds: float | None = None
    low: float = 1.0
    high: float = 1.0


def this_machine() -> Machine:
    """Measure the memory of this machine: of its GPUs where torch finds any, else RAM."""
    if torch.cuda.is_available():
        memory = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return Machine("cuda", len(memory), min(total for _, total in memory), min(free for free, _ in memory))
    return Machine("cpu", 1, *_ram())


def available_memory() -> int:
    """Bytes of RAM that are free now on this machine."""
    return _ram()[1]


def probe(device: str, dtype: str, inner: int, outer: int) -> Speed:
    """Time a matrix product of the model's shapes and a copy on this machine, PROBES times for 0.1 s each.

    The product is  [rows, inner] x [inner, outer] , each cut to a size that takes a few hundredths of a second.
    """
    rows, most = (512, 2048) if device == "cpu" else (8192, 8192)
    inner, outer = min(inner, most), min(outer, most)
    left = torch.ones(rows, inner, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(inner, outer, dtype=left.dtype, device=device)
    flat = torch.ones(_COPIED, dtype=torch.float32, device=device)
    into = torch.empty_like(flat)
    products, copies = list[float](), list[float]()
    for _ in range(PROBES):
        products.append(_timed(lambda: torch.matmul(left, right), device))
        copies.append(_timed(lambda: into.copy_(flat), device))
    product = median(products)
    return Speed(
        f"a matrix product and a copy, timed {PROBES} times now",
        flops=2 * rows * inner * outer / product,
        bandwidth=2 * flat.nbytes / median(copies),
        low=min(products) / product,
        high=max(products) / product,
    )


def _timed(work: Callable[[], object], device: str) -> float:
    """Median seconds of a call, without the first one, over _PROBE_SECONDS."""
    spent: list[float] = []
    began = perf_counter()
    while len(spent) < 2 or perf_counter() - began < _PROBE_SECONDS:
        started = perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(perf_counter() - started)
    return median(spent[1:])


def _ram() -> tuple[int, int]:
    """Bytes of RAM, total and available, of this machine or of the container that the process runs in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = total
    if sys.platform == "linux":
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = {words[0]: int(words[1]) for words in lines}["MemAvailable:"] * 1024
    limits = (_container(*names) for names in _CONTAINERS)
    for limit, free in (memory for memory in limits if memory is not None):
        total, available = min(total, limit), min(available, free)
    return total, available


def _container(limit: str, use: str, stat: str, files: str) -> tuple[int, int] | None:
    """Limit and free bytes of a control group; None where there is no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        most, used = int((root / limit).read_text()), int((root / use).read_text())
        counts = dict(line.split() for line in (root / stat).read_text().splitlines())
    except (OSError, ValueError):
        return None
    return most, max(most - used + int(counts.get(files, 0)), 0)
