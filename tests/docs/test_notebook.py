"""The example notebook runs from top to bottom, on the quickstart's study or on a tiny one."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
import worlds
from in_process import open_study
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/examples/quickstart.ipynb"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the quickstart's folder where DEM_OPT_QUICKSTART names one, else a tiny study that was run."""
    copy = tmp_path / "quickstart"
    if given := os.environ.get("DEM_OPT_QUICKSTART"):
        shutil.copytree(given, copy)
    else:
        open_study(worlds.study(copy, search={"algorithm": "random", "trials": 4})).run()
    return copy


@pytest.mark.filterwarnings("default")  # of jupyter_client and its event loop
def test_the_notebook_runs_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEM_OPT_QUICKSTART", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pages = [
        output["data"]["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    assert any("dem-opt-result" in page for page in pages), "the result is shown as a table"
    assert sum("dataframe" in page for page in pages) == 3


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
