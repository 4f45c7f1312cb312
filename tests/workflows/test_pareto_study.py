"""A study that searches for a front: run, resumed, listed, compared, reported; every screen says what its winner is."""

import json
from contextlib import redirect_stdout
from io import StringIO

import in_process
import numpy as np
import optuna
import pytest
import worlds
import yaml
from optuna.storages import RDBStorage

from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.pareto import hypervolume, non_dominated
from dem_opt.types import SEARCH

NAMES = ("code", "math")
SEARCHED = {"algorithm": "simplex-gp", "trials": 7, "lookahead": 0}
EVALUATION = {"window": 32, "windows": 4, "held_out": 4}


def study_of(folder, names=NAMES, search=SEARCHED, **sections):
    objective = {"pareto": list(names), **sections.pop("objective", {})}
    return worlds.study(folder, search=search, evaluation=EVALUATION, objective=objective, **sections)


def command(*words):
    """Output of a command."""
    with redirect_stdout(StringIO()) as printed:
        assert main([*map(str, words)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A study that was run by the command, and by two algorithms more."""
    path = study_of(tmp_path_factory.mktemp("front"))
    with pytest.MonkeyPatch.context() as patch:
        in_process.replace_dependencies(patch, compute=InProcessCompute())
        command("run", "--quiet", path)
        command("compare", "--quiet", path, "--algorithms", "random,nsga2,simplex-gp")
        command("report", "--quiet", path)
    return path


@pytest.fixture(scope="module")
def summary(path):
    return in_process.open_study(path).summary()


def losses(record):
    return tuple(record.losses.values())


def test_the_objective_is_the_mean_of_both_losses_and_the_winner_is_on_the_front(summary):
    for record in (record for records in summary.trials.values() for record in records):
        assert list(record.losses) == list(NAMES) and not record.is_partial
        assert losses(record) == tuple(record.scores[name].nll for name in NAMES)
        assert record.objective == pytest.approx(sum(losses(record)) / 2)
    (winner,) = (point for point in summary.front.points if point.coefficients == summary.winner.coefficients)
    assert winner is summary.front.lowest_mean
    assert sum(winner.search) / 2 == pytest.approx(summary.winner.objective[SEARCH])
    assert summary.front.names == NAMES


@pytest.mark.parametrize("algorithm", ["simplex-gp", "random", "nsga2"])
def test_optuna_has_a_study_of_two_objectives_whose_best_trials_are_the_front(path, summary, algorithm):
    storage = RDBStorage(load(path).storage)
    study = optuna.load_study(study_name=f"tiny/{algorithm}", storage=storage)
    records = summary.trials[algorithm]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert study.metric_names == ["nll.code", "nll.math"]
    assert [tuple(trial.values) for trial in study.trials] == [losses(record) for record in records]
    on_front = non_dominated(np.array([losses(record) for record in records]))
    expected = {record.number for record, is_best in zip(records, on_front, strict=True) if is_best}
    assert {trial.number for trial in study.best_trials} == expected
    storage.remove_session()
    storage.engine.dispose()


def test_commands_agree(path, summary):
    (listed,) = json.loads(command("list", path, "--json"))
    means = {run: min(record.objective for record in records) for run, records in summary.trials.items()}
    assert {run["name"]: run["best"] for run in listed["runs"]} == pytest.approx(means)
    assert listed["pareto"] == list(NAMES)
    front = json.loads(command("pareto", path, "--json"))
    assert front["between"] == list(NAMES) and front["hypervolume"] == summary.front.hypervolume
    shown = json.loads(command("show", path, "--json"))
    assert {key: front[key] for key in shown["front"]} == shown["front"]
    rows = json.loads(command("trials", path, "--json"))
    assert [(row["loss.code"], row["loss.math"]) for row in rows] == [
        losses(record) for records in summary.trials.values() for record in records
    ]
    assert "loss.code" in command("trials", path, "--csv").splitlines()[0]
    frame = in_process.open_study(path).trials()
    assert frame["loss.math"].tolist() == [row["loss.math"] for row in rows]
    page = (path.parent / "runs/tiny/report.html").read_text(encoding="utf-8")
    for text in (command("show", path), page):
        assert f"{summary.front.hypervolume:.6g}" in text and "lowest mean" in text
    assert '"pareto"' in page and command("list", path) and command("trials", path)


def test_a_comparison_is_of_hypervolumes(path, summary):
    comparison = json.loads((path.parent / "runs/tiny/comparison.json").read_text())
    assert comparison["title"] == "Missing hypervolume" and comparison["unit"] == "nats per token, squared"
    reference = summary.front.reference
    volumes = {
        run: hypervolume(np.array([losses(record) for record in records]), reference)
        for run, records in summary.trials.items()
    }
    union = hypervolume(np.array([losses(record) for each in summary.trials.values() for record in each]), reference)
    assert comparison["best"] == -union
    for row in comparison["rows"]:
        (run,) = row["runs"]
        assert -run["best_S"][-1] == volumes[run["name"]]
        assert row["curve"][-1]["median"] == pytest.approx(union - volumes[run["name"]], abs=1e-12)


def test_a_finished_study_is_answered_and_a_resumed_one_goes_the_same_way(path, summary, tmp_path):
    again = in_process.open_study(path).run()
    assert len(again.summary.trials["simplex-gp"]) == 7
    for trials in (5, 7):
        study = in_process.open_study(study_of(tmp_path, search=SEARCHED | {"trials": trials}))
        records = study.run().summary.trials["simplex-gp"]
    points = [[record.coefficients for record in each] for each in (records, summary.trials["simplex-gp"])]
    assert points[0] == points[1]


def test_other_losses_are_another_generation(tmp_path):
    in_process.open_study(study_of(tmp_path, search=SEARCHED | {"algorithm": "random", "trials": 3})).run()
    weights = {"objective": {"weights": {"code": 2.0, "math": 1.0, "prose": 1.0}}}
    path = study_of(tmp_path, ("mean", "prose"), SEARCHED | {"algorithm": "random", "trials": 3}, **weights)
    result = in_process.open_study(path).run()
    assert result.summary.front.names == ("mean", "prose")
    record = result.summary.trials["random"][0]
    assert record.study == "tiny/random#2"
    nll = {name: score.nll for name, score in record.scores.items()}
    assert record.losses["mean"] == pytest.approx((2 * nll["code"] + nll["math"] + nll["prose"]) / 4)
    assert in_process.open_study(path).pareto("prose", "mean").points[0].search[1] >= min(
        point.search[0] for point in result.summary.front.points
    )


@pytest.mark.parametrize(
    ("sections", "mend"),
    [
        ({"objective": {"pareto": ["code"]}}, "objective.pareto"),
        ({"objective": {"pareto": []}}, "objective.pareto"),
        ({"objective": {"pareto": "code"}}, "objective.pareto"),
        ({"objective": {"pareto": ["code", "math", "prose"]}}, "objective.pareto"),
        ({"objective": {"pareto": ["code", "maths"]}}, "did you mean 'math'"),
        ({"objective": {"pareto": ["code", "code"]}}, "twice"),
        ({"objective": {"pareto": ["mean", "mean"]}}, "twice"),
        ({"objective": {"pareto": ["code", "math"], "worst": True}}, "objective.worst"),
        ({"objective": {"pareto": ["code", "math"], "function": "a:b"}}, "objective.function"),
        ({"objective": {"pareto": ["code", "math"], "protect": {"code": 0.1}}}, "objective.protect"),
        ({"objective": {"pareto": ["code", "math"], "weights": {"code": 1.0}}}, "objective.weights"),
        ({"search": {"racing": True}}, "search.racing"),
        ({"search": {"gradients": True}}, "search.gradients"),
        ({"search": {"patience": 3}}, "search.patience"),
        ({"search": {"algorithm": "gradient"}}, "search.algorithm"),
        ({"search": {"algorithm": "cmaes"}}, "search.algorithm"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line(path, tmp_path, capsys, sections, mend):
    content = yaml.safe_load(path.read_text()) | sections
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=mend):
        load(file)
    assert main(["run", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "objective.pareto" in line and str(file) in line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("algorithm", ["cmaes", "gradient"])
def test_algorithms_for_one_number_are_refused_in_a_comparison(path, algorithm):
    with pytest.raises(InputError, match="front") as refusal:
        in_process.open_study(path).compare([algorithm])
    assert (refusal.value.field, refusal.value.value) == ("algorithm", algorithm)


def test_a_study_without_a_front_has_to_name_two_losses(tmp_path, capsys):
    path = worlds.study(tmp_path, search={"algorithm": "random", "trials": 2}, evaluation=EVALUATION)
    in_process.open_study(path).run()
    assert main(["pareto", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--between" in line
