"""Fine-tune the base for each distribution: jobs side by side, their journals reported and logged."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from dem_opt.checkpoints.files import read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.checkpoints.locate import locate
from dem_opt.checkpoints.training_record import JOURNAL, read_journal
from dem_opt.config import StudyConfig
from dem_opt.data.tokenize import load_tokenizer, without_pad_beyond
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError, TrainingError
from dem_opt.planning.inputs import check_base_alone, check_origin
from dem_opt.progress import Phase, Progress
from dem_opt.tracking import JobNote
from dem_opt.training.fine_tune import FineTuned, FineTuneJob, fine_tune, holder_of, is_wanted, job_identity
from dem_opt.training.lora import check_lora, check_mergeable
from dem_opt.training.recipe import check_trainer
from dem_opt.workflows.context import StudyContext

EXPECTED_FAILURES = (RuntimeError, OSError, MemoryError)
"""Errors of a training that are no fault of this program: it diverges, its process dies, memory or disk are full."""

POLL = 1.0
"""Seconds between two reads of the journals of running jobs."""

STATES = 10
"""Saved states of a training where the study file says `save_every: auto`."""


def jobs(config: StudyConfig, path: Path) -> list[FineTuneJob]:
    """Return a job for each distribution that has training data; distributions that share a folder have one job.

    Args:
        config: The study file's content.
        path: The study file, which messages name.

    Raises:
        InputError: The Trainer or peft does not know a setting, no run could merge what would be trained, two
            trainings write one folder, or a distribution has neither a checkpoint nor training data.
    """
    check_trainer(config.fine_tuning.trainer, path)
    base, by_folder = locate(config.base, "base"), dict[Path, FineTuneJob]()
    if any(distribution.adapter and distribution.train for distribution in config.distributions.values()):
        check_lora(config.fine_tuning.lora, path)
        check_mergeable(config.fine_tuning.lora, base, path)
    for each in config.fine_tunes.values():
        check_origin(each, path)
    for name, distribution in config.distributions.items():
        kind, source = distribution.fine_tune
        if distribution.train is None or source.place is None:
            continue
        twin = by_folder.get(source.place)
        if twin is not None and twin.train != distribution.train:
            mend = f"{twin.name} is trained into this folder too, from other data; name another"
            raise InputError(path, f"distributions.{name}.{kind}", str(source.place), mend)
        if twin is None:
            more: dict[str, Any] = {"lora": config.fine_tuning.lora} if kind == "adapter" else {}
            if config.fine_tuning.keep:
                more["validation"] = build_corpora(name, distribution, config.evaluation, _packing_tokenizer(base))[0]
            by_folder[source.place] = FineTuneJob(
                name=name, train=distribution.train, out=source.place, **shared_settings(config, base), **more
            )
    return list(by_folder.values())


def _packing_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    architecture = check_base(read_header(base, "base"))
    return without_pad_beyond(load_tokenizer(base), architecture.parameters[architecture.embedding][0])


def shared_settings(config: StudyConfig, base: Path) -> dict[str, Any]:
    """Return the arguments of `FineTuneJob` that all fine-tunings of a study share."""
    settings = config.fine_tuning
    return {
        "base": base,
        "window": config.evaluation.window,
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "trainer": settings.trainer,
        "save_every": max(settings.steps // STATES, 1) if settings.save_every == "auto" else settings.save_every,
        "dtype": settings.dtype,
        "gpus": 1 if settings.gpus == "auto" else settings.gpus,
        "today": config.evaluation.date,
    }


def train(context: StudyContext, jobs: Sequence[FineTuneJob], progress: Progress | None = None) -> dict[str, FineTuned]:
    """Do the jobs whose checkpoints are missing or have other settings, side by side as the compute allows.

    The CPUs are divided by the number of all jobs, done or not: a job has as many threads, and so gives the same
    bits, whichever of the others are left.

    Args:
        context: The study.
        jobs: All jobs.
        progress: Receives the events, the context's unless given.

    Returns:
        The trainings that were done, by name.

    Raises:
        TrainingError: The first training that failed, after the others ended.
        InputError: The same, where the failure is the user's mistake, or a study would refuse the base.
    """
    progress = progress or context.progress
    wanted = [job for job in jobs if is_wanted(job)]
    if not wanted:
        return {}
    for warning in check_base_alone(wanted[0].base):
        progress.warning(warning)
    for job in wanted:
        if (holder := holder_of(job)) is not None:
            progress.note(f"{job.name}: {holder} works on it already; waiting for it")
    results: dict[str, FineTuned] = {}
    failures: list[tuple[FineTuneJob, Exception]] = []
    gpus = None if context.config.fine_tuning.gpus == "auto" else context.config.fine_tuning.gpus
    with JournalWatch(context, wanted, progress) as watch, context.compute:
        for job, result in context.compute.jobs(fine_tune, wanted, len(jobs), gpus):
            watch.finish(job, result)
            if isinstance(result, Exception):
                failures.append((job, result))
                progress.warning(f"{job.name}: not trained: {result}")
            else:
                results[job.name] = result
                progress.note(
                    f"{job.name}: {result.steps} steps in {result.seconds:.0f} s, "
                    f"training loss {result.first_loss:.3f} to {result.last_loss:.3f} nats per token"
                )
    if failures:
        _raise(*failures[0])
    return results


def _raise(job: FineTuneJob, failure: Exception) -> None:
    if isinstance(failure, EXPECTED_FAILURES):
        raise TrainingError(f"{job.name}: not trained: {failure}") from failure
    raise failure


class JournalWatch:
    """Reports and logs the journals of running jobs, from a thread of its own while the context is open."""

    def __init__(self, context: StudyContext, jobs: Sequence[FineTuneJob], progress: Progress) -> None:
        self._tracker = context.track_jobs()
        self._keys = {job.out: job_identity(job) for job in jobs}
        self._phases = {job.out: _TrainingPhase(job, progress) for job in jobs}
        self._running = {job.out: job for job in jobs}
        self._closing, self._starting, self._progress = Event(), ExitStack(), progress
        self._thread = Thread(target=self._poll, name="journals", daemon=True)

    def __enter__(self) -> Self:
        self._starting.enter_context(self._progress.phase("starting to train"))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()
        self._starting.close()
        for phase in self._phases.values():
            phase.close()
        self._tracker.close()

    def finish(self, job: FineTuneJob, result: FineTuned | Exception) -> None:
        """Log the end of a job, and end its phase."""
        self._running.pop(job.out)
        points = read_journal(job.out / JOURNAL)
        if isinstance(result, Exception):
            self._log(job, points, "FAILED", {})
        else:
            self._log(job, points, "FINISHED", _metrics(result))
        self._phases[job.out].close()

    def _poll(self) -> None:
        while not self._closing.wait(POLL):
            for job in list(self._running.values()):
                points = read_journal(job.place / JOURNAL)
                steps = [point for point in points if point.loss is not None]
                if steps:
                    self._starting.close()
                    self._phases[job.out].reach(steps[-1].step, float(steps[-1].loss or 0))
                if points:
                    self._log(job, points, "RUNNING", {})

    def _log(self, job: FineTuneJob, points: Sequence[Any], status: str, metrics: Mapping[str, float]) -> None:
        self._tracker.write(
            JobNote(
                kind="fine-tuning",
                name=job.name,
                key=self._keys[job.out],
                parameters=_parameters(job),
                metrics=metrics,
                curve=_curve(points),
                status=status,
            )
        )


class _TrainingPhase:
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


def _metrics(result: FineTuned) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(result).items() if isinstance(value, int | float)}


def _parameters(job: FineTuneJob) -> dict[str, str]:
    settings = {
        "window": job.window,
        "steps": job.steps,
        "learning_rate": job.learning_rate,
        "batch_size": job.batch_size,
        "seed": job.seed,
    }
    return {
        "base": str(job.base),
        "data": ", ".join(f"{part.name}: {part.share:g}" for part in job.parts),
        "out": str(job.out),
        **{name: str(value) for name, value in settings.items()},
        **{f"trainer.{name}": str(value) for name, value in job.trainer.items()},
        **({} if job.lora is None else {f"lora.{name}": str(value) for name, value in job.lora.items()}),
    }


def _curve(points: Sequence[Any]) -> tuple[tuple[str, float, int], ...]:
    """Return the journal's points as (metric, value, step)."""
    return tuple(
        (name, value, point.step)
        for point in points
        for name, value in (
            ("train.loss", point.loss),
            ("train.learning_rate", point.learning_rate),
            ("validation.nll", point.validation),
        )
        if value is not None
    )
