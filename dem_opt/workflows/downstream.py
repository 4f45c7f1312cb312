"""A study's best composites, its base, its fine-tunes and their average on tasks, each measured once."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dem_opt.analysis.task_scores import TaskResults, TaskScore, TaskTable
from dem_opt.atomic import write_text
from dem_opt.compute import Compute
from dem_opt.config import EvaluateSection, StudyConfig
from dem_opt.errors import InputError
from dem_opt.export.writer import write_composite
from dem_opt.planning.inputs import Inputs, load_inputs
from dem_opt.progress import Progress
from dem_opt.simplex import UNIT
from dem_opt.tracking.job_runs import JobRun, Note
from dem_opt.types import Composite, ResultRow, Summary
from dem_opt.workflows.lm_eval import TaskJob, check_tasks, harness_version, run_tasks

FOLDER = "downstream"
"""Where scores on tasks are kept, in the study's output."""


@dataclass(frozen=True)
class Candidate:
    """A line of the final table that is to do the tasks."""

    result: ResultRow
    composite: Composite


def wanted(config: StudyConfig, where: object) -> EvaluateSection:
    """What the study file asks for.

    Raises InputError where it asks for nothing, for tasks that are unknown, and where the harness is missing.
    """
    if config.evaluate is None:
        mend = "the study file names no tasks; write, say, evaluate: {tasks: [hellaswag], top: 5}"
        raise InputError(where, "evaluate", None, mend)
    harness_version()
    check_tasks(tuple(config.evaluate.tasks), config.evaluate.include, where)
    return config.evaluate


def evaluate(
    config: StudyConfig, where: object, given: EvaluateSection, summary: Summary, compute: Compute, progress: Progress
) -> TaskTable:
    """Score base, fine-tunes, uniform average and the best composites on the tasks, and log it."""
    sources = load_inputs(config, where, worker=False)
    doers = entrants(summary, sources, given.top)
    with compute:
        found = do_tasks(config, given, sources, doers, compute, progress)
    log_tasks(config, doers, found, progress)
    return found


def entrants(summary: Summary, sources: Inputs, top: int) -> list[Candidate]:
    """Base, fine-tunes and uniform average, then the best composites; one that is among the others only once."""
    identity, found = sources.identity(), dict[Composite, ResultRow]()
    baselines = [one for one in summary.results if one.role in ("base", "single", "uniform")]
    for one in (*baselines, *summary.top[:top]):
        at = one.coefficients
        composite = Composite.single(identity.base) if at is None else identity.composite(at)
        found.setdefault(composite, one)
    return [Candidate(result, composite) for composite, result in found.items()]


def do_tasks(
    config: StudyConfig,
    given: EvaluateSection,
    sources: Inputs,
    doers: Sequence[Candidate],
    compute: Compute,
    progress: Progress,
) -> TaskTable:
    """Every entrant's scores; those that are kept from before are not measured again.

    One model at a time: a composite is written to disk, and is gone when it has done its tasks.
    Raises the first failure.
    """
    models = []
    for place, one in enumerate(doers, start=1):
        kept = {task: _kept(config, given, one.composite, task) for task in given.tasks}
        missing = tuple(task for task, score in kept.items() if score is None)
        if missing:
            with _folder(config, sources, one.composite) as folder:
                measured = _measure(given, sources, folder, one, missing, compute)
            kept |= measured
            for task, score in measured.items():
                _keep(config, given, one.composite, task, score)
        scores = {task: score for task, score in kept.items() if score is not None}
        told = ", ".join(f"{task} {score.metric} {score.value:.4f}" for task, score in scores.items())
        progress.note(f"{place} of {len(doers)}: {one.result.label}: {told}{'' if missing else ' (known)'}")
        at = one.result.coefficients
        weights = None if at is None else at.weights
        models.append(TaskResults(one.result.label, one.result.role, weights, dict(one.result.objective), scores))
    return TaskTable(config.name, tuple(given.tasks), tuple(models))


def log_tasks(config: StudyConfig, doers: Sequence[Candidate], found: TaskTable, progress: Progress) -> None:
    """Every model's scores in MLflow."""
    curves = JobRun(config.tracking.uri, config.tracking.experiment, config.output / "artifacts", progress.warning)
    for one, model in zip(doers, found.models, strict=True):
        metrics = {f"{task}.{score.metric}": score.value for task, score in model.scores.items()}
        metrics |= {f"{split}.objective_nll": nll for split, nll in model.objective.items()}
        parameters = {f"w.{name}": str(weight) for name, weight in (model.coefficients or {}).items()}
        key = sha256(repr((config.name, one.composite.key, sorted(model.scores.items()))).encode()).hexdigest()
        curves.write(Note("downstream", model.label, key, parameters | {"role": model.role}, metrics))
    curves.close()


def _measure(
    given: EvaluateSection,
    sources: Inputs,
    folder: Path,
    one: Candidate,
    tasks: tuple[str, ...],
    compute: Compute,
) -> dict[str, TaskScore]:
    job = TaskJob(
        one.result.label,
        folder,
        sources.base.path,
        tasks,
        given.include,
        given.limit,
        given.shots,
        given.batch,
    )
    ((_, result),) = compute.jobs(run_tasks, [job])
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def _folder(config: StudyConfig, sources: Inputs, composite: Composite) -> Iterator[Path]:
    """A model's folder: a checkpoint's own, or one that is written for the while."""
    full = {model.content: model.path for model in sources.models().values() if model.base is None}
    terms = dict(composite.terms)
    alone = next(iter(terms)) if set(terms.values()) == {UNIT} else None
    if alone in full:
        yield full[alone]
        return
    out = config.output / FOLDER / f"model-{composite.key[:16]}"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_composite(sources.base, sources.models(), composite, out, lambda written: {}, None)
        yield out
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _kept_at(config: StudyConfig, given: EvaluateSection, composite: Composite, task: str) -> Path:
    """The file of a score, named by all that decides it: the model, the task's files, the settings, the harness."""
    files = sorted(path for path in given.include.rglob("*") if path.is_file()) if given.include else []
    asked: list[Any] = [task, given.limit, given.shots, given.batch, harness_version()]
    asked += [(path.name, sha256(path.read_bytes()).hexdigest()) for path in files]
    name = sha256(repr((composite.key, asked)).encode()).hexdigest()[:32]
    return config.output / FOLDER / f"{name}.json"


def _kept(config: StudyConfig, given: EvaluateSection, composite: Composite, task: str) -> TaskScore | None:
    try:
        return TaskScore(**json.loads(_kept_at(config, given, composite, task).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _keep(config: StudyConfig, given: EvaluateSection, composite: Composite, task: str, score: TaskScore) -> None:
    write_text(_kept_at(config, given, composite, task), json.dumps(asdict(score)) + "\n")
