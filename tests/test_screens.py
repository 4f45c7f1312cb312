"""Every screen names the same winner with the same number, beside a stopped trial whose estimate is lower.

The pages in a browser: tests/dashboards/test_browser.py.
"""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import in_process
import optuna
import pytest
import worlds
from optuna.storages import RDBStorage

from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.search.optuna_study import METRIC
from dem_opt.study import Study
from dem_opt.types import HELD_OUT, SEARCH, ResultRow, Summary, TrialRecord

RUN = "tiny/simplex-gp"


@dataclass(frozen=True)
class Opened:
    """A study that was run and exported by commands, and what it was told on the terminal.

    table  what `run` printed
    answer  what `run --json` printed, of the finished study
    """

    path: Path
    summary: Summary
    table: str
    answer: dict[str, Any]

    @property
    def winner(self) -> ResultRow:
        return self.summary.winner

    @property
    def trial(self) -> TrialRecord:
        """The winner's complete trial."""
        (trial,) = (
            record
            for record in self.summary.trials["simplex-gp"]
            if record.coefficients == self.winner.coefficients and not record.is_partial
        )
        return trial


def command(*words: str) -> str:
    """Output of a command."""
    with redirect_stdout(StringIO()) as printed:
        assert main(list(words)) == 0
    return printed.getvalue()


def open_study(folder: Path, **sections: Any) -> Opened:
    path = worlds.racing_study(folder, **sections)
    with pytest.MonkeyPatch.context() as patch:
        in_process.replace_dependencies(patch, compute=InProcessCompute())
        table, answer = command("run", str(path)), command("run", "--json", "--quiet", str(path))
        command("report", "--quiet", str(path), "--out", str(folder / "page.html"))
        command("export", "--quiet", str(path), "--out", str(folder / "best"))
    return Opened(path, Study.load(path).summary(), table, json.loads(answer))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_study(tmp_path_factory.mktemp("screens"))


@pytest.fixture(scope="module")
def study(opened: Opened) -> Iterator[optuna.Study]:
    """The search in Optuna."""
    storage = RDBStorage(load(opened.path).storage)
    yield optuna.load_study(study_name=RUN, storage=storage)
    storage.remove_session()
    storage.engine.dispose()


@pytest.fixture(scope="module")
def client(opened: Opened) -> Any:
    """MLflow's client."""
    import mlflow

    uri = load(opened.path).tracking.uri
    return mlflow.MlflowClient(uri, uri)


def runs_of(client: Any, query: str) -> list[Any]:
    """Runs of the study as MLflow's page sorts them by the objective."""
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return list(client.search_runs([experiment], query, order_by=["metrics.objective_nll ASC"]))


def test_an_estimate_is_lower_than_the_winners_objective(opened: Opened) -> None:
    estimates = [record.objective for record in opened.summary.trials["simplex-gp"] if record.is_partial]
    assert min(estimates) < opened.winner.objective[SEARCH]


def test_the_terminal_the_report_and_the_card_show_the_number(opened: Opened) -> None:
    folder, number, held_out = (
        opened.path.parent,
        *(f"{opened.winner.objective[split]:.4f}" for split in (SEARCH, HELD_OUT)),
    )
    page, card = (folder / "page.html").read_text(), (folder / "best/README.md").read_text()
    for text in (opened.table, page, card):
        assert "best of simplex-gp" in text and number in text and held_out in text
    rows = [line for line in card.splitlines() if line.startswith("| best of simplex-gp")]
    assert [number in row for row in rows] == [True] + [False] * (len(rows) - 1)
    assert sum(held_out in row for row in rows) == 1
    assert f"{opened.trial.objective:.4f} nats per token at" in opened.table, "the progress line"


def test_the_json_answer_has_the_number(opened: Opened) -> None:
    (row,) = (row for row in opened.answer["results"] if row["label"] == opened.answer["winner"])
    assert row["objective"] == dict(opened.winner.objective)
    assert opened.winner.coefficients is not None and row["coefficients"] == opened.winner.coefficients.weights


def test_optunas_best_trial_is_the_winner(opened: Opened, study: optuna.Study) -> None:
    best = study.best_trial
    assert (best.number, best.value) == (opened.trial.number, opened.winner.objective[SEARCH])
    assert opened.winner.coefficients is not None and best.params == opened.winner.coefficients.weights
    first = study.trials_dataframe().sort_values(f"value_{METRIC}").iloc[0]
    assert (first["number"], first["state"], first[f"value_{METRIC}"]) == (best.number, "COMPLETE", best.value)


def test_optuna_has_the_states_and_estimates_of_the_trials(opened: Opened, study: optuna.Study) -> None:
    for record, trial in zip(opened.summary.trials["simplex-gp"], study.trials, strict=True):
        assert trial.state.name == ("PRUNED" if record.is_partial else "COMPLETE")
        assert trial.value == (None if record.is_partial else record.objective)
        assert trial.user_attrs["estimate"] == record.is_partial
        assert trial.user_attrs["fe"] == record.forwards
        assert {f"nll.{name}": score.nll for name, score in record.scores.items()}.items() <= trial.user_attrs.items()
        assert trial.intermediate_values == record.estimates
        if record.is_partial:
            (*_, seen) = record.estimates
            assert seen == max(len(score.nats_W) for score in record.scores.values())
            assert record.estimates[seen] == record.objective == trial.user_attrs["objective"]
            assert trial.user_attrs["standard_error"] == record.error


def test_optuna_dashboard_has_the_winner_as_its_best_trial(opened: Opened, study: optuna.Study) -> None:
    from optuna_dashboard import wsgi

    storage = RDBStorage(load(opened.path).storage)
    environment: dict[str, Any] = {"PATH_INFO": "/api/studies/1", "wsgi.input": BytesIO()}
    setup_testing_defaults(environment)
    answer = json.loads(b"".join(wsgi(storage)(environment, lambda *_: None)))  # type: ignore[arg-type]
    (best,) = answer["best_trials"]
    assert (best["number"], best["values"]) == (opened.trial.number, [opened.winner.objective[SEARCH]])
    storage.remove_session()
    storage.engine.dispose()


def test_mlflow_sorts_the_winner_first(opened: Opened, client: Any) -> None:
    (parent,) = runs_of(client, f"tags.`dem_opt.study` = '{RUN}'")
    assert parent.data.metrics["best.objective_nll"] == opened.winner.objective[SEARCH]
    assert parent.data.metrics["best.held_out.objective_nll"] == opened.winner.objective[HELD_OUT]
    runs = runs_of(client, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    first, *others = (run for run in runs if "dem_opt.trial" in run.data.tags)
    assert first.info.run_name == f"trial-{opened.trial.number}"
    assert first.data.metrics["objective_nll"] == opened.winner.objective[SEARCH]
    assert opened.winner.coefficients is not None
    assert first.data.params == {f"w.{name}": str(w) for name, w in opened.winner.coefficients.weights.items()}
    records = {str(record.number): record for record in opened.summary.trials["simplex-gp"]}
    for run in others:
        record = records[run.data.tags["dem_opt.trial"]]
        assert run.data.tags["dem_opt.state"] == ("stopped" if record.is_partial else "complete")
        assert ("objective_nll" in run.data.metrics) != ("estimate" in run.data.metrics) == record.is_partial


def test_the_registered_model_has_the_number(opened: Opened, client: Any) -> None:
    version = client.get_model_version_by_alias("tiny", "champion")
    for split, value in opened.winner.objective.items():
        assert version.tags[f"{split}.objective_nll"] == f"{value:.4f}"
    assert version.tags["coefficients"] == str(opened.winner.coefficients)
    (parent,) = runs_of(client, f"tags.`dem_opt.study` = '{RUN}'")
    assert parent.data.metrics["search.objective_nll"] == opened.winner.objective[SEARCH]
