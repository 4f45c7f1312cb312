"""Laws of the vectors' geometry: inner products by hand, adapters and dtypes like what they make, kept by content."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import worlds
from recorded import RecordedProgress
from safetensors.torch import load_file

from dem_opt.analysis.stored_vectors import FILE, keep, recall_vectors
from dem_opt.analysis.vector_geometry import BLOCK, inner_products, measure_once, vectors_of
from dem_opt.checkpoints.files import content_hash
from dem_opt.types import StoredModel, VectorGeometry

EXPERTS = {"a": "hash a", "b": "hash b"}
VECTORS = VectorGeometry(("a", "b"), ((4.0, -3.0), (-3.0, 9.0)))


def test_norms_and_cosines_by_hand() -> None:
    """|a| = 2, |b| = 3, cos = -3 / 6."""
    assert VECTORS.norms == (2.0, 3.0)
    assert VECTORS.cosine(0, 1) == VECTORS.cosine(1, 0) == -0.5
    assert VECTORS.cosine(0, 0) == 1.0


def test_a_zero_vector_has_no_direction() -> None:
    vectors = VectorGeometry(("a", "b"), ((0.0, 0.0), (0.0, 1.0)))
    assert vectors.cosine(0, 1) is None and vectors.cosine(0, 0) is None


def test_inner_products_over_several_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *others = torch.randn(4, 2 * BLOCK + 7, generator=generator, dtype=torch.float64)
    wanted = torch.stack(others) - base
    result = inner_products(base.float(), [other.float() for other in others])
    assert torch.allclose(result, wanted @ wanted.T, rtol=1e-5)


def test_vectors_of_checkpoints_are_those_of_their_files(tmp_path: Path) -> None:
    worlds.study(tmp_path, ("code", "math"))
    folders = {name: tmp_path / "models" / name for name in ("base", "code", "math")}
    stored = {name: StoredModel(folder, content_hash(folder)) for name, folder in folders.items()}
    result = vectors_of(stored["base"], {name: stored[name] for name in ("code", "math")})
    flat = {
        name: torch.cat([tensor.reshape(-1) for _, tensor in sorted(load_file(folder / "model.safetensors").items())])
        for name, folder in folders.items()
    }
    for (i, row), (j, column) in product(enumerate(result.names), repeat=2):
        wanted = torch.dot((flat[row] - flat["base"]).double(), (flat[column] - flat["base"]).double())
        assert result.inner[i][j] == pytest.approx(float(wanted), rel=1e-5)


def test_vectors_are_measured_once_for_their_contents(tmp_path: Path) -> None:
    worlds.study(tmp_path, ("code", "math"))
    folders = {name: tmp_path / "models" / name for name in ("base", "code", "math")}
    stored = {name: StoredModel(folder, content_hash(folder)) for name, folder in folders.items()}
    base, progress = stored.pop("base"), RecordedProgress()
    for _ in range(2):
        measure_once(base, stored, tmp_path / "out", progress)
    assert len(progress.phases) == 1 and [path.name for path in (tmp_path / "out").iterdir()] == [FILE]
    swapped = {"math": stored["code"].content, "new": stored["math"].content}
    result = recall_vectors(base.content, swapped, tmp_path / "out")
    assert result is not None and result.names == ("math", "new")
    assert result.inner == vectors_of(base, stored).inner, "found by content, whatever the names"
    assert recall_vectors(base.content, swapped | {"third": "unknown"}, tmp_path / "out") is None
    assert recall_vectors("another base", swapped, tmp_path / "out") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"base": "base", "contents": ["hash a"], "inner": []}'])
def test_what_cannot_be_read_is_not_there(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert recall_vectors("base", {"a": "hash a"}, tmp_path) is None


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    keep(VECTORS, "base", EXPERTS, tmp_path)
    assert recall_vectors("base", EXPERTS, tmp_path) == VECTORS
    assert recall_vectors("base", {"b": "hash b"}, tmp_path) == VectorGeometry(("b",), ((9.0,),))
    assert json.loads((tmp_path / FILE).read_text())["contents"] == ["hash a", "hash b"]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep(VECTORS, "base", EXPERTS, tmp_path / "file")
    assert recall_vectors("base", EXPERTS, tmp_path / "file") is None
