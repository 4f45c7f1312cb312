"""Placement of workers and jobs on a cluster: the number that fits, and the resources that each requests."""

from collections.abc import Mapping, Sequence

from dem_opt.errors import InputError

Resources = Mapping[str, float]
"""Ray's resources of a node by kind, among them "CPU" and "GPU"."""


def share(nodes: Sequence[Resources], workers: int | None, devices: int = 1) -> tuple[int, dict[str, int]]:
    """Return the number of workers, and the options of a Ray actor that each needs.

    A worker lives on one node.  Workers on CPUs divide them evenly; beside GPUs a share of the CPUs is left for the
    driver.

    Args:
        nodes: Resources of each node.
        workers: Number of workers; None for as many as there are GPUs for, without GPUs one for each node.
        devices: GPUs of a worker.

    Raises:
        InputError: There is no room for so many workers, or for so many GPUs on one node.
    """
    gpus_N = [_count(node, "GPU") for node in nodes]
    if devices > max([*gpus_N, 1]):
        mend = f"{max(gpus_N)} GPUs on a node: write at most so many" if any(gpus_N) else "no GPU: leave it out"
        raise InputError(None, "compute.gpus_per_worker", devices, f"the cluster has {mend}")
    if any(gpus_N):
        return _on_gpus(nodes, workers, devices)
    cpus_N = [cpus for node in nodes if (cpus := _count(node, "CPU"))] or [1]
    count = workers or len(cpus_N)
    if count > sum(cpus_N):
        mend = f"the cluster has {sum(cpus_N)} CPUs, at least one for each worker"
        raise InputError(None, "compute.workers", workers, mend)
    # The largest number of CPUs of which the nodes together have `count` portions.
    each = next(each for each in range(max(cpus_N), 0, -1) if sum(cpus // each for cpus in cpus_N) >= count)
    return count, {"num_gpus": 0, "num_cpus": each}


def _on_gpus(nodes: Sequence[Resources], workers: int | None, devices: int) -> tuple[int, dict[str, int]]:
    room_N = [_count(node, "GPU") // devices for node in nodes]
    count = workers or sum(room_N)
    if count > sum(room_N):
        gpus, each = sum(_count(node, "GPU") for node in nodes), "one" if devices == 1 else f"{devices} of one node"
        mend = f"the cluster has {gpus} GPUs, {each} for each worker"
        raise InputError(None, "compute.workers", workers, mend)
    # Any node may get as many workers as it has room for: each then takes an equal share, and the driver one.
    hosts = [(_count(node, "CPU"), min(room, count)) for node, room in zip(nodes, room_N, strict=True) if room]
    return count, {"num_gpus": devices, "num_cpus": max(min(cpus // (beside + 1) for cpus, beside in hosts), 1)}


def job_share(nodes: Sequence[Resources], parts: int, gpus: int | None = None) -> dict[str, int]:
    """Return the options of a Ray task for each of `parts` jobs that divide the CPUs of a cluster.

    A job lives on one node: Ray would let one that asks for more than any node has wait for ever.

    Args:
        nodes: Resources of each node.
        parts: Number of jobs at a time.
        gpus: GPUs of each job; by default one where there are any.

    Raises:
        InputError: No node has so many GPUs.
    """
    most = max((_count(node, "GPU") for node in nodes), default=0)
    requested = min(most, 1) if gpus is None else gpus
    if requested > most:
        mend = f"the cluster has {most} GPUs on a node; ask for as many at most"
        raise InputError(None, "fine_tuning.gpus", gpus, mend)
    cpus = sum(_count(node, "CPU") for node in nodes) // parts
    largest = max((_count(node, "CPU") for node in nodes if _count(node, "GPU") >= requested), default=1)
    return {"num_gpus": requested, "num_cpus": max(min(cpus, largest), 1)}


def _count(node: Resources, kind: str) -> int:
    return int(node.get(kind, 0))
