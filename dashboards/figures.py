"""The figures of a study by name: pure functions from a Summary to a plotly figure, with units on every axis.

Each figure carries two texts in `layout.meta`: "reading" (its caption) and "description" (its text alternative).
Names come from users, and plotly interprets HTML in texts and `%{...}` in templates: names are therefore escaped, and
never part of a template.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import plotly.graph_objects as go

from dem_opt.analysis.regret import compare_searches
from dem_opt.dashboards.front_plots import front_map
from dem_opt.dashboards.heat_maps import (
    change_heat_map,
    coefficients_bar,
    cosine_heat_map,
    group_heat_map,
    price_heat_map,
    worth_heat_map,
)
from dem_opt.dashboards.regret_plots import best_so_far, comparison_figure
from dem_opt.dashboards.simplex_map import simplex_map
from dem_opt.dashboards.surrogate_map import surrogate_map
from dem_opt.dashboards.timelines import coefficients_over_time, utilisation_over_time
from dem_opt.types import HELD_OUT, SEARCH, Summary


def coefficients(summary: Summary) -> go.Figure:
    """Coefficients of the winner, one bar for each distribution."""
    return coefficients_bar(summary)


def groups(summary: Summary) -> go.Figure:
    """Coefficients of each group of parameters minus the global ones."""
    return group_heat_map(summary)


def change(summary: Summary) -> go.Figure:
    """NLL of each result minus the base's on each corpus, in nats per token."""
    return change_heat_map(summary, reported_split(summary))


def price(summary: Summary) -> go.Figure:
    """NLL of base, uniform average and winner minus that of each distribution's own fine-tune, in nats per token."""
    return price_heat_map(summary, reported_split(summary))


def comparison(summary: Summary) -> go.Figure:
    """Regret of each algorithm against forward-equivalents, median and quartiles over runs.

    In the objective's unit; where a front is searched, the hypervolume that is missing, in the unit squared.
    """
    return comparison_figure(compare_searches(summary))


def worth(summary: Summary) -> go.Figure:
    """NLL of the winner without one of its distributions minus the winner's, in nats per token."""
    return worth_heat_map(summary, reported_split(summary))


def reported_split(summary: Summary) -> str:
    """The held-out split once the winner is scored there, the search split until then."""
    return HELD_OUT if summary.winner.scores.get(HELD_OUT) else SEARCH


class Entry(NamedTuple):
    """A figure of the registry.

    draw     draws it; where there is nothing to draw, the figure says so in words
    applies  whether the study has the data for it: `all_figures` leaves out the figures that it has none for
    """

    draw: Callable[[Summary], go.Figure]
    applies: Callable[[Summary], bool] = lambda summary: True


def _has_slice(summary: Summary) -> bool:
    """A slice adds something where the map of all trials cannot show the surrogate: beyond three distributions."""
    return bool(summary.surrogate and summary.surrogate.points) and len(summary.distributions) > 3


FIGURES: Mapping[str, Entry] = MappingProxyType(
    {
        "coefficients": Entry(coefficients),
        "groups": Entry(groups, lambda summary: summary.groups is not None),
        "change": Entry(change),
        "price": Entry(price, lambda summary: any(row.role == "single" for row in summary.results)),
        "pareto": Entry(front_map, lambda summary: summary.front is not None),
        "best-so-far": Entry(best_so_far),
        "comparison": Entry(comparison, lambda summary: len(summary.trials) > 1),
        "simplex": Entry(simplex_map),
        "surrogate": Entry(surrogate_map, _has_slice),
        "best-over-time": Entry(coefficients_over_time),
        "utilisation": Entry(utilisation_over_time),
        "worth": Entry(worth, lambda summary: any(row.scores for row in summary.left_out)),
        "vectors": Entry(cosine_heat_map, lambda summary: summary.vectors is not None),
    }
)
"""All figures in reading order.

The names are stored: Optuna Dashboard and MLflow keep figures under them, so renaming one would leave a stale figure
beside the new one in existing studies.  They are valid HTML ids.
"""


def all_figures(summary: Summary) -> dict[str, go.Figure]:
    """Draw every figure that the study has data for, by name, in reading order."""
    return {name: entry.draw(summary) for name, entry in FIGURES.items() if entry.applies(summary)}
