"""Trial attributes are read as they were written, and as earlier releases wrote them."""

import json

import pytest

from dem_opt.search.trial_attributes import TrialAttributes

COSTS = {
    "forward_tokens": 640,
    "scored_tokens": 600,
    "merge_seconds": 0.25,
    "score_seconds": 1.5,
    "wait_seconds": 0.5,
    "batch_tokens": 0,
    "forwards": 1.0,
    "propose_seconds": 0.125,
}
STORED = {
    "failed": COSTS | {"forwards": 0.0, "reason": "lost"},
    "whole": COSTS | {"perplexity": {"code": 7.5}},
    "violating, with a gradient": COSTS | {"perplexity": {"code": 7.5}, "violation": 0.25, "gradient": {"code": -0.5}},
    "stopped early": COSTS
    | {"perplexity": {"code": 7.5}, "partial": True, "error": 0.01, "objective": 2.5, "windows": {"code": 4}},
}
"""The JSON objects that the last release stored, by outcome."""


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_the_stored_object_comes_back(stored: dict[str, object]) -> None:
    attributes = TrialAttributes.from_stored(json.loads(json.dumps(stored)))
    assert attributes.to_stored() == stored
    assert TrialAttributes.from_stored(attributes.to_stored()) == attributes


def test_keys_that_are_lacking_read_as_nothing() -> None:
    assert TrialAttributes.from_stored({}) == TrialAttributes()
    assert (TrialAttributes().forwards, TrialAttributes().error, TrialAttributes().objective) == (1.0, 0.0, None)
