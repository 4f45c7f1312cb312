"""Mix a paint of four pigments: `SimplexSampler` in a plain Optuna study.

    python docs/examples/sampler.py

The shares of the pigments sum to 1 exactly.  The objective is an analytic stand-in for an experiment: the distance of
the mixture's colour from a target, with a price for the dearest pigment.
"""

import optuna

from dem_opt.search.samplers import SimplexSampler

PIGMENTS = {
    "ochre": (0.80, 0.47, 0.13),
    "madder": (0.89, 0.15, 0.21),
    "ultramarine": (0.07, 0.04, 0.56),
    "chalk": (0.96, 0.95, 0.91),
}
"""Red, green and blue of each pigment."""

TARGET = (0.78, 0.60, 0.55)


def objective(trial: optuna.Trial) -> float:
    """Squared distance from the target's colour, and a price for ultramarine."""
    shares = {name: trial.suggest_float(name, 0, 1) for name in PIGMENTS}
    colour = [sum(shares[name] * pigment[channel] for name, pigment in PIGMENTS.items()) for channel in range(3)]
    distance = sum((mixed - wanted) ** 2 for mixed, wanted in zip(colour, TARGET, strict=True))
    return distance + 0.01 * shares["ultramarine"]


def main() -> None:
    """Search with 25 mixtures, and compare with random ones."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=SimplexSampler(list(PIGMENTS), seed=0))
    study.optimize(objective, n_trials=25)
    random = optuna.create_study(sampler=SimplexSampler(list(PIGMENTS), algorithm="random", seed=0))
    random.optimize(objective, n_trials=25)
    for name, share in study.best_params.items():
        print(f"{name:12} {share:.9f}")
    print(f"{'sum':12} {sum(study.best_params.values()):.9f}")
    print(f"loss {study.best_value:.6f}; best of 25 random mixtures {random.best_value:.6f}")


if __name__ == "__main__":
    main()
