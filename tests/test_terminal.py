"""What people see while they wait: the best of whole trials, and how many were stopped."""

import json

import pytest
from summaries import CASES, a_summary, a_trial

from dashboards import tables
from dem_opt import terminal
from dem_opt.cli import _print_tables


def watch(records, planned):
    with terminal.Progressing() as watching:
        for done, record in enumerate(records, start=1):
            watching.trial_ended(record, done, planned)


def test_a_line_for_every_new_best_and_every_tenth_of_the_way(capsys):
    """The second is an estimate below the best, the third a new best, the fourth a tie, the fifth worse."""
    watch(
        [
            a_trial(0, 3.0),
            a_trial(1, 1.0, forwards=0.25, error=0.1),
            a_trial(2, 2.0),
            a_trial(3, 2.0),
            a_trial(4, 2.5),
            *[a_trial(number, 9.0, forwards=0.25, error=0.1) for number in range(5, 15)],
        ],
        planned=100,
    )
    assert capsys.readouterr().out.splitlines() == [
        "s: 1 of 100 trials; best 3.0000 nats per token",
        "s: 3 of 100 trials; best 2.0000 nats per token; 1 stopped early",
        "s: 10 of 100 trials; best 2.0000 nats per token; 6 stopped early",
    ]


def test_before_the_first_whole_trial_there_is_no_best(capsys):
    watch([a_trial(0, None), a_trial(1, 1.0, error=0.1), a_trial(2, 1.5, violation=0.1)], planned=3)
    assert capsys.readouterr().out.splitlines() == [
        "s: 1 of 3 trials; no whole trial yet",
        "s: trial 0 failed: nan",
        "s: 2 of 3 trials; no whole trial yet; 1 stopped early",
        "s: 3 of 3 trials; best 1.5000 nats per token, protect violated; 1 stopped early",
    ]


def test_the_best_keeps_what_is_protected(capsys):
    watch([a_trial(0, 3.0), a_trial(1, 1.0, violation=0.1)], planned=100)
    assert capsys.readouterr().out.splitlines() == ["s: 1 of 100 trials; best 3.0000 nats per token"]


def test_a_line_for_every_tenth_of_a_training(capsys):
    with terminal.Progressing() as watching:
        for step in range(1, 51):
            watching.training("code", step, 50, 4 - step / 50)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 10
    assert told[-1] == "code: 50 of 50 steps; training loss 3.000 nats per token"


@pytest.mark.parametrize("case", ["one", "two", "three", "four", "worst", "failures only", "base wins", "no trials"])
def test_tables_fit_a_hundred_columns_and_no_number_breaks(capsys, case):
    summary = a_summary(**CASES[case])
    _print_tables(summary)
    told = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in told.splitlines()) <= terminal.WIDTH
    for split in tables.SPLITS:
        for row in tables.final_table(summary, split).rows:
            assert all(f" {cell} " in told for cell in row[1:])
    assert all(cell in told for row in tables.margin_table(summary).rows for cell in row[:3])


def test_answers_for_programs_are_strict_json(capsys):
    terminal.say_json({"found": [1.5, None]})
    assert json.loads(capsys.readouterr().out) == {"found": [1.5, None]}
    with pytest.raises(ValueError):
        terminal.say_json(float("inf"))
