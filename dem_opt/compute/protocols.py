"""What a pool and its surroundings promise, whoever keeps it."""

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
    """What a pool keeps many of: a worker."""

    def evaluate(self, request: Request) -> Evaluation:
        """Scores for a request; raises EvaluationError where there are none."""


class Pool(Protocol):
    """Takes requests and gives every one back once, with its answer."""

    @property
    def capacity(self) -> int:
        """How many requests are worked on at once."""

    def submit(self, request: Request) -> None:
        """Take a request; returns at once."""

    def next_done(self) -> Done | None:
        """Wait for the next answer; None where a moment passed without one.  Only while a request is out."""

    def withdraw(self) -> set[int]:
        """Take back the requests that nobody works on yet; their tickets."""

    def close(self) -> None:
        """Let all workers go."""


Build = Callable[[WorkerSpec], Evaluator]
"""Makes a worker where it is to live."""


class Compute(Protocol):
    """Where workers and jobs live; a context, entered before use."""

    def __enter__(self) -> Self:
        """Be ready to start workers."""

    def __exit__(self, *exception: object) -> None:
        """Let go of what was started."""

    @property
    def device(self) -> str:
        """The kind of device that workers get: "cpu" or "cuda"."""

    def workers(self, build: Build, spec: WorkerSpec, progress: Progress) -> Pool:
        """A pool of workers that are ready; `progress` hears of those that die or join."""

    def jobs(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], parts: int = 0, gpus: int | None = None
    ) -> Iterator[tuple[Job, Result | Exception]]:
        """Run an importable function on every job; yields (job, result) as they end.

        A job's exception is yielded in place of its result, so that the others go on.

        parts  in how many parts the CPUs are divided, one for each job: the number of jobs unless given
        gpus   GPUs of each job: one where there are any unless given
        """


def answer(worker: Evaluator, request: Request) -> Evaluation | Failure:
    """What a worker answers; that a composite can't be scored is an answer too."""
    try:
        return worker.evaluate(request)
    except EvaluationError as error:
        return Failure(str(error))
