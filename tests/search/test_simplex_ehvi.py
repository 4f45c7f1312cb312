"""Expected hypervolume improvement: Monte Carlo and finite differences, and what the search makes of it."""

import numpy as np
import pytest

from dem_opt.pareto import front_of, hypervolume
from dem_opt.search.samplers import gp, make_proposer, propose
from dem_opt.search.samplers.history import Trial, losses_of
from dem_opt.search.samplers.simplex_ehvi import SimplexEHVI, log_expected_improvement, reference_point
from dem_opt.search.samplers.simplex_gp import OBSERVATIONS
from dem_opt.simplex import Space

SPACE = Space(("a", "b", "c"))
BOTTOMS = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
BOWLS = np.array([[1.0, 2.0, 0.5], [1.5, 0.7, 1.0]])
FRONTS = {
    "none": np.zeros((0, 2)),
    "one": np.array([[0.2, 0.3]]),
    "three": np.array([[-1.0, 1.0], [0.0, 0.2], [0.8, -0.5]]),
    "beyond the reference": np.array([[-3.0, 2.0], [0.5, 0.5], [3.0, -2.0]]),
}
REFERENCE = (1.5, 1.5)


def losses(coefficients):
    """Two bowls whose front is a line from one bottom to the other."""
    return tuple(float(loss) for loss in (BOWLS * (SPACE.point(coefficients) - BOTTOMS) ** 2).sum(axis=1))


def posterior(means, deviations):
    """The posterior of one loss at points whose gradient does not matter."""
    zeros = np.zeros((len(means), 3))
    variances = np.asarray(deviations, dtype=float) ** 2
    return gp.Posterior(
        mean_M=np.asarray(means, dtype=float),
        variance_M=variances,
        mean_gradient_MF=zeros,
        variance_gradient_MF=zeros,
    )


def complete(number, point):
    both = losses(point)
    return Trial(number, point, "complete", objective=sum(both) / 2, losses=both)


def search(algorithm, seed, trials):
    proposer, history = make_proposer(algorithm, SPACE, objectives=2), []
    for number in range(trials):
        history.append(complete(number, propose(proposer, history, (), seed).coefficients))
    return history


def volume(history):
    return hypervolume(losses_of(history), (1.0, 1.0))


@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS.keys())
@pytest.mark.parametrize(
    ("mean", "deviation"),
    [((0.0, 0.0), (0.5, 0.3)), ((-1.5, 0.7), (0.2, 1.0)), ((1.0, 1.0), (1.0, 1.0)), ((0.1, -1.2), (1e-3, 0.4))],
)
def test_it_is_the_mean_of_what_draws_add(front, mean, deviation):
    means, deviations = (([each] for each in both) for both in (mean, deviation))
    first, second = map(posterior, means, deviations)
    (log_value,), _ = log_expected_improvement(first, second, front, REFERENCE)
    draws = np.random.default_rng(0).normal(mean, deviation, (3000, 2))
    before = hypervolume(front, REFERENCE)
    added = [hypervolume(np.vstack([front, draw]), REFERENCE) - before for draw in draws]
    error = np.std(added) / np.sqrt(len(added))
    assert np.exp(log_value) == pytest.approx(np.mean(added), abs=4 * error + 1e-12)


def test_a_point_that_is_known_adds_its_own_area():
    """E of (0.1, 0.1) beside (0.2, 0.3) up to (1.5, 1.5): 1.4 x 1.4 - 1.3 x 1.2."""
    first, second = posterior([0.1], [1e-7]), posterior([0.1], [1e-7])
    (log_value,), _ = log_expected_improvement(first, second, FRONTS["one"], REFERENCE)
    assert np.exp(log_value) == pytest.approx(1.4 * 1.4 - 1.3 * 1.2, rel=1e-6)


def test_it_is_finite_and_falls_far_from_the_front():
    means = [0.5, 1.0, 3.0, 10.0, 100.0]
    first, second = posterior(means, [0.01] * 5), posterior(means, [0.01] * 5)
    log_values, _ = log_expected_improvement(first, second, FRONTS["three"], REFERENCE)
    assert np.isfinite(log_values).all() and (np.diff(log_values) < 0).all() and log_values[-1] < -1e7


def test_its_gradient_is_that_of_differences():
    history = search("random", 0, 12)
    processes = [
        gp.fit(gp.observe(np.array([SPACE.shares(trial.coefficients) for trial in history]), each))
        for each in losses_of(history).T
    ]
    front, reference = front_of(losses_of(history)), reference_point(losses_of(history))

    def value(shares_MF):
        return log_expected_improvement(*(process.posterior(shares_MF) for process in processes), front, reference)

    points = np.random.default_rng(1).dirichlet(np.ones(3), 100)
    points = points[value(points)[0] > -100]  # far from the front differences of the logarithm are not exact
    assert len(points) > 5
    log_values, gradient = value(points)
    step = 1e-6
    for axis in range(3):
        moved = step * np.eye(3)[axis]
        slope = (value(points + moved)[0] - value(points - moved)[0]) / (2 * step)
        assert gradient[:, axis] == pytest.approx(slope, rel=1e-4, abs=1e-3)
    assert np.isfinite(log_values).all()


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_random_search_and_nsga_ii(seed):
    """The best front: minimizers of  t L_1 + (1 - t) L_2 , by the stationary point on the plane of constant sum."""
    weights = np.linspace(0, 1, 200)[:, None]
    curvature = weights * BOWLS[0] + (1 - weights) * BOWLS[1]
    pull = weights * BOWLS[0] * BOTTOMS[0] + (1 - weights) * BOWLS[1] * BOTTOMS[1]
    shift = (1 - (pull / curvature).sum(axis=1)) / (1 / curvature).sum(axis=1)
    points = (pull + shift[:, None]) / curvature
    assert (points >= 0).all()
    losses_N2 = (BOWLS * (points[:, None] - BOTTOMS) ** 2).sum(axis=-1)
    best = hypervolume(losses_N2, (1.0, 1.0))
    regrets = {name: 1 - volume(search(name, seed, 20)) / best for name in ("simplex-gp", "random", "nsga2")}
    assert 0 < regrets["simplex-gp"] < 0.015  # twenty points leave steps, so it is never 0
    assert regrets["simplex-gp"] < 0.4 * min(regrets["random"], regrets["nsga2"])


def test_running_and_failed_trials_are_kept_away_from():
    history = search("simplex-gp", 0, 8)
    proposer = SimplexEHVI(SPACE)
    for number in range(8, 12):
        history.append(Trial(number, propose(proposer, history, (), 0).coefficients, "running"))
    assert len({trial.coefficients for trial in history}) == 12
    failed = Trial(12, propose(proposer, history, (), 0).coefficients, "failed")
    assert losses_of([*history[:8], failed])[-1].tolist() == losses_of(history[:8]).max(axis=0).tolist()
    assert propose(proposer, [*history, failed], (), 0).coefficients not in {failed.coefficients}


@pytest.mark.parametrize("state", ["running", "failed"])
def test_without_losses_points_are_drawn(state):
    proposer, history = SimplexEHVI(SPACE), []
    for number in range(8):
        history.append(Trial(number, propose(proposer, history, (), 0).coefficients, state))
    assert len({trial.coefficients for trial in history}) == 8


def test_equal_losses_everywhere_give_proposals():
    lattice = enumerate(SPACE.lattice(4))
    history = [Trial(number, point, "complete", objective=1.0, losses=(1.0, 1.0)) for number, point in lattice]
    assert propose(SimplexEHVI(SPACE), history, (), 0).coefficients not in {trial.coefficients for trial in history}


def test_of_many_trials_the_front_and_the_latest_are_seen():
    rng = np.random.default_rng(0)
    points = [*SPACE.landmarks(), *(SPACE.sample(rng) for _ in range(OBSERVATIONS + 50))]
    history = [complete(number, point) for number, point in enumerate(points)]
    point = propose(SimplexEHVI(SPACE), history, (), 0).coefficients
    assert SPACE.contains(point) and volume([*history, complete(len(history), point)]) > volume(history)


def test_a_proposal_has_no_improvement_in_the_objectives_unit():
    assert propose(SimplexEHVI(SPACE), search("random", 0, 6), (), 0).expected_improvement is None
