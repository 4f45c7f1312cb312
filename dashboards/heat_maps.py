"""Bar chart of the coefficients, and heat maps of NLL differences and of the distribution vectors' cosines."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dem_opt.dashboards.style import (
    ALIKE,
    DIVERGING,
    distribution_colors,
    finish,
    name_ticks,
    objective_words,
    say_nothing,
    signed,
)
from dem_opt.types import ResultRow, Summary


def coefficients_bar(summary: Summary) -> go.Figure:
    """The winner's coefficients w_i, a bar for each distribution in the study's order; 0 for the base."""
    winner = summary.winner
    given = {} if winner.coefficients is None else winner.coefficients.weights
    weights = {name: given.get(name, 0.0) for name in summary.distributions}
    palette = list(distribution_colors(list(weights)).values())
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
    """NLL(standing) - NLL(base) in nats per token, for each standing (rows) and corpus (columns).

    Colours saturate at the largest gain, so that one fine-tune's loss elsewhere does not wash the gains out;
    the numbers in the cells are exact.
    """
    base, *others = summary.results
    names = list(summary.weights)
    change = [[_change(result, base, split, name) for name in names] for result in others]
    title = f"NLL change against the base, {split.replace('_', '-')} split"
    reading = "NLL minus the base's, nats per token: negative is better. Colours saturate at the largest gain."
    labels = [result.label for result in others]
    return _heat_map(change, labels, names, title, reading, "only the base was scored")


def price_heat_map(summary: Summary, split: str = "held_out") -> go.Figure:
    """NLL(standing) - NLL(the distribution's own fine-tune): what sharing one model costs, in nats per token."""
    own = {one.label: one for one in summary.results if one.role == "single"}
    shown = [one for one in summary.results if one.role in ("base", "uniform", "best")]
    names = [name for name in summary.distributions if name in own]
    price = [[_change(result, own[name], split, name) for name in names] for result in shown]
    title = f"Price of sharing, {split.replace('_', '-')} split"
    reading = (
        "NLL minus that of the distribution's own fine-tune, nats per token: what one model for all costs. Colours "
        "saturate at the largest gain, without any at the largest price."
    )
    return _heat_map(price, [one.label for one in shown], names, title, reading, "no fine-tune was scored by itself")


def worth_heat_map(summary: Summary, split: str = "held_out") -> go.Figure:
    """NLL(winner without a distribution) - NLL(winner), for each that it has some of: what its data are worth to it.

    The last column is the objective's change.
    """
    names, winner = list(summary.weights), summary.winner
    rows = [
        [*(_change(one, winner, split, name) for name in names), _objective_change(one, winner, split)]
        for one in summary.left_out
    ]
    what = objective_words(summary)
    title = f"Leave one out, {split.replace('_', '-')} split"
    reading = (
        "NLL of the winner without one distribution, the others grown in proportion to its total, minus the winner's, "
        f"in nats per token: above 0, its data help. The last column is the {what}. All of it was scored."
    )
    labels = [f"without {one.label}" for one in summary.left_out]
    return _heat_map(rows, labels, [*names, what], title, reading, "not measured: the winner is one model alone")


def cosine_heat_map(summary: Summary) -> go.Figure:
    """cos(v_i, v_j) of the distribution vectors, and their norms beside the names."""
    vectors = summary.vectors
    if vectors is None:
        return _heat_map([], [], [], "Distribution vectors: cosines", "", "not measured")
    names = [name for name in summary.distributions if name in vectors.names]
    place = {name: vectors.names.index(name) for name in names}
    cosines = [[vectors.cosine(place[one], place[other]) for other in names] for one in names]
    labels = [f"{name}: {vectors.norms[place[name]]:.3g}" for name in names]
    rounded = [[None if value is None else round(value, 6) for value in row] for row in cosines]
    reading = (
        "Cosine of each two distribution vectors, over all parameters: 1 is the same direction, 0 none in common. "
        "Beside the names the vectors' lengths (norms), which have no unit."
    )
    return _heat_map(rounded, labels, names, "Distribution vectors: cosines", reading, "not measured", ALIKE, 1.0)


def _heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    reading: str,
    nothing: str,
    colors: Sequence[tuple[float, str]] = DIVERGING,
    limit: float | None = None,
) -> go.Figure:
    """A table of signed numbers in colours that saturate at `limit`, at the largest gain where that is None.

    Rows of which nothing is known are left out.
    """
    known = [(label, row) for label, row in zip(rows, values, strict=True) if any(value is not None for value in row)]
    rows, values = [label for label, _ in known], [row for _, row in known]
    limit = limit or _saturation([value for row in values for value in row if value is not None])
    many = len(columns) > 6
    figure = go.Figure()
    figure.add_heatmap(
        z=values,
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        text=[[signed(value) for value in row] for row in values],
        texttemplate="%{text}",
        textfont={"color": "#111111", "size": 11 if many else 13},
        hoverinfo="skip",
        colorscale=colors,
        zmin=-limit,
        zmax=limit,
        xgap=2,
        ygap=2,
        showscale=False,
    )
    slant = -35 if max(map(len, columns), default=0) > 8 or many else 0
    figure.update_xaxes(name_ticks(columns), title="distribution", tickangle=slant)
    figure.update_yaxes(name_ticks(rows), autorange="reversed")
    if not rows:
        say_nothing(figure, nothing)
    told = [_told_row(label, columns, row) for label, row in zip(rows, values, strict=True)]
    words = "; ".join(told) or nothing
    return finish(figure, title, reading, f"{words}.", 170 + 34 * len(rows), 180 + 52 * len(columns))


def _saturation(changes: Sequence[float]) -> float:
    """The largest gain; without gains the largest change, and 1 where nothing changed."""
    gains = [-change for change in changes if change < 0]
    return max(gains or [abs(change) for change in changes], default=1.0) or 1.0


def _change(result: ResultRow, reference: ResultRow, split: str, name: str) -> float | None:
    """NLL(standing) - NLL(reference) on one corpus, None where one of them was not scored."""
    scores, others = result.scores.get(split, {}), reference.scores.get(split, {})
    return round(scores[name].nll - others[name].nll, 6) if name in scores and name in others else None


def _objective_change(result: ResultRow, reference: ResultRow, split: str) -> float | None:
    one, other = result.objective.get(split), reference.objective.get(split)
    return None if one is None or other is None else round(one - other, 6)


def _told_row(label: str, names: Sequence[str], row: Sequence[float | None]) -> str:
    changes = ", ".join(f"{name} {signed(value)}" for name, value in zip(names, row, strict=True))
    return f"{label}: {changes}"
