"""Laws of the samplers, over every sampler and every space; known answers of the Gaussian process."""

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from scipy.integrate import quad
from scipy.special import ndtr

from dem_opt.config import Search
from dem_opt.samplers import gp, make_sampler
from dem_opt.samplers.history import History, Trial, distributions, from_parameters, parameters
from dem_opt.samplers.simplex_gp import (
    OBSERVATIONS,
    SimplexGP,
    log_expected_improvement,
    log_h,
    maximize,
)
from dem_opt.simplex import Coefficients, Space, project

ALGORITHMS = ["simplex-gp", "grid", "random"]
SPACES = [Space(tuple("abcdefgh"[:size]), total) for size in (1, 2, 3, 8) for total in (1.0, 0.5)]
Array = gp.Array


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(algorithm: str, space: Space, seed: int = 0) -> optuna.Study:
    settings = Search.model_validate({"algorithm": algorithm, "seed": seed, "divisions": 4})
    return optuna.create_study(sampler=make_sampler(settings, space))


def ask(study: optuna.Study, space: Space) -> tuple[optuna.Trial, Coefficients]:
    trial = study.ask(distributions(space))
    return trial, from_parameters(trial.params, space)


def bowl(space: Space) -> Callable[[Coefficients], float]:
    """|w / total - m|^2 with m at the middle of the first two coefficients' edge."""
    middle = np.zeros(space.dimension)
    middle[:2] = 1 / min(2, space.dimension)
    return lambda coefficients: float(((space.point(coefficients) / space.total - middle) ** 2).sum())


def play(study: optuna.Study, space: Space, trials: int) -> list[Coefficients]:
    loss, asked = bowl(space), []
    for _ in range(trials):
        trial, coefficients = ask(study, space)
        study.tell(trial, loss(coefficients), state=TrialState.COMPLETE)
        asked.append(coefficients)
    return asked


def add(study: optuna.Study, space: Space, points: Sequence[Coefficients], state: TrialState) -> None:
    loss = bowl(space)
    for point in points:
        value = loss(point) if state is TrialState.COMPLETE else None
        params = parameters(point)
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=distributions(space)))


def trials_for(algorithm: str, space: Space) -> int:
    """Enough to pass the landmarks; a lattice of K = 1 ends after one point, one of K = 2 after five."""
    return min(space.lattice_size(4), space.dimension + 4) if algorithm == "grid" else space.dimension + 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_proposals_are_valid_and_reproducible_by_seed(algorithm: str, space: Space) -> None:
    trials = trials_for(algorithm, space)
    asked = play(study_of(algorithm, space), space, trials)
    for coefficients in asked:
        assert tuple(coefficients.units) == space.names
        assert sum(coefficients.units.values()) == space.total_units
        assert min(coefficients.units.values()) >= 0
    assert asked == play(study_of(algorithm, space), space, trials)
    if algorithm != "grid" and space.dimension > 1:
        assert asked != play(study_of(algorithm, space, seed=1), space, trials)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_history_copied_into_a_new_study_is_continued_alike(algorithm: str, space: Space) -> None:
    trials = trials_for(algorithm, space)
    whole = play(study_of(algorithm, space), space, trials)
    resumed = study_of(algorithm, space)
    add(resumed, space, whole[:-2], TrialState.COMPLETE)
    half = dict(list(distributions(space).items())[: space.dimension // 2])
    broken = create_trial(state=TrialState.FAIL, params=dict.fromkeys(half, 0.1), distributions=half)
    resumed.add_trial(broken)
    assert whole[:-2] + play(resumed, space, len(whole[-2:])) == whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("space", [space for space in SPACES if space.dimension > 1], ids=str)
def test_running_trials_are_not_proposed_again(algorithm: str, space: Space) -> None:
    study = study_of(algorithm, space)
    play(study, space, 3)
    several = [ask(study, space)[1] for _ in range(2 if algorithm == "grid" else space.dimension + 2)]
    assert len({trial.coefficients for trial in History(space)(study)}) == 3 + len(several)


@pytest.mark.parametrize("size", [3, 8])
def test_trials_that_run_together_keep_their_distance(size: int) -> None:
    space = Space(tuple("abcdefgh"[:size]))
    centre = np.linspace(0.2, 1, size) / np.linspace(0.2, 1, size).sum()
    points = [(point, space.point(point)) for point in space.landmarks()]
    trials = [
        Trial(i, p, "complete", ((x - centre) ** 2).sum() + 0.3 * np.sin(5 * x[0])) for i, (p, x) in enumerate(points)
    ]
    for number in range(size + 1, size + 6):
        proposal = SimplexGP(space).propose(trials, [], np.random.default_rng([0, number]))
        trials.append(Trial(number, proposal, "running"))
    together = np.array([space.point(trial.coefficients) for trial in trials[size + 1 :]])
    apart = np.abs(together[:, None] - together[None]).max(axis=-1)
    assert apart[~np.eye(5, dtype=bool)].min() > 0.01


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_failed_trials_and_duplicates_do_no_harm(algorithm: str) -> None:
    space = SPACES[-2]
    study = study_of(algorithm, space)
    add(study, space, [*space.landmarks(), *space.landmarks()], TrialState.COMPLETE)
    add(study, space, list(islice(space.lattice(4), 20)), TrialState.FAIL)
    known = {trial.coefficients for trial in History(space)(study)}
    for _ in range(3):
        trial, coefficients = ask(study, space)
        assert coefficients not in known
        study.tell(trial, state=TrialState.FAIL)
        known.add(coefficients)


@pytest.mark.parametrize("state", [TrialState.FAIL, TrialState.RUNNING])
def test_nothing_told_yet_still_gives_proposals(state: TrialState) -> None:
    space = SPACES[4]
    study = study_of("simplex-gp", space)
    for _ in range(7):
        trial, _ = ask(study, space)
        if state is TrialState.FAIL:
            study.tell(trial, state=state)
    assert len({trial.coefficients for trial in History(space)(study)}) == 7


def test_equal_values_everywhere_give_proposals() -> None:
    space = SPACES[4]
    trials = [Trial(i, point, "complete", 1.5) for i, point in enumerate(space.lattice(4))]
    proposal = SimplexGP(space).propose(trials, [], np.random.default_rng(0))
    assert proposal not in {trial.coefficients for trial in trials}


@pytest.mark.parametrize("algorithm", ["simplex-gp", "random"])
def test_a_thousand_trials_told_are_no_obstacle(algorithm: str) -> None:
    space, rng = Space(tuple("abcd")), np.random.default_rng(0)
    study = study_of(algorithm, space)
    add(study, space, [*space.landmarks(), *(space.sample(rng) for _ in range(1000))], TrialState.COMPLETE)
    assert OBSERVATIONS < 1000
    _, coefficients = ask(study, space)
    assert sum(coefficients.units.values()) == space.total_units


def test_the_lattice_comes_whole_and_each_point_once() -> None:
    space = Space(("a", "b", "c"), 0.5)
    study = study_of("grid", space)
    lattice = list(space.lattice(4))
    add(study, space, lattice[3:5], TrialState.FAIL)
    assert play(study, space, len(lattice) - 2) == lattice[:3] + lattice[5:]
    with pytest.raises(ValueError, match="all 15 points"):
        ask(study, space)


def test_random_search_is_uniform() -> None:
    """Dirichlet(1, 1, 1) has mean 1/3 and variance 2/36 = 1/18."""
    space = Space(("a", "b", "c"))
    sampler_study = study_of("random", space)
    points = np.array([space.point(point) for point in play(sampler_study, space, 300)])
    assert np.abs(points.mean(axis=0) - 1 / 3).max() < 4 * np.sqrt(1 / 18 / 300)
    assert np.abs(points.var(axis=0) - 1 / 18).max() < 0.015


def test_the_start_comes_before_the_landmarks() -> None:
    space = Space(("a", "b"))
    study = study_of("simplex-gp", space)
    study.set_user_attr("start", [{"a": 3 * 10**8, "b": 7 * 10**8}])
    assert play(study, space, 4) == [space.from_units([3 * 10**8, 7 * 10**8]), *space.landmarks()]


def test_only_coefficients_are_proposed() -> None:
    study = study_of("simplex-gp", SPACES[2])
    with pytest.raises(ValueError, match="learning_rate"):
        study.ask().suggest_float("learning_rate", 0, 1)


def process_of(size: int = 4, observations: int = 12, seed: int = 0) -> gp.GaussianProcess:
    rng = np.random.default_rng(seed)
    points = rng.dirichlet(np.ones(size), observations)
    return gp.fit(points, 2 + np.sin(3 * points[:, 0]) + points[:, 1] ** 2 - points.prod(axis=1))


def differences(function: Callable[[Array], Array], at: Array, step: float = 1e-6) -> Array:
    """Central differences of a function of rows, [M, K]."""
    steps = step * np.eye(at.shape[-1])
    return np.stack([(function(at + e) - function(at - e)) / (2 * step) for e in steps], axis=-1)


INSIDE = np.random.default_rng(1).dirichlet(np.ones(4), 6)


def test_the_posterior_is_the_dense_formula() -> None:
    process = process_of()
    kernel, x = process.kernel, process.points_NK

    def k(a: Array, b: Array) -> float:
        bell = kernel.bell * np.exp(-0.5 * ((a - b) ** 2 * kernel.precision_K).sum())
        return float(25 + kernel.bowl * (1 + 2 * (a - 0.25) @ (b - 0.25)) ** 2 + bell)

    inverse = np.linalg.inv(np.array([[k(a, b) for b in x] for a in x]) + kernel.noise * np.eye(len(x)))
    posterior = process.posterior(INSIDE)
    for row, point in enumerate(INSIDE):
        cross = np.array([k(point, a) for a in x])
        mean = process.offset + process.scale * cross @ inverse @ process.standard_N
        variance = process.scale**2 * (k(point, point) - cross @ inverse @ cross)
        assert posterior.mean_M[row] == pytest.approx(mean, abs=1e-6)
        assert posterior.variance_M[row] == pytest.approx(variance, rel=1e-3, abs=1e-8)
    assert process.mean(INSIDE) == pytest.approx(posterior.mean_M, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_values_without_noise_are_interpolated(size: int) -> None:
    process = process_of(size, observations=20)
    values = process.offset + process.scale * process.standard_N
    posterior = process.posterior(process.points_NK)
    assert posterior.mean_M == pytest.approx(values, abs=1e-3 * process.scale)
    assert posterior.variance_M.max() < 1e-3 * process.scale**2


def test_a_quadratic_is_known_from_few_values() -> None:
    """A quadratic form of three shares has six coefficients; ten values are enough for four digits."""
    rng = np.random.default_rng(0)
    form = rng.normal(size=(3, 3))
    points, others = rng.dirichlet(np.ones(3), 10), rng.dirichlet(np.ones(3), 100)

    def quadratic(x: Array) -> Array:
        return np.asarray(((x @ form) * x).sum(axis=1))

    error = gp.fit(points, quadratic(points)).mean(others) - quadratic(others)
    assert np.abs(error).max() < 1e-2 * quadratic(others).std()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("away", [0.0, 0.4])
def test_the_fit_s_gradient_agrees_with_differences(size: int, away: float) -> None:
    process = process_of(size)
    loss = gp.NegativeLogPosterior(process.points_NK, process.standard_N)
    theta = loss.prior_mean + away
    theta[-1] = np.log(1e-3)
    expected = differences(lambda at: np.array(loss(at)[0]), theta, 1e-5)
    assert loss(theta)[1] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_posterior_s_gradients_agree_with_differences() -> None:
    process = process_of()
    posterior = process.posterior(INSIDE)
    mean = differences(lambda at: process.posterior(at).mean_M, INSIDE)
    variance = differences(lambda at: process.posterior(at).variance_M, INSIDE)
    assert posterior.mean_gradient_MK == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert posterior.variance_gradient_MK == pytest.approx(variance, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("margin", [0.5, 0.0, -3.0])
def test_expected_improvement_s_gradient_agrees_with_differences(margin: float) -> None:
    process = process_of()
    best = float(process.mean(process.points_NK).min()) + margin
    value, gradient = log_expected_improvement(process, best, INSIDE)
    expected = differences(lambda at: log_expected_improvement(process, best, at)[0], INSIDE)
    assert gradient == pytest.approx(expected, rel=1e-3, abs=1e-3 * np.abs(expected).max())
    assert np.isfinite(value).all()


@pytest.mark.parametrize("z", [-8.0, -1.5, -1.0, 0.0, 2.0, 9.0])
def test_log_h_is_the_expected_improvement_of_a_standard_normal(z: float) -> None:
    """h(z) = E[max(z - u, 0)], the integral of Phi from -infinity to z."""
    integral, _ = quad(ndtr, min(z, 0.0) - 15, z, epsabs=0, epsrel=1e-10)
    value, slope = log_h(np.array([z]))
    assert value[0] == pytest.approx(np.log(integral), rel=1e-8)
    assert slope[0] == pytest.approx(ndtr(z) / integral, rel=1e-8)


@pytest.mark.parametrize("seam", [-1.0, -300.0])
def test_log_h_has_no_seams_and_no_end(seam: float) -> None:
    below, at, above = (log_h(np.array([seam + step])) for step in (-1e-7, 0.0, 1e-7))
    assert above[0] - at[0] == pytest.approx(1e-7 * at[1], rel=1e-5, abs=1e-9)
    assert at[0] - below[0] == pytest.approx(1e-7 * at[1], rel=1e-5, abs=1e-9)
    assert below[1] == pytest.approx(above[1], rel=1e-6)
    value, slope = log_h(np.array([-1e12, 1e12]))
    assert np.isfinite(value).all() and slope == pytest.approx([1e12, 1e-12])


def test_believed_points_change_no_mean_and_leave_no_doubt() -> None:
    process = process_of()
    believing = process.believing(INSIDE[:2])
    assert believing.mean(INSIDE) == pytest.approx(process.mean(INSIDE), abs=1e-5 * process.scale)
    before, after = process.posterior(INSIDE).variance_M, believing.posterior(INSIDE).variance_M
    assert (after <= before * (1 + 1e-6) + 1e-12).all()
    assert after[:2].max() < 1e-3 * process.scale**2


def test_rows_are_projected_as_points_are() -> None:
    points = np.random.default_rng(0).normal(size=(200, 5)) * np.geomspace(0.01, 10, 200)[:, None]
    assert (project(points, 1.0) == np.array([project(point, 1.0) for point in points])).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_maximum_of_a_concave_function_is_found_on_its_face(size: int) -> None:
    """-|x - c|^2 / 2 is greatest at the projection of c, c' x at the vertex of the largest c."""
    rng = np.random.default_rng(size)
    centre, starts = rng.normal(size=size), rng.dirichlet(np.ones(size), 50)
    near = maximize(lambda x: (-0.5 * ((x - centre) ** 2).sum(axis=1), centre - x), starts)
    assert np.abs(near - project(centre, 1.0)).max() < 1e-9
    assert ((near == 0) == (project(centre, 1.0) == 0)).all()
    far = maximize(lambda x: (x @ centre, np.broadcast_to(centre, x.shape)), starts)
    assert (far == np.eye(size)[centre.argmax()]).all()


def merge_like(size: int, support: int, seed: int) -> tuple[Callable[[Array], float], Array]:
    """A loss in nats and where it is least: a quadratic bowl, bent, with its optimum inside a face.

    Off the face the slope is positive, so the optimum is exact: value 2, zeros outside the face.
    """
    rng = np.random.default_rng([size, support, seed])
    optimum, face = np.zeros(size), rng.permutation(size)[:support]
    optimum[face] = rng.dirichlet(np.full(support, 3.0))
    root = rng.normal(size=(2 * size, size)) / np.sqrt(2 * size)
    slope = np.where(optimum > 0, 0.0, rng.uniform(0.05, 0.3, size))

    def loss(x: Array) -> float:
        bowl = 0.5 * float(((root @ (x - optimum)) ** 2).sum())
        return 2.0 + bowl + 0.2 * bowl**2 + float(slope @ x)

    return loss, optimum


@pytest.mark.parametrize("support", [1, 2, 4])
def test_bayesian_optimization_finds_corners_and_faces_and_leaves_random_search_behind(support: int) -> None:
    loss, optimum = merge_like(4, support, seed=0)
    space, trials = Space(tuple("abcd")), list[Trial]()
    for number in range(25):
        rng = np.random.default_rng([0, number])
        proposal = SimplexGP(space).propose(trials, [], rng)
        trials.append(Trial(number, proposal, "complete", loss(space.point(proposal))))
    best = min(trials, key=lambda trial: trial.objective or np.inf)
    draws = np.random.default_rng(0).dirichlet(np.ones(4), (200, 25))
    by_chance = np.median([min(loss(x) for x in study) for study in draws]) - 2.0
    assert best.objective is not None and best.objective - 2.0 < 0.01 * by_chance
    assert ((space.point(best.coefficients) == 0) == (optimum == 0)).all()
