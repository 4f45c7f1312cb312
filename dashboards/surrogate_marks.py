"""How a surrogate's belief is drawn: its mean behind the trials, its optimum as an open diamond."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from dem_opt.dashboards.style import OPTIMUM, label, proportions, told
from dem_opt.insight import Surrogate


def draw_belief(figure: go.Figure, believed: Surrogate, corners: Mapping[str, str]) -> None:
    """The mean over a triangle whose corners a, b, c are distributions, in the colours of the objective."""
    parts = [proportions(point) for point in believed.points]
    points = {corner: [each[name] for each in parts] for corner, name in corners.items()}
    marker = {"color": list(believed.means), "coloraxis": "coloraxis", "symbol": "hexagon", "size": 13, "opacity": 0.3}
    figure.add_scatterternary(**points, mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def diamond(believed: Surrogate) -> dict[str, Any]:
    """The marker of the surrogate's optimum."""
    found = f"{believed.mean:.4f} ± {believed.deviation:.4f} nats per token"
    text = f"the surrogate's optimum: {found}<br>{label(told(believed.optimum), 200)}"
    marker = {"symbol": "diamond-open", "size": 16, "color": OPTIMUM, "line": {"width": 2, "color": OPTIMUM}}
    return {"mode": "markers", "marker": marker, "showlegend": False, "hovertext": [text], "hoverinfo": "text"}
