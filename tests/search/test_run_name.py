"""Run names are read as they were written."""

import pytest

from dem_opt.config import ALGORITHMS
from dem_opt.search.run_name import RunName

RUNS = [
    RunName(algorithm, seed, generation) for algorithm in ALGORITHMS for seed in (0, 1, 12) for generation in (1, 3)
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.optuna_name("s"))
@pytest.mark.parametrize("study", ["tiny", "a/b", "a|b", "a#2", "tpe@1"])
def test_names_are_read_back(run: RunName, study: str) -> None:
    assert RunName.parse(run.label, run.generation) == run
    assert RunName.from_optuna(run.optuna_name(study), study) == run


def test_names_are_those_of_earlier_releases() -> None:
    assert RunName("tpe").optuna_name("tiny") == "tiny/tpe"
    assert RunName("tpe", 2).optuna_name("tiny") == "tiny/tpe@2"
    assert RunName("simplex-gp", 0, 3).optuna_name("tiny") == "tiny/simplex-gp#3"


@pytest.mark.parametrize("name", ["other/tpe", "tiny", "tiny/annealing", "tiny/other/tpe", "tiny/tpe@x", "tiny/tpe#x"])
def test_other_studies_are_no_runs(name: str) -> None:
    assert RunName.from_optuna(name, "tiny") is None
