"""A study's fine-tunings: which there are, which are wanted, run side by side and watched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

from dem_opt.checkpoints.locate import locate
from dem_opt.checkpoints.training_record import JOURNAL, read_journal
from dem_opt.compute import Compute
from dem_opt.config import StudyConfig
from dem_opt.data.tokenize import load_tokenizer
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError, TrainingError
from dem_opt.planning.inputs import check_origin
from dem_opt.progress import Phase, Progress
from dem_opt.tracking.job_runs import JobRun, Note
from dem_opt.training.fine_tune import FineTuned, FineTuneJob, fine_tune, is_wanted, job_identity
from dem_opt.training.lora import check_lora
from dem_opt.training.trainer import check_trainer

FAULTS = (RuntimeError, OSError, MemoryError)
"""What may go wrong in a training and is no fault of ours: it diverges, its process dies, memory or disk are full."""

POLL = 1.0
"""Seconds between two looks at the journals of running jobs."""

STATES = 10
"""Saved states of a training where the study file says `save_every: auto`."""


def fine_tunings(config: StudyConfig, where: object) -> list[FineTuneJob]:
    """A job for each distribution that has training data; those of one run once.

    Raises InputError for settings that the Trainer or peft does not know, for two trainings of one folder, and for a
    distribution that has neither a checkpoint nor training data.
    """
    check_trainer(config.fine_tuning.trainer, where)
    base, jobs = locate(config.base, "base"), dict[Path, FineTuneJob]()
    for name, one in config.distributions.items():
        kind, source = one.fine_tune
        check_origin(name, one, where)
        if one.train is None or source.place is None:
            continue
        if kind == "adapter":
            check_lora(config.fine_tuning.lora, where)
        twin = jobs.get(source.place)
        if twin is not None and twin.train != one.train:
            mend = f"{twin.name} is trained into this folder too, from other data; name another"
            raise InputError(where, f"distributions.{name}.{kind}", str(source.place), mend)
        if twin is None:
            shared: dict[str, Any] = {"name": name, "train": one.train, "out": source.place}
            if kind == "adapter":
                shared["lora"] = config.fine_tuning.lora
            if config.fine_tuning.keep:
                shared["validation"] = build_corpora(name, one, config.evaluation, load_tokenizer(base))[0]
            jobs[source.place] = FineTuneJob(**settings(config, base), **shared)
    return list(jobs.values())


def settings(config: StudyConfig, base: Path) -> dict[str, Any]:
    """What all fine-tunings of a study have in common, as a job takes it."""
    given = config.fine_tuning
    return {
        "base": base,
        "window": config.evaluation.window,
        "steps": given.steps,
        "learning_rate": given.learning_rate,
        "batch_size": given.batch_size,
        "seed": given.seed,
        "trainer": given.trainer,
        "save_every": max(given.steps // STATES, 1) if given.save_every == "auto" else given.save_every,
        "dtype": given.dtype,
        "gpus": 1 if given.gpus == "auto" else given.gpus,
    }


def train(
    config: StudyConfig,
    jobs: Sequence[FineTuneJob],
    compute: Compute,
    progress: Progress,
    after: Callable[[FineTuneJob, FineTuned], None] = lambda job, made: None,
) -> dict[str, FineTuned]:
    """Do the jobs that are wanted, side by side as the cluster allows; by name what each gave.

    The CPUs are divided by the number of all jobs, done or not: a job has as many threads, and so the same bits,
    whichever of the others are left.  Raises the first failure, after the others ended: InputError, or TrainingError
    for what went wrong at work.
    """
    wanted = [job for job in jobs if is_wanted(job)]
    done: dict[str, FineTuned] = {}
    failures: list[tuple[FineTuneJob, Exception]] = []
    if not wanted:
        return done
    gpus = None if config.fine_tuning.gpus == "auto" else config.fine_tuning.gpus
    with _watched(config, wanted, progress) as ended, compute:
        for job, result in compute.jobs(fine_tune, wanted, len(jobs), gpus):
            ended(job, result)
            if isinstance(result, Exception):
                failures.append((job, result))
                progress.warning(f"{job.name}: not trained: {result}")
            else:
                done[job.name] = result
                progress.note(
                    f"{job.name}: {result.steps} steps in {result.seconds:.0f} s, "
                    f"training loss {result.first_loss:.3f} to {result.last_loss:.3f} nats per token"
                )
    if not failures:
        return done
    job, failure = failures[0]
    if isinstance(failure, FAULTS):
        raise TrainingError(f"{job.name}: not trained: {failure}") from failure
    raise failure


@contextmanager
def _watched(
    config: StudyConfig, jobs: Sequence[FineTuneJob], progress: Progress
) -> Iterator[Callable[[FineTuneJob, object], None]]:
    """Journals of the jobs told and logged while they run; what is yielded is called with each job that ended."""
    curves = JobRun(config.tracking.uri, config.tracking.experiment, config.output / "artifacts", progress.warning)
    over, keys = Event(), {job.out: job_identity(job) for job in jobs}
    steps_of = {job.out: _Steps(job, progress) for job in jobs}

    def look(job: FineTuneJob, status: str = "RUNNING", result: Mapping[str, float] | None = None) -> None:
        points = read_journal((job.place if status == "RUNNING" else job.out) / JOURNAL)
        steps = [point for point in points if point.loss is not None]
        if steps and status == "RUNNING":
            steps_of[job.out].reach(steps[-1].step, float(steps[-1].loss or 0))
        if points or status != "RUNNING":
            curves.write(_note(job, keys[job.out], status, points, result or {}))

    def watch() -> None:
        while not over.wait(POLL):
            for job in [job for job in jobs if job not in finished]:
                look(job)

    finished: list[FineTuneJob] = []

    def ended(job: FineTuneJob, result: object) -> None:
        finished.append(job)
        failed = isinstance(result, Exception)
        measured = {} if failed or not isinstance(result, FineTuned) else _measured(result)
        look(job, "FAILED" if failed else "FINISHED", measured)
        steps_of[job.out].close()

    thread = Thread(target=watch, name="journals", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()
        for steps in steps_of.values():
            steps.close()
        curves.close()


class _Steps:
    """The phase of one job: it begins with the first step that the journal has."""

    def __init__(self, job: FineTuneJob, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._context = ExitStack()
        self._phase: Phase | None = None
        self._done = 0

    def reach(self, step: int, loss: float) -> None:
        """Report that the job is at this step; `loss` in nats per token."""
        if self._phase is None:
            self._phase = self._context.enter_context(self._progress.phase(self._job.name, self._job.steps, "steps"))
        self._phase.advance(step - self._done, f"training loss {loss:.3f} nats per token")
        self._done = step

    def close(self) -> None:
        """End the phase."""
        self._context.close()


def _measured(result: FineTuned) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(result).items() if isinstance(value, int | float)}


def _note(job: FineTuneJob, key: str, status: str, points: Sequence[Any], measured: Mapping[str, float]) -> Note:
    """A fine-tuning as MLflow gets it."""
    parameters = {
        "base": str(job.base),
        "data": ", ".join(f"{part.name}: {part.share:g}" for part in job.parts),
        "out": str(job.out),
        **{name: str(getattr(job, name)) for name in ("window", "steps", "learning_rate", "batch_size", "seed")},
        **{f"trainer.{name}": str(value) for name, value in job.trainer.items()},
        **({} if job.lora is None else {f"lora.{name}": str(value) for name, value in job.lora.items()}),
    }
    curve = [
        (name, value, point.step)
        for point in points
        for name, value in (
            ("train.loss", point.loss),
            ("train.learning_rate", point.learning_rate),
            ("validation.nll", point.validation),
        )
        if value is not None
    ]
    return Note("fine-tuning", job.name, key, parameters, measured, tuple(curve), status)
