"""Laws of `base: {rounding: stochastic}`, as users meet it: smooth, exported as it was scored, told everywhere."""

from pathlib import Path

import in_process
import pytest
import torch
from mlflow import MlflowClient
from test_widening import DTYPES, NAMES, jump, one_step_apart, weights

from dem_opt.config import load
from dem_opt.dashboards.words import rounding_lines
from dem_opt.errors import InputError
from dem_opt.types import SEARCH
from dem_opt.workflows.check import check
from dem_opt.workflows.stored_results import stored_results

STOCHASTIC = {"path": "models/base", "rounding": "stochastic"}


def stochastic(path: Path, name: str = "stochastic") -> Path:
    """The study with stochastic rounding, under another name."""
    out = path.with_name(f"{name}.yaml")
    out.write_text(path.read_text())
    return in_process.edit(out, lambda study: study.update(name=name, base=STOCHASTIC))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_share_of_the_steps_that_is_the_coefficient_is_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    """To the nearest value three quarters of a step would be all of it.  A share of P has an error of 0.43 / sqrt P."""
    study = in_process.open_study(stochastic(one_step_apart(tmp_path, dtype)))
    study.merge({"code": 0.75, "math": 0.25}, tmp_path / "out")
    base, code, math = (weights(tmp_path / "models" / name) for name in ("base", *NAMES))
    taken = moved = 0
    for name, merged in weights(tmp_path / "out").items():
        own = (code[name] != base[name]) & (math[name] == base[name])
        same = (code[name] == base[name]) & (math[name] == base[name])
        assert merged.dtype == dtype and torch.equal(merged[same], base[name][same])
        assert ((merged == base[name]) | (merged == code[name]))[own].all()
        taken, moved = taken + int((merged == code[name])[own].sum()), moved + int(own.sum())
    assert abs(taken / moved - 0.75) < 4 * 0.433 / moved**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_objective_does_not_jump(tmp_path: Path, dtype: torch.dtype) -> None:
    path = one_step_apart(tmp_path, dtype)
    assert jump(stochastic(path)) < 0.2 * jump(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_winner_is_exported_as_it_was_scored(tmp_path: Path, dtype: torch.dtype) -> None:
    """`export` compares the folder's bits with a fresh merge, and its scores with the winner's."""
    study = in_process.open_tracked(stochastic(one_step_apart(tmp_path, dtype)))
    study.run()
    client = MlflowClient(study.config.tracking.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'stochastic'")
    parameters = [run.data.params for run in client.search_runs([experiment.experiment_id])]
    assert "stochastic" in {each.get("base.rounding") for each in parameters}
    champion = study.export(tmp_path / "best")
    assert champion.exported is champion.result
    card = " ".join((tmp_path / "best/README.md").read_text(encoding="utf-8").split())
    assert "(`rounding: stochastic`)" in card and "to the nearest values, which may score otherwise" in card
    for summary in (study.summary(), stored_results(study.config, tmp_path / "stochastic.yaml")):
        assert summary.vectors is not None and summary.vectors.rounding is None
        assert not rounding_lines(summary)


def test_a_card_says_nothing_of_it_where_nothing_is_rounded(tmp_path: Path) -> None:
    study = in_process.open_study(stochastic(one_step_apart(tmp_path, torch.bfloat16)))
    study.merge({"code": 0.75, "math": 0.25}, tmp_path / "out", dtype="float32")
    assert "stochastic`)" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("before", ["nearest", "stochastic"])
def test_a_study_keeps_its_rounding(tmp_path: Path, before: str) -> None:
    """Scores of both would not compare, and the ledger has them apart."""
    path = one_step_apart(tmp_path, torch.bfloat16)
    ways = {"nearest": "models/base", "stochastic": STOCHASTIC}
    in_process.open_study(in_process.edit(path, lambda study: study.update(base=ways.pop(before)))).run()
    left = check(load(path), path).left
    assert left is not None and left.trials == 0
    ((after, base),) = ways.items()
    assert check(load(in_process.edit(path, lambda study: study.update(base=base))), path).left is None
    with pytest.raises(InputError, match=rf"base\.rounding.*{after}.*began with '{before}'"):
        in_process.open_study(path).run()


def test_another_way_is_refused(tmp_path: Path) -> None:
    path = one_step_apart(tmp_path, torch.bfloat16)
    in_process.edit(path, lambda study: study.update(base=STOCHASTIC | {"rounding": "random"}))
    with pytest.raises(InputError, match=r"base\.rounding"):
        load(path)


def test_exports_of_a_base_in_float32_are_rounded_so_and_its_scores_do_not_ask(tmp_path: Path) -> None:
    path = one_step_apart(tmp_path, torch.bfloat16)
    in_process.edit(path, lambda study: study.update(base={"path": "models/base", "dtype": "float32"}))
    in_process.open_study(path).run()
    in_process.edit(path, lambda study: study.update(base=STOCHASTIC | {"dtype": "float32"}))
    study = in_process.open_study(path)
    study.run()
    left = check(load(path), path).left
    assert left is not None and left.trials == 0
    coefficients = {"code": 0.75, "math": 0.25}
    study.merge(coefficients, tmp_path / "wide")
    study.merge(coefficients, tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = weights(tmp_path / "wide"), weights(tmp_path / "narrow")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    up = torch.cat([(narrow[name].float() > tensor).flatten() for name, tensor in wide.items()])
    between = torch.cat([(tensor.bfloat16().float() != tensor).flatten() for tensor in wide.values()])
    assert 0.3 < up[between].float().mean() < 0.7
    errors = torch.cat([(narrow[name].float() - tensor).flatten().double() for name, tensor in wide.items()])
    nearest = torch.cat([(tensor.bfloat16().float() - tensor).flatten().double() for tensor in wide.values()])
    assert errors.norm() > 1.1 * nearest.norm()
    assert "stochastic`)" in (tmp_path / "narrow/README.md").read_text(encoding="utf-8")
    assert "stochastic`)" not in (tmp_path / "wide/README.md").read_text(encoding="utf-8")


def test_it_is_written_as_it_was_read(tmp_path: Path) -> None:
    config = load(stochastic(one_step_apart(tmp_path, torch.bfloat16)))
    assert type(config).model_validate(config.model_dump(exclude_unset=True)).base == config.base
    assert config.model_dump(exclude_unset=True)["base"]["rounding"] == "stochastic"


def test_scores_of_both_are_kept_apart_in_one_database(tmp_path: Path) -> None:
    nearest = one_step_apart(tmp_path, torch.bfloat16)
    in_process.edit(nearest, lambda study: study.update(storage=f"sqlite:///{tmp_path}/shared.db"))
    studies = [in_process.open_study(file) for file in (nearest, stochastic(nearest))]
    first, second = (study.score({"code": 0.75, "math": 0.25}).objective[SEARCH] for study in studies)
    assert first != second
    assert [study.score({"code": 0.75, "math": 0.25}).objective[SEARCH] for study in studies] == [first, second]
