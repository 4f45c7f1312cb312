"""The trials on the simplex, coloured by their objective."""

from collections.abc import Callable, Mapping, Sequence
from math import cos, pi, sin
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dem_opt.analysis.regret import algorithm_of
from dem_opt.dashboards.style import (
    MAX_POINTS,
    OUTLINE,
    SYMBOLS,
    WINNER,
    color,
    evenly_spaced,
    finish,
    label,
    objective_axis,
    proportions,
    ternary_axes,
)
from dem_opt.dashboards.surrogate_map import draw_mean, optimum_marker
from dem_opt.dashboards.words import coefficients_text, is_base, objective_name
from dem_opt.simplex import Coefficients
from dem_opt.types import SEARCH, Summary, TrialRecord

Trial = tuple[str, TrialRecord]
"""A scored trial with the name of its run."""

Shown = Mapping[str, Sequence[Trial]]
"""The trials to draw, by algorithm."""


def simplex_map(summary: Summary) -> go.Figure:
    """Draw the trials at their coefficients, coloured by their objective on the search split (in its unit).

    One or two distributions: objective against a coefficient.  Three: a ternary plot.  More: a regular polygon in
    generalized barycentric coordinates, where a composite lies at  sum_i w_i c_i / sum_i w_i  between the corners c_i.
    The base (w = 0) has no proportions and lies in the middle.  Runs of one algorithm look alike; a trial that saw
    some of the windows has an open marker in the colour of its estimate.
    """
    shown = _shown_trials(summary)
    count = len(summary.distributions)
    draw: Callable[[go.Figure, Summary, Shown], None]
    draw = _draw_line if count <= 2 else _draw_ternary if count == 3 else _draw_polygon
    figure = go.Figure()
    draw(figure, summary, shown)
    description = (
        f"The winner is {summary.global_winner.label}: {coefficients_text(summary.global_winner.coefficients)}."
    )
    return finish(figure, "Trials on the simplex", _reading(summary, shown), description, 450)


def _reading(summary: Summary, shown: Shown) -> str:
    """Return the caption: number of trials, how to read their positions, markers."""
    count = len(summary.distributions)
    drawn = sum(map(len, shown.values()))
    scored = sum(record.objective is not None for records in summary.trials.values() for record in records)
    position = "against their coefficient" if count <= 2 else "closer to a corner the larger its coefficient"
    if count > 2 and any(is_base(record.coefficients) for trials in shown.values() for _, record in trials):
        position += " (the base, all coefficients 0, in the middle)"
    sentences = [
        f"{drawn} of {scored} scored trials, {position}. Star: the winner.",
        "Open markers: some of the windows (estimated loss).",
    ]
    if summary.surrogate is not None:
        mean = {2: "Dotted line: the surrogate's mean. ", 3: "Background: the surrogate's mean. "}.get(count, "")
        sentences.append(f"{mean}Open diamond: the surrogate's optimum (predicted loss).")
    return " ".join(sentences)


def barycentric(
    coefficients: Sequence[Coefficients], names: Sequence[str], corners_K2: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Place R composites in a polygon [R, 2]: the mean of its K corners weighted by the coefficients."""
    parts = [[proportions(point)[name] for name in names] for point in coefficients]
    parts_RK = np.array(parts).reshape(-1, len(names))  # keeps the shape where R = 0
    points_R2: NDArray[np.float64] = parts_RK @ corners_K2
    return points_R2.round(4)


def _draw_line(figure: go.Figure, summary: Summary, shown: Shown) -> None:
    """Draw the objective against the coefficient of the first distribution."""
    first = next(iter(summary.distributions))
    for algorithm, trials in shown.items():
        weights = [record.coefficients.weights[first] for _, record in trials]
        key = _legend_key(algorithm)
        marker = key["marker"] | {"symbol": _symbols(algorithm, trials)}
        figure.add_scatter(x=weights, y=_objectives(trials), **_series(algorithm, trials) | {"marker": marker})
        figure.add_scatter(x=[None], y=[None], **key)
    winner, surrogate = summary.global_winner, summary.surrogate
    if surrogate is not None:
        line = {"color": OUTLINE, "width": 1.5, "dash": "dot"}
        weights = [point.weights[first] for point in surrogate.points]
        means = list(surrogate.means)
        figure.add_scatter(x=weights, y=means, mode="lines", line=line, showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            x=[surrogate.optimum.weights[first]], y=[surrogate.mean], **optimum_marker(surrogate, summary.unit_words)
        )
    if winner.coefficients is not None and SEARCH in winner.objective:
        figure.add_scatter(x=[winner.coefficients.weights[first]], y=[winner.objective[SEARCH]], **_star(summary))
    figure.update_xaxes(title=f"coefficient of {label(first)}")
    figure.update_yaxes(title=f"{objective_name(summary)} on the search split ({summary.unit_words})")


def _draw_ternary(figure: go.Figure, summary: Summary, shown: Shown) -> None:
    """Draw three coefficients as a ternary plot."""
    corners = dict(zip("abc", summary.distributions, strict=True))
    surrogate = summary.surrogate
    if surrogate is not None:
        draw_mean(figure, surrogate, corners)
    for algorithm, trials in shown.items():
        parts = [proportions(record.coefficients) for _, record in trials]
        points = {corner: [part[name] for part in parts] for corner, name in corners.items()}
        marker = _objective_marker(algorithm, trials)
        figure.add_scatterternary(**points, marker=marker, cliponaxis=False, **_series(algorithm, trials))
        figure.add_scatterternary(a=[None], b=[None], c=[None], **_legend_key(algorithm))
    if surrogate is not None:
        optimum = {corner: [proportions(surrogate.optimum)[name]] for corner, name in corners.items()}
        figure.add_scatterternary(**optimum, cliponaxis=False, **optimum_marker(surrogate, summary.unit_words))
    total = 1.0
    if summary.global_winner.coefficients is not None:
        best = summary.global_winner.coefficients
        total = sum(best.weights.values()) or total
        star = {corner: [proportions(best)[name]] for corner, name in corners.items()}
        figure.add_scatterternary(**star, cliponaxis=False, **_star(summary))
    figure.update_layout(ternary=ternary_axes(corners, total), coloraxis=_objective_axis(summary, shown))


def _draw_polygon(figure: go.Figure, summary: Summary, shown: Shown) -> None:
    """Draw any number of coefficients in a regular polygon with a corner for each distribution."""
    names = list(summary.distributions)
    corners_K2 = polygon_corners(len(names))
    outline_x, outline_y = np.vstack([corners_K2, corners_K2[:1]]).T.tolist()
    line = {"color": OUTLINE, "width": 1}
    figure.add_scatter(x=outline_x, y=outline_y, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for algorithm, trials in shown.items():
        x, y = barycentric([record.coefficients for _, record in trials], names, corners_K2).T.tolist()
        figure.add_scatter(x=x, y=y, marker=_objective_marker(algorithm, trials), **_series(algorithm, trials))
        figure.add_scatter(x=[None], y=[None], **_legend_key(algorithm))
    if summary.global_winner.coefficients is not None:
        x, y = barycentric([summary.global_winner.coefficients], names, corners_K2).T.tolist()
        figure.add_scatter(x=x, y=y, **_star(summary))
    if summary.surrogate is not None:
        x, y = barycentric([summary.surrogate.optimum], names, corners_K2).T.tolist()
        figure.add_scatter(x=x, y=y, **optimum_marker(summary.surrogate, summary.unit_words))
    for name, (x, y) in zip(names, corners_K2.tolist(), strict=True):
        figure.add_annotation(text=label(name, 15), showarrow=False, **corner_label(x, y, is_crowded=len(names) > 6))
    reach = 1.2 * float(corners_K2.max())
    figure.update_xaxes(visible=False, range=[-reach, reach])
    figure.update_yaxes(visible=False, range=[-reach, reach], scaleanchor="x")
    figure.update_layout(coloraxis=_objective_axis(summary, shown))


def polygon_corners(count: int) -> NDArray[np.float64]:
    """Return the corners of a regular polygon, clockwise; an even one rests on a side, to leave room for labels."""
    top = pi / 2 + (pi / count if count % 2 == 0 else 0)
    angles = [top - 2 * pi * i / count for i in range(count)]
    return np.array([(cos(angle), sin(angle)) for angle in angles]).round(4)


def corner_label(x: float, y: float, is_crowded: bool) -> dict[str, Any]:
    """Return the position of a corner's label: beside the corners at the sides, above or below the others.

    Around a crowded polygon, labels above and below extend away from the middle, which keeps neighbours apart.
    """
    if abs(y) < 0.6:
        return {"x": 1.06 * x, "y": y, "xanchor": "left" if x > 0 else "right"}
    outward = {"xanchor": "left" if x > 0 else "right"} if is_crowded and abs(x) > 0.05 else {}
    return {"x": x, "y": 1.06 * y, "yanchor": "bottom" if y > 0 else "top", **outward}


def _series(algorithm: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the trace settings that an algorithm's points share on every kind of map."""
    return {
        "mode": "markers",
        "legendgroup": label(algorithm),
        "showlegend": False,
        "hovertext": [_hover(run, record) for run, record in trials],
        "hoverinfo": "text",
    }


def _hover(run: str, record: TrialRecord) -> str:
    estimate = f" ± {record.error:.4f} (estimate from some of the windows)" if record.is_partial else ""
    loss = f"{record.objective:.4f}{estimate} {record.unit_words}"
    return f"{label(run)}, trial {record.number}: {loss}<br>{label(coefficients_text(record.coefficients), 200)}"


def _legend_key(algorithm: str) -> dict[str, Any]:
    """Return a trace without points for the legend: points coloured by objective have no single colour to show."""
    marker = {"color": color(algorithm), "symbol": SYMBOLS.get(algorithm, "circle"), "size": 8}
    name = label(algorithm)
    return {"mode": "markers", "name": name, "legendgroup": name, "showlegend": True, "marker": marker}


def _symbols(algorithm: str, trials: Sequence[Trial]) -> list[str]:
    """Return the algorithm's symbol for each trial, open if it saw some of the windows."""
    shape = SYMBOLS.get(algorithm, "circle")
    return [f"{shape}-open" if record.is_partial else shape for _, record in trials]


def _star(summary: Summary) -> dict[str, Any]:
    winner = summary.global_winner
    loss = f": {winner.objective[SEARCH]:.4f} {summary.unit_words}" if SEARCH in winner.objective else ""
    text = f"winner{loss}<br>{label(coefficients_text(winner.coefficients), 200)}"
    marker = {"symbol": "star", "size": 17, "color": WINNER, "line": {"width": 1, "color": "white"}}
    return {"mode": "markers", "marker": marker, "showlegend": False, "hovertext": [text], "hoverinfo": "text"}


def _objective_marker(algorithm: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return markers coloured by objective and shaped by algorithm; the grid's are smaller, as a background."""
    is_grid = algorithm == "grid"
    return {
        "color": _objectives(trials),
        "coloraxis": "coloraxis",
        "symbol": _symbols(algorithm, trials),
        "size": 7 if is_grid else 11,
        "line": {"width": 1, "color": OUTLINE if is_grid else color(algorithm)},
    }


def _objective_axis(summary: Summary, shown: Shown) -> dict[str, Any]:
    return objective_axis(summary, [objective for trials in shown.values() for objective in _objectives(trials)])


def _shown_trials(summary: Summary) -> dict[str, list[Trial]]:
    """Collect the scored trials of each algorithm over its runs, thinned out."""
    by_algorithm: dict[str, list[Trial]] = {}
    for run, records in summary.trials.items():
        scored = [(run, record) for record in records if record.objective is not None]
        by_algorithm.setdefault(algorithm_of(run), []).extend(scored)
    return {algorithm: _thinned(trials) for algorithm, trials in by_algorithm.items()}


def _thinned(trials: Sequence[Trial]) -> list[Trial]:
    """Keep at most MAX_POINTS trials: the better half of them by rank, the rest evenly spread over the ranking.

    The order is the drawing order: trials that saw some of the windows first, then from worst to best, so that the best
    lie on top.
    """
    ranked = sorted(trials, key=lambda trial: (trial[1].is_partial, trial[1].objective or 0.0))
    half = MAX_POINTS // 2
    rest = ranked[half:]
    return [*ranked[:half], *(rest[i] for i in evenly_spaced(len(rest), half))][::-1]


def _objectives(trials: Sequence[Trial]) -> list[float]:
    return [round(record.objective, 6) for _, record in trials if record.objective is not None]
