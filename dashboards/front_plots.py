"""The front between two losses as a figure."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from dem_opt.dashboards.fronts import front_lines
from dem_opt.dashboards.style import (
    MAX_POINTS,
    OTHER_ALGORITHM,
    OUTLINE,
    WINNER,
    color,
    evenly_spaced,
    finish,
    label,
    show_message,
)
from dem_opt.dashboards.words import coefficients_text
from dem_opt.pareto import Front
from dem_opt.types import Summary

BELOW, ABOVE = 0.08, 0.6
"""Margins of the axes below and above the front, in its range on the axis."""

NOTHING = (
    "the study minimizes one number: name two losses, study.plot.pareto(a, b) or dem-opt pareto STUDY --between A B"
)

Losses = Sequence[tuple[float, float]]


def front_figure(front: Front) -> go.Figure:
    """Draw the front between two losses (in its unit, search split), and the composites that are not on it.

    The axes show the front and what is near it; composites farther off are counted in the caption.
    """
    figure, first, second = go.Figure(), *map(label, front.names)
    ranges = [_range([point.search[axis] for point in front.points]) for axis in (0, 1)]
    dominated, beyond = _within(front.dominated, ranges)
    _add_points(figure, dominated, "other composites", {"color": OUTLINE, "size": 5, "opacity": 0.6})
    _add_front(figure, front)
    for name, special in (("lowest mean", front.lowest_mean), ("knee", front.knee)):
        if special is not None:
            shape = "star" if name == "lowest mean" else "diamond"
            tint = WINNER if name == "lowest mean" else OTHER_ALGORITHM
            _add_points(figure, [special.search], name, {"color": tint, "size": 13, "symbol": shape})
    near, _ = _within([baseline.search for baseline in front.baselines.values()], ranges)
    _add_points(figure, near, "base and fine-tunes", {"color": color("grid"), "size": 9, "symbol": "square"})
    figure.update_xaxes(title=f"{first}, search split ({front.unit})", range=ranges[0])
    figure.update_yaxes(title=f"{second}, search split ({front.unit})", range=ranges[1])
    farther = beyond + len(front.baselines) - len(near)
    reading = (
        "Line: the front; no composite is better in one loss without being worse in the other. Lower left is better. "
        f"Beyond the axes: {farther} composites. The knee depends on where the front's ends are."
    )
    return finish(figure, f"Front between {first} and {second}", reading, " ".join(front_lines(front)), 440)


def front_map(summary: Summary) -> go.Figure:
    """Draw the front of a study that searches for one."""
    if summary.front is not None:
        return front_figure(summary.front)
    figure = go.Figure()
    show_message(figure, NOTHING)
    return finish(figure, "Front", NOTHING, NOTHING, 440)


def _range(losses: Sequence[float]) -> list[float]:
    """The part of an axis that is shown."""
    low, high = min(losses), max(losses)
    width = (high - low) or 1e-3
    return [low - BELOW * width, high + ABOVE * width]


def _within(losses: Losses, ranges: Sequence[Sequence[float]]) -> tuple[Losses, int]:
    """The points within the axes, MAX_POINTS at most, and how many are beyond."""
    inside = [
        point for point in losses if all(low <= loss <= high for loss, (low, high) in zip(point, ranges, strict=True))
    ]
    shown = [inside[index] for index in evenly_spaced(len(inside), MAX_POINTS)] if inside else []
    return shown, len(losses) - len(inside)


def _add_front(figure: go.Figure, front: Front) -> None:
    """Add the front as steps: what lies above and to the right of them is dominated."""
    losses_N2 = np.array([point.search for point in front.points]).round(6)
    figure.add_scatter(
        x=losses_N2[:, 0].tolist(),
        y=losses_N2[:, 1].tolist(),
        name="front",
        mode="lines+markers",
        line={"color": color("simplex-gp"), "shape": "hv", "width": 2},
        marker={"color": color("simplex-gp"), "size": 8},
        text=[label(coefficients_text(point.coefficients), 120) for point in front.points],
        hovertemplate=f"%{{text}}<br>%{{x:.4f}}, %{{y:.4f}} {front.unit}<extra></extra>",
    )


def _add_points(figure: go.Figure, losses: Losses, name: str, marker: dict[str, object]) -> None:
    if losses:
        x, y = zip(*losses, strict=True)
        template = f"%{{x:.4f}}, %{{y:.4f}}<extra>{name}</extra>"
        points = {"x": [round(loss, 6) for loss in x], "y": [round(loss, 6) for loss in y]}
        figure.add_scatter(**points, name=name, mode="markers", marker=marker, hovertemplate=template)
