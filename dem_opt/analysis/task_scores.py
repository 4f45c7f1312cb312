"""Scores of models on downstream tasks, their ranking, and its agreement with the ranking by loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dem_opt.errors import InputError, nearest
from dem_opt.types import HELD_OUT, NATS_PER_TOKEN, SEARCH, UNITS


@dataclass(frozen=True)
class TaskScore:
    """A model's score on a task: the first metric that lm-evaluation-harness lists for it.

    Written to JSON files and read back by field name.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: The score.
        error: Its standard error; None where the metric has none.
        higher: Whether more is better.
        documents: Documents that were scored.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher: bool
    documents: int


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """A model of a study on tasks.

    Attributes:
        label: Its label in the results table.
        role: Its role there.
        coefficients: Its coefficients; None for the base.
        objective: Objective by split, in the objective's unit.
        scores: Score by task.
    """

    label: str
    role: str
    coefficients: Mapping[str, float] | None
    objective: Mapping[str, float]
    scores: Mapping[str, TaskScore]


@dataclass(frozen=True)
class TaskTable:
    """Models of a study on tasks; `unit` is that of their objectives, in words."""

    study: str
    tasks: tuple[str, ...]
    models: tuple[TaskResults, ...]
    unit: str = UNITS[NATS_PER_TOKEN]

    @property
    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Spearman's rank correlation of models' losses and scores, by task and split.

        1 where the lower loss always has the better score, -1 where it always has the worse; None where all losses or
        all scores are equal.
        """
        return {task: {split: self._agreement(task, split) for split in (SEARCH, HELD_OUT)} for task in self.tasks}

    def ranked(self, by: str | None) -> list[TaskResults]:
        """The models, the best first: by a task's score, or by their loss on the search split.

        Raises:
            InputError: For a task that the study does not have.
        """
        if by is not None and by not in self.tasks:
            raise InputError(None, "--by", by, f"is no task of the study; {nearest(by, self.tasks)}")
        return sorted(self.models, key=lambda model: model.objective[SEARCH] if by is None else _loss(model.scores[by]))

    def _agreement(self, task: str, split: str) -> float | None:
        models = [model for model in self.models if split in model.objective]
        return spearman([model.objective[split] for model in models], [_loss(model.scores[task]) for model in models])


def _loss(score: TaskScore) -> float:
    """A score with its sign turned where more is better."""
    return -score.value if score.higher else score.value


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties having their mean rank; None where one of both is constant."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    # Half a second that a study without tasks does not pay.
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)
