"""The surrogate's mean over three distributions, and the marker of its optimum."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from dem_opt.dashboards.style import OPTIMUM, finish, label, objective_axis, proportions, show_message, ternary_axes
from dem_opt.dashboards.words import coefficients_text, objective_name
from dem_opt.types import Summary, Surrogate

TITLE = "Surrogate: slice through its optimum"


def surrogate_map(summary: Summary) -> go.Figure:
    """Draw the surrogate's mean over the three distributions with the largest coefficients at its optimum.

    The other coefficients keep their values at the optimum.
    """
    surrogate, figure = summary.surrogate, go.Figure()
    if surrogate is None or len(surrogate.names) != 3:
        message = "no surrogate: too few trials, or fewer than three distributions"
        show_message(figure, message)
        return finish(figure, TITLE, f"{message.capitalize()}.", f"{message.capitalize()}.", 450)
    corners = dict(zip("abc", surrogate.names, strict=True))
    optimum = surrogate.optimum.weights
    draw_mean(figure, surrogate, corners, opacity=0.9)
    at_optimum = {corner: [optimum[name]] for corner, name in corners.items()}
    figure.add_scatterternary(**at_optimum, cliponaxis=False, **optimum_marker(surrogate, summary.unit_words))
    total = sum(optimum[name] for name in surrogate.names)
    figure.update_layout(ternary=ternary_axes(corners, total), coloraxis=objective_axis(summary, list(surrogate.means)))
    reading = (
        f"Predicted {objective_name(summary)} in {summary.unit_words}: the mean of a Gaussian process fitted to "
        f"{surrogate.trials} trials. These three distributions share {total:.3f}; the other coefficients stay at the "
        "optimum's. Open diamond: the predicted optimum. Predictions only, nothing here was scored."
    )
    prediction = _prediction(surrogate, summary.unit_words)
    description = f"Surrogate's optimum: {prediction} at {coefficients_text(surrogate.optimum)}."
    return finish(figure, TITLE, reading, description, 450)


def draw_mean(figure: go.Figure, surrogate: Surrogate, corners: Mapping[str, str], opacity: float = 0.3) -> None:
    """Draw the surrogate's mean over a triangle of distributions, as hexagons in the colours of the objective."""
    parts = [proportions(point) for point in surrogate.points]
    points = {corner: [part[name] for part in parts] for corner, name in corners.items()}
    marker = {"color": list(surrogate.means), "coloraxis": "coloraxis", "symbol": "hexagon", "size": 13}
    marker |= {"opacity": opacity}
    figure.add_scatterternary(**points, mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def optimum_marker(surrogate: Surrogate, unit: str) -> dict[str, Any]:
    """Return the trace settings of the surrogate's optimum: an open diamond that states the prediction on hover."""
    coefficients = label(coefficients_text(surrogate.optimum), 200)
    text = f"surrogate's optimum: {_prediction(surrogate, unit)} (predicted)<br>{coefficients}"
    marker = {"symbol": "diamond-open", "size": 16, "color": OPTIMUM, "line": {"width": 2, "color": OPTIMUM}}
    return {"mode": "markers", "marker": marker, "showlegend": False, "hovertext": [text], "hoverinfo": "text"}


def _prediction(surrogate: Surrogate, unit: str) -> str:
    """Format mean and standard deviation at the optimum."""
    return f"{surrogate.mean:.4f} ± {surrogate.deviation:.4f} {unit}"
