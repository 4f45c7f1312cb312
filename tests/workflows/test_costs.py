"""Laws of what a study costs: every window that goes through a model is counted once, whatever interrupts it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import in_process
import pytest
import worlds
import yaml
from recorded import RecordedProgress

from dem_opt.cli.main import main
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.planning.inputs import load_inputs
from dem_opt.storage.costs import EARLIER
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.types import GRADIENT_FORWARDS, HELD_OUT, SPLITS, Summary, TrialRecord

NAMES = ("code", "math", "prose")
WINDOWS, HELD_OUT_WINDOWS = 16, 4
HELD_OUT_FORWARDS = HELD_OUT_WINDOWS / WINDOWS
"""Forward-equivalents of a composite on the held-out split."""


def make(folder: Path, **sections) -> Path:
    search = {"algorithm": "simplex-gp", "trials": 9} | sections.pop("search", {})
    evaluation = {"window": 32, "windows": WINDOWS, "held_out": HELD_OUT_WINDOWS}
    return worlds.study(folder, NAMES, search=search, evaluation=evaluation, **sections)


def run(path: Path, progress: RecordedProgress | None = None, algorithms=("simplex-gp",)) -> Summary:
    return in_process.open_study(path, progress).compare(algorithms).summary


def parts(summary: Summary) -> dict[str, float]:
    """Forward-equivalents by part, without the check of vertices, which depends on the cache."""
    return {cost.part: cost.forwards for cost in summary.costs if cost.part != "forward check"}


def measured(path: Path) -> float:
    """Forward-equivalents of all windows in the ledger."""
    with closing(sqlite3.connect(load(path).storage.removeprefix("sqlite:///"))) as database:
        (windows,) = database.execute("SELECT sum(windows) FROM dem_score").fetchone()
        (gradients,) = database.execute("SELECT count(*) FROM dem_gradient").fetchone()
        # A composite that has the gradient of all windows has it by part too.
        known = "composite IN (SELECT composite FROM dem_gradient)"
        (parts,) = database.execute(f"SELECT total(stop - start) FROM dem_part_gradient WHERE NOT {known}").fetchone()
    passes = windows + (GRADIENT_FORWARDS - 1) * gradients * WINDOWS + GRADIENT_FORWARDS * parts
    return passes / (len(NAMES) * WINDOWS)


@pytest.mark.parametrize(
    ("search", "algorithms"),
    [
        ({}, ("simplex-gp",)),
        ({"racing": False}, ("simplex-gp",)),
        ({"gradients": True}, ("simplex-gp",)),
        ({"gradients": True, "racing": False}, ("simplex-gp",)),
        ({"divisions": 4}, ("random", "grid")),
    ],
)
def test_what_is_in_the_ledger_was_paid_once(tmp_path, search, algorithms):
    path = make(tmp_path, search=search, report={"top": 5, "leave_one_out": True})
    summary = run(path, algorithms=algorithms)
    spent = parts(summary)
    assert sum(spent.values()) == pytest.approx(measured(path))
    for name, records in summary.trials.items():
        # A trial whose scores were known stands for its forward-equivalents and has cost none.
        assert spent[name] == pytest.approx(sum(record.forwards for record in records if record.measured))
    assert spent["baselines"] == 1.0
    assert run(path, algorithms=algorithms).costs == summary.costs, "a second run costs nothing"


@pytest.mark.parametrize(
    ("report", "rows"), [({}, 0), ({"top": 3}, 2), ({"leave_one_out": True}, 3), ({"top": 1, "leave_one_out": True}, 3)]
)
def test_the_final_table_is_what_the_report_asks_for(tmp_path, report, rows):
    """Base, three single fine-tunes, uniform average and winner; the first of the best is the winner.

    Bounds keep the winner inside, so that it without a distribution is new, and single fine-tunes out of the space, so
    that they are scored on the search split for the table.
    """
    progress = RecordedProgress()
    bounds = {name: [0.1, 1.0] for name in NAMES}
    path = make(tmp_path, search={"racing": False}, report=report, simplex={"bounds": bounds})
    summary = run(path, progress)
    left_out = 3 if report.get("leave_one_out") else 0
    cost = parts(summary)["final table"]
    assert cost == pytest.approx((6 + rows) * HELD_OUT_FORWARDS + 3 + left_out)
    assert len([note for note in progress.notes if f"{cost:.1f} forward-equivalents" in note]) == 2, "before and after"
    assert all(set(SPLITS) <= row.objective.keys() for row in summary.results if row.role != "sum")
    (uniform,) = (row.coefficients for row in summary.results if row.role == "uniform")
    listed = [HELD_OUT in row.objective for row in summary.top if row.coefficients != uniform]
    assert sum(listed) == max(report.get("top", 0), 1)
    assert [row.label for row in summary.left_out] == (list(NAMES) if left_out else [])
    assert progress.left and all(seconds >= 0 for seconds in progress.left)


def test_all_rows_of_a_report_are_measured_when_they_are_asked_for_later(tmp_path):
    """At the cost that they have in a study which asks for them from the start; a second time costs nothing."""
    (tmp_path / "whole").mkdir()
    bounds = {"bounds": {name: [0.1, 1.0] for name in NAMES}}
    whole = run(make(tmp_path / "whole", simplex=bounds, report={"top": 5, "leave_one_out": True}))
    path = make(tmp_path / "later", simplex=bounds)
    study = in_process.open_study(path)
    with pytest.raises(InputError):
        study.complete_report()
    short = study.run().summary
    assert not short.left_out and short.forwards < whole.forwards
    text = path.read_text()
    path.write_text(text.replace("window: 32", "window: 16"))
    with pytest.raises(InputError):
        in_process.open_study(path).complete_report()
    path.write_text(text)
    for _ in range(2):
        full = study.complete_report().summary
        assert parts(full) == pytest.approx(parts(whole))
        assert [row.objective for row in (*full.top, *full.left_out)] == [
            row.objective for row in (*whole.top, *whole.left_out)
        ]


class Interrupted(RecordedProgress):
    """Ends the process's work, as Ctrl-C does, after a number of trials."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 7])
def test_an_interrupted_study_costs_what_it_costs_in_one_piece(tmp_path, after):
    (tmp_path / "whole").mkdir()
    whole = run(make(tmp_path / "whole"))
    path = make(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run(path, Interrupted(after))
    assert parts(run(path)) == pytest.approx(parts(whole))


def test_an_export_is_proved_at_the_cost_of_a_pass_over_both_splits(tmp_path):
    path = make(tmp_path, search={"algorithm": "random", "trials": 2})
    study = in_process.open_study(path)
    study.run()
    study.export(tmp_path / "out")
    assert parts(study.summary())["export"] == 1 + HELD_OUT_FORWARDS


def test_every_answer_has_the_total(tmp_path, capsys, monkeypatch):
    path = make(tmp_path, search={"algorithm": "random", "trials": 2})
    summary = run(path, algorithms=["random"])
    total = sum(cost.forwards for cost in summary.costs)
    assert main(["show", "--json", str(path)]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["forward_equivalents"] == total == sum(part["forward_equivalents"] for part in cost["parts"])
    assert main(["show", str(path)]) == 0
    assert f"{total:.1f} forward-equivalents" in " ".join(capsys.readouterr().out.split())
    assert f"{total:.1f} forward-equivalents" in Path(Study.load(path).report(tmp_path / "page.html")).read_text()


def test_a_database_of_an_earlier_release_gets_its_costs_from_its_scores(tmp_path):
    """Once, however often it is opened; a new evaluation is added to them."""
    path = make(tmp_path, search={"gradients": True, "racing": False, "trials": 6})
    summary = run(path)
    config = load(path)
    with closing(sqlite3.connect(config.storage.removeprefix("sqlite:///"))) as database, database:
        database.execute("DROP TABLE dem_cost")
        database.execute("DELETE FROM dem_schema WHERE version > 5")
        database.execute("INSERT OR IGNORE INTO dem_schema VALUES (5)")
    for _ in range(2):
        (cost,) = Study.load(path).summary().costs
        assert cost.part == EARLIER and cost.forwards == pytest.approx(measured(path))
        assert cost.forwards == pytest.approx(sum(parts(summary).values()))
    in_process.open_study(path).score({"code": 0.7, "math": 0.3})
    assert parts(Study.load(path).summary()) == pytest.approx({EARLIER: cost.forwards, "score": 1 + HELD_OUT_FORWARDS})


def test_a_reset_study_begins_with_no_cost(tmp_path):
    path = make(tmp_path, search={"algorithm": "random", "trials": 2})
    run(path, algorithms=["random"])
    assert main(["reset", "--yes", "--quiet", str(path)]) == 0
    engine = connect(load(path).storage)
    assert Ledger(engine).costs("tiny", load_inputs(load(path), path).identity()) == ()


@pytest.mark.parametrize(
    ("report", "field"),
    [
        ({"top": 6}, "report.top"),
        ({"top": -1}, "report.top"),
        ({"top": 2.5}, "report.top"),
        ({"leave_one_out": "yes"}, "report.leave_one_out"),
        ({"full": True}, "report.full"),
    ],
)
def test_a_wrong_report_is_one_line(tmp_path, report, field):
    path = make(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"report": report}))
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.field == field and "\n" not in str(caught.value)
