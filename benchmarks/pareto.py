"""Hypervolume of searched fronts against cost: `python benchmarks/pareto.py STUDY`.

STUDY has been searched with a grid, as the quickstart's is: its losses between the grid's points are those of a
Gaussian process through all that was measured, so an evaluation costs nothing.  Landscapes are all pairs of its
corpora, and each corpus against the mean; beside them quadratics over eight distributions.  Each trial is charged one
forward-equivalent, first observations too.

The missing hypervolume is that of the best known front minus that of the trials so far, as a share of the best known;
the reference point is the worst vertex on each loss.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from dem_opt import config
from dem_opt.pareto import MEAN, Axes, hypervolume, make_axis
from dem_opt.search.samplers import gp, make_proposer, propose
from dem_opt.search.samplers.history import Trial
from dem_opt.search.trials import coefficients_of, recall
from dem_opt.simplex import Space, project
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import opened
from dem_opt.types import SEARCH

Array = NDArray[np.float64]

ALGORITHMS = {"expected hypervolume improvement": "simplex-gp", "NSGA-II": "nsga2", "TPE": "tpe", "random": "random"}
MARKS = (10, 12, 16, 20, 30, 40)
EIGHT = tuple(f"d{number}" for number in range(8))
WEIGHTS = 40
"""Weighted sums whose minima are points of the best known front."""


@dataclass(frozen=True)
class Landscape:
    """Two losses of shares: [N, F] to [N, 2]."""

    name: str
    space: Space
    losses: Callable[[Array], Array]

    @property
    def reference(self) -> tuple[float, float]:
        """The worst vertex on each loss."""
        vertices_NF = np.array([self.space.shares(vertex) for vertex in self.space.vertices()])
        first, second = self.losses(vertices_NF).max(axis=0)
        return float(first), float(second)


def measured(path: Path) -> Iterator[Landscape]:
    """The pairs of a study's corpora, and each corpus with the mean."""
    study = config.load(path)
    with opened(study.storage) as engine:
        ledger = Ledger(engine)
        row = ledger.study(study.name)
        assert row is not None
        identity = StudyIdentity.recall(row.identity, row.scoring)
        scored = {
            point: scores
            for composite in ledger.composites(identity.scoring)
            if (point := coefficients_of(identity, composite)) is not None
            and len(scores := recall(ledger, identity, composite, SEARCH)) == len(identity.weights)
        }
    points_NF = np.array([identity.space.shares(point) for point in scored])
    processes = {
        name: gp.fit(gp.observe(points_NF, np.array([scores[name].nll for scores in scored.values()])))
        for name in identity.weights
    }
    for names in [*combinations(identity.weights, 2), *((name, MEAN) for name in identity.weights)]:
        first, second = (make_axis(name, identity.weights) for name in names)
        yield Landscape(" and ".join(names), identity.space, interpolated(processes, (first, second)))


def interpolated(processes: dict[str, gp.GaussianProcess], axes: Axes) -> Callable[[Array], Array]:
    """Losses as means of processes."""

    def losses(shares_NF: Array) -> Array:
        means = {name: process.mean(shares_NF) for name, process in processes.items()}
        return np.stack([sum(axis.weights[name] * means[name] for name in axis.weights) for axis in axes], axis=1)

    return losses


def quadratic(seed: int) -> Landscape:
    """Two convex quadratics over eight distributions, each least near a vertex of its own, as a merge's losses are."""
    rng = np.random.default_rng(seed)
    bottoms_2F = 0.6 * np.eye(8)[:2] + 0.4 * rng.dirichlet(np.ones(8), 2)
    factors_2FF = rng.normal(size=(2, 8, 8)) / 8 + np.eye(8)

    def losses(shares_NF: Array) -> Array:
        away_N2F = np.einsum("tfg,ntg->ntf", factors_2FF, shares_NF[:, None] - bottoms_2F)
        both_N2: Array = (away_N2F**2).sum(axis=-1)
        return both_N2

    return Landscape(f"quadratics of eight, seed {seed}", Space(EIGHT), losses)


def best_known(landscape: Landscape, rng: np.random.Generator) -> Array:
    """Losses of many draws and of the minima of weighted sums, [N, 2]."""
    caps_F = landscape.space.caps_F
    draws_NF = np.concatenate([rng.dirichlet(np.full(len(caps_F), alpha), 4000) for alpha in (1.0, 0.3)])
    drawn_N2 = landscape.losses(draws_NF)
    minima = []
    for share in np.linspace(0, 1, WEIGHTS):
        scale_2 = np.array([share, 1 - share]) / np.ptp(drawn_N2, axis=0)
        start_F = draws_NF[np.argmin(drawn_N2 @ scale_2)]
        result = minimize(
            lambda at_F, scale_2=scale_2: float(landscape.losses(project(at_F, caps_F)[None])[0] @ scale_2),
            start_F,
            method="SLSQP",
            bounds=[(0, 1)] * len(caps_F),
            constraints={"type": "eq", "fun": lambda at_F: at_F.sum() - 1},
        )
        minima.append(project(result.x, caps_F))
    return np.concatenate([drawn_N2, landscape.losses(np.array(minima))])


def search(landscape: Landscape, algorithm: str, seed: int) -> tuple[Array, float]:
    """Losses of the trials in their order [N, 2], and processor seconds of a proposal."""
    proposer, history = make_proposer(algorithm, landscape.space, objectives=2), list[Trial]()
    losses, began = list[Array](), process_time()
    for number in range(MARKS[-1]):
        point = propose(proposer, history, (), seed).coefficients
        both = landscape.losses(landscape.space.shares(point)[None])[0]
        losses.append(both)
        values = (float(both[0]), float(both[1]))
        history.append(Trial(number, point, "complete", objective=sum(values) / 2, losses=values))
    return np.array(losses), (process_time() - began) / MARKS[-1]


def quartiles(values: list[float]) -> str:
    """Median and quartiles, in percent."""
    low, middle, high = 100 * np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Run all searches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    began = perf_counter()
    families = {"four": list(measured(arguments.study)), "eight": [quadratic(seed) for seed in range(4)]}
    for family, landscapes in families.items():
        missing = {name: {mark: list[float]() for mark in MARKS} for name in ALGORITHMS}
        seconds = {name: list[float]() for name in ALGORITHMS}
        for landscape in landscapes:
            runs = [
                (name, *search(landscape, algorithm, seed))
                for name, algorithm in ALGORITHMS.items()
                for seed in range(arguments.seeds)
            ]
            known = [best_known(landscape, np.random.default_rng(0)), *(losses for _, losses, _ in runs)]
            best = hypervolume(np.concatenate(known), landscape.reference)
            for name, losses, spent in runs:
                seconds[name].append(spent)
                for mark in MARKS:
                    missing[name][mark].append(1 - hypervolume(losses[:mark], landscape.reference) / best)
        print(f"\n{len(landscapes)} landscapes of {family} distributions, {arguments.seeds} seeds")
        print("missing hypervolume, % of the best known: median [quartiles]\n")
        print("| algorithm | " + " | ".join(f"{mark} FE" for mark in MARKS) + " | proposal, s |")
        print("|---" * (len(MARKS) + 2) + "|")
        for name in ALGORITHMS:
            cells = [quartiles(missing[name][mark]) for mark in MARKS]
            print(f"| {name} | {' | '.join(cells)} | {np.median(seconds[name]):.3f} |", flush=True)
    print(f"\n{perf_counter() - began:.0f} s")


if __name__ == "__main__":
    with threadpool_limits(1, "blas"):
        main()
