"""Laws of composites, windows and scores."""

from itertools import permutations
from math import exp, inf, log, nan

import numpy as np
import pytest

from dem_opt.errors import EvaluationError
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.types import Composite, CorpusLayout, Score, TrialRecord, Windows

EXPERTS = {"a": "hash-3", "b": "hash-1", "c": "hash-2"}


@pytest.mark.parametrize("order", list(permutations(EXPERTS)), ids="".join)
def test_a_composite_knows_content_alone(order):
    coefficients = Space(order).check({"a": 0.5, "b": 0.2, "c": 0.3})
    composite = Composite.edited("hash-0", {name: EXPERTS[name] for name in order}, coefficients)
    assert composite.terms == (("hash-1", 200_000_000), ("hash-2", 300_000_000), ("hash-3", 500_000_000))


def test_the_base_takes_what_is_left():
    halves = Space(("a", "b"), total=0.5).check({"a": 0.25, "b": 0.25})
    assert dict(Composite.edited("hash-0", EXPERTS, halves).terms)["hash-0"] == UNIT // 2


def test_a_vertex_is_its_checkpoint_and_no_coefficients_are_the_base():
    vertex = Space(("a", "b")).check({"a": 1})
    assert Composite.edited("hash-0", EXPERTS, vertex) == Composite.single("hash-3")
    nothing = Coefficients((("a", 0), ("b", 0)))
    assert Composite.edited("hash-0", EXPERTS, nothing) == Composite.single("hash-0")


def test_equal_contents_are_one_term():
    halves = Space(("a", "b")).check({"a": 0.5, "b": 0.5})
    assert Composite.edited("hash-0", {"a": "same", "b": "same"}, halves) == Composite.single("same")


def test_the_key_tells_composites_apart():
    space = Space(("a", "b", "c"))
    keys = {Composite.edited("hash-0", EXPERTS, point).key for point in space.lattice(10)}
    assert len(keys) == space.lattice_size(10)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_loss_that_is_not_finite_is_no_score(bad):
    with pytest.raises(EvaluationError, match="window 1"):
        Score((1.0, bad), (2, 2))


def test_perplexity_weighs_windows_by_their_tokens():
    # 6 nats over 2 tokens and 2 nats over 2: (6 + 2) / 4 = 2 nats per token, perplexity e^2.
    score = Score((6.0, 2.0), (2, 2))
    assert score.nll == 2.0 and score.perplexity == pytest.approx(exp(2))
    assert Score((log(7) * 3,), (3,)).perplexity == pytest.approx(7)
    assert Score((1e6,), (1,)).perplexity == inf


def test_feasible_trials_rank_first_and_the_penalty_is_ten_for_one():
    point = Space(("a", "b")).centroid()
    trials = [
        TrialRecord(study="s", number=number, coefficients=point, objective=objective, violation=over)
        for number, (objective, over) in enumerate([(1.0, 0.5), (3.0, 0.0), (0.5, 0.6), (2.0, 0.0), (1.5, 0.5)])
    ]
    assert [trial.number for trial in sorted(trials, key=lambda trial: trial.rank)] == [3, 1, 0, 4, 2]
    assert [trial.penalized for trial in trials] == [6.0, 3.0, 6.5, 2.0, 6.5]
    assert TrialRecord(study="s", number=0, coefficients=point, objective=None).penalized is None


@pytest.mark.parametrize("field", ["ids_WT", "positions_WT", "scored_WT"])
def test_the_digest_sees_every_array(field):
    arrays = {
        "ids_WT": np.arange(8).reshape(2, 4),
        "positions_WT": np.tile(np.arange(4), (2, 1)),
        "scored_WT": np.tile(np.arange(4) > 0, (2, 1)),
    }
    changed = arrays[field].copy()
    changed[1, 3] = not changed[1, 3] if field == "scored_WT" else changed[1, 3] + 1
    assert Windows(**arrays).digest == Windows(**{name: array.copy() for name, array in arrays.items()}).digest
    assert Windows(**arrays).digest != Windows(**arrays | {field: changed}).digest


def test_documents_and_bytes_are_no_part_of_the_digest():
    arrays = [np.arange(8).reshape(2, 4), np.tile(np.arange(4), (2, 1)), np.array([[0, 1, 1, 1], [0, 1, 1, 0]]) > 0]
    documents_WT, bytes_WT = np.array([[0, 0, 2, 2], [2, 2, 3, -1]]), np.array([[0, 1, 1, 3], [0, 0, 2, 0]])
    bare, known = Windows(*arrays), Windows(*arrays, documents_WT=documents_WT, bytes_WT=bytes_WT)
    assert bare.digest == known.digest
    assert bare.layout is None
    assert known.layout == CorpusLayout((5, 2), ({0: 1, 2: 2}, {2: 1, 3: 1}))
