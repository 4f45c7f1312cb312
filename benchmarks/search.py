"""How much forward compute a search needs on real merge losses: `python benchmarks/search.py FOLDER`.

Makes the worlds of `landscapes` in FOLDER, runs every algorithm on every landscape, and prints the tables that the
README quotes, with JSON beside them.  Everything goes through the product's own studies and one ledger a world, so a
run that was stopped goes on where it was.  One forward-equivalent (FE) is a forward pass over all windows of the search
split; whatever an algorithm looks at is charged, first observations too.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from landscapes import REPORTED, TUNED_ON, Landscape, make_landscape
from numpy.typing import NDArray
from optuna.samplers import GPSampler

from dem_opt import config
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.interim_analyses import replay
from dem_opt.evaluation.racing import Race
from dem_opt.evaluation.worker import build
from dem_opt.planning.inputs import load_inputs
from dem_opt.progress import NullProgress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_storage import study_names
from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.optuna_sampler import OptunaSampler
from dem_opt.search.trials import objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import SEARCH, Score, TrialRecord

SEEDS = 2
MARKS = (10, 12, 16, 20, 24, 30, 40, 48)
PLAIN = {"racing": False, "gradients": False, "trials": 40, "forwards": None}
LONGEST = {4: 24.0, 8: 48.0}
"""Forward-equivalents of the searches that race or have gradients, by distributions."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "simplex-gp": ("simplex-gp", PLAIN),
    "simplex-gp, racing": ("simplex-gp", {"racing": True, "gradients": False, "trials": 400}),
    "simplex-gp, gradients": ("simplex-gp", {"racing": False, "gradients": True, "trials": 400}),
    "SLSQP": ("gradient", {"trials": 400}),
    "TPE": ("tpe", PLAIN),
    "CMA-ES": ("cmaes", PLAIN),
    "random": ("random", PLAIN),
}
"""Runs by their name in the tables: the algorithm and the search's settings."""


@dataclass(frozen=True)
class Curve:
    """One run: after each trial, forward-equivalents spent, and the best objective of a whole trial so far (nats)."""

    spent: tuple[float, ...]
    best: tuple[float, ...]
    ask_seconds: float

    def at(self, spent: float) -> float:
        """The best objective for so many forward-equivalents."""
        return min(
            (best for cost, best in zip(self.spent, self.best, strict=True) if cost <= spent + 1e-9), default=np.inf
        )

    def until(self, objective: float) -> float:
        """Forward-equivalents after which the best was at most so high; infinite where it never was."""
        return min(
            (cost for cost, best in zip(self.spent, self.best, strict=True) if best <= objective), default=np.inf
        )


@dataclass(frozen=True)
class RacedGrid:
    """A grid whose points race: the share of its forward compute, and whether its winner is the whole grid's."""

    share: float
    same_winner: bool


@dataclass(frozen=True)
class Measured:
    """Measurements on a landscape.

    curves     by variant, one a seed
    reference  the best objective of all that was measured (nats per token), and its coefficients
    gap        sum_i w_i (g_i - min g) there: at least the regret, were the loss convex (Frank and Wolfe 1956)
    slopes     g_i - min g by distribution, in nats: 0 where a coefficient is above 0, and at least 0 elsewhere
    gradient_forwards  seconds of an evaluation with its gradient over one without
    grid_best, grid_points, raced_grids   the grid's best, its size, and races over it in random orders
    """

    name: str
    size: int
    curves: Mapping[str, tuple[Curve, ...]]
    reference: float
    coefficients: Mapping[str, float]
    gap: float
    slopes: Mapping[str, float]
    gradient_forwards: float
    grid_best: float | None
    grid_points: int
    raced_grids: tuple[RacedGrid, ...]


def curve_of(records: Sequence[TrialRecord]) -> Curve:
    """A run's curve."""
    spent = np.cumsum([record.forwards for record in records])
    whole = [np.inf if record.is_partial or record.objective is None else record.objective for record in records]
    asks = [record.propose_seconds for record in records]
    return Curve(tuple(spent.tolist()), tuple(np.minimum.accumulate(whole).tolist()), float(np.median(asks)))


def explore(landscape: Landscape, path: Path) -> Measured:
    """Every variant, Optuna's Gaussian process and, with four distributions, the grid."""
    torch.set_num_threads(1)
    began = perf_counter()
    longest = {"forwards": LONGEST[len(landscape.tunes)]}
    runs_by_variant = {
        name: run(path, f"{landscape.name}.{name}", algorithm, longest | settings)
        for name, (algorithm, settings) in VARIANTS.items()
    }
    grid = run(path, f"{landscape.name}.grid", "grid", {})["grid"] if len(landscape.tunes) == 4 else ()
    curves = {name: tuple(map(curve_of, runs.values())) for name, runs in runs_by_variant.items()}
    curves["Optuna's GP"] = tuple(optuna_gp(path, seed) for seed in range(SEEDS))
    records = [record for runs in runs_by_variant.values() for trials in runs.values() for record in trials]
    steep = min((record for record in records if record.gradient), key=lambda record: record.rank)
    slopes = {name: slope - min(steep.gradient.values()) for name, slope in steep.gradient.items()}
    say(f"{landscape.name}: {perf_counter() - began:.0f} s")
    return Measured(
        name=landscape.name,
        size=len(landscape.tunes),
        curves=curves,
        reference=min(curve.best[-1] for runs in (*curves.values(), [curve_of(grid or records)]) for curve in runs),
        coefficients=steep.coefficients.weights,
        gap=sum(weight * slopes[name] for name, weight in steep.coefficients.weights.items()),
        slopes=slopes,
        gradient_forwards=seconds_of(records, True) / seconds_of(records, False),
        grid_best=curve_of(grid).best[-1] if grid else None,
        grid_points=len(grid),
        raced_grids=race_grid(path) if grid else (),
    )


def run(path: Path, name: str, algorithm: str, settings: Mapping[str, Any]) -> Mapping[str, Sequence[TrialRecord]]:
    """Trials by run of the landscape's study under another name, with these settings of the search."""
    landscape = config.load(path)
    search = landscape.search.model_copy(update={"lookahead": 0, "patience": None, **settings})
    renamed = landscape.model_copy(update={"name": name, "search": search})
    study = Study(renamed, path, tracker=NullTracker(), compute=InProcessCompute())
    return study.compare([algorithm], SEEDS).summary.trials


def seconds_of(records: Sequence[TrialRecord], steep: bool) -> float:
    """Median seconds of scoring all windows, with a gradient or without."""
    seconds = [
        record.evaluation.score_seconds
        for record in records
        if bool(record.gradient) is steep and not record.is_partial
    ]
    return float(np.median([duration for duration in seconds if duration]))


@contextmanager
def opened(path: Path) -> Iterator[tuple[StudyIdentity, Ledger, Callable[[Coefficients], float]]]:
    """A landscape's question, its ledger, and its objective in nats per token, measured where the ledger lacks it."""
    landscape = config.load(path)
    sources = load_inputs(landscape, path)
    identity, engine = sources.identity(), connect(landscape.storage)
    ledger = Ledger(engine)
    with closing(InProcessCompute().workers(build, sources.spec(), NullProgress())) as pool:
        driver = Driver(identity=identity, ledger=ledger, pool=pool, progress=NullProgress(), study="benchmark")
        objective = objectives(ledger, identity)[SEARCH]

        def measure(coefficients: Coefficients) -> float:
            composite = identity.composite(coefficients)
            driver.measure([composite], [SEARCH], "baselines")
            return objective(recall(ledger, identity, composite, SEARCH))

        yield identity, ledger, measure
    engine.dispose()


def optuna_gp(path: Path, seed: int, trials: int = 40) -> Curve:
    """Optuna's GPSampler over s / sum s, from the same first observations."""
    best, asks, history = [], [], list[Trial]()
    with opened(path) as (identity, _, measure):
        proposer = OptunaSampler(identity.space, lambda drawn: GPSampler(seed=drawn))
        for number in range(trials):
            began = perf_counter()
            point = proposer.propose(history, [], np.random.default_rng([seed, number])).coefficients
            asks.append(perf_counter() - began)
            history.append(Trial(number, point, "complete", objective=measure(point)))
            best.append(min(trial.objective for trial in history if trial.objective is not None))
    return Curve(tuple(range(1, trials + 1)), tuple(best), float(np.median(asks)))


def race_grid(path: Path, orders: int = 20) -> tuple[RacedGrid, ...]:
    """The grid's points one after the other, each racing the best so far, in orders drawn at random.

    Replayed from what the ledger has of the whole grid.
    """
    with opened(path) as (identity, ledger, measure):
        corpora, windows = identity.corpora[SEARCH], identity.sizes(SEARCH)
        weights = {corpora[name]: weight for name, weight in identity.weights.items()}
        lattice = list(identity.space.lattice(10))
        values = [measure(point) for point in lattice]
        scores = [ledger.look_up(identity.composite(point), tuple(windows), identity.scoring) for point in lattice]
        return tuple(
            _race(np.random.default_rng(order).permutation(len(lattice)), values, scores, weights, windows)
            for order in range(orders)
        )


def _race(
    order: NDArray[np.int64],
    values: Sequence[float],
    scores: Sequence[Mapping[str, Score]],
    weights: Mapping[str, float],
    windows: Mapping[str, int],
) -> RacedGrid:
    """A raced grid in one order."""
    best, seen = int(order[0]), sum(windows.values())
    for point in order[1:]:
        ended = replay(Race.against(scores[best], weights), scores[point], windows)
        assert ended is not None
        looked_at = sum(len(score.nats_W) for score in ended.values())
        seen += looked_at
        if looked_at == sum(windows.values()) and values[point] < values[best]:
            best = int(point)
    return RacedGrid(seen / (len(order) * sum(windows.values())), best == int(np.argmin(values)))


def quartiles(values: Sequence[float], form: str = ".1e") -> str:
    """Median and quartiles, for people."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def regret_table(results: Sequence[Measured], size: int) -> list[list[str]]:
    """Regret in nats per token by variant and mark: median and quartiles over landscapes and seeds."""
    of_size = [result for result in results if result.size == size]
    rows = [["algorithm", *(f"{mark} FE" for mark in MARKS), "ask, s"]]
    for name in of_size[0].curves:
        curves = [(curve, result.reference) for result in of_size for curve in result.curves[name]]
        cells = [quartiles([curve.at(mark) - reference for curve, reference in curves]) for mark in MARKS]
        last = max(max(curve.spent) for curve, _ in curves)
        shown = [cell if mark <= last + 3 else "" for cell, mark in zip(cells, MARKS, strict=True)]
        rows.append([name, *shown, f"{np.median([curve.ask_seconds for curve, _ in curves]):.2f}"])
    return rows


def targets(results: Sequence[Measured]) -> list[str]:
    """Goals of the search beside its results."""
    lines = []
    for size, (budget, levels) in {4: (20, (2e-3, 1e-3, 1e-4)), 8: (40, (5e-3, 1e-3, 1e-4))}.items():
        of_size = [result for result in results if result.size == size]
        if not of_size:
            continue
        lines.append(f"{size}: " + _saved(of_size, budget))
        for level in levels:
            ratios = [
                raced.until(result.reference + level) / plain.until(result.reference + level)
                for result in of_size
                for raced, plain in zip(result.curves["simplex-gp, racing"], result.curves["simplex-gp"], strict=True)
            ]
            known = [ratio for ratio in ratios if np.isfinite(ratio)]
            lines.append(f"{size}: racing needs {quartiles(known, '.2f')} of the tokens to a regret of {level:g} nats")
        steep = [result.gradient_forwards for result in of_size]
        lines.append(f"{size}: an evaluation with its gradient took {quartiles(steep, '.1f')} times one without")
    for result in results:
        zeros = [name for name, weight in result.coefficients.items() if not weight]
        least = min((result.slopes[name] for name in zeros), default=None)
        lines.append(
            f"{result.name}: best known {result.reference:.5f}, Frank-Wolfe gap {result.gap:.1e} nats; "
            f"zeros: {', '.join(zeros) or 'none'}" + (f", least slope {least:.4f}" if least is not None else "")
        )
    grids = [result for result in results if result.grid_best is not None]
    for name in ("simplex-gp", "simplex-gp, racing"):
        shares = [
            curve.until(result.grid_best) / result.grid_points
            for result in grids
            for curve in result.curves[name]
            if result.grid_best
        ]
        lines.append(f"4: {name} reached the grid's best for {quartiles(shares, '.1%')} of its forward compute")
    races = [race for result in grids for race in result.raced_grids]
    lines.append(
        f"4: a raced grid cost {quartiles([race.share for race in races], '.1%')} of a whole one; "
        f"the same winner in {sum(race.same_winner for race in races)} of {len(races)}"
    )
    return lines


def _saved(results: Sequence[Measured], budget: float, share: float = 0.6) -> str:
    """Regrets with races for a share of the tokens that the search without them has."""
    plain = [curve.at(budget) - result.reference for result in results for curve in result.curves["simplex-gp"]]
    raced = [
        curve.at(share * budget) - result.reference
        for result in results
        for curve in result.curves["simplex-gp, racing"]
    ]
    return f"regret {quartiles(plain)} for {budget:g} FE without races, {quartiles(raced)} for {share * budget:g} with"


def say(text: str) -> None:
    """A line for people, at once."""
    print(text, flush=True)


def main() -> None:
    """All landscapes, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tuned", action="store_true", help="the landscapes that settings were chosen on")
    arguments = parser.parse_args()
    began, landscapes = perf_counter(), TUNED_ON if arguments.tuned else REPORTED
    paths = [make_landscape(landscape, arguments.folder, say) for landscape in landscapes]
    for path in paths:
        study_names(config.load(path).storage)  # Optuna makes its tables before several processes need them
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        results = list(pool.map(explore, landscapes, paths))
    (arguments.folder / "search.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    for size in (4, 8):
        say(f"\nRegret, nats per token, {size} distributions: median [quartiles]\n")
        for row in regret_table(results, size) if any(result.size == size for result in results) else []:
            say("| " + " | ".join(row) + " |")
    say("\n" + "\n".join(targets(results)))
    say(f"\n{perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
