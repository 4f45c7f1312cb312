"""The figures of a study, as methods."""

from collections.abc import Callable

import plotly.graph_objects as go

from dem_opt.analysis.mixing_cost import MixingComparison
from dem_opt.dashboards.figures import FIGURES
from dem_opt.dashboards.front_plots import front_figure
from dem_opt.dashboards.mixing_plots import mixing_figure
from dem_opt.pareto import Front
from dem_opt.types import Summary


class StudyPlots:
    """The figures of a study: each method reads the study's database and returns a plotly figure.

    A figure without data says so in words.  `figure.layout.meta` holds a caption ("reading") and a text alternative
    ("description").

    Args:
        read_summary: Returns the study's results so far.
        read_front: Returns the front between two losses over everything that is scored.
    """

    def __init__(self, read_summary: Callable[[], Summary], read_front: Callable[[str, str], Front]) -> None:
        self._read_summary, self._read_front = read_summary, read_front

    def coefficients(self) -> go.Figure:
        """Draw the winner's coefficients, a bar for each distribution."""
        return self._draw("coefficients")

    def groups(self) -> go.Figure:
        """Draw a heat map of the coefficients of each group of parameters minus the global ones."""
        return self._draw("groups")

    def change(self) -> go.Figure:
        """Draw a heat map of each result's NLL minus the base's on each corpus, in nats per token."""
        return self._draw("change")

    def price(self) -> go.Figure:
        """Draw a heat map of NLL minus that of each distribution's own fine-tune, in nats per token.

        This is the price of one model for all distributions.
        """
        return self._draw("price")

    def pareto(self, first: str | None = None, second: str | None = None) -> go.Figure:
        """Draw the front between two losses: distributions, general corpora, or "mean"; by default the study's own."""
        if first is None or second is None:
            return self._draw("pareto")
        return front_figure(self._read_front(first, second))

    def best_so_far(self) -> go.Figure:
        """Draw the best objective so far, in the objective's unit, against forward-equivalents, a line for each run."""
        return self._draw("best-so-far")

    def comparison(self) -> go.Figure:
        """Draw each algorithm's regret against forward-equivalents: median and quartiles of runs."""
        return self._draw("comparison")

    def simplex(self) -> go.Figure:
        """Draw the trials on the simplex of coefficients, coloured by their objective in the objective's unit."""
        return self._draw("simplex")

    def surrogate(self) -> go.Figure:
        """Draw the surrogate's mean, in its unit, over the three distributions that its optimum uses most."""
        return self._draw("surrogate")

    def best_over_time(self) -> go.Figure:
        """Draw the coefficients of the best trial so far against the number of trials."""
        return self._draw("best-over-time")

    def utilisation(self) -> go.Figure:
        """Draw the seconds that workers spent on scoring, merging and waiting, over the trials."""
        return self._draw("utilisation")

    def worth(self) -> go.Figure:
        """Draw a heat map of the winner's loss without each of its distributions, in nats per token."""
        return self._draw("worth")

    def vectors(self) -> go.Figure:
        """Draw a heat map of the cosines between distribution vectors."""
        return self._draw("vectors")

    def mixing(self, comparison: MixingComparison) -> go.Figure:
        """Draw loss against cost of composites and models of data mixtures, from what `Study.mix` returned."""
        return mixing_figure(comparison)

    def _draw(self, name: str) -> go.Figure:
        return FIGURES[name].draw(self._read_summary())
