"""Laws of configurations in the ledger: another config.json is another model, and no score is lost."""

import json
from pathlib import Path

import pytest
import worlds
from in_process import open_study
from recorded import RecordedProgress
from sqlalchemy import create_engine, text

from dem_opt.config import load
from dem_opt.errors import InputError


def configure(folder: Path, **fields) -> None:
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def configure_all(study: Path, **fields) -> None:
    for folder in (study.parent / "models").iterdir():
        configure(folder, **fields)


def rows(path: Path, query: str) -> list[tuple]:
    engine = create_engine(load(path).storage)
    with engine.connect() as connection:
        result = [tuple(row) for row in connection.execute(text(query))]
    engine.dispose()
    return result


SCORES = "SELECT composite, corpus, scoring, created FROM dem_score"
FLAT = {"rope_theta": 10.0, "rope_type": "default"}
CHANGES = [{"rope_parameters": FLAT}, {"hidden_act": "relu"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_configuration_is_scored_again_and_the_first_holds_when_it_is_back(tmp_path, change):
    path = worlds.study(tmp_path)
    before = open_study(path).run().summary
    known, original = set(rows(path, SCORES)), json.loads((tmp_path / "models/base/config.json").read_text())
    configure_all(path, **change)
    progress = RecordedProgress()
    after = open_study(path, progress).run().summary
    assert any(name in warning for warning in progress.warnings for name in change)
    assert known < set(rows(path, SCORES)), "earlier scores stay"
    assert rows(path, "SELECT generation FROM dem_study") == [(2,)]
    assert all(row.objective != other.objective for row, other in zip(before.results, after.results, strict=True))
    alone = open_study(worlds.study(tmp_path, storage=f"sqlite:///{tmp_path}/other.db")).run().summary
    assert [row.objective for row in after.results[:5]] == [row.objective for row in alone.results[:5]]
    configure_all(path, **{name: original[name] for name in change})
    path = worlds.study(tmp_path)
    count = len(rows(path, SCORES))
    back = open_study(path).run().summary
    assert [row.objective for row in back.results[:5]] == [row.objective for row in before.results[:5]]
    assert not {row[:3] for row in rows(path, SCORES)[count:]} & {row[:3] for row in known}


def test_the_same_tensors_with_another_configuration_have_scores_of_their_own(tmp_path):
    path = worlds.study(tmp_path)
    other = worlds.study(tmp_path / "other").parent / "models/math"
    configure(other, rope_parameters=FLAT)
    alone = open_study(worlds.study(tmp_path, storage=f"sqlite:///{tmp_path}/alone.db")).score_model(other)
    path = worlds.study(tmp_path)
    vertex = open_study(path).score({"math": 1.0})
    model = open_study(path).score_model(other)
    assert model == alone and model != vertex
    second = worlds.study(tmp_path, storage=f"sqlite:///{tmp_path}/second.db")
    assert open_study(second).score_model(other) == model
    assert open_study(second).score({"math": 1.0}) == vertex
    assert open_study(second).score_model(tmp_path / "models/math") == vertex


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"rope_theta": 10000.0, "rope_parameters": None}])
def test_labels_and_spellings_score_nothing_again(tmp_path, fields):
    path = worlds.study(tmp_path)
    open_study(path).run()
    known = rows(path, SCORES)
    configure_all(path, **fields)
    progress = RecordedProgress()
    open_study(path, progress).run()
    assert rows(path, SCORES) == known and progress.warnings == []


def test_an_export_after_the_configuration_changed_says_so(tmp_path):
    path = worlds.study(tmp_path)
    open_study(path).run()
    configure_all(path, rms_norm_eps=0.1)
    with pytest.raises(InputError, match=r"configuration is new.*dem-opt run"):
        open_study(path).export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_fine_tune_that_computes_something_else_is_refused(tmp_path, change):
    path = worlds.study(tmp_path)
    configure(tmp_path / "models/math", **change)
    with pytest.raises(InputError) as refusal:
        open_study(path).run()
    assert refusal.value.field == "distributions.math.checkpoint" and next(iter(change)) in str(refusal.value)
    assert not (tmp_path / "runs").exists()
