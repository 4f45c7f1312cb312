"""The descent of coefficients by group against other algorithms: `python benchmarks/group_rivals.py FOLDER STUDY...`.

A study is a study file, or one of the kinds of `group_studies`, which is made in FOLDER.  Its coefficients are by block
of layers, 13 x 4 and more.  All begin with the global optimum, which costs none of them anything, and go down the
objective of the search split alone, without the product's folds.  A score of all windows is one forward-equivalent
(FE), one with its gradient 3.  Printed is the gain over the global optimum as a part of the best that any of them has.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
import optuna
import torch
from cmaes import CMA
from group_studies import KINDS, make
from groups import Telling, sections_of, write_variant
from numpy.typing import NDArray
from scipy.optimize import minimize

from dem_opt import config
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.worker import build
from dem_opt.grouping import GroupedCoefficients
from dem_opt.planning.inputs import load_inputs
from dem_opt.progress import NullProgress
from dem_opt.search.group_search import DESCENT
from dem_opt.search.group_trials import measured, search_key, study_folds
from dem_opt.search.loop import Driver
from dem_opt.simplex import project
from dem_opt.storage.engine import connect
from dem_opt.storage.group_tables import GroupTrial
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import GRADIENT_FORWARDS, SEARCH

Array = NDArray[np.float64]

BUDGET = 40.0
MARKS = (3, 6, 9, 12, 18, 24, 30, 40)
VARIANT = "blocks, unshrunk"


class SpentError(Exception):
    """The budget is spent."""


@dataclass
class GroupLoss:
    """The objective over shares by group, [G, F], with what its measurements have cost.

    Attributes:
        driver: Measures and records.
        start_GF: The global optimum in every group.
        steps: Cost in FE and objective of each measurement.
    """

    driver: Driver
    start_GF: Array
    steps: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._folds = study_folds(self.driver.ledger, self.identity)

    @property
    def identity(self) -> StudyIdentity:
        """The study."""
        return self.driver.identity

    def measure(self, shares_GF: Array, gradient: bool) -> tuple[float, Array]:
        """The objective in nats per token, and its gradient by shares; zeros unless asked for."""
        cost = GRADIENT_FORWARDS if gradient else 1.0
        if sum(spent for spent, _ in self.steps) + cost > BUDGET:
            raise SpentError
        groups = self.identity.groups
        assert groups is not None
        rows = [self.identity.space.at(shares_F) for shares_F in shares_GF]
        coefficients = GroupedCoefficients.of(groups.grouping.names, rows)
        composite = self.identity.composite(coefficients)
        if gradient:
            self.driver.differentiate(composite, self._folds, "rivals")
        else:
            self.driver.measure([composite], [SEARCH], "rivals")
        kind = DESCENT if gradient else "fold 0"
        trial = GroupTrial(number=0, kind=kind, shrink=0.0, coefficients=coefficients, composite=composite)
        known = measured(self.driver.ledger, self.identity, self._folds, trial)
        self.steps.append((cost, known.value))
        slopes_GK = np.zeros_like(shares_GF) if known.gradient_GK is None else known.gradient_GK
        return known.value, slopes_GK @ self.identity.space.jacobian() if gradient else slopes_GK

    def project(self, values_GF: Array) -> Array:
        """The nearest point with a simplex for each group."""
        return np.array([project(values_F, np.ones(len(values_F))) for values_F in values_GF])


def slsqp(loss: GroupLoss) -> None:
    """SLSQP with gradients of all windows."""
    groups, shares = loss.start_GF.shape
    sums_Gn = np.kron(np.eye(groups), np.ones(shares))

    def measure(x_n: Array) -> tuple[float, Array]:
        value, gradient_GF = loss.measure(loss.project(x_n.reshape(groups, shares)), True)
        return value, gradient_GF.ravel()

    plane = {"type": "eq", "fun": lambda x_n: sums_Gn @ x_n - 1, "jac": lambda x_n: sums_Gn}
    bounds = [(0.0, 1.0)] * loss.start_GF.size
    minimize(measure, loss.start_GF.ravel(), jac=True, method="SLSQP", bounds=bounds, constraints=plane)


def adam(loss: GroupLoss, rate: float = 0.05) -> None:
    """Projected Adam with gradients of all windows."""
    x_GF, first_GF, second_GF = loss.start_GF, np.zeros_like(loss.start_GF), np.zeros_like(loss.start_GF)
    for step in range(1, 1000):
        _, slope_GF = loss.measure(x_GF, True)
        slope_GF = slope_GF - slope_GF.mean(axis=1, keepdims=True)
        first_GF = 0.9 * first_GF + 0.1 * slope_GF
        second_GF = 0.99 * second_GF + 0.01 * slope_GF**2
        away_GF = (first_GF / (1 - 0.9**step)) / (np.sqrt(second_GF / (1 - 0.99**step)) + 1e-8)
        x_GF = loss.project(x_GF - rate / np.sqrt(step) * away_GF)


def cmaes(loss: GroupLoss) -> None:
    """CMA-ES about the global optimum, projected."""
    optimizer = CMA(mean=loss.start_GF.ravel(), sigma=0.1, seed=0)
    while True:
        asked = [optimizer.ask() for _ in range(optimizer.population_size)]
        shape = loss.start_GF.shape
        optimizer.tell([(x_n, loss.measure(loss.project(x_n.reshape(shape)), False)[0]) for x_n in asked])


def tpe(loss: GroupLoss) -> None:
    """Optuna's TPE over s / sum s in each group."""
    groups, shares = loss.start_GF.shape
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, multivariate=True))
    study.enqueue_trial({f"{g}.{f}": float(loss.start_GF[g, f]) for g in range(groups) for f in range(shares)})

    while True:
        trial = study.ask()
        drawn = [[trial.suggest_float(f"{g}.{f}", 0.0, 1.0) for f in range(shares)] for g in range(groups)]
        values_GF = np.array(drawn) + 1e-9
        study.tell(trial, loss.measure(values_GF / values_GF.sum(axis=1, keepdims=True), False)[0])


RIVALS: dict[str, Callable[[GroupLoss], None]] = {
    "SLSQP with gradients": slsqp,
    "Adam with gradients": adam,
    "CMA-ES": cmaes,
    "TPE": tpe,
}


def curves(path: Path) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Cost and objective of each measurement by algorithm, and the global optimum's objective."""
    study = Study.load(path, tracker=NullTracker(), compute=InProcessCompute(), progress=Telling())
    centre = study.run().summary.global_winner
    inputs, engine = load_inputs(config.load(path), path), connect(study.config.storage)
    identity, ledger = inputs.identity(), Ledger(engine)
    folds = study_folds(ledger, identity)
    own = [
        measured(ledger, identity, folds, each)
        for each in ledger.group_trials(search_key(identity, centre.coefficients))
    ]
    found = {"descent": [(trial.forwards, trial.value) for trial in own if trial.kind == DESCENT]}
    assert identity.groups is not None
    start_GF = np.tile(identity.space.shares(centre.coefficients), (len(identity.groups.grouping), 1))
    with closing(InProcessCompute().workers(build, inputs.spec(), NullProgress())) as pool:
        driver = Driver(identity=identity, ledger=ledger, pool=pool, progress=NullProgress(), study="rivals")
        for name, search in RIVALS.items():
            loss = GroupLoss(driver, start_GF)
            with suppress(SpentError):
                search(loss)
            found[name] = loss.steps
    engine.dispose()
    return found, centre.objective[SEARCH]


def gain_after(steps: Sequence[tuple[float, float]], spent: float, start: float) -> float:
    """The gain over the start for so many forward-equivalents."""
    costs = np.cumsum([cost for cost, _ in steps])
    return start - min((value for at, (_, value) in zip(costs, steps, strict=True) if at <= spent), default=start)


def main() -> None:
    """A table for each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("studies", nargs="+", help=f"study files, or of {', '.join(KINDS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = arguments.folder.resolve()
    for name in arguments.studies:
        path = make(name, folder) if name in KINDS else Path(name).resolve()
        own = folder / "group-rivals" / path.stem
        own.mkdir(parents=True, exist_ok=True)
        found, start = curves(write_variant(path, own, VARIANT, sections_of(VARIANT, path, own)))
        best = max(gain_after(steps, inf, start) for steps in found.values())
        print(f"\n{name}: the best gains {best:.4f} nats per token over the global optimum\n")
        print(f"| algorithm | {' | '.join(f'{mark} FE' for mark in MARKS)} |")
        print("|---" * (len(MARKS) + 1) + "|")
        for algorithm, steps in found.items():
            cells = (f"{gain_after(steps, mark, start) / best:.0%}" for mark in MARKS)
            print(f"| {algorithm} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
