"""The example notebook runs from top to bottom on a copy of a finished quickstart."""

from pathlib import Path

import nbformat
import pytest
from finished_quickstart import ROOT, copy_quickstart
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/examples/quickstart.ipynb"


@pytest.mark.docs
@pytest.mark.filterwarnings("default")  # of jupyter_client and its event loop
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "quickstart"
    copy_quickstart(folder)
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
