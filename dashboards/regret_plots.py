"""What searches found for what they spent: the best so far, and regret over algorithms and seeds."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dem_opt.analysis.regret import Comparison, Regret, Row, Run, compare
from dem_opt.dashboards.style import MOST_POINTS, color, finish, label, objective_words, rgba, say_nothing, spread
from dem_opt.types import Summary

FLOOR = 1e-5
"""Regrets in nats per token below this are drawn as this: so many windows as tell them apart nobody scores."""


def best_so_far(summary: Summary) -> go.Figure:
    """Best objective of whole trials on the search split (nats per token) against forward-equivalents, a line a run.

    Where protected corpora got worse than they may, the objective is that with the penalty.  Trials that were stopped
    cost what was measured of them and are never the best.
    The grid has no order of its own: its line is the expectation over all orders, `expected_best`.
    """
    figure, words = go.Figure(), []
    for row in compare(summary).rows:
        found = [run for run in row.runs if run.spent_S]
        for run in found:
            _add_run(figure, run, row.is_expected, is_first=run is found[0])
            words.append(f"{run.name} reached {run.best_S[-1]:.4f} for {run.forwards:.1f} forward-equivalents")
    what = objective_words(summary)
    _cost_axis(figure)
    figure.update_yaxes(title=f"best {what} so far (nats per token)")
    if not words:
        say_nothing(figure, "no trial was scored whole")
    reading = (
        f"The lowest {what} on the search split that a search had found for so many forward-equivalents (full passes "
        "over the search split). Trials that were stopped count by their windows, and are never the best."
    )
    description = f"The {what} in nats per token: {'; '.join(words) or 'no trial was scored whole'}."
    return finish(figure, "Best so far", reading, description, 420)


def comparison_figure(comparison: Comparison) -> go.Figure:
    """Median regret over runs (nats per token, log scale, from FLOOR) against forward-equivalents, with quartiles.

    A line an algorithm, a band between its quartiles where it has several runs; the grid's line is dashed, the mean
    over all orders of its points.
    """
    figure, words = go.Figure(), []
    drawn = [row for row in comparison.rows if row.curve]
    for row in drawn:
        curve = [row.curve[place] for place in spread(len(row.curve), MOST_POINTS)]
        if curve[0].low is not None:
            _add_band(figure, row, curve)
    for row in drawn:
        _add_median(figure, row)
        last = row.curve[-1]
        words.append(f"{row.algorithm} {last.median:.4f} for {last.forwards:.1f} forward-equivalents")
    _cost_axis(figure)
    ticks = [digit * 10.0**power for power in range(-5, 3) for digit in (1, 3)]
    title = {"text": "regret (nats per token, log scale)", "standoff": 12}
    figure.update_yaxes(title=title, type="log", tickvals=ticks, tickformat="~g")
    if not words:
        say_nothing(figure, "no trial was scored whole")
    reading = (
        "Regret: the best whole trial's objective on the search split minus the lowest that any search found. Lines "
        "are medians over runs, bands reach from the lower to the upper quartile. Dashed: the mean over all orders of "
        f"the grid's points. Regrets below {FLOOR:.5f} nats per token are drawn at {FLOOR:.5f}. A forward-equivalent "
        "is one full pass over the search split; a search that ended keeps what it had."
    )
    description = f"Median regret in nats per token: {'; '.join(words) or 'no trial was scored whole'}."
    return finish(figure, "Regret against cost", reading, description, 440)


def _add_run(figure: go.Figure, run: Run, is_expected: bool, is_first: bool) -> None:
    """One run's line, in steps, or the grid's expectation; runs of one algorithm share an entry of the legend."""
    places = spread(len(run.spent_S), MOST_POINTS)
    figure.add_scatter(
        x=[round(run.spent_S[place], 4) for place in places],
        y=[round(run.best_S[place], 6) for place in places],
        name=label(run.algorithm) + (" (mean over orders)" if is_expected else ""),
        mode="lines+markers" if len(places) == 1 else "lines",
        legendgroup=label(run.algorithm),
        showlegend=is_first,
        line=_line(run.algorithm, is_expected) | {"width": 2.5 if is_first else 1.5},
        hovertemplate="%{y:.4f} after %{x}<extra></extra>",
    )


def _add_median(figure: go.Figure, row: Row) -> None:
    curve = [row.curve[place] for place in spread(len(row.curve), MOST_POINTS)]
    figure.add_scatter(
        x=_costs(curve),
        y=[_drawn(regret.median) for regret in curve],
        name=label(row.algorithm) + _runs(row),
        mode="lines+markers" if len(curve) == 1 else "lines",
        legendgroup=label(row.algorithm),
        line=_line(row.algorithm, row.is_expected) | {"width": 2.5},
        hovertemplate="%{y:.2g} after %{x}<extra></extra>",
    )


def _add_band(figure: go.Figure, row: Row, curve: Sequence[Regret]) -> None:
    """The area between the quartiles: the upper edge, then the lower one filled up to it."""
    common = {"mode": "lines", "legendgroup": label(row.algorithm), "showlegend": False, "hoverinfo": "skip"}
    line = _line(row.algorithm, row.is_expected) | {"width": 0}
    figure.add_scatter(x=_costs(curve), y=[_drawn(regret.high) for regret in curve], line=line, **common)
    lower = [_drawn(regret.low) for regret in curve]
    figure.add_scatter(
        x=_costs(curve), y=lower, line=line, fill="tonexty", fillcolor=rgba(color(row.algorithm), 0.18), **common
    )


def _runs(row: Row) -> str:
    if row.is_expected:
        return " (mean over orders)"
    return f" ({len(row.runs)} runs)" if len(row.runs) > 1 else ""


def _line(algorithm: str, is_expected: bool) -> dict[str, str | float]:
    """Steps of what was found; dashes from point to point for a mean that no search went through."""
    shape = {"shape": "linear", "dash": "dash"} if is_expected else {"shape": "hv"}
    return {"color": color(algorithm), **shape}


def _costs(curve: Sequence[Regret]) -> list[float]:
    return [round(regret.forwards, 4) for regret in curve]


def _drawn(regret: float | None) -> float:
    return max(FLOOR, round(regret or 0.0, 7))


def _cost_axis(figure: go.Figure) -> None:
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    figure.update_xaxes(title="forward-equivalents spent (log scale)", type="log", tickvals=ticks)
