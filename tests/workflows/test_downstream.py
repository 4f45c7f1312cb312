"""Laws of models on tasks: each measured once and as the harness would, ranked, with how far rankings agree."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import worlds
import yaml
from mlflow.tracking import MlflowClient
from scipy import stats

from dem_opt.analysis.bootstrap import RESAMPLES
from dem_opt.analysis.task_scores import (
    OBJECTIVE,
    Statistic,
    TaskResults,
    TaskScore,
    TaskTable,
    correlation,
    kendall,
    spearman,
)
from dem_opt.cli.main import main
from dem_opt.config import DataFile, load
from dem_opt.data.harness import gold_answers
from dem_opt.errors import InputError
from dem_opt.study import Study
from dem_opt.workflows.lm_eval import TaskJob, run_tasks
from dem_opt.workflows.quickstart.additions import TASK, write_task
from dem_opt.workflows.quickstart.generated import math_problem

CLOZE = "tiny_cloze"


def write_cloze(folder: Path) -> None:
    """A task of which random models do not all score the same: the more likely of two words."""
    rng = random.Random(0)
    rows = []
    for _ in range(64):
        words = rng.sample(worlds.WORDS, 5)
        rows.append({"text": " ".join(words[:3]), "choices": words[3:], "right": rng.randint(0, 1)})
    documents = folder / f"{CLOZE}.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": CLOZE,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{CLOZE}.yaml").write_text(json.dumps(task), encoding="utf-8")


def tasked_study(folder: Path, **more: object) -> Path:
    """A tiny study with two tasks, the quickstart's arithmetic and a cloze, whose gold answers are a general corpus."""
    rng = random.Random(0)
    write_task(folder / "tasks", [math_problem(rng) for _ in range(6)], "<eos>")
    write_cloze(folder / "tasks")
    path = worlds.study(folder, ("code", "math"), search={"algorithm": "random", "trials": 5}, report={"top": 2})
    settings = {"tasks": [TASK, CLOZE], "include": "tasks", "limit": 6, "top": 2}
    general = {"gold": {"task": CLOZE, "include": "tasks"}}
    content = yaml.safe_load(path.read_text()) | {"evaluate": settings | more, "general": general}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def opened(path: Path) -> Study:
    return in_process.open_tracked(path)


@pytest.fixture(scope="module")
def tasked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TaskTable]:
    path = tasked_study(tmp_path_factory.mktemp("tasked"))
    opened(path).run()
    return path, opened(path).evaluate()


def test_base_fine_tunes_average_and_the_best_do_the_tasks(tasked: tuple[Path, TaskTable]) -> None:
    path, results = tasked
    summary = opened(path).summary()
    expected = [row.label for row in summary.results if row.role not in ("best", "sum")]
    assert [row.label for row in results.models][: len(expected)] == expected
    composites = {row.coefficients for row in summary.results if row.role not in ("best", "sum")}
    best = [row.coefficients for row in summary.top[:2] if row.coefficients not in composites]
    assert len(results.models) == len(expected) + len(best)
    for model in results.models:
        assert set(model.scores) == {TASK, CLOZE} and set(model.objective) == {"search", "held_out"}
    assert len({model.scores[CLOZE].value for model in results.models}) > 1
    assert not list((load(path).output / "downstream").glob("model-*")), "composites are gone when they are done"


@pytest.mark.parametrize("count", [1, 3])
def test_a_moved_task_has_the_documents_of_its_new_folder(tmp_path: Path, count: int) -> None:
    rng = random.Random(0)
    write_task(tmp_path / "made", [math_problem(rng) for _ in range(3)], "<eos>")
    moved = shutil.copytree(tmp_path / "made", tmp_path / "moved")
    lines = (moved / f"{TASK}.jsonl").read_text().splitlines(keepends=True)
    (moved / f"{TASK}.jsonl").write_text("".join(lines[:count]))
    data = DataFile.model_validate({"task": TASK, "include": moved})
    assert len(gold_answers(data, "general.gold", "held_out")) == count
    worlds.save_model(tmp_path / "model", seed=0)
    model = Path(os.path.relpath(tmp_path / "model"))
    here = Path.cwd()
    scores = run_tasks(TaskJob(name="a", model=model, tokenizer=model, tasks=(TASK,), include=moved))
    assert scores[TASK].documents == count and Path.cwd() == here


def test_a_composite_scores_as_its_written_folder_does(tasked: tuple[Path, TaskTable], tmp_path: Path) -> None:
    path, results = tasked
    best = results.models[-1]
    assert best.coefficients is not None
    opened(path).merge(best.coefficients, tmp_path / "written")
    job = TaskJob(
        name="again",
        model=tmp_path / "written",
        tokenizer=tmp_path / "written",
        tasks=(CLOZE,),
        include=path.parent / "tasks",
        limit=6,
    )
    assert run_tasks(job)[CLOZE] == best.scores[CLOZE]


def test_what_was_measured_is_not_measured_again(
    tasked: tuple[Path, TaskTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, results = tasked
    monkeypatch.setattr("dem_opt.workflows.downstream.run_tasks", None)
    assert opened(path).evaluate() == results


@pytest.mark.parametrize(("tokenizer", "is_known"), [(None, True), ("", True), ("another", False)])
def test_scores_of_another_tokenizer_are_measured_again(
    tasked: tuple[Path, TaskTable], monkeypatch: pytest.MonkeyPatch, tokenizer: str | None, is_known: bool
) -> None:
    """Files of earlier releases name none, and are believed."""
    path, results = tasked
    (file, *_) = (load(path).output / "downstream").glob("*.json")
    content = file.read_text()
    kept = json.loads(content)
    assert kept.pop("tokenizer")
    monkeypatch.setattr("dem_opt.workflows.downstream.run_tasks", None)
    try:
        file.write_text(json.dumps(kept if tokenizer is None else kept | {"tokenizer": tokenizer}))
        if is_known:
            assert opened(path).evaluate() == results
        else:
            with pytest.raises(TypeError):  # it is to be measured
                opened(path).evaluate()
    finally:
        file.write_text(content)


def test_the_scores_are_in_mlflow(tasked: tuple[Path, TaskTable]) -> None:
    path, results = tasked
    client = MlflowClient(load(path).tracking.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment], "tags.`dem_opt.kind` = 'downstream'")
    scores = sorted((run.info.run_name, run.data.metrics[f"{CLOZE}.acc"]) for run in runs)
    assert scores == sorted((model.label, model.scores[CLOZE].value) for model in results.models)


def test_the_command_ranks_and_tells_the_correlation(
    tasked: tuple[Path, TaskTable], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = tasked
    monkeypatch.setattr(Study, "evaluate", lambda study: results)
    assert main(["evaluate", "--by", CLOZE, str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"the best by {CLOZE} first" in shown and "Spearman" in shown and "Kendall" in shown
    assert main(["evaluate", "--by", CLOZE, "--json", str(path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    scores = {model.label: model.scores[CLOZE].value for model in results.models}
    assert [scores[label] for label in answer["ranked"]] == sorted(scores.values(), reverse=True)
    assert main(["evaluate", "--by", "close", str(path)]) == 2
    assert "is no task of the study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tasks": ["tiny_close"]}, r"evaluate.tasks = 'tiny_close': .*; did you mean 'tiny_cloze'"),
        ({"include": "nowhere"}, r"nowhere: evaluate.include: no such folder"),
    ],
)
def test_tasks_that_are_unknown(tmp_path: Path, more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(tasked_study(tmp_path, **more)).evaluate()


@pytest.mark.parametrize(
    ("command", "data", "field"),
    [
        (["check"], {"task": "tiny_close"}, "general.gold.validation.task = 'tiny_close'"),
        (["run"], {"include": "nowhere"}, "general.gold.validation.include"),
        (["score", "--coefficients", "code=1"], {"split": "dev"}, "general.gold.validation.split = 'dev'"),
    ],
)
def test_data_of_a_task_that_cannot_be_read_are_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], data: dict[str, str], field: str
) -> None:
    path = tasked_study(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["general"]["gold"] |= data
    path.write_text(yaml.safe_dump(content))
    assert main([*command, str(path)]) == 2
    refusal = capsys.readouterr().err
    assert field in refusal and refusal.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_study_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"study.yaml: evaluate: the study file names no tasks"):
        opened(worlds.study(tmp_path)).evaluate()


def test_a_missing_harness_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'dem-opt\[downstream\]'"):
        opened(tasked_study(tmp_path)).evaluate()


def score(value: float, higher: bool = True) -> TaskScore:
    return TaskScore("t", "acc", value, None, higher, 10)


def table(pairs: list[tuple[float, float]], higher: bool = True) -> TaskTable:
    models = [
        TaskResults(
            label=str(place),
            role="top",
            coefficients=None,
            objective={"search": loss, "held_out": loss},
            scores={"t": score(value, higher)},
        )
        for place, (loss, value) in enumerate(pairs)
    ]
    return TaskTable("s", ("t",), tuple(models))


def agreement(results: TaskTable, loss: str = OBJECTIVE, split: str = "search", task: str = "t") -> dict[str, Any]:
    """The correlations of a task, loss and split: Spearman's, Kendall's."""
    (row,) = [row for row in results.agreement if (row.task, row.loss, row.split) == (task, loss, split)]
    return {"spearman": row.spearman, "kendall": row.kendall}


@pytest.mark.parametrize("name", ["spearman", "kendall"])
def test_agreement_is_one_where_the_lower_loss_has_the_better_score(name: str) -> None:
    pairs = [(3.0, 0.1), (2.0, 0.5), (1.0, 0.9)]
    for split in ("search", "held_out"):
        assert agreement(table(pairs), split=split)[name].value == pytest.approx(1)
    assert agreement(table(pairs, higher=False))[name].value == pytest.approx(-1)
    assert agreement(table([(3.0, 0.1), (2.0, 0.1)]))[name] is None
    assert agreement(table(pairs))[name].low is None, "three models have no interval"
    assert [model.label for model in table(pairs).ranked("t")] == ["2", "1", "0"]
    assert [model.label for model in table(pairs, higher=False).ranked("t")] == ["0", "1", "2"]
    assert [model.label for model in table(pairs, higher=False).ranked(None)] == ["2", "1", "0"]


def test_the_loss_of_gold_answers_is_set_against_their_own_task(tasked: tuple[Path, TaskTable]) -> None:
    """The scores of the ledger, on both splits; the other task is compared with the objective alone."""
    path, results = tasked
    assert results.corpora == {"gold": CLOZE}
    assert {(row.task, row.loss) for row in results.agreement} == {
        (TASK, OBJECTIVE),
        (CLOZE, OBJECTIVE),
        (CLOZE, "gold"),
    }
    rows = {row.label: row for row in opened(path).summary().results}
    for model in results.models:
        if model.label in rows:
            assert model.gold["gold"] == {
                split: scores["gold"].nll for split, scores in rows[model.label].scores.items()
            }
    measured = agreement(results, "gold", "search", CLOZE)["spearman"]
    pairs = [(model.gold["gold"]["search"], -model.scores[CLOZE].value) for model in results.models]
    assert measured.value == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert measured.low <= measured.value <= measured.high


@pytest.mark.parametrize(("ours", "scipys"), [(spearman, stats.spearmanr), (kendall, stats.kendalltau)])
def test_correlations_of_rows_are_scipys_with_ties(ours: Statistic, scipys: Any) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 5, (20, 9)).astype(float), rng.integers(0, 4, (20, 9)).astype(float)
    expected = [scipys(*pair).statistic for pair in zip(left, right, strict=True)]
    assert ours(left, right) == pytest.approx(expected)


@pytest.mark.parametrize("statistic", [spearman, kendall])
def test_a_correlation_has_the_interval_of_resampled_models(statistic: Statistic) -> None:
    """Quantiles of scipy's correlation over draws of the same generator; narrower where every model is there twice."""
    rng = np.random.default_rng(1)
    left = rng.normal(size=12)
    right = left + rng.normal(size=12)
    measured = correlation(statistic, left, right)
    draws = np.random.default_rng(0).integers(12, size=(RESAMPLES, 12))
    scipys = stats.spearmanr if statistic is spearman else stats.kendalltau
    values = [scipys(left[draw], right[draw]).statistic for draw in draws[:300]]
    assert measured is not None and measured.low < measured.value < measured.high
    assert statistic(left[draws[:300]], right[draws[:300]]) == pytest.approx(values)
    assert (measured.low, measured.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.12)
    doubled = correlation(statistic, np.tile(left, 2), np.tile(right, 2))
    assert doubled is not None and doubled.high - doubled.low < measured.high - measured.low
