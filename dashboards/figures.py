"""A Summary -> plotly figures: pure functions, one palette, units on every axis.

Every figure carries in `layout.meta` how it is read ("reading") and what it shows in words ("description").  Names come from users, and plotly reads
HTML in texts and `%{...}` in templates: they are escaped, and never part of a template.
"""

from collections.abc import Sequence
from html import escape
from itertools import accumulate
from math import cos, pi, sin
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dem_opt.errors import shorten
from dem_opt.records import Standing, Summary, TrialRecord
from dem_opt.simplex import Coefficients

ALGORITHM_COLORS = {
    "simplex-gp": "#0072B2",
    "grid": "#D98200",
    "random": "#7F7F7F",
    "tpe": "#009E73",
    "cmaes": "#CC79A7",
    "gradient": "#D55E00",
}
"""Okabe and Ito's colours, orange darkened to be seen on white."""

DISTRIBUTION_COLORS = ("#4477AA", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#AA4499", "#44AA99", "#999933", "#882255")
"""Tol's muted colours, in the study file's order; repeated after nine."""

DIVERGING = ((0.0, "#5AAEE8"), (0.5, "#F7F7F7"), (1.0, "#E69F4C"))
"""Blue where the NLL fell, orange where it rose: told apart with any colour vision, light enough for dark numbers."""

SEQUENTIAL = ((0.0, "#2F6FDB"), (0.5, "#9A9CA3"), (1.0, "#F2D16B"))
"""Low NLL blue, high NLL yellow, by way of grey: seen on white and on black."""

SYMBOLS = {"simplex-gp": "circle", "grid": "square", "random": "diamond"}
MOST_POINTS = 1000
"""Points drawn of one algorithm at most, in any figure."""

_OUTLINE = "#7F7F7F"
_WINNER = "#D55E00"


def all_figures(summary: Summary) -> dict[str, go.Figure]:
    """Every figure under its stable id (a valid HTML id), in reading order."""
    return {
        "coefficients": coefficients_bar(summary),
        "change": change_heat_map(summary),
        "best-so-far": best_so_far(summary),
        "simplex": simplex_map(summary),
    }


def coefficients_bar(summary: Summary) -> go.Figure:
    """The winner's coefficients w_i, one bar for each distribution in the study file's order."""
    weights = _weights(summary.winner.coefficients, summary)
    names, values = list(weights), list(weights.values())
    figure = go.Figure(
        go.Bar(
            x=values,
            y=list(range(len(names))),
            orientation="h",
            marker_color=[DISTRIBUTION_COLORS[i % len(DISTRIBUTION_COLORS)] for i in range(len(names))],
            text=[f"{value:.3f}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
        )
    )
    figure.update_xaxes(title="coefficient", range=[0, 1.12 * max(*values, 1e-9)])
    figure.update_yaxes(_name_ticks(names), autorange="reversed")
    told = ", ".join(f"{name} {value:.3f}" for name, value in weights.items())
    reading = "How much of each distribution vector the composite takes."
    return _finish(figure, "Coefficients of the winner", reading, f"{summary.winner.label}: {told}.", 150 + 34 * len(names))


def change_heat_map(summary: Summary, split: str = "held_out") -> go.Figure:
    """NLL(standing) - NLL(base) in nats per token, for each standing (rows) and distribution (columns).

    Colours saturate at the largest gain, so that one fine-tune's loss elsewhere does not wash the gains out; the
    numbers in the cells are exact.
    """
    base, *others = summary.standings
    names = list(summary.weights)
    change = [[_change(standing, base, split, name) for name in names] for standing in others]
    known = [value for row in change for value in row if value is not None]
    limit = max([-value for value in known if value < 0] or [abs(value) for value in known] or [1.0]) or 1.0
    heat = go.Heatmap(
        z=change,
        x=list(range(len(names))),
        y=list(range(len(others))),
        text=[["–" if value is None else f"{value:+.3f}" for value in row] for row in change],
        texttemplate="%{text}",
        textfont={"color": "#111111"},
        hoverinfo="skip",
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
        xgap=2,
        ygap=2,
        showscale=False,
    )
    figure = go.Figure(heat)
    figure.update_xaxes(_name_ticks(names), title="distribution", tickangle=-35 if max(map(len, names)) > 8 else 0)
    figure.update_yaxes(_name_ticks([standing.label for standing in others]), autorange="reversed")
    told = "; ".join(
        f"{standing.label}: " + ", ".join("–" if value is None else f"{name} {value:+.3f}" for name, value in zip(names, row, strict=True))
        for standing, row in zip(others, change, strict=True)
    )
    title = f"NLL change, {split.replace('_', '-')} split"
    reading = "NLL minus the base's in nats per token: negative is better. Colours saturate at the largest gain."
    return _finish(figure, title, reading, f"{told or 'Only the base was scored'}.", 170 + 34 * len(others))


def best_so_far(summary: Summary) -> go.Figure:
    """Best objective on the search split (nats per token) against evaluations spent, a line for each algorithm.

    The grid has no order of its own: its line is the expectation over all orders, `expected_best`.
    """
    figure = go.Figure()
    told = []
    for algorithm, records in summary.trials.items():
        objectives = [record.objective for record in records if record.objective is not None]
        if not objectives:
            continue
        is_grid = algorithm == "grid"
        spent = _spread(len(objectives)) + 1
        best = expected_best(objectives, spent) if is_grid else np.array(list(accumulate(objectives, min)))[spent - 1]
        figure.add_scatter(
            x=spent.tolist(),
            y=np.round(best, 6).tolist(),
            name=escape(algorithm + (" (mean over orders)" if is_grid else ""), quote=False),
            mode="lines+markers" if len(spent) == 1 else "lines",
            line={"color": _color(algorithm), "width": 2.5, "shape": "linear" if is_grid else "hv"},
            hovertemplate="%{y:.4f} after %{x}<extra></extra>",
        )
        told.append(f"{algorithm} reached {min(objectives):.4f} nats per token in {len(objectives)} evaluations")
    figure.update_xaxes(title="evaluations spent (log scale)", type="log", tickvals=[d * 10**e for e in range(7) for d in (1, 2, 5)])
    figure.update_yaxes(title="best NLL so far (nats per token)")
    if not told:
        figure.add_annotation(text="no trial was scored", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    reading = "The lowest mean NLL on the search split that an algorithm had found after so many evaluations."
    return _finish(figure, "Best so far", reading, f"{'; '.join(told) or 'No trial was scored'}.", 420)


def expected_best(objectives: Sequence[float], spent_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """The best of k objectives drawn without replacement, expected over all orders, for each k in `spent_S`.

    E_k = v_1 + sum_i (v_{i+1} - v_i) P(best of k > v_i),  P = C(n - i, k) / C(n, k),  v ascending, n values.
    """
    ascending_n = np.sort(np.asarray(objectives, dtype=np.float64))
    n = len(ascending_n)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    left_i = n - np.arange(1, n)
    expected_S = np.empty(len(spent_S))
    for place, k in enumerate(spent_S):
        can = left_i >= k
        log_ratio = log_factorial[left_i[can]] - log_factorial[left_i[can] - k] - log_factorial[n] + log_factorial[n - k]
        expected_S[place] = ascending_n[0] + np.diff(ascending_n)[can] @ np.exp(log_ratio)
    return expected_S


def simplex_map(summary: Summary) -> go.Figure:
    """Where the trials lie, coloured by their NLL on the search split (nats per token).

    One or two distributions: NLL against a coefficient.  Three: a ternary plot.  More: barycentric coordinates in a
    polygon, a composite standing at  sum_i w_i v_i / sum_i w_i  between the corners v_i.
    """
    shown = {algorithm: _thinned(records) for algorithm, records in summary.trials.items()}
    count = len(summary.weights)
    figure = go.Figure()
    draw = _draw_line if count <= 2 else _draw_ternary if count == 3 else _draw_polygon
    draw(figure, summary, shown)
    drawn = sum(map(len, shown.values()))
    scored = sum(record.objective is not None for records in summary.trials.values() for record in records)
    where = "at its coefficient" if count <= 2 else "nearer to a corner the more it has of that distribution"
    reading = f"{drawn} of {scored} scored trials, each {where}; the star is the winner."
    description = f"The winner is {summary.winner.label}: {_told(summary.winner.coefficients)}."
    return _finish(figure, "Trials on the simplex", reading, description, 450)


def _draw_line(figure: go.Figure, summary: Summary, shown: dict[str, list[TrialRecord]]) -> None:
    """NLL against the coefficient of the first distribution."""
    first = next(iter(summary.weights))
    for algorithm, records in shown.items():
        figure.add_scatter(
            x=[record.coefficients.weights[first] for record in records],
            y=[record.objective for record in records],
            mode="markers",
            **_legend(algorithm),
            marker={"color": _color(algorithm), "symbol": SYMBOLS.get(algorithm, "circle"), "size": 8},
            **_hover(records),
        )
    if summary.winner.coefficients is not None and "search" in summary.winner.objective:
        star = {"x": [summary.winner.coefficients.weights[first]], "y": [summary.winner.objective["search"]]}
        figure.add_scatter(**star, **_star(summary.winner))
    figure.update_xaxes(title=f"coefficient of {_label(first)}")
    figure.update_yaxes(title="NLL on the search split (nats per token)")


def _draw_ternary(figure: go.Figure, summary: Summary, shown: dict[str, list[TrialRecord]]) -> None:
    """Three coefficients as a ternary plot."""
    names = list(summary.weights)
    for algorithm, records in shown.items():
        points = [[record.coefficients.weights[name] for record in records] for name in names]
        figure.add_scatterternary(**dict(zip("abc", points, strict=True)), mode="markers", cliponaxis=False, **_legend(algorithm), **_markers(algorithm, records))
    total = 1.0
    if summary.winner.coefficients is not None:
        weights = summary.winner.coefficients.weights
        total = sum(weights.values())
        star = {axis: [weights[name]] for axis, name in zip("abc", names, strict=True)}
        figure.add_scatterternary(**star, **_star(summary.winner))
    axes = {f"{axis}axis": {"title": {"text": _label(name)}, "nticks": 5} for axis, name in zip("abc", names, strict=True)}
    figure.update_layout(ternary={"sum": total, "bgcolor": "rgba(0,0,0,0)", **axes}, coloraxis=_nll_axis(shown))


def _draw_polygon(figure: go.Figure, summary: Summary, shown: dict[str, list[TrialRecord]]) -> None:
    """Any number of coefficients in a regular polygon, a corner for each distribution."""
    names = list(summary.weights)
    top = pi / 2 + pi / len(names) * (len(names) % 2 == 0)
    angles = [top - 2 * pi * i / len(names) for i in range(len(names))]
    corners_K2 = np.array([(cos(angle), sin(angle)) for angle in angles])
    ring_K2 = np.vstack([corners_K2, corners_K2[:1]])
    figure.add_scatter(
        x=ring_K2[:, 0].round(4).tolist(),
        y=ring_K2[:, 1].round(4).tolist(),
        mode="lines",
        line={"color": _OUTLINE, "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    for algorithm, records in shown.items():
        x, y = _barycentric([record.coefficients for record in records], names, corners_K2)
        figure.add_scatter(x=x, y=y, mode="markers", **_legend(algorithm), **_markers(algorithm, records))
    if summary.winner.coefficients is not None:
        x, y = _barycentric([summary.winner.coefficients], names, corners_K2)
        figure.add_scatter(x=x, y=y, **_star(summary.winner))
    for name, (x, y) in zip(names, corners_K2.tolist(), strict=True):
        beside = abs(y) < 0.6
        place = {"xanchor": "left" if x > 0 else "right"} if beside else {"yanchor": "bottom" if y > 0 else "top"}
        shift = {"x": x + 0.06 * x * beside, "y": y + 0.06 * y}
        figure.add_annotation(text=escape(shorten(name, 15), quote=False), showarrow=False, **shift, **place)
    reach = 1.2 * float(corners_K2.max())
    figure.update_xaxes(visible=False, range=[-reach, reach])
    figure.update_yaxes(visible=False, scaleanchor="x", range=[-reach, reach])
    figure.update_layout(coloraxis=_nll_axis(shown))


def _barycentric(
    coefficients: Sequence[Coefficients], names: Sequence[str], corners_K2: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    """x and y of composites in the polygon."""
    weights_RK = np.array([[each.weights[name] for name in names] for each in coefficients]).reshape(-1, len(names))
    points_R2 = weights_RK / weights_RK.sum(axis=1, keepdims=True) @ corners_K2
    return points_R2[:, 0].round(4).tolist(), points_R2[:, 1].round(4).tolist()


def _legend(algorithm: str) -> dict[str, Any]:
    return {"name": escape(algorithm, quote=False), "showlegend": True}


def _markers(algorithm: str, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """Markers coloured by NLL, shaped by algorithm; the grid's are smaller, as it is the background."""
    return {
        "marker": {
            "color": [round(record.objective, 6) for record in records if record.objective is not None],
            "coloraxis": "coloraxis",
            "symbol": SYMBOLS.get(algorithm, "circle"),
            "size": 7 if algorithm == "grid" else 11,
            "line": {"width": 1, "color": _OUTLINE if algorithm == "grid" else _color(algorithm)},
        },
        **_hover(records),
    }


def _hover(records: Sequence[TrialRecord]) -> dict[str, Any]:
    text = [f"trial {record.number}: {record.objective:.4f}<br>{escape(_told(record.coefficients), quote=False)}" for record in records]
    return {"hovertext": text, "hoverinfo": "text"}


def _star(winner: Standing) -> dict[str, Any]:
    marker = {"symbol": "star", "size": 17, "color": _WINNER, "line": {"width": 1, "color": "white"}}
    text = f"the winner<br>{escape(_told(winner.coefficients), quote=False)}"
    return {"mode": "markers", "showlegend": False, "marker": marker, "hovertext": [text], "hoverinfo": "text"}


def _nll_axis(shown: dict[str, list[TrialRecord]]) -> dict[str, Any]:
    """Colours of NLL: saturated above the third quartile, so that the neighbourhood of the best is told apart."""
    objectives = [record.objective for records in shown.values() for record in records if record.objective is not None]
    low, high = (min(objectives), float(np.quantile(objectives, 0.75))) if objectives else (0.0, 1.0)
    bar = {"title": {"text": "NLL (nats per token)", "side": "top"}, "orientation": "h", "y": -0.16, "yanchor": "top", "thickness": 10}
    return {"colorscale": SEQUENTIAL, "cmin": low, "cmax": max(high, low + 1e-6), "colorbar": bar}


def _thinned(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Scored trials, worst first so that the best lie on top; MOST_POINTS of them, the better half of those the best."""
    ranked = sorted((record for record in records if record.objective is not None), key=lambda each: each.objective or 0.0)
    half = MOST_POINTS // 2
    rest = ranked[half:]
    kept = ranked[:half] + [rest[i] for i in np.unique(np.linspace(0, len(rest) - 1, min(half, len(rest))).astype(int))]
    return kept[::-1]


def _spread(count: int) -> NDArray[np.int64]:
    """Indices below `count`: all of them, or MOST_POINTS evenly spread with both ends."""
    indices: NDArray[np.int64] = np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(np.int64))
    return indices


def _change(standing: Standing, base: Standing, split: str, name: str) -> float | None:
    """NLL(standing) - NLL(base) on one distribution, None where one of them was not scored."""
    scores, reference = standing.scores.get(split, {}), base.scores.get(split, {})
    return round(scores[name].nll - reference[name].nll, 6) if name in scores and name in reference else None


def _weights(coefficients: Coefficients | None, summary: Summary) -> dict[str, float]:
    """Coefficients in the study file's order; all 0 for the base."""
    given = {} if coefficients is None else coefficients.weights
    return {name: given.get(name, 0.0) for name in summary.weights}


def _told(coefficients: Coefficients | None) -> str:
    """Coefficients above 0 in one line."""
    if coefficients is None:
        return "the base alone"
    return ", ".join(f"{shorten(name, 16)} {weight:.3f}" for name, weight in coefficients.weights.items() if weight)


def _color(algorithm: str) -> str:
    return ALGORITHM_COLORS.get(algorithm, "#332288")


def _label(name: str) -> str:
    """A user's name as plotly is to show it."""
    return escape(shorten(name, 22), quote=False)


def _name_ticks(names: Sequence[str]) -> dict[str, Any]:
    """An axis of names at 0, 1, 2...: numbers as positions, so that names which look alike do not merge."""
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [_label(name) for name in names], "showgrid": False}


def _finish(figure: go.Figure, title: str, reading: str, description: str, height: int) -> go.Figure:
    """The figure with its title, its words and the common look."""
    axis = {"gridcolor": "#E3E3E3", "zeroline": False, "linecolor": "#9A9A9A", "automargin": True}
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0.0, "xref": "container", "xanchor": "left", "y": 0.98, "yref": "container", "yanchor": "top", "font": {"size": 15}},
        meta={"reading": reading, "description": description},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        paper_bgcolor="#FFFFFF",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 85 if any(trace.name for trace in figure.data) else 45, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 1 - 28 / height, "yref": "container", "yanchor": "top"},
        height=height,
        dragmode=False,
    )
    return figure
