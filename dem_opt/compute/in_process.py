"""One worker in this process, and jobs one after the other: for tests, and for studies in a notebook."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from dem_opt.compute.protocols import Build, Done, Job, Pool, Result, answer
from dem_opt.errors import InputError
from dem_opt.progress import Progress
from dem_opt.types import Request, WorkerSpec


class InProcessPool:
    """One worker in this process, loaded at once; requests are answered in order, when waited for."""

    def __init__(self, build: Build, spec: WorkerSpec) -> None:
        self._worker = build(spec)
        self._waiting: deque[Request] = deque()

    @property
    def capacity(self) -> int:
        """One."""
        return 1

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def next_done(self) -> Done:
        """Answer the oldest request."""
        request = self._waiting.popleft()
        return request, answer(self._worker, request)

    def withdraw(self) -> set[int]:
        """Take back all requests."""
        tickets = {request.ticket for request in self._waiting}
        self._waiting.clear()
        return tickets

    def close(self) -> None:
        """Nothing to let go."""


class InProcessCompute:
    """This process: one worker on the CPU, jobs one after the other."""

    device = "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def workers(self, build: Build, spec: WorkerSpec, progress: Progress) -> Pool:
        """One worker."""
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
