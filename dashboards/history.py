"""A search over time: the coefficients of its best trial, and what its workers did."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dem_opt.analysis.utilization import usage_of
from dem_opt.dashboards.style import (
    MOST_POINTS,
    TIMES,
    UTILISATION,
    distribution_colors,
    finish,
    label,
    say_nothing,
    spread,
)
from dem_opt.types import Evaluation, Summary, TrialRecord

BARS = 60
"""Bars of a figure at most: beyond them, each is the mean of several trials."""


def shown_run(summary: Summary) -> str:
    """The search that is shown over time: the one that found the winner, else the first; empty where there is none."""
    return summary.winner.run or next(iter(summary.trials), "")


def coefficients_over_time(summary: Summary) -> go.Figure:
    """Coefficients of the best whole trial so far against the trial's number, on top of each other."""
    run = shown_run(summary)
    steps = _best_steps(summary.trials.get(run, ()))
    figure = go.Figure()
    colors = distribution_colors(summary.distributions)
    for name in summary.distributions:
        figure.add_scatter(
            x=[number for number, _ in steps],
            y=[round(best.coefficients.weights.get(name, 0.0), 6) for _, best in steps],
            name=label(name, 14),
            mode="lines",
            stackgroup="coefficients",
            line={"width": 1, "color": colors[name], "shape": "hv"},
            fillcolor=colors[name],
            hovertemplate="%{y:.3f} after %{x} trials<extra></extra>",
        )
    figure.update_xaxes(title="trials", **_whole_ticks([number for number, _ in steps]))
    figure.update_yaxes(title="coefficient", rangemode="tozero")
    if not steps:
        say_nothing(figure, "no trial was scored whole")
    reading = f"The coefficients of the best whole trial that {run or 'the search'} had found after so many trials."
    changes = len({best.number for _, best in steps})
    words = f"The best changed {changes - 1} times." if steps else "No trial was scored whole."
    legend = 18 * (len(summary.distributions) // 5)
    return finish(figure, "Coefficients of the best over time", reading, words, 360 + legend)


def utilisation_over_time(summary: Summary) -> go.Figure:
    """Seconds that a worker spent on each trial, and the share of them in which it was merging or scoring."""
    run = shown_run(summary)
    records = [record for record in summary.trials.get(run, ()) if record.measured]
    groups = _groups(records)
    numbers = [_mean([float(record.number) for record in group]) for group in groups]
    figure = go.Figure()
    for name, color in TIMES.items():
        seconds = [_mean([_seconds(record.evaluation)[name] for record in group]) for group in groups]
        figure.add_bar(x=numbers, y=seconds, name=name, marker_color=color, hovertemplate="%{y:.3g} s<extra></extra>")
    shares = [_busy(group) for group in groups]
    figure.add_scatter(
        x=numbers,
        y=shares,
        name="utilisation",
        yaxis="y2",
        mode="lines+markers",
        line={"color": UTILISATION, "width": 1.5},
        marker={"size": 4, "color": UTILISATION},
        hovertemplate="%{y:.0f}%<extra></extra>",
    )
    figure.update_xaxes(title="trial", range=_around(numbers), **_whole_ticks(numbers))
    figure.update_layout(
        barmode="stack",
        yaxis={"title": "seconds for each trial", "rangemode": "tozero"},
        yaxis2={
            "title": "utilisation (%)",
            "overlaying": "y",
            "side": "right",
            "range": [0, 105],
            "tickvals": [0, 25, 50, 75, 100],
            "showgrid": False,
            "automargin": True,
        },
    )
    if not groups:
        say_nothing(figure, "no trial was measured")
    used = usage_of(records).utilisation
    whole = "unknown" if used is None else f"{used:.0%}"
    reading = (
        f"What workers did for the trials of {run or 'the search'} that went through a model. Waiting is the time "
        "between a worker's trials; utilisation is the share that is not waiting."
    )
    return finish(figure, "Workers over time", reading, f"Utilisation over all trials: {whole}.", 380)


def _best_steps(records: Sequence[TrialRecord]) -> list[tuple[int, TrialRecord]]:
    """After how many trials there was a new best, that of the last trial again; at most MOST_POINTS."""
    steps: list[tuple[int, TrialRecord]] = []
    for done, record in enumerate(records, start=1):
        whole = record.objective is not None and not record.is_partial
        if whole and (not steps or record.rank < steps[-1][1].rank):
            steps.append((done, record))
    if steps:
        steps.append((max(len(records), steps[-1][0] + 1), steps[-1][1]))
    return [steps[place] for place in spread(len(steps), MOST_POINTS)] if steps else []


def _whole_ticks(numbers: Sequence[float]) -> dict[str, int]:
    """Ticks at whole numbers where plotly would put them between."""
    return {"dtick": 1} if not numbers or max(numbers) - min(numbers) < 5 else {}


def _around(numbers: Sequence[float]) -> list[float]:
    """From a little below the first to a little above the last."""
    if not numbers:
        return [0, 1]
    gap = 0.03 * (numbers[-1] - numbers[0]) + 0.8
    return [numbers[0] - gap, numbers[-1] + gap]


def _groups(records: Sequence[TrialRecord]) -> list[Sequence[TrialRecord]]:
    """Consecutive trials, as many together as give BARS of them."""
    size = max(1, -(-len(records) // BARS))
    return [records[start : start + size] for start in range(0, len(records), size)]


def _seconds(evaluation: Evaluation) -> dict[str, float]:
    return {
        "scoring": evaluation.score_seconds,
        "merging": evaluation.merge_seconds,
        "waiting": evaluation.wait_seconds,
    }


def _busy(group: Sequence[TrialRecord]) -> float | None:
    """Percent of the seconds of some trials in which workers were merging or scoring."""
    spent = [_seconds(record.evaluation) for record in group]
    all_of = sum(sum(one.values()) for one in spent)
    return round(100 * (1 - sum(one["waiting"] for one in spent) / all_of), 2) if all_of else None


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
