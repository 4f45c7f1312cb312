"""Bar chart of the coefficients, and heat maps of NLL differences and of the distribution vectors' cosines."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from dem_opt.dashboards.style import (
    CHANGE_COLORS,
    COSINE_COLORS,
    distribution_colors,
    finish,
    name_ticks,
    show_message,
    signed,
)
from dem_opt.dashboards.words import objective_name
from dem_opt.types import HELD_OUT, ResultRow, Summary


def coefficients_bar(summary: Summary) -> go.Figure:
    """Draw the winner's coefficients w_i, one bar for each distribution in the study file's order; 0 for the base."""
    winner = summary.global_winner
    coefficients = {} if winner.coefficients is None else winner.coefficients.weights
    weights = {name: coefficients.get(name, 0.0) for name in summary.distributions}
    figure = go.Figure()
    figure.add_bar(
        x=list(weights.values()),
        y=list(range(len(weights))),
        orientation="h",
        marker_color=list(distribution_colors(list(weights)).values()),
        text=[f"{weight:.3f}" for weight in weights.values()],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    # 12% beyond the longest bar is room for its number.
    figure.update_xaxes(title="coefficient", range=[0, 1.12 * max(*weights.values(), 1e-9)])
    figure.update_yaxes(name_ticks(list(weights)), autorange="reversed")
    reading = "Coefficient of each distribution vector in the winner."
    description = f"{winner.label}: {', '.join(f'{name} {weight:.3f}' for name, weight in weights.items())}."
    return finish(figure, "Coefficients of the winner", reading, description, 150 + 34 * len(weights))


def group_heat_map(summary: Summary) -> go.Figure:
    """Draw how far the coefficients of each group (rows) are from the global ones, for each distribution (columns)."""
    groups, names = summary.groups, list(summary.distributions)
    rows = groups.coefficients.rows if groups is not None else ()
    centre = groups.centre.weights if groups is not None else {}
    values = [[round(row[name] - centre[name], 6) for name in names] for _, row in rows]
    return draw(
        HeatMap(
            title="Coefficients by group, minus the global ones",
            reading=(
                "Coefficient of each group of parameters minus that of the whole model, for each distribution vector. "
                "A row sums to 0 where the sum of coefficients is fixed."
            ),
            rows=[group for group, _ in rows],
            columns=names,
            values=values,
            if_empty="no group has been searched",
            colors=COSINE_COLORS,
            limit=max((abs(value) for row in values for value in row), default=1.0) or 1.0,
            length=40,
        )
    )


def change_heat_map(summary: Summary, split: str = HELD_OUT) -> go.Figure:
    """Draw NLL(result) - NLL(base) in nats per token, for each result (rows) and corpus (columns).

    Colours saturate at the largest gain, so that the loss of a single fine-tune on foreign data does not wash the
    gains out; the numbers in the cells are exact.
    """
    base, *others = (row for row in summary.results if row.role != "sum" or split in row.scores)
    names = list(summary.weights)
    return draw(
        HeatMap(
            title=f"NLL minus the base's, {_split_words(split)}",
            reading="NLL minus the base's in nats per token; negative is better. Colours saturate at the largest gain.",
            rows=[row.label for row in others],
            columns=names,
            values=[[_change(row, base, split, name) for name in names] for row in others],
            if_empty="only the base has been scored",
        )
    )


def price_heat_map(summary: Summary, split: str = HELD_OUT) -> go.Figure:
    """Draw NLL(result) - NLL(the distribution's own fine-tune) in nats per token: the price of sharing one model."""
    own = {row.label: row for row in summary.results if row.role == "single"}
    shown = [row for row in summary.results if row.role in ("base", "uniform", "best")]
    names = [name for name in summary.weights if name in own]
    return draw(
        HeatMap(
            title=f"Price of sharing one model, {_split_words(split)}",
            reading=(
                "NLL minus that of the distribution's own fine-tune, in nats per token: the price of one model for all "
                "distributions. Colours saturate at the largest gain or, without a gain, at the highest price."
            ),
            rows=[row.label for row in shown],
            columns=names,
            values=[[_change(row, own[name], split, name) for name in names] for row in shown],
            if_empty="no fine-tune has been scored by itself",
        )
    )


def worth_heat_map(summary: Summary, split: str = HELD_OUT) -> go.Figure:
    """Draw NLL(winner without a distribution) - NLL(winner) in nats per token, for each distribution it uses.

    The last column is the change of the objective.
    """
    names, winner, objective = list(summary.weights), summary.global_winner, objective_name(summary)
    return draw(
        HeatMap(
            title=f"Leave one out, {_split_words(split)}",
            reading=(
                "NLL of the winner without one distribution minus the winner's, in nats per token; above 0 the "
                "distribution helps. The other coefficients are scaled up to the same sum; every composite was scored. "
                f"Last column: {objective} in {summary.unit_words}."
            ),
            rows=[f"without {row.label}" for row in summary.left_out],
            columns=[*names, objective],
            values=[
                [*(_change(row, winner, split, name) for name in names), _objective_change(row, winner, split)]
                for row in summary.left_out
            ],
            if_empty="not measured: the winner uses at most one distribution",
        )
    )


def cosine_heat_map(summary: Summary) -> go.Figure:
    """Draw cos(v_i, v_j) of the distribution vectors, with their norms beside the names."""
    vectors = summary.vectors
    names = [name for name in summary.distributions if vectors is not None and name in vectors.names]
    rows, values = [], []
    if vectors is not None:
        index = {name: vectors.names.index(name) for name in names}
        cosines = [[vectors.cosine(index[row], index[column]) for column in names] for row in names]
        values = [[None if cosine is None else round(cosine, 6) for cosine in row] for row in cosines]
        rows = [f"{name} ({vectors.norms[index[name]]:.3g})" for name in names]
    return draw(
        HeatMap(
            title="Cosines of the distribution vectors",
            reading=(
                "Cosine of each pair of distribution vectors over all parameters: 1 is the same direction, 0 "
                "orthogonal, -1 opposite. In parentheses: the vector's norm (no unit)."
            ),
            rows=rows,
            columns=names,
            values=values,
            if_empty="not measured",
            colors=COSINE_COLORS,
            limit=1.0,
        )
    )


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A table of signed numbers to draw as a heat map.

    values    a row of numbers for each of `rows`, None where not measured; rows without any number are not drawn
    if_empty  the message shown if no row is left
    limit     the absolute value at which colours saturate; None: the largest gain
    length    characters of a row's name that are shown
    """

    title: str
    reading: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    if_empty: str
    colors: Sequence[tuple[float, str]] = CHANGE_COLORS
    limit: float | None = None
    length: int = 22


FRAME = 170
"""Pixels of a heat map's height beside its rows."""

ROW_HEIGHTS = ((24, 34), (80, 18))
"""Up to so many rows, each has so many pixels; beyond the last LOW, where numbers have no room."""

LOW, LABEL_HEIGHT = 8, 16
"""Pixels of each of many rows, and of a name beside them."""


def draw(table: HeatMap) -> go.Figure:
    """Draw a table: with numbers in its cells, or with a bar of colours where there are too many rows for them."""
    measured = [
        (name, values)
        for name, values in zip(table.rows, table.values, strict=True)
        if any(value is not None for value in values)
    ]
    rows, values = [name for name, _ in measured], [values for _, values in measured]
    limit = table.limit or _saturation([value for row in values for value in row if value is not None])
    is_wide = len(table.columns) > 6
    height = next((pixels for most, pixels in ROW_HEIGHTS if len(rows) <= most), LOW)
    has_numbers = height > LOW
    figure = go.Figure()
    figure.add_heatmap(
        z=values,
        x=list(range(len(table.columns))),
        y=list(range(len(rows))),
        text=[[signed(value) for value in row] for row in values] if has_numbers else None,
        texttemplate="%{text}" if has_numbers else None,
        textfont={"color": "#111111", "size": 11 if is_wide or height < LABEL_HEIGHT + 10 else 13},
        hoverinfo="skip",
        colorscale=table.colors,
        zmin=-limit,
        zmax=limit,
        xgap=2,
        ygap=2 if has_numbers else 0,
        showscale=not has_numbers,
        colorbar={"thickness": 10, "len": 0.5, "tickformat": "+.2f"},
    )
    slant = -35 if is_wide or max(map(len, table.columns), default=0) > 8 else 0
    figure.update_xaxes(name_ticks(table.columns), title="distribution", tickangle=slant)
    figure.update_yaxes(name_ticks(rows, table.length, -(-LABEL_HEIGHT // height)), autorange="reversed")
    if not rows:
        show_message(figure, table.if_empty)
    lines = [_describe_row(name, table.columns, row) for name, row in measured]
    description = f"{'; '.join(lines) or table.if_empty}."
    width = 180 + 52 * len(table.columns)
    return finish(figure, table.title, table.reading, description, FRAME + height * len(rows), width)


def _split_words(split: str) -> str:
    return f"{split.replace('_', '-')} split"


def _saturation(changes: Sequence[float]) -> float:
    """Return the largest gain; without gains the largest change, and 1 if nothing changed."""
    gains = [-change for change in changes if change < 0]
    return max(gains or [abs(change) for change in changes], default=1.0) or 1.0


def _change(row: ResultRow, reference: ResultRow, split: str, name: str) -> float | None:
    """NLL(row) - NLL(reference) on one corpus in nats per token; None unless both were scored."""
    scores, others = row.scores.get(split, {}), reference.scores.get(split, {})
    return round(scores[name].nll - others[name].nll, 6) if name in scores and name in others else None


def _objective_change(row: ResultRow, reference: ResultRow, split: str) -> float | None:
    value, other = row.objective.get(split), reference.objective.get(split)
    return None if value is None or other is None else round(value - other, 6)


def _describe_row(name: str, columns: Sequence[str], values: Sequence[float | None]) -> str:
    cells = ", ".join(f"{column} {signed(value)}" for column, value in zip(columns, values, strict=True))
    return f"{name}: {cells}"
