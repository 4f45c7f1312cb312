"""Regret against cost: known answers, a grid against all its orders, and what partial trials may not do."""

import json
import random
from itertools import pairwise, permutations

import numpy as np
import pytest
from summaries import CASES, a_summary, a_trial, of_trials

from dem_opt.analysis.order_statistics import expected_best
from dem_opt.analysis.regret import Regret, algorithm_of, compare
from dem_opt.cli import json_output
from dem_opt.cli.console import json_text


def row_of(summary, algorithm):
    return next(row for row in compare(summary).rows if row.algorithm == algorithm)


def whole(*objectives):
    return [a_trial(number, objective) for number, objective in enumerate(objectives)]


def test_median_and_quartiles_over_runs_at_every_cost():
    """Best of the three runs after 1, 2, 3 passes: 5 5 2, 7 3 3, 9 9 4; the lowest is 2.

    After 1: regrets 3, 5, 7, median 5, quartiles 4 and 6.  After 2: 3, 1, 7, median 3, quartiles 2 and 5.
    After 3: 0, 1, 2, median 1, quartiles 0.5 and 1.5.
    """
    row = row_of(
        of_trials({"tpe": whole(5.0, 6.0, 2.0), "tpe@1": whole(7.0, 3.0, 8.0), "tpe@2": whole(9.0, 9.5, 4.0)}), "tpe"
    )
    assert row.curve == (Regret(1.0, 5.0, 4.0, 6.0), Regret(2.0, 3.0, 2.0, 5.0), Regret(3.0, 1.0, 0.5, 1.5))
    assert [run.name for run in row.runs] == ["tpe", "tpe@1", "tpe@2"] and row.forwards == 9.0


def test_trials_that_were_stopped_cost_their_windows_and_are_never_the_best():
    """Passes 1, 1.25, 2.25: the estimate of 1.0 wins nothing, here or as what regrets are counted from."""
    trials = [a_trial(0, 3.0), a_trial(1, 1.0, forwards=0.25, error=0.1), a_trial(2, 2.0)]
    comparison = compare(of_trials({"random": trials}))
    assert comparison.best == 2.0
    assert comparison.rows[0].curve == (Regret(1.0, 1.0), Regret(1.25, 1.0), Regret(2.25, 0.0))
    assert comparison.rows[0].runs[0].partial == 1


def test_a_gradient_costs_three_passes():
    row = row_of(of_trials({"gradient": [a_trial(0, 3.0, forwards=3.0), a_trial(1, 2.0, forwards=3.0)]}), "gradient")
    assert [regret.forwards for regret in row.curve] == [3.0, 6.0]


def test_what_violates_protection_is_penalized():
    """1.0 with a violation of 0.2 counts 1 + 10 x 0.2 = 3; 2.5 without any is better."""
    comparison = compare(of_trials({"tpe": [a_trial(0, 1.0, violation=0.2), a_trial(1, 2.5)]}))
    assert comparison.best == 2.5
    assert [regret.median for regret in comparison.rows[0].curve] == pytest.approx([0.5, 0.0])


def test_there_is_no_regret_before_every_run_has_a_whole_trial():
    """The second run fails, then is stopped, then is whole after 1.5 passes more than nothing."""
    late = [a_trial(0, None, forwards=0.0), a_trial(1, 1.0, forwards=0.5, error=0.1), a_trial(2, 4.0)]
    comparison = compare(of_trials({"tpe": whole(3.0), "tpe@1": late, "cmaes": late[:2], "random": []}))
    assert comparison.rows[0].curve == (Regret(1.5, 0.5, 0.25, 0.75),)
    for row in comparison.rows[1:]:
        assert row.curve == () and set(row.regrets) == {None}
    text = json_text(json_output.of_comparison(comparison))
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["rows"][1]["regrets"] == [None] * len(comparison.marks)


def test_a_search_that_ended_keeps_what_it_had():
    """The first run ends after 1 pass with 2; after 3 the runs have 2 and 1, regrets 1 and 0."""
    row = row_of(of_trials({"tpe": whole(2.0), "tpe@1": whole(4.0, 3.0, 1.0)}), "tpe")
    assert row.curve[-1] == Regret(3.0, 0.5, 0.25, 0.75)


@pytest.mark.parametrize(
    ("spent", "marks"),
    [
        ({"tpe": 40}, (10.0, 20.0, 40.0)),
        ({"tpe": 40, "tpe@1": 100}, (10.0, 20.0, 40.0, 80.0, 100.0)),
        ({"tpe": 7}, (7.0,)),
        ({"tpe": 11}, (11.0,)),
        ({"tpe": 30, "grid": 286}, (10.0, 20.0, 30.0)),
        ({"grid": 36}, (10.0, 20.0, 36.0)),
        ({"tpe": 0}, ()),
    ],
)
def test_marks_double_up_to_what_a_search_spent(spent, marks):
    trials = {run: whole(*np.linspace(3.0, 2.0, count)) for run, count in spent.items()}
    comparison = compare(of_trials(trials))
    assert comparison.marks == marks
    assert all(len(row.regrets) == len(marks) for row in comparison.rows)


def test_parts_of_a_pass_end_on_a_whole_mark():
    """70 sevenths of a pass sum to 10.000000000000002 in floats, and are 10 passes."""
    sevenths = [a_trial(0, 2.0, forwards=1 / 7)] + [a_trial(k, 9.0, forwards=1 / 7, error=0.1) for k in range(1, 70)]
    last = [a_trial(0, 3.0, forwards=1 / 7), *sevenths[1:-1], a_trial(69, 2.5, forwards=1 / 7)]
    comparison = compare(of_trials({"tpe": sevenths, "random": last}))
    assert comparison.marks == (10.0,) and comparison.rows[1].forwards > 10.0
    assert [row.regrets[0].median for row in comparison.rows] == [0.0, 0.5]


def test_the_grids_curve_is_the_mean_over_all_orders():
    values = [2.0, 1.5, 3.0, 1.0, 2.5, 1.5]
    orders = np.minimum.accumulate(np.array(list(permutations(values))), axis=1)
    assert expected_best(sorted(values), np.arange(1, 7)) == pytest.approx(orders.mean(axis=0), abs=1e-12)
    for seed in range(3):
        random.Random(seed).shuffle(values)
        row = row_of(of_trials({"grid": [*whole(*values), a_trial(6, None, forwards=0.0)]}), "grid")
        assert row.is_expected and [regret.forwards for regret in row.curve] == list(range(1, 7))
        assert [regret.median for regret in row.curve] == pytest.approx(orders.mean(axis=0) - 1.0, abs=1e-12)
        assert {(regret.low, regret.high) for regret in row.curve} == {(None, None)}


def test_a_large_grid_is_told_at_its_first_costs_and_its_last():
    values = np.random.default_rng(0).permutation(5000).astype(float)
    (run,) = row_of(of_trials({"grid": whole(*values)}), "grid").runs
    assert run.spent_S[:500] == tuple(range(1, 501)) and run.spent_S[-1] == 5000 and len(run.spent_S) <= 1000
    # The mean of the least of k numbers drawn from 0 .. n - 1 is (n + 1) / (k + 1) - 1.
    assert run.best_S == pytest.approx([5001 / (k + 1) - 1 for k in run.spent_S], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regrets_fall_from_run_to_end_and_someone_has_none(case):
    summary = a_summary(**case)
    comparison = compare(summary)
    assert {algorithm_of(run) for run in summary.trials} == {row.algorithm for row in comparison.rows}
    for row in comparison.rows:
        medians = [regret.median for regret in row.curve]
        assert all(later <= earlier for earlier, later in pairwise(medians))
        assert all(regret.low is None or 0 <= regret.low <= regret.median <= regret.high for regret in row.curve)
        known = [record for run in row.runs for record in summary.trials[run.name]]
        assert row.forwards == pytest.approx(sum(record.forwards for record in known))
    ends = [run.best_S[-1] for row in comparison.rows for run in row.runs if run.best_S]
    assert (min(ends) if ends else None) == comparison.best
    assert json.loads(json_text(json_output.of_comparison(comparison)))["study"] == summary.study


def test_proposals_are_timed_apart():
    trials = [a_trial(number, 2.0, seconds=seconds) for number, seconds in enumerate((0.0, 1.0, 5.0))]
    row = row_of(of_trials({"tpe": trials, "tpe@1": trials[:1]}), "tpe")
    assert row.ask == 0.5 and [run.ask for run in row.runs] == [1.0, 0.0] and row.runs[0].asking == 6.0
