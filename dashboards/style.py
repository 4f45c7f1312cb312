"""The look that all figures share: one palette, how names and numbers are shown, a figure's title and captions."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dem_opt.analysis.regret import algorithm_of
from dem_opt.dashboards.words import ABSENT, objective_name
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
    "nsga2": "#8C6D1F",
}
"""Okabe and Ito's palette, safe for colour-blind readers; orange, sky blue and yellow are darkened for white paper."""

OTHER_ALGORITHM = "#332288"
SYMBOLS = {
    "simplex-gp": "circle",
    "grid": "square",
    "random": "diamond",
    "tpe": "triangle-up",
    "cmaes": "cross",
    "gradient": "triangle-down",
    "nsga2": "hexagon",
}
OUTLINE = "#7F7F7F"
WINNER = "#D55E00"
"""Okabe and Ito's vermillion, which no algorithm has."""

OPTIMUM = WINNER
"""The surrogate's optimum shares the winner's colour; its marker is an open diamond."""

DISTRIBUTION_COLORS = (
    *("#4477AA", "#CC6677", "#117733", "#DDCC77", "#88CCEE"),
    *("#AA4499", "#44AA99", "#999933", "#882255"),
    *("#6F8FA8", "#B08D57", "#5D4FC4"),
)
"""Tol's muted palette and three colours between, in the study file's order; they repeat after twelve."""

CHANGE_COLORS = ((0.0, "#5AAEE8"), (0.5, "#F7F7F7"), (1.0, "#E69F4C"))
"""Blue where the NLL fell, orange where it rose; light enough for black numbers on top."""

COSINE_COLORS = ((0.0, "#BC9BDD"), (0.5, "#F7F7F7"), (1.0, "#7CC4A4"))
"""Violet for opposed vectors (-1), green for aligned ones (1)."""

OBJECTIVE_COLORS = ((0.0, "#2F6FDB"), (0.5, "#9A9CA3"), (1.0, "#F2D16B"))
"""Blue for a low objective, yellow for a high one, through grey: visible on white and on black."""

ACTIVITY_COLORS = {"scoring": "#5F7D95", "merging": "#A9BCCB", "idle": "#E2C39A"}
UTILIZATION = "#B0359E"

MAX_POINTS = 1000
"""Points drawn for one algorithm, in any figure."""


def color(run: str) -> str:
    """Return the colour of a run's algorithm."""
    return ALGORITHM_COLORS.get(algorithm_of(run), OTHER_ALGORITHM)


def rgba(hexadecimal: str, opacity: float) -> str:
    """Return a palette colour with an opacity."""
    red, green, blue = (int(hexadecimal[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def label(name: str, length: int = 22) -> str:
    """Escape a user's name for plotly, which interprets tags and $TeX$ in every text, and shorten it in the middle."""
    return escape(shorten(name, length), quote=False).replace("$", "&#36;")


def proportions(coefficients: Coefficients) -> dict[str, float]:
    """Divide coefficients by their sum; equal proportions for the base, whose sum is 0."""
    units = coefficients.units
    total = sum(units.values())
    return {name: amount / total if total else 1 / len(units) for name, amount in units.items()}


def distribution_colors(names: Sequence[str]) -> dict[str, str]:
    """Assign a colour to each distribution, by its position in the study file."""
    return {name: DISTRIBUTION_COLORS[index % len(DISTRIBUTION_COLORS)] for index, name in enumerate(names)}


def signed(value: float | None) -> str:
    """Format a difference with its sign and three decimals."""
    return ABSENT if value is None else f"{value:+.3f}"


def name_ticks(names: Sequence[str], length: int = 22, step: int = 1) -> dict[str, Any]:
    """Return axis settings that place names at 0, 1, 2, ..., and show every `step`-th of them.

    Numeric positions keep apart two names that look alike once shortened; as categories they would merge.
    """
    return {
        "tickmode": "array",
        "tickvals": list(range(0, len(names), step)),
        "ticktext": [label(name, length) for name in names[::step]],
        "showgrid": False,
    }


def evenly_spaced(count: int, most: int) -> NDArray[np.int64]:
    """Return indices below `count`: all of them, or `most` evenly spaced ones that include both ends."""
    indices: NDArray[np.int64] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    return indices


def show_message(figure: go.Figure, message: str) -> None:
    """Hide the axes of a figure without data and write a message in its middle."""
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(text=message, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)


def objective_axis(summary: Summary, objectives: Sequence[float]) -> dict[str, Any]:
    """Return the colour axis of objectives, saturated above their third quartile to resolve the best region."""
    low, high = (min(objectives), float(np.quantile(objectives, 0.75))) if objectives else (0.0, 1.0)
    title = {"text": f"{objective_name(summary)} ({summary.unit_words})", "side": "top"}
    bar = {"title": title, "orientation": "h", "y": -0.2, "yanchor": "top", "thickness": 10}
    return {"colorscale": OBJECTIVE_COLORS, "cmin": low, "cmax": max(high, low + 1e-6), "colorbar": bar}


def ternary_axes(corners: Mapping[str, str], total: float) -> dict[str, Any]:
    """Return the layout of a ternary plot.

    Args:
        corners: The distribution at each of plotly's corners a, b and c.
        total: The sum of the three coordinates.
    """
    frame = {"sum": total, "bgcolor": "rgba(0,0,0,0)", "domain": {"x": [0.08, 0.92]}}
    return frame | {f"{corner}axis": {"title": {"text": label(name)}, "nticks": 5} for corner, name in corners.items()}


TITLE_TOP = 10
"""Pixels above a title."""


def finish(
    figure: go.Figure, title: str, reading: str, description: str, height: int, least_width: int = 0
) -> go.Figure:
    """Apply the common look to a figure and attach its title and texts.

    Args:
        figure: The figure, which is changed and returned.
        title: Its title.
        reading: How to read it; becomes the caption.
        description: Its content in words; becomes the text alternative.
        height: Pixels. Optuna Dashboard cuts off figures higher than about 450.
        least_width: Pixels below which texts would overlap; a narrower page scrolls the figure.
    """
    axis = {"gridcolor": "#E3E3E3", "zeroline": False, "linecolor": "#9A9A9A", "automargin": True}
    has_legend = any(trace.name for trace in figure.data)
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(
        template="none",
        title={
            "text": title,
            "x": 0.0,
            "xanchor": "left",
            "y": 1 - TITLE_TOP / height,
            "yanchor": "top",
            "font": {"size": 15},
        },
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
