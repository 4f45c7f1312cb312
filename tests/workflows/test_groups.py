"""Laws of studies whose groups of parameters have coefficients of their own."""

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import optuna
import pytest
import worlds
import yaml
from in_process import open_study
from recorded import RecordedProgress
from safetensors.torch import load_file

from dem_opt.cli.coefficients import read_coefficients
from dem_opt.cli.json_output import of_summary
from dem_opt.cli.main import main
from dem_opt.dashboards.figures import all_figures
from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.worker import Worker
from dem_opt.export.lora_writer import OPTION
from dem_opt.grouping import GroupedCoefficients
from dem_opt.search.catalog import optuna_studies_of
from dem_opt.search.group_log import log_trials
from dem_opt.search.group_search import Measured
from dem_opt.simplex import Space
from dem_opt.types import HELD_OUT, SEARCH, SPLITS
from dem_opt.workflows.group_coefficients import refuse_groups

SPACE = Space(("code", "math", "prose"))
SEARCH_SECTION = {"algorithm": "random", "trials": 4}


def make(folder: Path, groups: object = "layers", **sections: object) -> Path:
    """A study of a base of two layers; its fine-tunes are random, so that no coefficients generalize."""
    if not (folder / "models/base").exists():
        worlds.save_model(folder / "models/base", seed=0, layers=2)
    coefficients = {"groups": groups, **sections.pop("coefficients", {})}
    return worlds.study(folder, coefficients=coefficients, search=SEARCH_SECTION, **sections)


@pytest.fixture(scope="module")
def unshrunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run to the unshrunk optimum of its layers."""
    path = make(tmp_path_factory.mktemp("unshrunk"), coefficients={"shrink": "none", "forwards": 24})
    open_study(path).run()
    return path


def test_the_winner_is_the_optimum_of_the_groups_and_better_on_the_search_split(unshrunk):
    summary = open_study(unshrunk).summary()
    winner, centre = summary.winner, summary.global_winner
    assert isinstance(winner.groups, GroupedCoefficients) and winner.groups == summary.groups.coefficients
    assert tuple(winner.groups) == ("embedding", "layers.0", "layers.1")
    assert winner.coefficients == centre.coefficients == summary.groups.centre
    assert winner.objective[SEARCH] < centre.objective[SEARCH]
    assert winner.objective.keys() == set(SPLITS)
    assert {margin.rival for margin in summary.margins} >= {centre.label}
    space = open_study(unshrunk).config.space
    assert all(space.contains(row) for row in winner.groups.values())


def test_every_evaluation_is_charged(unshrunk):
    summary = open_study(unshrunk).summary()
    (cost,) = (cost for cost in summary.costs if cost.part == "groups")
    assert cost.forwards == pytest.approx(summary.groups.forwards) and summary.groups.forwards <= 24
    assert summary.winner.forwards == pytest.approx(summary.global_winner.forwards + cost.forwards)


def test_a_finished_study_is_answered_from_its_database(unshrunk):
    progress = RecordedProgress()
    open_study(unshrunk, progress).run()
    assert any("finished" in note for note in progress.notes)


def test_scores_of_a_file_of_coefficients_are_those_of_the_winner(unshrunk, tmp_path):
    study = open_study(unshrunk)
    winner = study.summary().winner
    file = tmp_path / "coefficients.json"
    file.write_text(json.dumps(winner.groups.weights))
    scored = study.score(read_coefficients(str(file), "--coefficients"))
    assert scored.objective == winner.objective
    whole = study.score(winner.coefficients)
    assert study.score({"global": dict(winner.coefficients)}) == whole, "groups left out have the global coefficients"


def test_an_export_is_the_winner_with_card_recipe_and_coefficients(unshrunk, tmp_path):
    study = open_study(unshrunk)
    champion = study.export(tmp_path / "best")
    winner = study.summary().winner
    assert json.loads((tmp_path / "best/coefficients.json").read_text()) == winner.groups.weights
    assert study.score_model(tmp_path / "best").objective == pytest.approx(winner.objective)
    assert champion.result == winner
    card = (tmp_path / "best/README.md").read_text()
    assert all(f"| {group} |" in card for group in winner.groups)
    study.merge(winner.groups.weights, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "again"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    assert first.keys() == _recipe_weights(tmp_path / "best", winner.groups).keys()


def _recipe_weights(folder: Path, groups: GroupedCoefficients) -> dict[str, dict[str, float]]:
    """Coefficients of every tensor by mergekit's rule: the first filter that is a part of its name; checked."""
    recipe = yaml.safe_load((folder / "mergekit.yaml").read_text())
    by_tensor: dict[str, dict[str, float]] = {}
    for name in load_file(folder / "model.safetensors"):
        layer = next((group for group in groups if f".{group}." in name), "embedding")
        for model in recipe["models"]:
            filters = model["parameters"]["weight"]
            value = next(each["value"] for each in filters if each["filter"] in name)
            by_tensor.setdefault(name, {})[Path(model["model"]).name] = value
        assert by_tensor[name] == {n: w for n, w in groups[layer].items() if n in by_tensor[name]}
    return by_tensor


def test_report_json_and_frames_have_the_groups(unshrunk):
    study = open_study(unshrunk)
    summary = study.summary()
    groups, names = summary.winner.groups, list(summary.distributions)
    answer = json.loads(json.dumps(of_summary(summary)))
    assert answer["groups"]["coefficients"] == groups.weights == answer["results"][-1]["groups"]
    assert answer["groups"]["shrink"] == 0.0 and answer["groups"]["folds"] == []
    (cells,) = all_figures(summary)["groups"].data
    for row, coefficients in zip(cells.z, groups.values(), strict=True):
        assert list(row) == pytest.approx([coefficients[n] - summary.groups.centre[n] for n in names], abs=1e-6)
    frame = study.groups()
    assert list(frame["group"]) == list(groups)
    assert frame["w.code"].tolist() == [coefficients["code"] for coefficients in groups.values()]


def test_optuna_has_the_trials_under_the_names_of_distributions_and_groups(unshrunk):
    study = open_study(unshrunk)
    names = [name for name in optuna_studies_of("tiny", study.config.storage) if "/groups-" in name]
    (logged,) = (optuna.load_study(study_name=name, storage=study.config.storage) for name in names)
    summary = study.summary()
    assert len(logged.trials) == summary.groups.gradients
    assert set(logged.trials[0].params) == {
        f"{name}/{group}" for name in summary.distributions for group in summary.winner.groups
    }
    assert logged.best_value == pytest.approx(summary.winner.objective[SEARCH], abs=1e-12)


def test_more_coefficients_than_parameters_are_an_attribute(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    names = [f"layers.{n}" for n in range(40)]
    row = SPACE.centroid()
    trial = Measured(kind="descent", shrink=0.0, coefficients=GroupedCoefficients.of(names, [row] * 40), value=3.0)
    for _ in range(2):
        log_trials(url, "tiny/groups-0", SPACE, [trial])
    (logged,) = optuna.load_study(study_name="tiny/groups-0", storage=url).trials
    assert not logged.params and logged.user_attrs["coefficients"]["layers.39"] == row.weights


def test_a_lora_of_groups_is_refused(unshrunk, tmp_path):
    with pytest.raises(InputError) as caught:
        open_study(unshrunk).export(tmp_path / "lora", as_lora=True)
    assert caught.value.field == OPTION and not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "coefficients.json"),
        ("[1, 2]", "coefficients.json"),
        ('{"code": 1.0, "layers.0": {"code": 1.0}}', "code"),
        ('{"layers.9": {"code": 1.0}, "global": {"code": 1.0}}', "layers.9"),
        ('{"global": {"code": 2.0}}', "global"),
    ],
)
def test_a_file_of_coefficients_that_is_none_is_one_line(unshrunk, tmp_path, capsys, content, named):
    file = tmp_path / "coefficients.json"
    if content is not None:
        file.write_text(content)
    assert main(["score", str(unshrunk), "--coefficients", str(file)]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and "\n" not in error


def test_a_search_that_is_interrupted_goes_on_and_ends_as_one_that_is_not(tmp_path, monkeypatch):
    whole = open_study(make(tmp_path / "whole")).run().summary
    path = make(tmp_path / "parts")
    evaluate, calls = Worker.evaluate, []

    def interrupted(worker, request):
        calls.append(request)
        if len(calls) % 9 == 0:
            raise KeyboardInterrupt
        return evaluate(worker, request)

    monkeypatch.setattr(Worker, "evaluate", interrupted)
    for _ in range(20):
        try:
            open_study(path).run()
            break
        except KeyboardInterrupt:
            continue
    parts = open_study(path).summary()
    assert len(calls) > 18 and parts.groups is not None
    assert _comparable(parts) == _comparable(whole)


def _comparable(summary):
    groups = summary.groups
    costs = {cost.part: (cost.evaluations, cost.forwards) for cost in summary.costs}
    rows = [(row.label, row.objective, row.groups) for row in summary.results]
    return groups.coefficients, groups.shrink, groups.judgements, costs, rows


def test_folds_judge_and_where_none_gains_the_winner_is_the_global_one(tmp_path):
    summary = open_study(make(tmp_path)).run().summary
    *judged, everywhere = summary.groups.judgements
    assert everywhere.shrink == inf and len(judged) == 4
    if min(each.other for each in judged) >= 0:
        assert summary.winner.groups is None and summary.groups.is_global
    else:
        assert summary.winner.groups is not None and summary.groups.shrink < inf


def test_another_grouping_keeps_the_trials_and_their_scores(unshrunk, tmp_path):
    study = open_study(make(tmp_path))
    first = study.run().summary
    progress = RecordedProgress()
    path = make(tmp_path, groups={"mlp": "*.mlp.*"}, coefficients={"shrink": 1.0})
    with pytest.raises(InputError, match="has changed"):
        open_study(path).export(tmp_path / "best")
    second = open_study(path, progress).run().summary
    assert first.trials == second.trials
    assert tuple(second.groups.coefficients) == ("rest", "mlp")
    spent = {cost.part: cost.forwards for cost in second.costs}
    assert all(spent[cost.part] == cost.forwards for cost in first.costs if cost.part in ("random", "baselines"))
    without = worlds.study(tmp_path, search=SEARCH_SECTION)
    assert open_study(without).run().summary.winner.groups is None


def test_one_group_finds_no_more_than_the_global_search_may(tmp_path):
    """A grouping with a single group is the space of the global search."""
    path = make(tmp_path, groups={"all": "*"}, coefficients={"shrink": "none", "forwards": 18})
    summary = open_study(path).run().summary
    (row,) = summary.groups.coefficients.values()
    scores = open_study(path).score(row)
    assert scores.objective[SEARCH] == pytest.approx(summary.winner.objective[SEARCH], abs=1e-12)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"coefficients": {"groups": "layer"}}, "coefficients.groups"),
        ({"coefficients": {"groups": {}}}, "groups"),
        ({"coefficients": {"groups": {"depth": 1}}}, "groups.depth"),
        ({"coefficients": {"groups": {"depth": 9}}}, "coefficients.groups.depth"),
        ({"coefficients": {"groups": {"mlp": 3}}}, "groups.mlp"),
        ({"coefficients": {"groups": {"rest": "*"}}}, "groups.rest"),
        ({"coefficients": {"groups": {"mlp": "*.ffn.*"}}}, "coefficients.groups.mlp"),
        ({"coefficients": {"groups": {"mlp": "*.mlp.*", "up": "*up_proj*"}}}, "coefficients.groups.up"),
        ({"coefficients": {"groups": "layers", "shrink": -1.0}}, "coefficients.shrink"),
        ({"coefficients": {"groups": "layers"}, "objective": {"worst": True}}, "coefficients.groups"),
        ({"coefficients": {"groups": "layers"}, "search": {"algorithm": "grid", "divisions": 4}}, "search.algorithm"),
    ],
)
def test_what_no_study_can_have_is_refused_by_field(tmp_path, capsys, sections, field):
    path = worlds.study(tmp_path, **sections)
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert field in error and "\n" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("coefficients", "field"),
    [
        ({"layers.7": {"code": 1.0}, "global": {"code": 1.0}}, "coefficients.layers.7"),
        ({"layers.0": {"code": 1.0}}, "coefficients.embedding"),
        ({"global": {"code": 0.5}}, "coefficients.global"),
        ({"global": {"code": 1.0}, "code": 1.0}, "coefficients.code"),
    ],
)
def test_coefficients_that_are_none_of_the_groups_are_refused(unshrunk, coefficients, field):
    with pytest.raises(InputError) as caught:
        open_study(unshrunk).score(coefficients)
    assert caught.value.field == field


def test_groups_without_memory_for_gradients_are_refused_before_the_search(unshrunk):
    context = open_study(unshrunk)._context
    inputs = context.load_inputs(for_workers=False)
    refuse_groups(context, inputs)
    with pytest.raises(InputError) as caught:
        refuse_groups(context, replace(inputs, gradients_fit=False))
    assert caught.value.field == "coefficients.groups"


def test_a_study_without_groups_takes_no_coefficients_by_group(tmp_path):
    with pytest.raises(InputError):
        open_study(worlds.study(tmp_path)).score({"layers.0": {"code": 1.0}})


def test_a_composite_that_cannot_be_scored_shortens_the_step(tmp_path, monkeypatch):
    path = make(tmp_path, coefficients={"shrink": "none", "forwards": 15})
    evaluate, calls = Worker.evaluate, []

    def failing(worker, request):
        if request.folds:
            calls.append(request)
            if len(calls) == 2:
                raise EvaluationError("the loss of window 0 is nan")
        return evaluate(worker, request)

    monkeypatch.setattr(Worker, "evaluate", failing)
    summary = open_study(path).run().summary
    assert summary.groups is not None and summary.winner.objective[HELD_OUT] > 0
