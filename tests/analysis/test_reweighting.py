"""Another weighting, from the ledger alone: what brute force over all scores says, and nothing is measured for it."""

import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import permutations

import pytest
import worlds
from in_process import open_study

from dem_opt.analysis.reweighting import reweighted
from dem_opt.cli.coefficients import format_coefficients
from dem_opt.errors import InputError
from dem_opt.evaluation.objective import Objective, mean_nll
from dem_opt.evaluation.worker import Worker
from dem_opt.search.trials import coefficients_of, recall
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.leases import holding
from dem_opt.storage.ledger import Ledger
from dem_opt.types import HELD_OUT, SEARCH, Composite

SEARCHED = {"algorithm": "random", "trials": 8, "divisions": 4}
WEIGHTINGS = [{"code": 1}, {"code": 2, "math": 1}, {"prose": 1, "math": 0}, {"code": 0.1, "math": 0.1, "prose": 5}]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study that has been compared."""
    evaluation = {"window": 32, "windows": 8, "held_out": 4}
    path = worlds.study(tmp_path_factory.mktemp("world"), search=SEARCHED, evaluation=evaluation)
    open_study(path).compare(["grid", "random"])
    return path


def known_scores(study):
    """Scores on the search split of the base and of the space's composites that have three or more, and the study."""
    with closing_engine(study) as engine:
        ledger = Ledger(engine)
        row = ledger.study("tiny")
        identity = StudyIdentity.recall(row.identity, row.scoring)
        by_composite = {
            composite: recall(ledger, identity, composite, SEARCH)
            for composite in ledger.composites(identity.scoring)
            if composite == Composite.single(identity.base) or coefficients_of(identity, composite) is not None
        }
    return {composite: scores for composite, scores in by_composite.items() if len(scores) >= 3}, identity


@contextmanager
def closing_engine(study):
    engine = connect(study.config.storage)
    try:
        yield engine
    finally:
        engine.dispose()


def dump(path):
    with closing(sqlite3.connect(path.parent / "runs/tiny/study.db")) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("weights", WEIGHTINGS, ids=str)
def test_the_winner_is_that_of_brute_force_and_nothing_is_measured_or_written(measured, monkeypatch, weights):
    study = open_study(measured)
    scores, identity = known_scores(study)
    base = Composite.single(identity.base)
    values = {composite: mean_nll(scores[composite], weights) for composite in scores if composite != base}
    before, files = dump(measured), sorted(measured.parent.rglob("*"))
    monkeypatch.setattr(Worker, "evaluate", lambda *_: pytest.fail("something was measured"))
    result = study.reweighted(weights)
    assert dump(measured) == before and sorted(measured.parent.rglob("*")) == files
    winner = result.winner
    assert winner.objective[SEARCH] == min(values.values())
    assert identity.composite(winner.coefficients) == min(values, key=values.get)
    assert winner.evaluations == len(values) and winner.forwards == 0
    assert [row.objective[SEARCH] for row in result.top] == sorted(values.values())[:5]
    assert dict(result.weights) == {"code": 0.0, "math": 0.0, "prose": 0.0} | weights
    assert list(result.weights) == ["code", "math", "prose"]
    assert [row.label for row in result.results[:-1]] == ["base", "code", "math", "prose", "uniform", "sum of all"]
    for row in result.results:
        assert row.objective[SEARCH] == mean_nll(row.scores[SEARCH], weights)


def test_the_studys_own_weighting_finds_its_winner_or_what_is_better_without_a_distribution(measured):
    study = open_study(measured)
    summary, again = study.summary(), study.reweighted({"code": 1, "math": 1, "prose": 1}).winner
    (best, *_) = sorted([summary.winner, *summary.left_out], key=lambda row: row.objective[SEARCH])
    assert again.coefficients == best.coefficients and again.objective == best.objective


def test_what_was_stopped_is_no_candidate(measured):
    study = open_study(measured)
    stopped = [record for record in study.summary().trials["random"] if record.is_partial]
    assert stopped, "the world has such trials"
    scores, identity = known_scores(study)
    assert not {identity.composite(record.coefficients) for record in stopped} & set(scores)


def test_a_score_fills_in_the_held_out_split(tmp_path):
    """One that --coefficients takes is that composite to the last unit."""
    path = worlds.study(tmp_path, search=SEARCHED | {"divisions": 9})
    open_study(path).compare(["grid"])
    winners = {name: open_study(path).reweighted({name: 1}).winner for name in ("code", "math", "prose")}
    name, before = next((name, winner) for name, winner in winners.items() if HELD_OUT not in winner.objective)
    weights = {name: 1}
    text = format_coefficients(before.coefficients)
    open_study(path).score({name: float(value) for name, value in (part.split("=") for part in text.split(","))})
    after = open_study(path).reweighted(weights).winner
    assert after.coefficients == before.coefficients and HELD_OUT in after.objective


@pytest.mark.parametrize(("weighed", "kept"), list(permutations(("code", "math", "prose"), 2)))
def test_protection_ranks_what_keeps_it_first(measured, weighed, kept):
    """Every composite's excess is an allowance in its turn: the best of those that keep it wins."""
    study = open_study(measured)
    scores, identity = known_scores(study)
    base = scores.pop(Composite.single(identity.base))
    weights = {name: float(name == weighed) for name in identity.weights}
    with closing_engine(study) as engine:
        for allowance in sorted(by_name[kept].nll - base[kept].nll for by_name in scores.values())[::4]:
            constrained = replace(identity, weights=weights, protect={kept: allowance})
            winner = reweighted("tiny", Ledger(engine), constrained, {}).winner
            able = [
                by_name[weighed].nll for by_name in scores.values() if by_name[kept].nll - base[kept].nll <= allowance
            ]
            assert winner.violation == 0 and winner.objective[SEARCH] == min(able)


def test_what_is_not_known_on_every_corpus_is_no_candidate(tmp_path):
    """A study that has grown scores the new corpus on what it carries over, and not on all that it had."""
    open_study(worlds.study(tmp_path, search=SEARCHED)).compare(["grid"])
    grown = open_study(worlds.study(tmp_path, ("code", "math", "prose", "records"), search=SEARCHED | {"trials": 3}))
    grown.compare(["random"])
    scores, identity = known_scores(grown)
    whole = {
        composite: by_name
        for composite, by_name in scores.items()
        if len(by_name) == 4 and composite != Composite.single(identity.base)
    }
    assert 0 < len(whole) < len(scores) - 1
    winner = grown.reweighted({"code": 1}).winner
    assert winner.evaluations == len(whole)
    assert winner.objective[SEARCH] == min(by_name["code"].nll for by_name in whole.values())


def test_of_largest_regrets_the_weighted_ones_count(tmp_path):
    path = worlds.study(tmp_path, search=SEARCHED, objective={"worst": True})
    study = open_study(path)
    study.compare(["grid"])
    scores, identity = known_scores(study)
    own = {name: scores[Composite.single(content)][name] for name, content in identity.fine_tunes.items()}
    scores.pop(Composite.single(identity.base))
    result = study.reweighted({"code": 1, "math": 3})
    assert result.worst
    assert result.winner.objective[SEARCH] == min(
        Objective({"code": 1.0, "math": 1.0}, own)(each) for each in scores.values()
    )


def test_it_works_beside_a_driver(measured):
    study = open_study(measured)
    with closing_engine(study) as engine, holding(engine, "tiny"):
        assert study.reweighted({"code": 1}).winner.role == "best"


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"cod": 1}, r"--reweight.cod = 1: no such distribution or general corpus; did you mean 'code'\?"),
        ({"code": -1, "math": 2}, "--reweight.code = -1: a weight is a number of at least 0"),
        ({"code": float("nan")}, "--reweight.code = nan"),
        ({"code": float("inf")}, "--reweight.code = inf"),
        ({"code": 0}, "at least one weight must be above 0"),
        ({}, "at least one weight must be above 0"),
    ],
    ids=str,
)
def test_a_weighting_that_is_none_is_refused(measured, weights, said):
    with pytest.raises(InputError, match=said):
        open_study(measured).reweighted(weights)


def test_a_study_that_was_never_run_says_what_to_do_first(tmp_path):
    path = worlds.study(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="dem-opt run"):
        open_study(path).reweighted({"code": 1})
    assert sorted(tmp_path.rglob("*")) == before
