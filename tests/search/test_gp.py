"""Known answers of the Gaussian process, of the expected improvement, and of climbing it."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ndtr

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.covariance import Kernel, interpolate
from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.simplex_gp import SimplexGP, log_expected_improvement, log_h, maximize
from dem_opt.simplex import Polytope, Space, project

Array = gp.Array
ONES = np.ones(8)


def smooth(points: Array) -> Array:
    return np.asarray(2 + np.sin(3 * points[:, 0]) + points[:, 1] ** 2 - points.prod(axis=1))


def observe(size: int = 4, observations: int = 12, seed: int = 0, steep: int = 0, others: int = 0) -> gp.Observations:
    """Values of `smooth`, and gradients at the first `steep` points, but along the last `others` shares."""
    points = np.random.default_rng(seed).dirichlet(np.ones(size), observations)
    gradients = differences(smooth, points[:steep])
    gradients[:, size - others :] = 0
    return gp.observe(points, smooth(points), None, np.arange(steep), gradients, None, others)


def with_noisy_slopes(seen: gp.Observations) -> gp.Observations:
    """The same, with an error of the gradients but the first's."""
    errors = 0.3 * np.abs(seen.gradients_GF).max(axis=1) * (np.arange(len(seen.steep_G)) > 0)
    return gp.observe(seen.points_NF, seen.values_N, None, seen.steep_G, seen.gradients_GF, errors)


def process_of(size: int = 4, observations: int = 12, seed: int = 0, steep: int = 0) -> gp.GaussianProcess:
    return gp.fit(observe(size, observations, seed, steep))


def differences(function: Callable[[Array], Array], at: Array, step: float = 1e-6) -> Array:
    """Central differences of a function of rows, [M, K]."""
    steps = step * np.eye(at.shape[-1])
    return np.stack([(function(at + e) - function(at - e)) / (2 * step) for e in steps], axis=-1)


INSIDE = np.random.default_rng(1).dirichlet(np.ones(4), 6)


@pytest.mark.parametrize("steep", [0, 5])
def test_the_posterior_is_the_dense_formula(steep: int) -> None:
    """A derivative is a difference of two values over 2h, so a row is a sum of values at atoms:  C = A k(atoms) A'."""
    process, h = process_of(steep=steep), 3e-4
    kernel, seen = process.kernel, process.observations
    atoms = [*seen.points_NF]
    rows = [*np.eye(len(atoms))]
    for point in seen.points_NF[:steep]:
        for direction in seen.directions_FD.T:
            atoms += [point + h * direction, point - h * direction]
            rows.append(np.array([0.0] * (len(atoms) - 2) + [0.5 / h, -0.5 / h]))
    sums = np.array([np.pad(row, (0, len(atoms) - len(row))) for row in rows])

    def k(a: Array, b: Array) -> float:
        bell = kernel.bell * np.exp(-0.5 * ((a - b) ** 2 * kernel.precision_F).sum())
        u, v = a - 0.25, b - 0.25
        return float(25 + kernel.curvature * (u @ u) * (v @ v) + kernel.bowl * (1 + 2 * u @ v) ** 2 + bell)

    noise = (kernel.noise + gp.NOISE_FLOOR) * np.eye(len(rows))
    inverse = np.linalg.inv(sums @ np.array([[k(a, b) for b in atoms] for a in atoms]) @ sums.T + noise)
    posterior = process.posterior(INSIDE)
    for row, point in enumerate(INSIDE):
        cross = sums @ np.array([k(point, a) for a in atoms])
        mean = seen.offset + seen.scale * cross @ inverse @ seen.standard_R
        variance = seen.scale**2 * (k(point, point) - cross @ inverse @ cross)
        assert posterior.mean_M[row] == pytest.approx(mean, abs=1e-4 if steep else 1e-6)
        assert posterior.variance_M[row] == pytest.approx(variance, rel=5e-2 if steep else 1e-3, abs=5e-7)
    assert process.mean(INSIDE) == pytest.approx(posterior.mean_M, abs=1e-12)


def test_the_kernel_s_derivatives_agree_with_differences() -> None:
    kernel = Kernel(precision_F=np.array([3.0, 1.0, 0.3, 2.0]), bell=0.7, bowl=0.4, curvature=3.0)
    at = observe().points_NF[:3]
    slope = np.moveaxis(differences(lambda y: kernel.value(INSIDE, y).T, at), 0, 1)
    assert kernel.slope(INSIDE, at) == pytest.approx(slope, abs=1e-7)
    curve = np.moveaxis(differences(lambda x: kernel.slope(x, at), INSIDE), -1, -2)
    assert kernel.curve(INSIDE, at) == pytest.approx(curve, abs=1e-7)
    weights_MN, weights_MGF = (
        np.random.default_rng(2).normal(size=(6, 3)),
        np.random.default_rng(3).normal(size=(6, 3, 4)),
    )
    pull = differences(lambda x: (kernel.value(x, at) * weights_MN).sum(axis=1), INSIDE)
    assert kernel.pull(INSIDE, at, weights_MN) == pytest.approx(pull, abs=1e-7)
    pull = differences(lambda x: (kernel.slope(x, at) * weights_MGF).sum(axis=(1, 2)), INSIDE)
    assert kernel.pull_slopes(INSIDE, at, weights_MGF) == pytest.approx(pull, abs=1e-7)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_directions_span_the_plane_of_constant_sum(size: int) -> None:
    directions_FD = observe(size).directions_FD
    assert directions_FD.T @ directions_FD == pytest.approx(np.eye(size - 1), abs=1e-12)
    assert directions_FD.sum(axis=0) == pytest.approx(np.zeros(size - 1), abs=1e-12)


def test_gradients_are_interpolated_and_only_along_the_plane() -> None:
    seen = observe(steep=6)
    process = gp.fit(seen)
    slopes = process.posterior(seen.points_NF[:6]).mean_gradient_MF @ seen.directions_FD
    assert slopes == pytest.approx(seen.gradients_GF @ seen.directions_FD, abs=2e-2 * seen.scale)
    across = gp.observe(seen.points_NF, seen.values_N, None, seen.steep_G, seen.gradients_GF + 7.0)
    assert gp.fit(across).mean(INSIDE) == pytest.approx(process.mean(INSIDE), abs=1e-5)


def test_gradients_along_some_shares_say_nothing_along_the_others() -> None:
    """The posterior has the observed slopes along the plane of the first three shares; the fourth is unread."""
    seen = observe(size=4, steep=5, others=1)
    slopes = gp.fit(seen).posterior(seen.points_NF[:5]).mean_gradient_MF
    plane = np.pad(np.linalg.svd(np.ones((1, 3)))[2][1:], ((0, 0), (0, 1)))
    assert slopes @ plane.T == pytest.approx(seen.gradients_GF @ plane.T, abs=1e-2)
    gradients = np.pad(seen.gradients_GF[:, :3], ((0, 0), (0, 1)), constant_values=9.0)
    again = gp.observe(seen.points_NF, seen.values_N, None, seen.steep_G, gradients, None, 1)
    assert (gp.fit(again).posterior(seen.points_NF[:5]).mean_gradient_MF == slopes).all()


def test_gradients_tell_more_than_their_values_alone() -> None:
    error = [np.abs(process_of(4, 6, steep=steep).mean(INSIDE) - smooth(INSIDE)).max() for steep in (0, 6)]
    assert error[1] < 0.2 * error[0]


def test_a_noisy_value_is_believed_as_far_as_its_noise_allows() -> None:
    """Twenty true values and one that is off by a nat: with a standard error of a nat it hardly counts."""
    seen = observe(observations=21)
    values, variances = seen.values_N.copy(), np.zeros(21)
    values[7] += 1.0
    variances[7] = 1.0
    at = seen.points_NF[7:8]
    process = gp.fit(gp.observe(seen.points_NF, values, variances))
    assert abs(float(process.mean(at)[0]) - seen.values_N[7]) < 0.05
    assert process.posterior(at).variance_M[0] > 1e-6


@pytest.mark.parametrize("size", [2, 3, 8])
def test_values_without_noise_are_interpolated(size: int) -> None:
    process = process_of(size, observations=20)
    posterior = process.posterior(process.observations.points_NF)
    assert posterior.mean_M == pytest.approx(process.observations.values_N, abs=1e-3 * process.observations.scale)
    assert posterior.variance_M.max() < 1e-3 * process.observations.scale**2


def test_a_quadratic_is_known_from_few_values() -> None:
    """A quadratic form of three shares has six coefficients; ten values are enough for four digits."""
    rng = np.random.default_rng(0)
    form = rng.normal(size=(3, 3))
    points, others = rng.dirichlet(np.ones(3), 10), rng.dirichlet(np.ones(3), 100)

    def quadratic(x: Array) -> Array:
        return np.asarray(((x @ form) * x).sum(axis=1))

    error = gp.fit(gp.observe(points, quadratic(points))).mean(others) - quadratic(others)
    assert np.abs(error).max() < 1e-2 * quadratic(others).std()


@pytest.mark.parametrize(("size", "others"), [(2, 0), (4, 0), (8, 0), (4, 1), (8, 3)])
@pytest.mark.parametrize("away", [0.0, 0.4])
@pytest.mark.parametrize("steep", [0, 4])
def test_the_fit_s_gradient_agrees_with_differences(size: int, others: int, away: float, steep: int) -> None:
    loss = gp.NegativeLogPosterior(observe(size, steep=steep, others=others))
    theta = loss.prior_mean + away
    theta[-1] = np.log(1e-3)
    expected = differences(lambda at: np.array(loss(at)[0]), theta, 1e-5)
    assert loss(theta)[1] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_fit_s_gradient_agrees_with_differences_where_slopes_are_noisy(size: int) -> None:
    loss = gp.NegativeLogPosterior(with_noisy_slopes(observe(size, steep=4)))
    theta = loss.prior_mean.copy()
    assert len(theta) == size + 4
    theta[size + 2] = np.log(1e-3)
    expected = differences(lambda at: np.array(loss(at)[0]), theta, 1e-5)
    assert loss(theta)[1] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_error_of_slopes_is_learned() -> None:
    """Gradients of a quadratic with a relative error of 0.02 and of 0.5: the fit tells them apart."""
    rng, points = np.random.default_rng(0), np.random.default_rng(1).dirichlet(np.ones(6), 24)
    form = 2 * np.eye(6) + 0.5
    values, slopes = 0.5 * np.einsum("ni,ij,nj->n", points, form, points), points @ form
    away = np.linalg.norm((slopes - slopes[0]) - (slopes - slopes[0]).mean(axis=1, keepdims=True), axis=1) / np.sqrt(5)
    learned = []
    for error in (0.02, 0.5):
        noisy = slopes + error * away[:, None] * rng.normal(size=slopes.shape)
        seen = gp.observe(points[:4], values[:4], None, np.arange(4), noisy[:4], away[:4])
        more = gp.observe(points, values, np.full(24, 1e-2) * (np.arange(24) > 3), np.arange(24), noisy, away)
        learned.append(np.sqrt(gp.fit(more).kernel.slope_noise))
        assert gp.fit(seen).kernel.slope_noise > 0
    assert learned[0] < 0.08 and 0.25 < learned[1] < 1.0


@pytest.mark.parametrize("steep", [0, 4])
def test_the_posterior_s_gradients_agree_with_differences(steep: int) -> None:
    process = process_of(steep=steep)
    posterior = process.posterior(INSIDE)
    mean = differences(lambda at: process.posterior(at).mean_M, INSIDE)
    variance = differences(lambda at: process.posterior(at).variance_M, INSIDE)
    assert posterior.mean_gradient_MF == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert posterior.variance_gradient_MF == pytest.approx(variance, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("margin", [0.5, 0.0, -3.0])
def test_expected_improvement_s_gradient_agrees_with_differences(margin: float) -> None:
    process = process_of()
    best = float(process.mean(process.observations.points_NF).min()) + margin
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
    assert believing.mean(INSIDE) == pytest.approx(process.mean(INSIDE), abs=1e-5 * process.observations.scale)
    before, after = process.posterior(INSIDE).variance_M, believing.posterior(INSIDE).variance_M
    assert (after <= before * (1 + 1e-6) + 1e-12).all()
    assert after[:2].max() < 1e-3 * process.observations.scale**2


def test_rows_are_projected_as_points_are() -> None:
    points = np.random.default_rng(0).normal(size=(200, 5)) * np.geomspace(0.01, 10, 200)[:, None]
    for caps in (ONES[:5], np.array([0.3, 0.2, 1.0, 0.1, 0.6])):
        assert (project(points, caps) == np.array([project(point, caps) for point in points])).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_maximum_of_a_concave_function_is_found_on_its_face(size: int) -> None:
    """-|x - c|^2 / 2 is greatest at the projection of c, c' x at the vertex of the largest c."""
    rng = np.random.default_rng(size)
    centre, starts = rng.normal(size=size), rng.dirichlet(np.ones(size), 50)
    for caps in (ONES[:size], np.linspace(0.6, 0.9, size)):
        nearest = project(centre, caps)
        near, best = maximize(
            lambda x: (-0.5 * ((x - centre) ** 2).sum(axis=1), centre - x), project(starts, caps), Polytope(caps)
        )
        assert np.abs(near - nearest).max() < 1e-9
        assert ((near == 0) == (nearest == 0)).all()
        assert best == pytest.approx(-0.5 * ((nearest - centre) ** 2).sum())
    for slope in (centre, 1e5 * centre):
        far, most = maximize(
            lambda x, slope=slope: (x @ slope, np.broadcast_to(slope, x.shape)), starts, Polytope(ONES[:size])
        )
        assert (far == np.eye(size)[centre.argmax()]).all() and most == pytest.approx(slope.max())


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
        proposal = SimplexGP(space).propose(trials, [], rng).coefficients
        trials.append(Trial(number, proposal, "complete", objective=loss(space.point(proposal))))
    best = min(trials, key=lambda trial: trial.objective or np.inf)
    draws = np.random.default_rng(0).dirichlet(np.ones(4), (200, 25))
    by_chance = np.median([min(loss(x) for x in study) for study in draws]) - 2.0
    assert best.objective is not None and best.objective - 2.0 < 0.01 * by_chance
    assert ((space.point(best.coefficients) == 0) == (optimum == 0)).all()


def test_known_losses_are_interpolated_with_weights_that_sum_to_one() -> None:
    """So losses that are the same everywhere come out as they are, and smooth ones at known points nearly so."""
    rng = np.random.default_rng(0)
    points_NF = rng.dirichlet(np.ones(4), 12)
    losses_QN = quadratics(points_NF)
    for place, point_F in enumerate(points_NF):
        assert losses_QN @ interpolate(points_NF, point_F) == pytest.approx(losses_QN[:, place], abs=1e-3)
    assert interpolate(points_NF, rng.dirichlet(np.ones(4))).sum() == pytest.approx(1)
    assert interpolate(points_NF[:1], points_NF[1]) == pytest.approx([1])


def quadratics(at_NF: Array) -> Array:
    """200 random quadratics of four shares, [Q, N]."""
    forms_QFF = np.random.default_rng(7).normal(size=(200, 4, 4))
    return np.einsum("nf,qfg,ng->qn", at_NF, forms_QFF, at_NF)


def test_the_more_points_the_closer_the_guess_of_a_quadratic() -> None:
    """Root mean square over random quadratics; with five points it is nearer than the nearest of them."""
    rng = np.random.default_rng(1)
    points_NF, place_F = rng.dirichlet(np.ones(4), 40), rng.dirichlet(np.ones(4))
    losses_QN, truth_Q = quadratics(points_NF), quadratics(place_F[None])[:, 0]

    def off(guess_Q: Array) -> float:
        return float(np.sqrt(((guess_Q - truth_Q) ** 2).mean()))

    few, many = (off(losses_QN[:, :count] @ interpolate(points_NF[:count], place_F)) for count in (5, 40))
    nearest = np.abs(points_NF[:5] - place_F).sum(axis=1).argmin()
    assert many < 0.02 * few and few < 0.8 * off(losses_QN[:, nearest])
