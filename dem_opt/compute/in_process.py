"""Run one worker in this process, and jobs one after the other: for notebooks, debuggers and tests."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from dem_opt.compute.protocols import Build, Done, Job, Pool, Result, answer
from dem_opt.errors import InputError
from dem_opt.progress import Progress
from dem_opt.types import Request, WorkerSpec


class InProcessPool:
    """One worker in this process, which answers requests in their order when they are waited for."""

    def __init__(self, build: Build, spec: WorkerSpec) -> None:
        self._worker = build(spec)
        self._queue: deque[Request] = deque()

    @property
    def capacity(self) -> int:
        """One request at a time."""
        return 1

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._queue.append(request)

    def next_done(self) -> Done:
        """Answer the oldest request."""
        request = self._queue.popleft()
        return request, answer(self._worker, request)

    def withdraw(self) -> set[int]:
        """Take back all requests; returns their tickets."""
        tickets = {request.ticket for request in self._queue}
        self._queue.clear()
        return tickets

    def close(self) -> None:
        """Keep the worker for the garbage collector."""


class InProcessCompute:
    """Compute in this process: no Ray, no other processes, no ports.

    The simplest choice for a notebook (`Study.load(path, compute=InProcessCompute())`): breakpoints and exceptions stay
    in this process.  There is one worker, on this process's GPU if torch sees one, else on the CPU; `compute.workers`
    and `compute.ray` of the study file are ignored.
    """

    @property
    def device(self) -> str:
        """The kind of device that a worker in this process gets: cuda if torch sees a GPU."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def workers(self, build: Build, spec: WorkerSpec, progress: Progress) -> Pool:
        """Build one worker."""
        return InProcessPool(build, spec)

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Run each job in turn; `parts` and `gpus` have no meaning here."""
        for job in jobs:
            try:
                yield job, function(job)
            except (InputError, RuntimeError) as error:
                yield job, error
