"""A Summary -> plotly figures: pure functions, one palette, units on every axis.

Every figure carries in `layout.meta` how it is read ("reading") and what it shows in words ("description").
Names come from users, and plotly reads HTML in texts and `%{...}` in templates: names are escaped, and never
part of a template.
"""

from collections.abc import Sequence

import plotly.graph_objects as go

from dashboards.look import DISTRIBUTION_COLORS, DIVERGING, finish, name_ticks, signed
from dashboards.progress import best_so_far, comparison_figure
from dashboards.simplex_map import simplex_map
from dem_opt.comparison import compare
from dem_opt.records import Standing, Summary


def all_figures(summary: Summary) -> dict[str, go.Figure]:
    """Every figure under its stable id (a valid HTML id), in reading order; of several runs their comparison too."""
    several = {"comparison": comparison_figure(compare(summary))} if len(summary.trials) > 1 else {}
    return {
        "coefficients": coefficients_bar(summary),
        "change": change_heat_map(summary),
        "best-so-far": best_so_far(summary),
        **several,
        "simplex": simplex_map(summary),
    }


def coefficients_bar(summary: Summary) -> go.Figure:
    """The winner's coefficients w_i, a bar for each distribution in the study's order; 0 for the base."""
    winner = summary.winner
    given = {} if winner.coefficients is None else winner.coefficients.weights
    weights = {name: given.get(name, 0.0) for name in summary.distributions}
    palette = [DISTRIBUTION_COLORS[i % len(DISTRIBUTION_COLORS)] for i in range(len(weights))]
    figure = go.Figure()
    figure.add_bar(
        x=list(weights.values()),
        y=list(range(len(weights))),
        orientation="h",
        marker_color=palette,
        text=[f"{weight:.3f}" for weight in weights.values()],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    figure.update_xaxes(title="coefficient", range=[0, 1.12 * max(*weights.values(), 1e-9)])
    figure.update_yaxes(name_ticks(list(weights)), autorange="reversed")
    reading = "How much of each distribution vector the composite takes."
    words = f"{winner.label}: {', '.join(f'{name} {weight:.3f}' for name, weight in weights.items())}."
    return finish(figure, "Coefficients of the winner", reading, words, 150 + 34 * len(weights))


def change_heat_map(summary: Summary, split: str = "held_out") -> go.Figure:
    """NLL(standing) - NLL(base) in nats per token, for each standing (rows) and distribution (columns).

    Colours saturate at the largest gain, so that one fine-tune's loss elsewhere does not wash the gains out;
    the numbers in the cells are exact.
    """
    base, *others = summary.standings
    names = list(summary.weights)
    change = [[_change(standing, base, split, name) for name in names] for standing in others]
    limit = _saturation([value for row in change for value in row if value is not None])
    figure = go.Figure()
    figure.add_heatmap(
        z=change,
        x=list(range(len(names))),
        y=list(range(len(others))),
        text=[[signed(value) for value in row] for row in change],
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
    slant = -35 if max(map(len, names)) > 8 else 0
    figure.update_xaxes(name_ticks(names), title="distribution", tickangle=slant)
    figure.update_yaxes(name_ticks([standing.label for standing in others]), autorange="reversed")
    title = f"NLL change, {split.replace('_', '-')} split"
    reading = "NLL minus the base's, nats per token: negative is better. Colours saturate at the largest gain."
    rows = [_told_change(standing, names, row) for standing, row in zip(others, change, strict=True)]
    words = "; ".join(rows) or "only the base was scored"
    return finish(figure, title, reading, f"{words}.", 170 + 34 * len(others))


def _saturation(changes: Sequence[float]) -> float:
    """The largest gain; without gains the largest change, and 1 where nothing changed."""
    gains = [-change for change in changes if change < 0]
    return max(gains or [abs(change) for change in changes], default=1.0) or 1.0


def _change(standing: Standing, base: Standing, split: str, name: str) -> float | None:
    """NLL(standing) - NLL(base) on one distribution, None where one of them was not scored."""
    scores, reference = standing.scores.get(split, {}), base.scores.get(split, {})
    return round(scores[name].nll - reference[name].nll, 6) if name in scores and name in reference else None


def _told_change(standing: Standing, names: Sequence[str], row: Sequence[float | None]) -> str:
    changes = ", ".join(f"{name} {signed(value)}" for name, value in zip(names, row, strict=True))
    return f"{standing.label}: {changes}"
