"""Laws of training on the search split: its windows alone, the search's cost, scored like any other model."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest
import test_adapters
import torch
import worlds
import yaml
from safetensors.torch import load_file

from dem_opt.analysis.mixing_cost import forward_cost, training_cost
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.evaluation.objective import Objective
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import load_inputs
from dem_opt.progress import NullProgress
from dem_opt.tracking import NullTracker
from dem_opt.training.fine_tune import fine_tune, is_finished, job_identity, result_of
from dem_opt.types import SEARCH, SPLITS, Rival
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.search_split_training import FOLDER, training_jobs

pytestmark = test_adapters.pytestmark

NAMES = ("code", "math")
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"on_search": "full", "on_search_rate": 2e-3}}


def trained_study(folder: Path, **fine_tuning: Any) -> Path:
    return worlds.study(
        folder,
        NAMES,
        search={"algorithm": "random", "trials": 40, "racing": False},
        objective={"weights": {"code": 3.0, "math": 1.0}},
        fine_tuning={"batch_size": 4, "learning_rate": 1e-3} | fine_tuning,
    )


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Rival, ...]]:
    path = trained_study(tmp_path_factory.mktemp(request.param), **METHODS[request.param])
    study = in_process.open_study(path)
    study.run()
    return path, study.fine_tune_on_search()


def jobs_of(path: Path) -> dict[str, Any]:
    context = StudyContext(
        config=load(path), path=path, tracker=NullTracker(), compute=InProcessCompute(), progress=NullProgress()
    )
    return training_jobs(context, load_inputs(load(path), path), in_process.open_study(path).summary().winner)


def test_training_costs_what_the_search_did_to_within_a_step(trained: tuple[Path, tuple[Rival, ...]]) -> None:
    path, rivals = trained
    winner = in_process.open_study(path).summary().winner
    assert [rival.kind for rival in rivals] == ["base", "uniform"]
    for rival in rivals:
        result = result_of(load(path).output / FOLDER / rival.kind)
        assert result is not None and result.steps == rival.steps
        search = forward_cost(result.parameters, winner.forward_tokens, 0).flops
        step = training_cost(result.parameters, result.trained, 4 * 32, 0).flops
        assert rival.flops == rival.steps * step <= search < rival.flops + step
        assert (result.trained == result.parameters) == (load(path).fine_tuning.on_search == "full")


def test_it_sees_the_search_split_alone_in_the_objective_s_shares(trained: tuple[Path, tuple[Rival, ...]]) -> None:
    path, _ = trained
    corpora = [corpus for corpus in load_inputs(load(path), path).corpora if corpus.split == SEARCH]
    for job in jobs_of(path).values():
        assert [(part.data.key, part.share) for part in job.parts] == [
            (corpus.key, share) for corpus, share in zip(corpora, (0.75, 0.25), strict=True)
        ]
        assert job.learning_rate == (load(path).fine_tuning.on_search_rate or 1e-3)


def test_a_trained_model_scores_as_its_folder_does(trained: tuple[Path, tuple[Rival, ...]]) -> None:
    path, rivals = trained
    study = in_process.open_study(path)
    objective = Objective(study.summary().weights)
    for rival in rivals:
        scored = study.score_model(load(path).output / FOLDER / rival.kind)
        assert {split: objective(scored[split]) for split in SPLITS} == rival.objective
    base, winner = study.summary().results[0], study.summary().winner
    assert rivals[0].objective[SEARCH] < base.objective[SEARCH]
    for rival in rivals:
        for margin in rival.margins:
            gap = rival.objective[margin.split] - winner.objective[margin.split]
            assert margin.mean == pytest.approx(gap) and margin.low <= margin.mean <= margin.high


def test_what_is_trained_and_scored_is_not_done_again(
    trained: tuple[Path, tuple[Rival, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rivals = trained
    monkeypatch.setattr(Worker, "evaluate", None)
    monkeypatch.setattr("dem_opt.workflows.fine_tuning.fine_tune", None)
    monkeypatch.setattr("dem_opt.workflows.search_split_training.write_composite", None)
    assert in_process.open_study(path).fine_tune_on_search() == rivals
    summary = in_process.open_study(path).summary()
    assert summary.rivals == rivals


def test_other_windows_are_another_training(trained: tuple[Path, tuple[Rival, ...]]) -> None:
    job = jobs_of(trained[0])["base"]
    first, second = job.parts
    other = replace(first.data, key="another")
    changed = replace(job, train=replace(job.train, parts=(replace(first, data=other), second)))
    assert is_finished(job) and not is_finished(changed)
    assert job_identity(job) != job_identity(changed)


def test_a_killed_training_ends_with_the_same_bits(
    trained: tuple[Path, tuple[Rival, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(jobs_of(trained[0])["base"], out=tmp_path / "base")

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dem_opt.training.fine_tune.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(job)
    assert job.place.exists() and not job.out.exists()
    fine_tune(job)
    whole = load_file(load(trained[0]).output / FOLDER / "base" / "model.safetensors")
    again = load_file(job.out / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def large_batch(path: Path) -> None:
    edit(path, fine_tuning={"batch_size": 4000})


def not_run(path: Path) -> None:
    edit(path, name="other")


def unknown_argument(path: Path) -> None:
    edit(path, fine_tuning={"lora": {"rank": 3}})


def unknown_method(path: Path) -> None:
    edit(path, fine_tuning={"on_search": "qlora"})


def other_weights(path: Path) -> None:
    edit(path, objective={"weights": {"code": 1.0}})


def no_base(path: Path) -> None:
    (path.parent / "models/base/model.safetensors").unlink()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.mark.parametrize("spoil", [large_batch, not_run, unknown_argument, unknown_method, other_weights, no_base])
def test_what_can_t_be_trained_is_one_line(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained_study(tmp_path)
    in_process.open_study(path).run()
    spoil(path)
    in_process.replace_dependencies(monkeypatch, compute=InProcessCompute(), tracker=NullTracker())
    assert main(["compare", "--fine-tune-on-search", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if not line.startswith("warning")]) == 1
    assert not list((path.parent / "runs").glob(f"*/{FOLDER}/base"))


def test_without_peft_an_adapter_is_refused_and_full_training_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained_study(tmp_path)
    in_process.open_study(path).run()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError) as refusal:
        in_process.open_study(path).fine_tune_on_search()
    assert refusal.value.field == "fine_tuning.lora"
