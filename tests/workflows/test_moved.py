"""Laws of a study's folder that is copied or moved: it stands on its own, and nothing outside of it is touched."""

import shutil
from pathlib import Path

import in_process
import mlflow
import pytest
import worlds
from mlflow.tracking import MlflowClient

from dem_opt.study import mlflow_store
from dem_opt.tracking.mlflow_client import follow_artifacts

SEARCH = {"algorithm": "random", "trials": 2}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def locations(client: MlflowClient, experiment: str) -> list[str]:
    """Every place of files that MLflow tells."""
    record = client.get_experiment_by_name(experiment)
    runs = client.search_runs([record.experiment_id])
    versions = client.search_model_versions(f"name = '{experiment}'")
    models = client.search_logged_models([record.experiment_id])
    assert len(models) == len(versions)
    return [
        record.artifact_location,
        *(run.info.artifact_uri for run in runs),
        *(version.source for version in versions),
        *(client.get_model_version_download_uri(version.name, version.version) for version in versions),
        *(model.artifact_location for model in models),
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was run, tracked and exported."""
    path = worlds.study(tmp_path_factory.mktemp("exported") / "original", ("code", "math"), search=SEARCH)
    study = in_process.open_tracked(path)
    study.run()
    assert study.export(path.parent / "best").version == "1"
    return path.parent


CHANGES = {
    "copied": lambda original, new: shutil.copytree(original, new),
    "moved": lambda original, new: original.rename(new),
    "copied into itself": lambda original, new: shutil.copytree(original, new),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copied_or_moved_study_stands_on_its_own(exported: Path, tmp_path: Path, change: str) -> None:
    original = tmp_path / "study"
    shutil.copytree(exported, original)
    in_process.open_tracked(original / "study.yaml").sync()
    new = {"copied into itself": original / "back up"}.get(change, tmp_path / "n%65w #1?")
    before = contents(original) if change.startswith("copied") else {}
    CHANGES[change](original, new)

    worlds.study(new, ("code", "math"), search=SEARCH | {"trials": 4})
    study = in_process.open_tracked(new / "study.yaml")
    study.run()
    version = study.export(new / "again").version

    after = {file: data for file, data in contents(original).items() if not (original / file).is_relative_to(new)}
    assert after == {file: data for file, data in before.items()}
    shutil.rmtree(original, ignore_errors=True) if change == "copied" else None
    client = MlflowClient(study.config.tracking.uri)
    places = locations(client, "tiny")
    assert all(place.startswith((new / "runs/tiny/artifacts").as_uri()) for place in places)
    assert str(client.get_model_version_by_alias("tiny", "champion").version) == version
    parent = next(run for run in client.search_runs(["1"]) if "dem_opt.study" in run.data.tags)
    assert Path(client.download_artifacts(parent.info.run_id, "study.yaml")).read_text()


def test_the_champion_of_a_copy_is_downloaded_with_the_original_gone(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, new = tmp_path / "copied", tmp_path / "new"
    shutil.copytree(exported, copied)
    in_process.open_tracked(copied / "study.yaml").sync()
    copied.rename(new)
    study = in_process.open_tracked(new / "study.yaml")
    follow_artifacts(mlflow_store(study.config))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.config.tracking.uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(tmp_path / "got")))
    assert (folder / "model.safetensors").read_bytes() == (new / "best/model.safetensors").read_bytes()
    assert not copied.exists()


def test_another_output_in_the_study_file_moves_no_files(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(exported, folder)
    tracking = {"uri": "sqlite:///runs/tiny/mlflow.db"}
    path = worlds.study(folder, ("code", "math"), search=SEARCH, tracking=tracking)
    in_process.open_tracked(path).sync()
    before = (folder / "runs/tiny/artifacts").as_uri()
    for output in ("runs/other", "runs", "elsewhere"):
        worlds.study(
            folder,
            ("code", "math"),
            search=SEARCH,
            tracking=tracking,
            output=output,
            storage="sqlite:///runs/tiny/study.db",
        )
        study = in_process.open_tracked(path)
        assert study.sync()
        assert all(place.startswith(before) for place in locations(MlflowClient(study.config.tracking.uri), "tiny"))
