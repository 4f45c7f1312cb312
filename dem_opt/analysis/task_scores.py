"""Scores of models on downstream tasks, their ranking, and its agreement with the ranking by loss.

Shape suffixes beside the project's: N models, R resamples.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dem_opt.analysis.bootstrap import RESAMPLES
from dem_opt.errors import InputError, nearest
from dem_opt.types import NATS_PER_TOKEN, SEARCH, SPLITS, UNITS

FEWEST_MODELS = 5
"""Models from which on a rank correlation has an interval."""

OBJECTIVE = "objective"
"""Name of the loss that the study minimizes."""


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
        gold: NLL of gold answers by corpus and split, in nats per token, of the corpora that are a task's documents.
    """

    label: str
    role: str
    coefficients: Mapping[str, float] | None
    objective: Mapping[str, float]
    scores: Mapping[str, TaskScore]
    gold: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def loss(self, name: str, split: str) -> float | None:
        """The objective, or the NLL of a corpus of gold answers; None where it was not scored."""
        return (self.objective if name == OBJECTIVE else self.gold[name]).get(split)


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95% interval, which is None where there are too few models."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of a loss with the scores on a task, over models.

    Attributes:
        task: Name of the task.
        loss: "objective", or the corpus of the task's gold answers.
        split: The split that the loss is of.
        models: Number of models.
        spearman: Spearman's rank correlation: 1 where the lower loss always has the better score, -1 where it always
            has the worse; None where all losses or all scores are equal.
        kendall: Kendall's tau-b likewise.
    """

    task: str
    loss: str
    split: str
    models: int
    spearman: Correlation | None
    kendall: Correlation | None


@dataclass(frozen=True)
class TaskTable:
    """Models of a study on tasks.

    Attributes:
        study: Name of the study.
        tasks: Names of the tasks.
        models: The models.
        unit: Unit of their objectives, in words.
        corpora: The task of each corpus that is a task's documents.
    """

    study: str
    tasks: tuple[str, ...]
    models: tuple[TaskResults, ...]
    unit: str = UNITS[NATS_PER_TOKEN]
    corpora: Mapping[str, str] = field(default_factory=dict)

    @property
    def agreement(self) -> tuple[Agreement, ...]:
        """The agreement of each task with the objective, and with the loss of its own gold answers, on both splits."""
        return tuple(
            self._agreement(task, loss, split) for task in self.tasks for loss in self._losses(task) for split in SPLITS
        )

    def _losses(self, task: str) -> Iterator[str]:
        yield OBJECTIVE
        yield from (name for name, documents in self.corpora.items() if documents == task)

    def ranked(self, by: str | None) -> list[TaskResults]:
        """The models, the best first: by a task's score, or by their loss on the search split.

        Raises:
            InputError: For a task that the study does not have.
        """
        if by is not None and by not in self.tasks:
            raise InputError(None, "--by", by, f"is no task of the study; {nearest(by, self.tasks)}")
        return sorted(self.models, key=lambda model: model.objective[SEARCH] if by is None else _loss(model.scores[by]))

    def _agreement(self, task: str, loss: str, split: str) -> Agreement:
        pairs = [
            (nll, _loss(model.scores[task])) for model in self.models if (nll := model.loss(loss, split)) is not None
        ]
        losses_N, scores_N = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return Agreement(
            task=task,
            loss=loss,
            split=split,
            models=len(pairs),
            spearman=correlation(spearman, losses_N, scores_N),
            kendall=correlation(kendall, losses_N, scores_N),
        )


def _loss(score: TaskScore) -> float:
    """A score with its sign turned where more is better."""
    return -score.value if score.higher else score.value


Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""A correlation of each row of two arrays [R, N]: [R], NaN where a row of either is constant."""


def correlation(
    statistic: Statistic, left_N: NDArray[np.float64], right_N: NDArray[np.float64], seed: int = 0
) -> Correlation | None:
    """A rank correlation with its percentile bootstrap interval; None where one of both is constant.

    Models are drawn with replacement, in pairs of loss and score; draws in which either is constant do not count.  The
    interval covers the choice of models, not that of documents.
    """
    if len(set(left_N)) < 2 or len(set(right_N)) < 2:
        return None
    value = float(statistic(left_N[None], right_N[None])[0])
    if len(left_N) < FEWEST_MODELS:
        return Correlation(value, None, None)
    draws_RN = np.random.default_rng(seed).integers(len(left_N), size=(RESAMPLES, len(left_N)))
    low, high = np.nanquantile(statistic(left_N[draws_RN], right_N[draws_RN]), [0.025, 0.975])
    return Correlation(value, float(low), float(high))


def spearman(left_RN: NDArray[np.float64], right_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each row: Pearson's of ranks, ties having their mean rank."""
    # Half a second that a study without tasks does not pay.
    from scipy.stats import rankdata

    centred = [rankdata(values_RN, axis=1) - (values_RN.shape[1] + 1) / 2 for values_RN in (left_RN, right_RN)]
    return _cosines(*centred)


def kendall(left_RN: NDArray[np.float64], right_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kendall's tau-b of each row: concordant minus discordant pairs, over the root of the pairs not tied in either."""
    signs = [np.sign(values_RN[:, :, None] - values_RN[:, None, :]) for values_RN in (left_RN, right_RN)]
    return _cosines(*(sign_RNN.reshape(len(sign_RNN), -1) for sign_RNN in signs))


def _cosines(left_RN: NDArray[np.float64], right_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of each row of one with that of the other; NaN where either is zero."""
    squares_R = (left_RN**2).sum(axis=1) * (right_RN**2).sum(axis=1)
    cosines_R: NDArray[np.float64] = (left_RN * right_RN).sum(axis=1) / np.sqrt(
        np.where(squares_R > 0, squares_R, np.nan)
    )
    return cosines_R
