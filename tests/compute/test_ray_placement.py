"""Where workers go on a cluster: how many, and what each asks of a node."""

import re

import pytest

from dem_opt.compute.ray_placement import job_share, share
from dem_opt.errors import InputError

BOX = {"CPU": 16, "GPU": 8}
LAPTOP = {"CPU": 8}


@pytest.mark.parametrize(
    ("nodes", "workers", "devices", "count", "resources"),
    [
        ([LAPTOP], None, 1, 1, {"num_gpus": 0, "num_cpus": 8}),
        ([LAPTOP], 3, 1, 3, {"num_gpus": 0, "num_cpus": 2}),
        ([LAPTOP, {"CPU": 4}], None, 1, 2, {"num_gpus": 0, "num_cpus": 4}),
        # Eight and four hold three of four each, but of five processors only one.
        ([LAPTOP, {"CPU": 4}], 3, 1, 3, {"num_gpus": 0, "num_cpus": 4}),
        ([{}, LAPTOP], None, 1, 1, {"num_gpus": 0, "num_cpus": 8}),
        ([BOX], None, 1, 8, {"num_gpus": 1, "num_cpus": 1}),
        ([BOX], 2, 1, 2, {"num_gpus": 1, "num_cpus": 5}),
        ([BOX], None, 4, 2, {"num_gpus": 4, "num_cpus": 5}),
        # Three of eight leave two over: a worker does not reach across nodes.
        ([BOX, BOX], None, 3, 4, {"num_gpus": 3, "num_cpus": 5}),
        ([{"CPU": 4}, {"CPU": 2, "GPU": 1}], None, 1, 1, {"num_gpus": 1, "num_cpus": 1}),
    ],
)
def test_workers_fit_their_nodes(nodes, workers, devices, count, resources):
    assert share(nodes, workers, devices) == (count, resources)
    kinds = {"num_gpus": "GPU", "num_cpus": "CPU"}
    needed = {kinds[kind]: number for kind, number in resources.items() if number}
    room = [min(int(node.get(kind, 0)) // number for kind, number in needed.items()) for node in nodes]
    assert sum(room) >= count


@pytest.mark.parametrize(
    ("nodes", "workers", "devices", "said"),
    [
        ([LAPTOP], 9, 1, "compute.workers = 9: the cluster has 8 CPUs, at least one for each worker"),
        ([BOX], 9, 1, "compute.workers = 9: the cluster has 8 GPUs, one for each worker"),
        ([BOX, BOX], 5, 3, "compute.workers = 5: the cluster has 16 GPUs, 3 of one node for each worker"),
        ([BOX], None, 9, "compute.gpus_per_worker = 9: the cluster has 8 GPUs on a node: write at most so many"),
        ([LAPTOP], None, 2, "compute.gpus_per_worker = 2: the cluster has no GPU: leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(nodes, workers, devices, said):
    with pytest.raises(InputError, match=re.escape(said)):
        share(nodes, workers, devices)


@pytest.mark.parametrize(
    ("nodes", "parts", "gpus", "resources"),
    [
        ([LAPTOP], 3, None, {"num_gpus": 0, "num_cpus": 2}),
        ([LAPTOP], 99, None, {"num_gpus": 0, "num_cpus": 1}),
        # Twelve in all, of which one node has eight.
        ([LAPTOP, {"CPU": 4}], 1, None, {"num_gpus": 0, "num_cpus": 8}),
        ([LAPTOP, {"CPU": 4}], 3, None, {"num_gpus": 0, "num_cpus": 4}),
        ([{}, LAPTOP], 1, None, {"num_gpus": 0, "num_cpus": 8}),
        ([BOX, LAPTOP], 1, None, {"num_gpus": 1, "num_cpus": 16}),
        # The node with the GPU is not the one with the CPUs.
        ([LAPTOP, {"CPU": 2, "GPU": 1}], 1, None, {"num_gpus": 1, "num_cpus": 2}),
        ([LAPTOP, {"CPU": 2, "GPU": 1}], 1, 0, {"num_gpus": 0, "num_cpus": 8}),
        ([BOX, BOX], 2, 8, {"num_gpus": 8, "num_cpus": 16}),
    ],
)
def test_a_job_fits_a_node(nodes, parts, gpus, resources):
    assert job_share(nodes, parts, gpus) == resources
    needed = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    assert any(all(node.get(kind, 0) >= number for kind, number in needed.items()) for node in nodes)


@pytest.mark.parametrize(("nodes", "gpus", "most"), [([LAPTOP], 1, 0), ([BOX, BOX], 9, 8)])
def test_a_job_that_fits_no_node_is_refused(nodes, gpus, most):
    with pytest.raises(InputError, match=f"fine_tuning.gpus = {gpus}: the cluster has {most} GPUs on a node"):
        job_share(nodes, 1, gpus)
