"""Known answers of CMA-ES, of sequential quadratic programming, and of all at the corners of a space."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from cmaes import CMA
from numpy.typing import NDArray
from scipy.optimize import linprog

from dem_opt.search.samplers.cmaes import CMAES
from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.observations import Measurement, compressed, observe
from dem_opt.search.samplers.optuna_sampler import OptunaSampler, tpe
from dem_opt.search.samplers.proposer import Proposal, Proposer
from dem_opt.search.samplers.simplex_gp import SimplexGP
from dem_opt.search.samplers.slsqp import SLSQP
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.simplex import Coefficients, Family, Space

Array = NDArray[np.float64]
Loss = Callable[[Array], tuple[float, Array]]
SIMPLEX = Space(tuple("abcd"))
SPACES = [
    Space(tuple("abc"), 2.0, 0.0),
    Space(tuple("abcd"), bounds=(("a", 0.0, 0.3), ("b", 0.1, 0.5))),
    Space(tuple("abcd"), 1.5, 0.5, (("a", 0.1, 0.4), ("b", 0.2, 0.2))),
    Space(tuple("abcd"), 1.5, 0.5, (("a", 0.1, 0.4),), (Family("ab", ("a", "b"), 0.2, 0.7),)),
    Space(tuple("abcd"), families=(Family("ac", ("a", "c"), 0.3, 0.3), Family("bd", ("b", "d"), 0.7, 0.7))),
]


def completed(space: Space, number: int, point: Coefficients, loss: Loss) -> Trial:
    value, slope = loss(space.point(point))
    gradient = dict(zip(space.names, slope.tolist(), strict=True))
    return Trial(number, point, "complete", objective=value, attributes=TrialAttributes(gradient=gradient))


def propose(proposer: Proposer, trials: Sequence[Trial], seed: int = 0, begin: Sequence[Coefficients] = ()) -> Proposal:
    return proposer.propose(trials, begin, np.random.default_rng([seed, len(trials)]))


def play(
    proposer: Proposer, space: Space, loss: Loss, count: int, seed: int = 0, begin: Sequence[Coefficients] = ()
) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(count):
        trials.append(completed(space, number, propose(proposer, trials, seed, begin).coefficients, loss))
    return trials


def values(trials: Sequence[Trial]) -> list[float]:
    return [trial.objective for trial in trials if trial.objective is not None]


def quadratic(optimum: Array, outside: Array | float, seed: int = 0) -> Loss:
    """|A (x - m)|^2 / 2 + s' x  with s above 0 only where m is 0: on the simplex it is least at m, where it is 0."""
    size = len(optimum)
    root = np.random.default_rng(seed).normal(size=(2 * size, size)) / np.sqrt(2 * size)
    form, slope = root.T @ root, np.where(optimum > 0, 0.0, outside)
    return lambda x: (
        float(0.5 * (x - optimum) @ form @ (x - optimum) + slope @ x),
        form @ (x - optimum) + slope,
    )


@pytest.mark.parametrize(
    ("make", "count"),
    [(lambda space: OptunaSampler(space, tpe), 60), (CMAES, 80), (lambda space: SLSQP(space, 0), 8)],
    ids=["tpe", "cmaes", "gradient"],
)
@pytest.mark.parametrize("space", SPACES, ids=["free", "bounded", "both", "family", "divided"])
def test_the_exact_corner_is_found_that_is_no_landmark(
    make: Callable[[Space], Proposer], count: int, space: Space
) -> None:
    """A linear loss is least at a corner: here by linear programming over the shares."""
    cost = np.arange(space.dimension) - 1.5
    bounds = [(0, min(cap, 1)) for cap in space.caps_F]
    families = space.polytope.families
    signs = [sign * np.isin(np.arange(len(bounds)), each.members_n) for each in families for sign in (1, -1)]
    solved = linprog(
        cost @ space.jacobian(),
        A_eq=np.ones((1, len(bounds))),
        b_eq=[1],
        A_ub=signs or None,
        b_ub=[limit for each in families for limit in (each.most, -each.least)] or None,
        bounds=bounds,
    )
    corner = space.at(solved.x)
    assert corner not in space.landmarks()
    trials = play(make(space), space, lambda x: (float(cost @ x), cost), count)
    if space.families and isinstance(make(space), OptunaSampler):
        # The cube knows no families: corners that their limits make are come near to.
        lowest = min(values(trials))
        assert lowest < float(cost @ space.point(corner)) + 0.05 * np.ptp(cost)
    else:
        assert corner in [trial.coefficients for trial in trials]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_cma_es_finds_the_minimum_in_a_face(size: int) -> None:
    space = Space(tuple("abcdefgh"[:size]))
    optimum = np.array([0.6, 0.4] + [0.0] * (size - 2))
    trials = play(CMAES(space), space, quadratic(optimum, 0.2), 40 + 15 * size)
    best = min(trials, key=lambda trial: trial.objective or 0.0)
    assert best.objective is not None and best.objective < 1e-3
    assert ((space.point(best.coefficients) == 0) == (optimum == 0)).all()


def test_cma_es_is_told_whole_generations_and_draws_from_the_newest() -> None:
    """Three trials of a new generation, running, ended or failed, leave the distribution as it was."""
    size = CMA(mean=np.zeros(3), sigma=1).population_size
    loss, sampler = quadratic(np.array([0.5, 0.5, 0, 0]), 0.1), CMAES(SIMPLEX)
    trials = play(sampler, SIMPLEX, loss, 2 * size)
    rng, number = np.random.default_rng(0), 2 * size
    others = [SIMPLEX.sample(rng) for _ in range(3)]
    drawn = {
        sampler.propose([*trials, *new], [], np.random.default_rng(7)).coefficients
        for new in (
            [],
            [Trial(number + i, point, "running") for i, point in enumerate(others)],
            [Trial(number + i, point, "failed") for i, point in enumerate(others)],
            [completed(SIMPLEX, number + i, point, loss) for i, point in enumerate(others)],
        )
    }
    assert len(drawn) == 1
    first = sampler.propose(trials[:size], [], np.random.default_rng(7)).coefficients
    assert first not in drawn


def test_cma_es_starts_anew_where_it_has_converged() -> None:
    """Values that never differ say that it should stop; its spread is then again as wide as at first."""
    trials = play(CMAES(SIMPLEX), SIMPLEX, lambda x: (2.0, 0 * x), 300)
    late = np.array([SIMPLEX.point(trial.coefficients) for trial in trials[-100:]])
    assert late.std(axis=0).max() > 0.02
    assert len({trial.coefficients for trial in trials}) == 300


@pytest.mark.parametrize("size", [2, 4])
def test_cma_es_stands_any_history(size: int) -> None:
    """Draws after it has shrunk to a point, one point told over and over, and everything failed."""
    space, rng = Space(tuple("abcd"[:size])), np.random.default_rng(0)
    point = space.sample(rng)
    near = [space.at(space.shares(point) + 1e-7 * rng.normal(size=size)) for _ in range(300)]
    far = [space.sample(rng) for _ in range(300)]
    trials = [
        completed(space, i, p, lambda x: (float(x @ x), x)) for i, p in enumerate([*space.landmarks(), *near, *far])
    ]
    same = [completed(space, i, p, lambda x: (1.0, x)) for i, p in enumerate([*space.landmarks(), *[point] * 300])]
    failed = [Trial(i, p, "failed") for i, p in enumerate([*space.landmarks(), *far])]
    for history in (trials, same, failed):
        for count in range(len(space.landmarks()), len(history), 37):
            proposed = propose(CMAES(space), history[:count]).coefficients
            assert space.contains(proposed) and proposed not in {trial.coefficients for trial in history[:count]}


FACES = {
    "corner": np.array([0.0, 0.0, 1.0, 0.0]),
    "edge": np.array([0.7, 0.0, 0.0, 0.3]),
    "face": np.array([0.2, 0.5, 0.0, 0.3]),
}


@pytest.mark.parametrize("optimum", FACES.values(), ids=FACES)
@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["steep", "flat"])
def test_a_quadratic_s_minimum_in_a_face_takes_few_gradients(optimum: Array, scale: float) -> None:
    loss = quadratic(optimum, np.array([0.3, 0.1, 0.2, 0.1]))
    trials = play(SLSQP(SIMPLEX, 0), SIMPLEX, lambda x: (scale * loss(x)[0], scale * loss(x)[1]), 8)
    assert min(values(trials)) < 1e-6 * scale
    best = SIMPLEX.point(min(trials, key=lambda trial: trial.objective or 0.0).coefficients)
    assert ((best == 0) == (optimum == 0)).all() and np.abs(best - optimum).max() < 1e-3


def test_gradients_reach_the_minimum_within_bounds() -> None:
    """|w - m|^2 / 2 with m = (.9, 0, .1) is least, where a <= .6 and b >= .1, at the projection: (.6, .1, .3)."""
    space = Space(tuple("abc"), bounds=(("a", 0.0, 0.6), ("b", 0.1, 1.0)))
    centre = np.array([0.9, 0.0, 0.1])
    trials = play(SLSQP(space, 0), space, lambda x: (float((x - centre) @ (x - centre)) / 2, x - centre), 6)
    assert space.check({"a": 0.6, "b": 0.1, "c": 0.3}) in [trial.coefficients for trial in trials]


def wells(x: Array) -> tuple[float, Array]:
    """Least at d (-0.5), with a well of its own, higher (-0.45), at each other corner, and flat between."""
    depth = np.array([0.45, 0.45, 0.45, 0.5])
    return -float(depth @ x**4), -4 * depth * x**3


def test_runs_start_again_until_all_corners_are_seen() -> None:
    """It begins with the centroid, then goes through the corners, then through points that its seed draws."""
    trials = play(SLSQP(SIMPLEX, 0), SIMPLEX, wells, 30)
    points = [trial.coefficients for trial in trials]
    assert points[0] == SIMPLEX.centroid() and set(SIMPLEX.vertices()) <= set(points)
    assert len(set(points)) == 30
    assert points == [trial.coefficients for trial in play(SLSQP(SIMPLEX, 0), SIMPLEX, wells, 30, seed=1)]
    assert points != [trial.coefficients for trial in play(SLSQP(SIMPLEX, 1), SIMPLEX, wells, 30)]


def test_it_begins_with_the_best_of_what_it_was_told_to_begin_with() -> None:
    begin = [SIMPLEX.check({"a": 0.9, "b": 0.1}), SIMPLEX.check({"c": 0.9, "d": 0.1})]
    loss = quadratic(np.array([0, 0, 0.8, 0.2]), 0.1)
    trials = play(SLSQP(SIMPLEX, 0), SIMPLEX, loss, 6, begin=begin)
    assert [trial.coefficients for trial in trials[:2]] == begin
    assert SIMPLEX.centroid() not in [trial.coefficients for trial in trials]
    assert min(values(trials)) < 1e-6


def test_what_failed_is_stepped_back_from_and_no_start() -> None:
    loss = quadratic(np.array([0.7, 0.3, 0, 0]), 0.2)
    first = completed(SIMPLEX, 0, SIMPLEX.centroid(), loss)
    step = propose(SLSQP(SIMPLEX, 0), [first]).coefficients
    back = propose(SLSQP(SIMPLEX, 0), [first, Trial(1, step, "failed")]).coefficients
    whole, part = (SIMPLEX.point(point) - SIMPLEX.point(first.coefficients) for point in (step, back))
    assert part == pytest.approx(0.1 * whole, abs=1e-8)
    assert propose(SLSQP(SIMPLEX, 0), [Trial(0, SIMPLEX.centroid(), "failed")]).coefficients == SIMPLEX.vertices()[0]


@pytest.mark.parametrize("gradient", [{}, {"a": 1.0}], ids=["none", "part"])
def test_trials_without_gradients_are_passed_over(gradient: Mapping[str, float]) -> None:
    points = [SIMPLEX.centroid(), *SIMPLEX.vertices()[:2]]
    attributes = TrialAttributes(gradient=gradient)
    trials = [Trial(i, point, "complete", objective=1.0, attributes=attributes) for i, point in enumerate(points)]
    assert propose(SLSQP(SIMPLEX, 0), trials).coefficients == SIMPLEX.vertices()[2]


def test_beside_a_running_trial_a_point_is_drawn() -> None:
    trials = [Trial(0, SIMPLEX.centroid(), "running")]
    drawn = [propose(SLSQP(SIMPLEX, 0), trials, seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1] and all(proposal.expected_improvement is None for proposal in drawn)


def test_after_the_last_start_points_are_drawn() -> None:
    """Every start has failed: then the generator that is passed decides."""
    trials: list[Trial] = []
    for number in range(100):
        assert propose(SLSQP(SIMPLEX, 0), trials, 1) == propose(SLSQP(SIMPLEX, 0), trials, 2)
        trials.append(Trial(number, propose(SLSQP(SIMPLEX, 0), trials).coefficients, "failed"))
    assert propose(SLSQP(SIMPLEX, 0), trials, 1) != propose(SLSQP(SIMPLEX, 0), trials, 2)


def test_the_expected_improvement_is_half_the_slope_along_the_step() -> None:
    loss = quadratic(np.array([0.4, 0.3, 0.2, 0.1]), 0.0)
    trials = [completed(SIMPLEX, 0, SIMPLEX.centroid(), loss)]
    proposal = propose(SLSQP(SIMPLEX, 0), trials)
    step = SIMPLEX.point(proposal.coefficients) - 0.25
    half_slope = -0.5 * loss(np.full(4, 0.25))[1] @ step
    assert half_slope > 0 and proposal.expected_improvement == pytest.approx(half_slope)
    assert propose(SLSQP(SIMPLEX, 0), []).expected_improvement is None


@pytest.mark.parametrize("space", [SIMPLEX, *SPACES], ids=["simplex", "free", "bounded", "both", "family", "divided"])
def test_with_gradients_the_process_begins_with_the_centroid_and_leaves_vertices_out(space: Space) -> None:
    proposer, vertices = SimplexGP(space, gradients=True), set(space.vertices())
    optimum = space.point(space.sample(np.random.default_rng(5)))
    points = [trial.coefficients for trial in play(proposer, space, quadratic(optimum, 0.0), 3)]
    assert points[0] == space.centroid() and not vertices & set(points[: 1 + (space.least is not None)])
    begin = [space.sample(np.random.default_rng(seed)) for seed in range(2)]
    assert [trial.coefficients for trial in play(proposer, space, quadratic(optimum, 0.0), 3, begin=begin)] == [
        *begin,
        space.centroid(),
    ]


def test_with_gradients_workers_get_vertices_until_a_value_is_known() -> None:
    proposer, trials = SimplexGP(SIMPLEX, gradients=True), list[Trial]()
    for number in range(3):
        trials.append(Trial(number, propose(proposer, trials).coefficients, "running"))
    assert [trial.coefficients for trial in trials] == [SIMPLEX.centroid(), *SIMPLEX.vertices()[:2]]
    failed = [Trial(0, SIMPLEX.centroid(), "failed")]
    assert propose(proposer, failed).coefficients == SIMPLEX.vertices()[0]


@pytest.mark.parametrize("size", [5, 8])
def test_probes_find_the_minimum_for_less_than_gradients_of_all_windows(size: int) -> None:
    """Eight parts whose linear and quadratic terms differ."""
    space, rng = Space(tuple(f"d{number}" for number in range(size))), np.random.default_rng(size)
    optimum = np.pad(rng.dirichlet(np.full(size - 2, 3.0)), (0, 2))
    loss, centre = quadratic(optimum, 0.1, size), np.full(size, 1 / size)
    slopes, roots = 0.2 * rng.normal(size=(8, size)), 0.3 * rng.normal(size=(8, size, size)) / np.sqrt(size)
    slopes, roots = slopes - slopes.mean(axis=0), roots - roots.mean(axis=0)

    def part_slope(x: Array, part: int) -> Array:
        return loss(x)[1] + slopes[part] + (roots[part] + roots[part].T) @ x

    spent = []
    for parts in (8, 0):
        proposer, trials = SimplexGP(space, gradients=True, parts=parts), list[Trial]()
        while not any(trial.is_whole and (trial.objective or 0) < 1e-3 for trial in trials) and len(trials) < 40:
            proposal = propose(proposer, trials)
            x, part = space.point(proposal.coefficients), sum(trial.part is not None for trial in trials) % 8
            slope, attributes = loss(x)[1], TrialAttributes(forwards=1.0)
            if proposal.is_probe:
                slope = part_slope(x, part) - part_slope(centre, part) + loss(centre)[1]
                attributes = TrialAttributes(forwards=3 / 8, error=0.01)
            elif not parts or not trials:
                attributes = TrialAttributes(forwards=3.0)
            if attributes.forwards != 1:
                attributes = replace(attributes, gradient=dict(zip(space.names, slope.tolist(), strict=True)))
            trial = Trial(
                len(trials),
                proposal.coefficients,
                "complete",
                objective=loss(x)[0] + (0.01 * rng.normal() if proposal.is_probe else 0.0),
                attributes=attributes,
                part=part if proposal.is_probe else None,
            )
            trials.append(trial)
        spent.append(sum(trial.forwards for trial in trials))
    assert spent[0] < 0.7 * spent[1], spent


def test_the_error_of_a_probe_s_gradient_is_its_way_from_the_anchor_s() -> None:
    slopes = [np.array([1.0, 0.0, 0.0, 0.0]), np.array([4.0, 0.0, 0.0, 0.0]), np.array([1.0, 2.0, 2.0, 2.0])]
    measured = [
        Measurement(point, 1.0, 0.0, dict(zip("abcd", slope.tolist(), strict=True)), is_probe)
        for point, slope, is_probe in zip(SIMPLEX.landmarks()[::-1], slopes, (False, True, True), strict=False)
    ]
    errors = observe(SIMPLEX, measured, range(3), measured[0]).errors_G
    # Along the plane (3, 0, 0, 0) has the length sqrt(9 - 9 / 4), and (0, 2, 2, 2) sqrt(12 - 36 / 4): three directions.
    assert errors == pytest.approx([0.0, np.sqrt(6.75 / 3), np.sqrt(3 / 3)])
    assert not observe(SIMPLEX, measured, range(3), None).errors_G.any()


def test_what_violates_a_constraint_far_off_is_brought_closer() -> None:
    """In its order, with values, errors and gradients of one function; what is near, and all where none does, as is."""
    points = [SIMPLEX.at(shares) for shares in np.random.default_rng(0).dirichlet(np.ones(4), 60)]
    raw = [1.0, 1.2, 1.5, 1.499, *np.linspace(1.45, 60.0, 56).tolist()]
    slope = {name: number + 1.0 for number, name in enumerate("abcd")}
    measured = [
        Measurement(point, value, 0.01 * (place > 3), slope, violation=0.1 * (place > 3))
        for place, (point, value) in enumerate(zip(points, raw, strict=True))
    ]
    closer = compressed(measured)
    new = np.array([each.value for each in closer])
    assert list(np.argsort(new, kind="stable")) == list(np.argsort(raw, kind="stable"))
    assert [each == was for each, was in zip(closer, measured, strict=True)] == [value <= 1.5 for value in raw]
    assert new.max() == pytest.approx(1 + 0.5 * (1 + np.log(59 / 0.5)))
    # A small step of every value moves the others by the derivative, which errors and gradients are scaled with.
    moved = compressed([*measured[:4], *(replace(each, value=each.value + 1e-6) for each in measured[4:])])
    derivative = [(after.value - now.value) / 1e-6 for after, now in zip(moved[5:], closer[5:], strict=True)]
    assert [each.error / 0.01 for each in closer[5:]] == pytest.approx(derivative, rel=1e-3)
    assert [each.gradient["c"] / 3 for each in closer[5:]] == pytest.approx(derivative, rel=1e-3)
    allowed = [replace(each, violation=0.0) for each in measured]
    assert compressed(allowed) == allowed and compressed(measured[3:]) == measured[3:]
    failed = Measurement.of_trial(Trial(0, points[0], "failed"), 60.0)
    assert [each.value for each in compressed([*measured, failed])] == [*new, new.max()]


def test_probes_are_no_trials_to_complete_where_gradients_are_of_all_windows_now() -> None:
    trials = [completed(SIMPLEX, 0, SIMPLEX.centroid(), quadratic(np.full(4, 0.25), 0.0))]
    point = SIMPLEX.at(np.array([0.4, 0.3, 0.2, 0.1]))
    probe = completed(SIMPLEX, 1, point, quadratic(np.array([0.4, 0.3, 0.2, 0.1]), 0.0))
    trials.append(
        replace(probe, objective=-1.0, part=0, attributes=replace(probe.attributes, error=0.1, forwards=0.375))
    )
    assert propose(SimplexGP(SIMPLEX, trials=3, gradients=True), trials).coefficients != point


@pytest.mark.parametrize(("size", "count"), [(8, 6), (16, 7)])
def test_few_gradients_find_the_minimum_of_many_distributions(size: int, count: int) -> None:
    """Nearly orthogonal vectors, the minimum inside or in a face: far fewer gradients than there are directions."""
    space, rng = Space(tuple(f"d{number:02}" for number in range(size))), np.random.default_rng(size)
    root = rng.normal(size=(4 * size, size)) / np.sqrt(4 * size)
    for optimum in (rng.dirichlet(np.full(size, 3.0)), np.pad(rng.dirichlet(np.ones(size // 2)), (0, size // 2))):
        form, slope = root.T @ root, np.where(optimum > 0, 0.0, 0.1)

        def loss(x: Array, optimum: Array = optimum, slope: Array = slope, form: Array = form) -> tuple[float, Array]:
            away = form @ (x - optimum)
            return float(0.5 * (x - optimum) @ away + slope @ x), away + slope

        found = min(values(play(SimplexGP(space, gradients=True), space, loss, count)))
        start = loss(np.full(size, 1 / size))[0]
        assert found < 0.01 * start, (size, found, start)
