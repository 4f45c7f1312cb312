"""How many residents a cluster holds, and what each asks of it."""

from collections.abc import Mapping, Sequence

from dem_opt.errors import InputError

Resources = Mapping[str, float]
"""A node's, or what is asked of it: how much of what, "CPU" and "GPU"."""


def share(nodes: Sequence[Resources], residents: int | None) -> tuple[int, dict[str, int]]:
    """How many residents, and what each asks of Ray, given the resources of the nodes.

    Without a number: one for each GPU, else one for each node, with all the CPUs of the smallest.  Residents on CPUs
    divide them evenly; beside GPUs a share of the CPUs is left for the driver.  Raises InputError for more residents
    than there are GPUs, or else CPUs.
    """
    if gpus := sum(_count(node, "GPU") for node in nodes):
        count = residents or gpus
        if count > gpus:
            mend = f"the cluster has {gpus} GPUs, one for each resident"
            raise InputError(None, "compute.residents", residents, mend)
        able = [(_count(node, "CPU"), min(_count(node, "GPU"), count)) for node in nodes if _count(node, "GPU")]
        return count, {"num_gpus": 1, "num_cpus": max(min(cpus // (beside + 1) for cpus, beside in able), 1)}
    cpus_N = [cpus for node in nodes if (cpus := _count(node, "CPU"))] or [1]
    count = residents or len(cpus_N)
    if count > sum(cpus_N):
        mend = f"the cluster has {sum(cpus_N)} CPUs, at least one for each resident"
        raise InputError(None, "compute.residents", residents, mend)
    each = next(each for each in range(max(cpus_N), 0, -1) if sum(cpus // each for cpus in cpus_N) >= count)
    return count, {"num_gpus": 0, "num_cpus": each}


def _count(node: Resources, kind: str) -> int:
    return int(node.get(kind, 0))
