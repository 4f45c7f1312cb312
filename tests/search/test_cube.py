"""Laws of the chart between cube and shares, and of Optuna's samplers that are asked over it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from dem_opt.search.samplers.cube import DEAD, from_shares, to_shares
from dem_opt.search.samplers.history import State, Trial
from dem_opt.search.samplers.optuna_sampler import OptunaSampler, tpe
from dem_opt.simplex import Coefficients, Family, Space

SIMPLEX = Space(tuple("abc"))
SPACES = [
    Space(tuple("ab")),
    SIMPLEX,
    Space(tuple("abcdefgh"), 0.5),
    Space(tuple("abc"), 2.0, 0.0),
    Space(tuple("abcd"), bounds=(("a", 0.0, 0.3), ("b", 0.1, 0.5))),
    Space(tuple("abcd"), 1.5, 0.5, (("a", 0.1, 0.4), ("b", 0.2, 0.2))),
    Space(tuple("abc"), bounds=(("a", 0.0, 0.35), ("b", 0.0, 0.35), ("c", 0.0, 0.35))),
    Space(tuple("abcd"), 1.5, 0.5, (("a", 0.1, 0.4),), (Family("ab", ("a", "b"), 0.2, 0.7),)),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def points_of(space: Space) -> list[Coefficients]:
    rng = np.random.default_rng(0)
    return [*space.landmarks(), *space.lattice(3), *space.lattice(8), *(space.sample(rng) for _ in range(50))]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_shares_come_back_from_the_cube(space: Space) -> None:
    for point in points_of(space):
        shares = space.shares(point)
        cube = from_shares(shares, space.caps_F)
        assert (cube >= 0).all() and (cube <= 1).all()
        assert to_shares(cube, space.caps_F) == pytest.approx(shares, abs=1e-12)
        assert space.at(to_shares(cube, space.caps_F)) == point


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_point_of_the_cube_is_in_the_space(space: Space) -> None:
    caps, rng = space.caps_F, np.random.default_rng(0)
    draws = rng.random((300, len(caps))) * rng.choice([DEAD, 1.0], (300, len(caps)))
    for cube in [*draws, np.zeros(len(caps)), np.ones(len(caps))]:
        shares = to_shares(cube, caps)
        assert shares.sum() == pytest.approx(1, abs=1e-12)
        assert (shares >= 0).all() and (shares <= caps + 1e-12).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_around_a_face_and_at_caps_the_shares_stay_at_their_bounds(space: Space) -> None:
    rng = np.random.default_rng(0)
    for point in points_of(space):
        shares, caps = space.shares(point), space.caps_F
        near = from_shares(shares, caps) + rng.uniform(-1, 1, len(caps)) * 0.4 * DEAD * (shares == 0)
        assert ((space.shares(space.at(to_shares(near, caps))) == 0) == (shares == 0)).all()


def test_where_all_are_dead_shares_are_equal_as_far_as_caps_allow() -> None:
    assert to_shares(np.array([0.0, DEAD, DEAD / 3]), np.ones(3)) == pytest.approx([1 / 3] * 3)
    # One at a cap of 0.2 leaves 0.4 for each of the others.
    assert to_shares(np.zeros(3), np.array([0.2, 1.0, 1.0])) == pytest.approx([0.2, 0.4, 0.4])


def test_what_caps_cut_off_goes_to_those_alive() -> None:
    """Of (2, 1, 1) / 4 the first is cut to 0.3, the others divide 0.7; alone and alive, it leaves 0.7 to the dead."""
    caps, alive = np.array([0.3, 1.0, 1.0, 1.0]), DEAD + 0.2 * np.array([2, 1, 1, 0])
    assert to_shares(alive, caps) == pytest.approx([0.3, 0.35, 0.35, 0])
    assert to_shares(np.array([1.0, 0, 0, 0]), caps) == pytest.approx([0.3, *[0.7 / 3] * 3])


class Listener(BaseSampler):
    """Keeps what it is shown, and proposes the same point each time."""

    def __init__(self, log: list[list[FrozenTrial]], point: float) -> None:
        self.log, self.point = log, point

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self.log.append([other for other in study.get_trials() if other.number != trial.number])
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        return self.point


def history(points: Sequence[Coefficients], state: State = "complete", begin: int = 0) -> list[Trial]:
    value = {"complete": float, "running": lambda _: None, "failed": lambda _: None}[state]
    return [Trial(begin + i, point, state, objective=value(i)) for i, point in enumerate(points)]


def shown(trials: list[Trial], most: int = 1000, point: float = 0.5) -> tuple[list[list[FrozenTrial]], Coefficients]:
    log: list[list[FrozenTrial]] = []
    sampler = OptunaSampler(SIMPLEX, lambda seed: Listener(log, point), most)
    return log, sampler.propose(trials, [], np.random.default_rng(0)).coefficients


def more(count: int) -> list[Coefficients]:
    rng = np.random.default_rng(5)
    return [SIMPLEX.sample(rng) for _ in range(count)]


def test_a_sampler_is_shown_the_history_as_it_stands() -> None:
    """Running trials as running; failed ones with the worst value, which for 4 landmarks told as 0, 1, 2, 3 is 3."""
    trials = history(SIMPLEX.landmarks())
    trials += history(more(1), "failed", 4) + history(more(2)[1:], "running", 5)
    log, _ = shown(trials, point=0.4)
    assert [trial.value for trial in log[0]] == [0, 1, 2, 3, 3, None]
    assert [trial.state for trial in log[0]] == [TrialState.COMPLETE] * 5 + [TrialState.RUNNING]
    for frozen, trial in zip(log[0], trials, strict=True):
        cube = np.array(list(frozen.params.values()))
        assert SIMPLEX.at(to_shares(cube, SIMPLEX.caps_F)) == trial.coefficients


def test_a_long_history_is_thinned_but_for_what_runs() -> None:
    points = more(60)
    trials = [*history([*SIMPLEX.landmarks(), *points[:50]]), *history(points[50:], "running", 54)]
    log, _ = shown(trials, most=20)
    values = [trial.value for trial in log[0]]
    assert values == [*range(10), *range(44, 54), *[None] * 10]


def test_what_is_proposed_again_is_asked_anew_and_then_drawn() -> None:
    """Equal coordinates are the centroid, a landmark: each further asking sees the last ones running."""
    trials = history(SIMPLEX.landmarks())
    log, proposed = shown(trials)
    assert len(log) > 1 and [len(seen) for seen in log] == [4 + i for i in range(len(log))]
    assert all(trial.state is TrialState.RUNNING for seen in log for trial in seen[4:])
    assert proposed not in SIMPLEX.landmarks()


def test_tpe_gets_better_and_depends_on_its_seed() -> None:
    sampler, goal = OptunaSampler(SIMPLEX, tpe, most=100), np.array([0.7, 0.3, 0.0])

    def play(seed: int) -> list[float]:
        trials: list[Trial] = []
        for number in range(30):
            proposal = sampler.propose(trials, [], np.random.default_rng([seed, number]))
            value = float(((SIMPLEX.point(proposal.coefficients) - goal) ** 2).sum())
            assert proposal.expected_improvement is None
            trials.append(Trial(number, proposal.coefficients, "complete", objective=value))
        return [trial.objective for trial in trials if trial.objective is not None]

    values = play(0)
    assert min(values) < 0.5 * min(values[:4]), "better than the landmarks by far"
    assert values == play(0) and values != play(1)
