"""Models with what they score on tasks, ranked by loss or by a task, and how far these rankings agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt

from dem_opt.errors import InputError, nearest
from dem_opt.types import HELD_OUT, SEARCH


@dataclass(frozen=True)
class TaskScore:
    """What a model scores on a task: lm-evaluation-harness's first metric of it.

    error   standard error, None where there is none
    higher  whether more is better
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher: bool
    documents: int


@dataclass(frozen=True)
class TaskResults:
    """A model of a study: its label and role in the final table, its losses, its scores by task."""

    label: str
    role: str
    coefficients: Mapping[str, float] | None
    objective: Mapping[str, float]
    scores: Mapping[str, TaskScore]


@dataclass(frozen=True)
class TaskTable:
    """Models of a study on tasks.

    agreement  by task and split, Spearman's rank correlation of models' losses and scores: 1 where the lower loss
               always has the better score, -1 where it has the worse; None where all losses or all scores are the same
    """

    study: str
    tasks: tuple[str, ...]
    models: tuple[TaskResults, ...]

    @property
    def agreement(self) -> dict[str, dict[str, float | None]]:
        """By task and split."""
        return {task: {split: self._agreement(task, split) for split in (SEARCH, HELD_OUT)} for task in self.tasks}

    def ranked(self, by: str | None) -> list[TaskResults]:
        """The models, the best first: by a task's score, or by their loss on the search split.

        Raises InputError for a task that was not asked for.
        """
        if by is not None and by not in self.tasks:
            raise InputError(None, "--by", by, f"is no task of the study; {nearest(by, self.tasks)}")
        return sorted(self.models, key=lambda one: one.objective[SEARCH] if by is None else _loss(one.scores[by]))

    def _agreement(self, task: str, split: str) -> float | None:
        known = [one for one in self.models if split in one.objective]
        return spearman([one.objective[split] for one in known], [_loss(one.scores[task]) for one in known])


def _loss(score: TaskScore) -> float:
    """A score of which less is better."""
    return -score.value if score.higher else score.value


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, ties having their mean; None where one of both is constant."""
    x, y = _ranks(one), _ranks(other)
    mean = (len(x) + 1) / 2
    spread = sqrt(fsum((a - mean) ** 2 for a in x) * fsum((b - mean) ** 2 for b in y))
    return fsum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(other < one for other in values) + (sum(other == one for other in values) + 1) / 2 for one in values]
