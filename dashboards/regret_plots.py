"""Quality against cost: the best objective so far of each run, and regret over algorithms and seeds."""

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from dem_opt.analysis.regret import Comparison, Regret, Row, Run, compare
from dem_opt.dashboards.style import MAX_POINTS, color, evenly_spaced, finish, label, rgba, show_message
from dem_opt.dashboards.words import objective_name
from dem_opt.types import Summary

FLOOR = 1e-5
"""Smallest regret drawn on the log axis, in the objective's unit; no evaluation has enough windows to resolve less."""

FREE = 0.1
"""Forward-equivalents at which the logarithmic axis shows trials that cost nothing."""

NOTHING = "no trial has been fully scored"
FORWARD_EQUIVALENT = "One forward-equivalent (FE) is one full pass over the search split"


def best_so_far(summary: Summary) -> go.Figure:
    """Draw the best objective on the search split (in its unit) against forward-equivalents, a line for each run.

    Only fully scored trials count; a trial that was stopped early costs its share of the windows and is never the
    best.  Where protected corpora exceed their allowance, the objective includes the penalty.  The grid has no order
    of its own: its line is the expectation over all orders of its points (`analysis.regret.expected_best`).
    """
    figure, endpoints = go.Figure(), []
    rows = compare(summary).rows
    for row in rows:
        scored_runs = [run for run in row.runs if run.spent_S]
        for index, run in enumerate(scored_runs):
            _add_run(figure, run, row.is_expected, index == 0, summary.unit_words)
            endpoints.append(f"{run.name} reached {run.best_S[-1]:.4f} after {run.forwards:.1f} forward-equivalents")
    objective = objective_name(summary)
    _set_cost_axis(figure)
    figure.update_yaxes(title=f"best {objective} so far ({summary.unit_words})")
    if not endpoints:
        show_message(figure, NOTHING)
    reading = (
        f"Lowest {objective} on the search split found so far, against the cost of the search. {FORWARD_EQUIVALENT}; "
        "a trial that was stopped early costs its share of the windows and is never the best."
        f"{_about_free(run for row in rows for run in row.runs)}"
    )
    description = f"Best {objective} in {summary.unit_words}: {'; '.join(endpoints) or NOTHING}."
    return finish(figure, "Best so far", reading, description, 420)


def comparison_figure(comparison: Comparison) -> go.Figure:
    """Draw median regret over runs (in its unit, log scale, at least FLOOR) against forward-equivalents.

    A line for each algorithm, with a band between the quartiles if it has several runs; the grid's line is dashed:
    the mean over all orders of its points.
    """
    figure, endpoints = go.Figure(), []
    drawn = [row for row in comparison.rows if row.curve]
    for row in drawn:
        curve = _thinned(row.curve)
        if curve[0].low is not None:
            _add_band(figure, row, curve)
    for row in drawn:
        _add_median(figure, row, comparison.unit)
        last = row.curve[-1]
        endpoints.append(f"{row.algorithm} {last.median:.4f} after {last.forwards:.1f} forward-equivalents")
    _set_cost_axis(figure)
    ticks = [digit * 10.0**power for power in range(-5, 3) for digit in (1, 3)]
    title = {"text": f"{comparison.title.lower()} ({comparison.unit}, log scale)", "standoff": 12}
    figure.update_yaxes(title=title, type="log", tickvals=ticks, tickformat="~g")
    if not endpoints:
        show_message(figure, NOTHING)
    reading = (
        f"{comparison.meaning}, on the search split. Lines: "
        "median over runs; bands: lower to upper quartile; dashed: mean over all orders of the grid's points. Values "
        f"below {FLOOR:.5f} {comparison.unit} are drawn at {FLOOR:.5f}. {FORWARD_EQUIVALENT}; a run that has ended "
        f"keeps its last value.{_about_free(run for row in drawn for run in row.runs)}"
    )
    description = f"Median {comparison.title.lower()} in {comparison.unit}: {'; '.join(endpoints) or NOTHING}."
    return finish(figure, f"{comparison.title} against cost", reading, description, 440)


def _add_run(figure: go.Figure, run: Run, is_expected: bool, is_first: bool, unit: str) -> None:
    """Add a run's step function, or the grid's expectation; runs of one algorithm share a legend entry."""
    indices = evenly_spaced(len(run.spent_S), MAX_POINTS)
    figure.add_scatter(
        x=[_cost(run.spent_S[index]) for index in indices],
        y=[round(run.best_S[index], 6) for index in indices],
        name=label(run.algorithm) + (" (mean over orders)" if is_expected else ""),
        mode="lines+markers" if len(indices) == 1 else "lines",
        legendgroup=label(run.algorithm),
        showlegend=is_first,
        line=_line(run.algorithm, is_expected) | {"width": 2.5 if is_first else 1.5},
        hovertemplate=f"%{{y:.4f}} {unit} after %{{x}} FE<extra></extra>",
    )


def _add_median(figure: go.Figure, row: Row, unit: str) -> None:
    curve = _thinned(row.curve)
    figure.add_scatter(
        x=_costs(curve),
        y=[_floored(regret.median) for regret in curve],
        name=label(row.algorithm) + _runs_suffix(row),
        mode="lines+markers" if len(curve) == 1 else "lines",
        legendgroup=label(row.algorithm),
        line=_line(row.algorithm, row.is_expected) | {"width": 2.5},
        hovertemplate=f"%{{y:.2g}} {unit} after %{{x}} FE<extra></extra>",
    )


def _add_band(figure: go.Figure, row: Row, curve: Sequence[Regret]) -> None:
    """Fill the area between the quartiles: the upper edge, then the lower one filled up to it."""
    common = {"mode": "lines", "legendgroup": label(row.algorithm), "showlegend": False, "hoverinfo": "skip"}
    line = _line(row.algorithm, row.is_expected) | {"width": 0}
    figure.add_scatter(x=_costs(curve), y=[_floored(regret.high) for regret in curve], line=line, **common)
    lower = [_floored(regret.low) for regret in curve]
    figure.add_scatter(
        x=_costs(curve), y=lower, line=line, fill="tonexty", fillcolor=rgba(color(row.algorithm), 0.18), **common
    )


def _runs_suffix(row: Row) -> str:
    if row.is_expected:
        return " (mean over orders)"
    return f" ({len(row.runs)} runs)" if len(row.runs) > 1 else ""


def _line(algorithm: str, is_expected: bool) -> dict[str, str | float]:
    """Return steps for values that a run observed, and dashes between points for an expectation."""
    shape = {"shape": "linear", "dash": "dash"} if is_expected else {"shape": "hv"}
    return {"color": color(algorithm), **shape}


def _thinned(curve: Sequence[Regret]) -> list[Regret]:
    return [curve[index] for index in evenly_spaced(len(curve), MAX_POINTS)]


def _costs(curve: Sequence[Regret]) -> list[float]:
    return [_cost(regret.forwards) for regret in curve]


def _cost(forwards: float) -> float:
    return max(FREE, round(forwards, 4))


def _about_free(runs: Iterable[Run]) -> str:
    """Return a sentence on trials that cost nothing, where there are any."""
    is_any = any(run.spent_S and run.spent_S[0] < FREE for run in runs)
    return f" Composites that were known before the search cost nothing and are drawn at {FREE} FE." if is_any else ""


def _floored(regret: float | None) -> float:
    return max(FLOOR, round(regret or 0.0, 7))


def _set_cost_axis(figure: go.Figure) -> None:
    ticks = [float(f"{digit}e{power}") for power in range(-1, 7) for digit in (1, 2, 5)]
    figure.update_xaxes(title="forward-equivalents (log scale)", type="log", tickvals=ticks, tickformat="~g")
