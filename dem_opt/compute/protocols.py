"""Protocols: an evaluator answers requests, a pool distributes them, a compute makes pools and runs jobs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

from dem_opt.errors import EvaluationError
from dem_opt.progress import Progress
from dem_opt.types import Evaluation, Failure, Request, WorkerSpec

Job = TypeVar("Job")
Result = TypeVar("Result")

Done = tuple[Request, Evaluation | Failure]
"""A request with its answer."""


class Evaluator(Protocol):
    """Answers requests: a worker, as a pool sees it."""

    def evaluate(self, request: Request) -> Evaluation:
        """Score a request.

        Raises:
            EvaluationError: The composite can't be scored.
        """


class Pool(Protocol):
    """Distributes requests over workers, and returns each exactly once with its answer."""

    @property
    def capacity(self) -> int:
        """Number of requests that are worked on at once."""

    def submit(self, request: Request) -> None:
        """Queue a request and return at once."""

    def next_done(self) -> Done | None:
        """Wait for the next answer, a moment at most; None if there was none.  Call only while a request is out."""

    def withdraw(self) -> set[int]:
        """Take back the requests that no worker has begun; returns their tickets."""

    def close(self) -> None:
        """End all workers."""


Build = Callable[[WorkerSpec], Evaluator]
"""Builds a worker in the process where it will live."""


class Compute(Protocol):
    """Where workers and jobs run; a context manager, entered before use."""

    def __enter__(self) -> Self:
        """Connect to whatever runs workers."""

    def __exit__(self, *exception: object) -> None:
        """Release what `__enter__` started."""

    @property
    def device(self) -> str:
        """The kind of device that workers get, "cpu" or "cuda"."""

    def workers(self, build: Build, spec: WorkerSpec, progress: Progress) -> Pool:
        """Start a pool of workers and wait until they are ready.

        Args:
            build: Builds a worker; importable, because it may be called in another process.
            spec: What every worker holds.
            progress: Receives loading, and notes and warnings about workers that die or join.
        """

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Run a function on every job and yield (job, result) pairs as they end.

        A job's exception is yielded in place of its result, so that the others continue.

        Args:
            function: An importable function.
            jobs: Its arguments.
            parts: Number of parts that the CPUs are divided into, one for each job; by default the number of jobs.
            gpus: GPUs of each job; by default one where there are any.
        """


def answer(worker: Evaluator, request: Request) -> Evaluation | Failure:
    """Evaluate a request; a composite that can't be scored is an answer, too, and no error of the pool."""
    try:
        return worker.evaluate(request)
    except EvaluationError as error:
        return Failure(str(error))
