"""Answers of --json: every unit that one lists belongs to a number in it, and every number but a count has a unit."""

from collections.abc import Iterator, Mapping, Sequence

import pytest
from summaries import a_trial, of_trials

from dem_opt.analysis.mixing_cost import BaseScore, Cost, MergeResult, MixingComparison, MixtureResult
from dem_opt.analysis.regret import compare
from dem_opt.analysis.task_scores import TaskResults, TaskScore, TaskTable
from dem_opt.cli import json_output
from dem_opt.types import HELD_OUT, SEARCH

LOSS = {SEARCH: 2.0, HELD_OUT: 2.0}
NLL = {split: {"code": 2.0} for split in LOSS}
COST = Cost(trained_tokens=8, training_flops=48.0, forward_tokens=2, forward_flops=4.0, seconds=1.0)
NAMES = {SEARCH, HELD_OUT, "code", "arithmetic"}
"""Keys that users or splits give; the key around them says what the number is."""


def comparison() -> dict:
    runs = {"tpe": [a_trial(0, 3.0), a_trial(1, 2.0)], "tpe@1": [a_trial(0, 4.0)]}
    return json_output.of_comparison(compare(of_trials(runs)))


def mixing() -> dict:
    mixture = MixtureResult(budget="all", shares={"code": 1.0}, objective=LOSS, nll=NLL, cost=COST)
    composite = MergeResult(
        label="best", coefficients={"code": 1.0}, objective=LOSS, nll=NLL, training=COST, search=COST
    )
    return json_output.of_mixing(
        MixingComparison(
            study="tiny",
            weights={"code": 1.0},
            parameters=1,
            edited=composite,
            mixed=(mixture,),
            base=BaseScore(LOSS, NLL),
        )
    )


def tasks() -> dict:
    models = [
        TaskResults(
            label=label,
            role="single",
            coefficients=None,
            objective={SEARCH: loss},
            scores={"arithmetic": TaskScore("arithmetic", "exact_match", 1 / loss, 0.1, True, 4)},
            gold={"code": {SEARCH: loss}},
        )
        for label, loss in zip("abcde", range(1, 6), strict=True)
    ]
    return json_output.of_tasks(TaskTable("tiny", ("arithmetic",), tuple(models), corpora={"code": "arithmetic"}))


def numbers(answer: object, key: str = "") -> Iterator[str]:
    """Yield the key of every number: its own, or the nearest around it that is no name."""
    if isinstance(answer, Mapping):
        for name, value in answer.items():
            yield from numbers(value, key if name in NAMES else name)
    elif isinstance(answer, Sequence) and not isinstance(answer, str):
        for value in answer:
            yield from numbers(value, key)
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        yield key


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (comparison, {"trials", "partial", "failed"}),
        (mixing, {"parameters", "mixtures", "equal_quality", "equal_cost", "weights", "coefficients"}),
        (tasks, {"value", "error", "documents", "models"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_number_but_a_count_has_a_unit(make, counts):
    answer = make()
    units = {name for names in answer.pop("units") for name in names.split(", ")}
    assert units | counts == set(numbers(answer))
    assert not units & counts
