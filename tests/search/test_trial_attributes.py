"""Trial attributes are flat, and read as they were written, by this release and by earlier ones."""

import json

import pytest

from dem_opt.search.trial_attributes import TrialAttributes

COSTS = {
    "forward_tokens": 640,
    "scored_tokens": 600,
    "merge_seconds": 0.25,
    "score_seconds": 1.5,
    "wait_seconds": 0.5,
    "propose_seconds": 0.125,
}
WHOLE = COSTS | {"fe": 1.0, "estimate": False, "nll.code": 2.0}
STORED = {
    "failed": COSTS | {"fe": 0.0, "reason": "lost"},
    "whole": WHOLE,
    "violating, with a gradient": WHOLE
    | {"violation": 0.25, "objective": 2.0, "penalized": 4.5, "gradient.code": -0.5, "gradient.a.b": 0.5},
    "stopped early": WHOLE
    | {"estimate": True, "standard_error": 0.01, "objective": 2.5, "penalized": 2.5, "windows.code": 4},
    "of smaller batches": WHOLE | {"batch_tokens": 64},
}
"""User attributes by outcome."""

EARLIER = COSTS | {"forwards": 0.5, "batch_tokens": 0, "perplexity": {"code": 1.0}}
"""The object of all measurements that release 0.1.0 stored."""


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_the_stored_attributes_come_back(stored: dict[str, object]) -> None:
    attributes = TrialAttributes.from_stored(json.loads(json.dumps(stored)))
    assert attributes.to_stored() == stored
    assert TrialAttributes.from_stored(attributes.to_stored()) == attributes


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_every_attribute_is_a_number_a_text_or_a_truth_value(stored: dict[str, object]) -> None:
    values = TrialAttributes.from_stored(stored).to_stored().values()
    assert {type(value) for value in values} <= {int, float, str, bool}


def test_keys_that_are_lacking_read_as_nothing() -> None:
    assert TrialAttributes.from_stored({}) == TrialAttributes()
    assert (TrialAttributes().forwards, TrialAttributes().error, TrialAttributes().objective) == (1.0, 0.0, None)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {}),
        ({"reason": "lost", "forwards": 0.0}, {"reason": "lost", "forwards": 0.0}),
        ({"gradient": {"code": -0.5}, "violation": 0.5}, {"gradient": {"code": -0.5}, "violation": 0.5}),
        (
            {"partial": True, "error": 0.01, "objective": 2.5, "windows": {"code": 4}},
            {"error": 0.01, "objective": 2.5, "windows": {"code": 4}},
        ),
    ],
    ids=["whole", "failed", "violating", "stopped early"],
)
def test_what_an_earlier_release_stored_is_read(more: dict[str, object], expected: dict[str, object]) -> None:
    same = {"nll": {"code": 0.0}, "forwards": 0.5, **COSTS}
    assert TrialAttributes.from_stored({"driver": "x", "dem_opt": EARLIER | more}) == TrialAttributes(**same | expected)


def test_attributes_of_others_are_passed_over() -> None:
    foreign = {"fe": "iron", "gradient": {"a": 1}, "standard_error": 0.5, "nll.code": None, "estimate": "rough"}
    assert TrialAttributes.from_stored(foreign) == TrialAttributes()
