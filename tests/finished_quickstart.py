"""A finished quickstart, which tests of the docs copy: DEM_OPT_QUICKSTART names it, ./quickstart unless it is set."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("DEM_OPT_QUICKSTART") or ROOT / "quickstart").absolute()

ABSOLUTE_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database that hold them: a copy would write into the original's folder."""


def copy_quickstart(folder: Path) -> None:
    """Copy the quickstart into a new folder that shares nothing with it."""
    if not (FOLDER / "best").is_dir():
        pytest.fail(f"no finished quickstart at {FOLDER}: make quickstart, or set DEM_OPT_QUICKSTART")
    shutil.copytree(FOLDER, folder)
    with closing(sqlite3.connect(folder / "runs/quickstart/mlflow.db")) as database, database:
        locations = database.execute("SELECT artifact_location FROM experiments WHERE name <> 'Default'")
        made_in = {location.removesuffix("/runs/quickstart/artifacts") for (location,) in locations}
        for table, column in ABSOLUTE_PATHS:
            moved = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            database.executemany(moved, [(before, folder.as_uri()) for before in made_in])
