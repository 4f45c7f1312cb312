"""The front between two losses, from the ledger alone: what brute force over all scores says."""

import csv
import io
import json
import sqlite3
from contextlib import closing, redirect_stdout

import numpy as np
import pytest
import worlds
from in_process import open_study

from dem_opt.cli.main import main
from dem_opt.errors import InputError
from dem_opt.evaluation.objective import mean_nll
from dem_opt.evaluation.worker import Worker
from dem_opt.search.trials import coefficients_of, recall
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import opened
from dem_opt.types import HELD_OUT, SEARCH, Composite

NAMES = ("code", "math", "prose")
EVALUATION = {"window": 32, "windows": 8, "held_out": 4}
PAIRS = [("code", "math"), ("math", "code"), ("mean", "prose"), ("general", "mean"), ("general", "code")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study that has been compared, with a general corpus that weighs nothing."""
    folder = tmp_path_factory.mktemp("world")
    worlds.write_documents(folder / "data/general.jsonl", worlds.documents(7))
    search = {"algorithm": "random", "trials": 8, "divisions": 4}
    general = {"general": "data/general.jsonl"}
    path = worlds.study(folder, search=search, evaluation=EVALUATION, general=general)
    open_study(path).compare(["grid", "random"])
    return path


def known_scores(study):
    """Scores on the search split by composite of the study's space, those of the base, and the study."""
    with opened(study.config.storage) as engine:
        ledger = Ledger(engine)
        row = ledger.study("tiny")
        identity = StudyIdentity.recall(row.identity, row.scoring)
        scores = {
            composite: recall(ledger, identity, composite, SEARCH)
            for composite in ledger.composites(identity.scoring)
            if coefficients_of(identity, composite) is not None
        }
        return scores, recall(ledger, identity, Composite.single(identity.base), SEARCH), identity


def dump(path):
    with closing(sqlite3.connect(path.parent / "runs/tiny/study.db")) as connection:
        return list(connection.iterdump())


def printed(*words):
    with redirect_stdout(io.StringIO()) as text:
        assert main([*map(str, words)]) == 0
    return text.getvalue()


def loss(scores, name):
    return mean_nll(scores, dict.fromkeys(NAMES, 1.0)) if name == "mean" else scores[name].nll


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_the_front_is_that_of_brute_force_and_nothing_is_measured_or_written(measured, monkeypatch, names):
    study = open_study(measured)
    scores, base, identity = known_scores(study)
    needed = {corpus for name in names for corpus in (NAMES if name == "mean" else [name])}
    scored = {composite: each for composite, each in scores.items() if needed <= each.keys()}
    losses = {composite: tuple(loss(each, name) for name in names) for composite, each in scored.items()}
    expected = {
        composite: point
        for composite, point in losses.items()
        if not any(np.less_equal(other, point).all() and other != point for other in losses.values())
    }
    before, files = dump(measured), sorted(measured.parent.rglob("*"))
    monkeypatch.setattr(Worker, "evaluate", lambda *_: pytest.fail("something was measured"))
    front = study.pareto(*names)
    figure = study.plot.pareto(*names)
    assert dump(measured) == before and sorted(measured.parent.rglob("*")) == files
    assert front.names == names and front.unit == "nats per token"
    on_front = {identity.composite(point.coefficients): point.search for point in front.points}
    assert on_front.keys() == expected.keys()
    assert all(on_front[composite] == pytest.approx(expected[composite]) for composite in expected)
    first = [point.search[0] for point in front.points]
    assert first == sorted(first)
    assert len(front.points) + len(front.dominated) == len(losses)
    worst = np.array([[loss(base, name) for name in names], *losses.values()]).max(axis=0)
    assert (np.array(front.reference) <= worst + 1e-12).all()
    assert front.baselines["base"].search == pytest.approx(tuple(loss(base, name) for name in names))
    assert figure.data and figure.layout.meta["description"]


def test_held_out_losses_and_gaps(measured):
    """The final table has the winner's scores on both splits; the ends of the front give nothing up."""
    front = open_study(measured).pareto("code", "mean")
    winner = open_study(measured).summary().winner
    (point,) = (point for point in front.points if point.coefficients == winner.coefficients)
    assert point.held_out == pytest.approx((winner.scores[HELD_OUT]["code"].nll, winner.objective[HELD_OUT]))
    assert point.search == pytest.approx((winner.scores[SEARCH]["code"].nll, winner.objective[SEARCH]))
    for each in front.points:
        for place, gap in enumerate(each.gaps):
            assert gap.mean == pytest.approx(each.search[place] - min(other.search[place] for other in front.points))
            assert gap.low <= gap.mean <= gap.high
    assert front.points[0].gaps[0].mean == front.points[-1].gaps[1].mean == 0


def test_json_csv_page_and_figures_say_the_same(measured, tmp_path):
    between = ("pareto", measured, "--between", "code", "math")
    front = open_study(measured).pareto("code", "math")
    out, figures = tmp_path / "front.html", tmp_path / "figures"
    answer = json.loads(printed(*between, "--json", "--out", out, "--figures", figures))
    assert answer["points"] == front.rows() and answer["hypervolume"] == front.hypervolume
    assert answer["reference"] == dict(zip(front.names, front.reference, strict=True))
    assert answer["points"][answer["lowest_mean"]]["note"].startswith("lowest mean")
    assert {str(path) for path in figures.glob("*.*g")} | {str(out)} == set(answer["written"])
    rows = list(csv.DictReader(io.StringIO(printed(*between, "--csv"))))
    assert [float(row["search.math"]) for row in rows] == [point.search[1] for point in front.points]
    text, page = printed(*between), out.read_text(encoding="utf-8")
    number = f"{front.lowest_mean.search[0]:.4f}"
    assert number in text and number in page and f"{front.hypervolume:.6g}" in text
    printed(*between, "--out", out, "--figures", figures)
    printed("report", measured, "--figures", figures, "--out", tmp_path / "report.html")
    printed(*between, "--figures", figures)
    printed("report", measured, "--figures", figures, "--out", tmp_path / "report.html")


@pytest.mark.parametrize(
    ("names", "field", "mend"),
    [
        (("cod", "math"), "--between", "did you mean 'code'"),
        (("code", "men"), "--between", "did you mean 'mean'"),
        (("code", "code"), "--between", "two different names"),
        (("mean", "mean"), "--between", "two different names"),
    ],
)
def test_names_that_are_no_pair_are_refused(measured, capsys, names, field, mend):
    with pytest.raises(InputError, match=mend) as refusal:
        open_study(measured).pareto(*names)
    assert refusal.value.field == field
    assert main(["pareto", str(measured), "--between", *names]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--between", "code"),
        ("--between", "code", "math", "prose"),
        ("--between", "code", "math", "--csv", "--json"),
    ],
)
def test_a_command_that_is_incomplete_is_one_line(measured, capsys, words):
    assert main(["pareto", str(measured), *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_is_no_page_is_kept(measured, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert main(["pareto", str(measured), "--between", "code", "math", "--out", str(mine)]) == 2
    assert mine.read_text() == "mine" and str(mine) in capsys.readouterr().err


def test_a_study_that_was_never_run_says_what_to_do_first(tmp_path):
    path = worlds.study(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="dem-opt run"):
        open_study(path).pareto("code", "math")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_violates_a_constraint_is_marked(tmp_path):
    """The front between a protected corpus and the mean shows what the allowance costs, on both sides of it."""
    search = {"algorithm": "random", "trials": 4, "divisions": 4}
    path = worlds.study(tmp_path, search=search, evaluation=EVALUATION, objective={"protect": {"code": 0.0}})
    open_study(path).compare(["grid"])
    front = open_study(path).pareto("code", "mean")
    base = front.baselines["base"].search[0]
    for point in front.points:
        assert point.violation == pytest.approx(max(0.0, point.search[0] - base))
