"""The tables that terminal and pages share."""

from dataclasses import replace
from math import exp

import pytest
from summaries import CASES, SPLITS, a_summary, a_trial, of_trials

from dem_opt.analysis.regret import compare
from dem_opt.dashboards import tables
from dem_opt.dashboards.words import objective_name
from dem_opt.evaluation.objective import objective_words
from dem_opt.simplex import Space
from dem_opt.types import Margin, ResultRow, Score, Summary

Ends = tuple[float, float]
HIGH, LOW = Score((20.0, 30.0), (10, 10)), Score((10.0, 20.0), (10, 10))
"""Two windows of 10 tokens: 2.5 and 1.5 nats a token."""

RESULTS = (
    ResultRow(
        label="base",
        role="base",
        algorithm="",
        coefficients=None,
        scores={"search": {"a": HIGH, "b": HIGH}},
        objective={"search": 2.5},
        evaluations=1,
        forward_tokens=950,
        seconds=0.25,
    ),
    ResultRow(
        label="best",
        role="best",
        algorithm="tpe",
        coefficients=Space(("a", "b")).centroid(),
        scores={"search": {"a": HIGH, "b": LOW}},
        objective={"search": 2.0},
        evaluations=2860,
        forward_tokens=2_288_000,
        seconds=12.0,
        forwards=1234.56,
    ),
)


def test_the_final_table_says_nll_mean_perplexity_and_cost() -> None:
    """The means are 2.5 and (2.5 + 1.5) / 2 = 2, e^2 = 7.389."""
    table = tables.final_table(
        Summary(study="s", weights={"a": 1.0, "b": 1.0}, results=RESULTS, margins=(), trials={}, facts={}), "search"
    )
    assert table.headers == ("composite", "a", "b", "mean", "perplexity", "evals", "FE", "seconds")
    assert table.rows[0] == ("base", "2.5000", "2.5000", "2.5000", f"{exp(2.5):.3f}", "1", "1.0", "0.2")
    assert table.rows[1] == ("best", "2.5000", "1.5000", "2.0000", "7.389", "2,860", "1,234.6", "12.0")
    assert table.lowest == {(0, 1), (1, 1), (1, 2), (1, 3), (1, 4)}
    unknown = tables.final_table(
        Summary(study="s", weights={"a": 1.0}, results=RESULTS, margins=(), trials={}, facts={}), "held_out"
    )
    assert unknown.rows[0][1:4] == ("-", "-", "-") and not unknown.lowest


def test_a_largest_regret_has_no_perplexity() -> None:
    table = tables.final_table(
        Summary(study="s", weights={"a": 1.0, "b": 1.0}, results=RESULTS, margins=(), trials={}, facts={}, worst=True),
        "search",
    )
    assert table.headers == ("composite", "a", "b", "largest regret", "evals", "FE", "seconds")
    assert table.rows[1] == ("best", "2.5000", "1.5000", "2.0000", "2,860", "1,234.6", "12.0")
    assert table.lowest == {(0, 1), (1, 1), (1, 2), (1, 3)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_final_table_has_every_result_and_marks_the_lowest_of_each_column(case: dict[str, object]) -> None:
    summary = a_summary(**case)
    for split in SPLITS:
        table = tables.final_table(summary, split)
        column = 1 + len(summary.weights)
        for row, result in zip(table.rows, summary.results, strict=True):
            nll = [f"{result.scores[split][name].nll:.4f}" for name in summary.weights]
            assert row[: column + 1] == (result.label, *nll, f"{result.objective[split]:.4f}")
            assert row[-3:] == ("1", "1.0", "0.3") and len(row) == len(table.headers)
        objectives = [result.objective[split] for result in summary.results]
        best = {(row, column) for row, value in enumerate(objectives) if value == min(objectives)}
        assert {cell for cell in table.lowest if cell[1] == column} == (best if len(objectives) > 1 else set())


def seconds(text: str) -> float:
    return float(text.removesuffix(" s").replace(",", ""))


def rounded(*values: float) -> object:
    """Equal to what is shown with one decimal."""
    return pytest.approx(list(values), abs=0.0501)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_trial_is_counted_once_with_its_cost(case: dict[str, object]) -> None:
    """Each scored trial took 0.1 s to merge, 0.2 s to score, and 0.05 s to propose; failed ones nothing."""
    summary = a_summary(**case)
    trials, usage, costs = tables.trial_table(summary), tables.usage_table(summary), tables.cost_table(summary)
    parts = {row[0]: row[1:] for row in costs.rows}
    assert {row[0] for row in trials.rows} == {row[0] for row in usage.rows} == set(summary.trials)
    for run, _, _, scored, partial, failed, forwards, measuring, proposing in trials.rows:
        records = summary.trials[run]
        known = [record for record in records if record.objective is not None]
        assert (int(partial), int(failed)) == (sum(record.is_partial for record in known), len(records) - len(known))
        assert int(scored) + int(partial) + int(failed) == len(records)
        assert forwards == f"{sum(record.forwards for record in records):,.1f}"
        assert [seconds(measuring), seconds(proposing)] == rounded(0.3 * len(known), 0.05 * len(known))
        if known:
            assert parts[run][:2] == (str(len(known)), forwards)
            assert [seconds(parts[run][2])] == rounded(0.35 * len(known))
    for run, count, merging, scoring, idle, proposing, utilization, _, batch in usage.rows:
        known = sum(record.objective is not None for record in summary.trials[run])
        assert (count, batch) == (str(known), "-")
        spent = [seconds(text) for text in (merging, scoring, idle, proposing)]
        assert spent == rounded(0.1 * known, 0.2 * known, 0.0, 0.05 * known)
        assert utilization == ("100.0%" if known > 1 else "-")


def test_a_grid_that_was_not_run_is_estimated_from_the_runs() -> None:
    """Three distributions in tenths: C(12, 2) = 66 points, at the 0.3 s that a forward-equivalent took."""
    summary = a_summary(("a", "b", "c"), runs=("tpe",), trials=3)
    baselines, run, final, whole, grid = tables.cost_table(summary).rows
    assert baselines == ("baselines", "1", "1.0", "0.3") and final == ("final table", "6", "24.0", "7.2")
    assert run == ("tpe", "3", "3.0", f"{3 * 0.3 + 3 * 0.05:.1f}") and grid[1:] == ("66", "66.0", "about 20")
    assert whole[1:3] == ("10", "28.0")


def test_distributions_have_coefficient_norm_and_what_they_are_worth() -> None:
    """Norms are the roots of the diagonal; objectives without a distribution minus the winner's."""
    summary = a_summary(("a", "b"))
    table = tables.vector_table(summary)
    for row, name, inner, without in zip(table.rows, "ab", summary.vectors.inner, summary.left_out, strict=True):
        weight = summary.winner.coefficients.weights[name]
        norm = inner["ab".index(name)] ** 0.5
        changes = [f"{without.objective[split] - summary.winner.objective[split]:+.4f}" for split in SPLITS]
        assert row == (name, f"{weight:.3f}", f"{norm:.4g}", *changes)
    bare = replace(summary, left_out=(), vectors=None)
    assert {row[2:] for row in tables.vector_table(bare).rows} == {("-", "-", "-")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_margins_name_every_rival_once(case: dict[str, object]) -> None:
    summary = a_summary(**case)
    interval = "+0.1000 [-0.1000, +0.3000]"
    rows = tables.margin_table(summary).rows
    assert rows == tuple((row.label, interval, interval, "not significant") for row in summary.results[:-1])


def test_what_violates_protection_says_by_how_much() -> None:
    summary = a_summary(("a", "b"))
    *others, winner = summary.results
    over = replace(summary, results=(*others, replace(winner, violation=0.0312)))
    for split in SPLITS:
        before, after = (tables.final_table(each, split).rows for each in (summary, over))
        assert after[-1] == (f"{winner.label} (violation 0.031)", *before[-1][1:]) and after[:-1] == before[:-1]


def test_general_corpora_have_columns() -> None:
    summary = a_summary(("a", "b"))
    general = replace(summary, weights={**summary.weights, "web": 0.0})
    assert tables.final_table(general, "search").headers[:4] == ("composite", "a", "b", "web\nx 0")


AVERAGES = {
    "equal": ((1, 1, 1), ("a", "b", "c", "mean"), "mean NLL"),
    "equal, but not 1": ((2, 2, 2), ("a", "b", "c", "mean"), "mean NLL"),
    "some": ((1, 1, 0), ("a", "b", "c\nx 0", "mean"), "mean NLL of a, b"),
    "one": ((0, 3, 0), ("a\nx 0", "b", "c\nx 0", "mean"), "mean NLL of b"),
    "weighted": ((4, 2, 1), ("a\nx 4", "b\nx 2", "c\nx 1", "weighted\nmean"), "weighted mean NLL (a 4, b 2, c 1)"),
    "weighted some": (
        (4, 0.5, 0),
        ("a\nx 4", "b\nx 0.5", "c\nx 0", "weighted\nmean"),
        "weighted mean NLL (a 4, b 0.5)",
    ),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_headings_say_what_is_averaged(case: str) -> None:
    weights, headers, words = AVERAGES[case]
    summary = replace(a_summary(tuple("abc")), weights=dict(zip("abc", map(float, weights), strict=True)))
    assert tables.final_table(summary, "search").headers[1:5] == headers
    assert objective_name(summary) == words


def test_many_names_are_counted() -> None:
    names = tuple("abcdefg")
    weights = dict.fromkeys(names, 1.0) | {"g": 0.0}
    assert objective_words(weights) == "mean NLL of 6 of 7 corpora"
    assert objective_words(weights, worst=True) == "largest regret of 6 of 7 corpora"
    assert objective_words(weights | {"a": 2.0, "g": 1.0}) == "weighted mean NLL"
    assert objective_words(weights, function="my:f") == "objective my:f"


def test_the_top_says_its_gap_and_what_is_not_known() -> None:
    """1.75 held out and 2.0 on the search split: a gap of -0.25; the second is not scored on the held-out split."""
    base, best = RESULTS
    first = replace(best, objective={"search": 2.0, "held_out": 1.75})
    table = tables.top_table(
        Summary(
            study="s",
            weights={},
            results=(),
            margins=(),
            trials={},
            facts={},
            top=(first, replace(base, violation=0.5)),
        )
    )
    assert table.headers == ("no.", "coefficients", "search", "held-out", "gap")
    assert table.rows == (
        ("1", "a 0.500, b 0.500", "2.0000", "1.7500", "-0.2500"),
        ("2", "base only (violation 0.500)", "2.5000", "-", "-"),
    )


@pytest.mark.parametrize(
    ("search", "held_out", "verdict"),
    [
        ((0.1, 0.3), (0.2, 0.4), "better"),
        ((-0.3, -0.1), (-0.4, -0.2), "worse"),
        ((-0.1, 0.1), (-0.1, 0.1), "not significant"),
        ((0.1, 0.3), (-0.3, -0.1), "search: better;\nheld-out: worse"),
        ((0.1, 0.3), (-0.3, 0.1), "search: better;\nheld-out:\nnot significant"),
    ],
)
def test_losses_are_said_as_plainly_as_wins(search: Ends, held_out: Ends, verdict: str) -> None:
    ends = {"search": search, "held_out": held_out}
    margins = tuple(
        Margin(rival="rival", split=split, mean=(low + high) / 2, low=low, high=high)
        for split, (low, high) in ends.items()
    )
    table = tables.margin_table(Summary(study="s", weights={}, results=(), margins=margins, trials={}, facts={}))
    assert [row[-1] for row in table.rows] == [verdict]
    assert table.rows[0][1] == f"{sum(search) / 2:+.4f} [{search[0]:+.4f}, {search[1]:+.4f}]"


def test_the_trials_say_what_came_of_them_and_why_a_search_ended() -> None:
    trials = {
        "tpe": [a_trial(0, 2.0, seconds=0.5), a_trial(1, 3.0, 0.25, error=0.1, seconds=1.0), a_trial(2, None, 0.0)],
        "tpe@1": [],
    }
    table = tables.trial_table(of_trials(trials, stopped={"tpe": "20 minutes", "tpe@1": ""}))
    assert table.rows == (
        ("tpe", "20 minutes", "nan", "1", "1", "1", "1.2", "0.0 s", "1.5 s"),
        ("tpe@1", "-", "-", "0", "0", "0", "0.0", "0.0 s", "0.0 s"),
    )


def test_a_comparison_tells_the_first_a_middle_and_the_last_mark() -> None:
    """40 trials each, marks 10, 20, 40: tpe has 2 at 10 and 1 at 20 in one run, 1 at once in the other."""
    slow = [a_trial(k, 3.0 - (k >= 5) - (k >= 15)) for k in range(40)]
    fast = [a_trial(k, 1.0, seconds=0.25) for k in range(40)]
    table = tables.comparison_table(
        compare(of_trials({"tpe": slow, "tpe@1": fast, "random": slow, "cmaes": [a_trial(0, None)]}))
    )
    assert table.headers == ("algorithm", "runs", "total FE", "at 10 FE", "at 20 FE", "at 40 FE", "proposing")
    assert table.rows == (
        (
            "tpe",
            "2",
            "80.0",
            "0.5000\n[0.2500, 0.7500]",
            "0.0000\n[0.0000, 0.0000]",
            "0.0000\n[0.0000, 0.0000]",
            "0.125 s",
        ),
        ("random", "1", "40.0", "1.0000", "0.0000", "0.0000", "0.000 s"),
        ("cmaes", "1", "1.0", "-", "-", "-", "0.000 s"),
    )
