"""Figures, report, Optuna Dashboard's plots and the launcher, on made-up studies and real servers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import permutations
from math import exp
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import mlflow
import numpy as np
import optuna
import plotly.graph_objects as go
import pytest
from optuna.distributions import FloatDistribution
from optuna_dashboard import _custom_plot_data, _note

from dashboards import figures, launcher, publish, report
from dashboards.look import MOST_POINTS
from dashboards.simplex_map import barycentric
from dem_opt.errors import InputError
from dem_opt.records import Evaluation, Margin, Score, Standing, Summary, TrialRecord, mean_nll
from dem_opt.simplex import Coefficients, Space

Ends = tuple[float, float]
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=http://e.example/x>",
    "%{x}$a$ 'q' \"d\" &lt;b&gt;",
    "n" * 64,
)
CASES = {
    "one": {"names": ("a",)},
    "two": {"names": ("a", "b")},
    "three": {"names": ("code", "math", "prose")},
    "four": {"names": ("code", "math", "prose", "records")},
    "eight": {"names": tuple("abcdefgh"), "trials": 40},
    "hostile": {"names": HOSTILE, "study": HOSTILE[0]},
    "hostile three": {"names": HOSTILE[:3], "label": HOSTILE[1]},
    "one trial": {"names": ("a", "b", "c"), "trials": 1},
    "failures only": {"names": ("a", "b", "c"), "failed": True},
    "no trials": {"names": ("a", "b", "c"), "trials": 0},
    "base wins": {"names": ("a", "b", "c", "d"), "failed": True, "baselines": False},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def a_summary(
    names: Sequence[str],
    trials: int = 12,
    failed: bool = False,
    baselines: bool = True,
    study: str = "example",
    label: str = "best of simplex-gp",
) -> Summary:
    """A study with random scores; the winner stands last, whatever its score."""
    rng = np.random.default_rng(0)
    space = Space(tuple(names))
    weights = dict.fromkeys(names, 1.0)

    def scores() -> dict[str, Score]:
        return {name: Score(tuple(rng.uniform(200, 300, 3)), (90, 100, 110)) for name in names}

    def trial(number: int, coefficients: Coefficients) -> TrialRecord:
        if failed or number % 5 == 4:
            return TrialRecord(study, number, coefficients, None, reason=f"window <0> is nan {study}")
        found = scores()
        return TrialRecord(study, number, coefficients, mean_nll(found, weights), found, Evaluation({}, 900, 0.1, 0.2))

    def standing(label: str, role: str, coefficients: Coefficients | None, algorithm: str = "") -> Standing:
        found = {split: scores() for split in report.SPLITS}
        objective = {split: mean_nll(each, weights) for split, each in found.items()}
        return Standing(label, role, algorithm, coefficients, found, objective, 1, 900, 0.3)

    found = {name: tuple(trial(i, space.sample(rng)) for i in range(trials)) for name in ("grid", "simplex-gp", "new")}
    standings = [standing("base", "base", None)]
    if baselines:
        standings += [
            standing(name, "single", point) for name, point in zip(space.names, space.vertices(), strict=True)
        ]
        standings += [standing("uniform", "uniform", space.centroid())]
    if not failed and trials:
        standings += [standing(label, "best", space.sample(rng), "simplex-gp")]
    margins = [Margin(each.label, split, 0.1, -0.1, 0.3) for each in standings[:-1] for split in report.SPLITS]
    return Summary(study, weights, tuple(standings), tuple(margins), found, {"study": study, "command": "dem-opt run"})


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def texts_of(value: object) -> list[str]:
    """Every string in a figure's JSON, but for its words in `meta`, which plotly does not draw."""
    if isinstance(value, dict):
        return [text for key, each in value.items() if key != "meta" for text in texts_of(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts_of(each)]
    return [value] if isinstance(value, str) else []


@cases
def test_every_figure_builds_with_units_and_words(case: dict[str, object]) -> None:
    summary = a_summary(**case)
    for name, figure in figures.all_figures(summary).items():
        assert json.loads(figure.to_json())["data"] or figure.layout.annotations, name
        assert figure.layout.title.text
        assert figure.layout.meta["reading"] and figure.layout.meta["description"]
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            title = axis.title.text or ""
            assert "NLL" not in title or "nats per token" in title


@cases
def test_nothing_a_user_wrote_is_read_as_markup(case: dict[str, object]) -> None:
    """plotly reads tags in every text, and %{...} in templates."""
    for figure in figures.all_figures(a_summary(**case)).values():
        for text in texts_of(json.loads(figure.to_json())):
            assert not re.search(r"<(?!br>|extra>|/extra>)", text), text
        for trace in json.loads(figure.to_json())["data"]:
            templates = [text for key, text in trace.items() if "template" in key]
            assert all("script" not in text and "$" not in text for text in templates)


@cases
def test_the_report_is_whole_and_asks_the_network_for_nothing(case: dict[str, object], tmp_path: Path) -> None:
    summary = a_summary(**case)
    path = tmp_path / "out" / "report.html"
    report.write_report(summary, path)
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_size < 6_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset", "action", "data"} & set(attrs)]
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [tag for tag, _ in page.tags if tag in ("img", "b", "iframe", "link")]
    plots = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert [plot["id"] for plot in plots] == list(figures.all_figures(summary))
    assert all(plot["aria-label"] for plot in plots)
    written = " ".join(page.texts)
    assert all(name in written for name in summary.weights)
    assert all(row[-2] in written for split in report.SPLITS for row in report.final_table(summary, split).rows)
    embedded = next(text for text in page.texts if text.startswith('{"coefficients"'))
    assert set(json.loads(embedded)) == set(figures.all_figures(summary))


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match="report can't be written"):
        report.write_report(a_summary(("a", "b")), tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_the_final_table_says_nll_mean_and_perplexity() -> None:
    """Two windows of 10 tokens: 20 and 30 nats are 2.5 a token, 10 and 20 are 1.5; mean 2, e^2 = 7.389."""
    high, low = Score((20.0, 30.0), (10, 10)), Score((10.0, 20.0), (10, 10))
    scores = {"search": {"a": high, "b": low}}
    standings = (
        Standing("base", "base", "", None, {"search": {"a": high, "b": high}}, {"search": 2.5}, 1, 950, 0.25),
        Standing(
            "best",
            "best",
            "grid",
            Space(("a", "b")).centroid(),
            scores,
            {"search": 2.0},
            2860,
            2_288_000,
            12.0,
        ),
    )
    table = report.final_table(Summary("s", {"a": 1.0, "b": 1.0}, standings, (), {}, {}), "search")
    assert table.headers == ("composite", "a", "b", "mean", "perplexity", "evals", "tokens", "seconds")
    assert table.rows[0] == ("base", "2.5000", "2.5000", "2.5000", f"{exp(2.5):.3f}", "1", "950", "0.2")
    assert table.rows[1] == ("best", "2.5000", "1.5000", "2.0000", "7.389", "2,860", "2.29M", "12.0")
    assert table.lowest == {(0, 1), (1, 1), (1, 2), (1, 3), (1, 4)}
    assert report.final_table(Summary("s", {"a": 1.0}, standings, (), {}, {}), "held_out").rows[0][1:4] == (
        "-",
        "-",
        "-",
    )


def test_what_violates_protection_says_by_how_much() -> None:
    summary = a_summary(("a", "b"))
    *others, winner = summary.standings
    over = replace(summary, standings=(*others, replace(winner, violation=0.0312)))
    for split in report.SPLITS:
        before, after = (report.final_table(each, split).rows for each in (summary, over))
        assert after[-1] == (f"{winner.label} (protect: +0.031 over)", *before[-1][1:]) and after[:-1] == before[:-1]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_general_corpora_have_columns_and_no_coefficients(count: int) -> None:
    summary = a_summary(("a", "b", "c", "d")[:count])
    general = replace(summary, weights={**summary.weights, "web": 0.0})
    assert report.final_table(general, "search").headers[count + 1] == "web"
    plain, drawn = figures.all_figures(summary), figures.all_figures(general)
    for name in ("coefficients", "best-so-far", "simplex"):
        assert drawn[name] == plain[name]
    assert len(drawn["change"].data[0].x) == count + 1


def test_best_so_far_counts_violations_with_their_penalty() -> None:
    summary = a_summary(("a", "b"))
    records = {name: tuple(replace(each, violation=0.1) for each in trials) for name, trials in summary.trials.items()}
    before, after = (figures.best_so_far(each).data for each in (summary, replace(summary, trials=records)))
    for lower, higher in zip(before, after, strict=True):
        assert np.asarray(higher.y) == pytest.approx(np.asarray(lower.y) + 1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("search", "held_out", "verdict"),
    [
        ((0.1, 0.3), (0.2, 0.4), "better"),
        ((-0.3, -0.1), (-0.4, -0.2), "worse"),
        ((-0.1, 0.1), (-0.1, 0.1), "not told apart"),
        ((0.1, 0.3), (-0.3, -0.1), "search split: better; held-out split: worse"),
    ],
)
def test_losses_are_said_as_plainly_as_wins(search: Ends, held_out: Ends, verdict: str) -> None:
    found = {"search": search, "held_out": held_out}
    margins = tuple(Margin("rival", split, sum(ends) / 2, *ends) for split, ends in found.items())
    table = report.margin_table(Summary("s", {}, (), margins, {}, {}))
    assert [row[-1] for row in table.rows] == [verdict]
    assert table.rows[0][1] == f"{sum(search) / 2:+.4f} [{search[0]:+.4f}, {search[1]:+.4f}]"


def test_the_expected_best_is_the_mean_over_all_orders() -> None:
    values = [2.0, 1.5, 3.0, 1.0, 2.5, 1.5]
    orders = np.array(list(permutations(values)))
    by_enumeration = np.minimum.accumulate(orders, axis=1).mean(axis=0)
    assert figures.expected_best(values, np.arange(1, 7)) == pytest.approx(by_enumeration, abs=1e-12)


def test_best_so_far_never_rises_and_ends_at_the_best() -> None:
    summary = a_summary(("a", "b", "c"), trials=1500)
    for trace, records in zip(figures.best_so_far(summary).data, summary.trials.values(), strict=True):
        scored = [record.objective for record in records if record.objective is not None]
        assert len(trace.x) == MOST_POINTS and trace.x[0] == 1 and trace.x[-1] == len(scored)
        assert np.all(np.diff(trace.y) <= 0) and trace.y[-1] == pytest.approx(min(scored), abs=1e-6)


def test_the_map_keeps_the_best_of_many_trials() -> None:
    summary = a_summary(("a", "b", "c", "d"), trials=1400)
    traces = figures.simplex_map(summary).data
    drawn = {trace.legendgroup: trace.marker.color for trace in traces if trace.marker.coloraxis}
    for algorithm, records in summary.trials.items():
        objectives = sorted(record.objective for record in records if record.objective is not None)
        assert len(drawn[algorithm]) == MOST_POINTS
        assert drawn[algorithm][-1] == pytest.approx(objectives[0], abs=1e-6)
        assert drawn[algorithm][0] == pytest.approx(objectives[-1], abs=1e-6)


def test_the_polygon_puts_vertices_on_its_corners_and_the_centroid_in_the_middle() -> None:
    names = ("a", "b", "c", "d")
    space = Space(names)
    corners = np.array([(-1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
    points = barycentric([*space.vertices(), space.centroid()], names, corners)
    assert points == pytest.approx(np.vstack([corners, [[0.0, 0.0]]]))


def test_the_heat_map_shows_the_change_against_the_base() -> None:
    """Base 2.5 on both, the composite 2.5 and 1.5: changes 0 and -1; colours saturate at the gain of 1."""
    high, low = Score((25.0,), (10,)), Score((15.0,), (10,))
    standings = (
        Standing("base", "base", "", None, {"held_out": {"a": high, "b": high}}, {}, 1, 1, 0.0),
        Standing("best", "best", "grid", None, {"held_out": {"a": high, "b": low}}, {}, 1, 1, 0.0),
    )
    heat = figures.change_heat_map(Summary("s", {"a": 1.0, "b": 1.0}, standings, (), {}, {})).data[0]
    assert [list(row) for row in heat.z] == [[0.0, -1.0]] and [list(row) for row in heat.text] == [["+0.000", "-1.000"]]
    assert (heat.zmin, heat.zmax) == (-1.0, 1.0)


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
    for case in (CASES["eight"], CASES["two"]):
        summary = a_summary(**case)
        made = figures.all_figures(summary)
        publish.publish(storage, "example", made, report.study_note(summary, {"MLflow": "http://127.0.0.1:5000/"}))
        attributes = dashboard_attributes(storage)
        plots = _custom_plot_data.get_plotly_graph_objects(attributes)
        assert {name: go.Figure(json.loads(text)) for name, text in plots.items()} == made
        note = _note.get_note_from_system_attrs(attributes, None)["body"]
        assert "nats per token" in note and summary.winner.label in note and "[MLflow](http://127.0.0.1:5000/)" in note


def test_publishing_to_an_unknown_study_says_so(storage: str) -> None:
    with pytest.raises(InputError, match="not in the database"):
        publish.publish(storage, "exmple", {}, "")


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
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def get(address: str) -> bytes:
    with urlopen(address, timeout=30) as answer:
        body: bytes = answer.read()
    return body


def port_is_free(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((launcher.LOOPBACK, urlsplit(address).port or 0)) != 0


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to look for processes in")


@needs_proc
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_both_servers_answer_and_leave_no_process(
    storage: str, tracking: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, run = tracking
    monkeypatch.setenv("DEM_OPT_TEST_MARK", str(tmp_path))
    mark = f"DEM_OPT_TEST_MARK={tmp_path}"
    with launcher.running(storage, uri) as addresses:
        studies = json.loads(get(f"{addresses.optuna}api/studies"))["study_summaries"]
        assert [study["study_name"] for study in studies] == ["example"]
        assert b"MLflow" in get(addresses.mlflow)
        assert get(f"{addresses.mlflow}get-artifact?path=note.txt&run_uuid={run}") == b"hello"
        assert urlsplit(addresses.optuna).hostname == urlsplit(addresses.mlflow).hostname == "127.0.0.1"
        lines = processes_marked(mark)
        assert len(lines) >= 2 and not [line for line in lines if "study.db" in line or "mlflow.db" in line]
    assert processes_marked(mark) == []
    assert port_is_free(addresses.optuna) and port_is_free(addresses.mlflow)


SERVE = """
import sys
from dashboards.launcher import serve
serve(sys.argv[1], sys.argv[2], None, lambda line: print(line, flush=True))
"""


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_them(storage: str, number: signal.Signals, tmp_path: Path) -> None:
    """An MLflow address is used as it is, without its login."""
    mark = {"DEM_OPT_TEST_MARK": str(tmp_path), "PYTHONPATH": str(Path(launcher.__file__).parents[1])}
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
    monkeypatch.setattr(launcher, "PATIENCE", 0.0)


def not_a_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("x" * 5000)


def no_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "study.db").unlink()


@needs_proc
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (no_program, "optuna-dashboard: is missing; install it"),
        (no_patience, "did not answer within 0 seconds"),
        (not_a_database, "optuna-dashboard: ended with status 1: .*not a database"),
        (no_database, "there is no study yet"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(
    harm: Harm, told: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEM_OPT_TEST_MARK", str(tmp_path))
    harm(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=told), launcher.running(storage, "http://127.0.0.1:1/"):
        pass
    assert processes_marked(f"DEM_OPT_TEST_MARK={tmp_path}") == []


def test_a_password_is_not_in_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("can't reach postgresql+psycopg://me:s3cret@host/db\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
    with pytest.raises(InputError, match=r"ended with status 3: can't reach postgresql\+psycopg://me:\*\*\*@host/db"):
        launcher.Server("optuna-dashboard", "http://127.0.0.1:1/", process, log).check(["s3cret"])
