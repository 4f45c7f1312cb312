"""Any sampler of Optuna's over the cube: each proposal asks a study in memory that holds the history."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from dem_opt.search.samplers import cube
from dem_opt.search.samplers.history import Trial, thin, values_of
from dem_opt.search.samplers.sampler import Choice, first_new, first_points
from dem_opt.simplex import Coefficients, Space

MOST = 1000
"""Most finished trials that a sampler is shown: beyond them, half the best and half the most recent."""

_ASKS = 10


def tpe(seed: int) -> BaseSampler:
    """Optuna's tree-structured Parzen estimator with its defaults: multivariate, with a constant liar."""
    return TPESampler(seed=seed)


@dataclass(frozen=True)
class OptunaSampler:
    """A sampler of Optuna's over `cube`'s coordinates, by its public calls only.

    make  a fresh sampler from a seed: `tpe`, or for instance  lambda seed: GPSampler(seed=seed)
    most  finished trials that it is shown; a Gaussian process stands fewer than TPE

    Samplers draw from a state of their own, which a resumed study has lost.  So for each proposal a sampler is made
    from a seed that is drawn, and asked in a study in memory to which the history is added: running trials as running,
    so that a sampler stays away from them if it ever does, and failed ones as complete with the worst value shown,
    because TPE passes over what is told as failed.  A proposal that is not new is left running there, and it is asked
    again.

    The first proposals are the points that the study begins with, then the landmarks.
    """

    space: Space
    make: Callable[[int], BaseSampler]
    most: int = MOST

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Choice:
        """The next point; a uniform draw where there is nothing to learn from, or nothing new comes."""
        if (choice := first_new(first_points(self.space, begin), trials)) is not None:
            return choice
        if self.space.is_point or all(trial.objective is None for trial in trials):
            return Choice(self.space.sample(rng))
        taken = {trial.coefficients for trial in trials}
        study, caps_F = self._study(trials, int(rng.integers(2**32))), self.space.caps_F
        for _ in range(_ASKS):
            drawn = study.ask(self._axes()).params
            point = self.space.at(cube.to_shares(np.array([drawn[name] for name in self._axes()]), caps_F))
            if point not in taken:
                return Choice(point)
        return Choice(self.space.sample(rng))

    def _study(self, trials: Sequence[Trial], seed: int) -> optuna.Study:
        """The history over the cube, in a study of its own."""
        study = optuna.create_study(storage=InMemoryStorage(), sampler=self.make(seed))
        told = thin([trial for trial in trials if trial.state != "running"], self.most)
        values = {trial.number: value for trial, value in zip(told, values_of(told), strict=True)}
        for trial in trials:
            if trial.state == "running" or trial.number in values:
                study.add_trial(self._frozen(trial, values.get(trial.number)))
        return study

    def _frozen(self, trial: Trial, value: float | None) -> FrozenTrial:
        """A trial over the cube, running where it has no value."""
        cube_F = cube.from_shares(self.space.shares(trial.coefficients), self.space.caps_F)
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        params = dict(zip(self._axes(), cube_F.tolist(), strict=True))
        return create_trial(state=state, value=value, params=params, distributions=self._axes())

    def _axes(self) -> dict[str, BaseDistribution]:
        return {f"u{share}": FloatDistribution(0.0, 1.0) for share in range(len(self.space.caps_F))}
