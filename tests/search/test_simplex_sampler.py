"""`SimplexSampler` in plain Optuna studies, which know nothing else of ours."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Barrier

import optuna
import pytest

from dem_opt.search.samplers import SimplexSampler

ROOT = Path(__file__).parents[2]
NAMES = ["flour", "butter", "sugar", "salt"]
OPTIMUM = {"flour": 0.6, "butter": 0.3, "sugar": 0.1, "salt": 0.0}
ALGORITHMS = ["simplex-gp", "tpe", "cmaes", "random", "grid"]

Objective = Callable[[optuna.Trial], float]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def bowl(recipe: Mapping[str, float]) -> float:
    """|w - m|^2, least where m is: on the face salt = 0."""
    return sum((recipe[name] - OPTIMUM[name]) ** 2 for name in NAMES)


def suggest(trial: optuna.Trial) -> dict[str, float]:
    return {name: trial.suggest_float(name, 0, 1) for name in NAMES}


def objective(trial: optuna.Trial) -> float:
    return bowl(suggest(trial))


def params(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


PROGRAM = """
import sys
import optuna
from dem_opt.search.samplers import SimplexSampler

assert not {"torch", "ray", "mlflow", "sqlalchemy"} & (set(sys.modules) - set(before)), "no heavy library"
optuna.logging.set_verbosity(optuna.logging.ERROR)
names, optimum = ["x", "y", "z"], {"x": 0.05, "y": 0.7, "z": 0.25}

def objective(trial):
    w = {name: trial.suggest_float(name, 0, 1) for name in names}
    return sum((w[name] - optimum[name]) ** 2 for name in names)

def search(algorithm, seed):
    study = optuna.create_study(sampler=SimplexSampler(names, algorithm=algorithm, seed=seed))
    study.optimize(objective, n_trials=20)
    assert all(abs(sum(trial.params.values()) - 1) < 1e-9 for trial in study.trials)
    return study

best = search("simplex-gp", 0)
assert best.best_value < 0.05 * min(search("random", seed).best_value for seed in range(3))
assert [t.params for t in best.trials] == [t.params for t in search("simplex-gp", 0).trials]
assert [t.params for t in best.trials] != [t.params for t in search("simplex-gp", 1).trials]
"""


def test_a_program_of_optuna_and_the_sampler_alone() -> None:
    """Exact sums, far better than random search, and the same proposals for the same seed."""
    program = f"import sys, sqlalchemy, optuna\nbefore = list(sys.modules)\n{PROGRAM}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_sampler_needs_no_torch() -> None:
    """Nor anything else of models and clusters; a proposal loads none of them either."""
    program = (
        "import sys, optuna\n"
        "from dem_opt.search.samplers import SimplexSampler\n"
        "study = optuna.create_study(sampler=SimplexSampler(['a', 'b']))\n"
        "study.optimize(lambda trial: trial.suggest_float('a', 0, 1) + trial.suggest_float('b', 0, 1) ** 2, 5)\n"
        "assert not {'torch', 'transformers', 'ray', 'mlflow'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/examples/sampler.py"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert "1.000000000" in done.stdout


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ask_and_tell_keep_an_exact_sum(algorithm: str) -> None:
    study = optuna.create_study(sampler=SimplexSampler(NAMES, algorithm=algorithm, divisions=4))
    for _ in range(12):
        trial = study.ask()
        study.tell(trial, objective(trial))
    assert all(round(sum(recipe.values()) * 1e9) == 10**9 for recipe in params(study))
    assert all(abs(sum(recipe.values()) - 1) < 1e-9 for recipe in params(study))
    assert len({tuple(recipe.values()) for recipe in params(study)}) == 12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trials_asked_before_any_is_suggested_differ(algorithm: str) -> None:
    study = optuna.create_study(sampler=SimplexSampler(NAMES, algorithm=algorithm, divisions=4))
    recipes = [suggest(trial) for trial in [study.ask() for _ in range(8)]]
    assert len({tuple(recipe.values()) for recipe in recipes}) == 8


def test_threads_get_different_points() -> None:
    """Four objectives wait for each other after they were suggested, so all four run at once."""
    barrier = Barrier(4, timeout=60)

    def together(trial: optuna.Trial) -> float:
        recipe = suggest(trial)
        barrier.wait()
        return bowl(recipe)

    study = optuna.create_study(sampler=SimplexSampler(NAMES))
    study.optimize(together, n_trials=12, n_jobs=4)
    assert len({tuple(recipe.values()) for recipe in params(study)}) == 12


def test_failed_and_pruned_trials_are_not_proposed_again() -> None:
    def fragile(trial: optuna.Trial) -> float:
        recipe = suggest(trial)
        if trial.number % 4 == 2:
            raise optuna.TrialPruned
        if trial.number % 4 == 3:
            raise RuntimeError("burnt")
        return float("inf") if trial.number == 8 else bowl(recipe)

    study = optuna.create_study(sampler=SimplexSampler(NAMES))
    study.optimize(fragile, n_trials=16, catch=RuntimeError)
    assert len({tuple(recipe.values()) for recipe in params(study)}) == 16
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED", "FAIL"}


@pytest.mark.parametrize("algorithm", ["simplex-gp", "tpe", "cmaes"])
def test_a_study_from_its_storage_goes_on_as_if_it_had_not_stopped(algorithm: str, tmp_path: Path) -> None:
    whole = optuna.create_study(sampler=SimplexSampler(NAMES, algorithm=algorithm))
    whole.optimize(objective, n_trials=12)
    storage = f"sqlite:///{tmp_path}/study.db"
    for _ in range(2):
        sampler = SimplexSampler(NAMES, algorithm=algorithm)
        part = optuna.create_study(study_name="part", storage=storage, load_if_exists=True, sampler=sampler)
        part.optimize(objective, n_trials=6)
    assert params(part) == params(whole)


def test_maximizing_is_minimizing_the_negative() -> None:
    least = optuna.create_study(sampler=SimplexSampler(NAMES))
    least.optimize(objective, n_trials=10)
    greatest = optuna.create_study(sampler=SimplexSampler(NAMES), direction="maximize")
    greatest.optimize(lambda trial: -objective(trial), n_trials=10)
    assert params(least) == params(greatest)


def test_gradients_of_the_user_are_learned_from() -> None:
    def with_gradient(trial: optuna.Trial) -> float:
        recipe = suggest(trial)
        slopes = {name: 2 * (recipe[name] - OPTIMUM[name]) for name in NAMES}
        for name, slope in slopes.items():
            trial.set_user_attr(f"gradient.{name}", slope)
        return bowl(recipe)

    study = optuna.create_study(sampler=SimplexSampler(NAMES, algorithm="gradient"))
    study.optimize(with_gradient, n_trials=6)
    assert study.best_value < 1e-6


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "gradient", "nsga2"])
def test_bounds_of_sums_hold(algorithm: str) -> None:
    """The bowl is least at butter + sugar = 0.4: under a limit of 0.25 the search comes to the limit."""
    sampler = SimplexSampler(NAMES, algorithm=algorithm, sums={("butter", "sugar"): (0.1, 0.25)}, divisions=8)

    def graded(trial: optuna.Trial) -> float:
        recipe = suggest(trial)
        for name in NAMES:
            trial.set_user_attr(f"gradient.{name}", 2 * (recipe[name] - OPTIMUM[name]))
        return bowl(recipe)

    study = optuna.create_study(sampler=sampler)
    study.optimize(graded, n_trials=40)
    sums = [round((recipe["butter"] + recipe["sugar"]) * 10**9) for recipe in params(study)]
    assert all(10**8 <= units <= 25 * 10**7 for units in sums)
    if algorithm in ("simplex-gp", "gradient"):
        best = study.best_params
        # Projection of the optimum: the excess of 0.15 is taken from both, and given to flour and salt.
        assert list(best.values()) == pytest.approx([0.675, 0.225, 0.025, 0.075], abs=0.01)


def test_totals_and_bounds_hold() -> None:
    sampler = SimplexSampler(NAMES, total=(0.5, 2), bounds={"salt": (0.1, 0.2), "sugar": (0.3, 0.3)})
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: bowl({name: trial.suggest_float(name, 0, 2) for name in NAMES}), n_trials=10)
    for recipe in params(study):
        assert 0.5 <= sum(recipe.values()) <= 2 and 0.1 <= recipe["salt"] <= 0.2 and recipe["sugar"] == 0.3


def test_a_grid_ends_the_study() -> None:
    """C(2 + 3, 3) = 10 points."""
    study = optuna.create_study(sampler=SimplexSampler(NAMES, algorithm="grid", divisions=2))
    study.optimize(objective, n_trials=100)
    assert len({tuple(recipe.values()) for recipe in params(study)}) == len(study.trials) == 10


def test_one_sampler_serves_several_studies() -> None:
    sampler = SimplexSampler(NAMES)
    first, second = (optuna.create_study(sampler=sampler) for _ in range(2))
    for _ in range(8):
        first.optimize(objective, n_trials=1)
        second.optimize(objective, n_trials=1)
    assert params(first) == params(second)


def test_enqueued_points_are_evaluated_and_learned_from() -> None:
    study = optuna.create_study(sampler=SimplexSampler(["a", "b", "c"]))
    study.enqueue_trial({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    study.optimize(lambda trial: trial.suggest_float("a", 0, 1) + 0 * trial.suggest_float("b", 0, 1), n_trials=1)
    study.optimize(lambda trial: sum(trial.suggest_float(name, 0, 1) for name in "abc"), n_trials=6)
    assert study.trials[0].params == {"a": 1 / 3, "b": 1 / 3}


def test_points_off_the_simplex_are_passed_over_with_a_warning() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=1)
    study.sampler = SimplexSampler(NAMES)
    with pytest.warns(UserWarning, match="trial 0 is passed over"):
        study.optimize(objective, n_trials=1)
    assert abs(sum(study.trials[1].params.values()) - 1) < 1e-9


def test_a_sampler_survives_pickling() -> None:
    study = optuna.create_study(sampler=SimplexSampler(NAMES))
    study.optimize(objective, n_trials=6)
    other = pickle.loads(pickle.dumps(study.sampler))
    assert isinstance(other, SimplexSampler)
    continued = optuna.create_study(sampler=other)
    continued.add_trials(study.trials)
    for either in (study, continued):
        either.optimize(objective, n_trials=3)
    assert params(study) == params(continued)


@pytest.mark.parametrize(
    ("suggestion", "field"),
    [
        (lambda trial: trial.suggest_float("learning_rate", 0, 1), "learning_rate"),
        (lambda trial: trial.suggest_categorical("oven", ["gas", "electric"]), "oven"),
        (lambda trial: trial.suggest_float("butter", 0.2, 0.3), "butter"),
    ],
    ids=["float", "categorical", "narrow range"],
)
def test_other_parameters_are_refused_in_one_line(suggestion: Objective, field: str) -> None:
    study = optuna.create_study(sampler=SimplexSampler(["flour", "butter"]))
    with pytest.raises(ValueError, match=field) as refused:
        study.optimize(suggestion, n_trials=1)
    assert "\n" not in str(refused.value)


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(sampler=SimplexSampler(NAMES), directions=["minimize", "minimize"])
    with pytest.raises(ValueError, match="one objective"):
        suggest(study.ask())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"names": []}, "names"),
        ({"names": ["a", "a"]}, "names"),
        ({"algorithm": "annealing"}, "annealing"),
        ({"total": 0.0}, "total"),
        ({"total": (2.0, 1.0)}, "total"),
        ({"bounds": {"d": (0, 1)}}, "bounds of d"),
        ({"bounds": {"a": (0.5, 0.2)}}, "bounds of a"),
        ({"bounds": {"a": (0.6, 1), "b": (0.6, 1)}}, "bounds"),
        ({"bounds": dict.fromkeys("abc", (0, 0.2))}, "bounds"),
        ({"sums": {("a", "d"): (0, 1)}}, "sums of d"),
        ({"sums": {("a", "b"): (0, 1), ("b", "c"): (0, 1)}}, "sums of b"),
        ({"sums": {("a", "b"): (0.5, 0.2)}}, r"a \+ b"),
        ({"sums": {("a", "b"): (0, 0.2)}, "bounds": {"c": (0, 0.2)}}, "no coefficients within them"),
    ],
)
def test_an_empty_space_is_refused_in_one_line(arguments: dict[str, object], field: str) -> None:
    settings: dict[str, object] = {"names": ["a", "b", "c"]} | arguments
    with pytest.raises(ValueError, match=field) as refused:
        SimplexSampler(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
