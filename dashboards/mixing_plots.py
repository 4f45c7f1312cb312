"""Merging against training on mixtures: what each costs and gives, as a figure, tables and a page."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dem_opt.analysis.mixing_cost import (
    BaseScore,
    BudgetComparison,
    Cost,
    MergeResult,
    MixingComparison,
    MixtureResult,
    verdict,
)
from dem_opt.dashboards.html_report import render_page
from dem_opt.dashboards.style import OUTLINE, color, finish, label, rgba
from dem_opt.dashboards.tables import Table
from dem_opt.types import HELD_OUT, SEARCH

BUDGETS = {"all": "as many tokens as all fine-tunes", "one": "as many tokens as one fine-tune"}
"""How many tokens a mixture is trained on, for a reader."""

_LINES = {"all": "grid", "one": "random"}
"""Which of the palette's colors a budget has."""

_MARKS = (1, 2, 3, 5, 8, 11, 15, 20, 30, 50, 100)
"""After how many mixtures the table tells what they are expected to give."""


def quality_table(found: MixingComparison) -> Table:
    """Base, composite and the best mixture of each budget: what they take, and the NLL on the held-out split."""
    names = list(found.weights)
    edited = found.edited
    own = (f"{len(edited.coefficients)} fine-tunes and the search", edited.cost, edited)
    rows = [_row("base", Cost(), found.base, names), _row(*own, names)]
    for one in found.against:
        best = found.best(one.budget)
        cost = sum((mixed.cost for mixed in found.mixed if mixed.budget == one.budget), Cost())
        rows.append(_row(f"{one.mixtures} mixtures, tokens of {one.budget}", cost, best, names))
        rows.append(_row(f"the best of these alone, tokens of {one.budget}", best.cost, best, names))
    headers = ("model", "trained tokens", "FLOPs", "seconds", "search", "held-out", *names)
    return Table(headers, tuple(rows))


def _row(
    words: str, cost: Cost, scored: BaseScore | MergeResult | MixtureResult, names: Sequence[str]
) -> tuple[str, ...]:
    nll = scored.nll[HELD_OUT]
    objectives = (f"{scored.objective[split]:.4f}" for split in (SEARCH, HELD_OUT))
    spent = (f"{cost.trained_tokens:,}", f"{cost.flops:.2e}" if cost.flops else "0", f"{cost.seconds:.0f}")
    return (words, *spent, *objectives, *(f"{nll[name]:.4f}" for name in names))


def curve_table(found: MixingComparison, one: BudgetComparison) -> Table:
    """What k mixtures of a budget are expected to give, and what they cost against the composite."""
    own = found.edited
    marks = [tried for tried in one.curve if tried.mixtures in _MARKS or tried.mixtures == one.mixtures]
    rows = tuple(
        (
            str(tried.mixtures),
            f"{tried.flops:.2e}",
            f"{tried.flops / own.cost.flops:.2f}",
            f"{tried.objective[HELD_OUT]:.4f}",
            f"{tried.objective[HELD_OUT] - own.objective[HELD_OUT]:+.4f}",
        )
        for tried in marks
    )
    headers = ("mixtures tried", "FLOPs", "times the composite's", "expected NLL", "minus the composite's")
    return Table(headers, rows)


def mixture_table(found: MixingComparison) -> Table:
    """Every model of a mixture."""
    rows = tuple(
        (one.budget, _shares(one), f"{one.objective[SEARCH]:.4f}", f"{one.objective[HELD_OUT]:.4f}")
        for one in sorted(found.mixed, key=lambda one: (one.budget, one.objective[SEARCH]))
    )
    return Table(("tokens of", "shares", "search", "held-out"), rows, words=2)


def _shares(one: MixtureResult) -> str:
    return ", ".join(f"{name} {share:g}" for name, share in one.shares.items() if share)


def mixing_figure(found: MixingComparison) -> go.Figure:
    """Expected held-out NLL of the best mixture against operations, a line a budget; the composite's point."""
    figure, words = go.Figure(), []
    for one in found.against:
        shade = color(_LINES[one.budget])
        scatter = [mixed.objective[HELD_OUT] for mixed in found.mixed if mixed.budget == one.budget]
        figure.add_scatter(
            x=[tried.flops for tried in one.curve],
            y=[round(tried.objective[HELD_OUT], 6) for tried in one.curve],
            name=label(f"mixtures, tokens of {one.budget}", 40),
            mode="lines+markers",
            line={"color": shade},
            hovertemplate="%{text}<br>%{x:.2e} FLOPs<br>%{y:.4f} nats per token<extra></extra>",
            text=[f"best of {tried.mixtures}" for tried in one.curve],
        )
        figure.add_scatter(
            x=[one.curve[0].flops] * len(scatter),
            y=[round(nll, 6) for nll in scatter],
            mode="markers",
            marker={"color": rgba(shade, 0.35), "symbol": "line-ew-open", "size": 9},
            hoverinfo="skip",
            showlegend=False,
        )
        last = one.curve[-1]
        words.append(
            f"the best of {one.mixtures} mixtures with tokens of {one.budget} {last.objective[HELD_OUT]:.4f} for "
            f"{last.flops:.2e} operations"
        )
    own = found.edited
    figure.add_scatter(
        x=[own.cost.flops],
        y=[round(own.objective[HELD_OUT], 6)],
        name="composite: fine-tunes and search",
        mode="markers",
        marker={"color": color("simplex-gp"), "size": 12, "symbol": "diamond"},
        hovertemplate="%{x:.2e} FLOPs<br>%{y:.4f} nats per token<extra></extra>",
    )
    base = round(found.base.objective[HELD_OUT], 6)
    figure.add_hline(y=base, line={"color": OUTLINE, "width": 1, "dash": "dot"}, annotation_text="the base")
    figure.update_xaxes(title="floating-point operations of training and scoring (log scale)", type="log")
    figure.update_yaxes(title="NLL on the held-out split (nats per token)")
    reading = (
        "Left to right: more mixtures are tried. A line is what the best of so many is expected to score, over all "
        "orders of trying them, chosen on the search split; dashes are the single models. At the composite's height "
        "one reads the cost at equal quality, above and below it the quality at equal cost."
    )
    description = (
        f"The base scores {base:.4f} nats per token, the composite {own.objective[HELD_OUT]:.4f} for "
        f"{own.cost.flops:.2e} operations; "
        f"{'; '.join(words)}."
    )
    return finish(figure, "Quality against cost", reading, description, 440)


def verdicts(found: MixingComparison) -> list[str]:
    """What it says, a paragraph for each budget."""
    return [f"Mixtures with {BUDGETS[one.budget]}. {' '.join(verdict(found, one))}" for one in found.against]


def render_mixing(found: MixingComparison) -> str:
    """The page."""
    own = found.edited
    counted = (
        f"Counted as 6 P T for training and 2 P T for scoring, P = {found.parameters:,} parameters; the composite's "
        f"fine-tunes took {own.training.flops:.2e} floating-point operations (FLOPs), its search "
        f"{own.search.flops:.2e}."
    )
    tables = [(f"Cost and NLL in nats per token. {counted}", quality_table(found))]
    tables += [
        (f"What k of {one.mixtures} mixtures are expected to give, {BUDGETS[one.budget]}", curve_table(found, one))
        for one in found.against
    ]
    tables.append(("All mixtures, NLL in nats per token", mixture_table(found)))
    return render_page(
        f"{found.study}: merging against mixing",
        f"{found.study}: merging fine-tunes against training on mixtures",
        verdicts(found),
        {"mixing": mixing_figure(found)},
        tables,
    )
