"""How much forward compute a search needs on real merge losses: `python benchmarks/search.py FOLDER`.

Makes the worlds of `landscapes` in FOLDER and two studies of `group_studies` on other bases, runs every algorithm on
every landscape, and prints the tables of docs/benchmarks.md, with JSON beside them.  Everything goes through the
product's own studies and one ledger a world, so a run that was stopped goes on where it was.  One forward-equivalent
(FE) is a forward pass over all windows of the search split; whatever an algorithm looks at is charged, first
observations too.  BoTorch and Ax take part where they are installed, with one seed.  `--pretrained MADE` searches on
the fine-tunes that `make pretrained` left in the folder MADE instead.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from group_studies import make
from landscapes import REPORTED, TUNED_ON, make_landscape, pretrained_landscape
from numpy.typing import NDArray
from optuna.samplers import GPSampler
from rivals import PACKAGES, Loss, Step, ax, botorch

from dem_opt import config
from dem_opt.compute import InProcessCompute
from dem_opt.config import GRADIENTS_FROM
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
from dem_opt.simplex import Coefficients, Space
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import SEARCH, Score, TrialRecord

MARKS = (4, 6, 8, 10, 12, 16, 20, 24, 32)
PLAIN = {"racing": False, "gradients": False}
OTHER_BASES = ("base-3840", "qwen2")
"""Studies of `group_studies`: a base that has learnt for long, and another architecture."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "simplex-gp": ("simplex-gp", {}),
    "simplex-gp, probes": ("simplex-gp", {"gradients": True}),
    "simplex-gp, no races": ("simplex-gp", PLAIN),
    "simplex-gp, gradients of all windows": ("simplex-gp", {"racing": False, "gradients": True}),
    "SLSQP": ("gradient", {}),
    "TPE": ("tpe", PLAIN),
    "CMA-ES": ("cmaes", PLAIN),
    "random": ("random", PLAIN),
}
"""Runs by their name in the tables: the algorithm, and the search's settings where they are not the default."""


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


def explore(
    path: Path, variants: Sequence[str], grid: bool, seeds: int, threads: int, forwards: float | None
) -> Measured:
    """Every variant, the rivals that are installed and, where it is asked for, the grid of four distributions."""
    torch.set_num_threads(threads)
    began, study = perf_counter(), config.load(path)
    size = len(study.distributions)
    most = forwards or budget_of(size)
    budget = {"trials": 400, "forwards": most}
    runs_by_variant = {
        name: run(path, f"{study.name}.{name}", algorithm, budget | settings, seeds)
        for name, (algorithm, settings) in VARIANTS.items()
        if name in variants
    }
    lattice = run(path, f"{study.name}.grid", "grid", {}, 1)["grid"] if grid and size == 4 else ()
    curves = {name: tuple(map(curve_of, runs.values())) for name, runs in runs_by_variant.items()}
    curves["Optuna's GP"] = tuple(optuna_gp(path, seed, int(most)) for seed in range(seeds))
    for name, search in {"BoTorch": botorch, "Ax": ax}.items():
        if find_spec(PACKAGES[name]) is not None:
            curves[name] = (rival(path, search, most),)
    records = [record for runs in runs_by_variant.values() for trials in runs.values() for record in trials]
    whole_gradients = (record for record in records if record.gradient and not record.is_partial)
    steep = min(whole_gradients, key=lambda record: record.rank)
    slopes = {name: slope - min(steep.gradient.values()) for name, slope in steep.gradient.items()}
    say(f"{study.name}: {perf_counter() - began:.0f} s")
    return Measured(
        name=study.name,
        size=size,
        curves=curves,
        reference=min(curve.best[-1] for runs in (*curves.values(), [curve_of(lattice or records)]) for curve in runs),
        coefficients=steep.coefficients.weights,
        gap=sum(weight * slopes[name] for name, weight in steep.coefficients.weights.items()),
        slopes=slopes,
        gradient_forwards=seconds_of(records, True) / seconds_of(records, False),
        grid_best=curve_of(lattice).best[-1] if lattice else None,
        grid_points=len(lattice),
        raced_grids=race_grid(path) if lattice else (),
    )


def run(
    path: Path, name: str, algorithm: str, settings: Mapping[str, Any], seeds: int
) -> Mapping[str, Sequence[TrialRecord]]:
    """Trials by run of the landscape's study under another name, with these settings of the search."""
    landscape = config.load(path)
    search = landscape.search.model_copy(update={"lookahead": 0, "patience": None, **settings})
    renamed = landscape.model_copy(update={"name": name, "search": search})
    study = Study(renamed, path, tracker=NullTracker(), compute=InProcessCompute())
    return study.compare([algorithm], seeds).summary.trials


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


def optuna_gp(path: Path, seed: int, trials: int) -> Curve:
    """Optuna's GPSampler over s / sum s, from the landmarks."""
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


@dataclass(frozen=True)
class RealLoss:
    """The loss of real merges, as a rival sees it."""

    space: Space
    measure: Callable[[Coefficients], float]
    seed: int = 0

    @property
    def size(self) -> int:
        """Number of shares."""
        return len(self.space.names)

    def value(self, x_N: NDArray[np.float64]) -> float:
        """The objective."""
        return self.measure(self.space.at(x_N))


def rival(path: Path, search: Callable[[Loss], Iterator[Step]], budget: float) -> Curve:
    """A rival of another package, on values of all windows."""
    spent, best, asks = [0.0], [np.inf], list[float]()
    with opened(path) as (identity, _, measure):
        began = process_time()
        for cost, value in search(RealLoss(identity.space, measure)):
            asks.append(process_time() - began)
            spent.append(spent[-1] + cost)
            best.append(min(best[-1], value))
            if spent[-1] >= budget:
                break
            began = process_time()
    return Curve(tuple(spent[1:]), tuple(best[1:]), float(np.median(asks)))


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


def budget_of(size: int) -> float:
    """Forward-equivalents of a run on so many distributions, unless it is given."""
    return float(MARKS[-1] if size > GRADIENTS_FROM else MARKS[-2])


def regret_table(results: Sequence[Measured], forwards: float | None) -> list[list[str]]:
    """Regret in nats per token by variant and mark: median and quartiles over landscapes and seeds."""
    marks = [mark for mark in MARKS if mark <= (forwards or budget_of(results[0].size))]
    rows = [["algorithm", *(f"{mark} FE" for mark in marks), "seconds a proposal"]]
    for name in results[0].curves:
        curves = [(curve, result.reference) for result in results for curve in result.curves[name]]
        cells = [quartiles([curve.at(mark) - reference for curve, reference in curves]) for mark in marks]
        rows.append([name, *cells, f"{np.median([curve.ask_seconds for curve, _ in curves]):.2f}"])
    return rows


def targets(results: Sequence[Measured]) -> list[str]:
    """Facts of each landscape; then savings by races, and grids, where these were run."""
    lines = []
    for result in results:
        zeros = [name for name, weight in result.coefficients.items() if not weight]
        least = min((result.slopes[name] for name in zeros), default=None)
        lines.append(
            f"{result.name}: best known {result.reference:.5f}, Frank-Wolfe gap {result.gap:.1e} nats; an evaluation "
            f"with its gradient took {result.gradient_forwards:.1f} times one without; zeros: "
            f"{', '.join(zeros) or 'none'}" + (f", least slope {least:.4f}" if least is not None else "")
        )
    without = [result for result in results if "simplex-gp, no races" in result.curves and result.size < GRADIENTS_FROM]
    for level in (2e-3, 1e-3, 1e-4) if without else ():
        ratios = [
            raced.until(result.reference + level) / plain.until(result.reference + level)
            for result in without
            for raced, plain in zip(result.curves["simplex-gp"], result.curves["simplex-gp, no races"], strict=True)
        ]
        known = [ratio for ratio in ratios if np.isfinite(ratio)]
        lines.append(f"racing needs {quartiles(known, '.2f')} of the tokens to a regret of {level:g} nats")
    grids = [result for result in results if result.grid_best is not None]
    if grids:
        shares = [
            curve.until(result.grid_best) / result.grid_points
            for result in grids
            for curve in result.curves["simplex-gp"]
            if result.grid_best
        ]
        races = [race for result in grids for race in result.raced_grids]
        lines.append(f"simplex-gp reached the grid's best for {quartiles(shares, '.1%')} of its forward compute")
        lines.append(
            f"a raced grid cost {quartiles([race.share for race in races], '.1%')} of a whole one; "
            f"the same winner in {sum(race.same_winner for race in races)} of {len(races)}"
        )
    return lines


def say(text: str) -> None:
    """A line for people, at once."""
    print(text, flush=True)


def studies(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """The study files to search on, made where they are missing."""
    if arguments.pretrained:
        return [pretrained_landscape(arguments.pretrained.resolve(), folder, arguments.rounding)]
    if arguments.tuned:
        return [make_landscape(each, folder, say) for each in TUNED_ON]
    return [*(make_landscape(each, folder, say) for each in REPORTED), *(make(kind, folder) for kind in OTHER_BASES)]


def main() -> None:
    """All landscapes, one a processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tuned", action="store_true", help="the landscapes that settings were chosen on")
    parser.add_argument("--pretrained", type=Path, metavar="MADE", help="the folder that `make pretrained` filled")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest", help="of its composites")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--forwards", type=float, help="forward-equivalents of a run: 24, or 32 with many distributions"
    )
    parser.add_argument("--grid", action="store_true", help="the grid of four distributions, and races over it")
    arguments = parser.parse_args()
    began, folder = perf_counter(), arguments.folder.resolve()
    torch.set_num_threads(1)
    paths = studies(arguments, folder)
    for path in paths:
        study = config.load(path)
        study.output.mkdir(parents=True, exist_ok=True)
        study_names(study.storage)  # Optuna makes its tables before several processes need them
    processors = os.cpu_count() or 1
    with ProcessPoolExecutor(processors, mp_context=get_context("fork")) as pool:
        explored = partial(
            explore,
            variants=arguments.variants,
            grid=arguments.grid,
            seeds=arguments.seeds,
            threads=max(1, processors // len(paths)),
            forwards=arguments.forwards,
        )
        results = list(pool.map(explored, paths))
    (folder / "search.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    for least, most in ((2, 7), (8, 8), (9, 99)):
        if of_size := [result for result in results if least <= result.size <= most]:
            sizes = ", ".join(f"{result.name} ({result.size})" for result in of_size)
            say(f"\nRegret, nats per token, median [quartiles]: {sizes}\n")
            for row in regret_table(of_size, arguments.forwards):
                say("| " + " | ".join(row) + " |")
    say("\n" + "\n".join(targets(results)))
    say(f"\n{perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
