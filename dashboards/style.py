"""What all figures share: one palette, how names are shown, the words a figure carries."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dem_opt.analysis.regret import algorithm_of
from dem_opt.errors import shorten
from dem_opt.simplex import Coefficients
from dem_opt.types import Summary

ALGORITHM_COLORS = {
    "simplex-gp": "#0072B2",
    "grid": "#D98200",
    "random": "#7F7F7F",
    "tpe": "#009E73",
    "cmaes": "#CC79A7",
    "gradient": "#3D9FD8",
}
"""Okabe and Ito's colours, orange and sky blue darkened to be seen on white; vermillion is the winner's."""

OTHER_ALGORITHM = "#332288"
SYMBOLS = {
    "simplex-gp": "circle",
    "grid": "square",
    "random": "diamond",
    "tpe": "triangle-up",
    "cmaes": "cross",
    "gradient": "triangle-down",
}
OUTLINE = "#7F7F7F"
WINNER = "#D55E00"

DISTRIBUTION_COLORS = (
    *("#4477AA", "#CC6677", "#117733", "#DDCC77", "#88CCEE"),
    *("#AA4499", "#44AA99", "#999933", "#882255"),
    *("#6F8FA8", "#B08D57", "#5D4FC4"),
)
"""Tol's muted colours and three between them, in the study file's order; repeated after twelve."""

DIVERGING = ((0.0, "#5AAEE8"), (0.5, "#F7F7F7"), (1.0, "#E69F4C"))
"""Blue where the NLL fell, orange where it rose: told apart with any colour vision, light behind numbers."""

ALIKE = ((0.0, "#BC9BDD"), (0.5, "#F7F7F7"), (1.0, "#7CC4A4"))
"""Cosines: violet where vectors oppose each other, green where they agree."""

TIMES = {"scoring": "#5F7D95", "merging": "#A9BCCB", "waiting": "#E2C39A"}
"""What a worker's seconds go into."""

UTILISATION = "#B0359E"
OPTIMUM = "#D55E00"
"""The surrogate's optimum, in the winner's colour: an open diamond."""

SEQUENTIAL = ((0.0, "#2F6FDB"), (0.5, "#9A9CA3"), (1.0, "#F2D16B"))
"""Low NLL blue, high NLL yellow, by way of grey: seen on white and on black."""

MOST_POINTS = 1000
"""Points drawn of one algorithm at most, in any figure."""

ABSENT = "-"
"""A value that was not measured."""


def color(run: str) -> str:
    """The colour of a run's algorithm."""
    return ALGORITHM_COLORS.get(algorithm_of(run), OTHER_ALGORITHM)


def rgba(hexadecimal: str, opacity: float) -> str:
    """A colour of the palette, seen through."""
    red, green, blue = (int(hexadecimal[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def objective_words(summary: Summary) -> str:
    """What the study minimizes, in nats per token."""
    return "largest regret" if summary.worst else "mean NLL"


def label(name: str, length: int = 22) -> str:
    """A user's name as plotly, which reads tags and $TeX$ in every text, is to show it; cut in the middle."""
    return escape(shorten(name, length), quote=False).replace("$", "&#36;")


def is_base(coefficients: Coefficients) -> bool:
    """Whether no vector is added."""
    return not any(coefficients.units.values())


def told(coefficients: Coefficients | None) -> str:
    """Coefficients above 0 in one line of plain text."""
    if coefficients is None or is_base(coefficients):
        return "the base alone"
    return ", ".join(f"{shorten(name, 16)} {weight:.3f}" for name, weight in coefficients.weights.items() if weight)


def proportions(coefficients: Coefficients) -> dict[str, float]:
    """Coefficients over their sum, by distribution; equal parts for the base alone, which has none."""
    units = coefficients.units
    total = sum(units.values())
    return {name: each / total if total else 1 / len(units) for name, each in units.items()}


def distribution_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each distribution, by its place in the study file."""
    return {name: DISTRIBUTION_COLORS[place % len(DISTRIBUTION_COLORS)] for place, name in enumerate(names)}


def signed(value: float | None) -> str:
    """A difference to three decimals."""
    return ABSENT if value is None else f"{value:+.3f}"


def name_ticks(names: Sequence[str]) -> dict[str, Any]:
    """An axis of names at 0, 1, 2...: numbers as positions, so that names which look alike do not merge."""
    places, texts = list(range(len(names))), [label(name) for name in names]
    return {"tickmode": "array", "tickvals": places, "ticktext": texts, "showgrid": False}


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Indices below `count`: all of them, or `most` evenly spread with both ends."""
    indices: NDArray[np.int64] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    return indices


def say_nothing(figure: go.Figure, why: str) -> None:
    """Words in the middle of a figure that has nothing to draw, and no axes."""
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    figure.add_annotation(text=why, showarrow=False, **place)


def finish(
    figure: go.Figure, title: str, reading: str, description: str, height: int, least_width: int = 0
) -> go.Figure:
    """The figure with its title, its words and the common look.

    reading      how the figure is read; a caption
    description  what it shows; a text alternative
    height       pixels; above some 450, Optuna Dashboard cuts a plot off
    least_width  pixels below which its texts would overlap: a page scrolls it
    """
    axis = {"gridcolor": "#E3E3E3", "zeroline": False, "linecolor": "#9A9A9A", "automargin": True}
    has_legend = any(trace.name for trace in figure.data)
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0.0, "xanchor": "left", "y": 0.98, "yanchor": "top", "font": {"size": 15}},
        meta={"reading": reading, "description": description, "width": least_width},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        paper_bgcolor="#FFFFFF",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 85 if has_legend else 45, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 1 - 28 / height, "yref": "container", "yanchor": "top"},
        height=height,
        dragmode=False,
    )
    return figure
