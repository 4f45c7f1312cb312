"""Where the trials lie on the simplex, coloured by their objective."""

from collections.abc import Callable, Mapping, Sequence
from math import cos, pi, sin
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dem_opt.analysis.regret import algorithm_of
from dem_opt.dashboards.style import (
    MOST_POINTS,
    OUTLINE,
    SEQUENTIAL,
    SYMBOLS,
    WINNER,
    color,
    finish,
    is_base,
    label,
    objective_words,
    proportions,
    spread,
    told,
)
from dem_opt.dashboards.surrogate_marks import diamond, draw_belief
from dem_opt.simplex import Coefficients
from dem_opt.types import ResultRow, Summary, TrialRecord

Trial = tuple[str, TrialRecord]
"""A scored trial, and the run that it is of."""

Shown = Mapping[str, Sequence[Trial]]
"""The scored trials to draw, by algorithm."""


def simplex_map(summary: Summary) -> go.Figure:
    """Where the trials lie, coloured by their objective on the search split (nats per token).

    Runs of one algorithm are drawn alike.  A trial that was stopped has an open marker, and the colour of its estimate.
    One or two distributions: NLL against a coefficient.  Three: a ternary plot.  More: a regular polygon in
    barycentric coordinates, where a composite stands at  sum_i w_i v_i / sum_i w_i  between the corners v_i.  The base
    alone, w = 0, has no proportions and stands in the middle.
    """
    shown = _shown(summary)
    count = len(summary.distributions)
    draw: Callable[[go.Figure, Summary, Shown], None]
    draw = _draw_line if count <= 2 else _draw_ternary if count == 3 else _draw_polygon
    figure = go.Figure()
    draw(figure, summary, shown)
    believed = summary.surrogate
    drawn = sum(map(len, shown.values()))
    scored = sum(record.objective is not None for records in summary.trials.values() for record in records)
    where = "at its coefficient" if count <= 2 else "nearer to a corner the more it has of that distribution"
    if count > 2 and any(is_base(record.coefficients) for trials in shown.values() for _, record in trials):
        where += " (the base, which has none, in the middle)"
    reading = (
        f"{drawn} of {scored} scored trials, each {where}; open ones were stopped early and show an estimate; "
        "the star is the winner."
    )
    if believed is not None:
        mean = {2: "The dotted line is the surrogate's mean. ", 3: "Behind them the surrogate's mean. "}.get(count, "")
        reading += f" {mean}The open diamond is the surrogate's optimum, an estimate."
    description = f"The winner is {summary.winner.label}: {told(summary.winner.coefficients)}."
    return finish(figure, "Trials on the simplex", reading, description, 450)


def barycentric(
    coefficients: Sequence[Coefficients], names: Sequence[str], corners_K2: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Composites in the polygon, [R, 2]: the mean of its corners weighted by the coefficients."""
    parts_RK = np.array([[proportions(each)[name] for name in names] for each in coefficients]).reshape(-1, len(names))
    points_R2: NDArray[np.float64] = parts_RK @ corners_K2
    return points_R2.round(4)


def _draw_line(figure: go.Figure, summary: Summary, shown: Shown) -> None:
    """The objective against the coefficient of the first distribution."""
    first = next(iter(summary.distributions))
    for algorithm, trials in shown.items():
        weights = [record.coefficients.weights[first] for _, record in trials]
        key = _legend_key(algorithm)
        marker = key["marker"] | {"symbol": _symbols(algorithm, trials)}
        figure.add_scatter(x=weights, y=_objectives(trials), **_series(algorithm, trials) | {"marker": marker})
        figure.add_scatter(x=[None], y=[None], **key)
    winner, believed = summary.winner, summary.surrogate
    if believed is not None:
        line = {"color": OUTLINE, "width": 1.5, "dash": "dot"}
        places = [point.weights[first] for point in believed.points]
        figure.add_scatter(
            x=places, y=list(believed.means), mode="lines", line=line, showlegend=False, hoverinfo="skip"
        )
        figure.add_scatter(x=[believed.optimum.weights[first]], y=[believed.mean], **diamond(believed))
    if winner.coefficients is not None and "search" in winner.objective:
        figure.add_scatter(x=[winner.coefficients.weights[first]], y=[winner.objective["search"]], **_star(winner))
    figure.update_xaxes(title=f"coefficient of {label(first)}")
    figure.update_yaxes(title=f"{objective_words(summary)} on the search split (nats per token)")


def _draw_ternary(figure: go.Figure, summary: Summary, shown: Shown) -> None:
    """Three coefficients as a ternary plot."""
    corners = dict(zip("abc", summary.distributions, strict=True))
    believed = summary.surrogate
    if believed is not None:
        draw_belief(figure, believed, corners)
    for algorithm, trials in shown.items():
        parts = [proportions(record.coefficients) for _, record in trials]
        points = {corner: [each[name] for each in parts] for corner, name in corners.items()}
        marker = _objective_marker(algorithm, trials)
        figure.add_scatterternary(**points, marker=marker, cliponaxis=False, **_series(algorithm, trials))
        figure.add_scatterternary(a=[None], b=[None], c=[None], **_legend_key(algorithm))
    if believed is not None:
        at = {corner: [proportions(believed.optimum)[name]] for corner, name in corners.items()}
        figure.add_scatterternary(**at, cliponaxis=False, **diamond(believed))
    total = 1.0
    if summary.winner.coefficients is not None:
        best = summary.winner.coefficients
        total = sum(best.weights.values()) or total
        star = {corner: [proportions(best)[name]] for corner, name in corners.items()}
        figure.add_scatterternary(**star, cliponaxis=False, **_star(summary.winner))
    frame = {"sum": total, "bgcolor": "rgba(0,0,0,0)", "domain": {"x": [0.08, 0.92]}}
    axes = {f"{corner}axis": {"title": {"text": label(name)}, "nticks": 5} for corner, name in corners.items()}
    figure.update_layout(ternary={**frame, **axes}, coloraxis=_objective_axis(summary, shown))


def _draw_polygon(figure: go.Figure, summary: Summary, shown: Shown) -> None:
    """Any number of coefficients in a regular polygon, a corner for each distribution."""
    names = list(summary.distributions)
    corners_K2 = _corners(len(names))
    outline_x, outline_y = np.vstack([corners_K2, corners_K2[:1]]).T.tolist()
    line = {"color": OUTLINE, "width": 1}
    figure.add_scatter(x=outline_x, y=outline_y, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for algorithm, trials in shown.items():
        x, y = barycentric([record.coefficients for _, record in trials], names, corners_K2).T.tolist()
        figure.add_scatter(x=x, y=y, marker=_objective_marker(algorithm, trials), **_series(algorithm, trials))
        figure.add_scatter(x=[None], y=[None], **_legend_key(algorithm))
    if summary.winner.coefficients is not None:
        x, y = barycentric([summary.winner.coefficients], names, corners_K2).T.tolist()
        figure.add_scatter(x=x, y=y, **_star(summary.winner))
    if summary.surrogate is not None:
        x, y = barycentric([summary.surrogate.optimum], names, corners_K2).T.tolist()
        figure.add_scatter(x=x, y=y, **diamond(summary.surrogate))
    for name, (x, y) in zip(names, corners_K2.tolist(), strict=True):
        figure.add_annotation(text=label(name, 15), showarrow=False, **_beside(x, y, len(names) > 6))
    reach = 1.2 * float(corners_K2.max())
    figure.update_xaxes(visible=False, range=[-reach, reach])
    figure.update_yaxes(visible=False, range=[-reach, reach], scaleanchor="x")
    figure.update_layout(coloraxis=_objective_axis(summary, shown))


def _corners(count: int) -> NDArray[np.float64]:
    """Corners of a regular polygon, clockwise; an even one lies on a side, which leaves room for labels."""
    top = pi / 2 + (pi / count if count % 2 == 0 else 0)
    angles = [top - 2 * pi * i / count for i in range(count)]
    return np.array([(cos(angle), sin(angle)) for angle in angles]).round(4)


def _beside(x: float, y: float, are_many: bool) -> dict[str, Any]:
    """Where a corner's label stands: left or right of the corners at the sides, above or below the others.

    Where there are many corners, labels above and below lean away from the middle, so that neighbours keep apart.
    """
    if abs(y) < 0.6:
        return {"x": 1.06 * x, "y": y, "xanchor": "left" if x > 0 else "right"}
    lean = {"xanchor": "left" if x > 0 else "right"} if are_many and abs(x) > 0.05 else {}
    return {"x": x, "y": 1.06 * y, "yanchor": "bottom" if y > 0 else "top", **lean}


def _series(algorithm: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """What an algorithm's points have in common."""
    common = {"mode": "markers", "legendgroup": label(algorithm), "showlegend": False}
    return {**common, "hovertext": [_hover(run, record) for run, record in trials], "hoverinfo": "text"}


def _hover(run: str, record: TrialRecord) -> str:
    found = f"{record.objective:.4f}" + (f" ± {record.error:.4f}, stopped early" if record.is_partial else "")
    return f"{label(run)}, trial {record.number}: {found}<br>{label(told(record.coefficients), 200)}"


def _legend_key(algorithm: str) -> dict[str, Any]:
    """A trace's entry in the legend: points coloured by their objective have no one colour to stand there."""
    marker = {"color": color(algorithm), "symbol": SYMBOLS.get(algorithm, "circle"), "size": 8}
    name = label(algorithm)
    return {"mode": "markers", "name": name, "legendgroup": name, "showlegend": True, "marker": marker}


def _symbols(algorithm: str, trials: Sequence[Trial]) -> list[str]:
    """The algorithm's shape, open where a trial was stopped."""
    shape = SYMBOLS.get(algorithm, "circle")
    return [f"{shape}-open" if record.is_partial else shape for _, record in trials]


def _star(winner: ResultRow) -> dict[str, Any]:
    text = f"the winner<br>{label(told(winner.coefficients), 200)}"
    marker = {"symbol": "star", "size": 17, "color": WINNER, "line": {"width": 1, "color": "white"}}
    return {
        "mode": "markers",
        "marker": marker,
        "showlegend": False,
        "hovertext": [text],
        "hoverinfo": "text",
    }


def _objective_marker(algorithm: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Markers coloured by the objective, shaped by algorithm; the grid's are smaller, as it is the background."""
    is_grid = algorithm == "grid"
    return {
        "color": _objectives(trials),
        "coloraxis": "coloraxis",
        "symbol": _symbols(algorithm, trials),
        "size": 7 if is_grid else 11,
        "line": {"width": 1, "color": OUTLINE if is_grid else color(algorithm)},
    }


def _objective_axis(summary: Summary, shown: Shown) -> dict[str, Any]:
    """Colours of the objective, saturated above the third quartile: so the neighbourhood of the best is told apart."""
    objectives = [objective for trials in shown.values() for objective in _objectives(trials)]
    return objective_axis(summary, objectives)


def objective_axis(summary: Summary, objectives: Sequence[float]) -> dict[str, Any]:
    """The same for any values of the objective."""
    low, high = (min(objectives), float(np.quantile(objectives, 0.75))) if objectives else (0.0, 1.0)
    title = {"text": f"{objective_words(summary)} (nats per token)", "side": "top"}
    bar = {"title": title, "orientation": "h", "y": -0.2, "yanchor": "top", "thickness": 10}
    return {"colorscale": SEQUENTIAL, "cmin": low, "cmax": max(high, low + 1e-6), "colorbar": bar}


def _shown(summary: Summary) -> dict[str, list[Trial]]:
    """The scored trials of each algorithm, thinned."""
    by_algorithm: dict[str, list[Trial]] = {}
    for run, records in summary.trials.items():
        scored = [(run, record) for record in records if record.objective is not None]
        by_algorithm.setdefault(algorithm_of(run), []).extend(scored)
    return {algorithm: _thinned(trials) for algorithm, trials in by_algorithm.items()}


def _thinned(trials: Sequence[Trial]) -> list[Trial]:
    """Trials, those that were stopped first and the others worst first, so that the best lie on top.

    MOST_POINTS of them at most: the best half, and others evenly spread over the rest of the ranking.
    """
    ranked = sorted(trials, key=lambda trial: (trial[1].is_partial, trial[1].objective or 0.0))
    half = MOST_POINTS // 2
    rest = ranked[half:]
    return [*ranked[:half], *(rest[i] for i in spread(len(rest), half))][::-1]


def _objectives(trials: Sequence[Trial]) -> list[float]:
    return [round(record.objective, 6) for _, record in trials if record.objective is not None]
