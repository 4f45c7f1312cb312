"""Laws of the placebo comparison: the same search over other vectors, found again, told the same everywhere."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest
import recorded
import test_adapters
import worlds
import yaml
from mlflow.tracking import MlflowClient

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.rivals import FILE, RivalRecord
from dem_opt.checkpoints.files import content_hash
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.dashboards.words import rival_lines
from dem_opt.errors import InputError
from dem_opt.evaluation.objective import Objective
from dem_opt.evaluation.worker import Worker
from dem_opt.json_files import parse_json
from dem_opt.planning.inputs import load_inputs
from dem_opt.search.optuna_storage import study_names
from dem_opt.search.runs import Runs
from dem_opt.tracking import NullTracker
from dem_opt.types import HELD_OUT, SEARCH, Margin, Request, Rival
from dem_opt.workflows.placebo import placebos_of
from dem_opt.workflows.reset import reset
from dem_opt.workflows.stored_results import stored_results

pytestmark = test_adapters.pytestmark

NAMES = ("code", "math")
KINDS = ("random", "permuted")


def placebo_study(folder: Path, layers: int = 2, **sections: Any) -> Path:
    worlds.save_model(folder / "models/base", seed=0, layers=layers)
    return worlds.study(folder, NAMES, **({"search": {"algorithm": "random", "trials": 5, "seed": 3}} | sections))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Rival, ...]]:
    """A study that was run, with its placebos."""
    path = placebo_study(tmp_path_factory.mktemp("placebo"))
    study = in_process.open_tracked(path)
    study.run()
    return path, study.placebo()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process.replace_dependencies(monkeypatch, compute=InProcessCompute(), tracker=NullTracker())


def records(path: Path) -> dict[str, RivalRecord]:
    stored = parse_json((load(path).output / FILE).read_text(), list[RivalRecord])
    return {record.kind: record for record in stored}


def test_what_placebos_cost_is_part_of_the_study_s_total(compared: tuple[Path, tuple[Rival, ...]]) -> None:
    path, _ = compared
    summary, config = stored_results(load(path), path), load(path)
    costs = {cost.part: cost for cost in summary.costs}
    for kind in KINDS:
        placebo = config.model_copy(update={"name": f"tiny+{kind}"})
        of_its_own = stored_results(placebo, path)
        assert costs.pop(f"placebo ({kind})").forwards == pytest.approx(of_its_own.forwards)
        spent = {cost.part: cost.forwards for cost in of_its_own.costs}
        held_out = config.evaluation.held_out / config.evaluation.windows
        assert 0 < spent["random"] <= 5 and spent["final table"] == pytest.approx(held_out), "its winner alone"
        assert not {"price of the sum"} & spent.keys()
    assert not [part for part in costs if "placebo" in part]


def test_a_placebo_has_the_study_s_search(compared: tuple[Path, tuple[Rival, ...]]) -> None:
    """Random proposals depend on seed and number alone, so they are those of the study."""
    path, rivals = compared
    config = load(path)
    assert [rival.kind for rival in rivals] == list(KINDS)
    with Runs(config, 1).existing() as searches:
        proposed = [trial.coefficients for trial in searches["random"].trials()]
    for kind, rival in zip(KINDS, rivals, strict=True):
        assert rival.trials == len(proposed) == 5
        with Runs(config.model_copy(update={"name": f"tiny+{kind}"}), 1).existing() as searches:
            trials = searches["random"].trials()
        assert [trial.coefficients for trial in trials] == proposed
        whole = [trial for trial in trials if trial.objective is not None and not trial.error]
        best = min(whole, key=lambda trial: (trial.objective, trial.number))
        assert best.coefficients.weights == rival.coefficients
        assert rival.objective[SEARCH] == pytest.approx(best.objective, abs=1e-12)


def test_its_checkpoints_are_those_of_their_seed_and_are_removed(
    compared: tuple[Path, tuple[Rival, ...]], tmp_path: Path
) -> None:
    path, _ = compared
    config, inputs = load(path), load_inputs(load(path), path)
    for kind in KINDS:
        assert not list((config.output / "placebo" / kind / "models").iterdir())
        contents = set()
        for name, placebo in placebos_of(inputs, kind).items():  # type: ignore[arg-type]
            placebo.write(tmp_path / kind / name)
            contents.add(content_hash(tmp_path / kind / name))
        assert {*records(path)[kind].composite} <= contents


def test_the_margin_is_paired_with_the_winner(compared: tuple[Path, tuple[Rival, ...]], tmp_path: Path) -> None:
    """An ordinary study of the placebos' folders, with a database of its own, scores the same."""
    path, rivals = compared
    inputs, summary = load_inputs(load(path), path), in_process.open_study(path).summary()
    for kind, rival in zip(KINDS, rivals, strict=True):
        content = yaml.safe_load(path.read_text()) | {"name": "other", "base": str(inputs.base.path)}
        for name, placebo in placebos_of(inputs, kind).items():  # type: ignore[arg-type]
            placebo.write(tmp_path / kind / name)
            data = str(path.parent / f"data/{name}.jsonl")
            content["distributions"][name] = {"checkpoint": str(tmp_path / kind / name), "validation": data}
        other = tmp_path / kind / "study.yaml"
        other.write_text(yaml.safe_dump(content))
        scored = in_process.open_study(other).score(rival.coefficients)
        objective = Objective(summary.weights)
        assert objective(scored[HELD_OUT]) == pytest.approx(rival.objective[HELD_OUT], abs=1e-9)
        gap = difference(scored[HELD_OUT], summary.winner.scores[HELD_OUT], objective)
        assert rival.held_out is not None
        assert (rival.held_out.mean, rival.held_out.low) == pytest.approx((gap.mean, gap.low), abs=1e-9)


def test_what_was_compared_is_not_searched_again(
    compared: tuple[Path, tuple[Rival, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rivals = compared
    monkeypatch.setattr(Worker, "evaluate", None)
    monkeypatch.setattr("dem_opt.export.placebo.Placebo.write", None)
    assert in_process.open_study(path).placebo() == rivals


def test_every_screen_has_the_same_line(
    compared: tuple[Path, tuple[Rival, ...]], commands: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, rivals = compared
    summary = in_process.open_study(path).summary()
    (line,) = rival_lines(summary)
    assert summary.rivals == rivals == stored_results(load(path), path).rivals
    assert main(["compare", "--placebo", str(path)]) == 0
    assert line in capsys.readouterr().out.replace("\n", " ")
    assert main(["compare", "--placebo", "--json", str(path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["conclusions"] == [line] and [rival["kind"] for rival in answer["rivals"]] == list(KINDS)
    assert main(["show", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["rivals"] == answer["rivals"]
    assert line in in_process.open_study(path).report(tmp_path / "report.html").read_text(encoding="utf-8")


def test_mlflow_has_a_run_of_each_placebo_and_no_trials_of_them(compared: tuple[Path, tuple[Rival, ...]]) -> None:
    path, rivals = compared
    client = MlflowClient(load(path).tracking.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment], "tags.`dem_opt.kind` = 'placebo'")
    assert {run.data.metrics["held_out.margin"] for run in runs} == {
        rival.held_out.mean for rival in rivals if rival.held_out
    }
    names = {run.info.run_name for run in client.search_runs([experiment])}
    assert not any("+random" in name or "+permuted" in name for name in names)


@pytest.mark.parametrize("at", [2, 7])
def test_an_interrupted_comparison_goes_on_to_the_same_end(
    at: int, compared: tuple[Path, tuple[Rival, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rivals = compared
    path = placebo_study(tmp_path)
    in_process.open_study(path).run()
    evaluate, calls = Worker.evaluate, list[Request]()

    def counted(worker: Worker, request: Request) -> Any:
        calls.append(request)
        if len(calls) == at:
            raise KeyboardInterrupt
        return evaluate(worker, request)

    monkeypatch.setattr(Worker, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        in_process.open_study(path).placebo()
    assert in_process.open_study(path).placebo() == rivals
    done = [(request.composite, request.corpora) for number, request in enumerate(calls, 1) if number != at]
    assert len(done) == len(set(done))


def test_a_changed_search_has_no_placebo_yet(compared: tuple[Path, tuple[Rival, ...]], tmp_path: Path) -> None:
    path, _ = compared
    content = yaml.safe_load(path.read_text())
    content["search"]["seed"] = 4
    changed = path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(content))
    assert stored_results(load(changed), changed).rivals == ()


def test_without_two_layers_alike_there_is_the_random_placebo_which_a_reset_removes(tmp_path: Path) -> None:
    path, progress = placebo_study(tmp_path, layers=1), recorded.RecordedProgress()
    in_process.open_study(path).run()
    (rival,) = in_process.open_study(path, progress).placebo()
    assert rival.kind == "random" and any("permuted" in warning for warning in progress.warnings)
    assert any("GB" in note for note in progress.notes)
    assert {name.partition("/")[0] for name in study_names(load(path).storage)} == {"tiny", "tiny+random"}
    reset(load(path), path, NullTracker(), progress.warning)
    assert not study_names(load(path).storage)


def test_placebos_of_adapters_are_adapters(tmp_path: Path) -> None:
    path = placebo_study(tmp_path)
    content = yaml.safe_load(path.read_text())
    for seed, name in enumerate(NAMES):
        test_adapters.make_adapter(
            tmp_path / "models/base", tmp_path / "adapters" / name, seed, target_modules="all-linear"
        )
        content["distributions"][name] = {"adapter": f"adapters/{name}", "validation": f"data/{name}.jsonl"}
    path.write_text(yaml.safe_dump(content))
    in_process.open_study(path).run()
    assert [rival.kind for rival in in_process.open_study(path).placebo()] == list(KINDS)


def regrets(path: Path) -> None:
    edit(path, objective={"worst": True})


def a_study_that_was_not_run(path: Path) -> None:
    edit(path, name="other")


def no_base(path: Path) -> None:
    (path.parent / "models/base/model.safetensors").unlink()


def dora(path: Path) -> None:
    test_adapters.make_adapter(
        path.parent / "models/base", path.parent / "dora", 1, target_modules=["q_proj"], use_dora=True
    )
    edit(path, distributions={"code": {"adapter": "dora", "validation": "data/code.jsonl"}})
    in_process.open_study(path).run()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (regrets, "objective.worst"),
        (a_study_that_was_not_run, None),
        (no_base, "base"),
        (dora, "distributions.code.adapter"),
    ],
)
def test_what_can_t_be_compared_is_one_line(
    spoil: Callable[[Path], None], field: str | None, tmp_path: Path, commands: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = placebo_study(tmp_path, search={"algorithm": "random", "trials": 2})
    in_process.open_study(path).run()
    spoil(path)
    with pytest.raises(InputError) as refusal:
        in_process.open_study(path).placebo()
    assert refusal.value.field == field
    assert main(["compare", "--placebo", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (load(path).output / FILE).exists() and not list(load(path).output.glob("placebo/*/models/*"))


@pytest.mark.parametrize(
    "options",
    [
        ["--placebo", "--seeds", "2"],
        ["--placebo", "--algorithms", "random"],
        ["--placebo", "--fine-tune-on-search"],
        ["--data-mixing", "3", "--reweight", "code=1"],
        ["--placebos"],
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], compared: tuple[Path, tuple[Rival, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *options, str(compared[0])]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def rival(kind: str, search: float, margin: tuple[float, float, float], steps: int = 0) -> Rival:
    mean, low, high = margin
    return Rival(
        kind=kind,
        objective={SEARCH: search, HELD_OUT: search},
        margins=(Margin(rival=kind, split=HELD_OUT, mean=mean, low=low, high=high),),
        coefficients={},
        trials=5 if not steps else 0,
        steps=steps,
        flops=1.0,
    )


def test_the_line_is_of_the_placebo_that_is_best_on_the_search_split(
    compared: tuple[Path, tuple[Rival, ...]],
) -> None:
    """An interval above 0 is a win; one that holds 0, or lies below, is none."""
    summary = in_process.open_study(compared[0]).summary()
    cases = {(0.5, 0.4, 0.6): "Better than", (0.1, -0.1, 0.3): "No better", (-0.2, -0.3, -0.1): "No better"}
    for margin, words in cases.items():
        rivals = (rival("random", 1.0, margin), rival("permuted", 2.0, (9.0, 8.0, 10.0)))
        (line,) = rival_lines(replace(summary, rivals=rivals))
        assert line.startswith(words) and f"{margin[1]:+.4f}" in line
    trained = rival("base", 1.0, (-0.2, -0.3, -0.1), steps=7)
    (line,) = rival_lines(replace(summary, rivals=(trained,)))
    assert line.startswith("No better") and "below the winner" in line
