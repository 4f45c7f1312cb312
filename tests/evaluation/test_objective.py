"""Known answers of what is minimized, and of what is violated."""

from dem_opt.evaluation.objective import Objective, mean_nll, violation
from dem_opt.types import Score


def test_the_objective_is_the_weighted_mean_of_distributions():
    scores = {"a": Score((1.0,), (1,)), "b": Score((6.0,), (2,))}
    assert mean_nll(scores, {"a": 1, "b": 1}) == 2.0
    assert mean_nll(scores, {"a": 1, "b": 3}) == 2.5
    assert mean_nll({"a": scores["a"]}, {"a": 1, "b": 0}) == 1.0


def test_an_objective_is_the_mean_or_the_largest_regret():
    scores = {"a": Score((1.0,), (1,)), "b": Score((6.0,), (2,)), "c": Score((9.0,), (1,))}
    mean = Objective({"a": 1.0, "b": 3.0, "c": 0.0})
    assert mean(scores) == 2.5 and mean.shares(scores) == {"a": 0.25, "b": 0.75}
    # Regrets: a 1 - 0.5 = 0.5, b 3 - 2.75 = 0.25; c would be 9 and has no weight.
    own = {"a": Score((0.5,), (1,)), "b": Score((5.5,), (2,)), "c": Score((0.0,), (1,))}
    worst = Objective(mean.weights, own)
    assert worst(scores) == 0.5 and worst.shares(scores) == {"a": 1.0}


def test_a_violation_is_what_exceeds_the_allowances_in_all():
    # "a": 2.5 - 2 - 0.25 = 0.25 over; "b": 3 - 1 - 0.5 = 1.5 over; "c" is better than the base; "d" is not protected.
    base = {name: Score((nll,), (1,)) for name, nll in {"a": 2.0, "b": 1.0, "c": 3.0, "d": 1.0}.items()}
    scores = {name: Score((nll,), (1,)) for name, nll in {"a": 2.5, "b": 3.0, "c": 1.0, "d": 9.0}.items()}
    assert violation(scores, base, {"a": 0.25, "b": 0.5, "c": 0.0}) == 1.75
    assert (
        violation(scores, base, {"c": 0.0}) == violation(scores, base, {}) == violation(base, base, {"a": 0.0}) == 0.0
    )
    assert violation(scores, base, {"b": 2.0}) == 0.0, "an allowance may be used up"
    assert violation({"a": scores["a"]}, base, {"a": 0.25, "b": 0.5}) == 0.25, "what is not scored yet is not counted"
