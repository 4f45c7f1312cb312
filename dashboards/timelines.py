"""A search over time: the coefficients of its best trial, and how its workers spent their seconds."""

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from dem_opt.analysis.utilization import usage_of
from dem_opt.dashboards.style import (
    ACTIVITY_COLORS,
    MAX_POINTS,
    UTILIZATION,
    distribution_colors,
    evenly_spaced,
    finish,
    label,
    show_message,
)
from dem_opt.types import Evaluation, Summary, TrialRecord

MAX_BARS = 60
"""Bars of a figure; a search of more trials shows the mean of several in each."""


def shown_run(summary: Summary) -> str:
    """Return the search to show over time: the one that found the winner, else the first; empty if there is none."""
    return summary.winner.run or next(iter(summary.trials), "")


def coefficients_over_time(summary: Summary) -> go.Figure:
    """Draw the coefficients of the best fully scored trial so far against the number of trials, stacked."""
    run = shown_run(summary)
    steps = _best_steps(summary.trials.get(run, ()))
    counts = [count for count, _ in steps]
    figure = go.Figure()
    colors = distribution_colors(summary.distributions)
    for name in summary.distributions:
        figure.add_scatter(
            x=counts,
            y=[round(best.coefficients.weights.get(name, 0.0), 6) for _, best in steps],
            name=label(name, 14),
            mode="lines",
            stackgroup="coefficients",
            line={"width": 1, "color": colors[name], "shape": "hv"},
            fillcolor=colors[name],
            hovertemplate="%{y:.3f} after %{x} trials<extra></extra>",
        )
    figure.update_xaxes(title="finished trials", **_integer_ticks(counts))
    figure.update_yaxes(title="coefficient", rangemode="tozero")
    if not steps:
        show_message(figure, "no trial has been fully scored")
    reading = (
        f"Coefficients of the best fully scored trial of {run or 'the search'} so far, stacked, against the number of "
        "finished trials."
    )
    changes = len({best.number for _, best in steps}) - 1
    description = f"The best trial changed {changes} times." if steps else "No trial has been fully scored."
    legend = 18 * (len(summary.distributions) // 5)
    return finish(figure, "Coefficients of the best trial over time", reading, description, 360 + legend)


def utilisation_over_time(summary: Summary) -> go.Figure:
    """Draw the seconds that a worker spent on each trial, and the share of them in which it was not idle."""
    run = shown_run(summary)
    records = [record for record in summary.trials.get(run, ()) if record.measured]
    groups = _groups(records)
    numbers = [_mean([float(record.number) for record in group]) for group in groups]
    figure = go.Figure()
    for activity, color in ACTIVITY_COLORS.items():
        figure.add_bar(
            x=numbers,
            y=[_mean([_seconds(record.evaluation)[activity] for record in group]) for group in groups],
            name=activity,
            marker_color=color,
            hovertemplate="%{y:.3g} s<extra></extra>",
        )
    figure.add_scatter(
        x=numbers,
        y=[_busy_percent(group) for group in groups],
        name="utilization",
        yaxis="y2",
        mode="lines+markers",
        line={"color": UTILIZATION, "width": 1.5},
        marker={"size": 4, "color": UTILIZATION},
        hovertemplate="%{y:.0f}%<extra></extra>",
    )
    figure.update_xaxes(title="trial number", range=_padded_range(numbers), **_integer_ticks(numbers))
    figure.update_layout(
        barmode="stack",
        yaxis={"title": "seconds per trial", "rangemode": "tozero"},
        yaxis2={
            "title": "utilization (%)",
            "overlaying": "y",
            "side": "right",
            "range": [0, 105],
            "tickvals": [0, 25, 50, 75, 100],
            "showgrid": False,
            "automargin": True,
        },
    )
    if not groups:
        show_message(figure, "no trial needed a forward pass")
    utilization = usage_of(records).utilisation
    overall = "unknown" if utilization is None else f"{utilization:.0%}"
    reading = (
        f"Worker seconds for each trial of {run or 'the search'} that needed a forward pass. Idle: seconds since the "
        "worker's previous trial. Utilization: share of the time in which the worker was not idle."
    )
    description = f"Utilization over all trials: {overall}."
    return finish(figure, "Worker utilization over time", reading, description, 380)


def _best_steps(records: Sequence[TrialRecord]) -> list[tuple[int, TrialRecord]]:
    """List (finished trials, best trial) at every change of the best, and once more at the end.

    At most MAX_POINTS of them; trials that were stopped early are never the best.
    """
    steps: list[tuple[int, TrialRecord]] = []
    for count, record in enumerate(records, start=1):
        is_scored = record.objective is not None and not record.is_partial
        if is_scored and (not steps or record.rank < steps[-1][1].rank):
            steps.append((count, record))
    if steps:
        # A second point, so that a search of one trial still draws an area.
        steps.append((max(len(records), steps[-1][0] + 1), steps[-1][1]))
    return [steps[index] for index in evenly_spaced(len(steps), MAX_POINTS)] if steps else []


def _integer_ticks(numbers: Sequence[float]) -> dict[str, int]:
    """Force ticks at whole numbers on short axes, where plotly would choose fractions."""
    return {"dtick": 1} if not numbers or max(numbers) - min(numbers) < 5 else {}


def _padded_range(numbers: Sequence[float]) -> list[float]:
    """Return a range from a little below the first number to a little above the last."""
    if not numbers:
        return [0, 1]
    gap = 0.03 * (numbers[-1] - numbers[0]) + 0.8
    return [numbers[0] - gap, numbers[-1] + gap]


def _groups(records: Sequence[TrialRecord]) -> list[Sequence[TrialRecord]]:
    """Split trials into at most MAX_BARS groups of consecutive ones."""
    size = max(1, -(-len(records) // MAX_BARS))
    return [records[start : start + size] for start in range(0, len(records), size)]


def _seconds(evaluation: Evaluation) -> dict[str, float]:
    return {
        "scoring": evaluation.score_seconds,
        "merging": evaluation.merge_seconds,
        "idle": evaluation.wait_seconds,
    }


def _busy_percent(group: Sequence[TrialRecord]) -> float | None:
    """Return the percentage of worker seconds that were spent merging or scoring."""
    seconds = [_seconds(record.evaluation) for record in group]
    total = sum(sum(activities.values()) for activities in seconds)
    return round(100 * (1 - sum(activities["idle"] for activities in seconds) / total), 2) if total else None


def _mean(values: Sequence[float]) -> float:
    return round(fmean(values), 6)
