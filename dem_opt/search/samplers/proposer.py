"""The interface of a search algorithm, and the points that every search proposes first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dem_opt.search.samplers.history import Trial
from dem_opt.simplex import Coefficients, Space

ENOUGH = 3
"""Starting points that are as good as the landmarks."""


@dataclass(frozen=True)
class Proposal:
    """The next point of a search.

    Attributes:
        coefficients: The point.
        expected_improvement: Improvement of the objective that the proposer expects of it, in its unit; None
            where it has no opinion.
        is_probe: Only a part of the windows is to be scored there, with the gradient.
    """

    coefficients: Coefficients
    expected_improvement: float | None = None
    is_probe: bool = False


class Proposer(Protocol):
    """A search algorithm: a pure function of the study's trials and of a random generator."""

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """Choose the next point.

        Args:
            trials: All that have their coefficients, in the order of their numbers, running ones included.
            start: Points that the study was made to begin with.
            rng: The only source of randomness.
        """


def propose(proposer: Proposer, trials: Sequence[Trial], start: Sequence[Coefficients], seed: int) -> Proposal:
    """The next point of a study.

    The generator is seeded by (seed, number of trials) alone, so a resumed study proposes what an uninterrupted one
    would have.
    """
    return proposer.propose(trials, start, np.random.default_rng([seed, len(trials)]))


def first_points(space: Space, start: Sequence[Coefficients]) -> list[Coefficients]:
    """The points to propose first: those that the study was made to begin with, then vertices and centroid.

    At least ENOUGH starting points span most of the space: of the landmarks only the vertices of distributions that
    none of them uses are left.
    """
    if len(start) < ENOUGH:
        return [*start, *space.landmarks()]
    used = {name for point in start for name, units in point.pairs if units}
    unused = set(space.names) - used
    vertices = (vertex for vertex in space.vertices() if any(units and name in unused for name, units in vertex.pairs))
    return [*start, *vertices]


def central_points(space: Space, start: Sequence[Coefficients]) -> list[Coefficients]:
    """The points to propose first where gradients are measured: the starting points, then landmarks but no vertices.

    These are the centroid, and with a range of sums the base and the greatest sum.  The centroid's gradient tells which
    way to go; vertices are far from there.  ENOUGH starting points are followed by the vertices that they leave out.
    """
    if len(start) >= ENOUGH:
        return first_points(space, start)
    vertices = set(space.vertices())
    return [*start, space.centroid(), *(point for point in space.landmarks() if point not in vertices)]


def first_new(points: Iterable[Coefficients], trials: Sequence[Trial]) -> Proposal | None:
    """The first of some points that no trial has; None where trials have them all."""
    taken = {trial.coefficients for trial in trials}
    return next((Proposal(point) for point in points if point not in taken), None)
