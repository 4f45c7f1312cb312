"""Laws of the console: progress as bars and lines, tables, answers for programs, questions."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from summaries import CASES, a_summary, a_trial

from dem_opt.cli import console_progress
from dem_opt.cli.console import WIDTH, Terminal
from dem_opt.cli.console_progress import ConsoleProgress
from dem_opt.cli.reports import print_results
from dem_opt.dashboards import tables
from dem_opt.progress import current_progress, reporting
from dem_opt.simplex import Space


def watch(records, planned):
    with Terminal().progress() as progress:
        for done, record in enumerate(records, start=1):
            progress.trial_finished(record, done, planned)


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
        "s: 1 of 100 trials; best 3.0000 nats per token at a 0.50, b 0.50",
        "s: 3 of 100 trials; best 2.0000 nats per token at a 0.50, b 0.50; 1 stopped early",
        "s: 10 of 100 trials; best 2.0000 nats per token at a 0.50, b 0.50; 6 stopped early",
    ]


def test_before_the_first_whole_trial_there_is_no_best(capsys):
    watch([a_trial(0, None), a_trial(1, 1.0, error=0.1), a_trial(2, 1.5, violation=0.1)], planned=3)
    assert capsys.readouterr().out.splitlines() == [
        "s: 1 of 3 trials; no whole trial yet",
        "s: trial 0 failed: nan",
        "s: 2 of 3 trials; no whole trial yet; 1 stopped early",
        "s: 3 of 3 trials; best 1.5000 nats per token at a 0.50, b 0.50, protect violated; 1 stopped early",
    ]


def test_the_best_keeps_what_is_protected(capsys):
    watch([a_trial(0, 3.0), a_trial(1, 1.0, violation=0.1)], planned=100)
    assert capsys.readouterr().out.splitlines() == ["s: 1 of 100 trials; best 3.0000 nats per token at a 0.50, b 0.50"]


FIVE = Space(("code", "german", "math", "perl", "prose"))


def test_the_best_is_shown_with_all_its_coefficients(capsys):
    watch([replace(a_trial(0, 3.0), coefficients=FIVE.centroid())], planned=10)
    output = capsys.readouterr().out
    assert all(f"{name} 0.20" in output for name in FIVE.names) and "..." not in output


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_search_that_goes_on_remembers_its_best(is_terminal):
    """Three trials from earlier, of which the second was the best; the fourth, of this command, is worse."""
    console = Console(file=StringIO(), force_terminal=is_terminal, width=100, color_system=None)
    earlier = [a_trial(0, 3.0), a_trial(1, 2.0), a_trial(2, 1.0, forwards=0.25, error=0.1)]
    with ConsoleProgress(console) as progress:
        progress.search_continued(earlier, 10)
        assert is_terminal or "3 of 10 trials from earlier; best 2.0000" in console.file.getvalue()
        progress.trial_finished(a_trial(3, 2.5), 4, 10)
    output = " ".join(console.file.getvalue().split())
    assert "best 2.0000 nats per token" in output and "1 stopped early" in output
    assert "best 2.5" not in output and "best 3" not in output


def test_a_line_for_every_tenth_of_a_training(capsys):
    with Terminal().progress() as progress, progress.phase("code", 50, "steps") as phase:
        for step in range(1, 51):
            phase.advance(detail=f"training loss {4 - step / 50:.3f} nats per token")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "code: 50 of 50 steps; training loss 3.000 nats per token"


def test_long_work_is_told_in_tenths_of_bytes_or_of_what_it_counts(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console_progress, "monotonic", lambda: clock[0])
    with Terminal().progress():
        with current_progress().phase("hashing base", 26 * 10**9, "bytes") as phase:
            for _ in range(20):
                clock[0] += 1
                phase.advance(13 * 10**8)
        with current_progress().phase("comparing", 4, "tensors") as phase:
            for _ in range(4):
                phase.advance()
        with current_progress().phase("merging", 4, "tensors") as phase:
            clock[0] += 10
            phase.advance()
    with current_progress().phase("hashing unwatched", 2, "bytes") as phase:
        clock[0] += 10
        phase.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hashing base: 7.8 GB of 26.0 GB, about 14 s left", "nothing is told within five seconds"
    assert lines[-2:] == ["hashing base: 26.0 GB of 26.0 GB", "merging: 1 of 4 tensors, about 30 s left"]
    assert len(lines) == 9


@pytest.mark.parametrize("before", [0, 40])
def test_the_time_left_is_that_of_the_latest_steps_by_this_run(capsys, monkeypatch, before):
    """Steps of 100 s, from the tenth on of 10 s, some of them done before by the run that this one continues."""
    clock = [0.0]
    monkeypatch.setattr(console_progress, "monotonic", lambda: clock[0])
    with Terminal().progress(), current_progress().phase("code", 100, "steps") as phase:
        if before:
            phase.advance(before, "continued")
        for step in range(before, 80):
            clock[0] += 100 if step - before < 9 else 10
            phase.advance(1, "loss")
    lines = dict(line.split(" of 100 steps") for line in capsys.readouterr().out.splitlines())
    assert lines["code: 80"] == ", about 3 min left; loss"
    assert lines[f"code: {before + 10}"].endswith("left; loss")


def test_bars_of_long_work_show_and_go_when_it_is_done(monkeypatch):
    console = Console(file=StringIO(), force_terminal=True, width=100)
    with ConsoleProgress(console) as progress, reporting(progress):
        with current_progress().phase("loading [base]", 26 * 10**9, "bytes") as phase:
            phase.advance(13 * 10**9)
            with current_progress().phase("comparing"):
                pass
        console.print("ended")
        phase.advance(1)
    under_way, ended = console.file.getvalue().split("ended")
    assert "loading [base]" in under_way and "13.0 GB of 26.0 GB" in under_way
    assert "loading [base]" not in ended


@pytest.mark.parametrize("width", [60, 80, 110])
def test_on_a_terminal_nothing_of_the_progress_is_cut(monkeypatch, width):
    console = Console(file=StringIO(), force_terminal=True, width=width, color_system=None)
    clock = iter([2.0 * second for second in range(100)])
    monkeypatch.setattr(console_progress, "monotonic", lambda: next(clock))
    with ConsoleProgress(console) as progress:
        for number in range(9):
            progress.time_left(70.0)
            progress.trial_finished(a_trial(number, 3.0), number + 1, 26)
    last = " ".join(console.file.getvalue().rpartition("9/26")[2].split())
    assert (
        "best 3.0000 nats per token at a 0.50, b 0.50; 30 trials a minute; up to 70 s left, final table included"
        in last
    )
    assert "…" not in console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize(
    "case", ["one", "two", "three", "four", "eight", "twelve", "worst", "failures only", "base wins", "no trials"]
)
def test_tables_fit_the_width_and_no_number_breaks_or_is_lost_without_a_word(capsys, monkeypatch, case, width):
    monkeypatch.setenv("COLUMNS", str(width))
    summary = a_summary(**CASES[case])
    print_results(summary, Terminal())
    output = capsys.readouterr().out
    prose = ("The winner: ", "The whole study", "Left out", "NLL in", "Top five", "Rival minus")
    tables_alone = [line.rstrip() for line in output.splitlines() if not line.startswith(prose)]
    assert max(map(len, tables_alone)) <= width
    for split in tables.SPLIT_NAMES:
        table = tables.final_table(summary, split)
        part = output.partition(f"NLL in nats per token, {tables.SPLIT_NAMES[split]}")[2].partition("\n\n")[0]
        missing = part.partition("Left out, for want of room: ")[2]
        for column, header in enumerate(table.headers[1:], start=1):
            is_left_out = " ".join(header.split()) in missing.partition(". --json")[0].split(", ")
            assert is_left_out or all(f" {row[column]} " in part for row in table.rows), header
        assert column_of_objective(table) not in missing.split(", ")
    assert all(row[3].splitlines()[-1] in output for row in tables.margin_table(summary).rows)


def column_of_objective(table):
    return table.headers[table.groups[0][0]]


def test_a_hundred_columns_have_every_column_of_four_distributions(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_results(a_summary(**CASES["four"]), Terminal())
    assert "Left out" not in capsys.readouterr().out
    assert WIDTH == 100


@pytest.mark.parametrize(("width", "shown"), [(20, "ab"), (30, "abc"), (40, "abcd")])
def test_columns_that_do_not_fit_are_named(capsys, monkeypatch, width, shown):
    """Words of 3 characters, then numbers of 8: 1 + 5 + 10 for each number."""
    monkeypatch.setenv("COLUMNS", str(width))
    Terminal().table("title", ("w", *"bcd"), [("one", *["12345678"] * 3)], groups=((1,), (2,), (3,)))
    output = capsys.readouterr().out
    assert output.count("12345678") == len(shown) - 1
    left_out = [name for name in "bcd" if name not in shown]
    assert f"{', '.join(left_out)}." in output if left_out else "Left out" not in output


def test_answers_for_programs_are_strict_json(capsys):
    Terminal().json({"found": [1.5, None]})
    assert json.loads(capsys.readouterr().out) == {"found": [1.5, None]}
    with pytest.raises(ValueError):
        Terminal().json(float("inf"))


def test_the_pace_is_that_of_the_latest_trials(capsys, monkeypatch):
    """A trial each 2 s, from the 20th on each 6 s: 30 a minute, then 10."""
    clock = iter([2.0 * done for done in range(20)] + [38 + 6.0 * later for later in range(1, 41)])
    monkeypatch.setattr(console_progress, "monotonic", lambda: next(clock))
    watch([a_trial(number, 3.0 + number) for number in range(60)], planned=100)
    lines = {line.split(" of ")[0].split()[-1]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["20"].endswith("30 trials a minute")
    assert lines["60"].endswith("10 trials a minute")


def test_quiet_says_nothing_but_answers(capsys):
    terminal = Terminal(quiet=True)
    with terminal.progress() as progress:
        progress.trial_finished(a_trial(0, 3.0), 1, 2)
        progress.trial_finished(a_trial(1, None), 2, 2)
    terminal.line("words")
    terminal.table("title", ("a", "b"), [("1", "2")])
    terminal.json({"answer": 1})
    terminal.error("a mistake")
    output = capsys.readouterr()
    assert json.loads(output.out) == {"answer": 1} and output.err == "a mistake\n"


def test_work_without_a_total_is_a_line_where_there_is_no_terminal(capsys):
    with Terminal().progress() as progress:
        with progress.phase("loading 5 checkpoints"):
            pass
        progress.note("loaded")
    assert capsys.readouterr().out == "loading 5 checkpoints ...\nloaded\n"


def test_warnings_are_marked_wherever_they_come_from(capsys):
    with Terminal().progress() as progress:
        progress.warning("[base] is odd")
    assert capsys.readouterr().out == "warning: [base] is odd\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_break_between_words_on_a_terminal_and_nowhere_in_a_file(is_terminal):
    console = Console(file=StringIO(), force_terminal=is_terminal, width=40, color_system=None)
    ConsoleProgress(console).note("word " * 20)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert {word for line in lines for word in line} == {"word"} and (len(lines) > 1) == is_terminal


def test_details_of_several_bars_have_their_names():
    console = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    with (
        ConsoleProgress(console) as progress,
        progress.phase("[code]", 9, "steps") as code,
        progress.phase("math", 9, "steps") as math,
    ):
        code.advance(detail="loss 2")
        math.advance(detail="loss 3")
        with progress.phase("drawn anew"):
            pass
    assert "[code]: loss 2" in console.file.getvalue() and "math: loss 3" in console.file.getvalue()
