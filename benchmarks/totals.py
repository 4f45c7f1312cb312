"""Cost of a sum of 1, and a search over a range of totals that avoids it: `python benchmarks/totals.py FOLDER`.

Makes a world of `landscapes` in FOLDER: fine-tunes of one base with short and long vectors, whose best totals differ.
On each, every algorithm searches the coefficients with totals from 0 to 4, and the default those with a total of 1.
Prints regret in nats per token by forward-equivalents (one composite each: nothing races), against the
best composite that was measured with any total, and the price of a total of 1 that a step from the winner predicts.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import optuna
import torch
from landscapes import Landscape, four, make_landscape
from search import Curve, opened, quartiles, say

from dem_opt.search.samplers.cmaes import CMAES
from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.optuna_sampler import OptunaSampler, tpe
from dem_opt.search.samplers.proposer import Proposer
from dem_opt.search.samplers.simplex_gp import SimplexGP
from dem_opt.search.samplers.uniform import Uniform
from dem_opt.simplex import Coefficients, Space

SEEDS = 2
TRIALS = 30
MARKS = (8, 12, 16, 20, 24, 30)
TUNES = {"3 steps, rate 1e-4": (3, 1e-4), "10, 1e-4": (10, 1e-4), "25, 1e-4": (25, 1e-4), "50, 1e-3": (50, 1e-3)}
"""Steps and learning rates of fine-tunes: three times short vectors, and the quickstart's."""

EVALUATION = {"window": 128, "windows": 8, "held_out": 8, "seed": 0}
"""Half of the quickstart's windows: the landscape is what is searched, whatever its windows say of other text."""

ALGORITHMS = {
    "simplex-gp": lambda space: SimplexGP(space),
    "TPE": lambda space: OptunaSampler(space, tpe),
    "CMA-ES": lambda space: CMAES(space),
    "random": lambda space: Uniform(space),
}


@dataclass(frozen=True)
class Measured:
    """Measurements on a landscape.

    curves     by algorithm, one a seed; "simplex-gp, total 1" is the simplex
    best       the best objective of all composites with a total of 1, and of all, in nats per token
    total      the total of the best of all
    """

    name: str
    curves: Mapping[str, tuple[Curve, ...]]
    best: tuple[float, float]
    total: float


def explore(landscape: Landscape, path: Path) -> Measured:
    """Search the range with every algorithm, and the simplex."""
    torch.set_num_threads(1)
    began, values = perf_counter(), dict[Coefficients, float]()
    names = tuple(landscape.tunes)
    anywhere, simplex = Space(names, float(len(names)), 0.0), Space(names)
    with opened(path) as (_, _, measure):

        def objective(point: Coefficients) -> float:
            values.setdefault(point, measure(point))
            return values[point]

        curves = {
            name: tuple(search(make(anywhere), objective, seed) for seed in range(SEEDS))
            for name, make in ALGORITHMS.items()
        }
        curves["simplex-gp, total 1"] = tuple(search(SimplexGP(simplex), objective, seed) for seed in range(SEEDS))
    best = min(values, key=values.__getitem__)
    on_simplex = min(value for point, value in values.items() if simplex.contains(point))
    say(f"{landscape.name}: {perf_counter() - began:.0f} s; best {best} {values[best]:.5f}; total 1: {on_simplex:.5f}")
    return Measured(landscape.name, curves, (on_simplex, values[best]), sum(best.values()))


def search(proposer: Proposer, objective: Callable[[Coefficients], float], seed: int) -> Curve:
    """One search, a composite at a time."""
    best, asks, history = [], [], list[Trial]()
    for number in range(TRIALS):
        began = perf_counter()
        point = proposer.propose(history, [], np.random.default_rng([seed, number])).coefficients
        asks.append(perf_counter() - began)
        history.append(Trial(number, point, "complete", objective=objective(point)))
        best.append(min(trial.objective for trial in history if trial.objective is not None))
    return Curve(tuple(range(1, TRIALS + 1)), tuple(best), float(np.median(asks)))


def regret_table(results: Sequence[Measured]) -> list[list[str]]:
    """Regret by algorithm and mark: median and quartiles over landscapes and seeds."""
    rows = [["algorithm", *(f"{mark} FE" for mark in MARKS), "ask, s"]]
    for name in results[0].curves:
        curves = [(curve, result.best[1]) for result in results for curve in result.curves[name]]
        cells = [quartiles([curve.at(mark) - best for curve, best in curves]) for mark in MARKS]
        rows.append([name, *cells, f"{np.median([curve.ask_seconds for curve, _ in curves]):.2f}"])
    return rows


def main() -> None:
    """All landscapes, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    landscapes = [Landscape(f"{steps}-{rate:g}", 0, four(steps, 0, rate)) for steps, rate in TUNES.values()]
    results = []
    for landscape in landscapes:
        path = make_landscape(landscape, arguments.folder, say, evaluation=EVALUATION)
        results.append(explore(landscape, path))
        say("\n".join("| " + " | ".join(row) + " |" for row in regret_table(results[-1:])))
    say("\nRegret, nats per token: median [quartiles]\n")
    for row in regret_table(results):
        say("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
