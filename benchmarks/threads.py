"""Time matrix products whose threads spin or sleep while they wait, on quiet cores and on busy ones.

    python benchmarks/threads.py [--busy N]

OpenMP's threads wait for each other at the end of every product.  By default they spin for milliseconds first (unset),
with `passive` they sleep at once, with `spin 1000` they spin for microseconds, as in workers of dem_opt.  Each policy
has a process of its own, in turn, once beside nothing and once beside N busy processes, as many as cores unless given.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median

POLICIES: Mapping[str, Mapping[str, str]] = {
    "unset": {},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
}
PRODUCTS = {"1024 x 576 x 1536": (1024, 576, 1536, 40), "64 x 160 x 160": (64, 160, 160, 1000)}
"""Rows, inner and outer width, and products in a measurement: of SmolLM2-135M and of the quickstart's model."""

ROUNDS = 3
LIMIT = 30.0
"""Seconds after which a process is ended, and its figures are missing."""

TIMED = """
import sys, time, torch
rows, inner, outer, count = map(int, sys.argv[1:])
torch.set_num_threads(torch.get_num_threads())
left, right = torch.randn(rows, inner), torch.randn(inner, outer)
for _ in range(3):
    left @ right
began = time.perf_counter()
for _ in range(count):
    left @ right
print((time.perf_counter() - began) / count)
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but count."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def microseconds(environment: Mapping[str, str], sizes: tuple[int, ...]) -> float:
    """Wall time of one product; infinite where the measurement does not end."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", TIMED, *map(str, sizes)]
    try:
        ended = subprocess.run(
            command, env=variables | dict(environment), capture_output=True, text=True, check=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return float("inf")
    return 1e6 * float(ended.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--busy", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    print(f"microseconds of a product, median [least, most] of {ROUNDS}")
    for others in (0, arguments.busy):
        with busy(others):
            for name, sizes in PRODUCTS.items():
                spent: dict[str, list[float]] = {policy: [] for policy in POLICIES}
                for _ in range(ROUNDS):
                    for policy, environment in POLICIES.items():
                        spent[policy].append(microseconds(environment, sizes))
                for policy, times in spent.items():
                    span = f"{median(times):10,.0f} [{min(times):,.0f}, {max(times):,.0f}]"
                    print(f"{others:3} busy processes  {name:18} {policy:9} {span}", flush=True)


if __name__ == "__main__":
    main()
