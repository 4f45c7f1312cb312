"""Laws of places: a study runs in any folder, under any home and temporary folder, and writes nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import in_process
import pytest
import worlds
from mlflow.tracking import MlflowClient
from recorded import RecordedProgress

from dem_opt.cli.main import main

SEARCH = {"algorithm": "random", "trials": 2}
NAMES = ("code", "math")

FOLDERS = {
    "a space": "my study",
    "unicode": "größe-研究-é",
    "a percent sign": "100%",
    "a percent code": "a%20b%2Fc",
    "a question mark": "why?mode=ro",
    "a hash": "issue #1",
    "braces": "{x}{0}",
    "quotes": 'it\'s "mine"',
    "marks of a URL": "me:pw@host;a=b&c=d+e",
    "a dash": "-study",
    "a tilde": "~",
}


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_study_runs_in_a_folder_of_any_name(tmp_path: Path, kind: str) -> None:
    path = worlds.study(tmp_path / FOLDERS[kind], NAMES, search=SEARCH)
    progress = RecordedProgress()
    in_process.open_study(path, progress).run()
    study = in_process.open_study(path)
    study.export(path.parent / "best")
    assert main(["list", str(path)]) == main(["report", str(path)]) == 0
    assert not progress.warnings
    assert entries(tmp_path) == {FOLDERS[kind]}
    assert entries(path.parent) == {"models", "data", "study.yaml", "runs", "best"}
    assert entries(path.parent / "runs/tiny") == {"study.db", "report.html", "vectors.json", "inputs.json"}


@pytest.mark.parametrize("output", [None, "runs/out %3F#{x}?"])
def test_mlflow_finds_its_files_in_a_folder_of_any_name(tmp_path: Path, output: str | None) -> None:
    folder = tmp_path / "ü %20 #1 ?a=b {x}"
    path = worlds.study(folder, NAMES, search=SEARCH, **({"output": output} if output else {}))
    progress = RecordedProgress()
    study = in_process.open_tracked(path, progress)
    study.run()
    assert study.export(folder / "best").version == "1"
    assert not progress.warnings
    assert entries(tmp_path) == {folder.name} and entries(folder / "runs") == {(output or "runs/tiny")[5:]}
    assert {"study.db", "mlflow.db", "artifacts"} < entries(folder / (output or "runs/tiny"))
    client = MlflowClient(study.config.tracking.uri)
    (version,) = client.search_model_versions("name = 'tiny'")
    (parent,) = [run for run in client.search_runs(["1"]) if "dem_opt.study" in run.data.tags]
    assert "tiny" in Path(client.download_artifacts(parent.info.run_id, "study.yaml")).read_text()
    assert str(version.version) == "1" and version.source.startswith((study.config.output / "artifacts").as_uri())


def test_a_study_runs_and_is_exported_on_ray_in_any_environment(tmp_path: Path) -> None:
    """Without a home and a folder for temporary files, then with a home that is read-only and a path too long."""
    folder = tmp_path / "ü %20 #1 ?a=b {x}"
    path = worlds.study(folder, NAMES, search=SEARCH)
    long = tmp_path / ("long" * 30)
    long.mkdir()
    bare = {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    bare["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", "import sys; from dem_opt.cli.main import main; sys.exit(main())"]
    for words, environment in (
        (["run", str(path)], bare),
        (["export", "--out", str(folder / "best"), str(path)], bare | {"HOME": "/proc", "TMPDIR": str(long)}),
    ):
        done = subprocess.run([*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert entries(tmp_path) == {folder.name, long.name}
    assert (folder / "best/model.safetensors").is_file()


def test_two_studies_share_a_folder_and_a_database(tmp_path: Path) -> None:
    studies = {}
    for name, bounds in (("first", {}), ("second", {"bounds": {"code": [0, 0.5]}})):
        path = worlds.study(tmp_path, NAMES, search=SEARCH, name=name, output="runs/shared", simplex=bounds)
        studies[name] = path.rename(tmp_path / f"{name}.yaml")
        in_process.open_study(studies[name]).run()
    before = {name: in_process.open_study(path).summary() for name, path in studies.items()}
    assert before["first"].winner != before["second"].winner
    assert main(["reset", "--yes", str(studies["second"])]) == 0
    first = in_process.open_study(studies["first"])
    assert first.summary().results == before["first"].results
    first.run()
    assert first.summary().trials == before["first"].trials
    assert in_process.open_study(studies["second"]).run().winner.objective == before["second"].winner.objective
