"""Laws of tracking over a real MLflow store: every trial once, nothing raised, one champion."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from dem_opt.simplex import Space
from dem_opt.tracking import (
    DataSource,
    MlflowTracker,
    NoPeers,
    PageListener,
    Records,
    SearchInfo,
    SearchTracker,
    StudyDescription,
    mlflow_runs,
    mlflow_tracker,
)
from dem_opt.tracking.mlflow_client import MlflowStore
from dem_opt.types import Evaluation, ResultRow, Score, TrialRecord

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

SECRET = "hush"
CLOSED = f"http://me:{SECRET}@127.0.0.1:1"
SPACE = Space(("code", "math"))
SCORES = {"code": Score((1.0, 2.0), (2, 4)), "math": Score((3.0,), (4,))}

Make = Callable[..., SearchTracker]


def trial(number: int, **changed: Any) -> TrialRecord:
    """A trial whose NLL is 3/6 on code and 3/4 on math."""
    coefficients = SPACE.from_units([number * 10**6, 10**9 - number * 10**6])
    evaluation = Evaluation(
        scores={}, forward_tokens=12, merge_seconds=0.25, score_seconds=0.5, scored_tokens=10, wait_seconds=0.0625
    )
    record = TrialRecord(
        study="study#1",
        number=number,
        coefficients=coefficients,
        objective=0.625,
        scores=SCORES,
        evaluation=evaluation,
        propose_seconds=0.125,
    )
    return replace(record, **changed)


def failed(number: int) -> TrialRecord:
    return trial(number, objective=None, scores={}, evaluation=Evaluation(scores={}), reason="the loss\nis nan" * 100)


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two attempts."""
    monkeypatch.setattr(mlflow_tracker, "REST", -1.0)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for this module; every test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/made/mlflow.db"


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def make(
    uri: str, tmp_path: Path, request: pytest.FixtureRequest, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Makes trackers of one study, impatient with a server that is away."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    search = {
        "model": tmp_path.name,
        "study": f"{tmp_path.name}/simplex-gp#2",
        "uid": "uid",
        "parameters": {"seed": "0"},
    }

    def make_tracker(
        peers: Any = None,
        *,
        uri: str = uri,
        close_seconds: float = 180.0,
        on_pages: PageListener | None = None,
        **changed: Any,
    ) -> SearchTracker:
        store = MlflowStore(uri=uri, experiment=request.node.name, artifacts=tmp_path / "artifacts")
        tracker = MlflowTracker(store, close_seconds=close_seconds, on_pages=on_pages)
        return tracker.open_search(SearchInfo(**{**search, **changed}), peers or NoPeers(), warnings.append)

    return make_tracker


@pytest.fixture
def client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(uri, uri)


class Logged:
    """Contents of a test's experiment in MLflow."""

    def __init__(self, client: Any, experiment: str) -> None:
        self.experiment = client.get_experiment_by_name(experiment)
        runs = client.search_runs([self.experiment.experiment_id])
        self.parents = [run for run in runs if "dem_opt.study" in run.data.tags]
        self.children = [run for run in runs if "dem_opt.trial" in run.data.tags]

    @property
    def numbers(self) -> list[int]:
        return sorted(int(run.data.tags["dem_opt.trial"]) for run in self.children)

    @property
    def statuses(self) -> set[str]:
        return {run.info.status for run in self.children}


@pytest.fixture
def logged(client: Any, request: pytest.FixtureRequest) -> Callable[[], Logged]:
    return lambda: Logged(client, request.node.name)


class Others(NoPeers):
    """Peers of which one may be at work."""

    def __init__(self, alive: bool) -> None:
        self._alive = alive

    def any_alive(self) -> bool:
        return self._alive


def known_by_number(records: Sequence[TrialRecord]) -> Records:
    return {record.number: partial(replace, record) for record in records}


def run(tracker: SearchTracker, known: Sequence[TrialRecord], ended: Sequence[TrialRecord] = ()) -> None:
    """Send a tracker the events of one run of a study."""
    tracker.reconcile(known_by_number(known))
    for record in ended:
        tracker.trial_ended(record)
    tracker.close()


def folder(path: Path, text: str) -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "config.json").write_text(text)
    (path / "deep/weights.bin").write_bytes(bytes(range(256)))
    return path


def test_mlflow_is_not_imported_before_it_is_needed() -> None:
    program = "import dem_opt.tracking.mlflow_tracker, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("where", ["store", "closed port", "file that is no database"])
def test_no_tracker_raises(where: str, make: Make, tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "words").write_text("words " * 1000)
    uris = {"closed port": CLOSED, "file that is no database": f"sqlite:///{tmp_path}/words"}
    changed = {"uri": uris[where]} if where in uris else {}
    tracker: SearchTracker = make(**changed)
    tracker.reconcile(known_by_number([trial(0)]))
    tracker.trial_ended(trial(1))
    tracker.trial_ended(failed(2))
    version = tracker.register(folder(tmp_path / "model", "{}"), {"nll": 1.0}, {"key": "value"})
    assert tracker.close() == (where == "store")
    assert version == ("1" if where == "store" else None)
    assert len(warnings) == (where in uris), warnings
    assert not any(SECRET in warning or "\n" in warning for warning in warnings)


def test_a_trial_is_logged_with_all_that_is_known_of_it(make: Make, logged: Callable[[], Logged], client: Any) -> None:
    run(make(), [], [trial(7)])
    (child,), (parent,) = logged().children, logged().parents
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["dem_opt.trial"] == "7"
    assert child.data.params == {"w.code": "0.007", "w.math": "0.993"}
    assert child.data.metrics == {
        "objective_nll": 0.625,
        "nll.code": 0.5,
        "nll.math": 0.75,
        "perplexity.code": pytest.approx(1.6487212707),
        "perplexity.math": pytest.approx(2.1170000166),
        "forward_tokens": 12.0,
        "scored_tokens": 10.0,
        "wait_seconds": 0.0625,
        "merge_seconds": 0.25,
        "score_seconds": 0.5,
        "propose_seconds": 0.125,
        "window_nll.code": 0.5,
        "window_nll.math": 0.75,
    }
    assert [
        (metric.step, metric.value) for metric in client.get_metric_history(child.info.run_id, "window_nll.code")
    ] == [
        (0, 0.5),
        (1, 0.5),
    ]
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params == {"seed": "0"}


def test_a_violation_stands_beside_the_plain_objective(make: Make, logged: Callable[[], Logged]) -> None:
    run(make(), [], [trial(1, violation=0.25)])
    (child,) = logged().children
    assert (child.data.metrics["infeasible_nll"], child.data.metrics["protect_violation"]) == (0.625, 0.25)


def test_a_smaller_batch_is_marked(make: Make, logged: Callable[[], Logged]) -> None:
    run(make(), [], [trial(1, evaluation=replace(trial(1).evaluation, batch_tokens=2048)), trial(2)])
    assert sorted(child.data.metrics.get("batch_tokens", 0.0) for child in logged().children) == [0.0, 2048.0]


def test_a_failed_trial_says_why(make: Make, logged: Callable[[], Logged]) -> None:
    run(make(), [], [failed(0)])
    (child,) = logged().children
    assert child.info.status == "FAILED"
    assert child.data.tags["dem_opt.reason"].startswith("the loss")
    assert "objective_nll" not in child.data.metrics
    assert child.data.params == {"w.code": "0.0", "w.math": "1.0"}


def test_a_trial_has_one_run_however_often_it_is_told(
    make: Make, logged: Callable[[], Logged], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_runs, "PAGE", 2)
    first, later = [trial(number) for number in range(4)], [failed(4), trial(5)]
    run(make(), [], first)
    run(make(parameters={"seed": "1", "trials": "6"}), first, later)
    run(make(), first + later, later)
    run(make(), first + later + [trial(6)])
    snapshot = logged()
    assert snapshot.numbers == [0, 1, 2, 3, 4, 5, 6]
    assert snapshot.statuses == {"FINISHED", "FAILED"}
    (parent,) = snapshot.parents
    assert parent.data.params == {"seed": "0", "trials": "6"}, "a parameter keeps its first value"
    assert warnings == []


@pytest.mark.parametrize("reached", ["created", "params", "metrics"])
@pytest.mark.parametrize("record", [trial(1), failed(1)], ids=["finished", "failed"])
def test_a_run_left_in_the_middle_is_finished(
    reached: str, record: TrialRecord, make: Make, logged: Callable[[], Logged], client: Any
) -> None:
    from mlflow.entities import Metric, Param

    run(make(), [trial(0)])
    whole = logged()
    tags = {"mlflow.parentRunId": whole.parents[0].info.run_id, "dem_opt.trial": "1"}
    begun = client.create_run(whole.experiment.experiment_id, tags=tags)
    if reached != "created":
        client.log_batch(begun.info.run_id, params=[Param("w.code", "0.001")])
    if reached == "metrics":
        client.log_batch(begun.info.run_id, [Metric("merge_seconds", 0.0, begun.info.start_time, 1)])
    run(make(), [trial(0), record])
    snapshot = logged()
    assert snapshot.numbers == [0, 1]
    child = client.get_run(begun.info.run_id)
    assert child.info.status == ("FINISHED" if record.objective else "FAILED")
    assert child.data.params == {"w.code": "0.001", "w.math": "0.999"}
    assert child.data.metrics["merge_seconds"] == record.evaluation.merge_seconds
    assert len(client.get_metric_history(begun.info.run_id, "forward_tokens")) == 1


def test_a_second_run_of_a_trial_is_deleted(make: Make, logged: Callable[[], Logged], client: Any) -> None:
    run(make(), [trial(0)])
    whole = logged()
    tags = {"mlflow.parentRunId": whole.parents[0].info.run_id}
    for extra in ({"dem_opt.trial": "0"}, {"dem_opt.trial": "0"}, {"of": "the user's own"}):
        client.create_run(whole.experiment.experiment_id, tags={**tags, **extra})
    run(make(), [trial(0)])
    assert [child.info.run_id for child in logged().children] == [child.info.run_id for child in whole.children]
    assert len(client.search_runs([whole.experiment.experiment_id])) == 3


def test_an_outage_is_one_warning_and_the_next_run_logs_what_is_missing(
    make: Make, logged: Callable[[], Logged], warnings: list[str]
) -> None:
    records = [trial(number) for number in range(5)]
    run(make(), [], records[:2])
    run(make(uri=CLOSED), records[:2], records[2:4])
    assert len(warnings) == 1 and "127.0.0.1" in warnings[0]
    run(make(), records[:4], records[4:])
    assert logged().numbers == [0, 1, 2, 3, 4]
    assert len(warnings) == 1


def test_a_tracker_recovers_from_an_outage(
    make: Make, logged: Callable[[], Logged], warnings: list[str], client: Any, request: pytest.FixtureRequest
) -> None:
    """An experiment in the bin is an outage that ends when it is restored."""
    run(make(), [trial(0)])
    experiment = logged().experiment.experiment_id
    client.delete_experiment(experiment)
    tracker = make()
    tracker.trial_ended(trial(1))
    assert tracker.register(Path("nothing"), {}, {}) is None
    assert len(warnings) == 1
    client.restore_experiment(experiment)
    run(tracker, [trial(0), trial(1)], [trial(2)])
    assert logged().numbers == [0, 1, 2]
    assert len(warnings) == 1


def test_a_full_queue_makes_nobody_wait_and_the_next_run_logs_the_rest(
    make: Make, logged: Callable[[], Logged], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "QUEUE", 3)
    records, go_on = [trial(number) for number in range(6)], Event()
    tracker = make(on_pages=lambda *pages: go_on.wait() and None)
    for record in records[:5]:
        tracker.trial_ended(record)
    go_on.set()
    tracker.close()
    assert logged().numbers == [0, 1, 2]
    assert len(warnings) == 1 and "the next run logs what is missing" in warnings[0]
    run(make(), records[:5], records[5:])
    assert logged().numbers == [0, 1, 2, 3, 4, 5]


def test_a_run_that_failed_in_the_middle_is_gone_on_with(
    make: Make, logged: Callable[[], Logged], warnings: list[str]
) -> None:
    """MLflow creates the run, and then refuses a parameter whose name has more than 250 characters."""
    tracker = make()
    tracker.trial_ended(trial(1, coefficients=Space(("x" * 300,)).centroid()))
    run(tracker, [trial(0)], [trial(1)])
    assert len(warnings) == 1
    assert logged().numbers == [0, 1]
    assert logged().statuses == {"FINISHED"}


def test_the_parent_ends_with_the_last_driver(make: Make, logged: Callable[[], Logged]) -> None:
    for others, status in ((True, "RUNNING"), (False, "FINISHED"), (True, "RUNNING"), (False, "FINISHED")):
        run(make(Others(others)), [trial(0)])
        assert [parent.info.status for parent in logged().parents] == [status]


def test_a_study_that_was_made_anew_has_a_run_of_its_own(make: Make, logged: Callable[[], Logged]) -> None:
    for uid in ("first", "second", "first"):
        run(make(uid=uid), [trial(0)])
    assert len(logged().parents) == 2
    assert logged().numbers == [0, 0]


def test_more_distributions_than_mlflow_takes_at_once(make: Make, logged: Callable[[], Logged]) -> None:
    names = tuple(f"d{number:03}" for number in range(120))
    record = trial(0, coefficients=Space(names).centroid(), scores=dict.fromkeys(names, SCORES["code"]))
    run(make(), [record])
    (child,) = logged().children
    assert len(child.data.params) == 120
    assert sum(key.startswith("perplexity.") for key in child.data.metrics) == 120


@pytest.fixture
def download(uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Gets a registered model's folder as a user would."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return lambda name: Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_champion_is_the_folder_last_registered_and_each_content_one_version(
    make: Make, tmp_path: Path, client: Any, download: Callable[[str], Path], logged: Callable[[], Logged]
) -> None:
    first, second = folder(tmp_path / "a", "{}"), folder(tmp_path / "b", "[]")
    copy = folder(tmp_path / "c", "{}")
    name = "a.model-with_marks"
    for which, version in [(first, "1"), (copy, "1"), (second, "2"), (second, "2"), (first, "1")]:
        tracker = make(model=name)
        assert tracker.register(which, {"held_out.nll.code": 0.5}, {"dem_opt.key": "value"}) == version
        tracker.close()
        assert contents(download(name)) == contents(which)
    versions = client.search_model_versions(f"name = '{name}'")
    assert len(versions) == 2
    assert {version.tags["dem_opt.key"] for version in versions} == {"value"}
    (parent,) = logged().parents
    assert parent.data.metrics == {"held_out.nll.code": 0.5}
    assert len(parent.outputs.model_outputs) == 2


def test_files_lie_where_they_were_meant_to(make: Make, tmp_path: Path) -> None:
    tracker = make()
    tracker.register(folder(tmp_path / "model", "{}"), {}, {})
    tracker.close()
    assert {path.name for path in tmp_path.iterdir()} == {"artifacts", "model"}
    assert any(path.name == "config.json" for path in (tmp_path / "artifacts").rglob("*"))


def test_telemetry_is_off_and_the_users_settings_win(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    make().close()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


RESULTS = (
    ResultRow(
        label="base",
        role="base",
        algorithm="",
        coefficients=None,
        scores={"search": SCORES, "held_out": SCORES},
        objective={"search": 0.6, "held_out": 0.7},
        evaluations=1,
        forward_tokens=9,
        seconds=0.1,
    ),
    ResultRow(
        label="it's code",
        role="single",
        algorithm="",
        coefficients=SPACE.vertices()[0],
        scores={"search": SCORES},
        objective={"search": 0.5},
        evaluations=1,
        forward_tokens=9,
        seconds=0.1,
    ),
    ResultRow(
        label="math",
        role="without",
        algorithm="",
        coefficients=SPACE.vertices()[0],
        scores={"search": SCORES},
        objective={"search": 0.4},
        evaluations=1,
        forward_tokens=9,
        seconds=0.1,
    ),
)


def test_a_dossier_can_be_told_again_and_baselines_have_one_run_each(
    make: Make, logged: Callable[[], Logged], client: Any, warnings: list[str]
) -> None:
    data = [
        DataSource(name=name, split=split, source=f"{name}.jsonl", digest=f"{split}{name}" * 40, windows=4)
        for name in ("code", "math")
        for split in ("search", "b")
    ]
    for words in ("first", "second"):
        tracker = make(page="http://127.0.0.1:1/dashboard/studies/1")
        files = {"report.html": f"<p>{words}", "figures/a.png": words.encode()}
        metrics = {"best.objective_nll": 0.5}
        tracker.describe(
            StudyDescription(
                tags={"dem_opt.fingerprint": words},
                note=f"**{words}**",
                data=data,
                files=files,
                metrics=metrics,
                baselines=RESULTS,
            )
        )
        tracker.close()
    assert warnings == []
    snapshot = logged()
    (parent,) = snapshot.parents
    note = parent.data.tags["mlflow.note.content"]
    assert note == "**second**\n\n[This search in Optuna Dashboard](http://127.0.0.1:1/dashboard/studies/1)"
    assert parent.data.tags["dem_opt.fingerprint"] == "second" and parent.data.metrics == metrics
    assert len(parent.inputs.dataset_inputs) == 4
    paths = [artifact.path for artifact in client.list_artifacts(parent.info.run_id)]
    assert sorted(paths) == ["figures", "report.html"]
    runs = client.search_runs([snapshot.experiment.experiment_id], "tags.role = 'baseline'")
    named = {run.data.tags["mlflow.runName"]: run for run in runs}
    assert len(runs) == 3 and named.keys() == {"base", "it's code alone", "winner without math"}
    base = named["base"].data
    assert base.tags["mlflow.parentRunId"] == parent.info.run_id and base.params == {}
    assert base.metrics["nll.code"] == 0.5 and base.metrics["held_out.objective_nll"] == 0.7
    assert named["winner without math"].data.params == {"w.code": "1.0", "w.math": "0.0"}
    assert not snapshot.children, "baselines are no trials"


STOPPED = trial(1, objective=0.5, error=0.25, forwards=0.5)
INFEASIBLE = trial(2, objective=0.25, violation=0.5)
STATES = {"complete": trial(0), "stopped": STOPPED, "infeasible": INFEASIBLE, "failed": failed(3)}
OBJECTIVES = {"complete": "objective_nll", "stopped": "estimate", "infeasible": "infeasible_nll"}


def objectives_of(run: Any) -> dict[str, float]:
    """The metrics of a run, by name, that are its objective, and numbers."""
    names = {*OBJECTIVES.values(), "standard_error"}
    return {name: value for name, value in run.data.metrics.items() if name in names and not isnan(value)}


def check_states(runs: Sequence[Any]) -> None:
    """Sorted by the objective, the only trial that may win comes first, though others have lower numbers."""
    assert runs[0].info.run_name == "trial-0"
    found = {run.data.tags["dem_opt.state"]: objectives_of(run) for run in runs}
    assert found.pop("failed") == {}
    assert found.pop("stopped") == {"estimate": 0.5, "standard_error": 0.25}
    assert found == {"complete": {"objective_nll": 0.625}, "infeasible": {"infeasible_nll": 0.25}}


def sorted_runs(client: Any, logged: Logged) -> list[Any]:
    """The runs of trials as MLflow's page sorts them."""
    order = ["metrics.objective_nll ASC"]
    runs = client.search_runs([logged.experiment.experiment_id], "tags.`dem_opt.trial` LIKE '%'", order_by=order)
    return list(runs)


def test_only_what_may_win_has_the_objective(make: Make, logged: Callable[[], Logged], client: Any) -> None:
    run(make(), [], list(STATES.values()))
    check_states(sorted_runs(client, logged()))


def test_runs_of_the_earlier_release_are_upgraded_in_place(
    make: Make, logged: Callable[[], Logged], client: Any
) -> None:
    """They had the objective of every trial under one name, and no state."""
    from mlflow.entities import Metric

    run(make(), [], [trial(0)])
    (parent,) = logged().parents
    client.delete_run(logged().children[0].info.run_id)
    for record in STATES.values():
        tags = {"mlflow.parentRunId": parent.info.run_id, "dem_opt.trial": str(record.number)}
        child = client.create_run(parent.info.experiment_id, tags=tags, run_name=f"trial-{record.number}").info
        if record.objective is not None:
            client.log_batch(child.run_id, [Metric("objective_nll", record.objective, child.start_time, record.number)])
        client.set_terminated(child.run_id, "FINISHED" if record.objective is not None else "FAILED")
    runs = {child.info.run_id for child in logged().children}
    for _ in range(2):
        run(make(), list(STATES.values()))
        check_states(sorted_runs(client, logged()))
        assert {child.info.run_id for child in logged().children} == runs
    stopped = next(child for child in logged().children if child.data.tags["dem_opt.state"] == "stopped")
    assert len(client.get_metric_history(stopped.info.run_id, "estimate")) == 1, "upgraded once"


def test_a_metric_that_the_latest_winner_lacks_is_no_number(make: Make, logged: Callable[[], Logged]) -> None:
    """The first winner violates a constraint, the next one does not."""
    for trials, metrics in (
        (1, {"best.infeasible_nll": 0.1, "best.protect_violation": 0.5}),
        (2, {"best.objective_nll": 0.6}),
    ):
        tracker = make()
        tracker.describe(StudyDescription(metrics=metrics, trials=trials))
        tracker.close()
    (parent,) = logged().parents
    assert {name: value for name, value in parent.data.metrics.items() if not isnan(value)} == {
        "best.objective_nll": 0.6
    }


@pytest.mark.parametrize(("before", "after"), [(20, 40), (20, 20)], ids=["more trials", "as many"])
def test_the_search_shows_the_latest_winner_alone(
    make: Make, logged: Callable[[], Logged], client: Any, before: int, after: int
) -> None:
    """The later winner is better on one corpus and worse on the other: each metric is its own, none the largest."""
    winners = [
        (before, {"best.objective_nll": 0.6, "best.nll.code": 0.2, "best.nll.math": 1.0}, RESULTS[2]),
        (
            after,
            {"best.objective_nll": 0.5, "best.nll.code": 0.4, "best.nll.math": 0.6},
            replace(RESULTS[2], coefficients=SPACE.vertices()[1], objective={"search": 0.3}),
        ),
    ]
    for trials, metrics, without in winners:
        tracker = make()
        tracker.describe(StudyDescription(metrics=metrics, trials=trials, baselines=[RESULTS[0], without]))
        tracker.close()
    (parent,) = logged().parents
    assert parent.data.metrics == winners[-1][1]
    runs = client.search_runs([logged().experiment.experiment_id], "tags.role = 'baseline'")
    named = {run.data.tags["mlflow.runName"]: run.data for run in runs}
    assert len(runs) == 2 and named.keys() == {"base", "winner without math"}
    without = named["winner without math"]
    assert without.params == {"w.code": "0.0", "w.math": "1.0"} and without.metrics["objective_nll"] == 0.3


def test_every_logged_trials_page_is_reported(make: Make, logged: Callable[[], Logged]) -> None:
    reports: list[tuple[str, dict[int, str], str]] = []
    run(make(), [trial(0)])
    tracker = make(on_pages=lambda study, pages, page: reports.append((study, dict(pages), page)))
    run(tracker, [trial(0), trial(1)], [trial(2)])
    snapshot = logged()
    pages = {int(child.data.tags["dem_opt.trial"]): child.info.run_id for child in snapshot.children}
    (_, repaired, page), (study, latest, _) = reports
    assert study.endswith("/simplex-gp#2")
    assert page.endswith(f"/runs/{snapshot.parents[0].info.run_id}") and page.startswith("http://127.0.0.1:")
    assert {number: link.rpartition("/")[2] for number, link in (repaired | latest).items()} == pages
    assert repaired.keys() == {0, 1} and latest.keys() == {2}


def test_a_page_listener_that_fails_costs_one_warning_and_no_run(
    make: Make, logged: Callable[[], Logged], warnings: list[str]
) -> None:
    def fail(study: str, pages: object, page: str) -> None:
        raise OSError("database is locked")

    run(make(on_pages=fail), [trial(0)], [trial(1), trial(2)])
    assert logged().numbers == [0, 1, 2]
    (warning,) = warnings
    assert "links to MLflow could not be written (OSError: database is locked)" in warning


def test_a_trial_links_to_optuna_dashboard(make: Make, logged: Callable[[], Logged]) -> None:
    run(make(trial_page=lambda number: f"http://127.0.0.1:1/trials?numbers={number}"), [], [trial(3)])
    (child,) = logged().children
    assert "http://127.0.0.1:1/trials?numbers=3" in child.data.tags["mlflow.note.content"]


def test_only_searches_that_were_reset_are_marked(
    make: Make,
    logged: Callable[[], Logged],
    uri: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    warnings: list[str],
) -> None:
    for study in ("mine/random", "other/random"):
        run(make(study=study, uid=study), [trial(0)])
    store = MlflowStore(uri=uri, experiment=request.node.name, artifacts=tmp_path / "artifacts")
    for _ in range(2):
        MlflowTracker(store).mark_reset(lambda name: name.startswith("mine/"), warnings.append)
    marks = {run.data.tags["dem_opt.study"]: run.data.tags.get("dem_opt.reset") for run in logged().parents}
    assert marks == {"mine/random": "true", "other/random": None} and not warnings


@pytest.mark.parametrize(("uri", "warned"), [("sqlite:///none.db", 0), (CLOSED, 1)])
def test_marking_a_reset_creates_nothing_and_raises_nothing(
    uri: str, warned: int, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    store = MlflowStore(uri=uri, experiment="mine", artifacts=tmp_path / "artifacts")
    MlflowTracker(store).mark_reset(lambda name: True, warnings.append)
    assert len(warnings) == warned and not list(tmp_path.iterdir())
    assert not any(SECRET in warning for warning in warnings)
