"""The plan's arithmetic for large models on large devices, 8 GiB of which are left in reserve."""

import json
from dataclasses import replace

import pytest
import worlds
import yaml

from dem_opt.checkpoints.architecture import read_architecture
from dem_opt.checkpoints.files import read_header
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.planning.hardware import Machine
from dem_opt.planning.plan import Plan, make_plan, refuse_too_large

GIB = 2**30
RESERVE = 8 * GIB


@pytest.fixture(scope="module", params=worlds.LLAMAS)
def size(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    worlds.save_sparse(folder / "base", 6, request.param)
    return request.param, folder, read_architecture(read_header(folder / "base", "base"))


def plan_of(size, fine_tunes: int, total: int, **sections) -> Plan:
    """The plan of a base and so many fine-tunes of it in bfloat16 on one GPU."""
    _, folder, architecture = size
    names = [f"tune{number}" for number in range(fine_tunes)]
    distributions = {name: {"checkpoint": name, "validation": "texts.jsonl"} for name in names}
    study = {"name": "large", "base": "base", "distributions": distributions, **sections}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    base = read_header(folder / "base", "base")
    headers = {"base": base} | {name: replace(base, folder=folder / name) for name in names}
    model = json.loads((folder / "base/config.json").read_text())
    return make_plan(architecture, headers, model, load(folder / "study.yaml"), Machine("cuda", 1, total, total))


FITTING = {
    ("7B", 80, "exact"): 3,
    ("7B", 80, "int8"): 7,
    ("7B", 139, "exact"): 8,
    ("7B", 139, "int8"): 16,
    ("13B", 139, "exact"): 3,
    ("13B", 139, "int8"): 6,
}
"""Vectors that stay on a device of so many GiB beside base and live model in bfloat16."""


@pytest.mark.parametrize("vectors", ["exact", "int8"])
@pytest.mark.parametrize("device", [80, 139])
def test_as_many_vectors_fit_as_are_promised_and_no_more(size, device, vectors):
    """7B has 6.74 billion parameters: 3 + 2 of 13.5 GB, or 2 of 13.5 and 7 of 6.7, into 72 GiB, which are 77.3 GB."""
    total = device * GIB - RESERVE
    promised = FITTING.get((size[0], device, vectors))
    if promised is None:
        pytest.skip("nothing is promised")
    most, more = (plan_of(size, count, total, evaluation={"vectors": vectors}) for count in (promised, promised + 1))
    refuse_too_large(most, "study.yaml")
    assert not most.memory.streamed
    if vectors == "exact":
        assert more.memory.streamed
    else:
        with pytest.raises(InputError, match="are needed"):
            refuse_too_large(more, "study.yaml")


@pytest.mark.parametrize("device", [80, 139])
def test_one_more_fits_where_the_base_stays_on_the_host(size, device):
    """Which it may where coefficients sum to 1: then only the base itself reads it."""
    total, promised = device * GIB - RESERVE, FITTING.get((size[0], device, "exact"))
    if promised is None:
        pytest.skip("nothing is promised")
    plan, more = (plan_of(size, count, total) for count in (promised + 1, promised + 2))
    refuse_too_large(plan, "study.yaml")
    assert [folder.name for folder in plan.memory.streamed] == ["base"]
    assert len(more.memory.streamed) == 2 and more.memory.streamed[0].name == "base"
    free = plan_of(size, promised + 1, total, simplex={"total": [0, 1]})
    assert [folder.name for folder in free.memory.streamed] == [f"tune{promised}"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_checkpoints_stay_in_files_until_the_rest_fits_and_bytes_are_of_the_rest(size, count):
    """With a byte more than is needed nothing stays there; with less than the live model takes, nothing helps."""
    whole = plan_of(size, count, 10**15)
    checkpoint_bytes = whole.memory.stored // (count + 1)
    smallest = (
        whole.memory.peak
        - whole.memory.activations
        + plan_of(size, count, whole.memory.live + 10**9).memory.activations
    )
    for missing in range(1, count + 1):
        plan = plan_of(size, count, smallest - (missing - 1) * checkpoint_bytes - 1)
        assert len(plan.memory.streamed) == missing and plan.memory.stored == (count + 1 - missing) * checkpoint_bytes
        assert plan.work.merge_bytes == whole.work.merge_bytes
    assert not whole.memory.streamed
    hopeless = plan_of(size, count, whole.memory.live)
    assert not hopeless.memory.streamed and hopeless.memory.stored == whole.memory.stored
