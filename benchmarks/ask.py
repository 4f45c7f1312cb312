"""How long a proposal takes: `python benchmarks/ask.py`.

Studies of eight distributions in memory, after 100 and 10,000 told trials: a third of them were stopped, or all have a
gradient.  Then `simplex-gp` with gradients, after 200 trials of up to 32 distributions.  Seconds of one processor,
whatever else the machine does, the median of five asks after a first one that reads the history.
"""

from time import process_time

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from dem_opt.search.samplers import SimplexSampler, make_proposer, propose
from dem_opt.search.samplers.history import Trial, distributions, parameters
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.simplex import Coefficients, Space

SPACE = Space(tuple("abcdefgh"))
CASES = [
    ("simplex-gp", False),
    ("simplex-gp", True),
    ("tpe", False),
    ("cmaes", False),
    ("gradient", True),
    ("random", False),
]
"""Algorithms, and whether their trials have gradients."""

COUNTS = (100, 10_000)

SIZES, MANY = (8, 16, 32), 200
"""Numbers of distributions, and of trials with a gradient."""


def history(count: int, gradients: bool, space: Space = SPACE) -> list[Trial]:
    """Landmarks and draws with the values of a bowl that is least on a face."""
    rng = np.random.default_rng(0)
    goal_K = np.pad([0.4, 0.3, 0.2, 0.1], (0, len(space.names) - 4))
    drawn = (space.at(rng.dirichlet(20 * goal_K + 0.3)) for _ in range(count))
    points = [*space.landmarks(), *drawn][:count]
    return [_told(number, point, goal_K, gradients, space) for number, point in enumerate(points)]


def _told(number: int, point: Coefficients, goal_K: np.ndarray, gradients: bool, space: Space) -> Trial:
    away_K = space.point(point) - goal_K
    attributes = TrialAttributes()
    if gradients:
        attributes = TrialAttributes(gradient=dict(zip(space.names, (2 * away_K).tolist(), strict=True)))
    elif number % 3 == 2:
        attributes = TrialAttributes(error=1e-3, forwards=0.25)
    return Trial(number, point, "complete", objective=float(away_K @ away_K), attributes=attributes)


def seconds(algorithm: str, gradients: bool, count: int, times: int = 5) -> float:
    """The median of several asks with different seeds, in seconds of a processor."""
    sampler = SimplexSampler(SPACE.names, algorithm=algorithm)
    study = optuna.create_study(storage=InMemoryStorage(), sampler=sampler)
    study.add_trials(_frozen(trial) for trial in history(count, gradients))
    spent = []
    for _ in range(times + 1):
        began = process_time()
        trial = study.ask(distributions(SPACE))
        spent.append(process_time() - began)
        study.tell(trial, state=TrialState.FAIL)
    return float(np.median(spent[1:]))


def seconds_of(size: int, times: int = 5) -> float:
    """The median of several proposals of `simplex-gp` with gradients, in seconds of a processor."""
    space = Space(tuple(f"d{number:02}" for number in range(size)))
    proposer, trials, spent = make_proposer("simplex-gp", space, gradients=True), history(MANY, True, space), []
    for seed in range(times + 1):
        began = process_time()
        propose(proposer, trials, (), seed)
        spent.append(process_time() - began)
    return float(np.median(spent[1:]))


def _frozen(trial: Trial) -> FrozenTrial:
    return create_trial(
        value=trial.objective,
        params=parameters(trial.coefficients),
        distributions=distributions(SPACE),
        user_attrs=trial.attributes.to_stored(),
    )


def main() -> None:
    """One row an algorithm."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print("| algorithm | " + " | ".join(f"after {count:,} trials, s" for count in COUNTS) + " |")
    print("|---" * (len(COUNTS) + 1) + "|")
    for name, gradients in CASES:
        cells = [f"{seconds(name, gradients, count):.3f}" for count in COUNTS]
        label = name + (", gradients" if gradients and name != "gradient" else "")
        print("| " + " | ".join([label, *cells]) + " |", flush=True)
    print(f"\n| distributions | simplex-gp, {MANY} trials with gradients, s |\n|---|---|")
    for size in SIZES:
        print(f"| {size} | {seconds_of(size):.2f} |", flush=True)


if __name__ == "__main__":
    main()
