"""Score a model folder on tasks with lm-evaluation-harness, an optional package."""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dem_opt.analysis.task_scores import TaskScore
from dem_opt.data.harness import import_harness, in_folder, task_manager
from dem_opt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TaskJob:
    """One model and its tasks; picklable, for `run_tasks` in another process.

    Attributes:
        name: Label of the model.
        model: Folder of the model.
        tokenizer: Folder of the tokenizer, the base's.
        tasks: Names of tasks.
        include: Folder of task files beside the harness's own.
        limit: Most documents of each task; all unless given.
        shots: Worked examples in each prompt; the task's own number unless given.
        batch: Requests in a forward call.
    """

    name: str
    model: Path
    tokenizer: Path
    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    shots: int | None = None
    batch: int = 8


def harness_version() -> str:
    """Return the version of lm-evaluation-harness.

    Raises:
        InputError: It is not installed.
    """
    import_harness("evaluate")
    return version("lm_eval")


def run_tasks(job: TaskJob) -> dict[str, TaskScore]:
    """Score a model on its tasks, with the threads that the process has.

    Raises:
        InputError: The documents of a task cannot be fetched, or a task is a group without a score of its own.
    """
    import torch

    harness = import_harness("evaluate")
    tasks = task_manager(job.include, job.tasks, "evaluate")
    model, tokenizer = job.model.absolute(), job.tokenizer.absolute()
    with in_folder(job.include), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluation = harness.simple_evaluate(
                model="hf",
                model_args={
                    **{"pretrained": str(model), "tokenizer": str(tokenizer)},
                    "trust_remote_code": False,
                },
                tasks=list(job.tasks),
                num_fewshot=job.shots,
                batch_size=job.batch,
                device="cuda" if torch.cuda.is_available() else "cpu",
                limit=job.limit,
                bootstrap_iters=100,
                log_samples=False,
                task_manager=tasks,
            )
        except OSError as error:
            reason = str(error).strip().partition("\n")[0]
            mend = f"cannot fetch the documents of a task ({reason}); fetch them where there is a network, or drop it"
            raise InputError(None, "evaluate.tasks", ", ".join(job.tasks), mend) from None
    return {task: _score(task, evaluation) for task in job.tasks}


def _score(task: str, evaluation: Any) -> TaskScore:
    """The first metric of a task; keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    values = evaluation["results"].get(task, {})
    metrics = (key for key in values if "," in key and "_stderr" not in key)
    key = next((key for key in metrics if isinstance(values[key], int | float)), None)
    if key is None:
        mend = "is a group without a score of its own; name its tasks"
        raise InputError(None, "evaluate.tasks", task, mend)
    metric, _, words = key.partition(",")
    error = values.get(f"{metric}_stderr,{words}")
    higher = (evaluation.get("higher_is_better") or {}).get(task, {}).get(metric)
    counted = evaluation.get("n-samples", {}).get(task, {}).get("effective", 0)
    return TaskScore(
        task,
        metric,
        float(values[key]),
        float(error) if isinstance(error, int | float) else None,
        higher is not False,
        int(counted),
    )
