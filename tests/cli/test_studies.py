"""Laws of `list`, `trials`, `reset`, `completion` and `--log-file`: they agree, and lose nothing measured."""

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from datetime import datetime
from io import StringIO
from pathlib import Path

import pytest
import worlds
import yaml
from in_process import replace_dependencies

from dem_opt.cli import published
from dem_opt.cli.log_file import LogFile
from dem_opt.cli.main import main
from dem_opt.cli.parser import SHELLS
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding
from dem_opt.study import Study
from dem_opt.tracking import NullTracker

TRIALS = 3


@pytest.fixture(scope="module")
def run_study(tmp_path_factory):
    """The folder of a study that has been run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
        path = worlds.study(folder, search={"algorithm": "random", "trials": TRIALS})
        assert main(["run", str(path), "--quiet"]) == 0
    return folder


@pytest.fixture
def study(run_study, tmp_path, monkeypatch):
    """A study that has been run, in a folder of the test's own."""
    replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    shutil.copytree(run_study, tmp_path, dirs_exist_ok=True)
    return tmp_path / "study.yaml"


def answer(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_and_trials_agree_with_the_results(study, capsys):
    (listed,) = answer(capsys, "list", study)
    trials = answer(capsys, "trials", study)
    frame = Study.load(study).trials()
    assert listed["generation"] == 1 and [run["complete"] for run in listed["runs"]] == [TRIALS]
    assert listed["best"] == min(trial["objective"] for trial in trials) == frame["objective"].min()
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    for trial, row in zip(trials, frame.to_dict("records"), strict=True):
        assert all(trial[name] == row[name] for name in row if name.startswith("w.") or name == "objective")
    assert main(["trials", str(study), "--csv"]) == 0
    table = list(csv.DictReader(StringIO(capsys.readouterr().out)))
    assert [float(row["objective"]) for row in table] == [trial["objective"] for trial in trials]


def test_show_prints_what_run_prints_at_its_end(study, capsys):
    capsys.readouterr()
    assert main(["run", str(study)]) == 0
    ran = capsys.readouterr().out.splitlines()
    assert main(["show", str(study)]) == 0
    shown = capsys.readouterr().out.splitlines()
    *results, search = shown
    assert results == ran[-len(results) :] and search.startswith("random: ")
    assert answer(capsys, "show", study) == answer(capsys, "run", study)


@pytest.mark.parametrize("command", ["show", "run"])
def test_what_is_known_is_answered_without_torch_and_without_a_checkpoint(study, command):
    """A finished study by `run`, too, once both dashboards show it."""
    if command == "show":
        shutil.rmtree(study.parent / "models")
    else:
        assert main(["run", str(study), "--quiet"]) == 0, "the copy's files are others: it is run once more"
        config = load(study)
        (config.output / "mlflow.db").touch()
        published.keep(config, Study.load(study).summary())
    program = (
        f"import sys; from dem_opt.cli.main import main; status = main(['{command}', sys.argv[1]]); "
        "loaded = {'torch', 'transformers', 'ray', 'mlflow', 'plotly'} & sys.modules.keys(); "
        "sys.exit(f'imported {loaded}' if loaded else status)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run([sys.executable, "-c", program, study], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "The winner: " in process.stdout


def test_a_score_stands_beside_base_uniform_and_winner(study, capsys):
    results = answer(capsys, "run", study)
    known = {row["label"]: row["objective"] for row in results["results"]}
    score = answer(capsys, "score", study, "--coefficients", "math=1")
    assert score["objective"] == known["math"]
    assert {row["label"]: row["objective"] for row in score["beside"]} == {
        label: known[label] for label in ("base", "uniform", "best of random")
    }
    assert main(["score", str(study), "--coefficients", "code=.5,math=.5"]) == 0
    output = capsys.readouterr().out
    assert all(f"{known[label]['held_out']:.4f}" in output for label in ("base", "uniform", "best of random"))


def test_a_score_of_a_study_that_was_never_run_stands_alone(tmp_path, monkeypatch, capsys):
    replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    path = worlds.study(tmp_path)
    assert answer(capsys, "score", path, "--coefficients", "math=1")["beside"] == []
    assert [
        row["label"] for row in answer(capsys, "score", path, "--model", path.parent / "models/base")["beside"]
    ] == ["base"]


@pytest.mark.parametrize("command", ["show", "trials", "report", "compare --reweight code=1,math=1"])
@pytest.mark.parametrize("changed", ["never run", "a distribution gone", "other bounds"])
def test_what_was_not_run_is_told_in_one_line(study, capsys, changed, command):
    content = yaml.safe_load(study.read_text())
    if changed == "never run":
        content["name"] = "another"
    elif changed == "a distribution gone":
        del content["distributions"]["prose"]
    else:
        content["simplex"] = {"bounds": {"code": [0, 0.5]}}
    study.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    command, *options = command.split()
    assert main([command, str(study), *options]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "dem-opt run" in output.err


def test_reset_removes_trials_and_keeps_what_was_measured(study, capsys, monkeypatch):
    before = answer(capsys, "trials", study)
    removed = answer(capsys, "reset", study, "--yes")
    assert sum(removed["removed_trials"].values()) == TRIALS and removed["kept_scores"] > 0
    assert answer(capsys, "list", study) == []
    assert main(["trials", str(study)]) == 2
    assert main(["run", str(study), "--quiet"]) == 0
    after = answer(capsys, "trials", study)
    assert [row["objective"] for row in after] == [row["objective"] for row in before]
    assert all(row["forward_tokens"] == 0 for row in after), "the ledger has every score"


def test_reset_refuses_a_study_that_is_driven(study, capsys):
    config = load(study)
    engine = connect(config.storage)
    with holding(engine, config.name):
        assert main(["reset", str(study), "--yes"]) == 2
    engine.dispose()
    assert config.name in capsys.readouterr().err and len(answer(capsys, "trials", study)) == TRIALS


@pytest.mark.parametrize(("reply", "kept"), [("y\n", 0), ("n\n", TRIALS), ("\n", TRIALS), ("", TRIALS)])
def test_reset_removes_nothing_unless_the_answer_is_yes(study, capsys, monkeypatch, reply, kept):
    class Keyboard(StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Keyboard(reply))
    assert main(["reset", str(study)]) == 0
    assert "[y/N]" in capsys.readouterr().err
    assert sum(run["complete"] for listed in answer(capsys, "list", study) for run in listed["runs"]) == kept


def test_reset_asks_first_and_needs_a_terminal_for_that(study, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO())
    assert main(["reset", str(study)]) == 2
    assert "--yes" in capsys.readouterr().err
    assert len(answer(capsys, "trials", study)) == TRIALS


@pytest.mark.parametrize("command", ["list", "trials", "reset"])
def test_a_study_that_was_not_run_is_refused_and_nothing_is_made(tmp_path, capsys, command):
    path = worlds.study(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([command, str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_a_script_that_names_the_commands(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in ("run", "export", "trials"))
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", ["score", "merge"])
def test_the_old_name_of_coefficients_is_refused_with_the_new(command, capsys):
    assert main([command, "study.yaml", "--weights", "code=1"]) == 2
    error = capsys.readouterr().err
    assert "--coefficients" in error and len(error.splitlines()) == 1


def test_a_log_file_has_the_command_its_progress_and_its_status(study, tmp_path):
    log = tmp_path / "run.log"
    assert main(["run", str(study), "--quiet", "--log-file", str(log)]) == 0
    assert main(["run", str(tmp_path / "none.yaml"), "--log-file", str(log)]) == 2
    lines = log.read_text().splitlines()
    assert [line.split()[-1] for line in lines if " status: " in line] == ["0", "2"]
    assert any("dem-opt run" in line for line in lines) and any(
        "none.yaml" in line and "error" in line for line in lines
    )


def test_a_log_file_masks_passwords_and_keeps_an_event_to_a_line(tmp_path):
    path = tmp_path / "run.log"
    with closing(LogFile(path)) as log, log.phase("reading"):
        log.warning("postgresql+psycopg://me:secret@host/db\nis away")
    begin, warning, end = path.read_text().splitlines()
    assert "begin: reading" in begin and "end: reading" in end
    assert "secret" not in warning and warning.endswith("is away")
    datetime.fromisoformat(warning.split()[0])


def test_a_log_file_that_cannot_be_written_is_the_users_mistake(tmp_path, capsys):
    assert main(["list", "study.yaml", "--log-file", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", ["name: tiny\n", '{"text": "2025-01-01"}\n', "\n", "x", "2025-01-01 note: a\n"])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, capsys, content):
    """The study file, a data file: a line would be added to it."""
    path = tmp_path / "mine"
    path.write_text(content)
    assert main(["list", "study.yaml", "--log-file", str(path)]) == 2
    assert "--log-file" in capsys.readouterr().err and path.read_text() == content


def test_an_empty_file_becomes_a_log(tmp_path):
    (tmp_path / "log").touch()
    for _ in range(2):
        with closing(LogFile(tmp_path / "log")) as log:
            log.note("here")
    assert len((tmp_path / "log").read_text().splitlines()) == 2
