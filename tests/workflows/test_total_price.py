"""The price of the sum in a study: its cost, what every answer shows of it, and studies that lack it."""

import json
from dataclasses import replace
from pathlib import Path

import in_process
import pytest
import worlds
import yaml
from recorded import RecordedProgress

from dem_opt.analysis.total_price import MOST, STEP, price_line
from dem_opt.cli.json_output import of_summary
from dem_opt.cli.main import main
from dem_opt.config import load
from dem_opt.errors import EvaluationError
from dem_opt.progress import NullProgress
from dem_opt.search.loop import Driver
from dem_opt.study import Study
from dem_opt.types import SEARCH, Summary
from dem_opt.workflows.final_table import PRICE
from dem_opt.workflows.finished import find_finished
from dem_opt.workflows.provenance import study_descriptions
from dem_opt.workflows.result import StudyResult

NAMES = ("code", "math", "prose")


def make(folder: Path, **sections) -> Path:
    search = {"algorithm": "simplex-gp", "trials": 7, "racing": False} | sections.pop("search", {})
    return worlds.study(folder, NAMES, search=search, **sections)


def cost_of(summary: Summary) -> float:
    return sum(cost.forwards for cost in summary.costs if cost.part == PRICE)


def along_the_ray(path: Path, summary: Summary, *totals: float) -> list[float]:
    """The objective of the winner scaled to other totals, as a study scores it whose totals are free."""
    study = yaml.safe_load(path.read_text()) | {"simplex": {"total": [0, 2]}, "name": "free"}
    free = path.parent / "free.yaml"
    free.write_text(yaml.safe_dump(study))
    opened, winner = in_process.open_study(free), summary.winner.coefficients
    scaled = ({name: total * weight for name, weight in winner.items()} for total in totals)
    return [opened.score(weights).objective[SEARCH] for weights in scaled]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run to its end."""
    path = make(tmp_path_factory.mktemp("priced"))
    in_process.open_study(path).run()
    return path


def test_the_price_is_told_before_and_counted_after(tmp_path):
    progress = RecordedProgress()
    path = make(tmp_path)
    summary = in_process.open_study(path, progress).run().summary
    (row,) = (row for row in summary.results if row.role == "sum")
    assert dict(row.coefficients) == dict.fromkeys(NAMES, 1.0)
    assert len([note for note in progress.notes if note.startswith(PRICE)]) == 2
    assert 2 <= cost_of(summary) <= MOST + 1 and summary.total_price is not None
    again = in_process.open_study(path).run().summary
    assert again.total_price == summary.total_price and again.costs == summary.costs


def test_the_slope_of_a_step_is_that_of_the_parabola_through_exact_losses(path):
    """At 0, 1 and 1.1:  a = (d_h - 0.01 d_0) / 0.11 ."""
    summary = Study.load(path).summary()
    price = summary.total_price
    base, winner, step = along_the_ray(path, summary, 0.0, 1.0, STEP)
    assert price.basis == "step"
    assert price.slope == pytest.approx((step - winner - 0.01 * (base - winner)) / 0.11, abs=1e-6)


def test_the_slope_of_a_gradient_is_the_finite_difference_of_the_exact_loss(tmp_path):
    """Central differences of float32 losses over 0.02: accurate to about 1e-4."""
    path = make(tmp_path, search={"gradients": True})
    summary = in_process.open_study(path).run().summary
    below, above = along_the_ray(path, summary, 0.99, 1.01)
    assert summary.total_price.basis == "gradient"
    assert summary.total_price.slope == pytest.approx((above - below) / 0.02, rel=0.02, abs=5e-4)


def test_every_answer_has_the_same_price(path, capsys):
    study = Study.load(path)
    summary = study.summary()
    price, line = summary.total_price, price_line(summary.total_price, summary.unit_words)
    assert main(["show", str(path)]) == 0
    assert line in " ".join(capsys.readouterr().out.split())
    assert main(["show", "--json", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)["total_price"]
    assert shown == json.loads(json.dumps(of_summary(summary)["total_price"])) and shown["slope"] == price.slope
    assert line in Path(study.report(path.parent / "page.html")).read_text()
    assert line in repr(StudyResult(summary)) and line in StudyResult(summary)._repr_html_()
    metrics = study_descriptions(summary, "", {})[summary.winner.run].metrics
    assert metrics["best.total_slope"] == price.slope
    assert [metrics[f"best.gain_of.{margin.rival}"] for margin in price.rivals] == [-each.mean for each in price.rivals]


def test_a_sum_that_breaks_a_constraint_has_no_gain_in_mlflow(path):
    summary = Study.load(path).summary()
    first, *others = summary.total_price.rivals
    price = replace(summary.total_price, rivals=(replace(first, violation=0.1), *others))
    metrics = study_descriptions(replace(summary, total_price=price), "", {})[summary.winner.run].metrics
    gains = {name.rpartition(".")[2] for name in metrics if name.startswith("best.gain_of.")}
    assert gains == {margin.rival for margin in others}


def test_what_cannot_be_scored_is_left_out_and_not_tried_again(tmp_path, monkeypatch):
    """The price fails, and the study doesn't; the next run is a finished one."""
    measure = Driver.measure

    def failing(driver, composites, splits, part):
        if part == PRICE:
            raise EvaluationError("the loss of window 0 is nan")
        measure(driver, composites, splits, part)

    path, progress = make(tmp_path), RecordedProgress()
    monkeypatch.setattr(Driver, "measure", failing)
    summary = in_process.open_study(path, progress).run().summary
    assert summary.total_price is None and cost_of(summary) == 0
    assert [row.role for row in summary.results].count("sum") == 0
    assert [warning for warning in progress.warnings if PRICE in warning]
    monkeypatch.undo()
    assert find_finished(load(path), ["simplex-gp"], NullProgress()) is not None
    full = in_process.open_study(path).complete_report().summary
    assert full.total_price is not None and all(len(row.objective) == 2 for row in full.results)


@pytest.mark.parametrize(
    ("total", "field"),
    [([3, 0], "simplex.total"), ([0, 0], "simplex.total"), ("free", "simplex.total"), ([0, 1, 2], "simplex.total")],
)
def test_a_wrong_range_is_one_line(path, total, field, capsys):
    study = yaml.safe_load(path.read_text()) | {"simplex": {"total": total}}
    wrong = path.parent / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(study))
    assert main(["run", str(wrong)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert field.split(".")[-1] in line
