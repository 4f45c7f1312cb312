"""Merging against training on data mixtures: quality against cost as a figure, tables and a page."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dem_opt.analysis.bootstrap import Difference
from dem_opt.analysis.mixing_cost import (
    BaseScore,
    BudgetComparison,
    Cost,
    MergeResult,
    MixingComparison,
    MixtureResult,
    ProposedResult,
    proposed_name,
    proposed_verdict,
    shares_text,
    verdict,
)
from dem_opt.dashboards.html_report import render_page
from dem_opt.dashboards.style import OUTLINE, WINNER, color, finish, label, rgba
from dem_opt.dashboards.tables import Table
from dem_opt.dashboards.words import ABSENT
from dem_opt.types import HELD_OUT, SEARCH

BUDGETS = {"all": "the tokens of all fine-tunes", "one": "the tokens of one fine-tune"}
"""Training tokens of each mixture, by budget."""

_PALETTE = {"all": "grid", "one": "random"}
"""The algorithm whose colour a budget borrows."""

_MARKS = (1, 2, 3, 5, 8, 11, 15, 20, 30, 50, 100)
"""Numbers of mixtures that the table lists."""


MINUS = "minus composite [95%]"
"""Column of held-out differences to the composite, with intervals over documents."""


def quality_table(comparison: MixingComparison) -> Table:
    """List base, composite and the best mixture of each budget with their cost and NLL in nats per token."""
    names = list(comparison.weights)
    composite = comparison.edited
    rows = [
        _quality_row("base", Cost(), comparison.base, names),
        _quality_row(f"composite: {len(composite.coefficients)} fine-tunes, search", composite.cost, composite, names),
    ]
    for budget in comparison.against:
        best = comparison.best(budget.budget)
        total = sum((mixture.cost for mixture in comparison.mixed if mixture.budget == budget.budget), Cost())
        tokens = BUDGETS[budget.budget]
        rows.append(_quality_row(f"best of {budget.mixtures} mixtures, {tokens}", total, best, names))
        rows.append(_quality_row(f"that mixture alone, {tokens}", best.cost, best, names))
    for proposed in comparison.proposed:
        model = f"{proposed_name(comparison, proposed)}, all included"
        rows.append(_quality_row(model, comparison.total_cost(proposed), proposed, names))
    headers = ("model", "training tokens", "FLOPs", "seconds", "search", "held-out", MINUS, *names)
    return Table(headers, tuple(rows))


def _quality_row(
    model: str, cost: Cost, scored: BaseScore | MergeResult | MixtureResult | ProposedResult, names: Sequence[str]
) -> tuple[str, ...]:
    nll = scored.nll[HELD_OUT]
    objectives = (f"{scored.objective[split]:.4f}" for split in (SEARCH, HELD_OUT))
    costs = (f"{cost.trained_tokens:,}", f"{cost.flops:.2e}" if cost.flops else "0", f"{cost.seconds:.0f}")
    apart = None if isinstance(scored, MergeResult) else scored.difference
    return (model, *costs, *objectives, _apart(apart), *(f"{nll[name]:.4f}" for name in names))


def _apart(apart: Difference | None) -> str:
    """A held-out difference to the composite with its interval."""
    return ABSENT if apart is None else f"{apart.mean:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]"


def curve_table(comparison: MixingComparison, budget: BudgetComparison) -> Table:
    """List the expected held-out NLL of the best of k mixtures, and cost and NLL relative to the composite's."""
    composite = comparison.edited
    rows = tuple(
        (
            str(point.mixtures),
            f"{point.flops:.2e}",
            f"{point.flops / composite.cost.flops:.2f}",
            f"{point.objective[HELD_OUT]:.4f}",
            f"{point.objective[HELD_OUT] - composite.objective[HELD_OUT]:+.4f}",
        )
        for point in budget.curve
        if point.mixtures in _MARKS or point.mixtures == budget.mixtures
    )
    headers = ("mixtures", "FLOPs", "FLOPs / composite's", "expected NLL", "NLL - composite's")
    return Table(headers, rows)


def mixture_table(comparison: MixingComparison) -> Table:
    """List every model trained on a mixture, the best of each budget on the search split first."""
    ranked = sorted(comparison.mixed, key=lambda mixture: (mixture.budget, mixture.objective[SEARCH]))
    rows = tuple(
        (
            BUDGETS[mixture.budget],
            shares_text(mixture.shares),
            f"{mixture.objective[SEARCH]:.4f}",
            f"{mixture.objective[HELD_OUT]:.4f}",
            _apart(mixture.difference),
        )
        for mixture in ranked
    )
    return Table(("training tokens", "mixture", "search", "held-out", MINUS), rows, words=2)


def mixing_figure(comparison: MixingComparison) -> go.Figure:
    """Draw the expected held-out NLL of the best mixture against FLOPs, a line for each budget, and the composite."""
    figure = go.Figure()
    for budget in comparison.against:
        _add_budget(figure, comparison, budget)
    composite = comparison.edited
    figure.add_scatter(
        x=[composite.cost.flops],
        y=[round(composite.objective[HELD_OUT], 6)],
        name="composite: fine-tunes and search",
        mode="markers",
        marker={"color": color("simplex-gp"), "size": 12, "symbol": "diamond"},
        hovertemplate=f"%{{x:.2e}} FLOPs<br>%{{y:.4f}} {comparison.unit}<extra></extra>",
    )
    for proposed in comparison.proposed:
        _add_proposed(figure, comparison, proposed)
    base = round(comparison.base.objective[HELD_OUT], 6)
    figure.add_hline(y=base, line={"color": OUTLINE, "width": 1, "dash": "dot"}, annotation_text="base")
    figure.update_xaxes(title="FLOPs of training and scoring (log scale)", type="log")
    figure.update_yaxes(title=f"objective on the held-out split ({comparison.unit})")
    reading = (
        "Lines: expected NLL of the best of 1, 2, 3, ... mixtures, chosen on the search split, over all orders of "
        "trying them. Dashes: the single mixtures. At the composite's height the lines give the cost at equal "
        "quality; directly above or below it, the quality at equal cost."
    )
    endpoints = "; ".join(
        f"best of {budget.mixtures} mixtures with {BUDGETS[budget.budget]} {budget.curve[-1].objective[HELD_OUT]:.4f} "
        f"for {budget.curve[-1].flops:.2e} FLOPs"
        for budget in comparison.against
    )
    endpoints += "".join(
        f"; {proposed_name(comparison, proposed)} {proposed.objective[HELD_OUT]:.4f} for "
        f"{comparison.total_cost(proposed).flops:.2e} FLOPs"
        for proposed in comparison.proposed
    )
    description = (
        f"Objective in {comparison.unit}: base {base:.4f}; composite {composite.objective[HELD_OUT]:.4f} for "
        f"{composite.cost.flops:.2e} FLOPs; {endpoints}."
    )
    # Each proposed mixture is a line of the legend.
    height = 440 + 20 * max(len(comparison.proposed) - 1, 0)
    return finish(figure, "Quality against cost", reading, description, height)


def _add_budget(figure: go.Figure, comparison: MixingComparison, budget: BudgetComparison) -> None:
    """Add a budget's curve, and dashes for its single mixtures at the cost of one."""
    shade = color(_PALETTE[budget.budget])
    singles = [mixture.objective[HELD_OUT] for mixture in comparison.mixed if mixture.budget == budget.budget]
    figure.add_scatter(
        x=[point.flops for point in budget.curve],
        y=[round(point.objective[HELD_OUT], 6) for point in budget.curve],
        name=label(f"mixtures, {BUDGETS[budget.budget]}", 40),
        mode="lines+markers",
        line={"color": shade},
        hovertemplate=f"%{{text}}<br>%{{x:.2e}} FLOPs<br>%{{y:.4f}} {comparison.unit}<extra></extra>",
        text=[f"best of {point.mixtures}" for point in budget.curve],
    )
    figure.add_scatter(
        x=[budget.curve[0].flops] * len(singles),
        y=[round(nll, 6) for nll in singles],
        mode="markers",
        marker={"color": rgba(shade, 0.35), "symbol": "line-ew-open", "size": 9},
        hoverinfo="skip",
        showlegend=False,
    )


def _add_proposed(figure: go.Figure, comparison: MixingComparison, proposed: ProposedResult) -> None:
    """Add a model trained on proposed shares at the cost of fine-tunes, search and its own training."""
    figure.add_scatter(
        x=[comparison.total_cost(proposed).flops],
        y=[round(proposed.objective[HELD_OUT], 6)],
        name=label(proposed_name(comparison, proposed), 110),
        mode="markers",
        marker={"color": WINNER, "size": 13, "symbol": "star" if proposed.start == "base" else "star-open"},
        text=[label(proposed_name(comparison, proposed), 110)],
        hovertemplate=f"%{{text}}<br>%{{x:.2e}} FLOPs<br>%{{y:.4f}} {comparison.unit}<extra></extra>",
    )


def verdicts(comparison: MixingComparison) -> list[str]:
    """Return the comparison in words, one paragraph for each budget and for each proposed mixture."""
    return [
        f"Mixtures with {BUDGETS[budget.budget]}. {' '.join(verdict(comparison, budget))}"
        for budget in comparison.against
    ] + [proposed_verdict(comparison, proposed) for proposed in comparison.proposed]


def quality_title(comparison: MixingComparison) -> str:
    """Title of the quality table, with its units."""
    return f"Cost; objective in {comparison.unit}; NLL of corpora, held out, in nats per token"


def render_mixing(comparison: MixingComparison) -> str:
    """Render the comparison as one HTML page."""
    composite = comparison.edited
    counting = (
        f"FLOPs: 6 P T for training, 2 P T for scoring T tokens with P = {comparison.parameters:,} parameters. The "
        f"composite: {composite.training.flops:.2e} for its fine-tunes, {composite.search.flops:.2e} for its search."
    )
    tables = [(f"{quality_title(comparison)}. {counting}", quality_table(comparison))]
    tables += [
        (
            f"Expected best of k of {budget.mixtures} mixtures with {BUDGETS[budget.budget]}, objective in "
            f"{comparison.unit}, held-out split",
            curve_table(comparison, budget),
        )
        for budget in comparison.against
    ]
    tables.append((f"All mixtures, objective in {comparison.unit}", mixture_table(comparison)))
    return render_page(
        f"{comparison.study}: merging against mixing",
        f"{comparison.study}: merging fine-tunes against training on mixtures",
        verdicts(comparison),
        {"mixing": mixing_figure(comparison)},
        tables,
    )
