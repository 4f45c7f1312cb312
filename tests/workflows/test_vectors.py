"""Laws of studies with other fine-tunes than one for each corpus: several steps of a run, and vectors without data."""

import json
from pathlib import Path

import pytest
import worlds
import yaml
from in_process import open_study, open_tracked, replace_dependencies

from dem_opt.checkpoints.training_record import JOURNAL, STEPS
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.dashboards.figures import all_figures
from dem_opt.errors import InputError
from dem_opt.export.model_card import RECIPE
from dem_opt.planning.inputs import check_headers, load_inputs
from dem_opt.storage.identity import StudyIdentity
from dem_opt.tracking import NullTracker
from dem_opt.types import SEARCH
from dem_opt.workflows.fine_tuning import jobs

VALIDATED = {2: 5.5, 4: 5.0}
"""NLL of a run's kept steps: the last is the best."""

NAMES = ("code@2", "code@best", "math", "seed")


def keep_steps(run: Path, base: Path, validated: dict[int, float] = VALIDATED) -> None:
    """A run with kept steps, as `dem-opt train` leaves it."""
    for step in validated:
        worlds.save_model(run / STEPS / str(step), step, worlds.LlamaForCausalLM.from_pretrained(base))
    lines = [{"step": step, "seconds": 1.0, "validation": nll} for step, nll in validated.items()]
    (run / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))


def make(folder: Path, several: bool = True, **sections: object) -> Path:
    """A study of two corpora and four fine-tunes: two steps of one run, another's end, and one without data.

    With `several` false it is written as one distribution for each fine-tune, of which two weigh 0.
    """
    worlds.study(folder, ("code", "math"))
    base = worlds.LlamaForCausalLM.from_pretrained(folder / "models/base")
    keep_steps(folder / "models/run", folder / "models/base")
    worlds.save_model(folder / "models/seed", 77, base)
    data = {name: {"validation": f"data/{name}.jsonl"} for name in ("code", "math")}
    math = data["math"] | {"checkpoint": "models/math"}
    if several:
        step = [2, "best"]
        content = {
            "distributions": {"code": data["code"] | {"checkpoint": {"run": "models/run", "step": step}}, "math": math},
            "vectors": {"seed": {"checkpoint": "models/seed"}},
        }
    else:
        content = {
            "distributions": {
                "early": data["code"] | {"checkpoint": "models/run/steps/2"},
                "code": data["code"] | {"checkpoint": "models/run/steps/4"},
                "math": math,
                "seed": data["math"] | {"checkpoint": "models/seed"},
            },
            "objective": {"weights": {"code": 1.0, "math": 1.0, "early": 0.0, "seed": 0.0}},
        }
    return worlds.study(folder, ("code", "math"), **(content | sections))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run, with its gradients."""
    path = make(tmp_path_factory.mktemp("finished"), search={"algorithm": "random", "trials": 6, "gradients": True})
    open_study(path).run()
    return path


def test_each_fine_tune_has_a_coefficient_and_each_corpus_counts_once(finished):
    summary = open_study(finished).summary()
    assert summary.distributions == NAMES
    assert summary.weights == {"code": 1.0, "math": 1.0}
    assert [row.label for row in summary.results if row.role == "single"] == sorted(NAMES)
    for row in summary.results:
        for split in row.scores:
            nll = {name: score.nll for name, score in row.scores[split].items()}
            assert nll.keys() == {"code", "math"}
            assert row.objective[split] == pytest.approx((nll["code"] + nll["math"]) / 2, abs=1e-12)


def test_it_is_the_study_of_as_many_distributions_of_which_each_corpus_weighs_once(finished, tmp_path):
    """Other words for the same composites and objective: each is scored alike."""
    other = make(tmp_path, several=False)
    names = {"early": "code@2", "code": "code@best", "math": "math", "seed": "seed"}
    for coefficients in ({"early": 0.25, "code": 0.5, "seed": 0.25}, {"math": 0.9, "early": 0.1}):
        own = open_study(finished).score({names[name]: weight for name, weight in coefficients.items()})
        expected = open_study(other).score(coefficients)
        assert all(own.scores[SEARCH][name] == expected.scores[SEARCH][name] for name in ("code", "math"))
        assert own.objective[SEARCH] == pytest.approx(expected.objective[SEARCH], abs=1e-12)


def test_the_database_knows_its_identity(finished):
    inputs = load_inputs(load(finished), finished)
    identity = inputs.identity()
    assert StudyIdentity.recall(identity.identity_fields(), identity.scoring_fields()) == identity
    assert tuple(identity.fine_tunes) == NAMES
    assert [model.path.name for model in inputs.fine_tunes.values()] == ["2", "4", "math", "seed"]


def test_gradients_are_by_fine_tune(finished):
    frame = open_study(finished).gradients()
    assert {f"gradient.{name}" for name in NAMES} <= set(frame.columns)
    assert frame[[f"gradient.{name}" for name in NAMES]].notna().all(axis=None)


def test_pages_and_exports_name_every_fine_tune(finished, tmp_path, capsys, monkeypatch):
    replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    assert all_figures(open_study(finished).summary())
    for command in (["check"], ["show"], ["trials", "--csv"], ["report"], ["export", "--out", str(tmp_path / "best")]):
        assert main([*command, str(finished)]) == 0, command
    told = capsys.readouterr().out
    assert all(f"w.{name}" in told for name in NAMES)
    recipe = yaml.safe_load((tmp_path / "best" / RECIPE).read_text())
    assert {Path(model["model"]).name for model in recipe["models"]} <= {"2", "4", "math", "seed", "base"}


def test_mlflow_has_their_coefficients(tmp_path):
    path = make(tmp_path, search={"algorithm": "random", "trials": 5})
    open_tracked(path).run()
    import mlflow

    client = mlflow.MlflowClient(load(path).tracking.uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    keys = {key for run in runs for key in run.data.params if key.startswith("w.")}
    assert keys == {"w.code:2", "w.code:best", "w.math", "w.seed"}


def test_another_step_begins_a_generation_that_keeps_what_is_measured(finished):
    content = yaml.safe_load(finished.read_text())
    content["distributions"]["code"]["checkpoint"]["step"] = ["best"]
    fewer = finished.with_name("fewer.yaml")
    fewer.write_text(yaml.safe_dump(content, sort_keys=False))
    before = open_study(finished).summary()
    summary = open_study(fewer).run().summary
    assert summary.distributions == ("code@best", "math", "seed")
    base = {row.label: row.objective[SEARCH] for row in before.results if row.role in ("base", "single")}
    for row in summary.results:
        if row.role in ("base", "single"):
            assert row.objective[SEARCH] == base[row.label]


def test_the_steps_of_a_distribution_are_of_one_training(tmp_path):
    path = make(tmp_path, fine_tuning={"steps": 4, "batch_size": 2, "save_every": 2, "keep": True})
    content = yaml.safe_load(path.read_text())
    content["distributions"]["code"] |= {"train": "data/code.jsonl"}
    content["distributions"]["code"]["checkpoint"]["run"] = "models/new"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(InputError, match=r"distributions.code.checkpoint = .*models/new.*dem-opt train"):
        check_headers(load(path), path)
    (job,) = jobs(load(path), path)
    assert job.out == tmp_path / "models/new" and job.validation.distribution == "code"


STEP_LIST = {"run": "models/run", "step": [2, 4]}

MISTAKES = {
    "base.step": {"base": STEP_LIST},
    "distributions.code.checkpoint.step": {"objective": {"worst": True}},
    "vectors.seed": {"vectors": {"seed": {"checkpoint": "models/seed", "adapter": "models/seed"}}},
    "vectors.math": {"vectors": {"math": {"checkpoint": "models/seed"}}},
    "general.seed": {"general": {"seed": "data/code.jsonl"}},
    "simplex.bounds.code: the bounds of code@2, code@best allow sums from 0 to 0.3": {
        "simplex": {"bounds": {"code": [0.5, 0.8], "code@2": [0, 0.1], "code@best": [0, 0.2]}}
    },
    "simplex.fixed.code": {"simplex": {"bounds": {"code@2": [0.5, 0.8]}, "fixed": {"code": 0.4}}},
    "simplex.bounds.cod: no such distribution; did you mean 'code'": {"simplex": {"bounds": {"cod": [0, 1]}}},
    "simplex: the greatest coefficients sum to 0.7": {
        "simplex": {"bounds": {"code": [0, 0.5], "math": [0, 0.1]}, "fixed": {"seed": 0.1}}
    },
    "vectors.seed.checkpoint": {"vectors": {"seed": {"checkpoint": {"run": "models/run", "step": [2, 2]}}}},
}


@pytest.mark.parametrize("field", MISTAKES)
def test_a_mistake_is_named_with_its_field(tmp_path, field):
    with pytest.raises(InputError, match=field):
        load(make(tmp_path, **MISTAKES[field]))


@pytest.mark.parametrize("step", [[2, 3], [6]])
def test_a_step_that_was_not_kept_is_named(tmp_path, step):
    path = make(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["distributions"]["code"]["checkpoint"]["step"] = step
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=rf"distributions.code.checkpoint.step = {step[-1]}: .*2, 4"):
        check_headers(load(path), path)


@pytest.mark.parametrize("command", [["compare", "--data-mixing", "2"], ["compare", "--placebo"]])
def test_comparisons_with_one_fine_tune_for_each_distribution_refuse_several(finished, capsys, monkeypatch, command):
    replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    assert main([*command, str(finished)]) == 2
    assert "distributions.code.checkpoint.step" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["simplex-gp", "gradient", "tpe", "grid"])
def test_the_sum_of_a_fine_tunes_steps_is_bounded(tmp_path, algorithm):
    """A new bound is a new generation; without it the sum is greater."""
    search = {"algorithm": algorithm, "trials": 12, "divisions": 4}
    path = make(tmp_path, search=search, simplex={"fixed": {"math": 0.2}})
    free = open_study(path).run().summary
    content = yaml.safe_load(path.read_text())
    content["simplex"] = {"bounds": {"code": [0.0, 0.3], "code@2": [0.0, 0.2]}, "fixed": {"math": 0.2}}
    path.write_text(yaml.safe_dump(content))
    bounded = open_study(path).run().summary
    greatest = []
    for summary in (free, bounded):
        trials = [trial.coefficients.units for trial in next(iter(summary.trials.values()))]
        greatest.append(max(units["code@2"] + units["code@best"] for units in trials))
        assert all(sum(units.values()) == 10**9 for units in trials)
    assert greatest[1] <= 3 * 10**8 < greatest[0]
    with pytest.raises(InputError, match=r"sums to 0.4; the study file bounds the sum of code to 0 .. 0.3"):
        open_study(path).score({"code@2": 0.1, "code@best": 0.3, "math": 0.2, "seed": 0.4})


def test_bounds_of_a_step_hold(tmp_path):
    path = make(tmp_path, simplex={"bounds": {"code@2": [0.0, 0.1]}})
    summary = open_study(path).run().summary
    assert all(trial.coefficients["code@2"] <= 0.1 for trial in next(iter(summary.trials.values())))
