"""Score base, fine-tunes, uniform average and the best composites on tasks; each score is measured once."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

from dem_opt.analysis.task_scores import TaskResults, TaskScore, TaskTable
from dem_opt.atomic import write_text
from dem_opt.config import EvaluateSection
from dem_opt.data.harness import check_tasks
from dem_opt.errors import InputError
from dem_opt.export.writer import write_composite
from dem_opt.json_files import find_json
from dem_opt.planning.inputs import Inputs
from dem_opt.tracking import JobNote
from dem_opt.types import UNITS, Composite, ResultRow, Summary
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.lm_eval import TaskJob, harness_version, run_tasks
from dem_opt.workflows.summary import summarize_stored

FOLDER = "downstream"
"""Folder in the study's output for scores on tasks."""


@dataclass(frozen=True)
class Candidate:
    """A row of the results table that is scored on the tasks."""

    result: ResultRow
    composite: Composite


def evaluate(context: StudyContext) -> TaskTable:
    """Score the candidates on the study file's tasks, and log the scores.

    Raises:
        InputError: The study file has no tasks, a task is unknown, lm-evaluation-harness is missing, or the study
            has not been run.
    """
    settings = check_settings(context)
    with context.stored() as stored:
        summary = summarize_stored(context, stored)
        inputs = context.load_inputs(for_workers=False)
        inputs = distinguish(inputs.on(stored.identity.settings["device"]), stored.ledger, context.progress)
        context.refuse_changed(stored, inputs.identity())
    candidates = select_candidates(summary, inputs, settings.top)
    with context.compute:
        table = score_candidates(context, settings, inputs, candidates)
    log_scores(context, candidates, table)
    return table


def check_settings(context: StudyContext) -> EvaluateSection:
    """Return the study file's section on tasks.

    Raises:
        InputError: There is none, a task is unknown, or lm-evaluation-harness is missing.
    """
    settings = context.config.evaluate
    if settings is None:
        mend = "the study file names no tasks; write, say, evaluate: {tasks: [hellaswag], top: 5}"
        raise InputError(context.path, "evaluate", None, mend)
    harness_version()
    check_tasks(settings.tasks, settings.include, context.path, "evaluate", "tasks")
    return settings


def select_candidates(summary: Summary, inputs: Inputs, top: int) -> list[Candidate]:
    """Return base, fine-tunes, uniform average, the best by group, then the best composites, each composite once."""
    identity, by_composite = inputs.identity(), dict[Composite, ResultRow]()
    baselines = [row for row in summary.results if row.role in ("base", "single", "uniform")]
    by_group = [row for row in summary.results if row.groups is not None]
    for row in (*baselines, *by_group, *summary.top[:top]):
        coefficients = row.merged  # None for the base
        composite = Composite.single(identity.base) if coefficients is None else identity.composite(coefficients)
        by_composite.setdefault(composite, row)
    return [Candidate(row, composite) for composite, row in by_composite.items()]


def score_candidates(
    context: StudyContext, settings: EvaluateSection, inputs: Inputs, candidates: Sequence[Candidate]
) -> TaskTable:
    """Return every candidate's scores; those of an earlier call are not measured again.

    One model at a time: a composite is written to disk, and deleted when it is scored.  Raises the first failure.
    """
    cache = _ScoreCache(context.config.output / FOLDER, settings, inputs)
    tasks = {name: data.validation.task for name, data in context.config.corpora.items()}
    corpora = {name: task for name, task in tasks.items() if task in settings.tasks}
    models = []
    for number, candidate in enumerate(candidates, start=1):
        scores = cache.read(candidate.composite)
        missing = tuple(task for task in settings.tasks if task not in scores)
        if missing:
            measured = _measure(context, settings, inputs, candidate, missing)
            cache.write(candidate.composite, measured)
            scores = {task: (scores | measured)[task] for task in settings.tasks}
        row = candidate.result
        shown = ", ".join(f"{task} {score.metric} {score.value:.4f}" for task, score in scores.items())
        known = "" if missing else " (known)"
        context.progress.note(f"{number} of {len(candidates)}: {row.label}: {shown}{known}")
        coefficients = None if row.coefficients is None else row.coefficients.weights
        models.append(
            TaskResults(
                label=row.label,
                role=row.role,
                coefficients=coefficients,
                objective=dict(row.objective),
                scores=scores,
                gold={name: {split: by_name[name].nll for split, by_name in row.scores.items()} for name in corpora},
            )
        )
    unit = UNITS[context.config.objective.unit]
    return TaskTable(context.config.name, tuple(settings.tasks), tuple(models), unit, corpora)


def _measure(
    context: StudyContext, settings: EvaluateSection, inputs: Inputs, candidate: Candidate, tasks: tuple[str, ...]
) -> dict[str, TaskScore]:
    """Run tasks on a candidate, as a job of the compute."""
    with _model_folder(context, inputs, candidate.composite) as folder:
        job = TaskJob(
            name=candidate.result.label,
            model=folder,
            tokenizer=inputs.base.path,
            tasks=tasks,
            include=settings.include,
            limit=settings.limit,
            shots=settings.shots,
            batch=settings.batch,
        )
        ((_, result),) = context.compute.jobs(run_tasks, [job])
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def _model_folder(context: StudyContext, inputs: Inputs, composite: Composite) -> Iterator[Path]:
    """Yield a model's folder: a checkpoint's own, or one that is deleted afterwards."""
    checkpoints = {model.content: model.path for model in inputs.models().values() if model.base is None}
    if composite.is_single and composite.contents[0] in checkpoints:
        yield checkpoints[composite.contents[0]]
        return
    out = context.config.output / FOLDER / f"model-{composite.key[:16]}"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_composite(inputs.base, inputs.models(), composite, out, lambda written: {}, None)
        yield out
    finally:
        shutil.rmtree(out, ignore_errors=True)


@dataclass(frozen=True)
class _KeptScore(TaskScore):
    """A score with the digest of the tokenizer that it was measured with; "" in files of earlier releases."""

    tokenizer: str = ""


class _ScoreCache:
    """Scores on tasks in files, named by what decides a score: model, task files, settings, harness.

    The tokenizer stands in the file.
    """

    def __init__(self, folder: Path, settings: EvaluateSection, inputs: Inputs) -> None:
        self._folder, self._settings, self._configuration = folder, settings, inputs.configuration
        self._tokenizer = inputs.tokenizer
        include = settings.include
        files = sorted(path for path in include.rglob("*") if path.is_file()) if include else []
        self._files = [(path.name, sha256(path.read_bytes()).hexdigest()) for path in files]

    def read(self, composite: Composite) -> dict[str, TaskScore]:
        """Return the known scores of a composite, by task."""
        scores = {}
        for task in self._settings.tasks:
            kept = find_json(self._path(composite, task), _KeptScore)
            if kept is not None and kept.tokenizer in ("", self._tokenizer):
                scores[task] = TaskScore(**{each.name: getattr(kept, each.name) for each in fields(TaskScore)})
        return scores

    def write(self, composite: Composite, scores: Mapping[str, TaskScore]) -> None:
        """Keep scores of a composite."""
        for task, score in scores.items():
            kept = asdict(score) | {"tokenizer": self._tokenizer}
            write_text(self._path(composite, task), json.dumps(kept) + "\n")

    def _path(self, composite: Composite, task: str) -> Path:
        settings = self._settings
        decisive = [task, settings.limit, settings.shots, settings.batch, harness_version(), *self._files]
        decisive += [self._configuration] if self._configuration else []
        name = sha256(repr((composite.key, decisive)).encode()).hexdigest()[:32]
        return self._folder / f"{name}.json"


def log_scores(context: StudyContext, candidates: Sequence[Candidate], table: TaskTable) -> None:
    """Log every candidate's scores as a run of its own."""
    with closing(context.track_jobs()) as tracker:
        for candidate, model in zip(candidates, table.models, strict=True):
            metrics = {f"{task}.{score.metric}": score.value for task, score in model.scores.items()}
            metrics |= {f"{split}.objective_nll": nll for split, nll in model.objective.items()}
            parameters = {f"w.{name}": str(weight) for name, weight in (model.coefficients or {}).items()}
            tracker.write(
                JobNote(
                    kind="downstream",
                    name=model.label,
                    key=_key(context.config.name, candidate.composite, model.scores),
                    parameters=parameters | {"role": model.role},
                    metrics=metrics,
                )
            )


def _key(study: str, composite: Composite, scores: Mapping[str, TaskScore]) -> str:
    """Return the identity of a model's run: scores are written out so that a renamed field gives no second run."""
    written = ", ".join(
        f"({task!r}, TaskScore(task={score.task!r}, metric={score.metric!r}, value={score.value!r}, "
        f"error={score.error!r}, higher={score.higher!r}, documents={score.documents!r}))"
        for task, score in sorted(scores.items())
    )
    return sha256(f"({study!r}, {composite.key!r}, [{written}])".encode()).hexdigest()
