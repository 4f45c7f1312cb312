"""Many residents as Ray actors (in-process for tests); other importable jobs too."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic, sleep
from typing import Any, Protocol, Self, TypeVar

from dem_opt.config import Compute as ComputeSettings
from dem_opt.errors import EvaluationError, InputError
from dem_opt.records import Evaluation, Failure, Request, ResidentSpec

ATTEMPTS = 3
"""How often a request is sent out before the death of its resident counts as its failure."""

KNOCK = 5.0
"""Seconds in which a cluster's address must answer."""

PAUSE = 0.2
"""Seconds between two questions whether a resident that died is back."""


class Worker(Protocol):
    """What a pool keeps many of: a resident."""

    def evaluate(self, request: Request) -> Evaluation:
        """Scores for a request; raises EvaluationError where there are none."""


class Pool(Protocol):
    """Takes requests and gives every one back once, with its answer."""

    @property
    def capacity(self) -> int:
        """How many requests are worked on at once."""

    def submit(self, request: Request) -> None:
        """Take a request; returns at once."""

    def next_done(self) -> tuple[Request, Evaluation | Failure]:
        """Wait for the next answer.  Only while a request is out."""

    def close(self) -> None:
        """Let all residents go."""


SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
"""Ray's environment where the user has not set it.

No reports to anybody; its coming rule for tasks without a GPU; and residents as urgent as the driver: at Ray's niceness
of 15 the driver's small work stalls the threads of a merge (64 ms against 6 for a million parameters on two cores).
"""

Build = Callable[[ResidentSpec], Worker]
Job = TypeVar("Job")
Result = TypeVar("Result")


def _answer(worker: Worker, request: Request) -> Evaluation | Failure:
    try:
        return worker.evaluate(request)
    except EvaluationError as error:
        return Failure(str(error))


class InProcessPool:
    """One resident in this process, loaded at once; requests are answered in order, when waited for."""

    def __init__(self, build: Build, spec: ResidentSpec) -> None:
        self._worker = build(spec)
        self._waiting: deque[Request] = deque()

    @property
    def capacity(self) -> int:
        """One."""
        return 1

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def next_done(self) -> tuple[Request, Evaluation | Failure]:
        """Answer the oldest request."""
        request = self._waiting.popleft()
        return request, _answer(self._worker, request)

    def close(self) -> None:
        """Nothing to let go."""


class _Actor:
    """One resident in a process of its own.

    What it holds comes by `load`, not by its constructor: Ray keeps no large constructor arguments for a restart.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def load(self, build: Build, spec: ResidentSpec) -> int:
        """Load, where that is not done; the number of CPU threads that torch uses here."""
        import torch

        if self._worker is None:
            self._worker = build(spec)
        return torch.get_num_threads()

    def evaluate(self, request: Request) -> Evaluation | Failure | None:
        """An answer; None after a restart, before it is loaded again.  Bugs are exceptions."""
        return None if self._worker is None else _answer(self._worker, request)


class RayPool:
    """Residents as Ray actors: one for each GPU, or on CPUs, which they divide among them evenly.

    A resident that dies is restarted by Ray and its requests are sent out again, up to ATTEMPTS times each.
    Raises InputError where residents are not ready within `patience` seconds, and says what is missing.
    """

    def __init__(self, build: Build, spec: ResidentSpec, residents: int | None, patience: float) -> None:
        ray = self._ray = _import_ray()
        count, resources = _share(ray.cluster_resources(), residents)
        self._content, self._patience = (build, ray.put(spec)), patience
        actor = ray.remote(_Actor).options(max_restarts=-1, max_task_retries=0, **resources)
        self._actors = [actor.remote() for _ in range(count)]
        self._running: dict[Any, tuple[Any, Request, int]] = {}
        self.threads = self._wait_until_ready(resources)

    @property
    def capacity(self) -> int:
        """The number of residents."""
        return len(self._actors)

    def submit(self, request: Request) -> None:
        """Send a request to the resident that has the fewest."""
        self._send(request, attempt=1)

    def next_done(self) -> tuple[Request, Evaluation | Failure]:
        """The next answer of any resident, the oldest request first where several are ready."""
        while True:
            (done, *_), _ = self._ray.wait(list(self._running), num_returns=1)
            actor, request, attempt = self._running.pop(done)
            try:
                answer: Evaluation | Failure | None = _get(self._ray, done)
            except self._ray.exceptions.RayActorError as error:
                if attempt == ATTEMPTS:
                    return request, Failure(f"its resident died {ATTEMPTS} times: {_first_line(error)}")
                attempt, answer = attempt + 1, None
            if answer is not None:
                return request, answer
            self._revive(actor)
            self._send(request, attempt)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            self._ray.kill(actor)

    def _send(self, request: Request, attempt: int) -> None:
        busy = [actor for actor, _, _ in self._running.values()]
        actor = min(self._actors, key=busy.count)
        self._running[actor.evaluate.remote(request)] = (actor, request, attempt)

    def _revive(self, actor: Any) -> None:
        """Wait until a resident that died is back and loaded: until then whatever is sent to it comes back at once."""
        deadline = monotonic() + self._patience
        while True:
            try:
                _get(self._ray, actor.load.remote(*self._content))
                return
            except self._ray.exceptions.RayActorError:
                if monotonic() > deadline:
                    raise
                sleep(PAUSE)

    def _wait_until_ready(self, resources: dict[str, int]) -> list[int]:
        pending = [actor.load.remote(*self._content) for actor in self._actors]
        done, late = self._ray.wait(pending, num_returns=len(pending), timeout=self._patience)
        threads = [_get(self._ray, reference) for reference in done]
        if late:
            raise InputError(
                None,
                "compute.patience",
                self._patience,
                f"{len(late)} of {len(pending)} residents were not ready in this many seconds; each needs {resources}, "
                f"free now: {self._ray.available_resources()}",
            )
        return threads


def _import_ray() -> Any:
    """Ray, whose own types don't know what its decorators make."""
    import ray

    return ray


def _get(ray: Any, reference: Any) -> Any:
    """The value of a Ray reference; an exception of our own code comes out as it was raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _share(cluster: dict[str, float], residents: int | None) -> tuple[int, dict[str, int]]:
    """How many residents, and what each asks of Ray, given the cluster's resources.

    Without a number: one for each GPU, else one with all the CPUs of a node's average.
    """
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
    if gpus:
        count = residents or gpus
        if count > gpus:
            raise InputError(
                None, "compute.residents", residents, f"the cluster has {gpus} GPUs, one for each resident"
            )
        return count, {"num_gpus": 1, "num_cpus": max(cpus // (count + 1), 1)}
    count = residents or 1
    if count > cpus:
        raise InputError(
            None, "compute.residents", residents, f"the cluster has {cpus} CPUs, at least one for each resident"
        )
    return count, {"num_gpus": 0, "num_cpus": cpus // count}


class Compute(Protocol):
    """Where residents and jobs live; a context, entered before use."""

    def __enter__(self) -> Self:
        """Be ready to start residents."""

    def __exit__(self, *exception: object) -> None:
        """Let go of what was started."""

    @property
    def device(self) -> str:
        """The kind of device that residents get: "cpu" or "cuda"."""

    def residents(self, build: Build, spec: ResidentSpec) -> Pool:
        """A pool of residents that are ready."""

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Run an importable function on every job; yields (job, result) as they end.

        A job's exception is yielded in place of its result, so that the others go on.

        parts  in how many parts the CPUs are divided, one for each job: the number of jobs unless given
        gpus   GPUs of each job: one where there are any unless given
        """


class InProcessCompute:
    """This process: one resident on the CPU, jobs one after the other."""

    device = "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def residents(self, build: Build, spec: ResidentSpec) -> Pool:
        """One resident."""
        return InProcessPool(build, spec)

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Each job in turn."""
        for job in jobs:
            try:
                yield job, function(job)
            except (InputError, RuntimeError) as error:
                yield job, error


def _work(function: Callable[[Job], Result], threads: int, job: Job) -> Result:
    """A job with its share of CPU threads, whatever the process did before: Ray uses processes again."""
    import torch

    torch.set_num_threads(threads)
    return function(job)


class RayCompute:
    """Ray: the one this process is connected to already, or else `settings.ray`, left again at the end.

    "local" starts a Ray on this machine, "auto" looks for this machine's cluster, anything else is an address.
    """

    def __init__(self, settings: ComputeSettings) -> None:
        self._settings = settings
        self._connected_here = False

    def __enter__(self) -> Self:
        ray = self._ray = _import_ray()
        if not ray.is_initialized():
            self._connect(self._settings.ray)
            self._connected_here = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._connected_here:
            self._ray.shutdown()
            self._connected_here = False

    @property
    def device(self) -> str:
        """cuda where the cluster has a GPU."""
        return "cuda" if self._ray.cluster_resources().get("GPU") else "cpu"

    def residents(self, build: Build, spec: ResidentSpec) -> Pool:
        """Residents as actors."""
        count = None if self._settings.residents == "auto" else self._settings.residents
        return RayPool(build, spec, count, self._settings.patience)

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Jobs as Ray tasks, which wait for what they ask for.

        Raises InputError where the cluster has not the GPUs of one job.
        """
        ray, there = self._ray, self._ray.cluster_resources()
        cpus = max(int(there.get("CPU", 1)) // max(parts or len(jobs), 1), 1)
        asked = min(int(there.get("GPU", 0)), 1) if gpus is None else gpus
        if asked > there.get("GPU", 0):
            mend = f"the cluster has {there.get('GPU', 0):g} GPUs; ask for as many at most"
            raise InputError(None, "fine_tuning.gpus", asked, mend)
        task = ray.remote(_work).options(num_cpus=cpus, num_gpus=asked, max_retries=1)
        running = {task.remote(function, cpus, job): job for job in jobs}
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            try:
                yield job, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                yield job, error.cause
            except ray.exceptions.RayError as error:
                yield job, error

    def _connect(self, address: str) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        dashboard = {"include_dashboard": False} if address == "local" else {}
        _knock(address)
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **dashboard)
        except (ConnectionError, ValueError) as error:
            mend = f"no Ray answers there ({_first_line(error)})"
            raise InputError(None, "compute.ray", address, mend) from None


def _knock(address: str) -> None:
    """Whether anything listens at HOST:PORT; Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()
    except (OSError, OverflowError) as error:
        raise InputError(None, "compute.ray", address, f"nothing listens there ({error})") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
