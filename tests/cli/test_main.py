"""The command line: what a user did wrong is told in one line, and nothing is half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import worlds
import yaml
from in_process import replace_dependencies
from safetensors.torch import load_file, save_file

from dem_opt.checkpoints.files import content_hash
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.study import Study
from dem_opt.tracking import NullTracker


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A tiny study that is all right, with two trials."""
    return worlds.study(tmp_path_factory.mktemp("world"), search={"algorithm": "random", "trials": 2}).parent


@pytest.fixture
def world(template, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(template, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def untracked(monkeypatch):
    replace_dependencies(monkeypatch, tracker=NullTracker())


def edit(world: Path, **changes) -> None:
    path = world / "study.yaml"
    study = yaml.safe_load(path.read_text())
    for field, value in changes.items():
        *sections, last = field.split("__")
        section = study
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    path.write_text(yaml.safe_dump(study, sort_keys=False))


def weights_of(world: Path, name: str) -> Path:
    return world / "models" / name / "model.safetensors"


def spoil_value(world: Path, value: float) -> None:
    tensors = load_file(weights_of(world, "math"))
    tensors["model.norm.weight"][3] = value
    save_file(tensors, weights_of(world, "math"), metadata={"format": "pt"})


def other_shape(world: Path) -> None:
    shutil.rmtree(world / "models/math")
    worlds.save_model(world / "models/math", seed=5, hidden=8)


def other_vocabulary(world: Path) -> None:
    path = world / "models/math/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    token, other = list(vocabulary)[-2:]
    vocabulary[token], vocabulary[other] = vocabulary[other], vocabulary[token]
    path.write_text(json.dumps(content))
    tensors = load_file(weights_of(world, "math"))
    tensors["model.embed_tokens.weight"] = torch.zeros(321, 16)
    save_file(tensors, weights_of(world, "math"), metadata={"format": "pt"})


def truncate(world: Path) -> None:
    content = weights_of(world, "math").read_bytes()
    weights_of(world, "math").write_bytes(content[:-100])


MISTAKES = {
    "misspelt key": (lambda world: edit(world, serch={}), "serch", "did you mean 'search'?"),
    "no base": (lambda world: edit(world, base="models/bass"), "base", "models/bass"),
    "no checkpoint": (lambda world: shutil.rmtree(world / "models/math"), "distributions.math.checkpoint", "math"),
    "other shape": (other_shape, "distributions.math.checkpoint", "does not fit the base"),
    "other vocabulary": (other_vocabulary, "distributions.math.checkpoint", "tokenizer.json"),
    "NaN": (lambda world: spoil_value(world, float("nan")), "distributions.math.checkpoint", "model.norm.weight"),
    "infinite": (lambda world: spoil_value(world, float("inf")), "distributions.math.checkpoint", "model.norm.weight"),
    "truncated": (truncate, "distributions.math.checkpoint", "model.safetensors"),
    "empty data": (
        lambda world: (world / "data/math.jsonl").write_text(""),
        "distributions.math.validation",
        "no text",
    ),
    "no data": (lambda world: (world / "data/math.jsonl").unlink(), "distributions.math.validation", "no such file"),
    "no text": (
        lambda world: (world / "data/math.jsonl").write_bytes(b'{"text": "\xff\xfe"}'),
        "distributions.math.validation",
        "UTF-8",
    ),
    "small corpus": (lambda world: edit(world, evaluation__windows=4000), "evaluation.windows = 4000", "windows of"),
    "zero trials": (lambda world: edit(world, search__trials=0), "search.trials = 0", "greater than 0"),
    "unwritable output": (lambda world: edit(world, output="study.yaml/inside"), "storage", "study.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(world, capsys, untracked, mistake):
    spoil, field, said = MISTAKES[mistake]
    spoil(world)
    before = sorted(world.rglob("*"))
    assert main(["run", str(world / "study.yaml")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("dem-opt: ") and output.err.count("\n") == 1
    assert field in output.err and said in output.err
    assert sorted(world.rglob("*")) == before, "nothing half-written"


MISTYPED = {
    "rnu study.yaml": "did you mean 'run'?",
    "chekc study.yaml": "did you mean 'check'?",
    "exprot study.yaml --out x": "did you mean 'export'?",
    "frobnicate": "known: ",
    "": "COMMAND",
    "run": "run: ",
    "--versoin": "did you mean --version?",
    "score study.yaml --coeficients code=1": "score: no option --coeficients; did you mean --coefficients?",
    "compare --algoritms=grid study.yaml": "compare: no option --algoritms; did you mean --algorithms?",
    "export study.yaml --out x --dtype float61": "did you mean 'float16'?",
    "completion bsh": "did you mean 'bash'?",
    "trials study.yaml --zzz": "no option --zzz",
    "check study.yaml other.yaml": "other.yaml",
    "compare study.yaml --seeds x": "--seeds",
    "merge study.yaml --coefficients": "--coefficients",
}


@pytest.mark.parametrize("typed", MISTYPED)
def test_a_mistyped_command_is_one_line_with_the_nearest(capsys, typed):
    assert main(typed.split()) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("dem-opt: ") and output.err.count("\n") == 1
    assert MISTYPED[typed] in output.err


@pytest.mark.parametrize("typed", ["--help", "--version", "run --help", "score -h"])
def test_help_is_no_mistake(capsys, typed):
    with pytest.raises(SystemExit) as exit:
        main(typed.split())
    assert exit.value.code == 0 and capsys.readouterr().out


UNSEEN = {"NaN", "infinite", "no text", "small corpus"}
"""Mistakes that only the weights and the texts themselves can tell."""


@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - UNSEEN))
def test_a_check_tells_a_mistake_in_one_line(world, capsys, mistake):
    spoil, field, said = MISTAKES[mistake]
    spoil(world)
    before = sorted(world.rglob("*"))
    assert main(["check", str(world / "study.yaml")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("dem-opt: ") and output.err.count("\n") == 1
    assert field in output.err and said in output.err
    assert sorted(world.rglob("*")) == before


@pytest.mark.parametrize("command", ["report", "dashboard", "export"])
def test_a_study_that_was_never_run_gets_no_folder(world, capsys, command):
    before = sorted(world.rglob("*"))
    out = ["--out", str(world / "out")] if command == "export" else []
    assert main([command, str(world / "study.yaml"), *out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(world.rglob("*")) == before


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("code=-0.5,math=1.5", "coefficients.code = -0.5"),
        ("code=0.5,math=0.4", "sums to 0.9"),
        ("code=0.5,mathe=0.5", "did you mean 'math'?"),
        ("code", "NAME=NUMBER"),
        ("code=half", "NAME=NUMBER"),
        ("code=0.5,code=0.5", "is given twice"),
    ],
)
@pytest.mark.parametrize("command", ["score", "merge"])
def test_coefficients_that_are_no_point_are_refused(world, capsys, command, weights, said):
    out = ["--out", str(world / "out")] if command == "merge" else []
    assert main([command, str(world / "study.yaml"), "--coefficients", weights, *out]) == 2
    assert said in capsys.readouterr().err
    assert not (world / "out").exists()


def test_an_export_into_a_folder_of_somebody_else_is_refused(world, capsys):
    assert main(["merge", str(world / "study.yaml"), "--coefficients", "code=1", "--out", str(world / "data")]) == 2
    assert "name another folder" in capsys.readouterr().err


def test_a_change_of_scoring_under_a_study_is_refused(world, capsys, untracked, ray_session):
    assert main(["run", str(world / "study.yaml")]) == 0
    edit(world, evaluation__window=16)
    assert main(["run", str(world / "study.yaml")]) == 2
    assert "evaluation.window = '16'" in capsys.readouterr().err


def test_run_score_and_report_say_what_they_found(world, capsys, untracked, ray_session):
    study = str(world / "study.yaml")
    assert main(["run", study, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    labels = [result["label"] for result in summary["results"]]
    assert labels == ["base", "code", "math", "prose", "uniform", "sum of all", "best of random"]
    assert summary["trials"] == {"random": 2} and len(summary["margins"]) == 2 * 5 + 1
    assert main(["score", study, "--coefficients", "code=1", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["search"] == summary["results"][1]["scores"]["search"]
    assert main(["report", study]) == 0
    assert (world / "runs/tiny/report.html").stat().st_size > 100_000
    capsys.readouterr()
    assert main(["report", study, "--full", "--quiet", "--json", "--figures", str(world / "figures")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(world / "runs/tiny/report.html")
    drawn = {Path(path).name for path in answer["figures"]}
    assert {"coefficients.svg", "worth.png", "vectors.svg", "price.png", "simplex.svg"} <= drawn
    assert all(Path(path).stat().st_size > 1000 for path in answer["figures"])
    assert main(["report", study, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    capsys.readouterr()
    assert main(["run", study]) == 0
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines[lines.index("") :] if not line.startswith(("The whole study", "A sum of"))]
    assert any("best of random" in line for line in tables) and max(len(line.rstrip()) for line in tables) <= 100


@pytest.fixture
def in_process(monkeypatch):
    """Workers without Ray."""
    replace_dependencies(monkeypatch, compute=InProcessCompute())


def test_merge_and_export_tell_programs_what_they_wrote(world, capsys, untracked, in_process):
    study, out = str(world / "study.yaml"), str(world / "out")
    assert main(["merge", study, "--coefficients", "code=0.25,math=0.75", "--out", out, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["coefficients"] == {"code": 0.25, "math": 0.75, "prose": 0.0}
    assert answer["path"] == out and answer["content"] == content_hash(Path(out)) and answer["scores"] == {}
    assert main(["run", study, "--json"]) == 0
    winner = json.loads(capsys.readouterr().out)["results"][-1]
    for dtype, options in ((None, []), ("bfloat16", ["--dtype", "bfloat16"])):
        assert main(["export", study, "--out", out, "--json", *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["coefficients"] == winner["coefficients"] and answer["dtype"] == dtype
        assert answer["content"] == content_hash(Path(out)) and answer["version"] is None
        assert (answer["scores"] == winner["scores"]) == (dtype is None)
        assert answer["objective"] == pytest.approx(winner["objective"], rel=1e-3)


def test_an_export_in_another_dtype_says_what_it_costs(world, capsys, untracked, in_process):
    study, out = str(world / "study.yaml"), world / "out"
    assert main(["run", study]) == 0
    assert main(["export", study, "--out", str(out), "--dtype", "float16"]) == 0
    output = capsys.readouterr().out
    assert sum("in float16" in line and "nats per token" in line for line in output.splitlines()) == 2
    assert "| exported in float16 |" in (out / "README.md").read_text()


def test_compare_tells_and_writes_what_searches_found_for_what_they_spent(world, capsys, untracked, in_process):
    study, out = str(world / "study.yaml"), world / "runs/tiny"
    edit(world, search__divisions=3)
    assert main(["compare", study, "--algorithms", "grid, random,tpe", "--seeds", "2"]) == 0
    output = capsys.readouterr().out
    lines = output[output.index("NLL in nats per token") :].splitlines()
    prose = ("Written", "Chosen on", "Coefficients of", "The whole study", "Least difference", "A sum of")
    tables = [line for line in lines if not line.startswith(prose)]
    assert max(len(line.rstrip()) for line in tables) <= 100
    assert "Top five by the search split" in output and "Regret in nats per token" in output
    assert str(out / "comparison.html") in output and str(out / "comparison.json") in output
    data = json.loads((out / "comparison.json").read_text())
    runs = {row["algorithm"]: [run["name"] for run in row["runs"]] for row in data["rows"]}
    assert runs == {"grid": ["grid"], "random": ["random", "random@1"], "tpe": ["tpe", "tpe@1"]}
    page = (out / "comparison.html").read_text()
    assert "all 10 planned trials" in page and "all 2 planned trials" in page
    assert main(["compare", study, "--algorithms", "grid", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["comparison"] == data == json.loads((out / "comparison.json").read_text())
    assert answer["trials"] == {"grid": 10, "random": 2, "random@1": 2, "tpe": 2, "tpe@1": 2}
    assert answer["stop_reasons"]["tpe@1"] == "all 2 planned trials" and len(answer["top"]) == 5
    assert main(["report", study]) == 0
    assert 'id="comparison"' in (out / "report.html").read_text()


def test_another_weighting_is_told_and_nothing_is_written(world, capsys, untracked, in_process, monkeypatch):
    study = str(world / "study.yaml")
    edit(world, search__divisions=3)
    assert main(["compare", study, "--algorithms", "grid"]) == 0
    before = sorted(world.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(Study, "compare", lambda *_: pytest.fail("something ran"))
        capsys.readouterr()
        assert main(["compare", study, "--reweight", "prose=2", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert main(["compare", study, "--reweight", "prose=2"]) == 0
    output = capsys.readouterr().out
    assert sorted(world.rglob("*")) == before
    assert answer["weights"] == {"code": 0.0, "math": 0.0, "prose": 2.0} and answer["winner"] == "best of the ledger"
    best = answer["results"][-1]
    assert best["objective"]["search"] == best["scores"]["search"]["prose"]["nll"]
    assert "code 0, math 0, prose 2; nothing was measured" in output and "best of the ledger" in output
    assert ("held_out" not in best["objective"]) == ("dem-opt score" in output)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "0"], "--seeds = 0"),
        (["--algorithms", "grid,gird"], "did you mean 'grid'?"),
        (["--algorithms", ""], "no such algorithm"),
        (["--reweight", "code=1", "--seeds", "2"], "leave --algorithms and --seeds out"),
        (["--reweight", "code=1", "--algorithms", "grid"], "leave --algorithms and --seeds out"),
        (["--reweight", "code"], "--reweight = 'code'"),
        (["--reweight", ""], "--reweight = ''"),
        (["--reweight", "code=1,code=2"], "is given twice"),
        (["--reweight", "code=1"], "nothing is measured yet"),
    ],
)
def test_a_comparison_that_is_none_is_refused_in_one_line(world, capsys, untracked, in_process, options, said):
    before = sorted(world.rglob("*"))
    assert main(["compare", str(world / "study.yaml"), *options]) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and not output.out
    assert sorted(world.rglob("*")) == before


def test_check_reads_headers_alone(world, capsys):
    assert main(["check", str(world / "study.yaml")]) == 0
    assert "fit together" in capsys.readouterr().out


def test_an_interrupt_says_how_to_go_on(world, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "compare", interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["run", str(world / "study.yaml")]) == 130
    assert f"dem-opt run {world / 'study.yaml'}" in capsys.readouterr().err
