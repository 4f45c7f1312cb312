"""Laws of data frames: they hold what the summary holds, under documented columns."""

import re
from pathlib import Path

import pandas as pd
import pytest
import worlds
from in_process import open_study

from dem_opt.dashboards.figures import FIGURES
from dem_opt.errors import InputError
from dem_opt.study import Study
from dem_opt.types import HELD_OUT, SEARCH, SPLITS

NAMES = ("code", "math", "prose")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with gradients that was run."""
    search = {"algorithm": "simplex-gp", "trials": 8, "gradients": True}
    made = open_study(
        worlds.study(tmp_path_factory.mktemp("frames"), NAMES, search=search, report={"leave_one_out": True})
    )
    made.run()
    return made


def documented(method: object) -> set[str]:
    """The columns that a docstring names, with NAME and SPLIT filled in."""
    doc = method.__doc__ or ""
    columns: set[str] = set()
    for line in re.findall(r"^\s*- (`[^:]*):", doc, flags=re.MULTILINE):
        for column in re.findall(r"`([^`]+)`", line):
            for split in SPLITS if "SPLIT" in column else ("",):
                for name in NAMES if "NAME" in column else ("",):
                    columns.add(column.replace("SPLIT", split).replace("NAME", name))
    return columns


@pytest.mark.parametrize("name", ["trials", "results", "gradients", "vectors"])
def test_every_column_is_documented_and_every_documented_column_is_there(study: Study, name: str) -> None:
    frame = getattr(study, name)()
    assert isinstance(frame, pd.DataFrame) and len(frame) > 0
    assert set(frame.columns) == documented(getattr(Study, name))


def test_trials_are_those_of_the_summary(study: Study) -> None:
    records, frame = study.summary().trials["simplex-gp"], study.trials()
    assert frame["number"].tolist() == [record.number for record in records]
    assert frame["objective"].tolist() == [record.objective for record in records]
    assert frame["w.code"].tolist() == [record.coefficients.weights["code"] for record in records]
    assert (frame[[f"w.{name}" for name in NAMES]].sum(axis=1) - 1).abs().max() < 1e-9
    assert frame["nll.math"].tolist() == [record.scores["math"].nll for record in records]
    assert set(frame["state"]) == {"complete"}


def test_the_last_best_row_is_the_winner(study: Study) -> None:
    summary, frame = study.summary(), study.results()
    table = frame.iloc[: len(summary.results)]
    winner = table.iloc[-1]
    assert winner["label"] == summary.winner.label and winner["role"] == "best"
    for split in (SEARCH, HELD_OUT):
        assert winner[f"{split}.objective"] == summary.winner.objective[split]
        assert pd.isna(winner[f"{split}.margin"])
        gaps = table[f"{split}.objective"].iloc[:-1] - winner[f"{split}.objective"]
        assert table[f"{split}.margin"].iloc[:-1].tolist() == pytest.approx(gaps.tolist(), nan_ok=True)
    assert frame["role"].iloc[0] == "base" and pd.isna(frame["w.code"].iloc[0])
    assert {"top", "without"} <= set(frame["role"])


def test_gradients_are_those_of_the_trials_that_measured_one(study: Study) -> None:
    records = [record for record in study.summary().trials["simplex-gp"] if record.gradient]
    frame = study.gradients()
    assert records and frame["number"].tolist() == [record.number for record in records]
    assert frame["gradient.prose"].tolist() == [record.gradient["prose"] for record in records]


def test_vectors_have_norms_and_a_symmetric_matrix_of_cosines(study: Study) -> None:
    frame = study.vectors().set_index("distribution")
    cosines = frame[[f"cosine.{name}" for name in NAMES]].to_numpy()
    assert frame.index.tolist() == list(NAMES) and (frame["norm"] > 0).all()
    assert (cosines == cosines.T).all() and cosines.diagonal() == pytest.approx(1.0)


def test_a_prediction_at_a_trial_is_near_its_objective(study: Study) -> None:
    summary = study.summary()
    best = summary.winner
    prediction = study.predict(best.coefficients.weights)
    objectives = [record.objective for record in summary.trials["simplex-gp"]]
    assert min(objectives) - 0.05 < prediction.mean < max(objectives) + 0.05
    assert abs(prediction.mean - best.objective[SEARCH]) < 3 * prediction.standard_deviation + 1e-3
    optimum = summary.surrogate
    again = study.predict(optimum.optimum.weights)
    assert (again.mean, again.standard_deviation) == pytest.approx((optimum.mean, optimum.deviation))


def test_a_prediction_outside_of_the_space_is_refused(study: Study) -> None:
    with pytest.raises(InputError) as refusal:
        study.predict({"code": 0.5})
    assert refusal.value.field is not None and refusal.value.field.startswith("coefficients")


def test_every_figure_of_the_registry_has_a_method(study: Study) -> None:
    for name, entry in FIGURES.items():
        drawn = getattr(study.plot, name.replace("-", "_"))()
        assert drawn.to_json() == entry.draw(study.summary()).to_json()


def test_the_report_is_one_page(study: Study, tmp_path: Path) -> None:
    path = study.report(tmp_path / "deep/report.html")
    assert path == tmp_path / "deep/report.html" and "best of simplex-gp" in path.read_text(encoding="utf-8")
