"""Any sampler of Optuna's over the cube: each proposal asks a study in memory that holds the history."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from dem_opt.search.samplers import cube
from dem_opt.search.samplers.history import Trial, losses_of, thin, values_of
from dem_opt.search.samplers.proposer import Proposal, first_new, first_points
from dem_opt.simplex import Coefficients, Space

MOST = 1000
"""Finished trials that a sampler is shown at most: half the best and half the most recent."""

POPULATION = 10
"""Trials in a generation of NSGA-II."""

REPLAYED = 200
"""Finished trials that a sampler is asked for again at most, for each proposal."""

_ASKS = 10
"""Asks after which a sampler that yields nothing new is given up for a uniform draw."""


def tpe(seed: int) -> BaseSampler:
    """Optuna's tree-structured Parzen estimator with its defaults: multivariate, with a constant liar."""
    return TPESampler(seed=seed)


def nsga2(seed: int) -> BaseSampler:
    """Optuna's NSGA-II (Deb et al. 2002) with its defaults, but for the size of the population.

    Optuna's 50 is as many trials as a whole search has.
    """
    return NSGAIISampler(population_size=POPULATION, seed=seed)


@dataclass(frozen=True)
class OptunaSampler:
    """A sampler of Optuna's over the coordinates of `cube`, by public calls only.

    Samplers draw from a state of their own, which a resumed study has lost.  So each proposal makes a sampler from a
    seed that is drawn, and asks it in a study in memory with the history: running trials as running, so that a sampler
    which avoids them does so, and failed ones as complete with the worst value shown, because TPE passes over failed
    trials.  A proposal that is not new is left running there, and the sampler is asked again.  A sampler that marks the
    trials which it has proposed, as NSGA-II does with their generation, is asked for the history trial by trial.

    The first proposals are the study's starting points, then the landmarks.  The cube knows no limits of families: its
    points are projected to them, so that a corner which such a limit makes is come near to, but seldom met.

    Attributes:
        space: The coefficients to choose from.
        make: A fresh sampler from a seed: `tpe`, or for instance  lambda seed: GPSampler(seed=seed) .
        most: Finished trials that the sampler is shown at most; a Gaussian process stands fewer than TPE.
        objectives: 2 to search for the front between two losses.
        is_replayed: The sampler is asked for every trial of the history.
    """

    space: Space
    make: Callable[[int], BaseSampler]
    most: int = MOST
    objectives: int = 1
    is_replayed: bool = False

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """The next point; a uniform draw where there is nothing to learn from, or nothing new comes."""
        if (proposal := first_new(first_points(self.space, start), trials)) is not None:
            return proposal
        if self.space.is_point or all(trial.objective is None for trial in trials):
            return Proposal(self.space.sample(rng))
        taken = {trial.coefficients for trial in trials}
        study, caps_F = self._study(trials, int(rng.integers(2**32))), self.space.caps_F
        for _ in range(_ASKS):
            params = study.ask(self._axes()).params
            point = self.space.at(cube.to_shares(np.array([params[name] for name in self._axes()]), caps_F))
            if point not in taken:
                return Proposal(point)
        return Proposal(self.space.sample(rng))

    def _study(self, trials: Sequence[Trial], seed: int) -> optuna.Study:
        """The history over the cube, in a study of its own."""
        directions = [StudyDirection.MINIMIZE] * self.objectives
        study = optuna.create_study(storage=InMemoryStorage(), sampler=self.make(seed), directions=directions)
        shown = thin([trial for trial in trials if trial.state != "running"], self.most)
        measured = losses_of(shown).tolist() if self.objectives > 1 else [[value] for value in values_of(shown)]
        values = {trial.number: each for trial, each in zip(shown, measured, strict=True)}
        for trial in trials:
            if trial.state == "running" or trial.number in values:
                self._add(study, trial, values.get(trial.number))
        return study

    def _add(self, study: optuna.Study, trial: Trial, values: list[float] | None) -> None:
        """Add a trial over the cube, running where it has no values."""
        cube_F = cube.from_shares(self.space.shares(trial.coefficients), self.space.caps_F)
        params = dict(zip(self._axes(), cube_F.tolist(), strict=True))
        if self.is_replayed:
            study.enqueue_trial(params)
            asked = study.ask(self._axes())
            if values is not None:
                study.tell(asked, values)
            return
        state = TrialState.RUNNING if values is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, values=values, params=params, distributions=self._axes()))

    def _axes(self) -> dict[str, BaseDistribution]:
        return {f"u{share}": FloatDistribution(0.0, 1.0) for share in range(len(self.space.caps_F))}
