"""Laws of composites that were scored before a search: what they tell, which are chosen, and what is kept of them."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from dem_opt.search.samplers import make_proposer, propose
from dem_opt.search.samplers.earlier import FEWEST, Earlier, EarlierComposite
from dem_opt.search.samplers.history import Trial
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.search.warm_start import OBSERVED, Scored, beginning_of
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import BITS_PER_BYTE

Array = NDArray[np.float64]
ALL = Space(("a", "b", "c", "gone"))
SPACE = Space(("a", "b", "c"))
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def loss(corpus: str, units: dict[str, int]) -> float:
    """A bowl about a point of its own for each corpus."""
    x = np.array([units.get(name, 0) / UNIT for name in ALL.names])
    centre = {"a": [0.7, 0.1, 0.1, 0.1], "b": [0.2, 0.5, 0.1, 0.2], "c": [0.1, 0.1, 0.7, 0.1]}[corpus]
    return float(3 + ((x - centre) ** 2 * [1.0, 2.0, 1.5, 1.2]).sum() + 0.3 * x[0] * x[1])


def objective(units: dict[str, int]) -> float:
    return sum(weight * loss(corpus, units) for corpus, weight in WEIGHTS.items())


def composites(count: int, corpora: Sequence[str] = "abc", seed: int = 0, space: Space = ALL) -> list[EarlierComposite]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        units = {name: n for name, n in space.sample(rng).units.items() if name in SPACE.names or n}
        losses = {corpus: loss(corpus, units) for corpus in corpora}
        made.append(EarlierComposite(units, losses, objective(units) if len(corpora) == len(WEIGHTS) else None))
    return made


def trial(number: int, point: Coefficients) -> Trial:
    losses = {corpus: loss(corpus, point.units) for corpus in WEIGHTS}
    attributes = TrialAttributes(nll=losses)
    return Trial(number, point, "complete", objective=objective(point.units), attributes=attributes)


def lowest() -> float:
    return min(objective(SPACE.at(shares).units) for shares in np.random.default_rng(0).dirichlet(np.ones(3), 20_000))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_loss_on_a_face_is_known_from_composites_beside_it(gradients: bool) -> None:
    """A vector is dropped: what was measured with it leads to the best composite without it at the first proposal."""
    regrets = {}
    for name, earlier in {"told": Earlier(composites(24), WEIGHTS), "untold": Earlier()}.items():
        proposer = make_proposer("simplex-gp", SPACE, gradients=gradients, earlier=earlier)
        proposal = propose(proposer, [trial(0, SPACE.vertices()[0])], [SPACE.vertices()[0]] * 3, 0)
        trials = [trial(0, SPACE.vertices()[0])]
        while proposal.expected_improvement is None:
            trials.append(trial(len(trials), proposal.coefficients))
            proposal = propose(proposer, trials, [SPACE.vertices()[0]] * 3, 0)
        assert SPACE.contains(proposal.coefficients)
        regrets[name] = objective(proposal.coefficients.units) - lowest()
    assert regrets["told"] < 1e-3 and regrets["untold"] > 10 * regrets["told"]


def test_losses_on_a_new_corpus_are_predicted_with_an_error_that_covers_them() -> None:
    earlier = Earlier(composites(30, "ab") + composites(14, seed=1), WEIGHTS)
    told = earlier.measurements(SPACE, [])
    assert len(told) == 44 and all(each.error == 0 for each in told[:14])
    guessed = told[14:]
    errors = np.array([each.value - objective(each.coefficients.units) for each in guessed])
    stated = np.array([each.error for each in guessed])
    assert (stated > 0).all() and (np.abs(errors) < 3 * stated).mean() > 0.9
    # Control variates: most of the objective is known, so its error is a small part of its variation.
    assert np.abs(errors).mean() < 0.05 * np.std([objective(each.units) for each in earlier.composites])


def test_what_a_trial_scores_on_the_new_corpus_makes_the_others_surer() -> None:
    earlier = Earlier(composites(12, "ab", space=SPACE), WEIGHTS)
    points = [SPACE.sample(np.random.default_rng(seed)) for seed in range(12)]
    errors = [
        np.mean(
            [each.error for each in earlier.measurements(SPACE, [trial(n, p) for n, p in enumerate(points[:count])])]
        )
        for count in (FEWEST, 6, 12)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_nothing_is_predicted_from_too_little_or_for_an_objective_that_is_no_mean() -> None:
    partial, whole = composites(8, "ab"), composites(2, seed=1)
    assert len(Earlier(partial + whole, WEIGHTS).measurements(SPACE, [])) == 2 < FEWEST
    assert len(Earlier(partial + composites(5, seed=1)).measurements(SPACE, [])) == 5


def test_a_composite_that_a_trial_has_measured_is_told_once() -> None:
    earlier = Earlier(composites(6, space=SPACE), WEIGHTS)
    done = [trial(n, each.coefficients) for n, each in enumerate(earlier.composites[:4])]
    told = earlier.measurements(SPACE, done)
    assert {each.coefficients for each in told} == {each.coefficients for each in earlier.composites[4:]}
    stopped = [replace(each, attributes=replace(each.attributes, error=0.1)) for each in done]
    assert len(earlier.measurements(SPACE, stopped)) == 6


def test_bits_per_byte_are_read_where_they_are_the_unit() -> None:
    earlier = Earlier(composites(6, "ab", space=SPACE), WEIGHTS, BITS_PER_BYTE)
    in_nats = [trial(n, SPACE.sample(np.random.default_rng(100 + n))) for n in range(6)]
    in_bits = [replace(each, attributes=TrialAttributes(bpb=each.attributes.nll)) for each in in_nats]
    assert not earlier.measurements(SPACE, in_nats) and len(earlier.measurements(SPACE, in_bits)) == 6


def test_what_is_told_survives_being_stored() -> None:
    earlier = Earlier(composites(3, "ab") + composites(2), WEIGHTS, BITS_PER_BYTE)
    assert Earlier.from_stored(json.loads(json.dumps(earlier.to_stored()))) == earlier
    assert Earlier().to_stored() == {} and not Earlier.from_stored({}).composites


def scored(each: EarlierComposite, place: int) -> Scored:
    known = sum(WEIGHTS[name] for name in each.losses)
    mean = sum(WEIGHTS[name] * value for name, value in each.losses.items()) / known
    missing = len(WEIGHTS) - len(each.losses)
    return Scored(
        missing=missing, violation=0.0, objective=mean, key=f"{place:04}", units=each.units, losses=each.losses
    )


def identity_of(**changed: object) -> StudyIdentity:
    return replace(StudyIdentity("base", {}, SPACE, {name: 5 * n for name, n in WEIGHTS.items()}, {}, {}), **changed)


@pytest.mark.parametrize("count", [5, OBSERVED, 3 * OBSERVED])
def test_the_best_composites_are_told_and_the_others_from_far_apart(count: int) -> None:
    ranked = sorted(scored(each, place) for place, each in enumerate(composites(count)))
    told = beginning_of(identity_of(), ranked).earlier
    assert len({each.coefficients for each in told.composites}) == min(count, OBSERVED)
    assert told.weights == pytest.approx(WEIGHTS)
    by_units = {tuple(sorted(each.units.items())) for each in told.composites}
    assert all(tuple(sorted(each.units.items())) in by_units for each in ranked[: OBSERVED // 2])


def test_a_vector_that_few_composites_have_tells_nothing_of_the_space() -> None:
    placebo = {"a": 0, "b": 0, "c": 0, "placebo": UNIT}
    alone = EarlierComposite(placebo, {name: loss(name, placebo) for name in WEIGHTS}, 3.0)
    ranked = sorted(scored(each, place) for place, each in enumerate([*composites(6), alone]))
    told = beginning_of(identity_of(), ranked).earlier
    assert told.others(SPACE) == ("gone",) and len(told.composites) == 6


def test_only_whole_composites_are_told_where_losses_do_not_add_up() -> None:
    ranked = sorted(scored(each, place) for place, each in enumerate(composites(6, "ab") + composites(4, seed=1)))
    assert not beginning_of(identity_of(worst=True), ranked).earlier.composites
    told = beginning_of(identity_of(protect={"a": 0.1}), ranked).earlier
    assert len(told.composites) == 4 and all(each.value is not None for each in told.composites)
    assert len(told.measurements(SPACE, [])) == 4
