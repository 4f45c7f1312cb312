"""Laws of a custom objective: it is what is minimized, it identifies the study, and its mistakes are one line."""

from pathlib import Path

import pytest
import worlds
from in_process import open_study

from dem_opt.cli.main import main
from dem_opt.config import load
from dem_opt.config.objective_function import ObjectiveFunction, import_from
from dem_opt.errors import InputError
from dem_opt.planning.inputs import load_inputs
from dem_opt.types import HELD_OUT, SEARCH, Score

HARDEST = "def {name}(scores):\n    return max(score.nll for score in scores.values())\n"
BROKEN = """
from math import nan, inf

constant = 3.0


def text(scores):
    return "low"


def missing(scores):
    return scores["nothing"].nll


def infinite(scores):
    return inf


def partly(scores):
    return nan if scores["code"].nll < {limit!r} else scores["code"].nll
"""


def custom_study(folder: Path, module: str, source: str, function: str, **sections: object) -> Path:
    """A study whose objective is a function in a module beside it; module names differ, since Python keeps modules."""
    path = worlds.study(folder, objective={"function": f"{module}:{function}"}, **sections)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    return path


def test_the_winner_minimizes_the_function_on_the_search_split(tmp_path: Path) -> None:
    source = HARDEST.format(name="hardest")
    search = {"algorithm": "grid", "divisions": 4}
    study = open_study(custom_study(tmp_path, "hardest_of_all", source, "hardest", search=search))
    result = study.run()
    trials = result.summary.trials["grid"]
    for trial in trials:
        assert trial.objective == max(score.nll for score in trial.scores.values()) and not trial.is_partial
    winner = result.winner
    assert winner.objective[SEARCH] == min(trial.objective for trial in trials)
    assert winner.objective[HELD_OUT] == max(score.nll for score in winner.scores[HELD_OUT].values())
    assert study.summary() == result.summary and result.summary.function == "hardest_of_all:hardest"
    for margin in result.summary.margins:
        assert margin.low <= margin.mean <= margin.high
    assert "hardest_of_all:hardest" in study.report(tmp_path / "report.html").read_text(encoding="utf-8")


def test_its_source_is_read_once_however_often_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    custom_study(tmp_path, "read_once", HARDEST.format(name="hardest"), "hardest")
    import_from(tmp_path)
    function = ObjectiveFunction.load("read_once:hardest")
    monkeypatch.setattr("inspect.getsource", None)
    assert function({"code": Score((3.0,), (2,)), "math": Score((4.0,), (2,))}) == 2.0


def test_no_trial_is_raced_or_measured_with_its_gradient(tmp_path: Path) -> None:
    source = HARDEST.format(name="whole")
    search = {"algorithm": "simplex-gp", "trials": 8}
    study = open_study(custom_study(tmp_path, "never_raced", source, "whole", search=search))
    study.run()
    assert set(study.trials()["state"]) == {"complete"} and study.gradients().empty


def test_the_function_identifies_the_study_only_where_it_is_set(tmp_path: Path) -> None:
    plain = worlds.study(tmp_path / "plain")
    assert not [field for field in load_inputs(load(plain), plain).identity().identity_fields() if "function" in field]
    search = {"algorithm": "random", "trials": 2}
    path = custom_study(tmp_path, "first_of_two", HARDEST.format(name="same"), "same", search=search)
    first = open_study(path)
    first.run()
    custom_study(tmp_path, "second_of_two", HARDEST.format(name="same"), "same", search=search)
    with pytest.raises(InputError):
        open_study(path).export(tmp_path / "best")
    renamed = open_study(path)
    renamed.run()
    assert renamed.summary().function == "second_of_two:same"


@pytest.mark.parametrize("function", ["absent", "constant", "text", "missing"])
def test_a_function_that_is_none_is_one_line_and_the_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], function: str
) -> None:
    source = BROKEN.format(limit=0.0)
    path = custom_study(tmp_path, f"broken_{function}", source, function, search={"algorithm": "random", "trials": 2})
    with pytest.raises(InputError) as refusal:
        open_study(path).run()
    assert refusal.value.field == "objective.function" and "\n" not in str(refusal.value)
    if function in ("absent", "constant"):
        assert main(["check", str(path)]) == 2
        assert "objective.function" in capsys.readouterr().err


def test_a_trial_whose_objective_is_not_finite_fails_alone(tmp_path: Path) -> None:
    search = {"algorithm": "grid", "divisions": 3}
    plain = open_study(worlds.study(tmp_path, search=search)).run().summary
    losses = sorted(trial.scores["code"].nll for trial in plain.trials["grid"])
    limit = (losses[0] + losses[1]) / 2
    path = custom_study(tmp_path, "partly_finite", BROKEN.format(limit=limit), "partly", search=search)
    study = open_study(path)
    study.run()
    states = study.trials()["state"].tolist()
    assert (
        states.count("failed") == 1
        and "objective.function" in study.trials().query("state == 'failed'")["reason"].item()
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"worst": True}},
        {"objective": {"weights": {"code": 1}}},
        {"search": {"racing": True}},
        {"search": {"gradients": True}},
        {"search": {"algorithm": "gradient"}},
    ],
)
def test_what_makes_no_sense_beside_a_function_is_refused(tmp_path: Path, sections: dict) -> None:
    objective = {"function": "some.module:name"} | sections.get("objective", {})
    with pytest.raises(InputError) as refusal:
        load(worlds.study(tmp_path, **(sections | {"objective": objective})))
    assert "objective.function" in str(refusal.value)


@pytest.mark.parametrize("name", [".", "open_to_all.py"])
def test_code_that_every_user_can_change_is_not_imported(tmp_path: Path, name: str, capsys) -> None:
    path = custom_study(tmp_path / "study", "open_to_all", HARDEST.format(name="hardest"), "hardest")
    place = path.parent / name
    place.chmod(place.stat().st_mode | 0o002)
    assert main(["check", str(path)]) == 2
    assert "objective.function" in (message := capsys.readouterr().err) and "chmod o-w" in message
