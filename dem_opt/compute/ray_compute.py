"""Run workers and jobs on Ray: on the cluster that this process is connected to, or one that is started or joined."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self

from dem_opt.compute.protocols import Build, Job, Pool, Result
from dem_opt.compute.ray_placement import job_share
from dem_opt.compute.ray_pool import RayPool, alive_nodes, first_line, import_ray
from dem_opt.compute.ray_session import free_shared_memory, private_ray, shared_memory_warning, token_warning
from dem_opt.config import ComputeSection
from dem_opt.errors import InputError
from dem_opt.progress import Progress, current_progress
from dem_opt.types import WorkerSpec

CONNECT_SECONDS = 5.0
"""Seconds in which a cluster's address must accept a connection."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "GOMP_SPINCOUNT": "1000",
}
"""Environment of Ray and its workers where the user has not set it.

No usage reports; Ray's upcoming default for tasks without a GPU; and workers of the driver's
priority: at Ray's niceness of 15 the driver's own work stalls a merge's threads (64 ms against 6 for a million
parameters on two cores).  OpenMP's threads wait for each other at every product: they spin for microseconds, then
sleep.  By default they spin for milliseconds, which is long where the one that they wait for can't run because other
processes have the cores (`benchmarks/threads.py`).
"""


def _run_job(function: Callable[[Job], Result], threads: int, job: Job) -> Result:
    """Run a job with its share of CPU threads; Ray reuses processes, so the number has to be set each time."""
    import torch

    torch.set_num_threads(threads)
    return function(job)


class RayCompute:
    """Compute on Ray: the cluster that this process is connected to already, else the one that `settings.ray` names.

    "local" starts a private Ray on this machine, "auto" looks for this machine's cluster, anything else is an address.
    To keep a connection between the cells of a notebook, call `ray.init` first; one that is made here ends with the
    context.
    """

    def __init__(self, settings: ComputeSection) -> None:
        self._settings = settings
        self._connection = ExitStack()

    def __enter__(self) -> Self:
        ray = self._ray = import_ray()
        if not ray.is_initialized():
            self._connect(self._settings.ray)
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    @property
    def device(self) -> str:
        """The kind of device that workers get: cuda if the cluster has a GPU."""
        return "cuda" if self._ray.cluster_resources().get("GPU") else "cpu"

    def workers(self, build: Build, spec: WorkerSpec, progress: Progress) -> Pool:
        """Start workers as actors."""
        count = None if self._settings.workers == "auto" else self._settings.workers
        return RayPool(build, spec, count, self._settings.patience, progress)

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Run jobs as Ray tasks, which wait for their resources; a job whose process dies twice is a RuntimeError.

        Raises:
            InputError: No node has as many GPUs as a job requests.
        """
        ray = self._ray
        options = job_share(alive_nodes(ray), max(parts or len(jobs), 1), gpus)
        task = ray.remote(_run_job).options(**options, max_retries=1)
        running = {task.remote(function, options["num_cpus"], job): job for job in jobs}
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            try:
                yield job, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                yield job, error.cause
            except ray.exceptions.RayError as error:
                yield job, RuntimeError(f"its process ended ({first_line(error)})")

    def _connect(self, address: str) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        for warning in ray_warnings(self._settings):
            current_progress().warning(warning)
        handler = signal.getsignal(signal.SIGTERM)
        if address == "local":
            self._connection.enter_context(private_ray(self._ray))
        else:
            _join(self._ray, address)
            self._connection.callback(self._ray.shutdown)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own handler would exit at once


def ray_warnings(settings: ComputeSection) -> list[str]:
    """Problems of this machine that a study's Ray survives, each with its mend."""
    warning = shared_memory_warning(free_shared_memory()) if settings.ray == "local" else token_warning()
    return [] if warning is None else [warning]


def _join(ray: Any, address: str) -> None:
    """Connect to a cluster; InputError if none answers, it has other versions, or it refuses this user's token."""
    _check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        mend = f"no Ray answers there ({first_line(error)})"
        raise InputError(None, "compute.ray", address, mend) from None
    except RuntimeError as error:  # its text has a line for each version of Ray and Python, there and here
        mend = f"can't be joined from here ({' '.join(str(error).split())})"
        raise InputError(None, "compute.ray", address, mend) from None
    except ray.exceptions.AuthenticationError:
        mend = (
            "needs the token of its cluster, in ~/.ray/auth_token or RAY_AUTH_TOKEN; a study's own Ray takes no other"
        )
        raise InputError(None, "compute.ray", address, mend) from None


def _check_address(address: str) -> None:
    """Raise InputError if nothing listens at HOST:PORT; Ray itself would try for minutes, then end the process."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(None, "compute.ray", address, f"nothing listens there ({error})") from None
