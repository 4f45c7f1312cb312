"""The Optuna sampler whose parameters are the coefficients themselves."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from dem_opt.search.samplers.history import History, Trial, distributions, parameters, start
from dem_opt.simplex import Coefficients, Space

ENOUGH = 3
"""Points to begin with that are as good as landmarks."""


@dataclass(frozen=True)
class Choice:
    """A proposer's next point.

    expected   improvement of the objective that it expects, in nats per token; None where it has no opinion
    is_known   whether this is a point that every study looks at first, or that this study was told to begin with
    """

    coefficients: Coefficients
    expected: float | None = None
    is_known: bool = False


class Proposer(Protocol):
    """A way of searching: a pure function of what the study holds and of a random generator."""

    def propose(self, trials: Sequence[Trial], begin: Sequence[Coefficients], rng: np.random.Generator) -> Choice:
        """The next point.

        trials  all that have their coefficients, in the order of their numbers
        begin   points that the study was told to begin with
        """


class SimplexSampler(BaseSampler):
    """A proposer as an Optuna sampler.

    Its randomness comes from (seed, number of trials with coefficients) and from nothing else, so a resumed
    study proposes what an uninterrupted one would have.

    last     what was proposed last
    known    the study's trials, where whoever asks has just read them
    confirm  is called when a point is chosen and not yet written; what it raises ends the proposal
    """

    def __init__(self, space: Space, proposer: Proposer, seed: int) -> None:
        self._space, self._proposer, self._seed = space, proposer, seed
        self._history = History(space)
        self.distributions = distributions(space)
        self.last: Choice | None = None
        self.known: Sequence[Trial] | None = None
        self.confirm: Callable[[], None] | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All coefficients, always: they are proposed together."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point's coefficients."""
        trials = self._history(study) if self.known is None else self.known
        rng = np.random.default_rng([self._seed, len(trials)])
        self.last = self._proposer.propose(trials, start(study, self._space), rng)
        if self.confirm is not None:
            self.confirm()
        return parameters(self.last.coefficients)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> NoReturn:
        """Raises ValueError: a coefficient can't be drawn without the others."""
        raise ValueError(f"{param_name!r} with {param_distribution} is no coefficient of {self._space}")


def first_points(space: Space, begin: Sequence[Coefficients]) -> list[Coefficients]:
    """What is looked at first: the points that the study was told to begin with, then vertices and centroid.

    A study that begins with at least ENOUGH knows what they span: of the landmarks it looks only at the vertices of
    distributions that none of them uses.
    """
    if len(begin) < ENOUGH:
        return [*begin, *space.landmarks()]
    used = {name for point in begin for name, units in point.items if units}
    unused = set(space.names) - used
    return [*begin, *(one for one in space.vertices() if any(units and name in unused for name, units in one.items))]


def first_new(points: Iterable[Coefficients], trials: Sequence[Trial]) -> Choice | None:
    """The first of the points to begin with that no trial has."""
    taken = {trial.coefficients for trial in trials}
    return next((Choice(point, is_known=True) for point in points if point not in taken), None)
