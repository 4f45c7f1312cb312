"""Laws of how well coefficients are known, on a problem whose optimum is known.

Each window of corpus i loses  |w - a_i|^2 / 2 + g . w  nats per token, with its own g ~ N(0, SLOPE^2): the mean over
all windows there are has its optimum at the mean of the a_i, and W windows of each of K corpora shift it by the mean
of K W values of g.
"""

from dataclasses import replace

import numpy as np
import pytest

from dem_opt.analysis.precision import FEWEST, precision_of, windows_for
from dem_opt.evaluation.objective import Objective
from dem_opt.simplex import Space
from dem_opt.types import Precision, Score, TrialRecord

SPACE = Space(("a", "b", "c"))
CENTRES = np.array([[0.9, 0.0, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
OBJECTIVE = Objective(dict.fromkeys(SPACE.names, 1.0))
OPTIMUM = CENTRES.mean(axis=0)
SLOPE = 0.5


def trials(windows: int, seed: int, count: int = 24) -> list[TrialRecord]:
    """Composites about the optimum and elsewhere, scored on a sample of windows."""
    rng = np.random.default_rng(seed)
    slopes = SLOPE * rng.normal(size=(3, windows, 3))
    levels = 3 + rng.normal(size=(3, windows))
    points = [*SPACE.landmarks(), *(SPACE.sample(rng) for _ in range(count - 4))]
    records = []
    for number, coefficients in enumerate(points):
        point = SPACE.point(coefficients)
        nll = ((point - CENTRES) ** 2).sum(axis=1)[:, None] / 2 + slopes @ point + levels
        scores = {
            name: Score(tuple((100 * row).tolist()), (100,) * windows)
            for name, row in zip(SPACE.names, nll, strict=True)
        }
        objective = float(nll.mean())
        records.append(
            TrialRecord(study="s", number=number, coefficients=coefficients, objective=objective, scores=scores)
        )
    return records


def expected_regret(windows: int) -> float:
    """The sample's optimum is off by the part in the plane of the mean of 3 W slopes, which has 2 dimensions:

    E |shift|^2 / 2 = 2 SLOPE^2 / (3 W) / 2 .
    """
    return SLOPE**2 / (3 * windows)


@pytest.mark.parametrize("windows", [16, 64])
def test_the_regret_is_what_other_windows_would_cost(windows: int) -> None:
    estimates = [precision_of(SPACE, trials(windows, seed), OBJECTIVE) for seed in range(6)]
    regrets = [estimate.regret for estimate in estimates if estimate]
    assert len(regrets) == 6 and np.mean(regrets) == pytest.approx(expected_regret(windows), rel=0.35)
    assert all(estimate.windows == windows and estimate.high > estimate.regret for estimate in estimates if estimate)


def test_four_times_the_windows_leave_a_quarter() -> None:
    few, many = (
        np.mean(
            [
                precision.regret
                for seed in range(6)
                if (precision := precision_of(SPACE, trials(windows, seed), OBJECTIVE))
            ]
        )
        for windows in (16, 64)
    )
    assert many == pytest.approx(few / 4, rel=0.4)
    known = Precision(windows=16, composites=9, regret=0.004, high=0.01, intervals={}, noise=0.01)
    assert known.regret_with(4) == 0.001 and windows_for(known, 0.0005) == 128 and windows_for(known, 0.1) == 8


@pytest.mark.parametrize("windows", [16, 64])
@pytest.mark.parametrize("part", [slice(None), slice(1, 12), slice(12, None)], ids=["all", "near", "far"])
def test_the_noise_does_not_depend_on_which_composites_were_scored(windows: int, part: slice) -> None:
    """At distance x the difference is  x^2 / 2  and its variance  SLOPE^2 x^2 / (3 W) ."""
    noises = []
    for seed in range(6):
        ranked = sorted(trials(windows, seed), key=lambda trial: trial.rank)
        precision = precision_of(SPACE, [ranked[0], *ranked[part]], OBJECTIVE)
        assert precision is not None
        noises.append(precision.noise)
    assert np.mean(noises) == pytest.approx(2 * SLOPE**2 / (3 * windows), rel=0.3)


def test_intervals_hold_the_optimum_about_as_often_as_they_say() -> None:
    covered = []
    for seed in range(12):
        precision = precision_of(SPACE, trials(32, seed), OBJECTIVE)
        assert precision is not None
        covered += [
            low <= value <= high for (low, high), value in zip(precision.intervals.values(), OPTIMUM, strict=True)
        ]
    assert np.mean(covered) >= 0.85


def test_windows_of_one_document_count_once() -> None:
    """Every window four times, as windows of a document of its own: nothing is known better than from it once."""
    documents = {name: [{window // 4: 100} for window in range(64)] for name in SPACE.names}
    estimates = []
    for seed in range(6):
        once = trials(16, seed)
        repeated = [
            replace(record, scores={name: _repeated(score, 4) for name, score in record.scores.items()})
            for record in once
        ]
        alone, together = precision_of(SPACE, once, OBJECTIVE), precision_of(SPACE, repeated, OBJECTIVE, documents)
        assert alone is not None and together is not None
        estimates.append((alone.regret, together.regret))
        assert together.noise == pytest.approx(alone.noise, rel=0.3)  # other draws of the same distribution
        assert (alone.sampled, together.sampled) == ("windows", "documents")
    alone_R, together_R = np.transpose(estimates)
    assert together_R.mean() == pytest.approx(alone_R.mean(), rel=0.2)


def test_penalties_far_off_change_nothing() -> None:
    """Corners are forbidden by many nats, times the penalty; the optimum and what is near it are allowed."""
    limit, estimates = 2.0, []
    for seed in range(6):
        free = trials(16, seed)
        excess = [40 * (float(((SPACE.point(record.coefficients) - OPTIMUM) ** 2).sum()) - 0.15) for record in free]
        bound = [
            replace(record, scores={**record.scores, "general": Score((limit + each,), (1,))}, violation=max(each, 0.0))
            for record, each in zip(free, excess, strict=True)
        ]
        assert max(excess) > 5 and min(excess) < 0
        alone = precision_of(SPACE, free, OBJECTIVE)
        protected = precision_of(SPACE, bound, OBJECTIVE, None, {"general": limit})
        assert alone is not None and protected is not None
        estimates.append((alone.regret, protected.regret))
        for name, (low, high) in protected.intervals.items():
            assert (low, high) == pytest.approx(alone.intervals[name], abs=0.06)
    alone_R, protected_R = np.transpose(estimates)
    assert protected_R.mean() == pytest.approx(alone_R.mean(), rel=0.2)


def _repeated(score: Score, times: int) -> Score:
    return Score(tuple(np.repeat(score.nats_W, times).tolist()), tuple(np.repeat(score.tokens_W, times).tolist()))


def test_nothing_is_said_where_a_corpus_is_one_document() -> None:
    documents = {"b": [{0: 100}] * 16}
    assert precision_of(SPACE, trials(16, 0), OBJECTIVE, documents) is None


def test_windows_that_agree_leave_no_regret() -> None:
    same = [
        TrialRecord(
            study="s",
            number=record.number,
            coefficients=record.coefficients,
            objective=record.objective,
            scores={name: Score((100 * score.nll,) * 4, (100,) * 4) for name, score in record.scores.items()},
        )
        for record in trials(16, 0)
    ]
    precision = precision_of(SPACE, same, OBJECTIVE)
    assert (
        precision is not None
        and precision.regret == 0
        and all(high - low < 1e-9 for low, high in precision.intervals.values())
    )


def test_nothing_is_said_of_too_few_composites_or_a_single_point() -> None:
    assert precision_of(SPACE, trials(16, 0, FEWEST - 1), OBJECTIVE) is None
    assert precision_of(Space(("a",)), [], Objective({"a": 1.0})) is None
