"""A proposed mixture: its shares with their region, and the simplex as predicted and as models turned out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from dem_opt.analysis.mixture_proposal import Evidence, MixtureProposal
from dem_opt.dashboards.html_report import render_page
from dem_opt.dashboards.simplex_map import corner_label, polygon_corners
from dem_opt.dashboards.style import OBJECTIVE_COLORS, OUTLINE, WINNER, color, finish, label, name_ticks
from dem_opt.dashboards.tables import Table

BY = {"curves": "training curves", "merges": "merges"}
"""Predictors in words."""

TRAININGS = 16
"""Trainings whose cost is shown beside a proposal's: those of a small grid of mixtures."""


def shares_figure(result: MixtureProposal) -> go.Figure:
    """Draw the proposed share of each distribution with its region, the natural share, and the best trained ones."""
    names = list(result.proposal.shares)
    places = list(range(len(names)))[::-1]
    figure = go.Figure()
    for place, name in zip(places, names, strict=True):
        low, high = result.proposal.region[name]
        line = {"color": color("simplex-gp"), "width": 9}
        figure.add_scatter(
            x=[low, high], y=[place, place], mode="lines", line=line, opacity=0.35, showlegend=False, hoverinfo="skip"
        )
    series: list[tuple[str, Mapping[str, float], dict[str, Any]]] = [
        ("proposed", result.proposal.shares, {"symbol": "star", "size": 15, "color": WINNER}),
        ("natural", result.natural, {"symbol": "line-ns-open", "size": 16, "color": OUTLINE, "line": {"width": 2}}),
    ]
    best = {_budget(evidence): evidence.best.shares for evidence in result.evidence}
    for (budget, shares), symbol in zip(best.items(), ("diamond-open", "square-open", "circle-open"), strict=False):
        series.append((f"best trained, {budget}", shares, {"symbol": symbol, "size": 11}))
    for title, shares, marker in series:
        figure.add_scatter(
            x=[round(shares[name], 6) for name in names],
            y=places,
            mode="markers",
            name=label(title, 44),
            marker={"color": "#222222", **marker},
            hovertemplate="%{x:.3f}<extra></extra>",
        )
    figure.update_xaxes(title="share of the training tokens", range=[-0.02, 1.02])
    figure.update_yaxes(name_ticks(names[::-1]))
    reading = (
        f"Bars: every mixture that is predicted less than {result.proposal.detectable:.2g} {result.unit} above the "
        "least, the least difference that the search split detects."
    )
    shown = ", ".join(f"{name} {share:.3f}" for name, share in result.proposal.shares.items())
    return finish(figure, "Proposed shares", reading, f"Proposed shares: {shown}.", 150 + 50 * len(names))


def simplex_figure(result: MixtureProposal, evidence: Evidence) -> go.Figure:
    """Draw the trained mixtures on the simplex twice: coloured by their prediction, and by how models turned out.

    A mixture lies at  sum_i s_i c_i  between the corners c_i of a regular polygon.
    """
    names = list(result.proposal.shares)
    corners_K2 = polygon_corners(len(names))
    shares_NK = np.array([[mixture.shares[name] for name in names] for mixture in evidence.mixtures])
    values = [
        np.array([mixture.predicted for mixture in evidence.mixtures]),
        np.array([mixture.measured for mixture in evidence.mixtures]),
    ]
    titles = [f"<b>predicted by {BY[evidence.predictor]}</b>", "<b>trained</b>"]
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.14)
    star_2 = np.array([result.proposal.shares[name] for name in names]) @ corners_K2
    for column, values_N in enumerate(values, start=1):
        _add_panel(figure, column, names, corners_K2, shares_NK @ corners_K2, values_N, result.unit)
        marker = {"symbol": "star", "size": 16, "color": WINNER, "line": {"width": 1, "color": "white"}}
        figure.add_scatter(
            x=[star_2[0]],
            y=[star_2[1]],
            mode="markers",
            marker=marker,
            name="proposed shares",
            showlegend=column == 1,
            hoverinfo="name",
            row=1,
            col=column,
        )
    correlation = evidence.quality.spearman
    rank = "not defined" if correlation is None else f"{correlation.value:+.2f}"
    reading = (
        f"{len(evidence.mixtures)} mixtures, {_budget(evidence)}, closer to a corner the larger their share. Left: "
        f"predicted by {BY[evidence.predictor]}; right: the models trained on them, held out, both in {result.unit}. "
        f"Ring: the best of the panel; the worst quarter has one colour. Spearman's rank correlation: {rank}."
    )
    best = ", ".join(f"{name} {share:g}" for name, share in evidence.best.shares.items())
    description = f"Best trained mixture: {best}, {evidence.best.measured:.4f} {result.unit}. Rank correlation {rank}."
    return finish(figure, "Mixtures on the simplex", reading, description, 430, least_width=720)


def _add_panel(
    figure: go.Figure,
    column: int,
    names: Sequence[str],
    corners_K2: NDArray[np.float64],
    points_N2: NDArray[np.float64],
    values_N: NDArray[np.float64],
    unit: str,
) -> None:
    """Add a polygon with its corners' names, the mixtures in the colour of their value, and a ring around the least."""
    outline_x, outline_y = np.vstack([corners_K2, corners_K2[:1]]).T.tolist()
    place = {"row": 1, "col": column}
    line = {"color": OUTLINE, "width": 1}
    figure.add_scatter(x=outline_x, y=outline_y, mode="lines", line=line, hoverinfo="skip", showlegend=False, **place)
    order = np.argsort(-values_N)  # the best are drawn last, on top
    title = {"text": unit, "side": "right"}
    bar = {"x": 0.42 if column == 1 else 0.99, "len": 0.7, "thickness": 10, "tickformat": ".2f", "title": title}
    axis = {"colorscale": OBJECTIVE_COLORS, "cmin": values_N.min(), "cmax": float(np.quantile(values_N, 0.75))}
    figure.add_scatter(
        x=points_N2[order, 0].round(4).tolist(),
        y=points_N2[order, 1].round(4).tolist(),
        mode="markers",
        marker={"color": values_N[order].round(5).tolist(), "size": 12, "line": line, "colorbar": bar, **axis},
        hovertemplate="%{marker.color:.4f}<extra></extra>",
        showlegend=False,
        **place,
    )
    x, y = points_N2[order[-1]].tolist()
    ring = {"symbol": "circle-open", "size": 20, "color": "#222222", "line": {"width": 2}}
    figure.add_scatter(x=[x], y=[y], mode="markers", marker=ring, hoverinfo="skip", showlegend=False, **place)
    for name, (x, y) in zip(names, corners_K2.tolist(), strict=True):
        figure.add_annotation(
            text=label(name, 12), showarrow=False, **corner_label(x, y, is_crowded=len(names) > 6), **place
        )
    reach = 1.25 * float(np.abs(corners_K2).max())
    figure.update_xaxes(visible=False, range=[-reach, reach], **place)
    figure.update_yaxes(visible=False, range=[-reach, reach], scaleanchor="x" if column == 1 else f"x{column}", **place)


def _budget(evidence: Evidence) -> str:
    return evidence.source if evidence.tokens is None else f"{evidence.tokens:,} tokens each"


def shares_table(result: MixtureProposal) -> Table:
    """List the shares with their region, and the data of each distribution."""
    rows = []
    for name, share in result.proposal.shares.items():
        low, high = result.proposal.region[name]
        size = result.sizes[name]
        rows.append(
            (
                name,
                f"{share:.3f}",
                f"{low:.2f} to {high:.2f}",
                f"{result.natural[name]:.3f}",
                f"{share * result.tokens:,.0f}",
                f"{result.epochs[name]:.2f}",
                f"{size.tokens:,}",
            )
        )
    headers = ("distribution", "share", "region", "natural share", "tokens", "epochs", "training data, tokens")
    return Table(headers, tuple(rows))


def shares_title(result: MixtureProposal) -> str:
    """Title of the table of shares."""
    return f"Proposed shares for {result.tokens:,} tokens ({result.steps:,} steps)"


def proposal_lines(result: MixtureProposal) -> list[str]:
    """Say what the proposal rests on, how well that predicted trained mixtures, and what everything costs."""
    shares = result.proposal
    rests = (
        f"Rests on merges with a sum of {result.total:g}, as if every token moved the model equally far"
        if result.predictor == "merges"
        else "Rests on the fine-tunes' training curves, and on what each has lost or gained on the others' data"
    )
    lines = [
        f"{rests}: {shares.predicted:.4f} {result.unit} predicted, {shares.at_equal:.4f} at equal shares, "
        f"{shares.at_natural:.4f} at natural ones. The differences count, not the level.",
        f"The region has every mixture that is predicted less than {shares.detectable:.2g} {result.unit} above the "
        "least, the least difference that the search split detects. It does not cover errors of the prediction itself.",
        *(_evidence_line(evidence, result) for evidence in result.evidence),
    ]
    if not result.evidence:
        lines.append(
            "Not tested here: too few mixtures of one budget are trained and scored in this study. `dem-opt compare "
            "--data-mixing` trains some, and --swarm reads others. docs/data-mixing.md says how well it did elsewhere."
        )
    lines.append(
        f"Cost: fine-tunes {result.probes.flops:.2e}, search {result.search.flops:.2e}, one training "
        f"{result.training.flops:.2e} floating-point operations (about {result.training.seconds:.0f} s), together "
        f"{result.cost_ratio(TRAININGS):.0%} of those of {TRAININGS} trainings."
    )
    return lines


def _evidence_line(evidence: Evidence, result: MixtureProposal) -> str:
    judged, correlation = evidence.quality, evidence.quality.spearman
    if correlation is None:
        rank = "no rank correlation, since all are alike"
    elif correlation.low is None or correlation.high is None:
        rank = f"Spearman {correlation.value:+.2f}"
    else:
        rank = f"Spearman {correlation.value:+.2f} [{correlation.low:+.2f}, {correlation.high:+.2f}]"
    best = ", ".join(f"{name} {share:g}" for name, share in evidence.best.shares.items())
    return (
        f"{BY[evidence.predictor].capitalize()}, tested on {judged.mixtures} trained mixtures ({_budget(evidence)}): "
        f"{rank}; the one that they put first is {judged.regret:.4f} {result.unit} behind the best ({best})."
    )


def render_proposal(result: MixtureProposal) -> str:
    """Render a proposal as one HTML page."""
    figures = {"shares": shares_figure(result)}
    for number, evidence in enumerate(result.evidence):
        figures[f"simplex-{number}"] = simplex_figure(result, evidence)
    tables = [(shares_title(result), shares_table(result))]
    title = f"{result.study}: shares of the training data"
    return render_page(title, title, proposal_lines(result), figures, tables)
