"""`SimplexSampler` in plain Optuna studies, beside Optuna's own samplers: `python benchmarks/sampler.py`.

A portfolio: the variance of a year's return less a part of its mean, over weights that sum to 1.  Optuna's samplers
know no sum, so they search the unit cube, and the objective divides by the sum.  Regrets against the exact optimum are
multiplied by 1e4 (basis points).
"""

from collections.abc import Callable
from time import process_time

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from scipy.optimize import minimize

from dem_opt.search.samplers import SimplexSampler

SIZES = (4, 8)
MARKS = (15, 25, 40)
SEEDS = 3


def portfolio(size: int, seed: int) -> Callable[[np.ndarray], float]:
    """Risk less return of assets that share three factors: most of the best portfolios leave assets out."""
    rng = np.random.default_rng([size, seed])
    factors = 0.15 * rng.normal(size=(size, 3))
    covariance = factors @ factors.T + np.diag(rng.uniform(0.01, 0.06, size))
    returns = rng.uniform(0.02, 0.08, size)
    return lambda weights: float(weights @ covariance @ weights - 0.5 * returns @ weights)


def lowest(loss: Callable[[np.ndarray], float], size: int) -> float:
    """The exact optimum: the loss is convex."""
    start, total = np.full(size, 1 / size), {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    found = minimize(
        loss, start, method="SLSQP", bounds=[(0, 1)] * size, constraints=total, options={"ftol": 1e-14, "maxiter": 500}
    )
    return float(found.fun)


def run(
    sampler: BaseSampler, names: list[str], loss: Callable[[np.ndarray], float], *, is_divided: bool
) -> tuple[list[float], float]:
    """The best value after each mark, and the processor's seconds of a trial."""

    def objective(trial: optuna.Trial) -> float:
        weights = np.array([trial.suggest_float(name, 0, 1) for name in names])
        return loss(weights / max(weights.sum(), 1e-9) if is_divided else weights)

    study, began = optuna.create_study(sampler=sampler), process_time()
    study.optimize(objective, n_trials=MARKS[-1])
    best = np.minimum.accumulate([trial.values[0] for trial in study.trials])
    return [float(best[mark - 1]) for mark in MARKS], (process_time() - began) / MARKS[-1]


def main() -> None:
    """One table for each number of assets."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for size in SIZES:
        names = [f"asset{number}" for number in range(size)]
        makers: dict[str, Callable[[int], BaseSampler]] = {
            "SimplexSampler": lambda seed, names=names: SimplexSampler(names, seed=seed),
            "Optuna's GPSampler": lambda seed: GPSampler(seed=seed),
            "Optuna's TPESampler": lambda seed: TPESampler(seed=seed),
        }
        print(f"\n| {size} assets | " + " | ".join(f"{mark} trials" for mark in MARKS) + " | seconds a trial |")
        print("|---" * (len(MARKS) + 2) + "|")
        for name, make in makers.items():
            regrets, seconds = [], []
            for seed in range(SEEDS):
                loss = portfolio(size, seed)
                values, each = run(make(seed), names, loss, is_divided=name != "SimplexSampler")
                regrets.append([1e4 * (value - lowest(loss, size)) for value in values])
                seconds.append(each)
            cells = [f"{middle:.2g} [{low:.2g}, {high:.2g}]" for low, middle, high in np.sort(regrets, axis=0).T]
            print(f"| {name} | " + " | ".join(cells) + f" | {np.median(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
