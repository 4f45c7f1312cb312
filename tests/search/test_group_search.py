"""Laws of the search of coefficients by group, over quadratic objectives with noisy folds."""

from itertools import pairwise
from math import inf

import numpy as np
import pytest

from dem_opt.grouping import GroupedCoefficients, Grouping, GroupSettings
from dem_opt.search.group_model import block_curvature
from dem_opt.search.group_search import (
    CHOSEN,
    DESCENT,
    FOLDS,
    STRENGTHS,
    WITH_GRADIENT,
    GroupSearch,
    Measured,
    judgements,
)
from dem_opt.simplex import Family, Space
from dem_opt.types import GRADIENT_FORWARDS

NAMES = ("code", "math", "prose")


class Landscape:
    """A quadratic over the coefficients of each group, whose optimum every fold sees with noise of its own."""

    def __init__(self, groups=6, apart=0.2, noise=0.0, seed=0, space=None, **settings):
        rng = np.random.default_rng(seed)
        self.space = space or Space(NAMES)
        self.grouping = Grouping(tuple((f"layers.{n}", (f"layers.{n}.weight",)) for n in range(groups)))
        self.settings = GroupSettings(grouping=self.grouping, **settings)
        self.centre = self.space.centroid()
        self.weights_G = rng.dirichlet(np.ones(groups))
        centre_K = self.space.point(self.centre)
        deviations_GK = rng.normal(size=(groups, 3))
        deviations_GK -= deviations_GK.mean(axis=1, keepdims=True)
        # On average over groups, weighted, there is no deviation: the centre is the best of the global coefficients.
        deviations_GK -= self.weights_G @ deviations_GK
        self.best_GK = centre_K + apart * deviations_GK
        errors_GK = noise * rng.normal(size=(groups, 3))
        self.errors = (errors_GK, -errors_GK)
        self.calls = 0

    def value(self, point_GK, fold):
        away_GK = point_GK - self.best_GK - self.errors[fold]
        return 3.4 + 0.5 * float(self.weights_G @ (away_GK**2).sum(axis=1))

    def gradient(self, point_GK, fold):
        return self.weights_G[:, None] * (point_GK - self.best_GK - self.errors[fold])

    def truth(self, coefficients):
        point_GK = self.point(coefficients)
        return 3.4 + 0.5 * float(self.weights_G @ ((point_GK - self.best_GK) ** 2).sum(axis=1))

    def point(self, coefficients):
        return np.array([self.space.point(coefficients[name]) for name in self.grouping.names])

    def search(self):
        count = len(self.space.caps_F)
        return GroupSearch(
            space=self.space,
            settings=self.settings,
            centre=self.centre,
            start_nn=block_curvature(np.eye(count), np.ones(len(self.grouping))),
        )

    def measure(self, proposal, fails=False):
        if fails:
            return Measured(kind=proposal.kind, shrink=proposal.shrink, coefficients=proposal.coefficients, value=inf)
        self.calls += 1
        point_GK = self.point(proposal.coefficients)
        values = tuple(self.value(point_GK, fold) for fold in range(2))
        steep = proposal.kind in WITH_GRADIENT
        gradients = tuple(self.gradient(point_GK, fold) for fold in range(2)) if steep else ()
        return Measured(
            kind=proposal.kind,
            shrink=proposal.shrink,
            coefficients=proposal.coefficients,
            value=0.0 if proposal.kind == CHOSEN else float(np.mean(values)),
            fold_values=values,
            fold_gradients_GK=gradients,
            gradient_GK=np.mean(gradients, axis=0) if steep else None,
        )

    def run(self, trials=()):
        search, trials = self.search(), list(trials)
        while proposals := search.next(trials):
            trials += [self.measure(proposal) for proposal in proposals]
        return trials


def test_without_noise_folds_choose_no_penalty_and_the_optimum_is_reached():
    landscape = Landscape()
    trials = landscape.run()
    inside = np.clip(landscape.best_GK, 0, None)
    least = 3.4 + 0.5 * float(landscape.weights_G @ ((inside - landscape.best_GK) ** 2).sum(axis=1))
    gap = landscape.truth(trials[0].coefficients) - least
    assert trials[-1].kind == CHOSEN and trials[-1].shrink == 0
    assert landscape.truth(trials[-1].coefficients) - least < 0.1 * gap


def test_where_there_is_nothing_but_noise_the_global_coefficients_stay():
    landscape = Landscape(apart=0.0, noise=0.3)
    trials = landscape.run()
    assert trials[-1].shrink == inf
    assert set(trials[-1].coefficients.values()) == {landscape.centre}


@pytest.mark.parametrize("seed", range(4))
def test_the_strength_is_the_best_on_the_other_fold(seed):
    landscape = Landscape(apart=0.1, noise=0.1, seed=seed)
    trials = landscape.run()
    judged = judgements(trials)
    best = min(judged, key=lambda each: each.other)
    assert judged[-1].shrink == inf and judged[-1].other == judged[-1].own == 0
    assert trials[-1].shrink == (inf if best.other >= 0 else best.shrink / 2)
    assert len(judged) == len(STRENGTHS) + 1
    assert all(each.own < each.other for each in judged[:-1]), "a fold flatters the optimum that it chose"


def test_the_search_is_a_function_of_its_trials():
    landscape = Landscape(noise=0.05)
    whole = landscape.run()
    for count in range(len(whole)):
        assert _shown(landscape.run(whole[:count])) == _shown(whole)


def _shown(trials):
    return [(trial.kind, trial.shrink, trial.coefficients) for trial in trials]


@pytest.mark.parametrize("forwards", [20.0, 30.0, 40.0])
@pytest.mark.parametrize("shrink", [None, 0.0, 0.01])
def test_the_budget_is_kept(forwards, shrink):
    landscape = Landscape(groups=40, noise=0.02, forwards=forwards, shrink=shrink)
    trials = landscape.run()
    assert sum(trial.forwards for trial in trials) <= max(forwards, GRADIENT_FORWARDS + 2 * len(STRENGTHS))
    assert trials[-1].kind == CHOSEN


def test_a_given_penalty_asks_no_fold_and_pulls_toward_the_global_coefficients():
    apart = []
    for shrink in (0.0, 0.05, 50.0):
        landscape = Landscape(shrink=shrink)
        trials = landscape.run()
        assert {trial.kind for trial in trials} <= {DESCENT, CHOSEN}
        away_GK = landscape.point(trials[-1].coefficients) - landscape.space.point(landscape.centre)
        apart.append(float(np.abs(away_GK).max()))
    assert apart[0] > apart[1] > apart[2] and apart[2] < 0.01


def test_a_step_that_fails_is_halved():
    landscape = Landscape()
    search = landscape.search()
    trials = [landscape.measure(search.next([])[0])]
    centre_GK = landscape.point(trials[0].coefficients)
    steps = []
    for _ in range(3):
        (proposal,) = search.next(trials)
        steps.append(np.linalg.norm(landscape.point(proposal.coefficients) - centre_GK))
        trials.append(landscape.measure(proposal, fails=True))
    assert all(after == pytest.approx(before / 2, rel=1e-6) for before, after in pairwise(steps))


def test_folds_whose_optimum_fails_judge_nothing():
    landscape = Landscape()
    search, trials = landscape.search(), []
    while proposals := search.next(trials):
        trials += [landscape.measure(proposal, fails=proposal.kind in FOLDS) for proposal in proposals]
    assert judgements(trials) == [] and trials[-1].shrink == inf


@pytest.mark.parametrize(
    "space",
    [
        Space(NAMES, 3.0, 0.0),
        Space(NAMES, bounds=(("code", 0.1, 0.5),)),
        Space(NAMES, bounds=(("math", 0.3, 0.3),)),
        Space(NAMES, families=(Family("some", NAMES[:2], 0.1, 0.3),)),
    ],
)
def test_each_group_is_a_point_of_the_space(space):
    landscape = Landscape(space=space, noise=0.02)
    for trial in landscape.run():
        assert isinstance(trial.coefficients, GroupedCoefficients)
        assert all(space.contains(row) for row in trial.coefficients.values())
    assert landscape.run()[-1].kind == CHOSEN
