"""Cost and time of `simplex-gp` by the number of trials under way: `python benchmarks/in_flight.py`.

A proposal does not know the scores of the M - 1 trials that are under way when it is made.  Trials are told in the
order in which they were proposed, so W workers have work where M > W though the oldest trial takes longest.  For each W
and M, forward-equivalents (FE) to the regrets of LEVELS on the losses of `rivals.py`, and the time until then in
forward passes of one worker.  Proposals take no time here: `benchmarks/ask.py` measures what they take.
"""

import argparse
from collections.abc import Sequence
from itertools import accumulate
from math import inf

from rivals import BUDGET, KINDS, LEVELS, REPORTED, Landscape, Step, cell, searched

UNDER_WAY = {1: (1, 2), 2: (2, 3, 4), 4: (4, 5, 8), 8: (8, 9, 16)}
"""Trials under way, by workers: one for each, one more, and two for each."""


def steps_of(landscape: Landscape, gradients: bool, under_way: int) -> list[Step]:
    """Cost and regret of each trial, until the lowest level or the budget."""
    steps, spent = list[Step](), 0.0
    for cost, value in searched(landscape, "simplex-gp", gradients, True, in_flight=under_way):
        steps.append((cost, value - landscape.lowest))
        spent += cost
        if spent > BUDGET or steps[-1][1] <= LEVELS[-1]:
            break
    return steps


def ends_of(costs: Sequence[float], workers: int, under_way: int) -> list[float]:
    """Time at which each trial ends: trial n begins when trials 0 to n - M have ended and a worker is free."""
    free, ends, told = [0.0] * workers, list[float](), list[float]()
    for number, cost in enumerate(costs):
        proposed = told[number - under_way] if number >= under_way else 0.0
        worker = min(range(workers), key=free.__getitem__)
        free[worker] = max(free[worker], proposed) + cost
        ends.append(free[worker])
        told.append(max(ends[-1], told[-1] if told else 0.0))
    return ends


def until(steps: Sequence[Step], spent: Sequence[float], level: float) -> float:
    """Cost or time at which a regret was first reached; infinite where it never was."""
    return min((after for (_, regret), after in zip(steps, spent, strict=True) if regret <= level), default=inf)


def print_rows(name: str, landscapes: Sequence[Landscape], gradients: bool) -> None:
    """Print a line for each number of workers and of trials under way."""
    known: dict[int, list[list[Step]]] = {}
    for workers, counts in UNDER_WAY.items():
        for count in counts:
            if count not in known:
                known[count] = [steps_of(landscape, gradients, count) for landscape in landscapes]
            cells = []
            for level in LEVELS:
                costs = [[cost for cost, _ in steps] for steps in known[count]]
                spent = [list(accumulate(own)) for own in costs]
                times = [ends_of(own, workers, count) for own in costs]
                for each in (spent, times):
                    found = [until(steps, own, level) for steps, own in zip(known[count], each, strict=True)]
                    cells.append(cell(found))
            print(f"| {name} | {workers} | {count} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """A table of forward-equivalents and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    measured = [f"{level:g}: {what}" for level in LEVELS for what in ("FE", "time")]
    columns = ["distributions", "workers", "under way", *measured]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for size in arguments.sizes:
        landscapes = [Landscape(kind, size, REPORTED + seed) for kind in KINDS for seed in range(arguments.seeds)]
        for name, gradients in (("values", False), ("probes", True))[size > 6 :]:
            print_rows(f"{size}, {name}", landscapes, gradients)


if __name__ == "__main__":
    main()
