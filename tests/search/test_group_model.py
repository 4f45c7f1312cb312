"""Laws of the quadratic model over shares by group."""

import numpy as np
import pytest

from dem_opt.search.group_model import (
    DAMPING,
    LEAST_PART,
    UNKNOWN,
    Model,
    Point,
    block_curvature,
    curvature_of,
    global_curvature,
    rescaled,
    tangential,
    updated,
)
from dem_opt.simplex import Polytope, project

CASES = [(1, 2, None), (4, 4, None), (10, 3, None), (6, 5, (0.5, 0.6, 1.0, 0.3, 0.9))]
"""Groups, shares and their caps."""


def quadratic(groups, shares, seed=0):
    """A positive definite matrix over all shares, and the gradient of  x' A x / 2 + b' x ."""
    rng = np.random.default_rng(seed)
    root_nn = rng.normal(size=(groups * shares, groups * shares))
    curvature_nn = root_nn @ root_nn.T / len(root_nn) + 0.05 * np.eye(len(root_nn))
    linear_n = rng.normal(size=len(root_nn))
    return curvature_nn, linear_n


def measure(shares_GF, curvature_nn, linear_n):
    x = shares_GF.ravel()
    value = 0.5 * x @ curvature_nn @ x + linear_n @ x
    return Point(shares_GF, float(value), (curvature_nn @ x + linear_n).reshape(shares_GF.shape))


def start(groups, shares, caps):
    caps_F = np.ones(shares) if caps is None else np.array(caps)
    centre_F = project(np.full(shares, 1 / shares), caps_F)
    return np.tile(centre_F, (groups, 1)), caps_F


@pytest.mark.parametrize(("groups", "shares", "caps"), CASES)
@pytest.mark.parametrize("shrink", [0.0, 0.7])
def test_no_step_within_the_simplices_leads_down_from_the_minimum(groups, shares, caps, shrink):
    curvature_nn, linear_n = quadratic(groups, shares)
    at_GF, caps_F = start(groups, shares, caps)
    point = measure(at_GF, curvature_nn, linear_n)
    model = Model(at_GF, tangential(point.gradient_GF), curvature_nn, at_GF[0], Polytope(caps_F), shrink)
    least_GF = model.minimum()
    np.testing.assert_allclose(least_GF.sum(axis=1), 1, atol=1e-12)
    assert (least_GF >= 0).all() and (least_GF <= caps_F + 1e-12).all()
    moved = project(least_GF + 1e-3 * np.random.default_rng(1).normal(size=(200, *least_GF.shape)), caps_F)
    assert all(model.change(other_GF) > model.change(least_GF) - 1e-9 for other_GF in moved)


@pytest.mark.parametrize("shrink", [0.0, 0.01])
def test_groups_that_do_not_act_on_each_other_are_minimized_as_if_alone(shrink):
    """However far apart their curvatures are: coefficients of the flattest group arrive as well."""
    groups, shares = 6, 4
    at_GF, caps_F = start(groups, shares, None)
    curvature_FF, _ = quadratic(1, shares)
    scales_G = np.logspace(0, np.log10(LEAST_PART), groups)
    gradient_GF = scales_G[:, None] * tangential(np.random.default_rng(3).normal(size=(groups, shares)))
    curvature_nn = np.kron(np.diag(scales_G), curvature_FF)
    least_GF = Model(at_GF, gradient_GF, curvature_nn, at_GF[0], Polytope(caps_F), shrink).minimum()
    for place, scale in enumerate(scales_G):
        alone = Model(
            at_GF[:1], gradient_GF[place][None] / scale, curvature_FF, at_GF[0], Polytope(caps_F), shrink / scale
        ).minimum()
        np.testing.assert_allclose(least_GF[place], alone[0], atol=1e-6)


def test_a_strong_penalty_keeps_the_centre_and_a_weak_one_changes_little():
    curvature_nn, linear_n = quadratic(5, 4)
    at_GF, caps_F = start(5, 4, None)
    gradient_GF = tangential(measure(at_GF, curvature_nn, linear_n).gradient_GF)
    apart = [
        np.abs(Model(at_GF, gradient_GF, curvature_nn, at_GF[0], Polytope(caps_F), shrink).minimum() - at_GF).max()
        for shrink in (0.0, 1e-6, 0.1, 1.0, 1e6)
    ]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] == pytest.approx(apart[1], abs=1e-4) and apart[-1] < 1e-5


def test_values_of_a_quadratic_give_its_curvature():
    rng = np.random.default_rng(0)
    curvature_nn, linear_n = quadratic(1, 4)
    shares_MF = rng.dirichlet(np.ones(4), size=30)
    values_M = np.array([measure(x[None], curvature_nn, linear_n).value for x in shares_MF])
    directions = tangential(rng.normal(size=(20, 4)))
    found_FF = global_curvature(shares_MF, values_M)
    for d in directions:
        assert d @ found_FF @ d == pytest.approx(d @ curvature_nn @ d, rel=0.05)
    few_FF = global_curvature(shares_MF[:8], values_M[:8])
    assert (np.linalg.eigvalsh(few_FF) > 0).all()


def test_blocks_share_the_global_curvature_by_their_parts():
    curvature_FF = np.diag([1.0, 2.0, 3.0])
    block_nn = block_curvature(curvature_FF, np.array([3.0, 1.0, 0.0]))
    assert block_nn.shape == (9, 9)
    np.testing.assert_allclose(block_nn[:3, :3], 0.75 * curvature_FF)
    np.testing.assert_allclose(block_nn[6:, 6:], LEAST_PART * curvature_FF)
    assert not block_nn[:3, 3:].any()


def test_updates_take_up_what_gradients_show_and_stay_positive():
    curvature_nn, linear_n = quadratic(3, 3)
    at_GF, _ = start(3, 3, None)
    other_GF = project(at_GF + 0.2 * np.random.default_rng(2).normal(size=at_GF.shape), np.ones(3))
    points = [measure(x, curvature_nn, linear_n) for x in (at_GF, other_GF)]
    new_nn = updated(np.eye(9) * 0.1, points)
    step_n = (other_GF - at_GF).ravel()
    change_n = tangential(points[1].gradient_GF - points[0].gradient_GF).ravel()
    np.testing.assert_allclose(new_nn @ step_n, change_n, atol=1e-10)
    assert (np.linalg.eigvalsh(new_nn) > 0).all()
    concave = [
        Point(at_GF, 0.0, points[0].gradient_GF),
        Point(other_GF, 1.0, points[0].gradient_GF - 5 * (other_GF - at_GF)),
    ]
    damped_nn = updated(np.eye(9), concave)
    assert (np.linalg.eigvalsh(damped_nn) > 0).all()
    assert step_n @ damped_nn @ step_n == pytest.approx(DAMPING * step_n @ step_n)


def test_blocks_take_on_the_scale_that_steps_show():
    """Of a quadratic that is a multiple of the beginning in each group, within what all groups together allow."""
    start_nn = block_curvature(np.eye(3), np.ones(4))
    factors_G = np.array([1.0, 2.0, 3.0, 4.0])
    truth_nn = start_nn * np.repeat(factors_G, 3)
    rng = np.random.default_rng(0)
    points = [measure(rng.dirichlet(np.ones(3), size=4), truth_nn, rng.normal(size=12)) for _ in range(12)]
    points = [measure(point.shares_GF, truth_nn, np.zeros(12)) for point in points]
    scaled_nn = rescaled(start_nn, points)
    found_G = np.diag(scaled_nn).reshape(4, 3).mean(axis=1) / np.diag(start_nn).reshape(4, 3).mean(axis=1)
    assert list(np.argsort(found_G)) == [0, 1, 2, 3]
    np.testing.assert_allclose(found_G, factors_G, rtol=0.4)
    np.testing.assert_allclose(rescaled(start_nn, points[:1]), UNKNOWN * start_nn)


@pytest.mark.parametrize(("groups", "shares", "caps"), CASES[1:])
def test_a_quadratic_is_minimized_in_a_few_steps(groups, shares, caps):
    curvature_nn, linear_n = quadratic(groups, shares)
    at_GF, caps_F = start(groups, shares, caps)
    exact = Model(
        at_GF, tangential(measure(at_GF, curvature_nn, linear_n).gradient_GF), curvature_nn, at_GF[0], Polytope(caps_F)
    ).minimum()
    least = measure(exact, curvature_nn, linear_n).value
    points = [measure(at_GF, curvature_nn, linear_n)]
    begin_nn = np.eye(groups * shares) * np.trace(curvature_nn) / len(curvature_nn)
    for _ in range(20):
        best = min(points, key=lambda point: point.value)
        model = Model(
            best.shares_GF, tangential(best.gradient_GF), curvature_of(begin_nn, points), at_GF[0], Polytope(caps_F)
        )
        points.append(measure(model.minimum(), curvature_nn, linear_n))
    gap = points[0].value - least
    assert min(point.value for point in points) - least < 0.01 * gap
