"""A model folder on tasks, by lm-evaluation-harness, an optional package."""

import logging
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dem_opt.analysis.task_scores import TaskScore
from dem_opt.errors import InputError, nearest

_CHATTER = ("lm_eval", "datasets", "evaluate", "filelock")


@dataclass(frozen=True)
class TaskJob:
    """One model on tasks: picklable, and importable with `run_tasks` by a worker.

    tokenizer  the folder whose tokenizer is used, the base's
    include    a folder of task files beside the harness's own
    limit      documents of each task at most; `shots` worked examples; `batch` requests in a forward call
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
    """The version of lm-evaluation-harness; InputError where it is missing."""
    _import_harness()
    return version("lm_eval")


def check_tasks(tasks: tuple[str, ...], include: Path | None, where: Path | None) -> None:
    """Raise InputError for a task that the harness does not know, or a folder of tasks that is not there."""
    if include is not None and not include.is_dir():
        raise InputError(include, "evaluate.include", None, "no such folder")
    known = _manager(include, tasks).all_tasks
    for task in tasks:
        if task not in known:
            raise InputError(
                where, "evaluate.tasks", task, f"lm-evaluation-harness knows no such task; {_near(task, known)}"
            )


def run_tasks(job: TaskJob) -> dict[str, TaskScore]:
    """The model's scores by task, in the thread count the process has.

    Raises InputError for a task whose documents can't be had, and for a group of tasks without a score of its own.
    """
    import torch

    harness = _import_harness()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = harness.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(job.model), "tokenizer": str(job.tokenizer)},
                tasks=list(job.tasks),
                num_fewshot=job.shots,
                batch_size=job.batch,
                device="cuda" if torch.cuda.is_available() else "cpu",
                limit=job.limit,
                bootstrap_iters=100,
                log_samples=False,
                task_manager=_manager(job.include, job.tasks),
            )
        except OSError as error:
            reason = str(error).strip().partition("\n")[0]
            mend = f"a task's documents can't be had ({reason}): fetch them where there is a network, or take others"
            raise InputError(None, "evaluate.tasks", ", ".join(job.tasks), mend) from None
    return {task: _score(task, found) for task in job.tasks}


def _score(task: str, found: Any) -> TaskScore:
    """The first metric of a task; keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    told = found["results"].get(task, {})
    key = next(
        (key for key in told if "," in key and "_stderr" not in key and isinstance(told[key], int | float)), None
    )
    if key is None:
        mend = "is a group without a score of its own; name its tasks"
        raise InputError(None, "evaluate.tasks", task, mend)
    metric, _, words = key.partition(",")
    error = told.get(f"{metric}_stderr,{words}")
    higher = (found.get("higher_is_better") or {}).get(task, {}).get(metric)
    counted = found.get("n-samples", {}).get(task, {}).get("effective", 0)
    return TaskScore(
        task,
        metric,
        float(told[key]),
        float(error) if isinstance(error, int | float) else None,
        higher is not False,
        int(counted),
    )


@cache
def _manager(include: Path | None, tasks: tuple[str, ...]) -> Any:
    """What knows these tasks: the folder alone where it has them all; looking through the others takes seconds."""
    found = _import_harness().tasks.TaskManager
    if include is None:
        return found()
    own = found(include_path=str(include), include_defaults=False)
    return own if {*tasks} <= {*own.all_tasks} else found(include_path=str(include))


def _near(task: str, known: list[str]) -> str:
    """The known task nearest to a name; there are too many to tell them all."""
    told = nearest(task, known)
    return told if told.startswith("did") else "`lm-eval ls tasks` lists them; evaluate.include adds your own"


def _import_harness() -> Any:
    """lm-evaluation-harness without its chatter."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval
            import lm_eval.tasks
    except ImportError:
        mend = "needs lm-evaluation-harness: pip install 'dem-opt[downstream]'"
        raise InputError(None, "evaluate", None, mend) from None
    return lm_eval
